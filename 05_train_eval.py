"""Stage 05: a data set -> the accuracy of a network trained on it (section 4.1).

A network is trained from scratch on one set and tested on all test clips, as it is after its last epoch. The
set is a distilled one, as many real clips (random or a coreset), or all. Each repeat has its own seed, and of
`random` its own clips. With --labels soft the network also learns a VideoMAE's logits (section 3.5, eq. 11).

Reads:   work/<data set>/01_clips/test/ (protocol dancing: of 01 --windows), and the set --train-on: random or
         full, of 01_clips/train/; a name in 05_coresets/ipc<K>/ (tools/coresets.py: herding, kcenter) or in
         04_distilled/ipc<K>/, as <class>/*.mp4 or, of baselines/, <class>.npy float16 [n, V, 16, S, S, 3],
         of whose V variants of a clip each epoch draws one, and set.json; any folder of <class>/*.mp4. Soft
         labels: 05_labels/ (tools/soft_labels.py)
Writes:  work/<data set>/05_results/<ipc<K> or full>/<set>/<net>__<labels>__<protocol>/repeat_<r>.json and
         result.json; with --save 05_networks/minic3d__<protocol>/network.safetensors, of repeat 0, and its
         features/<class>.npy float32 [n, 2048] (48 px: 512) of the training clips in <class>.csv
Run:     python 05_train_eval.py hmdb51 20
         python 05_train_eval.py demo --train-on full --save
         python 05_train_eval.py demo 5 --train-on random --set epochs=20 lr=0.01 --name trial
Cost:    demo IPC 5: 40 s per repeat on two CPU cores. hmdb51 IPC 20, by estimate: 15 min on an A100
Expect:  demo IPC 5: see README. Chance is 1 / classes
Differs: one deterministic test pass; three of stored windows in `dancing`, whose code draws anew each time
"""

import contract

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

import common
import media

# A step takes a tenth of the set, min_batch_size to max_batch_size clips. Small sets are trained for more
# epochs, until there are min_steps steps. At lr_drop_at of the epochs lr falls to a tenth.
GVD = {  # section 4.1
    "epochs": 500, "min_steps": 0, "min_batch_size": 128, "max_batch_size": 128, "lr": 0.01, "flip": 0.5,
    "lr_drop_at": 0.5, "sampling": "uniform", "standardise": "none", "restart_momentum": False}  # fmt: skip
DANCING = {  # the released code of Dancing with Still Images: 252 epochs at full lr, then a new optimiser
    "epochs": 501, "min_batch_size": 256, "max_batch_size": 256, "lr_drop_at": 0.5025, "flip": 0.0,
    "sampling": "drawn", "standardise": "batch", "restart_momentum": True}  # fmt: skip
