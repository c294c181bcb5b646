"""Diversity of distilled sets in VideoMAE features (section 4.4.4, appendix A), frames (appendix B) and stored bytes.

Each set is measured after composition (04_distilled) and before (03_samples, draw 0 of every prototype, so that both
hold the same number of videos), beside as many random real clips: those that stage 05 trains `random` on, mean of three
selections. Accuracy of the full-data network on a set, the paper's representativeness: 05_train_eval.py --score.

Features are what the VideoMAE's classifier sees, the layer-normalised mean over its tokens [INF], made unit length [INF:
the printed MPD of 0.8 to 0.9 needs it]. Distances are Euclidean, in float64.
- Entropy of the mean of the softmax outputs over all videos. Base and outputs are not stated [INF]: in bits over the
  data set's classes, and in nats over all outputs.
- Coverage (eq. 12 and 13): share of the real training clips whose nearest distilled video is not farther than the 90th
  percentile of the distances of real clips to their nearest other real clip [INF: or, --threshold distilled, to the
  nearest distilled video, which gives about 0.9 whatever the set]. Per class, then averaged, and of all classes
  together [INF: which one is not stated]. Random real clips cover themselves.
- MPD: mean distance over all pairs of videos of a class, then averaged, and over all pairs of the set [INF, likewise].

Reads:   work/<data set>/01_clips, 03_samples/ipc<K>, 04_distilled/ipc<K>; a VideoMAE fine-tuned on the data set
Writes:  work/<data set>/metrics_ipc<K>.json
Run:     python tools/metrics.py miniucf 5
         python tools/metrics.py demo 5 --sets gvd,naive
Cost:    demo: 15 s on two CPU cores. miniucf, by estimate: 5 min on an A100
Expect:  the higher the more diverse; random real clips are what to compare with
Differs: K-Noise and the authors' features are not public, so the printed values are no reference
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

PERCENTILE = 0.9  # of the nearest-neighbour distances (appendix A)
SELECTIONS = range(3)  # of random real clips: repeats of stage 05
BLOCK = 1024  # rows of a distance matrix held at once
METRICS = {  # name in the file: column of the table
    "entropy_bits_classes": "entropy, bits",
    "entropy_nats_outputs": "entropy, nats",
    "coverage_per_class": "coverage per class",
    "coverage_all": "coverage of all",
    "mpd_per_class": "MPD per class",
    "mpd_all": "MPD of all",
}


# ---------------------------------------------------------------------------------------------------------------------
# The metrics
# ---------------------------------------------------------------------------------------------------------------------


def entropy(probabilities, unit):
    """Entropy of the mean of `probabilities` [n, c], whose rows sum to 1, in units of ln(`unit`): 2 for bits, e for nats."""
    mean = probabilities.double().mean(0)
    return (torch.special.entr(mean).sum() / np.log(unit)).item()


def unit_length(features):
    """Features [n, d] as float64 of Euclidean length 1."""
    return torch.nn.functional.normalize(features.double(), dim=1)


def distances(a, b):
    """Euclidean distances [n, m] of points [n, d] and [m, d], from the differences: equal points are at exactly 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(points, others=None):
    """Distance [n] of each of `points` [n, d] to the nearest of `others` [m, d]; without them, to its nearest other."""
    found = []
    for start in range(0, len(points), BLOCK):
        part = distances(points[start : start + BLOCK], points if others is None else others)
        if others is None:
            part[torch.arange(len(part)), start + torch.arange(len(part))] = torch.inf
        found.append(part.amin(1))
    return torch.cat(found)


def percentile(distances):
    """The 90th percentile of distances [n], linear between order statistics."""
    return torch.quantile(distances, PERCENTILE).item()


def coverage(real, distilled, limit=None):
    """Share of the points `real` [n, d] that are not farther than `limit` from one of `distilled` [m, d] (eq. 12 and 13).

    limit: percentile(nearest(real)); None takes the percentile of the distances to the distilled points themselves.
    """
    found = nearest(real, distilled)
    return (found <= (percentile(found) if limit is None else limit)).double().mean().item()


