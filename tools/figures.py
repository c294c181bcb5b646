"""The paper's figures as pictures. What is not there yet is said in <figure>.md, and makes no picture.

Fig. 7 to 10 and the cost of sampling are drawn from their tables, the paper's figures in black. Besides:

  fig2   strips of the first class, from the same noise: naive, K-Noise, GVD without and with decay, composed
  fig3   t-SNE of VideoMAE features: real clips grey, a panel for each method's composed videos
  fig5   distance to the prototype, root mean square over a latent: K-Noise by strength, naive and GVD from
         the same noise; of K-Noise the prototype is dummy-video's, of GVD direct's, of naive both
  fig12  a generated video of each class, without composition (Fig. 12 and 13)

Reads:   work/<data set>/tables/<name>.csv of tools/paper_tables.py; features/ipc<K>/ of tools/metrics.py
         02_prototypes, 03_samples (fig5: of 03 --save-latents), 04_distilled at this IPC
Writes:  work/<data set>/tables/fig<N>.png; fig3.csv, fig5.csv and fig5.md; <figure>.md where one is not run
Run:     python tools/figures.py demo 5
Cost:    demo: 20 s on one CPU core. hmdb51: 3 min
Expect:  a .png for each figure
"""

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import tables  # noqa: E402

import media  # noqa: E402

BARS = ("fig7a", "fig7b", "fig7c", "fig7d", "fig8", "fig9", "fig10", "efficiency")
METHODS = ("naive", "knoise", "gvd")
STRENGTHS = {0.3: "knoise-0.3", 0.5: "knoise-0.5", 0.7: "knoise", 0.9: "knoise-0.9", 1.0: "knoise-1"}
SHOWN = range(0, 16, 2)  # frames of a strip


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set))


def canvas(rows=1, columns=1, width=7.0, height=4.0):
    """(figure, axes [rows, columns]) of matplotlib, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False)


# --- from tables ------------------------------------------------------------------------------------------


def draw_bars(args, name):
    """A group of bars for each column of a table, a bar for each row; the paper's figures as marks."""
    folder = args.work_dir / args.dataset / "tables"
    if not (folder / f"{name}.csv").exists():
        raise contract.Missing(f"{folder / name}.csv is missing", fix="python tools/paper_tables.py")
    lines = contract.read(folder / f"{name}.csv")
    if not any(line["value"] for line in lines):
        raise contract.Missing(f"{name}: {lines[0]['note']}")
    cells = {(line["row"], line["column"]): line for line in lines}
    if len({column for _, column in cells}) == 1:  # each row a group of its own
        cells = {(column, row): line for (row, column), line in cells.items()}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    parts = [[row] for row in rows] if name == "efficiency" else [rows]  # of other units: each its own axes
    figure, axes = canvas(1, len(parts), max(6, 1.5 + 0.3 * len(lines) + 0.5 * len(columns)), 4)
    for axis, shown in zip(axes[0], parts, strict=True):
        width = 0.9 / (len(shown) + 0.5)
        for (i, row), (j, column) in itertools.product(enumerate(shown), enumerate(columns)):
            x, line = j + (i + 0.5) / (len(shown) + 0.5), cells[row, column]
            value, std, paper = (float(line[key]) if line[key] else None for key in ("value", "std", "paper"))
            label = row if j == 0 and len(shown) > 1 else None
            axis.bar(x, value or 0, width, yerr=std, capsize=3, color=f"C{i}", label=label)
            if value is None:
                turned = {"rotation": 90, "ha": "center", "va": "bottom"}
                axis.text(x, 0, " not run", fontsize=7, color="grey", **turned)
            if paper:
                axis.plot([x - width / 2, x + width / 2], [paper] * 2, "k-", lw=2)
        turned = {"rotation": 30, "ha": "right"} if len(columns) > 4 else {}
        axis.set_xticks([j + 0.5 for j in range(len(columns))], columns, **turned)
        axis.set(ylabel=shown[0] if len(parts) > 1 else "", ylim=(0, None))
        if len(shown) > 1:
            axis.legend(fontsize=8)
    title = re.match(r"\| (.*?) \|", (folder / f"{name}.md").read_text("utf-8"))[1]
    figure.suptitle(f"{args.dataset}. {title}" + ". Black: the paper" * any(line["paper"] for line in lines))
    return figure


# --- from features, latents and videos --------------------------------------------------------------------


