"""Bytes of real and of distilled sets by one measure: their frames at network size as .mp4, by one encoder.

Stored sizes do not compare: generated videos are .mp4 files at generator size, real clips uint8 arrays.

Reads:   work/<data set>/01_clips/train; 04_distilled/ipc<K>/<set>/<class>/*.mp4, or where there is a set.json
         <class>.npy float16 [n, variants, 16, S, S, 3], of which the first variant is measured
Writes:  work/<data set>/mp4_bytes.json: {"real": {class: {clip: bytes}}, "sets": {"ipc<K>/<set>": bytes}}
Run:     python tools/mp4_bytes.py demo
Cost:    demo: 10 s on one CPU core. hmdb51, by estimate: 5 min
Expect:  a fraction of the raw bytes, less the less moves
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip

import media  # noqa: E402

SECONDS = {"demo": 0.006}  # per clip, on one CPU core; any other data set, by estimate:
SECONDS_FULL = 0.05


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set, ipc=False))


def encoded(clips):
    """Bytes of each of the clips uint8 [n, 16, S, S, 3] as .mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path, sizes = Path(folder) / "clip.mp4", []
        for clip in clips:
            media.write_mp4(path, clip)
            sizes.append(path.stat().st_size)
    return sizes


def estimate(args):
    clips = args.spec["clips"][0]
    seconds = SECONDS.get(args.dataset, SECONDS_FULL) * clips
    return {"mp4_bytes": ("clips", clips, seconds, 50.0 * clips, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"mp4_bytes {contract.plan(args.estimate['mp4_bytes'])}")
    base, found = args.work_dir / args.dataset, {"real": {}, "sets": {}}
    clips, _ = media.real_clips(args)
    for label, (names, array) in contract.bar(clips.items(), desc="real clips"):
        found["real"][label] = dict(zip(names, encoded(array[:, 0]), strict=True))
    for path in sorted(base.glob("04_distilled/ipc*/*/manifest.json")):
        record = contract.read(path)
        there = {Path(name).parts[0].removesuffix(".npy") for name in record["outputs"]}
        if ".old-" in path.parent.name or not (record["complete"] and {*args.classes} <= there):
            continue
        videos, files, _ = media.find_videos(args, path.parent)
        clips = (media.network_clips(path.parent, of_class, args.spec) for of_class in videos.values())
        size = sum(sum(encoded(of_class)) for of_class in clips)
        found["sets"]["/".join(path.parts[-3:-1])] = {"bytes": size, "made of": contract.digest(files)}
    contract.save(base / "mp4_bytes.json", found)
    contract.say(base / "mp4_bytes.json")


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
