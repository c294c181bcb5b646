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

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402

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
    rows, columns = (list(dict.fromkeys(line[key] for line in lines)) for key in ("row", "column"))
    if len(columns) == 1:  # each row a group of its own
        lines = [line | {"row": line["column"], "column": line["row"]} for line in lines]
        rows, columns = columns, rows
    if not any(line["value"] for line in lines):
        raise contract.Missing(f"{name}: {lines[0]['note']}")
    parts = rows if name == "efficiency" else [""]  # rows of different units: each its own axes
    figure, axes = canvas(1, len(parts), max(6, 1.5 + 0.3 * len(lines) + 0.5 * len(columns)), 4)
    for axis, part in zip(axes[0], parts, strict=True):
        shown = [row for row in rows if part in (row, "")]
        for i, row in enumerate(shown):
            for j, column in enumerate(columns):
                (line,) = (line for line in lines if (line["row"], line["column"]) == (row, column))
                x, label = j + (i + 0.5) / (len(shown) + 0.5), row if j == 0 and len(shown) > 1 else None
                value, std = (float(line[key]) if line[key] else None for key in ("value", "std"))
                width, color = 0.9 / (len(shown) + 0.5), f"C{i}"
                axis.bar(x, value or 0, width, yerr=std, capsize=3, color=color, label=label)
                if value is None:
                    axis.text(
                        x, 0, " not run", rotation=90, ha="center", va="bottom", fontsize=7, color="grey"
                    )
                if line["paper"]:
                    axis.plot([x - width / 2, x + width / 2], [float(line["paper"])] * 2, "k-", lw=2)
        turned = {"rotation": 30, "ha": "right"} if len(columns) > 4 else {}
        axis.set_xticks([j + 0.5 for j in range(len(columns))], columns, **turned)
        axis.set(ylabel=part, ylim=(0, None))
        if len(shown) > 1:
            axis.legend(fontsize=8)
    title = re.match(r"\| (.*?) \|", (folder / f"{name}.md").read_text("utf-8"))[1]
    figure.suptitle(f"{args.dataset}. {title}" + ". Black: the paper" * any(line["paper"] for line in lines))
    return figure


# --- from features, latents and videos --------------------------------------------------------------------


def draw_tsne(args):
    """Fig. 3. All points are embedded together; real ones are grey in each panel."""
    from sklearn.manifold import TSNE

    folder, points = args.work_dir / args.dataset / f"features/ipc{args.ipc}", {}
    for name in ("real", *METHODS):
        if (folder / f"{name}.npy").exists():
            points[name] = np.array(contract.read(folder / f"{name}.npy"))
    if "real" not in points or len(points) == 1:
        fix = contract.command(args, "tools/metrics.py")
        raise contract.Missing(f"{folder} lacks the features of real clips or of any method", fix=fix)
    everything = np.concatenate([*points.values()])
    near = min(30, (len(everything) - 1) // 3)
    placed = TSNE(perplexity=near, init="pca", random_state=args.seed).fit_transform(everything)
    owner = np.repeat([*points], [len(p) for p in points.values()])
    rows = [(name, f"{x:.4f}", f"{y:.4f}") for name, (x, y) in zip(owner, placed.tolist(), strict=True)]
    contract.save(folder.parents[1] / "tables/fig3.csv", [("set", "x", "y"), *rows])
    methods = [name for name in points if name != "real"]
    figure, axes = canvas(1, len(methods), 4.5 * len(methods), 4.5)
    for i, (axis, name) in enumerate(zip(axes[0], methods, strict=True)):
        axis.scatter(*placed[owner == "real"].T, s=6, color="lightgrey", label="real")
        axis.scatter(*placed[owner == name].T, s=18, color=f"C{i}", label=name)
        axis.set(xticks=[], yticks=[])
        axis.legend(loc="upper right")
    figure.suptitle(f"{args.dataset}, IPC {args.ipc}: t-SNE of VideoMAE features")
    return figure


def distances(args, name, cluster):
    """Distance [videos] of the first draws of a set to the prototypes they belong to."""
    fix = "bash run_all.sh " + args.dataset + " all"
    samples = contract.Input(args, f"03_samples/ipc{args.ipc}/{name}", fix)
    prototypes = contract.Input(args, f"02_prototypes/ipc{args.ipc}/{cluster}", fix)
    prototypes.check(f"{c}.npy" for c in args.classes)
    files = {c: [f"{c}/{k}_0.npy" for k in range(args.ipc)] for c in args.classes}
    samples.check(file for of_class in files.values() for file in of_class)
    found = []
    for label, of_class in files.items():
        centres = prototypes.load(f"{label}.npy")  # [K, 16, 4, h, w]
        latents = np.stack([samples.load(file) for file in of_class])
        found += np.square(latents - centres, dtype=np.float64).mean((1, 2, 3, 4)).tolist()
    return np.sqrt(found)


def draw_distances(args):
    """Fig. 5."""
    folder = args.work_dir / args.dataset / "tables"
    sets = [(name, "dummy-video", f"{s:g}") for s, name in STRENGTHS.items()]
    sets += [("naive", "dummy-video", ""), ("naive", "direct", ""), ("gvd", "direct", "")]
    rows = []
    for name, cluster, strength in sets:
        d = distances(args, name, cluster)
        rows.append((name, cluster, strength, f"{d.mean():.6f}", f"{d.std(ddof=1):.6f}", len(d)))
    titles = ("set", "prototypes", "strength", "mean", "std", "n")
    contract.save(folder / "fig5.csv", [titles, *rows])
    lines = [titles, ["---"] * len(titles), *([str(value) for value in row] for row in rows)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    contract.save(
        folder / "fig5.md", (text + "\nDistance to the prototype, root mean square over a latent.\n").encode()
    )
    figure, axes = canvas()
    values = np.array([[float(r[2]), float(r[3]), float(r[4])] for r in rows if r[2]])
    axes[0, 0].errorbar(*values.T, marker="o", capsize=3, label="knoise to dummy-video")
    for i, (name, cluster, _, mean, *_) in enumerate(row for row in rows if not row[2]):
        axes[0, 0].axhline(float(mean), color=f"C{i + 1}", ls="--", label=f"{name} to {cluster}")
    axes[0, 0].set(xlabel="strength of K-Noise", ylabel="distance to the prototype", ylim=(0, None))
    axes[0, 0].legend()
    axes[0, 0].set_title(f"{args.dataset}, IPC {args.ipc}")
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
    fix = "bash run_all.sh " + args.dataset + " all"
    source = contract.Input(args, folder, fix)
    source.check([file])
    return media.read_video(source.folder / file)


def draw_methods(args):
    """Fig. 2."""
    names = {"naive": "naive", "K-Noise": "knoise", "GVD without decay": "gvd-no-decay", "GVD": "gvd"}
    label, ipc = args.classes[0], f"ipc{args.ipc}"
    rows = {
        title: video(args, f"03_samples/{ipc}/{name}", f"{label}/0_0.mp4") for title, name in names.items()
    }
    rows["GVD composed"] = video(args, f"04_distilled/{ipc}/gvd", f"{label}/0.mp4")
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
