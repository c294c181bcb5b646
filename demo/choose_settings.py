"""Compares settings on the demo's validation split, to choose the demo's defaults without its test clips.

The validation split is made of training groups (demo/draw_videos.py --validation): prototypes, networks and `random` use
groups 13 to 25, accuracies are those on groups 8 to 12.

Reads:   the model: demo/models/t2v
Writes:  work/validation/demo/..., as the stages do; settings.csv there, of which results/demo_models has a copy
Run:     python demo/choose_settings.py
Cost:    about 40 minutes on two CPU cores; a killed run goes on
Expect:  see README. The learning rate of 05's protocol `demo` was chosen on the same split, on random real clips:
         results/demo_models/validation_rate_*.json, by 05 --rate
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

IPC = 10
SETTINGS = (  # EDIT HERE: the set, and its options of stages 03 (each with a name of its own) and 04
    ("random", "", ""),
    ("cfg2", "--cfg 2", ""),
    ("cfg4", "--cfg 4", ""),
)
COLUMNS = ("set", "options", "top1_mean", "top1_std", "top1_values")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data/validation"), help="(data/validation)")
    parser.add_argument("--work-dir", type=Path, default=Path("work/validation"), help="(work/validation)")
    parser.add_argument("--repeats", type=int, default=3, help="networks trained for each setting (3)")
    args = parser.parse_args()
    data, work = args.data_root.resolve(), args.work_dir.resolve()

    def run(script, *words):
        print("\n$ python", script, *words, flush=True)
        subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, check=True)

    def stage(script, *words):
        run(script, "demo", *words, "--work-dir", work, "--data-root", data)

    def top1(name, of_03, of_04):
        of_03, of_04 = of_03.split(), of_04.split()
        if name != "random":
            stage("03_guided_sample.py", IPC, "--name", name, *of_03)
            stage("04_mvic_compose.py", IPC, "--samples", name, *of_04)
            name = "-".join([name, *of_04[1::2]])  # as stage 04 names it
        stage("05_train_eval.py", IPC, "--train-on", name, "--repeats", args.repeats)
        path = work / "demo" / "05_results" / f"ipc{IPC}" / name / "minic3d__hard__demo" / "result.json"
        return json.loads(path.read_text())["top1"]

    run("demo/draw_videos.py", "--data-root", data, "--validation")
    stage("01_encode_latents.py")
    stage("02_kmeans_prototypes.py", IPC)
    rows = []
    for setting in SETTINGS:
        found = top1(*setting)
        options = " ".join(words for words in setting[1:] if words)
        values = " ".join(f"{v:.2f}" for v in found["values"])
        spread = "" if found["std"] is None else f"{found['std']:.2f}"  # of one network
        rows.append([setting[0], options, f"{found['mean']:.2f}", spread, values])
        common.write_csv(work / "demo" / "settings.csv", COLUMNS, rows)
    print((work / "demo" / "settings.csv").read_text())


if __name__ == "__main__":
    main()
