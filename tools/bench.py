"""Three ratios measured on this machine: a stage of this project, and the plain way to the same result.

sampling  stage 03 with --sampler naive (the guidance is computed there too, at strength 0), 8 videos per
          forward, and diffusers' TextToVideoSDPipeline called as its documentation shows, one video per call;
          the same weights, size, steps and dtype, and an .mp4 of each video
kmeans    stage 02, k-means on isometric coordinates, and scikit-learn's on the raw latents; random ones in
          groups that overlap, of the number and size of a class of HMDB51, on one thread
training  stage 05 on random real clips, and the same training and test with a DataLoader that decodes,
          resizes, crops and flips a video whenever it is asked for

A stage runs as its command does, in a temporary work folder; what an item takes is the time since the item
before it was finished, by their files: imports, models and the first item do not count.

Reads:   the model (sampling); work/<data set>/01_clips and the original videos (training)
Writes:  results/bench/<device>.json; the figures of parts that are not asked for stay in it
Run:     python tools/bench.py demo
         python tools/bench.py hmdb51 --parts sampling --steps 50 --model FOLDER     on a GPU
Cost:    demo: 5 min on two CPU cores, 1 GB. hmdb51, by estimate: 15 min on an A100 for sampling
Expect:  demo, plain / ours: sampling 1.5, kmeans 10, training 1.3 or more; inertias equal to 1e-6
"""

import math
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

BATCH, BATCHES = 8, 3  # videos of a batch of stage 03; batches, one for each class
CALLS = 5  # of the pipeline
CFG = 2.0  # classifier-free guidance scale: two U-Net evaluations per step at any but 1
VIDEOS, SHAPE = 100, (16, 4, 32, 56)  # kmeans: videos of a class, latents of 448x256 pixels
CLUSTERS, STARTS = 20, 10  # kmeans: IPC, starts as in stage 02
IPC = 5  # training: clips per class
SGD = {"momentum": 0.9, "weight_decay": 5e-4}  # of stage 05


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc=False)
    add, folder = parser.add_argument, contract.ROOT / "results" / "bench"
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="some of them (all)")
    add("--steps", type=int, default=25, help="sampling: DDIM steps (25)")
    add("--epochs", type=int, default=10, help="training: epochs (10)")
    add("--dtype", help="sampling: of the networks (bfloat16 where the device has it, else float32)")
    add("--results", type=Path, default=folder, help="folder of the JSON file (results/bench)")
    args = contract.parse(parser)
    args.device = contract.automatic("device", args.device)
    args.dtype = args.dtype or contract.automatic("dtype", args.device)
    return args


def run_stage(args, work, script, *words):
    """Runs a stage of this project in a work folder, as a command."""
    line = [sys.executable, contract.ROOT / script, args.dataset, *words, "--work-dir", work]
    line += ["--data-root", args.data_root, "--seed", args.seed, "--device", args.device]
    for option, value in {"--threads": torch.get_num_threads(), "--classes": ",".join(args.classes)}.items():
        line += [] if option in words else [option, value]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True)
    if done.returncode:
        raise contract.ContractError(f"{script} failed", found=done.stdout[-1000:] + done.stderr[-1000:])


def ends(work, pattern):
    """When the files below a work folder that match a pattern were finished, in order, in seconds."""
    return sorted(path.stat().st_mtime for path in work.rglob(pattern))


# --- sampling ---------------------------------------------------------------------------------------------


def sampling(args, work):
    folder, classes = common.model_folder(args), args.classes[:BATCHES]
    words = ["--sampler", "naive", "--unet", "published", "--draws", 1, "--classes", ",".join(classes)]
    words += ["--cfg", CFG, "--steps", args.steps, "--dtype", args.dtype, "--model", folder]
    run_stage(args, work, "03_guided_sample.py", BATCH, *words)
    ours = np.diff(ends(work, "*.mp4")[BATCH - 1 :: BATCH]) / BATCH
    plain = np.diff(list(pipeline(args, folder, work)))
    figures = {"videos per forward": BATCH, "steps": args.steps, "size": args.spec["size"]}
    return figures | {"dtype": args.dtype}, np.median(ours), np.median(plain)


