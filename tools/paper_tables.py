"""The paper's tables, and the numbers of its figures that are bars or curves, ours beside the paper's.

A cell: mean ± sample standard deviation (n), protocol; the paper's figure. "not run" says why. Footnotes mark
results short of their protocol, of a set that has been made anew since, or made otherwise than the row says.

Reads:   work/<data set>/tables/results.csv of tools/tables.py (of hmdb51 and miniucf both, where both are
         there); metrics_ipc<K>.json, 05_results/ipc<K>/<set>/score.json of tools/metrics.py
         the records of 03_samples and 04_distilled, the log of 03; tools/paper_results.csv
Writes:  work/<data set>/tables/<name>.md, .csv: table1 to table4, table1_*, fig7a to fig7d, fig8 to fig10,
         efficiency
Run:     python tools/paper_tables.py demo        # after tools/tables.py demo; then tools/claims.py demo
Cost:    2 s
Expect:  a table for each of the paper's, every cell filled in or saying what is missing
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import common  # noqa: E402
import media  # noqa: E402

IPCS, ABLATIONS = (1, 5, 10, 20), 5  # of Table 1 (demo: without 20); of Tables 3 and 4, Fig. 7 d, 9 and 10
BASELINES = ("dm", "mtt", "frepo", "static_dc", "dm+d", "mtt+d", "frepo+d")
DANCING = "mtt+d"  # "Dancing with Still Images" of Table 2
ROWS = {  # set, labels, how the set is made otherwise than by default
    **{name: (name, "hard", ()) for name in ("random", "herding", "kcenter", *BASELINES)},
    "naive": ("naive", "hard", ("sampler naive",)),
    "knoise": ("knoise", "hard", ("sampler knoise", "cluster dummy-video")),
    "gvd": ("gvd", "hard", ()),
    "gvd, soft labels": ("gvd", "soft", ()),
    "random, soft labels": ("random", "soft", ()),
    "full": ("full", "hard", ()),
    "gvd without decay": ("gvd-no-decay", "hard", ("decay none",)),
    "gvd without composition": ("gvd-1x16", "hard", ("pattern 1x16",)),
}
TABLE1, OWN = [*ROWS][:-2], ("gvd", "gvd, soft labels")
NETS = ("minic3d", "cnn-gru", "cnn-rnn")
PATTERNS, FRAMES = ("8x2", "3-3-3-3-2-2", "4x4", "2x8", "1x16"), ("continuous", "random")
CLUSTERS = ("direct", "real-video", "dummy-video", "herding", "gmm", "direct-cosine")
SWEEPS = {"lambda": ("guidance", (0, 0.01, 0.05, 0.1, 0.3, 1)), "stop": ("stop", (0, 0.25, 0.5, 0.75, 1))}
SAME = {"lambda 0.1": "gvd", "stop 0.5": "gvd", "stop 1": "guidance-0"}  # the same videos by another name
METRICS = {  # of metrics_ipc<K>.json: the paper's column
    **{
        "entropy_bits_classes": "entropy",
        "entropy_nats_outputs": "entropy",
        "coverage_per_class": "coverage",
    },
    **{"coverage_all": "coverage", "mpd_per_class": "mpd", "mpd_all": "mpd"},
}
DIGITS = {"table1_bytes": 0, "table1_mp4": 0, "table1_frames": 2, "table3": 4}  # others: 1
CELL = ("value", "std", "n", "protocol", "note", "paper", "paper_std", "mark")


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set, ipc=False))


# --- what is on the disk ----------------------------------------------------------------------------------


class Results:
    """The results, metrics and scores of a data set, as cells {name of CELL: value}.

    A cell without "value" is not run, and its note says why.
    """

    def __init__(self, args, dataset):
        self.dataset, self.base = dataset, args.work_dir / dataset
        self.classes = args.classes if dataset == args.dataset else media.DATASETS[dataset]["classes"]
        path, own, self.found = self.base / "tables/results.csv", "demo" if dataset == "demo" else "gvd", {}
        rows = contract.read(path) if path.exists() else []
        for row in sorted(rows, key=lambda row: row["protocol"] == own):  # another protocol: only without own
            self.found[row["ipc"], row["set"], row["net"], row["labels"]] = row
        self.ipcs = sorted({*IPCS[: 3 if dataset == "demo" else 4]} | {int(k[0]) for k in self.found if k[0]})
        paths = sorted(self.base.glob("metrics_ipc*.json"))
        self.frames = contract.read(paths[0])["frames"] if paths else {}

    def row(self, ipc, name, labels="hard", net="minic3d"):
        return self.found.get(("" if name == "full" else str(ipc), name, net, labels))

    def why(self, ipc, name):
        """Why there is no result of a set."""
        real = name in ("random", "full") or (self.base / f"05_coresets/ipc{ipc}/{name}").is_dir()
        there = real or (self.base / f"04_distilled/ipc{ipc}/{name}").is_dir()
        return {"note": "not trained on it" if there else "no such set"}

    def top1(self, ipc, name, labels="hard", varied=(), net="minic3d"):
        """varied: what of the set's making the row itself states."""
        row = self.row(ipc, name, labels, net)
        if row is None:
            return self.why(ipc, name)
        making = [text for text in row["making"].split("; ") if text and text not in varied]
        making += [f"the same as without {text}" for text in varied if text not in row["making"].split("; ")]
        note = "; ".join([row["note"]] * bool(row["note"]) + making)
        value, std = (float(row[key]) if row[key] else None for key in ("top1", "std"))
        return {"value": value, "std": std, "n": int(row["n"]), "protocol": row["protocol"], "note": note}

    def bytes(self, ipc, name, labels, column):
        row = self.row(ipc, name, labels)
        missing = {"note": "not measured: tools/mp4_bytes.py"} if row else self.why(ipc, name)
        return {"value": float(row[column])} if row and row[column] else missing

    def digest(self, ipc, name, ending=".mp4"):
        """Hash of a set's videos as the tools record it, None without a record; <name>-samples: of 03."""
        step = "03_samples" if name.endswith("-samples") else "04_distilled"
        folder = self.base / step / f"ipc{ipc}" / name.removesuffix("-samples")
        record = contract.read(folder / "manifest.json")
        files = sorted(name for name in (record or {"outputs": {}})["outputs"] if name.endswith(ending))
        files = [name for c in self.classes for name in files if name.startswith(f"{c}/")]
        return contract.digest({n: record["outputs"][n]["sha256"] for n in files}) if files else None

    def score(self, ipc, name, stated=None):
        """Share of a set's videos that the network trained on all clips recognises.

        stated: of the first draws alone; how the set is made, in the words of its record.
        """
        found = contract.read(self.base / f"05_results/ipc{ipc}/{name}/score.json")
        if found is None:
            return {"note": "not scored: tools/metrics.py --score"}
        part, now = found if stated is None else found["first draw"], self.digest(ipc, name)
        notes = [f"network short of its protocol: {text}" for text in found["short"]]
        notes += ["of an older set"] * (now not in (None, found["videos made of"]))
        path = self.base / f"03_samples/ipc{ipc}" / name.removesuffix("-samples") / "manifest.json"
        made = contract.read(path) if stated else None
        for key, value in stated.items() if made else ():
            notes += [f"{key} {made['parameters'].get(key)}"] * (made["parameters"].get(key) != value)
        return {"value": part["top1"], "n": part["videos"], "note": "; ".join(notes)}

    def metric(self, ipc, row, column):
        made = contract.read(self.base / f"metrics_ipc{ipc}.json") or {"sets": [], "inputs": {}}
        found = next((r for r in made["sets"] if r["set"] == row and column in r["mean"]), None)
        if found is None:
            return {"note": "not measured: tools/metrics.py"}
        name, _, before = row.partition(", before")
        now = self.digest(ipc, name + "-samples" * bool(before), "_0.mp4" if before else ".mp4")
        stated = made["inputs"].get(f"{'samples' if before else 'distilled'} {name}")
        cell = {"value": found["mean"][column], "std": found["std"].get(column)}
        older = "of an older set" * (None not in (now, stated) and now != stated)
        return cell | {"n": len(found["values"][column]), "note": older}

    def kept(self, ipc):
        """Frames of a distilled set, in percent of those of all training clips."""
        if not self.frames:
            return {"note": "not counted: tools/metrics.py"}
        frames = ipc * len(self.classes) * common.NUM_FRAMES
        return {"value": 100 * frames / self.frames["frames of all training clips"]}

    def cost(self, ipc, row):
        """Of sampling, from the log of 03: seconds per video where one run made them all; peak memory."""
        folder = self.base / f"03_samples/ipc{ipc}/gvd"
        log = (folder / "log.txt").read_text("utf-8") if (folder / "log.txt").exists() else ""
        runs = re.findall(r"^\d{4}-\d\d-\d\d .*$", log, re.M)  # each begins with its date and command
        seconds = [int(s) for s in re.findall(r"^03 done: .*, (\d+) s$", log, re.M)]
        memory = [float(m) for m in re.findall(r"^03 peak memory ([\d.]+) GB", log, re.M)]
        if row == "peak memory, GB":
            missing = "the log has none" if log else "no such set"
            return {"value": max(memory)} if memory else {"note": missing}
        if (len(runs), len(seconds)) != (1, 1):
            return {"note": "made in several runs" if log else "no such set"}
        videos = [n for n in contract.read(folder / "manifest.json")["outputs"] if n.endswith(".mp4")]
        return {"value": seconds[0] / len(videos), "n": len(videos)}


