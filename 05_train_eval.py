"""Stage 05: a data set -> the accuracy of a network trained on it (section 4.1), and the closing table.

MiniC3D is trained from scratch with hard labels on a distilled folder, on as many random real clips, or on all, and
tested on the full test set at its last epoch. Every repeat has its own network seed, and for `random` its own clips.

Reads:   work/<data set>/04_distilled/ipc<K>/<set>/<class>/*.mp4 (--train-on SET or any folder of <class>/*.mp4)
         or work/<data set>/01_clips/train/<class>.npy (--train-on random or full); 01_clips/test/<class>.npy
Writes:  work/<data set>/05_results/<ipcK or full>/<set>/<net>__<labels>__<protocol>/repeat_<r>.json and result.json
         work/<data set>/05_networks/<net>__<protocol>/network.safetensors  repeat 0 of `full`, with --save
         work/<data set>/table_ipc<K>.md  the closing table, with --table
Run:     python 05_train_eval.py hmdb51 20
         python 05_train_eval.py demo 5 --train-on random
         python 05_train_eval.py demo --train-on full --save
         python 05_train_eval.py demo 5 --train-on work/demo/03_samples/ipc5/gvd --score   how well that network knows it
         python 05_train_eval.py demo 5 --table
Cost:    demo IPC 5: 50 s per repeat on two CPU cores. hmdb51 IPC 20, by estimate: 15 min per repeat on an A100
Expect:  demo IPC 5: see README. Chance is 1 / classes
Differs: 500 epochs and not 501, a deterministic test pass, the last epoch and never the best (protocol.md 4)
"""

import copy
import json
import os
import statistics
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

import common
import contract

# EDIT HERE: the protocols. gvd: section 4.1. demo: small enough for a laptop. drop: the rate falls to a tenth at this
# share of the epochs; min_steps: small sets are trained for more epochs, until there are so many steps.
PROTOCOLS = {
    "gvd": {"batch": 128, "epochs": 500, "min_steps": 0, "rate": 0.01, "drop": 0.5, "flip": 0.5},
    "demo": {"batch": 8, "epochs": 60, "min_steps": 300, "rate": 0.01, "drop": 0.5, "flip": 0.5},
}
APART = ("table", "score", "plan")  # definitions that only show something
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
REPEATS, REPEATS_REAL = 3, 5  # networks trained: on the demo, on the real data sets
REAL = ("random", "full")  # sets of real clips
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0 to 1
TEST_BATCH = 64  # clips
CHECKPOINT_EVERY = 20  # epochs
SECONDS_PER_CLIP_STEP = {"demo": 0.02}  # on two CPU cores; the real sets on an A100, by estimate:
SECONDS_PER_CLIP_STEP_GPU = 0.0015


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("ipc", type=contract.positive, nargs="?", help="videos per class (not for --train-on full)")
    parser.add_argument("--train-on", default="gvd", metavar="SET", help="a set of stage 04, a folder, random or full (gvd)")
    parser.add_argument("--name", help="name of the results' folder (the set's name)")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="gvd, and for the demo: demo")
    parser.add_argument("--epochs", type=contract.positive, help="epochs (the protocol's); the result is marked as short")
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
    args.protocol = args.protocol or ("demo" if args.dataset == "demo" else "gvd")
    args.repeats = args.repeats or (REPEATS if args.dataset == "demo" else REPEATS_REAL)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is trained and tested on
# ---------------------------------------------------------------------------------------------------------------------


def real_clips(args, split, manifest):
    """Real clips {class: ({name: row}, uint8 [m, 16, S, S, 3])} of a split, the array still on the disk.

    ContractError when a class has no clip, or for `random` fewer than it needs.
    """
    folder = contract.work_folder(args, "01_clips")
    mend = contract.command("01_encode_latents.py", args)
    contract.need(manifest, [f"{split}/{c}.npy" for c in args.classes], folder, mend)
    rows = {c: [] for c in args.classes}
    for row in common.read_csv(folder / "index.csv"):
        unused = args.hmdb_train == "official" and row["official"] == "0"
        if row["class"] in rows and row["split"] == split and not unused:
            rows[row["class"]].append(row)
    side, clips = args.spec["side"], {}
    for label, of_class in rows.items():
        of_class = of_class[: args.limit]
        least = args.ipc if split == "train" and args.train_on == "random" else 1
        if len(of_class) < least:
            what = "training" if split == "train" else "test"
            raise contract.ContractError(
                f"{folder / split / (label + '.npy')}: too few {what} clips of {label}\n  expected: at least {least}\n"
                f"  found:    {len(of_class)}\n  get the whole data set, choose --classes that have clips, or raise --limit"
            )
        path = folder / split / f"{label}.npy"
        array = contract.load_array(path, (None, None, common.NUM_FRAMES, side, side, 3), "uint8", mend)
        clips[label] = ({row["name"]: int(row["row"]) for row in of_class}, array[:, 0])
    return clips