# For a laptop. On all of its clips, in batches of 8, MiniC3D would collapse: it has no normalisation.
DEMO = {"epochs": 60, "min_steps": 300, "min_batch_size": 8, "max_batch_size": 64, "lr": 0.005}
PROTOCOLS = {"gvd": GVD, "dancing": GVD | DANCING, "demo": GVD | DEMO}
SETTINGS = {  # of --set: least and greatest value, or all values; batch_size sets both bounds
    "epochs": (1, 10**6), "min_steps": (0, 10**9), "batch_size": (1, 10**6), "min_batch_size": (1, 10**6),
    "max_batch_size": (1, 10**6), "lr": (0.0, 1e6), "lr_drop_at": (0.0, 1.0), "flip": (0.0, 1.0),
    "sampling": ("uniform", "drawn"), "restart_momentum": (False, True),  # the clips' windows; when lr falls
    "standardise": ("none", "batch", "clip")}  # what is brought to mean 0 and deviation 1  # fmt: skip
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
REPEATS, REPEATS_FULL = {"demo": (3, 1)}, (5, 2)  # networks on a set, on all clips: an hour each, by estimate
ALPHA, TAU = 0.5, 3.0  # eq. 11: weight of the teacher (lost in the paper's text), temperature (section 4.4.2)
NETS = {"minic3d": None, "cnn-gru": nn.GRU, "cnn-rnn": nn.RNN}
RECURRENT_SIDE = 64  # pixels: the recurrent networks see the centre of larger frames
TEST_BATCH, CHECKPOINT_EVERY = 64, 20  # clips; epochs
SECONDS, SECONDS_FULL = {"demo": 0.02}, 0.0015  # per clip and epoch: two CPU cores; an A100, by estimate


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc="?")
    add = parser.add_argument
    add("--train-on", default="gvd", metavar="SET", help="random, full, herding, kcenter, or see above (gvd)")
    add("--net", choices=NETS, default="minic3d", help="network that is trained (minic3d)")
    kinds = "classes alone; soft labels too; or what a baseline has learnt with its set, labels or lr (hard)"
    add("--labels", choices=("hard", "soft", "stored"), default="hard", help=kinds)
    add("--alpha", type=float, default=ALPHA, help=f"of soft labels: weight of the teacher, 0 to 1 ({ALPHA})")
    add("--tau", type=float, default=TAU, help=f"of soft labels: temperature ({TAU})")
    add("--name", help="name of the results' folder (the set's)")
    add("--protocol", choices=sorted(PROTOCOLS), help="see PROTOCOLS (gvd; demo: demo)")
    options = {"nargs": "+", "action": "extend", "type": setting, "default": [], "metavar": "KEY=VALUE"}
    add("--set", help=f"changes of the protocol, which mark the result: {', '.join(SETTINGS)}", **options)
    add("--repeats", type=int, help=f"networks on a set, all clips ({REPEATS_FULL}, demo {REPEATS['demo']})")
    add("--dtype", choices=("float32", "bfloat16"), help="of convolutions (bfloat16 where the device has it)")
    add("--save", action="store_true", help="with --train-on full: keep repeat 0's network and features")
    args = contract.parse(parser)
    full, demo, given = args.train_on == "full", args.dataset == "demo", dict(args.set)
    if args.ipc is None and not full:
        parser.error("ipc: needed unless --train-on full")
    if args.save and (args.train_on, args.net, args.labels) != ("full", "minic3d", "hard"):
        parser.error("--save: only with --train-on full, --net minic3d and hard labels")
    if not 0 <= args.alpha <= 1 or not 0 < args.tau < math.inf:
        parser.error("--alpha: must be 0 to 1; --tau: above 0")
    args.alpha, args.tau = (args.alpha, args.tau) if args.labels == "soft" else (None, None)
    args.repeats = args.repeats or REPEATS.get(args.dataset, REPEATS_FULL)[full]
    name, both = args.protocol or ("demo" if demo else "gvd"), given.pop("batch_size", None)
    implied = {"min_steps": 0} if "epochs" in given else {}
    implied |= {"min_batch_size": both, "max_batch_size": both} if both else {}
    args.protocol = {"name": name, **PROTOCOLS[name], **implied, **given}
    if args.protocol["min_batch_size"] > args.protocol["max_batch_size"]:
        parser.error("--set: min_batch_size is above max_batch_size")
    return args


def setting(word):
    """("lr", 0.01) of "lr=0.01", for argparse."""
    key, _, text = word.partition("=")
    values, value = SETTINGS.get(key, ()), {"true": True, "false": False}.get(text, text)
    if values and type(values[0]) in (int, float):
        value = type(values[0])(text)
        values = (value,) if values[0] <= value <= values[1] else ()
    if value not in values:
        raise argparse.ArgumentTypeError(f"{word}: expected one of {SETTINGS}")
    return key, value