# --- tables -----------------------------------------------------------------------------------------------


def paper_cells():
    """{(table, row, column): the paper's figure, as part of a cell}."""
    rows = contract.read(contract.ROOT / "tools" / "paper_results.csv")
    named = {"paper": "value", "paper_std": "std", "mark": "mark"}
    return {(r["table"], r["row"], r["column"]): {key: r[n] for key, n in named.items()} for r in rows}


def cell_text(cell, digits, footnotes):
    """A cell as text. Its note, if it has a value, goes to footnotes {note: number}."""
    text = "not run: " + cell["note"] if "value" not in cell else f"{cell['value']:,.{digits}f}"
    if "value" in cell:
        text += "" if cell.get("std") is None else f" ± {cell['std']:.{digits}f}"
        text += f" ({cell['n']})" if "n" in cell else ""
        text += f", {cell['protocol']}" if "protocol" in cell else ""
    if "value" in cell and cell.get("note"):
        text += f" **[{footnotes.setdefault(cell['note'], len(footnotes) + 1)}]**"
    if cell.get("paper"):
        text += f"; paper {cell['paper']}" + f" ± {cell['paper_std']}" * bool(cell["paper_std"])
        text += f" ({cell['mark']})" * (cell["mark"] != "printed")
    return text


class Tables:
    """Writes tables, beside the paper's figures."""

    def __init__(self, folder):
        self.folder, self.paper = folder, paper_cells()

    def write(self, name, title, rows, columns, cell, note=""):
        """name: of the files. cell: a function of row and column."""
        digits, footnotes = DIGITS.get(name, 1), {}
        made = {(row, column): cell(row, column) for row in rows for column in columns}
        lines = [[title, *columns], ["---"] * (1 + len(columns))]
        lines += [[r, *(cell_text(made[r, c], digits, footnotes) for c in columns)] for r in rows]
        text = "".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\n{note}\n" * bool(note)
        text += "".join(f"\n[{number}] {why}\n" for why, number in footnotes.items())
        contract.save(self.folder / f"{name}.md", text.encode())
        values = ((*key, *(c.get(n) for n in CELL)) for key, c in made.items())
        contract.save(self.folder / f"{name}.csv", [("row", "column", *CELL), *values])
        contract.say(self.folder / f"{name}.md")

    def beside(self, table, row, column):
        """The paper's figure, as part of a cell."""
        return self.paper.get((table, row, column), {})


