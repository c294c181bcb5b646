"""Compares settings on the demo's validation split, to choose the demo's defaults without its test clips.

First the learning rate of stage 05's protocol `demo`, on random real clips and on stage 03's first setting, then the
settings of stage 03.

The validation split is made of training groups (demo/draw_videos.py --validation): prototypes, networks and `random` use
groups 13 to 25, accuracies are those on groups 8 to 12.

Reads:   the model: demo/models/t2v
Writes:  work/validation/demo/..., as the stages do; results/demo_models/settings.csv is a copy; of the
         rates, random real clips alone were run in full: results/demo_models/validation_rate_*.json
Run:     python demo/choose_settings.py
Cost:    about 7 minutes per setting or rate on two CPU cores; a killed run goes on
Expect:  what is chosen stands in 05_train_eval.py (PROTOCOLS) and 03_guided_sample.py (EDIT HERE)
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

IPC = 5
RATES = (0.01, 0.005)  # EDIT HERE
SETTINGS = (  # EDIT HERE: guidance lambda, stop, DDIM steps, classifier-free guidance
    (0.1, 0.5, 25, 4.0),
    (0.1, 0.5, 25, 7.0),
)
RATE_COLUMNS = ("set", "rate", "top1_mean", "top1_std", "top1_values")
COLUMNS = ("guidance", "stop", "steps", "cfg", "top1_mean", "top1_std", "top1_values")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data/validation"), help="(data/validation)")
    parser.add_argument("--work-dir", type=Path, default=Path("work/validation"), help="(work/validation)")
    parser.add_argument("--repeats", type=int, default=5, help="networks trained for each setting (5)")
    args = parser.parse_args()
    data, work = args.data_root.resolve(), args.work_dir.resolve()

    def run(script, *words):
        print("\n$ python", script, *words, flush=True)
        subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, check=True)

    def stage(script, *words):
        run(script, "demo", *words, "--work-dir", work, "--data-root", data)

    def train_on(name, *words):
        stage("05_train_eval.py", IPC, "--train-on", name, "--repeats", args.repeats, *words)
        name = words[1] if words[:1] == ("--name",) else name
        folder = work / "demo" / "05_results" / f"ipc{IPC}" / name / "minic3d__hard__demo"
        top1 = json.loads((folder / "result.json").read_text())["top1"]
        return [f"{top1['mean']:.2f}", f"{top1['std']:.2f}", " ".join(f"{v:.2f}" for v in top1["values"])]

    def generate(guidance, stop, steps, cfg):
        name = f"lambda{guidance}_stop{stop}_steps{steps}_cfg{cfg}"
        words = ("--guidance", guidance, "--stop", stop, "--steps", steps, "--cfg", cfg, "--name", name)
        stage("03_guided_sample.py", IPC, *words)
        stage("04_mvic_compose.py", IPC, "--samples", name)
        return name

    run("demo/draw_videos.py", "--data-root", data, "--validation")
    stage("01_encode_latents.py")
    stage("02_kmeans_prototypes.py", IPC)
    first, rows = generate(*SETTINGS[0]), []
    for rate in RATES:
        for kind, name in (("random", "random"), ("gvd", first)):
            rows.append([kind, rate, *train_on(name, "--name", f"{name}_r{rate}", "--rate", rate)])
            common.write_csv(work / "demo" / "rates.csv", RATE_COLUMNS, rows)
    rows = [["random", "", "", "", *train_on("random")]]
    for setting in SETTINGS:
        rows.append([*setting, *train_on(generate(*setting))])
        common.write_csv(work / "demo" / "settings.csv", COLUMNS, rows)
    print((work / "demo" / "rates.csv").read_text())
    print((work / "demo" / "settings.csv").read_text())


if __name__ == "__main__":
    main()
