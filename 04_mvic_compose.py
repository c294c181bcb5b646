"""Stage 04: generated videos -> the distilled data set, by multi-video instance composition (section 3.4, appendix D.3).

Of every class, draws 0 to 3 of all prototypes are dealt at random into groups of four. Each video gives four random
frames in temporal order; the group's frames, joined video after video, are one distilled video of 16 frames.
Appendix D.3's other ways:

  --pattern   4x4 (the default), 8x2, 3-3-3-3-2-2, 2x8, 1x16: n videos of a group x frames of each, or frames of each.
              Draws 0 to n - 1 of every prototype are used; 8x2 and 3-3-3-3-2-2 need more of them: 03 --draws 8 (or 6)
  --frames    random (the default) | continuous: consecutive ones, from a random start
  --grouping  random (the default) | in-order: a group is the draws of one prototype

Reads:   work/<data set>/03_samples/ipc<K>/<--samples>/<class>/<prototype>_<draw>.mp4
Writes:  work/<data set>/04_distilled/ipc<K>/<--name>/<class>/<i>.mp4, i = 0 .. K-1, 16 frames at generator size
         and metadata.csv: file_name, label, sources, frames. The layout of a Hugging Face `videofolder` data set
Run:     python 04_mvic_compose.py hmdb51 20
         python 04_mvic_compose.py demo 5
Cost:    demo: 1 s. hmdb51 IPC 20, by estimate: 10 min on one CPU core, 0.4 GB
Expect:  K videos per class, every generated video used once, frame numbers rising within each source
Differs: nothing known
"""

import numpy as np
import torch
from tqdm import tqdm

import common
import contract

PATTERNS = {"4x4": (4,) * 4, "8x2": (2,) * 8, "3-3-3-3-2-2": (3, 3, 3, 3, 2, 2), "2x8": (8,) * 2, "1x16": (16,)}
PATTERN = "4x4"  # EDIT HERE: section 3.4
FPS = 8
SECONDS_PER_VIDEO = {"demo": 0.05}
SECONDS_PER_VIDEO_FULL = 0.6


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    parser.add_argument("--samples", default="gvd", help="folder of stage 03 (gvd)")
    parser.add_argument("--pattern", choices=PATTERNS, default=PATTERN, help=f"videos x frames, see above ({PATTERN})")
    parser.add_argument("--frames", choices=("random", "continuous"), default="random", help="frames of a video (random)")
    parser.add_argument("--grouping", choices=("random", "in-order"), default="random", help="of a class's videos (random)")
    parser.add_argument("--name", help="name of the folder (the samples', and what is not the default: gvd-8x2-continuous)")
    args = contract.parse(parser)
    other = [value for value in (args.pattern, args.frames, args.grouping) if value not in (PATTERN, "random")]
    args.name = args.name or "-".join([args.samples, *other])
    return args


def compose_plan(label, num_prototypes, seed, pattern=PATTERN, frames="random", grouping="random"):
    """The composition of a class: for each distilled video, pairs (sample "<prototype>_<draw>", its frame numbers).

    Groups that do not overlap, of as many samples as the pattern has counts; each gives that many frames, in temporal
    order (appendix D.3).
    """
    counts = PATTERNS[pattern]
    samples = [f"{k}_{draw}" for k in range(num_prototypes) for draw in range(len(counts))]
    order = range(len(samples))
    if grouping == "random":
        order = torch.randperm(len(samples), generator=contract.generator(seed, "04", label)).tolist()
    plan = []
    for i in range(num_prototypes):
        generator = contract.generator(seed, "04", label, i)
        group = [samples[j] for j in order[i * len(counts) : (i + 1) * len(counts)]]
        plan.append([(sample, draw_frames(n, frames, generator)) for sample, n in zip(group, counts, strict=True)])
    return plan


def draw_frames(count, frames, generator):
    """The numbers of `count` frames of a video, rising: random ones, or consecutive ones from a random start."""
    if frames == "random":
        return sorted(torch.randperm(common.NUM_FRAMES, generator=generator)[:count].tolist())
    start = int(torch.randint(common.NUM_FRAMES - count + 1, (), generator=generator))
    return list(range(start, start + count))


