"""Draws the demo's contact sheet: per class a real clip, its decoded prototype, a generated video and a composed one.

Reads:   work/demo/01_clips, 01_latents, 02_prototypes, 03_samples, 04_distilled; the VAE of the demo model
Writes:  work/demo/contact_sheet.png
Run:     python demo/contact_sheet.py 5
Cost:    10 s on two CPU cores
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import contract  # noqa: E402

FRAMES = (0, 2, 4, 6, 8, 10, 12, 14)  # shown of the 16


def decoded(vae, latents):
    """Latents [16, 4, h, w] -> frames uint8 [16, H, W, 3]."""
    with torch.inference_mode():
        frames = vae.decode(torch.from_numpy(np.array(latents, np.float32)) / vae.config.scaling_factor).sample
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def rows_of(label, work, ipc, vae):
    """[(title, frames uint8 [16, h, w, 3])] of a class: the member nearest to prototype 0, and what came of that one."""
    members = common.read_csv(work / "02_prototypes" / f"ipc{ipc}" / "direct" / f"{label}.csv")
    name = min((float(m["distance"]), m["name"]) for m in members if m["prototype"] == "0")[1]
    rows = common.read_csv(work / "01_clips" / "index.csv")
    row = next(int(r["row"]) for r in rows if r["class"] == label and r["name"] == name)
    real = np.load(work / "01_clips" / "train" / f"{label}.npy", mmap_mode="r", allow_pickle=False)[row, 0]
    prototype = np.load(work / "02_prototypes" / f"ipc{ipc}" / "direct" / f"{label}.npy", allow_pickle=False)[0]
    composed = common.read_csv(work / "04_distilled" / f"ipc{ipc}" / "gvd" / "metadata.csv")
    with_it = [r["file_name"] for r in composed if r["label"] == label and "0_0" in r["sources"].split()]
    return [
        ("real", real),
        ("prototype", decoded(vae, prototype)),
        ("generated", common.read_video(work / "03_samples" / f"ipc{ipc}" / "gvd" / label / "0_0.mp4")),
        ("composed", common.read_video(work / "04_distilled" / f"ipc{ipc}" / "gvd" / with_it[0])),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ipc", type=int, help="videos per class of the run")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="folder of the artifacts (work)")
    parser.add_argument("--model", help="folder of the text-to-video model (demo/models/t2v)")
    args = parser.parse_args()
    args.dataset, args.dry_run = "demo", False
    work = args.work_dir / "demo"
    ipc = f"ipc{args.ipc}"
    folders = ("01_clips", f"02_prototypes/{ipc}/direct", f"03_samples/{ipc}/gvd", f"04_distilled/{ipc}/gvd")
    for folder in folders:
        if not (work / folder / "manifest.json").exists():
            raise contract.ContractError(f"{work / folder} is not complete\n  run: bash run_all.sh demo {args.ipc}")
    sources = [work / part / "manifest.json" for part in folders]
    made_of = contract.digest([path.read_text() for path in (*sources, Path(__file__))])
    sheet = work / "contact_sheet.png"
    if sheet.exists() and made_of.encode() in sheet.read_bytes():
        print(f"contact sheet fresh: {sheet}")
        return

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    vae = common.load_part(common.model_folder(args, ("vae",)) / "vae", "vae", torch.device("cpu"), torch.float32)
    metadata = common.read_csv(work / "04_distilled" / f"ipc{args.ipc}" / "gvd" / "metadata.csv")
    labels = sorted({row["label"] for row in metadata})
    rows = {label: rows_of(label, work, args.ipc, vae) for label in labels}
    figure, axes = plt.subplots(len(labels), 4, figsize=(20, 0.85 * len(labels) + 0.3), squeeze=False)
    for line, label in zip(axes, labels, strict=True):
        for axis, (title, frames) in zip(line, rows[label], strict=True):
            axis.imshow(np.concatenate(frames[list(FRAMES)], axis=1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if label == labels[0]:
                axis.set_title(title)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    with contract.atomic(sheet) as handle:
        figure.savefig(handle, format="png", dpi=80, metadata={"Software": None, "Source": made_of})
    print(f"contact sheet: {sheet}")


if __name__ == "__main__":
    contract.run(main)
