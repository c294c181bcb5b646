"""Soft labels: the logits that a VideoMAE gives each video of a set (section 3.5), for 05 --labels soft.

The teacher sees a video as the network does before flipping, at network size, resized to the teacher's.
Real clips are labelled once, for all training clips. With the logits stored, the teacher is no longer needed.

Reads:   the set --train-on, as stage 05 does: 01_clips/train, 04_distilled/ipc<K>/<set>, <set>/<class>/*.mp4;
         --teacher: a VideoMAE fine-tuned on the data set, a folder or hub name (miniucf, ucf101: a published
         one; demo: demo/models/videomae; hmdb51: 05_networks/videomae of tools/train_teacher.py)
Writes:  work/<data set>/05_labels/ipc<K>/<set>/ or full/real/: <class>.npy float32 [n, classes], <class>.csv
         the videos of its rows, classes.csv the classes of its columns; real-windows/ with --windows
Run:     python tools/soft_labels.py demo 5
         python tools/soft_labels.py hmdb51 --train-on full
Cost:    demo: 20 s for all clips on two CPU cores. hmdb51, by estimate: 2 min for all clips on an A100
Expect:  as many rows as videos
Differs: the hub's UCF101 model does not say which clips it has seen; they may include test clips
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import videomae  # noqa: E402

import media  # noqa: E402

SECONDS = {"demo": 0.02}  # per clip on two CPU cores; any other data set on an A100, by estimate:
SECONDS_FULL = 0.026


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc="?")
    add = parser.add_argument
    add("--train-on", default="gvd", metavar="SET", help="the set, as in stage 05 (gvd)")
    add("--teacher", metavar="MODEL", help="VideoMAE, folder or hub name (the data set's own)")
    add("--windows", action="store_true", help="real clips: window 0 of 01 --windows, for protocol dancing")
    args = contract.parse(parser)
    args.real = args.train_on in ("random", "full", "herding", "kcenter")
    if args.ipc is None and not args.real:
        parser.error("ipc: needed for a set of videos")
    return args


def estimate(args):
    whole = args.spec["clips"][0] if args.real else args.ipc * len(args.spec["classes"])
    count = whole * len(args.classes) // len(args.spec["classes"])
    seconds = SECONDS.get(args.dataset, SECONDS_FULL) * count
    machine = "two CPU cores" if args.dataset == "demo" else "an A100"
    return {"05_labels": ("videos", count, seconds, 4.0 * count * len(args.classes), machine)}


def main(args):
    if args.real:
        place, args.limit = "full/real" + "-windows" * args.windows, None  # all clips, whatever 05 uses
        clips, files = media.real_clips(args, "train", args.windows)
    else:
        folder = args.work_dir / args.dataset / f"04_distilled/ipc{args.ipc}" / args.train_on
        folder = folder if folder.is_dir() or not Path(args.train_on).is_dir() else Path(args.train_on)
        place = f"ipc{args.ipc}/{folder.resolve().name}"
        clips, files, _ = media.find_videos(args, folder)
    inputs, name = {"videos": contract.digest(files)}, Path(videomae.model_name(args)).name
    try:
        teacher = videomae.model_folder(args)
        inputs["teacher"] = videomae.model_hash(teacher)
    except contract.Missing:
        record = contract.read(args.work_dir / args.dataset / "05_labels" / place / "manifest.json")
        stated = (
            record and record["complete"] and (record["inputs"]["videos"], record["parameters"]["teacher"])
        )
        if stated != (inputs["videos"], name):
            raise
        return contract.say(f"{args.number} fresh: {place}, without {videomae.model_name(args)}")

    wanted = ["classes.csv", *(f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv"))]
    parameters = {"teacher": name, "classes": args.classes, "device": args.device}
    output = contract.Output(args, f"05_labels/{place}", parameters, inputs, wanted)
    if not output.todo:
        return
    network, scale = videomae.load(teacher, output.device)
    columns = videomae.output_columns(network, args.classes, teacher)
    contract.save(output.folder / "classes.csv", [("name",), *((c,) for c in args.classes)])
    for label in contract.bar(args.classes, desc="soft labels"):
        names, array = clips[label]
        array = array[:, 0] if args.real else media.network_clips(folder, clips[label], args.spec)
        _, logits = videomae.run(network, scale, array)
        contract.save(output.folder / f"{label}.npy", logits[:, columns].numpy())
        contract.save(output.folder / f"{label}.csv", [("name",), *((name,) for name in names)])
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
