"""Composes random real training clips as stage 04 composes generated videos: what composition alone costs on the demo.

For K composed videos of a class, 4 K of its training clips stand in for the four draws of K prototypes; which of them
give which frames to which video is stage 04's own plan. A network trained on the result against one trained on real
clips as they are differs by the composition alone, with no generated video in between.

Reads:   data/demo (demo/draw_videos.py)
Writes:  work/demo/composed/ipc<K>/real-composed/<class>/<i>.mp4, i = 0 .. K-1; what stood there is replaced
Run:     python demo/compose_real.py 10
         python 05_train_eval.py demo 10 --train-on work/demo/composed/ipc10/real-composed
Cost:    5 s on two CPU cores
Expect:  row real-composed of the README's first table
"""

import argparse
import importlib
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

SEED = 0


def generator_clip(path, size):
    """The 16 frames of a clip that stage 01 encodes, at generator size: uint8 [16, H, W, 3]. ContractError: no video."""
    try:
        video = common.read_video(path)
    except common.BadVideo as error:
        raise contract.ContractError(f"{path}: {error}\n  draw it again: python demo/draw_videos.py") from None
    return common.resize_frames(video[common.uniform_frames(len(video))], size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ipc", type=contract.positive, help="composed videos per class")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds demo/ (data)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="artifacts go to WORK_DIR/demo (work)")
    args = parser.parse_args()
    spec, stage = common.DATASETS["demo"], importlib.import_module("04_mvic_compose")
    folder = args.work_dir / "demo" / "composed" / f"ipc{args.ipc}" / "real-composed"
    clips = {}
    for label, name, split, _ in common.list_clips("demo", args.data_root):
        if split == "train":
            clips.setdefault(label, []).append(args.data_root / spec["videos"] / label / f"{name}.avi")
    sources, fewest = len(stage.PATTERNS[stage.PATTERN]), min(map(len, clips.values()))
    if args.ipc * sources > fewest:
        raise contract.ContractError(
            f"ipc {args.ipc}: too few training clips\n  expected: {args.ipc * sources} of each class, {sources} per video\n"
            f"  found:    {fewest}\n  type at most {fewest // sources}"
        )
    composed = {}
    for label, paths in clips.items():
        plans = stage.compose_plan(label, args.ipc, SEED)
        samples = sorted(sample for plan in plans for sample, _ in plan)
        order = torch.randperm(len(paths), generator=contract.generator(SEED, "compose_real", label)).tolist()
        videos = {s: generator_clip(paths[i], spec["size"]) for s, i in zip(samples, order, strict=False)}
        composed |= {f"{label}/{i}.mp4": stage.compose(videos, plan) for i, plan in enumerate(plans)}
    shutil.rmtree(folder, ignore_errors=True)  # only now that all clips could be read
    for name, frames in composed.items():
        common.write_mp4(folder / name, frames, stage.FPS)
    print(f"{args.ipc} videos of {len(clips)} classes, composed of real training clips: {folder}")


if __name__ == "__main__":
    contract.run(main)
