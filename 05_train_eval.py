"""Stage 05: a data set -> the accuracy of a network trained on it (section 4.1), and the closing table.

A network is trained from scratch on a distilled folder, on as many real clips (random, or a coreset by herding or
k-center), or on all, and tested on the full test set at its last epoch. Every repeat has its own network seed, and for
`random` its own clips; a coreset is one and the same in every repeat. Coresets need features of the real clips: those of
the network that `--train-on full --save` leaves, or with --features random of an untrained one. With --labels soft the
network also learns what a VideoMAE says of each video (section 3.5, eq. 11).

Reads:   work/<data set>/04_distilled/ipc<K>/<set>/<class>/*.mp4 (--train-on SET or any folder of <class>/*.mp4)
         or work/<data set>/01_clips/train/<class>.npy (--train-on random, herding, kcenter or full);
         01_clips/test/<class>.npy; the same below 01_clips/windows/ (protocol dancing, see 01 --windows)
         with --labels soft: a VideoMAE fine-tuned on the data set, a folder or hub name (--teacher)
Writes:  work/<data set>/05_results/<ipcK or full>/<set>/<net>__<labels>__<protocol>/repeat_<r>.json and result.json
         work/<data set>/05_networks/minic3d__<protocol>/, repeat 0 of `full`, with --save: network.safetensors,
         features/<class>.npy float32 [n, 512] (48 px; 2,048 at 112) of every training clip, features/<class>.csv names
         work/<data set>/05_labels/{ipc<K>/<set>,full/real}__<teacher>/, with --labels soft: <class>.npy float32
         [n, classes] logits, <class>.csv the videos of its rows, classes.csv the classes of its columns; from then on
         the teacher is not needed for this set
         work/<data set>/05_results/ipc<K>/<set>/score__minic3d__<protocol>.json, with --score
         work/<data set>/table_ipc<K>.md  the closing table, with --table
Run:     python 05_train_eval.py hmdb51 20
         python 05_train_eval.py demo 5 --train-on random
         python 05_train_eval.py demo --train-on full --save
         python 05_train_eval.py demo 5 --train-on herding --net cnn-gru     after the line above
         python 05_train_eval.py demo 5 --labels soft
         python 05_train_eval.py demo 5 --train-on work/demo/03_samples/ipc5/gvd --score   how well that network knows it
         python 05_train_eval.py demo 5 --table
Cost:    demo IPC 5: 50 s per repeat on two CPU cores. hmdb51 IPC 20, by estimate: 15 min per repeat on an A100
Expect:  demo IPC 5: see README. Chance is 1 / classes
Differs: a test pass is deterministic, in `dancing` too, where the released code draws anew each time; the last epoch
         counts, never the best; `gvd` trains 500 epochs where the released code's loop runs 501 (protocol.md 4)
"""

import argparse
import copy
import functools
import json
import math
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

import common
import contract

# EDIT HERE: the protocols. gvd: section 4.1. dancing: the released code of Dancing with Still Images, which section 4.1
# follows (protocol.md 2 and 4). demo: small enough for a laptop.
# A step takes a tenth of the set, at least `batch` and at most `max_batch` clips: MiniC3D has no normalisation, and on all
# of the demo's clips its training collapses at this rate with 8 of them.
UNIFORM = {"sampling": "uniform", "frames": "in-order", "standardise": "none", "restart": False}
PROTOCOLS = {
    "gvd": {"batch": 128, "max_batch": 128, "epochs": 500, "min_steps": 0, "rate": 0.01, "drop": 0.5, "flip": 0.5} | UNIFORM,
    "dancing": {  # its loop runs 501 epochs, 252 of them at the full rate
        "batch": 256, "max_batch": 256, "epochs": 501, "min_steps": 0, "rate": 0.01, "drop": 0.5025, "flip": 0.0,
        "sampling": "drawn", "frames": "in-order", "standardise": "batch", "restart": True,
    },
    "demo": {"batch": 8, "max_batch": 64, "epochs": 60, "min_steps": 300, "rate": 0.005, "drop": 0.5, "flip": 0.5} | UNIFORM,
}  # fmt: skip
APART = ("table", "score", "plan", "PAPER")  # definitions that only show something
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
REPEATS, REPEATS_REAL = 3, 5  # networks trained: on the demo, on the real data sets
ALPHA, TAU = 0.5, 3.0  # eq. 11: weight of the teacher (lost in the paper's text), temperature (section 4.4.2)
CORESETS = ("herding", "kcenter")
REAL = ("random", *CORESETS, "full")  # sets of real clips
NETS = ("minic3d", "cnn-gru", "cnn-rnn")
RECURRENT_SIDE = 64  # pixels: the recurrent networks see the centre of larger frames (protocol.md 3.2)
MEAN, STD = common.IMAGENET_MEAN, common.IMAGENET_STD
TEST_BATCH = 64  # clips
CHECKPOINT_EVERY = 20  # epochs
SECONDS_PER_CLIP_STEP = {"demo": 0.02}  # on two CPU cores; the real sets on an A100, by estimate:
SECONDS_PER_CLIP_STEP_GPU = 0.0015
# Table 1 as far as the paper's text gives it away (MiniC3D, the better of its two rows, from gains and shares): top-1 %.
PAPER = {
    "hmdb51": {("gvd", 1): 9.5, ("gvd", 5): 14.3, ("gvd", 20): 21.1, ("full", None): 28.6},
    "miniucf": {("gvd", 5): 34.7, ("gvd", 20): 44.8, ("full", None): 57.2},
}