def find_set(args):
    """(kind, folder) of the set --train-on; kind: random, full, coreset or videos."""
    if args.train_on in ("random", "full"):
        return args.train_on, Path(args.train_on)
    work, name = args.work_dir / args.dataset, f"ipc{args.ipc}/{args.train_on}"
    own = [("coreset", work / "05_coresets" / name), ("videos", work / "04_distilled" / name)]
    there = [place for place in [*own, ("videos", Path(args.train_on))] if place[1].is_dir()]
    return there[0] if there else own[args.train_on not in ("herding", "kcenter")]


def lineage(args, source):
    """{"04_distilled": record, "03_samples": ...} of a set and the folders at this IPC it was made from."""
    found = {source.folder.parts[-3]: source.record}  # a source has all files that the next one read
    paths = (args.work_dir / args.dataset).glob(f"0[23]_*/ipc{args.ipc}/*/manifest.json")
    for path in sorted(paths, key=lambda path: (-int(path.parts[-4][:2]), path.parts)):  # 03 before 02
        made, inputs = contract.read(path), [*found.values()][-1]["inputs"].items()
        files = {(name, value) for name, value in inputs if name.endswith((".mp4", ".npy"))}
        known = {(name, file["sha256"]) for name, file in made["outputs"].items()}
        if path.parts[-4] not in found and files and files <= known:
            found[path.parts[-4]] = made
    return found


def read_coreset(args, folder, clips):
    """The clips of a coreset {class: [name]}, as they were chosen, its digest and its record."""
    fix = contract.command(args, "tools/coresets.py", "--protocol", args.protocol["name"])
    source = contract.Input(args, folder.absolute(), fix)
    files = source.check(f"{c}.csv" for c in args.classes)
    chosen = {c: [row["name"] for row in source.load(f"{c}.csv")] for c in args.classes}
    if unknown := [name for c in args.classes for name in chosen[c] if name not in clips[c][0]]:
        raise contract.ContractError(f"{folder}: {unknown[0]} is no training clip of 01_clips", fix=fix)
    return chosen, contract.digest(files), source.record


def read_labels(args, kind, folder, inputs):
    """The teacher's logits {class: float32 [n, classes]} on the training set, their digest and record.

    With --labels stored, the labels that a baseline has learnt with its set.
    """
    drawn = kind != "videos" and args.protocol["sampling"] == "drawn"
    words = ("--train-on", args.train_on, *["--windows"] * drawn)
    name = f"ipc{args.ipc}/{folder.resolve().name}" if kind == "videos" else "full/real" + "-windows" * drawn
    place, end, fix = f"05_labels/{name}", "npy", contract.command(args, "tools/soft_labels.py", *words)
    if args.labels == "stored":
        place, end, fix = folder.absolute(), "labels.npy", "--labels hard"
    source = contract.Input(args, place, fix)
    if args.labels == "soft" and source.record["inputs"]["videos"] != inputs["training set"]:
        raise contract.Missing(f"{source.folder} has the logits of other videos", fix=source.fix)
    files, shape = source.check(f"{c}.{end}" for c in args.classes), (None, len(args.classes))
    logits = {c: source.load(f"{c}.{end}", shape, "float32") for c in args.classes}
    return logits, contract.digest(files), source.record


def tensors(clips, chosen, device, window=0, net="minic3d", logits=None):
    """(uint8 [n, 16, S, S, 3], labels [n], logits [n, classes] or None) of {class: names} or of all clips."""
    arrays, labels, teacher = [], [], []
    for index, (label, (names, array)) in enumerate(clips.items()):
        rows, side = [names.index(n) for n in (chosen[label] if chosen else names)], array.shape[3]
        cut = 0 if net == "minic3d" else max(0, side - RECURRENT_SIDE) // 2
        arrays.append(array[rows, window, :, cut : side - cut, cut : side - cut])
        labels += [index] * len(rows)
        teacher += [logits[label][rows]] if logits else []
    teacher = torch.from_numpy(np.concatenate(teacher)).to(device) if logits else None
    return torch.from_numpy(np.concatenate(arrays)).to(device), torch.tensor(labels, device=device), teacher