def write_table1(tables, parts):
    """Table 1 and what goes with it. parts: Results of one data set, or of both real ones."""
    columns = {f"{p.dataset} IPC {k}": (p, k) for p in parts for k in p.ipcs}

    def top1(row, column):
        part, ipc = columns[column]
        cell = {"note": "its printed figures alone"} if row == "prism" else part.top1(ipc, *ROWS[row])
        place = part.dataset + f" ipc{ipc}" * (row != "full")
        return cell | tables.beside("1", row, place)

    def relative(row, column):
        part, ipc = columns[column]
        cell, full = part.top1(ipc, *ROWS[row]), part.top1(ipc, "full")
        if missing := next((c for c in (cell, full) if "value" not in c), None):
            return missing
        return {"value": 100 * cell["value"] / full["value"], "note": cell["note"]}

    def size(kind):
        return lambda row, column: columns[column][0].bytes(columns[column][1], *ROWS[row][:2], kind)

    title, note = "Table 1: top-1 %", "Last epoch, mean ± sample standard deviation (networks), protocol."
    tables.write("table1", title, [*TABLE1, *["prism"] * (parts[0].dataset != "demo")], columns, top1, note)
    note = "A row's mean in percent of that of all clips."
    tables.write("table1_relative", "relative to full, %", TABLE1[:-1], columns, relative, note)
    note = "16 frames per video, of all frames of the training clips."
    kept = lambda row, column: columns[column][0].kept(columns[column][1])  # noqa: E731
    tables.write("table1_frames", "frames kept, %", ["each distilled set"], columns, kept, note)
    note = "The .mp4 files of a generated set, the uint8 clips at network size of a real one."
    tables.write("table1_bytes", "stored bytes", TABLE1, columns, size("bytes"), note)
    note = "Each set, real or generated, as .mp4 at network size by the same encoder."
    tables.write("table1_mp4", "bytes by one measure", TABLE1, columns, size("mp4_bytes"), note)