KNOBS = {  # the options that override a protocol
    "batch": dict(type=contract.positive, metavar="N", help="least clips of a step; alone it sets --max-batch too"),
    "max_batch": dict(type=contract.positive, metavar="N", help="most clips of a step, which takes a tenth of the set"),
    "epochs": dict(type=contract.positive, metavar="N", help="epochs; alone it sets --min-steps to 0"),
    "min_steps": dict(type=int, metavar="N", help="small sets are trained for more epochs, until there are N steps"),
    "rate": dict(type=float, metavar="R", help="learning rate"),
    "drop": dict(type=float, metavar="S", help="the rate falls to a tenth at this share of the epochs"),
    "flip": dict(type=float, metavar="P", help="probability of a training clip's flip, drawn in every epoch"),
    "sampling": dict(choices=("uniform", "drawn"), help="the real clips' frames: window 0 of 01, or the drawn windows"),
    "frames": dict(
        choices=("in-order", "shuffled", "one"), help="of all clips: shuffled, or one for all, shows what order teaches"
    ),
    "standardise": dict(choices=("none", "batch", "clip"), help="subtract the mean of a batch or clip, divide by its std"),
    "restart": dict(action=argparse.BooleanOptionalAction, help="forget the momentum when the rate falls"),
}


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("ipc", type=contract.positive, nargs="?", help="videos per class (not for --train-on full)")
    parser.add_argument("--train-on", default="gvd", metavar="SET", help=f"a set of stage 04, a folder, or {', '.join(REAL)}")
    parser.add_argument("--features", choices=("full", "random"), help="of a coreset: of the network of full, an untrained")
    parser.add_argument("--net", choices=NETS, default="minic3d", help="network that is trained (minic3d)")
    parser.add_argument("--labels", choices=("hard", "soft"), default="hard", help="classes, or a teacher's too (hard)")
    parser.add_argument("--teacher", metavar="MODEL", help="VideoMAE, folder or hub name (the data set's own)")
    parser.add_argument("--alpha", type=float, help=f"of soft labels: weight of the teacher, 0 to 1 ({ALPHA})")
    parser.add_argument("--tau", type=float, help=f"of soft labels: temperature ({TAU})")
    parser.add_argument("--name", help="name of the results' folder (the set's name)")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="gvd, and for the demo: demo")
    knobs = parser.add_argument_group("knobs", "default to the protocol's; a result with another value is marked")
    for knob, options in KNOBS.items():
        knobs.add_argument("--" + knob.replace("_", "-"), **options)
    parser.add_argument("--repeats", type=contract.positive, help=f"networks trained ({REPEATS_REAL}; demo {REPEATS})")
    parser.add_argument("--hmdb-train", choices=("all", "official"), default="all", help="HMDB51's training clips (all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the convolutions (bfloat16 where it is native)")
    parser.add_argument("--save", action="store_true", help="with --train-on full: keep the network of repeat 0")
    parser.add_argument("--score", action="store_true", help="test the network that --save kept on the set, train nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the results at this IPC, train nothing")
    args = contract.parse(parser)
    if args.ipc is None and (args.train_on != "full" or args.table):
        parser.error("ipc: needed unless --train-on full")
    if args.save and args.train_on != "full":
        parser.error("--save: only with --train-on full")
    if args.save and args.net != "minic3d":
        parser.error("--save: only with --net minic3d, whose features the coresets are chosen by")
    if args.labels == "hard" and (args.teacher, args.alpha, args.tau) != (None, None, None):
        parser.error("--teacher, --alpha and --tau: only with --labels soft")
    if args.labels == "soft":
        if args.save:
            parser.error("--save: only with hard labels, as the protocol has them")
        args.alpha, args.tau = (default if v is None else v for v, default in ((args.alpha, ALPHA), (args.tau, TAU)))
        if not 0 <= args.alpha <= 1 or not 0 < args.tau < math.inf:
            parser.error("--alpha must be 0 to 1, and --tau above 0")
    if args.features and args.train_on not in CORESETS:
        parser.error("--features: only with --train-on herding or kcenter")
    if args.train_on in CORESETS:
        args.features = args.features or "full"
    args.protocol = args.protocol or ("demo" if args.dataset == "demo" else "gvd")
    args.repeats = args.repeats or (REPEATS if args.dataset == "demo" else REPEATS_REAL)
    args.knobs = {"name": args.protocol, **PROTOCOLS[args.protocol]}
    if args.epochs:
        args.knobs["min_steps"] = 0
    if args.batch:
        args.knobs["max_batch"] = args.batch
    args.knobs |= {knob: getattr(args, knob) for knob in KNOBS if getattr(args, knob) is not None}
    for knob, most in (("rate", math.inf), ("drop", 1), ("flip", 1), ("min_steps", math.inf)):
        if not 0 <= args.knobs[knob] <= most or not math.isfinite(args.knobs[knob]):
            parser.error(f"--{knob.replace('_', '-')}: must be {'at least 0' if most > 1 else '0 to 1'}")
    return args


def network_folder(args):
    """Where `--train-on full --save` leaves the network of all real clips and the clips' features."""
    return contract.work_folder(args, "05_networks", f"minic3d__{args.protocol}")


def full_command(args):
    """The command that makes the network of all real clips and its features."""
    words = ["--train-on", "full", "--save", "--protocol", args.protocol]
    words += ["--hmdb-train", args.hmdb_train] if args.hmdb_train != "all" else []
    return contract.command("05_train_eval.py", argparse.Namespace(**{**vars(args), "ipc": None}), *words)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained and tested on
# ---------------------------------------------------------------------------------------------------------------------


def clip_file(split, label, args):
    """The file of a class below 01_clips: of window 0, or of the drawn windows."""
    return f"windows/{split}/{label}.npy" if args.knobs["sampling"] == "drawn" else f"{split}/{label}.npy"


