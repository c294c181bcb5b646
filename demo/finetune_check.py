"""Does fine-tuning (eq. 3) teach the demo's model what it does not know? Recognition of naive samples before and after.

The shipped model was trained on one sentence per class. Here it is given other captions ("a video of a person who
kicks"), which its U-Net has never been steered by, as a real base model meets a data set's prompts for the first time.
A network trained on all real demo clips (stage 05) scores videos that are sampled from the captions alone, without
prototypes, from the shipped U-Net and from one fine-tuned on the training clips under the same captions. Both start from
the same noise. Bare class names would not do: the demo's text encoder, which fine-tuning leaves as it is, tells "kick"
from "punch" by a hundredth of an embedding's norm, these captions by a third and more.

Reads:   the demo's videos (demo/draw_videos.py), demo/models/t2v
Writes:  work/demo/captions.json, 03_unet/captions/, 03_samples/ipc<K>/captions_{before,after}/, finetune.json
Run:     python demo/finetune_check.py
Cost:    10 minutes on two CPU cores, and 14 for the scoring network where it is not there yet; a killed run
         goes on
Expect:  a higher share of recognised videos after: the README's table, from results/demo_models/finetune.json
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import contract  # noqa: E402

DRAWS = 2  # the number of videos per class is this times the IPC
ACTIONS = {
    "Cartwheel": "turns a cartwheel",
    "JumpingJack": "does jumping jacks",
    "Kick": "kicks",
    "Punch": "punches",
    "SitDown": "sits down",
    "StandUp": "stands up",
    "Walk": "walks",
    "Wave": "waves",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="artifacts go to WORK_DIR/demo (work)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds demo/ (data)")
    parser.add_argument("--ipc", type=contract.positive, default=5, help="2 IPC videos per class are sampled (5)")
    parser.add_argument("--steps", type=contract.positive, help="of the fine-tuning (its own default)")
    args = parser.parse_args()
    data, demo = args.data_root.resolve(), args.work_dir.resolve() / "demo"
    commands = []

    def run(script, *words):
        line = [script, "demo", *map(str, words)]
        commands.append(shlex.join(["python", *line]).replace(f"{demo}/", "work/demo/"))
        line += ["--work-dir", str(demo.parent), "--data-root", str(data)]
        print("\n$ python", *line, flush=True)
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True)

    def recognised(name, *words):
        """Samples from the captions alone; the share of the videos that the network recognises."""
        words = ("--sampler", "naive", "--draws", DRAWS, "--prompt-file", prompts, *words)
        run("03_guided_sample.py", args.ipc, "--name", name, *words)
        run("05_train_eval.py", args.ipc, "--train-on", demo / "03_samples" / f"ipc{args.ipc}" / name, "--score")
        folder = demo / "05_results" / f"ipc{args.ipc}" / f"{name}-samples"
        score = json.loads((folder / "score__minic3d__demo.json").read_text())
        return {"videos": score["videos"], "all classes": score["top1"], "per class": score["per_class"]}

    captions = {c: f"a video of a person who {action}" for c, action in ACTIONS.items()}
    prompts, unet = demo / "captions.json", demo / "03_unet" / "captions"
    contract.write_json(prompts, captions)

    run("01_encode_latents.py")
    run("05_train_eval.py", "--train-on", "full", "--save", "--repeats", 1)
    before = recognised("captions_before")
    steps = ("--steps", args.steps) if args.steps else ()
    run("tools/finetune_unet.py", "--name", "captions", "--prompt-file", prompts, *steps)
    after = recognised("captions_after", "--unet", unet)
    parameters = json.loads((unet / "identity.json").read_text())["parameters"]
    result = {
        "prompts": captions,
        "commands": commands,
        "fine-tuning": {name: parameters[name] for name in ("steps", "batch", "rate")},
        "samples recognised, %": {"before": before, "after": after},
    }
    contract.write_json(demo / "finetune.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