def write_tables(tables, part, ipc=ABLATIONS):
    """Tables 2 to 4."""
    columns = {f"IPC {k}, {net}": (k, net) for k in (1, ABLATIONS) for net in NETS}
    columns |= {f"IPC {k}, {net} - minic3d": (k, net) for k in (1, ABLATIONS) for net in NETS[1:]}

    def across(row, column):
        k, net = columns[column]
        cell, base = part.top1(k, *ROWS[row], net), part.top1(k, *ROWS[row])
        if not column.endswith("- minic3d"):
            return cell | tables.beside("2", row, f"{part.dataset} ipc{k} {net}")
        missing = next((c for c in (cell, base) if "value" not in c), None)
        return missing or {"value": cell["value"] - base["value"], "note": cell["note"]}

    note = f"{DANCING}: the paper's Dancing w/ Images. Its figures are lost."
    tables.write("table2", "Table 2: networks, top-1 %", ["random", DANCING, "gvd"], columns, across, note)

    def diversity(row, column):
        name = "dancing" if row == DANCING else row
        return part.metric(ipc, row, column) | tables.beside("3", name, f"{part.dataset} {METRICS[column]}")

    made = [f"{name}{step}" for name in ("naive", "knoise", "gvd") for step in (", before composition", "")]
    rows = ["all real clips", "random real clips", DANCING, *made]
    note = "The paper says neither the entropy's base nor whether per class or of all: it is by both."
    tables.write("table3", f"Table 3: diversity, IPC {ipc}", rows, METRICS, diversity, note)

    def composed(frames, pattern):
        other = [v for v in (pattern, frames) if v not in ("4x4", "random", pattern == "1x16" and frames)]
        varied = [f"pattern {pattern}"] * (pattern != "4x4")
        varied += ["frames continuous"] * ("continuous" in other)
        cell = part.top1(ipc, "-".join(["gvd", *other]), "hard", varied)
        return cell | tables.beside("4", frames, f"{part.dataset} {pattern}")

    note = "Videos of a group x frames of each; 1x16 is without composition. The paper's IPC is not stated."
    tables.write("table4", f"Table 4: composition, top-1 %, IPC {ipc}", FRAMES, PATTERNS, composed, note)


