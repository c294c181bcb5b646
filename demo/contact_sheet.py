"""Draws the demo's contact sheet: per class a real clip, its prototype, a generated video and a composed one.

The prototype is the first of its class, decoded by the VAE, and the real clip its nearest member. The
generated video is the first draw of this prototype, and the composed video the one that takes frames from it.

Reads:   work/demo/01_clips, 02_prototypes, 03_samples, 04_distilled; the VAE of the model (demo/models/t2v)
Writes:  work/demo/contact_sheet/ipc<K>/contact_sheet.png
Run:     python demo/contact_sheet.py demo 5
Cost:    10 s on two CPU cores
Expect:  results/demo_ipc5/contact_sheet.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

FRAMES = (0, 2, 4, 6, 8, 10, 12, 14)  # shown of the 16
COLUMNS = ("real", "prototype", "generated", "composed")


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set))


def draw(rows):
    """The sheet as a matplotlib figure. rows: {class: four videos uint8 [16, h, w, 3]}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 4, figsize=(20, 0.85 * len(rows) + 0.3), squeeze=False)
    for line, (label, videos) in zip(axes, rows.items(), strict=True):
        for axis, video in zip(line, videos, strict=True):
            axis.imshow(np.concatenate(video[list(FRAMES)], axis=1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title)
    figure.tight_layout(pad=0.3)
    return figure


def estimate(args):
    return {"contact_sheet": ("sheets", 1, 10, 3e5, "two CPU cores")}


def main(args):
    ipc, fix = f"ipc{args.ipc}", f"bash run_all.sh demo {args.ipc}"
    folders = ("01_clips", f"02_prototypes/{ipc}/direct", f"03_samples/{ipc}/gvd", f"04_distilled/{ipc}/gvd")
    clips, prototypes, samples, distilled = (contract.Input(args, folder, fix) for folder in folders)
    composed = {c: f"{c}/0.mp4" for c in args.classes}
    for row in distilled.load("metadata.csv"):  # the video that takes frames from draw 0 of prototype 0
        composed |= {row["label"]: row["file_name"]} if "0_0" in row["sources"].split() else {}
    files = [
        [f"train/{c}.{kind}" for c in args.classes for kind in ("npy", "csv")],
        [f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv")],
        [f"{c}/0_0.mp4" for c in args.classes],
        ["metadata.csv", *(composed[c] for c in args.classes)],
    ]
    sources = zip(folders, (clips, prototypes, samples, distilled), files, strict=True)
    inputs = {folder: contract.digest(source.check(names)) for folder, source, names in sources}
    vae_folder = common.model_folder(args, ("vae",)) / "vae"
    inputs["vae"] = common.folder_hash(vae_folder)
    parameters, wanted = {"classes": args.classes}, ["contact_sheet.png"]
    output = contract.Output(args, f"contact_sheet/{ipc}", parameters, inputs, wanted)
    if not output.todo:
        return
    vae, rows = common.load_part(vae_folder, "vae", torch.device("cpu"), torch.float32), {}
    for label in args.classes:
        members = [row for row in prototypes.load(f"{label}.csv") if row["prototype"] == "0"]
        name = min((float(row["distance"]), row["name"]) for row in members)[1]
        index = [row["name"] for row in clips.load(f"train/{label}.csv")].index(name)
        real = clips.load(f"train/{label}.npy")[index, 0]  # uint8 [16, S, S, 3]
        latents = torch.from_numpy(np.array(prototypes.load(f"{label}.npy")[0]))  # float32 [16, 4, h, w]
        paths = (samples.folder / label / "0_0.mp4", distilled.folder / composed[label])
        rows[label] = [real, common.decode(vae, latents), *(media.read_video(path) for path in paths)]
    with contract.atomic(output.folder / wanted[0]) as handle:
        draw(rows).savefig(handle, format="png", dpi=80, metadata={"Software": None})
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