def real_clips(args, split, manifest):
    """Real clips {class: ({name: row}, uint8 [m, windows, 16, S, S, 3])} of a split, the array still on the disk.

    ContractError when a class has no clip, or for a selection fewer than it needs.
    """
    folder = contract.work_folder(args, "01_clips")
    drawn = ["--windows"] if args.knobs["sampling"] == "drawn" else []
    mend = contract.command("01_encode_latents.py", args, *drawn)
    contract.need(manifest, [clip_file(split, c, args) for c in args.classes], folder, mend)
    rows = {c: [] for c in args.classes}
    for row in common.read_csv(folder / "index.csv"):
        unused = args.hmdb_train == "official" and row["official"] == "0"
        if row["class"] in rows and row["split"] == split and not unused:
            rows[row["class"]].append(row)
    side, clips = args.spec["side"], {}
    for label, of_class in rows.items():
        of_class = of_class[: args.limit]
        path = folder / clip_file(split, label, args)
        least = args.ipc if split == "train" and args.train_on in ("random", *CORESETS) else 1
        if len(of_class) < least:
            what = "training" if split == "train" else "test"
            raise contract.ContractError(
                f"{path}: too few {what} clips of {label}\n  expected: at least {least}\n"
                f"  found:    {len(of_class)}\n  get the whole data set, choose --classes that have clips, or raise --limit"
            )
        array = contract.load_array(path, (None, None, common.NUM_FRAMES, side, side, 3), "uint8", mend)
        clips[label] = ({row["name"]: int(row["row"]) for row in of_class}, array)
    return clips


def select_random(clips, ipc, seed, repeat):
    """{class: names} of `ipc` random training clips of each class, drawn for this repeat."""
    chosen = {}
    for label, (rows, _) in clips.items():
        names = sorted(rows)
        order = torch.randperm(len(names), generator=contract.generator(seed, "05", "random", repeat, label))
        chosen[label] = sorted(names[i] for i in order[:ipc].tolist())
    return chosen


def herding(features, count):
    """Rows of `count` items, chosen greedily without replacement such that their sum follows the mean (Welling 2009).

    features: [n, D]. Item k is the one nearest to k times the mean minus the sum of those before; the first of equals.
    """
    mean, total, chosen = features.mean(0), np.zeros_like(features[0]), []
    for k in range(1, count + 1):
        distances = np.linalg.norm(k * mean - total - features, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))
        total = total + features[chosen[-1]]
    return chosen


def kcenter(features, count):
    """Rows of `count` items: the one nearest to the mean, then always the one farthest from its nearest centre.

    features: [n, D]. Greedy k-center of Gonzalez (1985) by the true pairwise distances; the first of equals.
    """
    chosen = [int(np.linalg.norm(features - features.mean(0), axis=1).argmin())]
    nearest = np.full(len(features), np.inf)  # distance to the nearest centre
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.linalg.norm(features - features[chosen[-1]], axis=1))
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    return chosen


@torch.inference_mode()
def features_of(net, clips, standardise):
    """Flattened output of MiniC3D's last block, before its pooling: float32 [n, 512] (48 px) of uint8 clips."""
    net.eval()
    return torch.cat([net.blocks(to_input(part, standardise)).flatten(1) for part in clips.split(TEST_BATCH)]).cpu().numpy()


def real_features(args, clips, device):
    """{class: ([name], float32 [n, D])} of the real clips in order of name.

    By the network that `--train-on full --save` left, or with --features random by an untrained one. ContractError when
    a clip is not among what it left.
    """
    found = {}
    if args.features == "random":
        with torch.random.fork_rng([]):
            torch.manual_seed(contract.generator(args.seed, "05", "untrained").initial_seed())
            net = build("minic3d", 1, args.spec["side"]).to(device)
    for label, (rows, array) in clips.items():
        names, path = sorted(rows), network_folder(args) / "features" / f"{label}.npy"
        if args.features == "random":
            of_class, _ = tensors({label: (rows, array)}, device, {label: names})
            found[label] = (names, features_of(net, of_class, args.knobs["standardise"]))
            continue
        kept = [row["name"] for row in common.read_csv(path.with_suffix(".csv"))]
        features = contract.load_array(path, (len(kept), None), "float32", full_command(args))
        if missing := [name for name in names if name not in kept]:
            raise contract.ContractError(
                f"{path}: no features of {missing[0]}\n  expected: {len(names)} clips\n"
                f"  found:    {len(names) - len(missing)}\n  run: {full_command(args)}"
            )
        found[label] = (names, features[[kept.index(name) for name in names]])
    return found


def select_coreset(args, clips, device):
    """{class: names} of the `ipc` training clips of each class that herding or k-center chooses; ties go by name."""
    choose = herding if args.train_on == "herding" else kcenter
    features = real_features(args, clips, device)
    return {c: [names[i] for i in choose(array.astype(np.float64), args.ipc)] for c, (names, array) in features.items()}


def label_folder(args, name):
    """Where the teacher's logits on a set are kept; those on real clips are of all training clips."""
    own = common.UCF101_VIDEOMAE if args.dataset in ("miniucf", "ucf101") else "videomae"
    teacher = Path(args.teacher or own).name
    if args.train_on not in REAL:
        return contract.work_folder(args, "05_labels", f"ipc{args.ipc}", f"{name}__{teacher}")
    drawn = "-windows" if args.knobs["sampling"] == "drawn" else ""
    return contract.work_folder(args, "05_labels", "full", f"real{drawn}__{teacher}")