class Recurrent(nn.Module):
    """CNN+GRU or CNN+RNN: 2D convolutions on each frame, then one recurrent layer over the 16 frames."""

    def __init__(self, num_classes, side, layer):
        super().__init__()
        blocks, features = [], 128 * (side // 8) ** 2  # of each frame; 8,192 at 64 px
        for inputs in (3, 128, 128):
            blocks += [nn.Conv2d(inputs, 128, 3, padding=1), nn.GroupNorm(128, 128)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.recurrent = layer(features, features // 8, batch_first=True)
        self.head = nn.Linear(features // 8, num_classes)

    def forward(self, clips):
        frames = clips.transpose(1, 2)  # [n, 3, 16, S, S] -> [n, 16, 3, S, S]
        features = self.blocks(frames.flatten(0, 1)).flatten(1).unflatten(0, frames.shape[:2])  # [n, 16, D]
        with torch.autocast(clips.device.type, enabled=False):  # not in bfloat16 on every device
            states, _ = self.recurrent(features.float())  # [n, 16, hidden]
        return self.head(states.mean(1))


def network_input(clips, standardise, flips=None):
    """uint8 [n, 16, S, S, 3] -> float32 [n, 3, 16, S, S]. flips: bool [n], clips to mirror left to right."""
    if flips is not None:
        clips = torch.where(flips[:, None, None, None, None], clips.flip(3), clips)  # 3 is the width
    x = common.to_input(clips)
    if standardise == "batch":  # one mean and deviation for all of the batch
        x = (x - x.mean()) / x.std()
    elif standardise == "clip":
        x = (x - x.mean((1, 2, 3, 4), keepdim=True)) / x.std((1, 2, 3, 4), keepdim=True)
    return x.contiguous(memory_format=torch.channels_last_3d)


def soft_label_loss(logits, labels, teacher, alpha, tau):
    """(1 - alpha) * CE(y, p_S) + alpha * tau^2 * KL(p_T^tau || p_S^tau), eq. 11, the mean over the batch.

    logits, teacher: [n, classes]. labels: int64 [n]. tau^2 keeps the gradient's size at every temperature.
    """
    student, target = ((x / tau).log_softmax(1) for x in (logits, teacher))
    divergence = nn.functional.kl_div(student, target, reduction="batchmean", log_target=True)
    return (1 - alpha) * nn.functional.cross_entropy(logits, labels) + alpha * tau**2 * divergence


def schedule(num_clips, protocol):
    """(clips per step, epochs) of a training."""
    batch = min(protocol["max_batch_size"], max(protocol["min_batch_size"], num_clips // 10))
    return batch, max(protocol["epochs"], -(-protocol["min_steps"] // -(-num_clips // batch)))


def train(clips, labels, teacher, args, repeat, dtype, checkpoint):
    """Trains a network from scratch (section 4.1). Returns (network, mean loss of the last epoch).

    clips: [n, 16, S, S, 3] or [n, variants, 16, S, S, 3]. teacher: logits [n, classes] or None. What an epoch
    draws depends on seed, repeat and epoch alone: going on from `checkpoint` leads to the same weights.
    """
    clips = clips if clips.ndim == 6 else clips[:, None]
    device, protocol, start, mean_loss = clips.device, args.protocol, 0, None
    (batch_size, epochs), lr, n = schedule(len(clips), protocol), protocol["lr"], len(args.classes)
    torch.manual_seed(contract.generator(args.seed, "05", repeat, "network").initial_seed())
    minic3d = args.net == "minic3d"
    net = common.MiniC3D(n) if minic3d else Recurrent(n, clips.shape[4], NETS[args.net])
    net = net.to(device, memory_format=torch.channels_last_3d if minic3d else torch.channels_last)  # fast
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    if checkpoint.exists():
        start, weights, momentum = contract.read(checkpoint)
        net.load_state_dict(weights)
        optimiser.load_state_dict(momentum)
    drop = math.ceil(protocol["lr_drop_at"] * epochs)
    bar = contract.bar(range(start, epochs), desc=f"05 repeat {repeat}", initial=start, total=epochs)
    for epoch in bar:
        optimiser.param_groups[0]["lr"] = lr * (0.1 if epoch >= drop else 1.0)
        if epoch == drop and protocol["restart_momentum"]:
            optimiser.state.clear()
        generator = contract.generator(args.seed, "05", repeat, "epoch", epoch)
        torch.manual_seed(generator.initial_seed())  # of dropout
        order = torch.randperm(len(clips), generator=generator).to(device)
        flips = (torch.rand(len(clips), generator=generator) < protocol["flip"]).to(device)
        variants = torch.randint(clips.shape[1], (len(clips),), generator=generator).to(device)
        net.train()
        losses = []
        for batch in order.split(batch_size):
            x = network_input(clips[batch, variants[batch]], protocol["standardise"], flips[batch])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = net(x).float()
            loss = nn.functional.cross_entropy(logits, labels[batch])
            if teacher is not None and args.alpha is None:  # labels that a baseline has learnt
                loss = (logits - teacher[batch]).square().sum(1).mean()
            elif teacher is not None:
                loss = soft_label_loss(logits, labels[batch], teacher[batch], args.alpha, args.tau)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        if (epoch + 1) % CHECKPOINT_EVERY == 0 and epoch + 1 < epochs:
            contract.save(checkpoint, (epoch + 1, net.state_dict(), optimiser.state_dict()))
    return net, mean_loss


@torch.inference_mode()
def test(net, passes, labels, classes, dtype, standardise="none"):
    """Accuracies in percent of clips: top1, top5, per_class. passes: uint8 [n, 16, S, S, 3] per window."""
    net.eval()
    logits, labels = [], labels.repeat(len(passes))
    for part in (part for clips in passes for part in clips.split(TEST_BATCH)):  # always the same batches
        with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
            logits.append(net(network_input(part, standardise)).float())
    ranked = torch.cat(logits).topk(min(5, len(classes)), dim=1).indices  # [passes * n, 5]
    correct = ranked == labels[:, None]
    first, top5 = correct[:, 0].double(), correct.any(1).double().mean().item()
    per_class = {c: round(100 * first[labels == i].mean().item(), 4) for i, c in enumerate(classes)}
    return {"top1": round(100 * first.mean().item(), 4), "top5": round(100 * top5, 4), "per_class": per_class}


@torch.inference_mode()
def save_network(folder, net, clips, args, device):
    """Writes the network and the flattened output of its last block on each training clip."""
    weights = {name: value.float().cpu().contiguous() for name, value in net.state_dict().items()}
    contract.save(folder / "network.safetensors", save(weights, {"classes": json.dumps(args.classes)}))
    net.eval()
    for label, of_class in clips.items():
        parts = tensors({label: of_class}, None, device)[0].split(TEST_BATCH)
        features = [net.blocks(network_input(x, args.protocol["standardise"])).flatten(1) for x in parts]
        contract.save(folder / f"features/{label}.npy", torch.cat(features).cpu().numpy())
        contract.save(folder / f"features/{label}.csv", [("name",), *((name,) for name in of_class[0])])


def find_deviations(args, facts, used):
    """What makes this another measurement than the protocol's. used: {folder: record} of the inputs."""
    own, whole = PROTOCOLS[args.protocol["name"]] | {"alpha": ALPHA, "tau": TAU}, len(args.spec["classes"])
    mine = own | args.protocol | ({"alpha": args.alpha, "tau": args.tau} if args.labels == "soft" else {})
    found = [f"{key} {mine[key]}, not {own[key]}" for key in own if mine[key] != own[key]]
    found += ["labels or lr that are stored with the set"] * (args.labels == "stored")
    train, test_clips = (3570, 1530) if facts["hmdb_train"] == "official" else args.spec["clips"]
    if not args.spec["lists"]:  # one's own data set: whatever 01 has found
        train, test_clips = facts["videos"], facts["test clips"]
        limits = {args.limit, used["01_clips"]["parameters"]["limit"]} - {None}
        found += [f"at most {limit} clips of a class" for limit in sorted(limits)]
    counts = {"classes": (len(args.classes), whole), "test clips": (facts["test clips"], test_clips)}
    counts["training videos"] = (facts["videos"], train if args.train_on == "full" else args.ipc * whole)
    found += [f"{n:,} of {total:,} {what}" for what, (n, total) in counts.items() if n != total]
    for folder, record in used.items():
        found += [f"{folder} kept although {'; '.join(why)}" for why in record["kept"]]
        found += [f"network of the features: {text}" for text in record["parameters"].get("deviations", [])]
    return found


def summary(values):
    """Mean and sample standard deviation (ddof 1; none of a single value)."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "std": deviation, "n": len(values), "values": values}


def summarise(args, output, facts):
    """Writes result.json from the files of all repeats that are there. facts: what else it states."""
    files = {*output.record["outputs"], *output.wanted} - {"result.json"}
    done = sorted((contract.read(output.folder / file) for file in files), key=lambda d: d["repeat"])
    gpu, keys = output.device.type == "cuda", ("net", "labels", "protocol", "seed", "alpha", "tau")
    result = facts | {key: getattr(args, key) for key in keys} | {"dtype": str(output.dtype)[6:]}
    result |= {key: summary([d[key] for d in done]) for key in ("top1", "top5")}
    result |= {"per_class": {c: summary([d["per_class"][c] for d in done]) for c in args.classes}}
    result |= {"classes": len(args.classes), "repeats": [d["repeat"] for d in done]}
    result["device"] = torch.cuda.get_device_name(output.device) if gpu else "cpu"
    contract.save(output.folder / "result.json", result)
    name, top1 = facts["set"] + ", soft labels" * (args.labels == "soft"), result["top1"]
    spread = "" if top1["std"] is None else f" ± {top1['std']:.2f}"
    output.log(f"05 {name}: top-1 {top1['mean']:.2f}{spread} % (n = {len(done)})")


def estimate(args):
    per_class = args.ipc if args.train_on != "full" else args.spec["clips"][0] // len(args.spec["classes"])
    count, n = max(1, min(per_class, args.limit or per_class)) * len(args.classes), args.repeats
    seconds, machine = common.rate(args, SECONDS.get(args.dataset, SECONDS_FULL), f"seconds, {args.net}")
    seconds *= n * count * schedule(count, args.protocol)[1]
    item, files = f"repeats on {Path(args.train_on).name}, {args.labels} labels", 1 + 2 * len(args.classes)
    saved = ("files of repeat 0", files, 0, 1.5e7 + 8.2e3 * args.spec["clips"][0], machine)
    costs = {"05_results": (item, n, seconds, 1e4 * n, machine)}
    return costs | {"05_networks": saved} if args.save else costs


def main(args):
    drawn, protocol = ["--windows"] * (args.protocol["sampling"] == "drawn"), args.protocol["name"]
    source = contract.Input(args, "01_clips", contract.command(args, "01_encode_latents.py", *drawn))
    (test_clips, test_files), (kind, folder) = media.real_clips(args, "test", bool(drawn)), find_set(args)
    used, about, chosen, logits, size = {"01_clips": source.record}, {}, None, None, None
    name = args.name or folder.resolve().name + "-samples" * ("03_samples" in folder.resolve().parts)
    if kind == "videos":
        if name in ("random", "full", "herding", "kcenter"):
            raise contract.ContractError(f"{name} is the name of a set of real clips", fix="another --name")
        clips, files, made = media.find_videos(args, folder)
        used |= lineage(args, made) if made else {}
        about, size = contract.read(folder / "set.json") or {}, media.set_bytes(folder, files)
    else:
        least = args.ipc if kind == "random" else 1
        clips, files = media.real_clips(args, "train", bool(drawn), least)
    inputs = {"test clips": contract.digest(test_files), "training set": contract.digest(files)}
    if kind == "coreset":
        chosen, inputs["coreset"], used["05_coresets"] = read_coreset(args, folder, clips)
    if args.labels == "stored":
        args.protocol["lr"] = about.get("lr") or args.protocol["lr"]
    if args.labels == "soft" or (args.labels == "stored" and not about.get("lr")):
        logits, inputs["soft labels"], used["05_labels"] = read_labels(args, kind, folder, inputs)
    whole, num_test = (sum(len(names) for names, _ in x.values()) for x in (clips, test_clips))
    count = whole if kind in ("full", "videos") else args.ipc * len(clips)
    facts = {
        "set": name, "videos": count, "training set": inputs["training set"],
        "bytes": size or count * common.NUM_FRAMES * args.spec["side"] ** 2 * 3,  # of real clips in uint8
        "test clips": num_test, "hmdb_train": source.record["parameters"].get("hmdb_train"),
        "teacher": used["05_labels"]["parameters"].get("teacher") if logits else None,
        "provenance": {f: r["parameters"] | {"unet": r["inputs"].get("unet")} for f, r in used.items()},
    }  # fmt: skip
    facts["deviations"] = find_deviations(args, facts, used)
    facts["complete"] = not facts["deviations"]

    keys = ("net", "alpha", "tau", "classes", "limit", "device", "dtype")
    parameters = {key: getattr(args, key) for key in keys} | args.protocol | {"set": kind}
    parameters["ipc"], group = (None, "full") if kind == "full" else (args.ipc, f"ipc{args.ipc}")
    place = f"05_results/{group}/{name}/{args.net}__{args.labels}__{protocol}"
    repeats = [f"repeat_{r}.json" for r in range(args.repeats)]
    output = contract.Output(args, place, parameters, inputs, [*repeats, "result.json"], ["result.json"])
    outputs = [output]
    if args.save:
        wanted = [f"features/{c}.{k}" for c in args.classes for k in ("npy", "csv")] + ["network.safetensors"]
        place, parameters["deviations"] = f"05_networks/minic3d__{protocol}", facts["deviations"]
        outputs.append(contract.Output(args, place, parameters, inputs, wanted))
    if not any(folder.todo for folder in outputs):
        return

    device, dtype = output.device, output.dtype
    contract.say(f"05 {args.net} on {device} in {str(dtype)[6:]}, protocol {protocol}")
    if kind == "videos" and not about:
        for label, of_class in contract.bar(clips.items(), desc="05 read"):
            clips[label] = of_class[0], media.network_clips(folder, of_class, args.spec)[:, None]
    windows = range(next(iter(test_clips.values()))[1].shape[1])
    passes, labels, _ = zip(*(tensors(test_clips, None, device, w, args.net) for w in windows), strict=True)
    for r, file in enumerate(repeats):
        keep = r == 0 and args.save and outputs[1].todo
        if file not in output.todo and not keep:
            continue
        chosen = media.select_random(clips, args.ipc, args.seed, r) if kind == "random" else chosen
        data = tensors(clips, chosen, device, slice(None) if kind == "videos" else 0, args.net, logits)
        net, loss = train(*data, args, r, dtype, output.folder / f".checkpoint_{r}.pt")
        accuracy = test(net, passes, labels[0], args.classes, dtype, args.protocol["standardise"])
        if keep:
            save_network(outputs[1].folder, net, clips, args, device)
        if file in output.todo:
            record = {"repeat": r, "loss": round(loss, 6), "clips": chosen, "videos": count, **accuracy}
            contract.save(output.folder / file, record)
        contract.say(f"05 {name}, repeat {r}: top-1 {accuracy['top1']:.2f} %")
    for checkpoint in output.folder.glob(".checkpoint_*.pt"):
        checkpoint.unlink()
    if output.todo:
        summarise(args, output, facts)
    for made in outputs:
        made.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