def compose(videos, plan):
    """Frames uint8 [16, H, W, 3] of one distilled video. videos: {sample: uint8 [16, H, W, 3]}."""
    return np.concatenate([videos[sample][frames] for sample, frames in plan])


def read_sample(path, shape, mend):
    """A generated video uint8 [16, H, W, 3]; ContractError when it is none."""
    try:
        video = common.read_video(path)
    except common.BadVideo as error:
        raise contract.ContractError(f"{path}: {error}\n  to make it again: {mend} --redo") from None
    if list(video.shape) != shape:
        raise contract.ContractError(
            f"{path} is no such video\n  expected: {shape}\n  found:    {list(video.shape)}\n  to make it again: {mend} --redo"
        )
    return video


def main():
    args = parse_args()
    number = min(args.ipc, args.limit or args.ipc)
    count = number * len(args.classes)
    seconds = SECONDS_PER_VIDEO.get(args.dataset, SECONDS_PER_VIDEO_FULL) * count
    size = count * 0.15 * 16 * args.spec["size"][0] * args.spec["size"][1]
    cost = ("videos", count, seconds, size, "one CPU core")
    source = contract.work_folder(args, "03_samples", f"ipc{args.ipc}", args.samples)
    if args.dry_run and (args.after or not (source / "manifest.json").exists()):
        return contract.plan_after(args, "04", cost)
    draws = ["--draws", len(PATTERNS[args.pattern])]
    mend = contract.command("03_guided_sample.py", args, "--name", args.samples, *draws)
    manifest = contract.read_folder(source, args, mend)
    method = {name: getattr(args, name) for name in ("pattern", "frames", "grouping")}
    plans = {c: compose_plan(c, number, args.seed, **method) for c in args.classes}
    needed = {c: sorted(f"{c}/{sample}.mp4" for group in plans[c] for sample, _ in group) for c in args.classes}
    classes = ["--classes", ",".join(args.classes)] if args.classes != sorted(args.spec["classes"]) else []
    more = contract.made_by(source, args, mend, *draws, *classes)
    contract.need(manifest, [name for names in needed.values() for name in names], source, more)

    folder = contract.work_folder(args, "04_distilled", f"ipc{args.ipc}", args.name)
    inputs = {c: contract.content(manifest, needed[c]) for c in args.classes}
    identity = contract.identity(__file__, args, {"ipc": args.ipc, "limit": args.limit, **method}, {}, inputs)
    wanted = [f"{c}/{i}.mp4" for c in args.classes for i in range(number)] + ["metadata.csv"]
    todo, identity = contract.begin(folder, identity, wanted, args, cost, ["metadata.csv"])
    if todo is None:
        return
    kinds = {}
    for label in tqdm(args.classes, desc="04 classes", mininterval=1):
        shape = manifest["outputs"][needed[label][0]]["shape"]
        kinds.update({f"{label}/{i}.mp4": (shape, "uint8") for i in range(number)})
        for i, plan in enumerate(plans[label]):
            if f"{label}/{i}.mp4" in todo:
                sources = {sample: read_sample(source / label / f"{sample}.mp4", shape, mend) for sample, _ in plan}
                common.write_mp4(folder / label / f"{i}.mp4", compose(sources, plan), FPS)
    rows = []
    videos = [name for name in contract.listed(folder, wanted) if name.endswith(".mp4")]
    for label in sorted({name.split("/")[0] for name in videos}):
        for i, plan in enumerate(compose_plan(label, number, args.seed, **method)):
            frames = " ".join("-".join(map(str, frames)) for _, frames in plan)
            rows.append([f"{label}/{i}.mp4", label, " ".join(sample for sample, _ in plan), frames])
    common.write_csv(folder / "metadata.csv", ("file_name", "label", "sources", "frames"), rows)
    kinds["metadata.csv"] = ([len(rows), 4], "csv")
    contract.finish(folder, identity, wanted, args, ["opencv-python-headless", "av"], kinds)


if __name__ == "__main__":
    contract.run(main)
