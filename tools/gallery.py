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
import json
import sys
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

SECONDS = {"demo": 0.2}  # per prototype, on two CPU cores; any other data set on an A100, by estimate:
SECONDS_FULL = 2
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 14px sans-serif; margin: 1em; }}
nav {{ position: sticky; top: 0; background: white; padding: .5em 0; z-index: 1; }}
section h2 {{ margin: .8em 0 .2em; }}
figure {{ display: inline-block; margin: 2px 6px 6px 0; vertical-align: top; width: {width}px; }}
video {{ width: 100%; display: block; background: #ddd; aspect-ratio: {ratio}; object-fit: contain; }}
figcaption {{ font-size: 11px; overflow-wrap: anywhere; }}
.bar {{ display: flex; align-items: center; height: 18px; white-space: nowrap; }}
.bar b {{ flex: 0 0 16em; font-weight: normal; }}
.bar i {{ flex: none; background: #48a; height: 12px; margin-right: 6px; }}
.bar em {{ font-style: normal; overflow: hidden; text-overflow: ellipsis; }}
[hidden] {{ display: none; }}
</style>
<h1>{title}</h1>
<div id="results"><p>top-1 %, MiniC3D: mean ± standard deviation (networks)</p>
{bars}</div>
<nav><label>class <select id="class"><option value="">all</option>{classes}</select></label>
<label>method <select id="method"><option value="">all</option>{methods}</select></label></nav>
{sections}
<script>
const figures = [...document.querySelectorAll("figure")];
const seen = new IntersectionObserver(entries => entries.forEach(e => {{
  if (e.isIntersecting) e.target.play().catch(() => {{}}); else e.target.pause();
}}));
figures.forEach(f => {{
  const video = f.querySelector("video"), line = f.querySelector("span");
  seen.observe(video);
  if (line) video.addEventListener("timeupdate", () => {{
    const sources = JSON.parse(video.dataset.sources);
    line.textContent = sources[Math.min(sources.length - 1, Math.floor(video.currentTime * {rate} + 1e-3))];
  }});
}});
function filter() {{
  const label = document.getElementById("class").value, method = document.getElementById("method").value;
  document.querySelectorAll("section").forEach(s => s.hidden = label && s.dataset.class !== label);
  figures.forEach(f => f.hidden = method && f.dataset.method !== method);
}}
["class", "method"].forEach(id => document.getElementById(id).addEventListener("change", filter));
</script></html>
"""
RATE = 8  # frames per second of the stages' .mp4


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    parser.add_argument("--sets", default="naive,knoise,gvd", help="of stages 03 and 04 (naive,knoise,gvd)")
    return contract.parse(parser)


def figure(path, method, caption, sources=None):
    """A video with its caption. sources: of each of its frames."""
    data, line = "", ""
    if sources:
        data, line = f' data-sources="{html.escape(json.dumps(sources))}"', "<br><span></span>"
    video = (
        f'<video src="{urllib.parse.quote(path)}" muted loop playsinline preload="metadata"{data}></video>'
    )
    caption = f"<figcaption>{html.escape(caption)}{line}</figcaption>"
    return f'<figure data-method="{html.escape(method)}">{video}{caption}</figure>'


def bars(args):
    """The results at this IPC and of all clips, as bars."""
    path, lines = args.work_dir / args.dataset / "tables/results.csv", []
    for row in contract.read(path) if path.exists() else []:
        if row["net"] == "minic3d" and row["ipc"] in ("", str(args.ipc)):
            name = row["set"] + ", soft labels" * (row["labels"] == "soft")
            spread = f" ± {float(row['std']):.1f}" if row["std"] else ""
            marks = "; ".join(text for text in (row["note"], row["making"]) if text)
            text = f"{float(row['top1']):.1f}{spread} ({row['n']}) {marks}"
            width = f"{3 * float(row['top1']):.0f}px"
            bar = f'<b>{html.escape(name)}</b><i style="width:{width}"></i><em>{html.escape(text)}</em>'
            lines.append((float(row["top1"]), f'<div class="bar" title="{html.escape(text)}">{bar}</div>'))
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
        members = [{} for _ in range(args.ipc)]
        for row in prototypes.load(f"{label}.csv"):
            members[int(row["prototype"])][row["name"]] = float(row["distance"])
        nearest[label] = [min(of_k, key=of_k.get) for of_k in members]
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
    """{(folder, method): {file: the source of each frame, None if not composed}} of the sets."""
    found = {}
    for name in args.sets.split(","):
        for step, kind in (("03_samples", "generated"), ("04_distilled", "composed")):
            place = f"{step}/ipc{args.ipc}/{name}"
            folder = args.work_dir / args.dataset / place
            record = contract.read(folder / "manifest.json") or {"complete": False}
            if record["complete"]:
                files = dict.fromkeys(sorted(n for n in record["outputs"] if n.endswith(".mp4")))
                for row in (
                    contract.read(folder / "metadata.csv") if "metadata.csv" in record["outputs"] else ()
                ):
                    parts = zip(row["sources"].split(), row["frames"].split(), strict=True)
                    sources = [f"{sample}, frame {f}" for sample, frames in parts for f in frames.split("-")]
                    files[row["file_name"]] = sources
                found[place, f"{name}, {kind}"] = files
    return found


def options(names):
    return "".join(f"<option>{html.escape(name)}</option>" for name in names)


def main(args):
    base, sections, nearest = args.work_dir / args.dataset, [], decode_prototypes(args)
    if args.dry_run:
        return
    made, place = find_videos(args), f"gallery/ipc{args.ipc}"
    for label in args.classes:
        shown, title = [], html.escape(label)
        for k, name in enumerate(nearest[label]):
            shown.append(figure(f"{place}/real/{label}/{k}.mp4", "real", f"real: {name}"))
            text = f"prototype {k}, nearest to {name}"
            shown.append(figure(f"{place}/prototype/{label}/{k}.mp4", "prototype", text))
        for (folder, method), files in made.items():
            for file in (file for file in files if file.startswith(f"{label}/")):
                text = f"{method}: {Path(file).stem}"
                shown.append(figure(f"{folder}/{file}", method, text, files[file]))
        videos = "\n".join(shown)
        sections.append(f'<section data-class="{title}"><h2>{title}</h2>\n{videos}</section>')
    values = {"title": f"{args.dataset}, IPC {args.ipc}", "bars": bars(args), "rate": RATE}
    methods = ["real", "prototype", *(method for _, method in made)]
    values |= {"classes": options(args.classes), "methods": options(methods), "sections": "\n".join(sections)}
    width, height = args.spec["size"]
    values |= {"width": 96 if width < 96 else 224, "ratio": f"{width} / {height}"}
    contract.save(base / "gallery.html", PAGE.format(**values).encode())
    contract.say(base / "gallery.html")


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
