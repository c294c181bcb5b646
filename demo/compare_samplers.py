"""Compares the samplers of stage 03 on the demo by representativeness: does guidance make videos that show their class?

Representativeness is the share of the generated videos that a network trained on all real clips recognises. A seed
stands for all that is drawn: the starts of k-means in stage 02, and in stage 03 the noise, which all samplers of a seed
share. The encoded clips and the network are those of the work folder, made once with seed 0.

Reads:   the demo's videos (demo/draw_videos.py), demo/models/t2v
Writes:  work/demo/02_prototypes/ and 03_samples/, a folder for each sampler and seed; work/demo/samplers.csv
Run:     python demo/compare_samplers.py
Cost:    24 minutes on two CPU cores for 12 runs of 80 videos, and 14 for the scoring network where it is not
         there yet; a killed run goes on
Expect:  the table in the README, of which results/demo_models/samplers.csv is the source; in the paper naive and knoise are
         below gvd
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

IPC, DRAWS = 5, 2  # of 8 classes: 80 videos for each sampler and seed
SEEDS = (0, 1, 2)
PAIR = ("SitDown", "StandUp")  # the same poses in opposite order
SAMPLERS = {  # name: (--cluster of stage 02, if it reads prototypes; options of stage 03)
    "naive": (None, ("--sampler", "naive")),
    "knoise": ("dummy-video", ("--sampler", "knoise")),
    "gvd-no-decay": ("direct", ("--decay", "none")),
    "gvd": ("direct", ()),
}
COLUMNS = ("sampler", "videos", "mean", "std", "values", "pair_mean", "pair_std", "pair_values")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds demo/ (data)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="artifacts go to WORK_DIR/demo (work)")
    args = parser.parse_args()
    data, work = args.data_root.resolve(), args.work_dir.resolve()

    def stage(script, *words):
        line = [script, "demo", *map(str, words), "--work-dir", str(work), "--data-root", str(data)]
        print("\n$ python", *line, flush=True)
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True)

    def run(sampler, seed):
        """Share of a run's videos that the network recognises: (of all classes, of the order pair, number of videos)."""
        cluster, words = SAMPLERS[sampler]
        if cluster:
            prototypes = f"{cluster}-seed{seed}"  # the seed is part of a folder's identity, so each has its own
            stage("02_kmeans_prototypes.py", IPC, "--cluster", cluster, "--seed", seed, "--name", prototypes)
            words += ("--prototypes", prototypes)
        name = f"{sampler}-seed{seed}"  # not the stage's own folder, which holds 4 draws
        stage("03_guided_sample.py", IPC, *words, "--draws", DRAWS, "--seed", seed, "--name", name)
        stage("05_train_eval.py", IPC, "--train-on", work / "demo" / "03_samples" / f"ipc{IPC}" / name, "--score")
        folder = work / "demo" / "05_results" / f"ipc{IPC}" / f"{name}-samples"
        score = json.loads((folder / "score__minic3d__demo.json").read_text())
        return score["top1"], statistics.fmean(score["per_class"][c] for c in PAIR), score["videos"]

    def summary(values):
        return [f"{statistics.fmean(values):.2f}", f"{statistics.stdev(values):.2f}", " ".join(f"{v:.2f}" for v in values)]

    stage("01_encode_latents.py")
    stage("05_train_eval.py", "--train-on", "full", "--save", "--repeats", 1)
    rows = []
    for sampler in SAMPLERS:
        rates, pair, videos = zip(*(run(sampler, seed) for seed in SEEDS), strict=True)
        rows.append([sampler, videos[0], *summary(rates), *summary(pair)])
        common.write_csv(work / "demo" / "samplers.csv", COLUMNS, rows)
    print((work / "demo" / "samplers.csv").read_text())


if __name__ == "__main__":
    main()