def draw_tsne(args):
    """Fig. 3. All points are embedded together; real ones are grey in each panel."""
    from sklearn.manifold import TSNE

    folder = args.work_dir / args.dataset / f"features/ipc{args.ipc}"
    there = [name for name in ("real", *METHODS) if (folder / f"{name}.npy").exists()]
    if there[:1] != ["real"] or len(there) == 1:
        fix = contract.command(args, "tools/metrics.py")
        raise contract.Missing(f"{folder} lacks the features of real clips or of any method", fix=fix)
    points = [contract.read(folder / f"{name}.npy") for name in there]
    owner = np.repeat(there, [len(p) for p in points])
    near = min(30, (len(owner) - 1) // 3)
    made = contract.read(args.work_dir / args.dataset / f"metrics_ipc{args.ipc}.json")["inputs"]
    place, older = args.work_dir / args.dataset / f"04_distilled/ipc{args.ipc}", {}
    for name in there[1:]:
        now = tables.set_hash(place / name, args.classes)
        older[name] = ", of an older set" * (now not in (None, made.get(f"distilled {name}")))
    placed = TSNE(perplexity=near, init="pca", random_state=args.seed).fit_transform(np.concatenate(points))
    rows = [(name, f"{x:.4f}", f"{y:.4f}") for name, (x, y) in zip(owner, placed.tolist(), strict=True)]
    contract.save(folder.parents[1] / "tables/fig3.csv", [("set", "x", "y"), *rows])
    figure, axes = canvas(1, len(there) - 1, 4.5 * (len(there) - 1), 4.5)
    for i, (axis, name) in enumerate(zip(axes[0], there[1:], strict=True)):
        axis.scatter(*placed[owner == "real"].T, s=6, color="lightgrey", label="real")
        axis.scatter(*placed[owner == name].T, s=18, color=f"C{i}", label=name + older[name])
        axis.set(xticks=[], yticks=[])
        axis.legend(loc="upper right")
    figure.suptitle(f"{args.dataset}, IPC {args.ipc}: t-SNE of VideoMAE features")
    return figure


def checked(args, folder, files):
    """An earlier stage's folder, of which these files are checked."""
    source = contract.Input(args, folder, f"bash run_all.sh {args.dataset} all")
    source.check(files)
    return source


def distances(args, name, cluster):
    """Distance [videos] of the first draws of a set to the prototypes they belong to."""
    names = [(c, k, f"{c}/{k}_0.npy") for c in args.classes for k in range(args.ipc)]
    samples = checked(args, f"03_samples/ipc{args.ipc}/{name}", [file for *_, file in names])
    files = [f"{c}.npy" for c in args.classes]
    prototypes = checked(args, f"02_prototypes/ipc{args.ipc}/{cluster}", files)
    centres = {c: prototypes.load(f"{c}.npy") for c in args.classes}  # [K, 16, 4, h, w]
    away = (np.subtract(samples.load(file), centres[c][k]) for c, k, file in names)
    return np.sqrt([np.square(x, dtype=np.float64).mean() for x in away])


def draw_distances(args):
    """Fig. 5."""
    folder, rows = args.work_dir / args.dataset / "tables", []
    sets = [(name, "dummy-video", f"{s:g}") for s, name in STRENGTHS.items()]
    for key in (*sets, ("naive", "dummy-video", ""), ("naive", "direct", ""), ("gvd", "direct", "")):
        d = distances(args, *key[:2])
        rows.append((*key, f"{d.mean():.6f}", f"{d.std(ddof=1):.6f}", len(d)))
    titles = ("set", "prototypes", "strength", "mean", "std", "n")
    contract.save(folder / "fig5.csv", [titles, *rows])
    text = tables.table(titles, rows) + "\nDistance to the prototype, root mean square over a latent.\n"
    contract.save(folder / "fig5.md", text.encode())
    figure, ((axis,),) = canvas()
    values = np.array([row[2:5] for row in rows if row[2]], float)
    axis.errorbar(*values.T, marker="o", capsize=3, label="knoise to dummy-video")
    for i, (name, cluster, _, mean, *_) in enumerate(row for row in rows if not row[2]):
        axis.axhline(float(mean), color=f"C{i + 1}", ls="--", label=f"{name} to {cluster}")
    axis.set(xlabel="strength of K-Noise", ylabel="distance to the prototype", ylim=(0, None))
    axis.legend()
    axis.set_title(f"{args.dataset}, IPC {args.ipc}")
    return figure


def draw_strips(rows, title):
    """Frames of videos, a row each. rows: {label: uint8 [16, h, w, 3]}."""
    height, width = next(iter(rows.values())).shape[1:3]
    figure, axes = canvas(len(rows), 1, 12, 0.5 + 1.3 * height / width * len(rows))
    for axis, (label, video) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(np.concatenate(video[list(SHOWN)], axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def video(args, folder, file):
    return media.read_video(checked(args, folder, [file]).folder / file)


def draw_methods(args):
    """Fig. 2."""
    names = {"naive": "naive", "K-Noise": "knoise", "GVD without decay": "gvd-no-decay", "GVD": "gvd"}
    label, place = args.classes[0], f"ipc{args.ipc}"
    rows = {t: video(args, f"03_samples/{place}/{name}", f"{label}/0_0.mp4") for t, name in names.items()}
    rows["GVD composed"] = video(args, f"04_distilled/{place}/gvd", f"{label}/0.mp4")
    return draw_strips(rows, f"{args.dataset}, {label}: from the same noise")


def draw_sheet(args):
    """Fig. 12 and 13."""
    rows = {c: video(args, f"03_samples/ipc{args.ipc}/gvd", f"{c}/0_0.mp4") for c in args.classes}
    return draw_strips(rows, f"{args.dataset}: GVD without composition")


def estimate(args):
    return {"figures": ("figures", 12, 20 if args.dataset == "demo" else 180, 1e7, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"figures {contract.plan(args.estimate['figures'])}")
    folder = args.work_dir / args.dataset / "tables"
    drawn = {"fig2": draw_methods, "fig3": draw_tsne, "fig5": draw_distances, "fig12": draw_sheet}
    drawn |= {name: lambda args, name=name: draw_bars(args, name) for name in BARS}
    for name, draw in drawn.items():
        try:
            figure = draw(args)
        except contract.Missing as error:
            reason = str(error).splitlines()[0]
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier state
            if name not in BARS:
                contract.save(folder / f"{name}.md", f"not run: {reason}\n".encode())
            contract.say(f"{name} not run: {reason}")
            continue
        figure.tight_layout()
        with contract.atomic(folder / f"{name}.png") as handle:
            figure.savefig(handle, format="png", dpi=100, metadata={"Software": None})
        if name in ("fig2", "fig3", "fig12"):
            (folder / f"{name}.md").unlink(missing_ok=True)
        contract.say(folder / f"{name}.png")


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
