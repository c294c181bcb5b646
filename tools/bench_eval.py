"""One student of stage 05: seconds in forward, backward and optimiser and in everything else, ours and the plain way.

Ours is the stage itself, from its first line to its result.json, with a stopwatch around the network, the backward pass
and the optimiser; its files are hashed already, as they are from the second run on. The plain way trains the same
network on the same random real clips, for as many epochs in the same precision and layout, and tests it once on the same
test clips, with a DataLoader that decodes the original video, resizes, crops, flips and normalises for every epoch and
for the test pass. Before both, seconds of a training step of MiniC3D in both precisions and both layouts, which also
loads what the libraries load at their first use.

Reads:   work/<data set>/01_clips/ and the original videos below the data root
Writes:  nothing but --json F
Run:     python tools/bench_eval.py demo 5 --epochs 60 --json results/bench/eval.json
Cost:    demo 5, 60 epochs: 3 min on two CPU cores
Expect:  everything but forward, backward and optimiser at least 10 times cheaper than the plain way over the protocol's
         epochs (demo 5, --epochs 60: 14 times, results/bench/eval.json, 3 min). Ours is mostly a fixed cost of a run, so
         fewer epochs show less, and videos larger than the demo's tiny ones, which cost more to decode, more
"""

import argparse
import contextlib
import json
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

BATCH, STEPS = 8, 5  # clips of a step and timed training steps of each precision and layout, after one that is not timed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(common.DATASETS), help="data set")
    parser.add_argument("ipc", type=contract.positive, help="videos per class that are trained on")
    parser.add_argument("--epochs", type=contract.positive, default=10, help="epochs of both ways (10)")
    parser.add_argument("--net", default="minic3d", help="network of 05 (minic3d)")
    parser.add_argument("--workers", type=int, default=0, help="processes of the plain way's DataLoader (0)")
    parser.add_argument("--limit", type=contract.positive, help="at most this many test clips of each class")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="where 01_clips is (work)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets (data)")
    parser.add_argument("--device", help="cpu or cuda (a GPU where there is one)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to F")
    return parser.parse_args()


class Stopwatch:
    """Seconds in the outermost network calls, in backward and in the optimiser, while it is entered."""

    def __init__(self, device):
        self.device, self.seconds, self.running = device, {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}, False

    def timed(self, part, function):
        def call(*args, **kwargs):
            if self.running:  # a layer inside a network
                return function(*args, **kwargs)
            self.running, start = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - start
                self.running = False

        return call

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self):
        places = [
            ("forward", torch.nn.Module, "__call__"),
            ("backward", torch.Tensor, "backward"),
            ("optimiser", torch.optim.SGD, "step"),
            ("optimiser", torch.optim.Optimizer, "zero_grad"),
        ]
        before = [(owner, name, getattr(owner, name)) for _, owner, name in places]
        for part, owner, name in places:
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        start = self.now()
        try:
            yield
        finally:
            total = self.now() - start
            for owner, name, function in before:
                setattr(owner, name, function)
            self.seconds["everything else"] = total - sum(self.seconds.values())
            self.seconds["total"] = total


def ours(args, device):
    """Runs the stage. Returns (seconds, the stage's definitions, its result, the clips of its repeat)."""
    clips = contract.work_folder(args, "01_clips").resolve()
    script, before = str(ROOT / "05_train_eval.py"), sys.argv
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / args.dataset).mkdir()
        (work / args.dataset / "01_clips").symlink_to(clips)
        words = [script, args.dataset, args.ipc, "--train-on", "random", "--net", args.net, "--epochs", args.epochs]
        words += ["--repeats", 1, "--work-dir", work, "--data-root", args.data_root, "--device", device]
        words += ["--limit", max(args.limit, args.ipc)] if args.limit else []
        try:
            sys.argv = [*map(str, words), "--dry-run"]  # hashes the clips
            runpy.run_path(script, run_name="__main__")
            sys.argv = [*map(str, words)]
            watch = Stopwatch(device)
            with watch():
                stage = runpy.run_path(script, run_name="__main__")
        finally:
            sys.argv = before
        (folder,) = (work / args.dataset / "05_results").glob("*/*/*__*")
        result, repeat = (contract.read_json(folder / name) for name in ("result.json", "repeat_0.json"))
    return watch.seconds, stage, result, repeat["clips"]