def mean_pairwise_distance(points):
    """Mean distance over the pairs of points [n, d]; None when there is no pair."""
    if len(points) < 2:
        return None
    sums = [distances(points[i : i + BLOCK], points).sum() for i in range(0, len(points), BLOCK)]
    return (sum(sums) / (len(points) * (len(points) - 1))).item()


def measure(real, limits, distilled, columns):
    """The metrics {name: value or None} of a set.

    real: {class: unit-length features [n, d]}. limits: {class: limit of coverage, "": of all classes together}.
    distilled: {class: (features [m, d], logits [m, outputs])}. columns: the outputs of the data set's classes.
    """
    logits = torch.cat([logits for _, logits in distilled.values()]).double()
    points = {c: unit_length(features) for c, (features, _) in distilled.items()}
    pairs = [mean_pairwise_distance(p) for p in points.values()]
    found = {
        "entropy_bits_classes": entropy(logits[:, columns].softmax(1), 2),
        "entropy_nats_outputs": entropy(logits.softmax(1), np.e),
        "coverage_per_class": statistics.fmean(coverage(real[c], points[c], limits[c]) for c in points),
        "coverage_all": coverage(torch.cat([*real.values()]), torch.cat([*points.values()]), limits[""]),
        "mpd_per_class": None if None in pairs else statistics.fmean(pairs),
        "mpd_all": mean_pairwise_distance(torch.cat([*points.values()])),
    }
    return {name: value if value is None else round(value, 6) for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The sets
# ---------------------------------------------------------------------------------------------------------------------


def real_clips(args):
    """The training clips {class: ([name], [row])} by name, arrays {class: uint8 [n, windows, 16, S, S, 3]}, index, hash."""
    folder, mend = contract.work_folder(args, "01_clips"), contract.command("01_encode_latents.py", args)
    manifest = contract.read_folder(folder, args, mend)
    contract.need(manifest, [f"train/{c}.npy" for c in args.classes], folder, mend)
    rows = [row for row in common.read_csv(folder / "index.csv") if row["class"] in args.classes]
    side, clips, arrays = args.spec["side"], {}, {}
    for label in args.classes:
        path = folder / "train" / f"{label}.npy"
        arrays[label] = contract.load_array(path, (None, None, common.NUM_FRAMES, side, side, 3), "uint8", mend)
        mine = {row["name"]: int(row["row"]) for row in rows if (row["class"], row["split"]) == (label, "train")}
        if len(mine) < max(2, args.ipc):
            raise contract.ContractError(
                f"{path}: too few training clips\n  expected: at least {max(2, args.ipc)}\n  found:    {len(mine)}"
            )
        clips[label] = (sorted(mine), [mine[name] for name in sorted(mine)])
    return clips, arrays, rows, contract.content(manifest, [f"train/{c}.npy" for c in args.classes])


def select_random(names, ipc, seed, repeat, label):
    """Places in `names` of the clips that repeat `repeat` of stage 05's `random` trains on."""
    generator = contract.generator(seed, "05", "random", repeat, label)
    return sorted(torch.randperm(len(names), generator=generator)[:ipc].tolist())


def find_sets(args):
    """[(name, "samples", "distilled" or "folder", folder)] of the sets of --sets, or of all that are there."""
    steps = {"samples": "03_samples", "distilled": "04_distilled"}
    places = {step: contract.work_folder(args, part, f"ipc{args.ipc}") for step, part in steps.items()}
    names = args.sets.split(",") if args.sets else []
    if not args.sets:
        found = {path.parent.name for place in places.values() for path in place.glob("*/manifest.json")}
        names = sorted(name for name in found if ".old-" not in name)
    sets = []
    for name in names:
        own = Path(name).name == name  # a plain name, no path
        here = [(name, step, place / name) for step, place in places.items() if own and (place / name).is_dir()]
        if not here and Path(name).is_dir():
            here = [(Path(name).name, "folder", Path(name))]
        if not here:
            raise contract.ContractError(
                f"no set {name}\n  expected: a folder in {places['distilled']} or {places['samples']}, or one of "
                f"<class>/*.mp4\n  to make it: {contract.command('04_mvic_compose.py', args, '--name', name)}"
            )
        sets += here
    if not sets:
        raise contract.ContractError(
            f"{places['distilled']}: no set\n  to make one: bash run_all.sh {args.dataset} {args.ipc}"
        )
    return sets


def read_set(step, folder, args):
    """A set's videos as the networks see them {class: uint8 [m, 16, S, S, 3]}, their hash and bytes."""
    if step == "folder":
        hashes = contract.Hashes(args.work_dir)
        paths = sorted(p for p in folder.rglob("*.mp4") if not p.is_symlink() and not p.name.startswith("."))
        outputs = {p.relative_to(folder).as_posix(): {"sha256": hashes(p), "bytes": p.stat().st_size} for p in paths}
        hashes.save()
    else:
        script = "03_guided_sample.py" if step == "samples" else "04_mvic_compose.py"
        outputs = contract.read_folder(folder, args, contract.command(script, args, "--name", folder.name))["outputs"]
    ending = "_0.mp4" if step == "samples" else ".mp4"
    videos, used = {}, []
    for label in tqdm(args.classes, desc=f"read {folder.name}", mininterval=1, leave=False):
        names = sorted(name for name in outputs if name.split("/")[0] == label and name.endswith(ending))
        if not names:
            raise contract.ContractError(f"{folder / label}: no video\n  expected: some of each class")
        videos[label], used = common.network_clips(folder, names, args.dataset), used + names
    return videos, contract.content({"outputs": outputs}, used), sum(outputs[name]["bytes"] for name in used)


def condensation(rows, num_distilled):
    """Frames of the real clips and of a distilled set (appendix B; the 1.98 % and 3.30 % of section 1).

    rows: of index.csv. num_distilled: videos of the set. "of all frames" is the share of the training clips' frames,
    which is what the paper's figures are of.
    """
    frames = {split: [int(row["frames"]) for row in rows if row["split"] == split] for split in ("train", "test")}
    both = frames["train"] + frames["test"]
    return {
        "frames per training clip": round(statistics.fmean(frames["train"]), 4),
        "frames per clip, training and test": round(statistics.fmean(both), 4),
        "frames of all training clips": sum(frames["train"]),
        "frames per distilled video": common.NUM_FRAMES,
        "frames of a distilled set": common.NUM_FRAMES * num_distilled,
        "of all frames": round(common.NUM_FRAMES * num_distilled / sum(frames["train"]), 6),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Table and main
# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(common.DATASETS), help="data set")
    parser.add_argument("ipc", type=contract.positive, help="videos per class of the distilled sets")
    parser.add_argument("--sets", metavar="A,B", help="names of stages 03 and 04, or folders of <class>/*.mp4 (all names)")
    parser.add_argument("--teacher", metavar="MODEL", help="VideoMAE, folder or hub name (the data set's own)")
    parser.add_argument("--threshold", choices=("real", "distilled"), default="real", help="of coverage, see above (real)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="artifacts are in WORK_DIR/<data set> (work)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random real clips (0)")
    parser.add_argument("--classes", help="only these classes, separated by commas (all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    parser.add_argument("--threads", type=contract.positive, help="CPU threads (the cores that this process may use)")
    parser.set_defaults(datasets=common.DATASETS, data_root=Path("data"))
    return contract.parse(parser)


def row_of(name, step, num_videos, size, values):
    """A row of the result from the metrics of one or several selections: their mean, and sample standard deviation."""
    lists = {m: [v[m] for v in values] for m in METRICS}
    there = {m: found for m, found in lists.items() if None not in found}
    std = {m: round(statistics.stdev(found), 6) for m, found in there.items()} if len(values) > 1 else {}
    mean = {m: round(statistics.fmean(found), 6) for m, found in there.items()}
    return {"set": name, "step": step, "videos": num_videos, "bytes": size, "mean": mean, "std": std, "values": lists}


def table(result):
    """The rows of a result as a Markdown table."""
    lines = [
        "| " + " | ".join(["set", "videos", "stored bytes", *METRICS.values()]) + " |",
        "| --- |" + " ---: |" * (len(METRICS) + 2),
    ]
    for row in result["sets"]:
        cells = []
        for name in METRICS:
            spread = f" ± {row['std'][name]:.4f}" if name in row["std"] else ""
            cells.append(f"{row['mean'][name]:.4f}{spread}" if name in row["mean"] else "-")
        lines.append(f"| {row['set']} | {row['videos']:,} | {row['bytes']:,} | {' | '.join(cells)} |")
    frames = result["frames"]
    return "\n".join(lines) + (
        f"\n\nFrames: {frames['frames per training clip']:.1f} per training clip, {common.NUM_FRAMES} per distilled video; "
        f"{100 * frames['of all frames']:.2f} % of all training frames.\n"
        f"Random real clips: mean ± sample standard deviation of {len(SELECTIONS)} selections.\n"
    )


def main():
    args = parse_args()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sets = find_sets(args)
    clips, arrays, rows, real_hash = real_clips(args)
    folder = common.videomae_folder(args)
    network, scale = common.load_videomae(folder, device)
    columns = common.output_columns(network, args.classes, folder)
    inputs = {"real training clips": real_hash, "VideoMAE": common.videomae_hash(folder, args)}

    def run(array):
        return common.run_videomae(network, scale, array)

    real = {c: run(arrays[c][places, 0]) for c, (_, places) in tqdm(clips.items(), desc="real clips", mininterval=1)}
    points = {c: unit_length(features) for c, (features, _) in real.items()}
    limits = {c: None if args.threshold == "distilled" else percentile(nearest(p)) for c, p in points.items()}
    limits[""] = None if args.threshold == "distilled" else percentile(nearest(torch.cat([*points.values()])))
    selected = [{c: select_random(names, args.ipc, args.seed, r, c) for c, (names, _) in clips.items()} for r in SELECTIONS]
    table_rows = []
    for name, step, place in sets:
        videos, inputs[f"{step} {name}"], size = read_set(step, place, args)
        values = [measure(points, limits, {c: run(array) for c, array in videos.items()}, columns)]
        shown = f"{name}, before composition" if step == "samples" else name
        table_rows.append(row_of(shown, step, sum(map(len, videos.values())), size, values))
    chosen = [{c: tuple(part[places] for part in real[c]) for c, places in one.items()} for one in selected]
    values = [measure(points, limits, one, columns) for one in chosen]
    count = args.ipc * len(args.classes)
    clip_bytes = common.NUM_FRAMES * args.spec["side"] ** 2 * 3  # uint8 at network size, as in stage 05's table
    table_rows.append(row_of("random real clips", "random", count, count * clip_bytes, values))

    result = {
        "data set": args.dataset,
        "ipc": args.ipc,
        "classes": args.classes,
        "seed": args.seed,
        "threshold": args.threshold,
        "VideoMAE": Path(args.teacher or folder).name,
        "inputs": inputs,
        "real training clips": {c: len(names) for c, (names, _) in clips.items()},
        "random": [{c: [clips[c][0][i] for i in places] for c, places in one.items()} for one in selected],
        "frames": condensation(rows, count),
        "sets": table_rows,
    }
    path = contract.work_folder(args, f"metrics_ipc{args.ipc}.json")
    contract.write_json(path, result)
    print(table(result), end="")
    print(path)


if __name__ == "__main__":
    contract.run(main)
