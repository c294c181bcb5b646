"""What is in a distilled set: diversity in VideoMAE features, recognisable videos, frames, stored bytes.

A set is measured after composition (04_distilled) and before (03_samples, draw 0 of each prototype: as many
videos), beside all real training clips and as many random ones: the mean of the first three repeats of 05
--train-on random (section 4.4.4, appendices A and B). Features are what the VideoMAE's classifier sees, the
layer-normalised mean over its tokens, scaled to length 1: the printed MPD of 0.8 to 0.9 needs it. Distances
are Euclidean.

Entropy   of the mean of the softmax outputs over all videos. Base and outputs are not in the paper: in bits
          over the data set's classes, and in nats over all outputs
Coverage  (eq. 12, 13) share of the real training clips whose nearest distilled video is within the 90th
          percentile of the distances of real clips to their nearest other one. Per class, then averaged, and
          of all classes together, since the paper does not say which
MPD       mean pairwise distance, likewise per class and of all
--score   instead: share of the videos, of all draws and of the first, that MiniC3D trained on all real clips
          recognises, the paper's representativeness; also of its own training clips

Reads:   work/<data set>/01_clips, 03_samples/ipc<K>, 04_distilled/ipc<K>; a VideoMAE of the data set
         --score: 05_networks/minic3d__<protocol>/network.safetensors, of 05 --train-on full --save
Writes:  work/<data set>/metrics_ipc<K>.json; the features, float32 [n, d] in order of class and name:
         features/ipc<K>/{real,<set>,<set>-samples}.npy
         --score: 05_results/ipc<K>/<set>/score.json, <set>-samples/ for a set of 03_samples, full/
Run:     python tools/metrics.py demo 5
         python tools/metrics.py demo 5 --sets gvd,naive --score
Cost:    demo: 15 s on two CPU cores. miniucf, by estimate: 5 min on an A100
Expect:  the higher the more diverse, beside random real clips; the authors' own features are not public
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import videomae  # noqa: E402
from safetensors import safe_open  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

PERCENTILE = 0.9  # of the nearest-neighbour distances (appendix A)
SELECTIONS = 3  # of random real clips: the first repeats of stage 05
EXACT = "donot_use_mm_for_euclid_dist"  # exactly 0 for equal points
BATCH = 64  # clips per forward of MiniC3D
METRICS = {  # name in the file: column of the table
    "entropy_bits_classes": "entropy, bits",
    "entropy_nats_outputs": "entropy, nats",
    "coverage_per_class": "coverage per class",
    "coverage_all": "coverage of all",
    "mpd_per_class": "MPD per class",
    "mpd_all": "MPD of all",
}
STEPS = {"samples": "03_samples", "distilled": "04_distilled"}  # where sets are


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    add = parser.add_argument
    add("--sets", metavar="A,B", help="names of stages 03 and 04, or folders of <class>/*.mp4 (all names)")
    add("--teacher", metavar="MODEL", help="VideoMAE, folder or hub name (the data set's own)")
    add("--protocol", help="protocol of the scoring network (the data set's own)")
    add("--score", action="store_true", help="measure the videos that MiniC3D recognises instead, see above")
    return contract.parse(parser)


# --- the metrics ------------------------------------------------------------------------------------------


def entropy(probabilities, unit):
    """Entropy of the mean of probabilities [n, c] whose rows sum to 1. unit: 2 for bits, e for nats."""
    mean = probabilities.double().mean(0)
    return (torch.special.entr(mean).sum() / np.log(unit)).item()


def unit_length(features):
    """Features [n, d] as float64 of Euclidean length 1."""
    return torch.nn.functional.normalize(features.double(), dim=1)


def nearest(points, others=None):
    """Distance [n] of each of points [n, d] to the nearest of others [m, d]; None: of the other points."""
    away = torch.cdist(points, points if others is None else others, compute_mode=EXACT)
    return (away.fill_diagonal_(torch.inf) if others is None else away).amin(1)


def percentile(values):
    """The 90th percentile of distances [n], linear between order statistics."""
    return torch.quantile(values, PERCENTILE).item()


def coverage(real, distilled, limit):
    """Share of the points real [n, d] that are within `limit` of one of distilled [m, d] (eq. 12 and 13)."""
    return (nearest(real, distilled) <= limit).double().mean().item()


def mean_pairwise_distance(points):
    """Mean distance over the pairs of points [n, d]; None when there is no pair."""
    return torch.pdist(points).mean().item() if len(points) > 1 else None


def measure(real, limits, distilled, columns):
    """The metrics {name: value or None} of a set.

    real: {class: unit-length features [n, d]}. limits: {class: limit of coverage, "": that of all classes}.
    distilled: {class: (features [m, d], logits [m, outputs])}. columns: the outputs that are classes.
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