def write_figures(tables, part, ipc=ABLATIONS):
    """Fig. 7 to 10 and the cost of sampling."""
    columns = {f"IPC {k}": k for k in part.ipcs}
    for name, title, rows in (
        ("fig7a", "Fig. 7 a: samplers, composed alike", ("naive", "knoise", "gvd")),
        ("fig7b", "Fig. 7 b: decay", ("gvd without decay", "gvd")),
        ("fig7c", "Fig. 7 c: composition, then soft labels", ("gvd without composition", *OWN)),
    ):
        cell = lambda row, column: part.top1(columns[column], *ROWS[row])  # noqa: E731
        tables.write(name, f"{title}, top-1 %", rows, columns, cell)

    sets = {"dancing": DANCING, "knoise": "knoise-samples", "gvd before composition": "gvd-samples"}
    sets |= {"gvd": "gvd", "real": "full"}
    cell = lambda row, _: part.score(ipc, sets[row]) | tables.beside("fig7d", row, part.dataset)  # noqa: E731
    note = "By MiniC3D of all clips, (videos); real: its own training clips. knoise: before composition."
    tables.write("fig7d", f"Fig. 7 d: recognised, %, IPC {ipc}", sets, ["score"], cell, note)

    names = {"before": "frames per clip, training and test", "after": "frames per distilled video"}
    missing = {"note": "not counted: tools/metrics.py"}
    cell = lambda _, column: {"value": part.frames[names[column]]} if part.frames else missing  # noqa: E731
    tables.write("fig8", "Fig. 8: frames per video", [part.dataset], names, cell)

    def clustered(row, _):
        varied = ["distance cosine"] if row == "direct-cosine" else [f"cluster {row}"] * (row != "direct")
        return part.top1(ipc, "gvd" + f"-{row}" * (row != "direct"), "hard", varied)

    note = "The Frobenius distance is the Euclidean one of flattened latents, that of direct."
    tables.write("fig9", f"Fig. 9: clustering, top-1 %, IPC {ipc}", CLUSTERS, ["top-1"], clustered, note)
    sets = {f"{k} {v:g}": (name, v) for k, (name, values) in SWEEPS.items() for v in values}

    def swept(row, _):
        name, value = sets[row]
        stated = {name: value} if row != "stop 1" else {"guidance": 0}  # never guided: the same videos
        cell = part.score(ipc, SAME.get(row, f"{name}-{value:g}") + "-samples", stated)
        return cell | tables.beside("fig10", row, part.dataset)

    note = "One draw per prototype, before composition, (videos). stop s: guided while t > s T. "
    note += "The paper, on MiniUCF, without the values of lambda and stop: "
    note += ", ".join(f"{k[1]} {v['paper']}" for k, v in tables.paper.items() if k[0] == "fig10") + "."
    tables.write("fig10", f"Fig. 10: lambda and stop, recognised %, IPC {ipc}", sets, ["score"], swept, note)
    cost = lambda row, column: part.cost(columns[column], row)  # noqa: E731
    printed = tables.beside("claims", "GPU memory, GB", "any IPC")["paper"]
    note = f"Stage 03 from start to end, (videos). The paper: {printed} GB at every IPC, on an A100."
    tables.write("efficiency", "sampling", ["seconds per video", "peak memory, GB"], columns, cost, note)


def estimate(args):
    return {"paper_tables": ("tables", 1, 2, 1e5, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"paper_tables {contract.plan(args.estimate['paper_tables'])}")
    folder = args.work_dir / args.dataset / "tables"
    if not (folder / "results.csv").exists():
        fix = contract.command(args, "tools/tables.py")
        raise contract.Missing(f"{folder / 'results.csv'} is missing", "the list of results", fix=fix)
    names = [args.dataset, *{"hmdb51": ["miniucf"], "miniucf": ["hmdb51"]}.get(args.dataset, [])]
    parts = [part for name in names if (part := Results(args, name)).found]
    tables = Tables(folder)
    write_table1(tables, parts)
    for write in (write_tables, write_figures):
        write(tables, Results(args, args.dataset))


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