class Videos(Dataset):
    """Videos that are decoded and transformed whenever they are asked for: (float32 [3, 16, S, S], label)."""

    def __init__(self, items, dataset, flip, stage):
        self.items, self.dataset, self.flip = items, dataset, flip
        self.mean, self.std = (torch.tensor(stage[name]).view(3, 1, 1, 1) for name in ("MEAN", "STD"))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        video = common.read_video(path)
        clip = common.network_clip(video[common.uniform_frames(len(video))], self.dataset)
        x = (torch.from_numpy(clip.copy()).permute(3, 0, 1, 2).float() / 255 - self.mean) / self.std
        return (x.flip(-1) if torch.rand(()) < self.flip else x), label


def plain(args, device, stage, result, chosen):
    """The same training and test with a DataLoader. Returns (seconds, top-1 in percent)."""
    spec, protocol = common.DATASETS[args.dataset], result["protocol"]
    tested = {c: [] for c in spec["classes"]}
    for row in common.read_csv(contract.work_folder(args, "01_clips") / "index.csv"):
        if row["split"] == "test":
            tested[row["class"]].append(row["name"])
    tested = {c: names[: max(args.limit, args.ipc) if args.limit else None] for c, names in tested.items()}

    def loader(names, flip, **options):
        root = args.data_root / spec["videos"]
        items = [(root / c / f"{n}.avi", label) for label, c in enumerate(sorted(names)) for n in names[c]]
        return DataLoader(Videos(items, args.dataset, flip, stage), num_workers=args.workers, **options)

    dtype = getattr(torch, result["dtype"])
    side = stage["side_of"](args.net, spec["side"])
    cut = (spec["side"] - side) // 2

    def logits(net, x):
        x = x.to(device)[..., cut : cut + side, cut : cut + side].contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(x).float()

    watch = Stopwatch(device)
    with watch():
        net = stage["build"](args.net, len(spec["classes"]), side).to(device)
        options = {"momentum": stage["MOMENTUM"], "weight_decay": stage["WEIGHT_DECAY"]}
        optimiser = torch.optim.SGD(net.parameters(), lr=protocol["rate"], **options)
        batches = loader(chosen, protocol["flip"], batch_size=stage["batch_size"](len(chosen), protocol), shuffle=True)
        for epoch in range(args.epochs):
            optimiser.param_groups[0]["lr"] = protocol["rate"] * (0.1 if epoch >= protocol["drop"] * args.epochs else 1)
            for x, labels in batches:
                loss = torch.nn.functional.cross_entropy(logits(net, x), labels.to(device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        net.eval()
        right = []
        with torch.inference_mode():
            for x, labels in loader(tested, 0.0, batch_size=stage["TEST_BATCH"]):
                right += (logits(net, x).argmax(1).cpu() == labels).tolist()
    return watch.seconds, 100 * sum(right) / len(right)


def step_seconds(args, device):
    """{precision, layout: seconds} of one training step of MiniC3D on random clips."""
    spec, found = common.DATASETS[args.dataset], {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            net = common.MiniC3D(len(spec["classes"])).to(device, memory_format=layout)
            optimiser, watch = torch.optim.SGD(net.parameters(), lr=0.01), Stopwatch(device)
            x = torch.randn(BATCH, 3, common.NUM_FRAMES, spec["side"], spec["side"], device=device)
            x = x.contiguous(memory_format=layout)
            for step in range(1 + STEPS):
                if step < 2:  # the first step is not timed
                    start = watch.now()
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = net(x).float().logsumexp(1).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            found[f"{dtype}, {layout}".replace("torch.", "")] = round((watch.now() - start) / STEPS, 4)
    return found


def main():
    args = parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    steps = step_seconds(args, device)
    seconds, stage, result, chosen = ours(args, device)
    plain_seconds, accuracy = plain(args, device, stage, result, chosen)
    figures = {
        "what": f"{args.dataset}, IPC {args.ipc}, {args.net}, {args.epochs} epochs, {result['test clips']} test clips",
        "device": result["device"],
        "dtype": result["dtype"],
        "threads": torch.get_num_threads(),
        "workers of the plain way": args.workers,
        "ours": {part: round(value, 3) for part, value in seconds.items()},
        "plain": {part: round(value, 3) for part, value in plain_seconds.items()},
        "everything else, plain / ours": round(plain_seconds["everything else"] / seconds["everything else"], 1),
        "total, plain / ours": round(plain_seconds["total"] / seconds["total"], 2),
        "top-1": {"ours": result["top1"]["mean"], "plain": round(accuracy, 4)},
        f"seconds of a step of {BATCH} clips": steps,
    }
    if args.json:
        contract.write_json(args.json, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    contract.run(main)