def condensation(train, test, num_distilled):
    """Frames of a set (appendix B; section 1: 1.98 % and 3.30 %). train, test: frames of each real clip."""
    return {
        "frames per training clip": round(statistics.fmean(train), 4),
        "frames per clip, training and test": round(statistics.fmean(train + test), 4),
        "frames of all training clips": sum(train),
        "frames per distilled video": common.NUM_FRAMES,
        "frames of a distilled set": common.NUM_FRAMES * num_distilled,
        "of all frames": round(
            common.NUM_FRAMES * num_distilled / sum(train), 6
        ),  # those of the training clips
    }


# --- the sets ---------------------------------------------------------------------------------------------


def find_sets(args):
    """[(name, "samples", "distilled" or "folder", folder)] of --sets, or of all that are there."""
    base, sets = args.work_dir / args.dataset, []
    places = {step: base / part / f"ipc{args.ipc}" for step, part in STEPS.items()}
    there = {path.parent.name for place in places.values() for path in place.glob("*/manifest.json")}
    there = sorted(name for name in there if ".old-" not in name) or ["gvd"]
    for name in args.sets.split(",") if args.sets else there:
        here = [(name, step, place / name) for step, place in places.items() if (place / name).is_dir()]
        if Path(name).name != name or not here:  # no plain name
            here = [(Path(name).resolve().name, "folder", Path(name))] if Path(name).is_dir() else []
        if not here:
            expected = f"a folder in {places['distilled']} or {places['samples']}, or one of <class>/*.mp4"
            fix = contract.command(args, "04_mvic_compose.py", "--name", name)
            raise contract.Missing(f"there is no set {name}", expected, fix=fix)
        sets += here
    return sets


def read_set(args, folder, ending=".mp4"):
    """A set's videos at network size {class: uint8 [m, 16, S, S, 3]}, their hash and their bytes."""
    videos, files, _ = media.find_videos(args, folder, ending)
    clips = {c: media.network_clips(folder, of_class, args.spec) for c, of_class in videos.items()}
    return clips, contract.digest(files), media.set_bytes(folder, files)


# --- score ------------------------------------------------------------------------------------------------


def load_network(args):
    """(MiniC3D trained on all real clips, the classes of its outputs, how it is short of its protocol)."""
    fix = contract.command(args, "05_train_eval.py", "--train-on", "full", "--save")
    folder = f"05_networks/minic3d__{args.protocol or ('demo' if args.dataset == 'demo' else 'gvd')}"
    source, name = contract.Input(args, folder, fix), "network.safetensors"
    source.check([name])
    with safe_open(source.folder / name, "pt") as file:
        known = json.loads(file.metadata()["classes"])
        network = common.MiniC3D(len(known)).eval()
        network.load_state_dict({name: file.get_tensor(name) for name in network.state_dict()})
    if unknown := [c for c in args.classes if c not in known]:
        raise contract.ContractError(f"{source.folder}: no output for {unknown[0]}", found=", ".join(known))
    short = source.record["parameters"].get("deviations", [])
    return network.to(memory_format=torch.channels_last_3d), known, short


@torch.inference_mode()
def score(network, known, videos):
    """Share in percent that the network recognises of videos {class: uint8 [m, 16, S, S, 3]}, in float32."""
    right = {}
    for label, clips in videos.items():
        parts = (torch.from_numpy(np.array(clips[i : i + BATCH])) for i in range(0, len(clips), BATCH))
        inputs = (common.to_input(part) for part in parts)
        logits = torch.cat([network(x.contiguous(memory_format=torch.channels_last_3d)) for x in inputs])
        right[label] = (logits.argmax(1) == known.index(label)).double()
    total = torch.cat([*right.values()])
    rates = {c: round(100 * values.mean().item(), 4) for c, values in right.items()}
    return {"videos": len(total), "top1": round(100 * total.mean().item(), 4), "per_class": rates}


def score_sets(args, sets):
    """Writes score.json of each set."""
    network, known, short = load_network(args)
    for name, step, folder in sets:
        videos, made_of, _ = read_set(args, folder)
        result = {"set": name + "-samples" * (step == "samples"), "videos made of": made_of, "short": short}
        result |= score(network, known, videos)
        if step == "samples":
            videos, _, _ = read_set(args, folder, "_0.mp4")
            result["first draw"] = score(network, known, videos)
        save_score(args, result)
    real, files = media.real_clips(args)  # the training clips of the network itself
    result = {"set": "full", "videos made of": contract.digest(files), "short": short}
    save_score(args, result | score(network, known, {c: clips[:, 0] for c, (_, clips) in real.items()}))


def save_score(args, result):
    path = args.work_dir / args.dataset / "05_results" / f"ipc{args.ipc}" / result["set"] / "score.json"
    contract.save(path, result)
    contract.say(f"{result['set']}: {result['top1']:.2f} % of {result['videos']:,} videos recognised")


# --- table and main ---------------------------------------------------------------------------------------