def label_files(args):
    """The files of a folder of logits."""
    return ["classes.csv", *(f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv"))]


def write_labels(args, name, load_clips, videos, cost):
    """Asks the teacher (section 3.5) unless the logits on these clips are there; returns the content hash of the logits.

    The teacher sees the videos as the network does before its flips: in order, at network size. videos: {kind: hash} of
    the clips. A teacher that is not at hand is not needed for logits that were made of the same clips.
    """
    folder, wanted = label_folder(args, name), label_files(args)
    mend = contract.command("05_train_eval.py", args, "--train-on", args.train_on, "--labels", "soft")
    try:
        teacher = common.videomae_folder(args)
    except contract.Missing:
        if not (folder / "manifest.json").exists():
            raise
        manifest = contract.read_folder(folder, args, mend)
        contract.need(manifest, wanted, folder, mend)
        made_of = {kind: value for kind, value in manifest["identity"]["inputs"].items() if kind != "teacher"}
        if made_of != videos:
            contract.say(f"05 {folder} has logits of other videos")
            raise
        return contract.content(manifest, wanted)
    settings = {"classes": args.classes, "hmdb_train": args.hmdb_train, "limit": args.limit}
    settings |= {"device": args.device, "threads": args.threads}
    inputs = {**videos, "teacher": common.videomae_hash(teacher, args)}
    identity = contract.identity(__file__, args, settings, inputs, {}, APART)
    todo, identity = contract.begin(folder, identity, wanted, args, cost)
    if todo is not None:
        network, scale = common.load_videomae(teacher, torch.device(identity["parameters"]["device"]))
        columns = common.output_columns(network, args.classes, teacher)
        common.write_csv(folder / "classes.csv", ("name",), [(c,) for c in args.classes])
        for label, (rows, array) in tqdm(load_clips().items(), desc="05 teacher", mininterval=1):
            _, logits = common.run_videomae(network, scale, array[list(rows.values()), 0])
            contract.save_array(folder / f"{label}.npy", logits[:, columns].numpy())
            common.write_csv(folder / f"{label}.csv", ("name",), [(video,) for video in rows])
        kinds = {file: ([], "csv") for file in wanted if file.endswith(".csv")}
        contract.finish(folder, identity, wanted, args, ["transformers"], kinds)
    return contract.content(contract.read_folder(folder, args, mend), wanted)


def teacher_logits(args, folder, clips, keep, device):
    """The teacher's logits float32 [n, classes] of the videos that `tensors` gives of the same clips, in its order."""
    found = []
    for label, (rows, _) in sorted(clips.items()):
        kept = [row["name"] for row in common.read_csv(folder / f"{label}.csv")]
        logits = contract.load_array(folder / f"{label}.npy", (len(kept), len(args.classes)), "float32", "")
        found.append(logits[[kept.index(name) for name in (keep[label] if keep else rows)]])
    return torch.from_numpy(np.concatenate(found)).to(device)


def set_folder(args):
    """The folder of the set: stage 04's of that name, else any folder."""
    folder = contract.work_folder(args, "04_distilled", f"ipc{args.ipc}", args.train_on)
    return Path(args.train_on) if not folder.is_dir() and Path(args.train_on).is_dir() else folder


def find_videos(args):
    """The videos of a distilled set or a bare folder: (folder, {class: [relative path]}, content hash, bytes)."""
    folder = set_folder(args)
    if folder.is_dir() and not any((folder / file).exists() for file in ("manifest.json", "identity.json")):
        hashes = contract.Hashes(args.work_dir)
        paths = sorted(p for p in folder.rglob("*.mp4") if not p.is_symlink() and not p.name.startswith("."))
        outputs = {p.relative_to(folder).as_posix(): {"sha256": hashes(p), "bytes": p.stat().st_size} for p in paths}
        hashes.save()
    else:
        mend = contract.command("04_mvic_compose.py", args, "--name", folder.name)
        manifest = contract.read_folder(folder, args, mend)
        outputs = {name: entry for name, entry in manifest["outputs"].items() if name.endswith(".mp4")}
    videos = {c: sorted(name for name in outputs if name.split("/")[0] == c)[: args.limit] for c in args.classes}
    for label, names in videos.items():
        if not names:
            raise contract.ContractError(f"{folder / label}: no .mp4\n  expected: videos of each of {len(videos)} classes")
    used = [name for names in videos.values() for name in names]
    size = sum(outputs[name]["bytes"] for name in used)
    return folder, videos, contract.digest({name: outputs[name]["sha256"] for name in used}), size


def set_name(args, folder):
    """The name of the results' folder; ContractError when it is another set's."""
    name = args.name or folder.resolve().name
    own = contract.work_folder(args, "04_distilled", f"ipc{args.ipc}", name)
    taken = name in REAL or (own.is_dir() and own.resolve() != folder.resolve())
    if taken:
        raise contract.ContractError(f"{folder}: the name {name} is that of another set\n  type --name with one of its own")
    return name


def read_set(folder, videos, args):
    """Videos as the networks see them, by the path of the real clips: {class: ({name: row}, uint8 [n, 16, S, S, 3])}."""
    clips = {}
    for label, names in tqdm(videos.items(), desc="05 read", mininterval=1):
        array = common.network_clips(folder, names, args.dataset)[:, None]
        clips[label] = ({name: row for row, name in enumerate(names)}, array)
    return clips


def reorder(clips, frames, seed):
    """The clips with their frames shuffled, or 16 times the same one ("one"): as drawn from the seed for each clip."""
    if frames == "in-order":
        return clips
    reordered = {}
    for label, (rows, array) in clips.items():
        array = np.array(array)
        for name, row in rows.items():
            order = torch.randperm(common.NUM_FRAMES, generator=contract.generator(seed, "05", "frames", label, name))
            array[row] = array[row][:, order if frames == "shuffled" else order[:1].expand(len(order))]
        reordered[label] = (rows, array)
    return reordered


def tensors(clips, device, keep=None, window=0, net="minic3d"):
    """(uint8 [n, 16, S, S, 3], labels [n]) on the device, classes in ASCII order, at the side that the network takes.

    keep: {class: names} to choose. window: which of the clips' windows.
    """
    arrays, labels = [], []
    for index, (label, (rows, array)) in enumerate(sorted(clips.items())):
        part = array[[rows[name] for name in (keep[label] if keep else rows)], window]
        cut = (part.shape[2] - side_of(net, part.shape[2])) // 2
        arrays.append(part[:, :, cut : part.shape[2] - cut, cut : part.shape[3] - cut])
        labels += [index] * len(arrays[-1])
    return torch.from_numpy(np.concatenate(arrays)).to(device), torch.tensor(labels, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """CNN+GRU or CNN+RNN (protocol.md 3.2): three 2D convolutions on every frame, one recurrent layer over the frames.

    forward: float [n, 3, 16, S, S] -> logits [n, num_classes]. 128 (S/8)^2 features of a frame, hidden an eighth of
    them: 8,192 and 1,024 at 64 px; 28.7 and 9.8 million parameters there at 50 classes.
    """

    def __init__(self, num_classes, side, layer):
        super().__init__()
        blocks = []
        for inputs in (3, 128, 128):
            blocks += [nn.Conv2d(inputs, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        features = 128 * (side // 8) ** 2
        self.recurrent = layer(features, features // 8, batch_first=True)
        self.head = nn.Linear(features // 8, num_classes)

    def forward(self, clips):
        frames = clips.transpose(1, 2)
        features = self.blocks(frames.flatten(0, 1)).flatten(1).unflatten(0, frames.shape[:2])  # [n, 16, features]
        with torch.autocast(clips.device.type, enabled=False):  # not in bfloat16 on every device
            states, _ = self.recurrent(features.float())
        return self.head(states.mean(1))


def side_of(net, side):
    """Side in pixels of the central part that a network takes from clips of `side`."""
    return side if net == "minic3d" else min(side, RECURRENT_SIDE)


def build(net, num_classes, side):
    """The untrained network of that name, its weights in the layout in which convolutions are fast."""
    if net == "minic3d":
        return common.MiniC3D(num_classes).to(memory_format=torch.channels_last_3d)
    layer = nn.GRU if net == "cnn-gru" else nn.RNN
    return Recurrent(num_classes, side_of(net, side), layer).to(memory_format=torch.channels_last)


def to_input(clips, standardise="none"):
    """uint8 [n, 16, S, S, 3] -> float32 [n, 3, 16, S, S], ImageNet mean and std, then standardised if asked for."""
    mean, std = (torch.tensor(v, device=clips.device) for v in (MEAN, STD))
    x = clips.float().div_(255).sub_(mean).div_(std)
    if standardise == "batch":  # the released code's second normalisation: one mean and deviation for the batch tensor
        x = (x - x.mean()) / x.std()
    elif standardise == "clip":
        x = (x - x.mean((1, 2, 3, 4), keepdim=True)) / x.std((1, 2, 3, 4), keepdim=True)
    return x.permute(0, 4, 1, 2, 3)  # the layout in memory is channels_last_3d


def batch_size(num_clips, protocol):
    """Clips of a step: a tenth of the set, between the protocol's least and most."""
    return min(protocol["max_batch"], max(protocol["batch"], num_clips // 10))


def num_epochs(num_clips, protocol):
    """Epochs of a training: the protocol's, more where that would be fewer than its least number of steps."""
    steps_per_epoch = -(-num_clips // batch_size(num_clips, protocol))
    return max(protocol["epochs"], -(-protocol["min_steps"] // steps_per_epoch))


def train(clips, labels, num_classes, protocol, seed, repeat, dtype, checkpoint, kind="minic3d", soft=None):
    """Trains a network of NETS from scratch (section 4.1). Returns (network, last epoch's mean loss).

    soft: (teacher's logits [n, classes], alpha, tau) of soft labels (eq. 11).
    What an epoch draws depends on the seed, the repeat and the epoch only, so that a run taken up from `checkpoint` ends
    with the same weights as one that ran through.
    """
    device, epochs = clips.device, num_epochs(len(clips), protocol)
    torch.manual_seed(contract.generator(seed, "05", repeat, "network").initial_seed())
    net = build(kind, num_classes, clips.shape[2]).to(device)
    optimiser = torch.optim.SGD(net.parameters(), lr=protocol["rate"], momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    start = 0
    if checkpoint.exists():
        with contract.checkpoint(checkpoint):
            saved = torch.load(checkpoint, weights_only=True, map_location=device)
            net.load_state_dict(saved["net"])
            optimiser.load_state_dict(saved["optimiser"])
            start = saved["epoch"]
    bar = tqdm(range(start, epochs), desc=f"05 repeat {repeat}", initial=start, total=epochs, mininterval=1)
    mean_loss, drop = None, math.ceil(protocol["drop"] * epochs)
    for epoch in bar:
        optimiser.param_groups[0]["lr"] = protocol["rate"] * (0.1 if epoch >= drop else 1.0)
        if epoch == drop and protocol["restart"]:
            optimiser.state.clear()  # the released code makes a new optimiser
        generator = contract.generator(seed, "05", repeat, "epoch", epoch)
        torch.manual_seed(generator.initial_seed())  # dropout; inside fork_rng
        order = torch.randperm(len(clips), generator=generator).to(device)
        flips = (torch.rand(len(clips), generator=generator) < protocol["flip"]).to(device)
        net.train()
        losses = []
        for batch in order.split(batch_size(len(clips), protocol)):
            x = clips[batch]
            x = to_input(torch.where(flips[batch, None, None, None, None], x.flip(3), x), protocol["standardise"])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(x.contiguous(memory_format=torch.channels_last_3d))
            if soft is None:
                loss = nn.functional.cross_entropy(logits.float(), labels[batch])
            else:
                loss = common.soft_label_loss(logits.float(), labels[batch], soft[0][batch], *soft[1:])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        if (epoch + 1) % CHECKPOINT_EVERY == 0 and epoch + 1 < epochs:
            with contract.atomic(checkpoint) as handle:
                torch.save({"epoch": epoch + 1, "net": net.state_dict(), "optimiser": optimiser.state_dict()}, handle)
    return net, mean_loss


@torch.inference_mode()
def test(net, passes, labels, classes, dtype, standardise="none"):
    """Accuracies in percent of clips: top1, top5, per_class; over several passes their mean.

    passes: uint8 [n, 16, S, S, 3] each, the windows of the same clips. Nothing is drawn: a test is a function of the
    weights and the stored windows; with `batch` it also depends on which clips share a batch (64 in order of class).
    """
    net.eval()
    logits = []
    for part in (part for clips in passes for part in clips.split(TEST_BATCH)):
        x = to_input(part, standardise).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
            logits.append(net(x).float())
    ranked = torch.cat(logits).topk(min(5, len(classes)), dim=1).indices
    labels = labels.repeat(len(passes))
    right = ranked == labels[:, None]
    first = right[:, 0].double()
    per_class = {c: round(100 * first[labels == i].mean().item(), 4) for i, c in enumerate(classes)}
    top5 = right.any(1).double().mean().item()
    return {"top1": round(100 * first.mean().item(), 4), "top5": round(100 * top5, 4), "per_class": per_class}


def summary(values):
    """Mean and sample standard deviation (ddof 1; none for a single value)."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "std": deviation, "n": len(values), "values": values}


# ---------------------------------------------------------------------------------------------------------------------
# Table and main
# ---------------------------------------------------------------------------------------------------------------------


def table(args):
    """The closing table of all sets at this IPC, from their result.json; printed and written to table_ipc<K>.md."""
    paper = PAPER.get(args.dataset)
    columns = [f"{args.dataset}, IPC {args.ipc}", "network, protocol", "top-1 % (n)", "top-5 %", "videos", "stored bytes"]
    columns += ["paper"] if paper else []
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    details, results = [], contract.work_folder(args, "05_results")
    folders = [f for part in (f"ipc{args.ipc}", "full") for f in sorted((results / part).glob("*/*")) if f.is_dir()]
    place = {name: i for i, name in enumerate(("random", *CORESETS))}  # Table 1: coresets, distilled sets, full
    for folder in sorted(folders, key=lambda f: (f.parent.parent.name == "full", place.get(f.parent.name, len(place)))):
        if ".old-" in folder.name or not (folder / "manifest.json").exists():
            continue
        contract.read_folder(folder, args, contract.command("05_train_eval.py", args, "--train-on", folder.parent.name))
        result = contract.read_json(folder / "result.json")
        if sorted(result["per_class"]) != args.classes:  # another question
            continue
        short = "" if result["complete"] else f" **short of its protocol: {'; '.join(result.get('deviations', []))}**"
        short = ", official clips" * (result.get("hmdb_train") == "official") + short
        spread = "" if result["top1"]["std"] is None else f" ± {result['top1']['std']:.1f}"
        name = result["set"] + ", soft labels" * (result["labels"] == "soft")
        cells = [name, f"{result['net']}, {result['protocol']['name']}{short}"]
        cells += [f"{result['top1']['mean']:.1f}{spread} ({result['top1']['n']})", f"{result['top5']['mean']:.1f}"]
        cells += [f"{result['videos']:,}", f"{result['bytes']:,}"]
        if paper:
            asked = (result["set"], None if result["set"] == "full" else args.ipc)
            cells.append(str(paper.get(asked, "-") if result["net"] == "minic3d" else "-"))
        lines.append("| " + " | ".join(cells) + " |")
        details.append(f"{name}: " + ", ".join(f"{v:.2f}" for v in result["top1"]["values"]))
    if not details:
        raise contract.ContractError(
            f"{results}: no result at IPC {args.ipc}\n  run: bash run_all.sh {args.dataset} {args.ipc}"
        )
    text = "\n".join(lines) + (
        "\n\nLast epoch; mean ± sample standard deviation over n networks. Stored bytes: the .mp4 files of a generated set,\n"
        "the uint8 clips at network size of a real one. Top-1 of each network: " + "; ".join(details) + "\n"
    )
    if paper:
        text += "Paper: its better row, soft labels as a rule, as far as its text lets it be calculated.\n"
    with contract.atomic(contract.work_folder(args, f"table_ipc{args.ipc}.md")) as handle:
        handle.write(text.encode())
    print(text, end="")


def score(args):
    """Accuracy on the set of the network that was trained on all real clips: how well the videos show their class."""
    folder = network_folder(args)
    contract.read_folder(folder, args, full_command(args))
    with safe_open(folder / "network.safetensors", "pt") as file:
        known = json.loads(file.metadata()["classes"])
    net = common.MiniC3D(len(known))
    net.load_state_dict(load_file(folder / "network.safetensors"))
    source, videos, _, _ = find_videos(args)
    if unknown := [c for c in args.classes if c not in known]:
        raise contract.ContractError(f"{folder}: a network without class {unknown[0]}\n  it knows: {', '.join(known)}")
    clips, labels = tensors(read_set(source, videos, args), "cpu")
    labels = torch.tensor([known.index(args.classes[i]) for i in labels.tolist()])
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    net = net.to(memory_format=torch.channels_last_3d)
    result = test(net, [clips], labels, known, torch.float32, args.knobs["standardise"])
    rates = {c: rate for c, rate in result["per_class"].items() if c in videos}
    if source.resolve().parent.parent.name == "03_samples":  # not the composed set of the same name
        args.name = args.name or source.resolve().name + "-samples"
    name = set_name(args, source)
    path = contract.work_folder(args, "05_results", f"ipc{args.ipc}", name, f"score__minic3d__{args.protocol}.json")
    contract.write_json(path, {"set": name, "videos": len(clips), "top1": result["top1"], "per_class": rates})
    print(f"{source}: {result['top1']:.2f} % of {len(clips)} videos recognised")
    print("  " + ", ".join(f"{c} {rate:.1f}" for c, rate in rates.items()))


def plan(args):
    """Names, items, seconds and bytes of the plan, for --dry-run."""
    per_class = args.ipc if args.train_on != "full" else args.spec["clips"][0] // len(args.spec["classes"])
    count = min(per_class, args.limit or per_class) * len(args.classes)
    seconds = SECONDS_PER_CLIP_STEP.get(args.dataset, SECONDS_PER_CLIP_STEP_GPU)
    seconds *= count * num_epochs(count, args.knobs) * args.repeats
    machine = "two CPU cores" if args.dataset == "demo" else "an A100"
    what = f"repeats on {Path(args.train_on).name}" + " with soft labels" * (args.labels == "soft")
    return (what, args.repeats, seconds, 1e4 * args.repeats, machine)


def open_set(args):
    """What is trained on and tested on: (name of the set, loader of its clips, test clips, input hashes, bytes)."""
    mend = contract.command("01_encode_latents.py", args)
    manifest = contract.read_folder(contract.work_folder(args, "01_clips"), args, mend)
    test_clips = real_clips(args, "test", manifest)
    inputs = {"test clips": contract.content(manifest, [clip_file("test", c, args) for c in args.classes])}
    if args.train_on in REAL:
        train_clips = real_clips(args, "train", manifest)
        used = [name for c in args.classes for name in (clip_file("train", c, args), f"index/{c}.csv")]
        inputs["training clips"] = contract.content(manifest, used)
        if args.features == "full":
            inputs["features"] = contract.content(network_manifest(args), feature_files(args))
        name = args.train_on + ("_untrained" if args.features == "random" else "")
        return args.name or name, lambda: train_clips, test_clips, inputs, None
    folder, videos, inputs["training videos"], size = find_videos(args)
    return set_name(args, folder), functools.cache(lambda: read_set(folder, videos, args)), test_clips, inputs, size


def feature_files(args):
    """The files of the features in 05_networks."""
    return [f"features/{c}.{kind}" for c in args.classes for kind in ("npy", "csv")]


def network_manifest(args):
    """The manifest of the network of all real clips; ContractError names the command that makes it."""
    manifest = contract.read_folder(network_folder(args), args, full_command(args))
    contract.need(manifest, feature_files(args), network_folder(args), full_command(args))
    return manifest


def find_deviations(args, num_train, num_test):
    """What makes this another measurement than the protocol's, as texts: knobs, fewer clips, features of such a network."""
    own = PROTOCOLS[args.protocol]
    found = [f"{knob} {args.knobs[knob]}, not {value}" for knob, value in own.items() if args.knobs[knob] != value]
    if args.labels == "soft":
        found += [f"{k} {v}, not {d}" for k, v, d in (("alpha", args.alpha, ALPHA), ("tau", args.tau, TAU)) if v != d]
    train, test = args.spec["clips"]
    if args.train_on != "full":
        train = args.ipc * len(args.spec["classes"])
    elif args.dataset == "hmdb51" and args.hmdb_train == "official":
        train = 3570
    counts = {"classes": (len(args.classes), len(args.spec["classes"]))}
    counts |= {"training videos": (num_train, train), "test clips": (num_test, test)}
    found += [f"{count:,} of {whole:,} {what}" for what, (count, whole) in counts.items() if count != whole]
    if args.features == "full":
        network = network_manifest(args)["identity"]["parameters"]
        wanted = {"protocol": {"name": args.protocol, **own}, "hmdb_train": args.hmdb_train, "limit": None}
        wanted |= {"classes": sorted(args.spec["classes"])}
        found += [f"features of a network with another {k}" for k, value in wanted.items() if network[k] != value]
    return found


def summarise(folder, files, name, args, num_test, size, identity):
    """Writes result.json from the files of the repeats. A set or training that is not its protocol's is marked."""
    done = sorted((contract.read_json(folder / file) for file in files), key=lambda record: record["repeat"])
    clip_bytes = common.NUM_FRAMES * args.spec["side"] ** 2 * 3
    deviations, device = find_deviations(args, done[0]["videos"], num_test), identity["device"]
    result = {
        "set": name,
        "net": args.net,
        "labels": args.labels,
        "teacher": label_folder(args, name).name.split("__")[1] if args.labels == "soft" else None,
        "alpha": args.alpha,
        "tau": args.tau,
        "protocol": args.knobs,
        "complete": not deviations,
        "deviations": deviations,
        "features": args.features,
        "hmdb_train": args.hmdb_train if args.dataset == "hmdb51" and args.train_on in REAL else None,
        "seed": args.seed,
        "repeats": [d["repeat"] for d in done],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dtype": identity["dtype"],
        "classes": len(args.classes),
        "test clips": num_test,
        "videos": done[0]["videos"],
        "bytes": done[0]["videos"] * clip_bytes if size is None else size,
        "top1": summary([d["top1"] for d in done]),
        "top5": summary([d["top5"] for d in done]),
        "per_class": {c: summary([d["per_class"][c] for d in done]) for c in args.classes},
    }
    contract.write_json(folder / "result.json", result)
    spread = "" if result["top1"]["std"] is None else f" ± {result['top1']['std']:.2f}"
    shown = name + ", soft labels" * (args.labels == "soft")
    contract.say(f"05 {shown}: top-1 {result['top1']['mean']:.2f}{spread} % (n = {len(done)})")


def save_network(folder, net, clips, args, device):
    """Writes network.safetensors and the features of every training clip, by which coresets are chosen."""
    weights = {k: v.float().cpu().contiguous() for k, v in net.state_dict().items()}
    with contract.atomic(folder / "network.safetensors") as handle:
        handle.write(save(weights, {"classes": json.dumps(args.classes)}))  # one key: several are written in any order
    for label, (rows, _) in clips.items():
        of_class, _ = tensors({label: clips[label]}, device)
        contract.save_array(folder / "features" / f"{label}.npy", features_of(net, of_class, args.knobs["standardise"]))
        common.write_csv(folder / "features" / f"{label}.csv", ("name",), [(name,) for name in rows])


def main():
    args = parse_args()
    if args.table or args.score:
        return table(args) if args.table else score(args)
    cost = plan(args)
    needed = [] if args.train_on in REAL else [set_folder(args)]
    needed += [network_folder(args)] if args.features == "full" else []
    there = all(folder.is_dir() for folder in needed)
    if args.dry_run and (args.after or not there or not contract.work_folder(args, "01_clips").exists()):
        return contract.plan_after(args, "05", cost)

    name, load_clips, test_clips, inputs, size = open_set(args)
    soft = None
    if args.labels == "soft":
        soft = label_folder(args, name)
        if args.dry_run and not (soft / "manifest.json").exists():
            return contract.plan_after(args, "05", cost)
        videos = {kind: value for kind, value in inputs.items() if kind.startswith("training")}
        inputs["soft labels"] = write_labels(args, name, load_clips, videos, cost)
    settings = {
        "classes": args.classes,
        "protocol": args.knobs,
        "train_on": args.train_on if args.train_on in REAL else "set",
    }
    settings |= {"ipc": None if args.train_on == "full" else args.ipc}
    settings |= {k: getattr(args, k) for k in ("net", "features", "hmdb_train", "limit", "device", "threads", "dtype")}
    if soft:
        settings |= {k: getattr(args, k) for k in ("labels", "alpha", "tau")}
    identity = contract.identity(__file__, args, settings, inputs, {}, APART)
    group = "full" if args.train_on == "full" else f"ipc{args.ipc}"
    folder = contract.work_folder(args, "05_results", group, name, f"{args.net}__{args.labels}__{args.protocol}")
    repeats = [f"repeat_{r}.json" for r in range(args.repeats)]
    wanted = [*repeats, "result.json"]
    keep, kept, kept_wanted = None, network_folder(args), ["network.safetensors", *feature_files(args)]
    if args.save:
        size_kept = 1e7 + 8e3 * args.spec["clips"][0]  # weights, features; its seconds are those of repeat 0
        own_cost = ("files of its network", len(kept_wanted), 0, size_kept, cost[4])
        keep, kept_identity = contract.begin(kept, copy.deepcopy(identity), kept_wanted, args, own_cost)
    todo, identity = contract.begin(folder, identity, wanted, args, cost, ["result.json"])
    if todo is None and keep is None:
        return

    device, dtype = torch.device(identity["parameters"]["device"]), getattr(torch, identity["parameters"]["dtype"])
    train_clips, test_clips = (reorder(clips, args.knobs["frames"], args.seed) for clips in (load_clips(), test_clips))
    num_passes = next(iter(test_clips.values()))[1].shape[1]
    data = [tensors(test_clips, device, window=w, net=args.net) for w in range(num_passes)]
    passes, test_labels = [clips for clips, _ in data], data[0][1]
    chosen = select_coreset(args, train_clips, device) if args.train_on in CORESETS else None
    for r, file in enumerate(repeats):
        if file not in (todo or []) and not (keep and r == 0):
            continue
        if args.train_on == "random":
            chosen = select_random(train_clips, args.ipc, args.seed, r)
        clips, labels = tensors(train_clips, device, chosen, net=args.net)
        taught = (teacher_logits(args, soft, train_clips, chosen, device), args.alpha, args.tau) if soft else None
        checkpoint = folder / f".checkpoint_{r}.pt"
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            knobs = (args.knobs, args.seed, r, dtype, checkpoint, args.net, taught)
            net, loss = train(clips, labels, len(args.classes), *knobs)
        accuracy = test(net, passes, test_labels, args.classes, dtype, args.knobs["standardise"])
        if keep and r == 0:
            save_network(kept, net, train_clips, args, device)
        if todo is not None:
            record = {"repeat": r, "loss": round(loss, 6), "clips": chosen, "videos": len(clips), **accuracy}
            contract.write_json(folder / file, record)
        checkpoint.unlink(missing_ok=True)
        contract.say(f"05 {name}, repeat {r}: top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} %")
    if todo is not None:
        for left in folder.glob(".checkpoint_*.pt"):  # of a run that was killed while it removed it
            left.unlink()
        done = [name_ for name_ in contract.listed(folder, wanted) if name_.startswith("repeat_")]
        summarise(folder, done, name, args, len(test_labels), size, identity["parameters"])
        kinds = {file: ([], "json") for file in wanted}
        contract.finish(folder, identity, wanted, args, ["opencv-python-headless"], kinds)
    if keep is not None:
        kinds = {file: ([], file.split(".")[-1]) for file in kept_wanted}
        contract.finish(kept, kept_identity, kept_wanted, args, ["safetensors"], kinds)


if __name__ == "__main__":
    contract.run(main)