def pipeline(args, folder, work):
    """Yields the time at the end of each call of the stock pipeline: one video, written as .mp4."""
    from diffusers import DDIMScheduler, TextToVideoSDPipeline
    from diffusers.utils import export_to_video, logging
    from transformers import CLIPTokenizer

    dtype, (width, height) = getattr(torch, args.dtype), args.spec["size"]
    parts = {part: common.load_part(folder / part, part, args.device, dtype) for part in common.NETWORKS}
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipe = TextToVideoSDPipeline(scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"), **parts)
    pipe.set_progress_bar_config(disable=True)
    logging.set_verbosity_error()
    options = {"num_inference_steps": args.steps, "guidance_scale": CFG, "num_frames": common.NUM_FRAMES}
    prompts = contract.read(contract.ROOT / "prompts" / f"{args.dataset}.json")
    for label in (args.classes * CALLS)[:CALLS]:
        frames = pipe(prompts[label], height=height, width=width, **options).frames[0]
        export_to_video(frames, str(work / "plain.mp4"), fps=8)
        yield time.time()


# --- kmeans -----------------------------------------------------------------------------------------------


def kmeans(args, work):
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    classes, rng = args.classes[:BATCHES], np.random.default_rng(args.seed)
    args = Namespace(**vars(args) | {"work_dir": work, "estimate": {"01_latents": args.estimate["bench"]}})
    names = [f"{label}.{kind}" for label in classes for kind in ("npy", "csv")]
    output = contract.Output(args, "01_latents", {}, {}, names)
    for label in classes:  # a fifth of their variance, which is 1, lies between the groups
        centres = rng.standard_normal((CLUSTERS, *SHAPE), np.float32) * 0.2**0.5
        latents = rng.standard_normal((VIDEOS, *SHAPE), np.float32) * 0.8**0.5
        latents = (latents + centres[rng.integers(0, CLUSTERS, VIDEOS)]).astype(np.float16)
        contract.save(output.folder / f"{label}.npy", latents)
        contract.save(output.folder / f"{label}.csv", [("name",), *((f"{i:03d}",) for i in range(VIDEOS))])
    output.finish()
    run_stage(args, work, "02_kmeans_prototypes.py", CLUSTERS, "--classes", ",".join(classes), "--threads", 1)
    folder = work / args.dataset / "02_prototypes" / f"ipc{CLUSTERS}" / "direct"
    ours = np.diff(ends(folder, "*.npy"))[-1]

    flat = latents.reshape(VIDEOS, -1).astype(np.float32)  # [n, 114688], of the last class
    seed = contract.generator(args.seed, "02", label).initial_seed() % 2**32  # as in the stage
    with threadpool_limits(1):
        KMeans(2, n_init=1, random_state=0).fit(flat[:4, :8])  # loads what is loaded at the first use
        start = time.time()
        theirs = KMeans(CLUSTERS, n_init=STARTS, random_state=seed).fit(flat).labels_
        plain, inertia = time.time() - start, []
    for labels in ([int(row["prototype"]) for row in contract.read(folder / f"{label}.csv")], theirs):
        groups = [flat[np.equal(labels, k)].astype(np.float64) for k in range(CLUSTERS)]
        inertia.append(float(sum(np.square(group - group.mean(0)).sum() for group in groups)))
    figures = {"videos": VIDEOS, "features": flat.shape[1], "clusters": CLUSTERS, "starts": STARTS}
    return figures | {"inertia, ours and plain": inertia}, ours, plain


# --- training ---------------------------------------------------------------------------------------------


class Videos(torch.utils.data.Dataset):
    """(float32 [3, 16, S, S], label) of each of items [(path, label)], decoded whenever it is asked for."""

    def __init__(self, items, spec, flip):
        self.items, self.spec, self.flip = items, spec, flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        clip = media.network_clip(media.read_frames(path, media.uniform_frames)[0], self.spec)
        x = common.to_input(torch.from_numpy(clip[None].copy()))[0]
        return (x.flip(-1) if torch.rand(()) < self.flip else x), label


def training(args, work):
    source = contract.Input(args, "01_clips", contract.command(args, "01_encode_latents.py"))
    (work / args.dataset).mkdir(exist_ok=True)
    (work / args.dataset / "01_clips").symlink_to(source.folder.resolve())
    words = ["--train-on", "random", "--repeats", 2, "--set", f"epochs={args.epochs}"]
    run_stage(args, work, "05_train_eval.py", IPC, *words)
    (ours,), (path,) = np.diff(ends(work, "repeat_*.json")), work.rglob("result.json")
    result, repeat = contract.read(path), contract.read(path.with_name("repeat_1.json"))
    tests = {c: [row["name"] for row in source.load(f"test/{c}.csv")] for c in repeat["clips"]}
    start, accuracy = time.time(), plain_training(args, result, repeat["clips"], tests)
    plain = time.time() - start
    figures = {name: result[name] for name in ("videos", "test clips", "dtype")} | {"epochs": args.epochs}
    return figures | {"top-1, ours and plain": [repeat["top1"], round(accuracy, 4)]}, ours, plain


def plain_training(args, result, clips, tests):
    """Top-1 in percent on `tests` of MiniC3D trained on `clips`, both {class: [name]}, with a DataLoader."""
    protocol, device, dtype = result["protocol"], torch.device(args.device), getattr(torch, result["dtype"])
    folder, workers = args.data_root / args.spec["videos"], torch.get_num_threads() * (args.device != "cpu")

    def batches(names, flip, **options):
        pairs = [(label, name) for label in sorted(names) for name in names[label]]
        items = [(folder / label / f"{name}.avi", sorted(names).index(label)) for label, name in pairs]
        return torch.utils.data.DataLoader(Videos(items, args.spec, flip), num_workers=workers, **options)

    def logits(x):
        x = x.to(device).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(x).float()

    net = common.MiniC3D(len(clips)).to(device, memory_format=torch.channels_last_3d)
    optimiser, drop = torch.optim.SGD(net.parameters(), lr=protocol["lr"], **SGD), protocol["lr_drop_at"]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [math.ceil(drop * args.epochs)])  # to a tenth
    size = min(protocol["max_batch_size"], max(protocol["min_batch_size"], result["videos"] // 10))
    train = batches(clips, protocol["flip"], batch_size=size, shuffle=True)
    for _ in range(args.epochs):
        for x, labels in train:
            loss = torch.nn.functional.cross_entropy(logits(x), labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    net.eval()
    with torch.inference_mode():
        right = [logits(x).argmax(1).cpu() == labels for x, labels in batches(tests, 0.0, batch_size=64)]
    return 100 * torch.cat(right).double().mean().item()


PARTS = {"sampling": sampling, "kmeans": kmeans, "training": training}


def estimate(args):
    return {"bench": ("parts", len(args.parts), 100 * len(args.parts), 1e9, "two CPU cores")}


def main(args):
    if args.dry_run:
        return contract.say(f"bench {contract.plan(args.estimate['bench'])}")
    cuda = args.device != "cpu"
    name = torch.cuda.get_device_name(args.device) if cuda else f"cpu-{torch.get_num_threads()}"
    path = args.results / f"{re.sub('[^A-Za-z0-9.-]+', '_', name)}.json"
    figures = contract.read(path) or {}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as work:
            found, ours, plain = PARTS[part](args, Path(work))
        seconds = {"ours": round(ours, 3), "plain": round(plain, 3)}
        figures[f"{part}, {args.dataset}"] = found | {"seconds": seconds, "ratio": round(plain / ours, 2)}
        contract.say(f"{part}: {ours:.2f} s, the plain way {plain:.2f} s, ratio {plain / ours:.2f}")
        contract.save(path, figures)
    contract.say(path)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
