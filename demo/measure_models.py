"""Measures the demo's world and models: are the videos hard enough, is the model good enough, does it copy.

Reads:   what the stages leave below work/demo: 01 to 03, the networks of 05 (it runs the stages that are missing)
Writes:  work/demo/measured.json
Run:     python demo/measure_models.py
Cost:    by estimate 30 minutes on two CPU cores, most of it for the network that is trained on all real clips
Expect:  results/demo_models/measured.json, for the shipped models
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

IPC = 5  # the set whose videos are measured: 160 generated ones
PAIR = ("SitDown", "StandUp")  # the same poses in opposite order
PAIR_EPOCHS = 30  # enough for the network that sees the frames in order


def run(args, script, *words):
    """Runs a stage on the demo, which does only what is missing."""
    model = ["--model", args.model] if args.model and script[:2] in ("01", "03") else []
    paths = ["--work-dir", args.work_dir, "--data-root", args.data_root]
    line = [script, "demo", *map(str, words), *map(str, paths), *map(str, model)]
    print("\n$ python", *line, flush=True)
    subprocess.run([sys.executable, *line], cwd=ROOT, check=True)


def autoencoder_psnr(args):
    """Peak signal-to-noise ratio in dB of the test clips through the VAE, at generator size: the mean over clips."""
    vae = common.load_part(common.model_folder(args, ("vae",)) / "vae", "vae", torch.device("cpu"), torch.float32)
    spec, values = common.DATASETS["demo"], []
    for label, name, split, _ in tqdm(common.list_clips("demo", args.data_root), desc="VAE", mininterval=1):
        if split == "test":
            video = common.read_video(args.data_root / spec["videos"] / label / f"{name}.avi")
            frames = common.resize_frames(video[common.uniform_frames(len(video))], spec["size"])
            x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            values.append(10 * np.log10(4 / (y - x).square().mean().item()))
    return {"clips": len(values), "mean": round(float(np.mean(values)), 2), "least": round(min(values), 2)}


def nearest(videos, training):
    """Root mean squared difference, in grey levels of 0 to 255, of each video to the training clip nearest to it.

    videos: uint8 [n, 16, S, S, 3]. training: float32 [m, d], the training clips, plain and mirrored.
    """
    flat = torch.from_numpy(videos).flatten(1).float()
    squared = flat.square().sum(1, keepdim=True) - 2 * flat @ training.T + training.square().sum(1)
    values = (squared.clamp(min=0).amin(1) / flat.shape[1]).sqrt().numpy()
    return {"videos": len(values)} | {k: round(float(np.quantile(values, q)), 2) for k, q in QUANTILES.items()}


QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95}


def distances(args, samples):
    """Distances to the nearest training clip of the test clips and of the generated videos of each set."""
    clips, classes = args.work_dir / "demo" / "01_clips", common.DATASETS["demo"]["classes"]

    def real(split):
        return np.concatenate([np.load(clips / split / f"{c}.npy", allow_pickle=False)[:, 0] for c in classes])

    training = torch.from_numpy(real("train"))
    training = torch.cat([training, training.flip(-2)]).flatten(1).float()
    found = {"test clips": nearest(real("test"), training)}
    for name in samples:
        folder = args.work_dir / "demo" / "03_samples" / f"ipc{IPC}" / name
        paths = sorted(path.relative_to(folder) for path in folder.glob("*/*.mp4"))
        found[f"{name} samples"] = nearest(common.network_clips(folder, paths, "demo"), training)
    return found


def result(args, *parts):
    """A result.json of stage 05."""
    return json.loads((args.work_dir / "demo" / "05_results").joinpath(*parts).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds demo/ (data)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="folder of the artifacts (work)")
    parser.add_argument("--model", type=Path, help="folder of the text-to-video model (demo/models/t2v)")
    args = parser.parse_args()
    for name in ("data_root", "work_dir", "model"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    args.dataset, args.dry_run = "demo", False

    run(args, "01_encode_latents.py")
    run(args, "02_kmeans_prototypes.py", IPC)
    run(args, "03_guided_sample.py", IPC)
    run(args, "03_guided_sample.py", IPC, "--sampler", "naive")
    run(args, "05_train_eval.py", "--train-on", "full", "--save", "--repeats", 1)
    scores = {}
    for name in ("naive", "gvd"):
        folder = args.work_dir / "demo" / "03_samples" / f"ipc{IPC}" / name
        run(args, "05_train_eval.py", IPC, "--train-on", folder, "--score")
        scores[name] = result(args, f"ipc{IPC}", f"{name}-samples", "score__minic3d__demo.json")
    pair = {}
    for frames in ("in-order", "shuffled", "one"):
        words = ("--train-on", "full", "--classes", ",".join(PAIR), "--name", f"pair-{frames}", "--repeats", 1)
        run(args, "05_train_eval.py", *words, "--epochs", PAIR_EPOCHS, "--frames", frames)
        pair[frames] = result(args, "full", f"pair-{frames}", "minic3d__hard__demo", "result.json")["top1"]

    full = result(args, "full", "full", "minic3d__hard__demo", "result.json")
    measured = {
        "full data, top-1 %": full["top1"],
        "order pair, top-1 % by the frames seen": pair,
        "autoencoder on test clips, dB": autoencoder_psnr(args),
        "samples recognised, %": {
            name: {
                "videos": score["videos"],
                "all classes": score["top1"],
                "order pair": round(sum(score["per_class"][c] for c in PAIR) / 2, 2),
                "per class": score["per_class"],
            }
            for name, score in scores.items()
        },
        "distance to the nearest training clip, grey levels": distances(args, scores),
    }
    contract.write_json(args.work_dir / "demo" / "measured.json", measured)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
