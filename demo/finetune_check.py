"""Does fine-tuning (eq. 3) teach the demo's model what it does not know? Recognition of naive samples before and after.

The shipped model was trained on one sentence per class. Here it is given the bare class names instead ("kick", "sit
down"), words that its U-Net has never been steered by, as a real base model meets a data set's labels for the first time.
A network trained on all real demo clips (stage 05) scores videos that are sampled from those prompts alone, without
prototypes, from the shipped U-Net and from one fine-tuned on the training clips under the same prompts.

Reads:   the demo's videos (demo/draw_videos.py), demo/models/t2v
Writes:  work/demo/class_names.json, 03_unet/class_names/, 03_samples/ipc<K>/names_{before,after}/
Run:     python demo/finetune_check.py [--work-dir work] [--data-root data] [--ipc 5] [--steps 300]
Cost:    by estimate 8 minutes on two CPU cores, and 17 for the scoring network where it is not there yet
Expect:  not run yet: two lines of stage 05, the second, if it works, with the higher share of recognised videos
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


def run(script, *words):
    """Runs a script of the project and shows its command; its failure ends this one."""
    words = [script, "demo", *map(str, words)]
    print("$ python", *words, flush=True)
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work", help="artifacts go to WORK_DIR/demo (work)")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder that holds demo/ (data)")
    parser.add_argument("--ipc", type=int, default=5, help="prototypes per class; 2 videos are sampled for each (5)")
    parser.add_argument("--steps", type=int, help="of the fine-tuning (its own default)")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    shared = ["--work-dir", work, "--data-root", args.data_root.resolve()]

    names = {c: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", c).lower() for c in common.DEMO_CLASSES}
    prompts = work / "demo" / "class_names.json"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text(json.dumps(names, indent=1) + "\n")
    naive = ["--guidance", 0, "--draws", 2, "--prompt-file", prompts]
    unet = work / "demo" / "03_unet" / "class_names"

    run("01_encode_latents.py", *shared)
    run("02_kmeans_prototypes.py", args.ipc, *shared)
    run("05_train_eval.py", "--train-on", "full", "--save", "--repeats", 1, *shared)
    run("03_guided_sample.py", args.ipc, "--name", "names_before", *naive, *shared)
    steps = ["--steps", args.steps] if args.steps else []
    run("tools/finetune_unet.py", "--name", "class_names", "--prompt-file", prompts, *steps, *shared)
    run("03_guided_sample.py", args.ipc, "--name", "names_after", "--unet", unet, *naive, *shared)
    for name in ("names_before", "names_after"):
        samples = work / "demo" / "03_samples" / f"ipc{args.ipc}" / name
        run("05_train_eval.py", args.ipc, "--train-on", samples, "--score", *shared)


if __name__ == "__main__":
    main()
