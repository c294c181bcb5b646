"""Stage 04: generated videos -> the distilled data set, by multi-video instance composition (3.4, app. D.3).

Of every class, draws 0 to 3 of all prototypes are dealt at random into groups of four. Each video gives four
random frames in temporal order; the group's frames, joined video after video, are one distilled video of 16
frames. Appendix D.3's alternatives:

  --pattern   4x4 (the default), 8x2, 3-3-3-3-2-2, 2x8, 1x16: n videos of a group x frames of each, or the
              frames of each. Draws 0 to n - 1 of every prototype are used: 8x2 needs 03 --draws 8
  --frames    random (the default) | continuous: consecutive frames from a random start
  --grouping  random (the default) | in-order: a group is the draws of one prototype

Reads:   work/<data set>/03_samples/ipc<K>/<--samples>/<class>/<prototype>_<draw>.mp4
Writes:  work/<data set>/04_distilled/ipc<K>/<--name>/<class>/<i>.mp4, i = 0 .. K-1, at generator size;
         metadata.csv: file_name, label, sources, frames; README.md: the card of a Hugging Face `videofolder`
Run:     python 04_mvic_compose.py hmdb51 20
         python 04_mvic_compose.py demo 5
Cost:    demo: 1 s. hmdb51 IPC 20, by estimate: 10 min on one CPU core, 0.4 GB
Expect:  K videos per class, every generated video used once, frame numbers rising within each source
Differs: nothing known
"""

import contract

import math

import numpy as np
import torch

import common
import media

PATTERNS = {"4x4": (4,) * 4, "8x2": (2,) * 8, "3-3-3-3-2-2": (3, 3, 3, 3, 2, 2), "2x8": (8, 8), "1x16": (16,)}
PATTERN = "4x4"  # videos x frames (section 3.4)
FPS = 8
SECONDS = {"demo": 0.05}  # per video, on one CPU core; any other data set:
SECONDS_FULL = 0.6
# The dataset card. Its data_files keep manifest.json from being taken for data where there are few videos.
CARD = """---
license: {license}
task_categories: [video-classification]
configs:
- config_name: default
  data_files: [{{split: train, path: ["*/*.mp4", metadata.csv]}}]
---
# {dataset}, distilled by GVD

{videos} videos of 16 frames, {per_class} per class, of the generated videos `{samples}`, pattern {pattern}.
`metadata.csv` has the label of each, the generated videos that it was composed of, and which of their frames.

    datasets.load_dataset("videofolder", data_dir="this folder")

Generated videos have the licence of the model that made them (ModelScope's weights: CC-BY-NC 4.0, not for
commercial use), and the terms of the data set that they were distilled from apply.
"""


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    add = parser.add_argument
    add("--samples", default="gvd", help="folder of stage 03 (gvd)")
    add("--pattern", choices=PATTERNS, default=PATTERN, help=f"videos x frames, see above ({PATTERN})")
    add("--frames", choices=("random", "continuous"), default="random", help="of a video (random)")
    add("--grouping", choices=("random", "in-order"), default="random", help="of a class's videos (random)")
    add("--name", help="name of the folder (the samples', and what is no default: gvd-8x2-continuous)")
    args = contract.parse(parser)
    other = [v for v in (args.pattern, args.frames, args.grouping) if v not in (PATTERN, "random")]
    args.name = args.name or "-".join([args.samples, *other])
    return args


def compose_plan(label, num_prototypes, seed, pattern=PATTERN, frames="random", grouping="random"):
    """The composition of a class: for each distilled video, pairs (sample "<prototype>_<draw>", its frames).

    Disjoint groups of as many samples as the pattern has counts; each sample gives that many frames, in
    temporal order (appendix D.3).
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
        plan.append([(s, draw_frames(n, frames, generator)) for s, n in zip(group, counts, strict=True)])
    return plan


def draw_frames(count, frames, generator):
    """`count` rising frame numbers of a video: random ones, or consecutive ones from a random start."""
    if frames == "random":
        return sorted(torch.randperm(common.NUM_FRAMES, generator=generator)[:count].tolist())
    start = int(torch.randint(common.NUM_FRAMES - count + 1, (), generator=generator))
    return list(range(start, start + count))


def compose(folder, plan, fix):
    """Frames uint8 [16, H, W, 3] of a distilled video, of the samples in `folder`. fix: what makes those."""
    parts = []
    for sample, frames in plan:
        path = folder / f"{sample}.mp4"
        try:
            parts.append(media.read_video(path)[frames])  # [4, H, W, 3] with 4x4
        except media.BadVideo as error:
            raise contract.ContractError(f"{path}: {error}", "a video", fix=f"{fix} --redo") from None
    return np.concatenate(parts)


def estimate(args):
    videos = min(args.ipc, args.limit or args.ipc) * len(args.classes)
    seconds = SECONDS.get(args.dataset, SECONDS_FULL) * videos
    size = videos * 0.15 * common.NUM_FRAMES * math.prod(args.spec["size"])
    return {"04_distilled": ("videos", videos, seconds, size, "one CPU core")}


def main(args):
    number, draws = min(args.ipc, args.limit or args.ipc), len(PATTERNS[args.pattern])
    option = "--sampler" if args.samples in ("gvd", "naive", "knoise") else "--name"
    fix = contract.command(args, "03_guided_sample.py", option, args.samples, "--draws", draws)
    source = contract.Input(args, f"03_samples/ipc{args.ipc}/{args.samples}", fix)
    method = {name: getattr(args, name) for name in ("pattern", "frames", "grouping")}
    plans = {c: compose_plan(c, number, args.seed, **method) for c in args.classes}
    inputs = source.check(f"{c}/{sample}.mp4" for c in args.classes for g in plans[c] for sample, _ in g)
    videos = [f"{c}/{i}.mp4" for c in args.classes for i in range(number)]
    derived, parameters = ("metadata.csv", "README.md"), {"ipc": args.ipc, "limit": args.limit, **method}
    parameters["classes"] = args.spec["classes"]  # one that is gone from one's own folder leaves the set
    folder = f"04_distilled/ipc{args.ipc}/{args.name}"
    output = contract.Output(args, folder, parameters, inputs, [*videos, *derived], derived)
    if not output.todo:
        return
    for name in contract.bar(output.mine(videos, lambda name: [name]), desc="04 videos"):
        label, i = name.removesuffix(".mp4").split("/")
        frames = compose(source.folder / label, plans[label][int(i)], fix)
        media.write_mp4(output.folder / name, frames, FPS)
    rows, labels = [], {name.split("/")[0] for name in (*output.record["outputs"], *videos) if "/" in name}
    for label in sorted(labels):  # also the classes of an earlier run
        for i, plan in enumerate(compose_plan(label, number, args.seed, **method)):
            frames = " ".join("-".join(map(str, frames)) for _, frames in plan)
            rows.append([f"{label}/{i}.mp4", label, " ".join(sample for sample, _ in plan), frames])
    contract.save(output.folder / "metadata.csv", [("file_name", "label", "sources", "frames"), *rows])
    license = "mit" if args.dataset == "demo" else "cc-by-nc-4.0"
    card = CARD.format(**vars(args), license=license, videos=len(rows), per_class=number)
    contract.save(output.folder / "README.md", card.encode())
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
