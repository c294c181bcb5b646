"""A page to look at the videos of an IPC in a browser: real, prototypes, generated, composed; results on top.

It opens from disk and links .mp4 files relative to itself. Per class: of each prototype the real clip nearest
to it and the prototype decoded, then the generated videos and the composed ones, which say while they play
from which video and frame each of theirs is. Videos play while they are on the screen. It can be filtered.

Reads:   work/<data set>/01_clips, 02_prototypes/ipc<K>/direct, 03_samples/ipc<K>, 04_distilled/ipc<K>; a VAE
         tables/results.csv of tools/tables.py, for the bars
Writes:  work/<data set>/gallery.html; gallery/ipc<K>/{real,prototype}/<class>/<k>.mp4
Run:     python tools/gallery.py demo 5
         python tools/gallery.py demo 5 --sets gvd,gvd-no-decay
Cost:    demo: 15 s on two CPU cores. hmdb51 IPC 5, by estimate: 10 min on an A100
Expect:  open work/demo/gallery.html
"""

import html
import itertools
import json
import string
import sys
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

SECONDS = {"demo": 0.2}  # per prototype, on two CPU cores; any other data set on an A100, by estimate:
SECONDS_FULL = 2
STEPS = {"03_samples": "generated", "04_distilled": "composed"}
RATE = 8  # frames per second of the stages' .mp4


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    parser.add_argument("--sets", default="naive,knoise,gvd", help="of stages 03 and 04 (naive,knoise,gvd)")
    return contract.parse(parser)


def figure(path, method, caption, sources=()):
    """A video with its caption. sources: of each of its frames."""
    data, line = "", ""
    if sources:
        data, line = f' data-sources="{html.escape(json.dumps(sources))}"', "<br><span></span>"
    words = f'src="{urllib.parse.quote(path)}" muted loop playsinline preload="metadata"{data}'
    caption = f"<figcaption>{html.escape(caption)}{line}</figcaption>"
    return f'<figure data-method="{html.escape(method)}"><video {words}></video>{caption}</figure>'


def bars(args):
    """The results at this IPC and of all clips, as bars."""
    path, lines = args.work_dir / args.dataset / "tables/results.csv", []
    for row in contract.read(path) if path.exists() else []:
        if row["net"] == "minic3d" and row["ipc"] in ("", str(args.ipc)):
            top1, std = float(row["top1"]), float(row["std"]) if row["std"] else None
            marks = "; ".join(filter(None, (row["note"], row["making"])))
            text = html.escape(f"{tables.accuracy(top1, std, row['n'])} {marks}")
            bar = f'<b>{html.escape(tables.row_name(row))}</b><i style="width:{3 * top1:.0f}px"></i>'
            lines.append((top1, f'<div class="bar" title="{text}">{bar}<em>{text}</em></div>'))
    return "\n".join(line for _, line in sorted(lines, reverse=True)) or "<p>no results yet</p>"


def estimate(args):
    count, demo = args.ipc * len(args.classes), args.dataset == "demo"
    seconds, machine = SECONDS.get(args.dataset, SECONDS_FULL), "two CPU cores" if demo else "an A100"
    return {"gallery": ("prototypes", count, seconds * count, 5e5 * count, machine)}


def decode_prototypes(args):
    """Makes the .mp4 files of real clips and prototypes; {class: the real clip nearest to each prototype}."""
    fix = f"bash run_all.sh {args.dataset} {args.ipc}"
    clips = contract.Input(args, "01_clips", fix)
    prototypes = contract.Input(args, f"02_prototypes/ipc{args.ipc}/direct", fix)
    files = [f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv")]
    inputs = {f"02 {name}": digest for name, digest in prototypes.check(files).items()}
    inputs |= {f"01 {n}": digest for n, digest in clips.check(f"train/{name}" for name in files).items()}
    vae_folder, nearest = common.model_folder(args, ("vae",)) / "vae", {}
    inputs["vae"] = common.folder_hash(vae_folder)

    def made(label):
        return [f"{kind}/{label}/{k}.mp4" for kind in ("real", "prototype") for k in range(args.ipc)]

    wanted, parameters = [name for c in args.classes for name in made(c)], {"device": args.device}
    output = contract.Output(args, f"gallery/ipc{args.ipc}", parameters, inputs, wanted)
    vae = common.load_part(vae_folder, "vae", output.device, torch.float32) if output.todo else None
    for label in args.classes:
        rows = prototypes.load(f"{label}.csv")
        members = ([row for row in rows if int(row["prototype"]) == k] for k in range(args.ipc))
        nearest[label] = [min(of_k, key=lambda row: float(row["distance"]))["name"] for of_k in members]
    for label in output.mine(args.classes, made):
        names = [row["name"] for row in clips.load(f"train/{label}.csv")]
        latents, real = prototypes.load(f"{label}.npy"), clips.load(f"train/{label}.npy")
        for k, name in enumerate(nearest[label]):
            z = torch.from_numpy(np.array(latents[k])).to(output.device)
            media.write_mp4(output.folder / f"prototype/{label}/{k}.mp4", common.decode(vae, z), RATE)
            media.write_mp4(output.folder / f"real/{label}/{k}.mp4", real[names.index(name), 0], RATE)
    output.finish()
    return nearest


def find_videos(args):
    """Of the sets: each file below the data set's folder, its class, its method, its frames' sources."""
    for name, step in itertools.product(args.sets.split(","), STEPS):
        place = f"{step}/ipc{args.ipc}/{name}"
        folder = args.work_dir / args.dataset / place
        record = contract.read(folder / "manifest.json")
        if not record or not record["complete"]:
            continue
        sources = {}
        if "metadata.csv" in record["outputs"]:
            for row in contract.read(folder / "metadata.csv"):
                parts = zip(row["sources"].split(), row["frames"].split(), strict=True)
                frames = [f"{sample}, frame {f}" for sample, chosen in parts for f in chosen.split("-")]
                sources[row["file_name"]] = frames
        for file in sorted(file for file in record["outputs"] if file.endswith(".mp4")):
            yield f"{place}/{file}", Path(file).parent.name, f"{name}, {STEPS[step]}", sources.get(file)


def options(names):
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)


def main(args):
    nearest = decode_prototypes(args)
    if args.dry_run:
        return
    found, place, sections = [*find_videos(args)], f"gallery/ipc{args.ipc}", []
    for label in args.classes:
        shown, title = [], html.escape(label)
        for k, name in enumerate(nearest[label]):
            shown.append(figure(f"{place}/real/{label}/{k}.mp4", "real", f"real: {name}"))
            text = f"prototype {k}, nearest to {name}"
            shown.append(figure(f"{place}/prototype/{label}/{k}.mp4", "prototype", text))
        for file, _, method, sources in (video for video in found if video[1] == label):
            shown.append(figure(file, method, f"{method}: {Path(file).stem}", sources))
        videos = "\n".join(shown)
        sections.append(f'<section data-class="{title}"><h2>{title}</h2>\n{videos}</section>')
    width, height = args.spec["size"]
    page = string.Template((contract.ROOT / "tools/gallery.html").read_text("utf-8")).substitute(
        title=f"{args.dataset}, IPC {args.ipc}",
        bars=bars(args),
        classes=options(args.classes),
        methods=options(dict.fromkeys(["real", "prototype", *(method for _, _, method, _ in found)])),
        sections="\n".join(sections),
        rate=RATE,
        width=96 if width < 96 else 224,
        ratio=f"{width} / {height}",
    )
    path = args.work_dir / args.dataset / "gallery.html"
    contract.save(path, page.encode())
    contract.say(path)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
