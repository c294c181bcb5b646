"""Stage 04: generated videos -> the distilled data set, by multi-video instance composition (section 3.4, appendix D.3).

Of every class, draws 0 to 3 of all prototypes are dealt at random into groups of four. Each video gives four random
frames in temporal order; the group's frames, joined video after video, are one distilled video of 16 frames.

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

SOURCES = 4  # EDIT HERE: videos of a group (section 3.4: 4)
FRAMES = 4  # and frames of each; SOURCES * FRAMES = 16
FPS = 8
SECONDS_PER_VIDEO = {"demo": 0.05}
SECONDS_PER_VIDEO_FULL = 0.6


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    parser.add_argument("--samples", default="gvd", help="folder of stage 03 (gvd)")
    parser.add_argument("--name", help="name of the folder (the samples' name)")
    args = contract.parse(parser)
    args.name = args.name or args.samples
    return args


def compose_plan(label, num_prototypes, seed):
    """The composition of a class: for each distilled video, SOURCES pairs (sample "<prototype>_<draw>", frame numbers).

    Random groups that do not overlap; of each sample, FRAMES random frames in temporal order (appendix D.3).
    """
    samples = [f"{k}_{draw}" for k in range(num_prototypes) for draw in range(SOURCES)]
    order = torch.randperm(len(samples), generator=contract.generator(seed, "04", label)).tolist()
    plan = []
    for i in range(num_prototypes):
        generator = contract.generator(seed, "04", label, i)
        group = [samples[j] for j in order[i * SOURCES : (i + 1) * SOURCES]]
        draws = [torch.randperm(common.NUM_FRAMES, generator=generator)[:FRAMES] for _ in group]
        plan.append([(sample, sorted(frames.tolist())) for sample, frames in zip(group, draws, strict=True)])
    return plan


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
    mend = contract.command("03_guided_sample.py", args, "--name", args.samples)
    manifest = contract.read_folder(source, args, mend)
    plans = {c: compose_plan(c, number, args.seed) for c in args.classes}
    needed = {c: sorted(f"{c}/{sample}.mp4" for group in plans[c] for sample, _ in group) for c in args.classes}
    contract.need(manifest, [name for names in needed.values() for name in names], source, mend)

    folder = contract.work_folder(args, "04_distilled", f"ipc{args.ipc}", args.name)
    inputs = {c: contract.content(manifest, needed[c]) for c in args.classes}
    identity = contract.identity(__file__, args, {"ipc": args.ipc, "limit": args.limit}, {}, inputs)
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
        for i, plan in enumerate(compose_plan(label, number, args.seed)):
            frames = " ".join("-".join(map(str, frames)) for _, frames in plan)
            rows.append([f"{label}/{i}.mp4", label, " ".join(sample for sample, _ in plan), frames])
    common.write_csv(folder / "metadata.csv", ("file_name", "label", "sources", "frames"), rows)
    kinds["metadata.csv"] = ([len(rows), 4], "csv")
    contract.finish(folder, identity, wanted, args, ["opencv-python-headless", "av"], kinds)


if __name__ == "__main__":
    contract.run(main)