def select_random(clips, ipc, seed, repeat):
    """{class: names} of `ipc` random training clips of each class, drawn for this repeat."""
    chosen = {}
    for label, (rows, _) in clips.items():
        names = sorted(rows)
        order = torch.randperm(len(names), generator=contract.generator(seed, "05", "random", repeat, label))
        chosen[label] = sorted(names[i] for i in order[:ipc].tolist())
    return chosen


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
        arrays = []
        for name in names:
            try:
                video = common.read_video(folder / name)
            except common.BadVideo as error:
                raise contract.ContractError(f"{folder / name}: {error}\n  expected: a video") from None
            arrays.append(common.network_clip(video[common.uniform_frames(len(video))], args.dataset))
        clips[label] = ({name: row for row, name in enumerate(names)}, np.stack(arrays))
    return clips


def tensors(clips, device, keep=None):
    """(uint8 [n, 16, S, S, 3], labels [n]) on the device, classes in ASCII order; keep: {class: names} to choose."""
    arrays, labels = [], []
    for index, (label, (rows, array)) in enumerate(sorted(clips.items())):
        arrays.append(array[[rows[name] for name in (keep[label] if keep else rows)]])
        labels += [index] * len(arrays[-1])
    return torch.from_numpy(np.concatenate(arrays)).to(device), torch.tensor(labels, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def to_input(clips):
    """uint8 [n, 16, S, S, 3] -> float32 [n, 3, 16, S, S], ImageNet mean and std."""
    mean, std = (torch.tensor(v, device=clips.device) for v in (MEAN, STD))
    return ((clips.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)  # the layout in memory is channels_last_3d


def num_epochs(num_clips, protocol):
    """Epochs of a training: the protocol's, more where that would be fewer than its least number of steps."""
    steps_per_epoch = -(-num_clips // protocol["batch"])
    return max(protocol["epochs"], -(-protocol["min_steps"] // steps_per_epoch))


def train(clips, labels, num_classes, protocol, seed, repeat, dtype, checkpoint):
    """Trains MiniC3D from scratch (section 4.1). Returns (network, last epoch's mean loss).

    What an epoch draws depends on the seed, the repeat and the epoch only, so that a run taken up from `checkpoint` ends
    with the same weights as one that ran through.
    """
    device, epochs = clips.device, num_epochs(len(clips), protocol)
    torch.manual_seed(contract.generator(seed, "05", repeat, "network").initial_seed())
    net = common.MiniC3D(num_classes).to(device, memory_format=torch.channels_last_3d)
    optimiser = torch.optim.SGD(net.parameters(), lr=protocol["rate"], momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    start = 0
    try:
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
        start = saved["epoch"]
    except FileNotFoundError:
        pass
    except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError) as error:
        raise contract.ContractError(f"{checkpoint} is damaged\n  found: {error}\n  delete it: rm {checkpoint}") from None
    bar = tqdm(range(start, epochs), desc=f"05 repeat {repeat}", initial=start, total=epochs, mininterval=1)
    mean_loss = None
    for epoch in bar:
        optimiser.param_groups[0]["lr"] = protocol["rate"] * (0.1 if epoch >= protocol["drop"] * epochs else 1.0)
        generator = contract.generator(seed, "05", repeat, "epoch", epoch)
        torch.manual_seed(generator.initial_seed())  # dropout; inside fork_rng
        order = torch.randperm(len(clips), generator=generator).to(device)
        flips = (torch.rand(len(clips), generator=generator) < protocol["flip"]).to(device)
        net.train()
        losses = []
        for batch in order.split(protocol["batch"]):
            x = to_input(clips[batch])
            x = torch.where(flips[batch, None, None, None, None], x.flip(-1), x)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(x.contiguous(memory_format=torch.channels_last_3d))
            loss = nn.functional.cross_entropy(logits.float(), labels[batch])
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
def test(net, clips, labels, classes, dtype):
    """Accuracies in percent of one deterministic pass: top1, top5, per_class."""
    net.eval()
    logits = []
    for part in clips.split(TEST_BATCH):
        with torch.autocast(clips.device.type, dtype, enabled=dtype != torch.float32):
            logits.append(net(to_input(part).contiguous(memory_format=torch.channels_last_3d)).float())
    ranked = torch.cat(logits).topk(min(5, len(classes)), dim=1).indices
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
    lines = [
        f"| {args.dataset}, IPC {args.ipc} | network, protocol | top-1 % (n) | top-5 % | videos | stored bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    details, results = [], contract.work_folder(args, "05_results")
    folders = [f for part in (f"ipc{args.ipc}", "full") for f in sorted((results / part).glob("*/*")) if f.is_dir()]
    for folder in folders:
        if ".old-" in folder.name or not (folder / "manifest.json").exists():
            continue
        contract.read_folder(folder, args, contract.command("05_train_eval.py", args, "--train-on", folder.parent.name))
        result = contract.read_json(folder / "result.json")
        short = "" if result["complete"] else " **short of its protocol**"
        spread = "" if result["top1"]["std"] is None else f" ± {result['top1']['std']:.1f}"
        lines.append(
            f"| {result['set']} | {result['net']}, {result['protocol']['name']}{short} | {result['top1']['mean']:.1f}{spread} "
            f"({result['top1']['n']}) | {result['top5']['mean']:.1f} | {result['videos']:,} | {result['bytes']:,} |"
        )
        details.append(f"{result['set']}: " + ", ".join(f"{v:.2f}" for v in result["top1"]["values"]))
    if not details:
        raise contract.ContractError(
            f"{results}: no result at IPC {args.ipc}\n  run: bash run_all.sh {args.dataset} {args.ipc}"
        )
    text = "\n".join(lines) + (
        "\n\nLast epoch; mean ± sample standard deviation over n networks. Stored bytes: the .mp4 files of a generated set,\n"
        "the uint8 clips at network size of a real one. Top-1 of each network: " + "; ".join(details) + "\n"
    )
    with contract.atomic(contract.work_folder(args, f"table_ipc{args.ipc}.md")) as handle:
        handle.write(text.encode())
    print(text, end="")


def score(args):
    """Accuracy on the set of the network that was trained on all real clips: how well the videos show their class."""
    folder = contract.work_folder(args, "05_networks", f"minic3d__{args.protocol}")
    contract.read_folder(folder, args, contract.command("05_train_eval.py", args, "--train-on", "full", "--save"))
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
    result = test(net.to(memory_format=torch.channels_last_3d), clips, labels, known, torch.float32)
    print(f"{source}: {result['top1']:.2f} % of {len(clips)} videos recognised")
    print("  " + ", ".join(f"{c} {rate:.1f}" for c, rate in result["per_class"].items() if c in videos))


def plan(args, protocol):
    """Names, items, seconds and bytes of the plan, for --dry-run."""
    per_class = args.ipc if args.train_on != "full" else args.spec["clips"][0] // len(args.spec["classes"])
    count = min(per_class, args.limit or per_class) * len(args.classes)
    seconds = SECONDS_PER_CLIP_STEP.get(args.dataset, SECONDS_PER_CLIP_STEP_GPU)
    seconds *= count * num_epochs(count, protocol) * args.repeats
    machine = "two CPU cores" if args.dataset == "demo" else "an A100"
    return (f"repeats on {Path(args.train_on).name}", args.repeats, seconds, 1e4 * args.repeats, machine)


def open_set(args):
    """What is trained on and tested on: (name of the set, loader of its clips, test clips, input hashes, bytes)."""
    mend = contract.command("01_encode_latents.py", args)
    manifest = contract.read_folder(contract.work_folder(args, "01_clips"), args, mend)
    test_clips = real_clips(args, "test", manifest)
    inputs = {"test clips": contract.content(manifest, [f"test/{c}.npy" for c in args.classes])}
    if args.train_on in REAL:
        train_clips = real_clips(args, "train", manifest)
        used = [name for c in args.classes for name in (f"train/{c}.npy", f"index/{c}.csv")]
        inputs["training clips"] = contract.content(manifest, used)
        return args.name or args.train_on, lambda: train_clips, test_clips, inputs, None
    folder, videos, inputs["training videos"], size = find_videos(args)
    return set_name(args, folder), lambda: read_set(folder, videos, args), test_clips, inputs, size


def summarise(folder, files, name, args, protocol, num_test, size):
    """Writes result.json from the files of the repeats. A set or training short of its protocol is marked."""
    done = sorted((contract.read_json(folder / file) for file in files), key=lambda record: record["repeat"])
    clip_bytes = common.NUM_FRAMES * args.spec["side"] ** 2 * 3
    own = {"name": args.protocol, **PROTOCOLS[args.protocol]}
    train, test = args.spec["clips"]
    expected = args.ipc * len(args.spec["classes"])
    if args.train_on == "full":
        expected = 3570 if args.dataset == "hmdb51" and args.hmdb_train == "official" else train
    whole = (num_test, done[0]["videos"]) == (test, expected) and args.classes == sorted(args.spec["classes"])
    result = {
        "set": name,
        "net": "minic3d",
        "labels": "hard",
        "protocol": protocol,
        "complete": protocol == own and whole,
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
    contract.say(f"05 {name}: top-1 {result['top1']['mean']:.2f}{spread} % (n = {len(done)})")


def main():
    args = parse_args()
    if args.table or args.score:
        return table(args) if args.table else score(args)
    protocol = {"name": args.protocol, **PROTOCOLS[args.protocol]}
    if args.epochs:
        protocol.update(epochs=args.epochs, min_steps=0)
    cost = plan(args, protocol)
    there = args.train_on in REAL or set_folder(args).is_dir()
    if args.dry_run and (args.after or not there or not contract.work_folder(args, "01_clips").exists()):
        return contract.plan_after(args, "05", cost)

    name, load_clips, test_clips, inputs, size = open_set(args)
    settings = {
        "classes": args.classes,
        "protocol": protocol,
        "train_on": args.train_on if args.train_on in REAL else "set",
    }
    settings |= {"ipc": None if args.train_on == "full" else args.ipc}
    settings |= {k: getattr(args, k) for k in ("hmdb_train", "limit", "device", "threads", "dtype")}
    identity = contract.identity(__file__, args, settings, inputs, {}, APART)
    group = "full" if args.train_on == "full" else f"ipc{args.ipc}"
    folder = contract.work_folder(args, "05_results", group, name, f"minic3d__hard__{args.protocol}")
    kept = contract.work_folder(args, "05_networks", f"minic3d__{args.protocol}")
    repeats = [f"repeat_{r}.json" for r in range(args.repeats)]
    wanted = [*repeats, "result.json"]
    keep = None
    if args.save:
        keep, kept_identity = contract.begin(kept, copy.deepcopy(identity), ["network.safetensors"], args, cost)
    todo, identity = contract.begin(folder, identity, wanted, args, cost, ["result.json"])
    if todo is None and keep is None:
        return

    device, dtype = torch.device(identity["parameters"]["device"]), getattr(torch, identity["parameters"]["dtype"])
    train_clips, test_data = load_clips(), tensors(test_clips, device)
    for r, file in enumerate(repeats):
        if file not in (todo or []) and not (keep and r == 0):
            continue
        chosen = select_random(train_clips, args.ipc, args.seed, r) if args.train_on == "random" else None
        clips, labels = tensors(train_clips, device, chosen)
        checkpoint = folder / f".checkpoint_{r}.pt"
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            net, loss = train(clips, labels, len(args.classes), protocol, args.seed, r, dtype, checkpoint)
        accuracy = test(net, *test_data, args.classes, dtype)
        if keep and r == 0:
            weights = {k: v.float().cpu().contiguous() for k, v in net.state_dict().items()}
            with contract.atomic(kept / "network.safetensors") as handle:
                handle.write(save(weights, {"classes": json.dumps(args.classes), "side": str(args.spec["side"])}))
        if todo is not None:
            record = {"repeat": r, "loss": round(loss, 6), "clips": chosen, "videos": len(clips), **accuracy}
            contract.write_json(folder / file, record)
        checkpoint.unlink(missing_ok=True)
        contract.say(f"05 {name}, repeat {r}: top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} %")
    if todo is not None:
        for left in folder.glob(".checkpoint_*.pt"):  # of a run that was killed while it removed it
            left.unlink()
        done = [name_ for name_ in contract.listed(folder, wanted) if name_.startswith("repeat_")]
        summarise(folder, done, name, args, protocol, len(test_data[0]), size)
        kinds = {file: ([], "json") for file in wanted}
        contract.finish(folder, identity, wanted, args, ["opencv-python-headless"], kinds)
    if keep is not None:
        kinds = {"network.safetensors": ([], "safetensors")}
        contract.finish(kept, kept_identity, ["network.safetensors"], args, ["safetensors"], kinds)


if __name__ == "__main__":
    contract.run(main)