def row_of(name, step, num_videos, size, values):
    """A row of the result: mean and sample standard deviation of the metrics of one or several selections."""
    row = {"set": name, "step": step, "videos": num_videos, "bytes": size, "mean": {}, "std": {}}
    row["values"] = {m: [v[m] for v in values] for m in METRICS}
    for m, found in row["values"].items():
        if None not in found:
            row["mean"][m] = round(statistics.fmean(found), 6)
            row["std"] |= {m: round(statistics.stdev(found), 6)} if len(found) > 1 else {}
    return row


def table(result):
    """The rows of a result as a Markdown table."""
    titles, frames = ["set", "videos", "stored bytes", *METRICS.values()], result["frames"]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for row in result["sets"]:
        cells = [row["set"], f"{row['videos']:,}", f"{row['bytes']:,}"]
        for name in METRICS:
            spread = f" ± {row['std'][name]:.4f}" if name in row["std"] else ""
            cells.append(f"{row['mean'][name]:.4f}{spread}" if name in row["mean"] else "-")
        lines.append("| " + " | ".join(cells) + " |")
    share, each = f"{100 * frames['of all frames']:.2f} %", f"{frames['frames per training clip']:.1f}"
    lines += ["", f"Frames: {share} of all training frames, of which a clip has {each}."]
    lines += [f"Random real clips: mean ± sample standard deviation of {SELECTIONS} selections."]
    return "\n".join(lines)


def save_features(args, name, points):
    """Writes features {class: [n, d]} as one array."""
    path = args.work_dir / args.dataset / "features" / f"ipc{args.ipc}" / f"{name}.npy"
    contract.save(path, torch.cat([*points.values()]).float().numpy())


def estimate(args):
    seconds, machine = (15, "two CPU cores") if args.dataset == "demo" else (300, "an A100")
    return {"metrics": ("tables", 1, seconds, 1e5, machine)}


def main(args):
    sets = find_sets(args)
    if args.dry_run:
        return contract.say(f"metrics {contract.plan(args.estimate['metrics'])}")
    if args.score:
        return score_sets(args, sets)
    real, files = media.real_clips(args)
    if few := [(c, len(names)) for c, (names, _) in real.items() if len(names) < max(2, args.ipc)]:
        raise contract.ContractError(f"too few training clips of {few[0][0]}", max(2, args.ipc), few[0][1])
    folder = videomae.model_folder(args)
    network, scale = videomae.load(folder, torch.device(contract.automatic("device", args.device)))
    columns = videomae.output_columns(network, args.classes, folder)
    inputs = {"real training clips": contract.digest(files), "VideoMAE": videomae.model_hash(folder)}
    outputs = {c: videomae.run(network, scale, clips[:, 0]) for c, (_, clips) in real.items()}  # window 0
    points = {c: unit_length(features) for c, (features, _) in outputs.items()}
    limits = {c: percentile(nearest(p)) for c, p in points.items()}  # q90 of eq. 13
    limits[""] = percentile(nearest(torch.cat([*points.values()])))
    size = common.NUM_FRAMES * args.spec["side"] ** 2 * 3  # of a real clip, uint8 at network size
    count, values = sum(map(len, points.values())), [measure(points, limits, outputs, columns)]
    measured = [row_of("all real clips", "real", count, count * size, values)]
    save_features(args, "real", points)
    num_videos = args.ipc * len(args.classes)
    for name, step, place in sets:
        before = step == "samples"  # then draw 0 alone
        videos, inputs[f"{step} {name}"], stored = read_set(args, place, "_0.mp4" if before else ".mp4")
        found = {c: videomae.run(network, scale, clips) for c, clips in videos.items()}
        count, values = sum(map(len, videos.values())), [measure(points, limits, found, columns)]
        measured.append(row_of(name + ", before composition" * before, step, count, stored, values))
        features = {c: unit_length(of_class) for c, (of_class, _) in found.items()}
        save_features(args, name + "-samples" * before, features)
    chosen, values = [], []  # of random real clips
    for repeat in range(SELECTIONS):
        names = media.select_random(real, args.ipc, args.seed, repeat)
        rows = {c: [real[c][0].index(name) for name in names[c]] for c in real}
        found = {c: tuple(part[rows[c]] for part in outputs[c]) for c in rows}
        values.append(measure(points, limits, found, columns))
        chosen.append(names)
    measured.append(row_of("random real clips", "random", num_videos, num_videos * size, values))
    clips, frames = args.work_dir / args.dataset / "01_clips", {"train": [], "test": []}
    for split, label in itertools.product(frames, args.classes):
        frames[split] += [int(row["frames"]) for row in contract.read(clips / split / f"{label}.csv")]
    result = {
        "data set": args.dataset,
        "VideoMAE": Path(args.teacher or folder).name,
        "inputs": inputs,
        "real training clips": {c: len(names) for c, (names, _) in real.items()},
        "random": chosen,
        "frames": condensation(frames["train"], frames["test"], num_videos),
        "sets": measured,
        **{name: getattr(args, name) for name in ("ipc", "classes", "seed")},
    }
    path = args.work_dir / args.dataset / f"metrics_ipc{args.ipc}.json"
    contract.save(path, result)
    contract.say(f"{table(result)}\n{path}")


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
