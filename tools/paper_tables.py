"""The paper's tables, the numbers of its figures that are bars or curves, and its claims, beside ours.

A cell: mean ± sample standard deviation (n), protocol; the paper's figure. "not run" says why. Footnotes mark
results short of their protocol, of a set that has been made anew since, or made otherwise than the row says.

Reads:   work/<data set>/tables/results.csv of tools/tables.py (of hmdb51 and miniucf both, where both are
         there); metrics_ipc<K>.json, 05_results/ipc<K>/<set>/score.json of tools/metrics.py
         the records of 03_samples and 04_distilled, the log of 03; tools/paper_results.csv
Writes:  work/<data set>/tables/<name>.md, .csv: table1 to table4, table1_*, fig7a to fig7d, fig8 to fig10,
         efficiency; claims of tools/claims.py
Run:     python tools/paper_tables.py demo        # after tools/tables.py demo
Cost:    2 s
Expect:  a table for each of the paper's, every cell filled in or saying what is missing
"""

import itertools
import math
import operator
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import claims  # noqa: E402
import tables  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

IPCS = (1, 5, 10, 20)  # of Table 1; demo: without 20
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
TABLE1, SAMPLERS = [*ROWS][:-2], ("naive", "knoise", "gvd")
NETS = ("minic3d", "cnn-gru", "cnn-rnn")
PATTERNS, FRAMES = ("8x2", "3-3-3-3-2-2", "4x4", "2x8", "1x16"), ("continuous", "random")
CLUSTERS = {"direct": ROWS["gvd"]}
for cluster in ("real-video", "dummy-video", "herding", "gmm"):
    CLUSTERS[cluster] = (f"gvd-{cluster}", "hard", (f"cluster {cluster}",))
CLUSTERS["direct-cosine"] = ("gvd-direct-cosine", "hard", ("distance cosine",))
SWEEPS = {"lambda": ("guidance", (0, 0.01, 0.05, 0.1, 0.3, 1)), "stop": ("stop", (0, 0.25, 0.5, 0.75, 1))}
SAME = {"lambda 0.1": "gvd", "stop 0.5": "gvd"}  # the same videos by another name
METRICS = ["entropy_bits_classes", "entropy_nats_outputs"]
METRICS += [f"{name}_{of}" for name in ("coverage", "mpd") for of in ("per_class", "all")]
DIGITS = {"table1_bytes": 0, "table1_mp4": 0, "table1_frames": 2, "table3": 4}  # others: 1
CELL = ("value", "std", "n", "protocol", "note", "paper", "paper_std", "mark")
PAPER = tables.paper_cells()


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set, ipc=False))


# --- what is on the disk ----------------------------------------------------------------------------------


class Results:
    """The results, metrics and scores of a data set at an IPC, as cells {name of CELL: value}.

    A cell without "value" is not run, and its note says why.
    """

    def __init__(self, args, dataset, ipc, rows):
        self.dataset, self.base, self.ipc = dataset, args.work_dir / dataset, ipc
        self.classes = args.classes if dataset == args.dataset else media.DATASETS[dataset]["classes"]
        rows = [row for row in rows if row["ipc"] in ("", str(ipc))]
        self.found = {(row["set"], row["labels"], row["net"]): row for row in rows}
        metrics = sorted(self.base.glob("metrics_ipc*.json"))
        self.frames = contract.read(metrics[0])["frames"] if metrics else {}

    def folder(self, name):
        """Of a set in 04_distilled; <name>-samples: in 03_samples."""
        step = "03_samples" if name.endswith("-samples") else "04_distilled"
        return self.base / step / f"ipc{self.ipc}" / name.removesuffix("-samples")

    def older(self, name, made_of, ending=".mp4"):
        """Whether the set is no longer the one that was measured."""
        return tables.set_hash(self.folder(name), self.classes, ending=ending) not in (None, made_of)

    def missing(self, name):
        """The cell of a set without a result."""
        places = self.folder(name), self.base / f"05_coresets/ipc{self.ipc}/{name}"
        there = name in ("random", "full") or any(place.is_dir() for place in places)
        return {"note": "not trained on it" if there else "no such set"}

    def top1(self, row, net="minic3d"):
        """row: set, labels, what of the set's making the table itself states."""
        name, labels, stated = row
        if (result := self.found.get((name, labels, net))) is None:
            return self.missing(name)
        made = result["making"].split("; ")
        notes = [result["note"], *(text for text in made if text not in stated)]
        notes += [f"the same as without {text}" for text in stated if text not in made]
        value, std = (float(result[key]) if result[key] else None for key in ("top1", "std"))
        cell = {"value": value, "std": std, "n": int(result["n"]), "protocol": result["protocol"]}
        return cell | {"note": "; ".join(filter(None, notes))}

    def size(self, row, column="bytes"):
        """Bytes of a set."""
        if (result := self.found.get((*row[:2], "minic3d"))) is None:
            return self.missing(row[0])
        size = result[column]
        return {"value": float(size)} if size else {"note": "not measured: tools/mp4_bytes.py"}

    def mp4_size(self, row):
        return self.size(row, "mp4_bytes")

    def score(self, name, stated=None):
        """Share of a set's videos that the network trained on all clips recognises.

        stated: of the first draws alone; how the set is made, in the words of its record.
        """
        found = contract.read(self.base / f"05_results/ipc{self.ipc}/{name}/score.json")
        if found is None:
            return {"note": "not scored: tools/metrics.py --score"}
        notes = [f"network short of its protocol: {text}" for text in found["short"]]
        notes += ["of an older set"] * self.older(name, found["videos made of"])
        if stated:
            record = contract.read(self.folder(name) / "manifest.json") or {"parameters": stated}
            made, found = record["parameters"], found["first draw"]
            notes += [f"{key} {made.get(key)}" for key in stated if made.get(key) != stated[key]]
        share, n = found["top1"], found["videos"]
        error = math.sqrt(share * (100 - share) / n)
        return {"value": share, "n": n, "error": error, "note": "; ".join(notes)}

    def metric(self, column, row):
        made = contract.read(self.base / f"metrics_ipc{self.ipc}.json") or {"sets": []}
        found = next((r for r in made["sets"] if r["set"] == row and column in r["mean"]), None)
        if found is None:
            return {"note": "not measured: tools/metrics.py"}
        name, _, before = row.partition(", before")
        made_of = made["inputs"].get(f"{'samples' if before else 'distilled'} {name}")
        older = self.older(f"{name}-samples", made_of, "_0.mp4") if before else self.older(name, made_of)
        cell = {"value": found["mean"][column], "std": found["std"].get(column)}
        return cell | {"n": len(found["values"][column]), "note": "of an older set" * older}

    def frame_count(self, name):
        """Of the clips or of a distilled video."""
        return {"value": self.frames[name]} if self.frames else {"note": "not counted: tools/metrics.py"}

    def cost(self, row):
        """Of sampling, from the log of 03: seconds per video where one run made them all; peak memory."""
        folder = self.folder("gvd-samples")
        if not (folder / "log.txt").exists():
            return {"note": "no such set"}
        log = (folder / "log.txt").read_text("utf-8")
        if row == "peak memory, GB":
            memory = [float(m) for m in re.findall(r"^03 peak memory ([\d.]+) GB", log, re.M)]
            return {"value": max(memory)} if memory else {"note": "the log has none"}
        runs = re.findall(r"^\d{4}-\d\d-\d\d .*$", log, re.M)  # each begins with its date and command
        seconds = [int(s) for s in re.findall(r"^03 done: .*, (\d+) s$", log, re.M)]
        if (len(runs), len(seconds)) != (1, 1):
            return {"note": "made in several runs"}
        videos = [name for name in tables.hashes(folder) if name.endswith(".mp4")]
        return {"value": seconds[0] / len(videos), "n": len(videos)}


def read_results(args, dataset):
    """{IPC: Results} of a data set; {} without a list of results."""
    path, demo = args.work_dir / dataset / "tables/results.csv", dataset == "demo"
    if not path.exists():
        return {}
    own = "demo" if demo else "gvd"  # protocol; another one counts where there is none of this
    rows = sorted(contract.read(path), key=lambda row: row["protocol"] == own)
    ipcs = {*IPCS[: 3 if demo else 4], *(int(row["ipc"]) for row in rows if row["ipc"])}
    return {ipc: Results(args, dataset, ipc, rows) for ipc in sorted(ipcs)}


def combine(cell, base, rule):
    """The cell of a value by two others: not run where one of them is not."""
    if missing := [c for c in (cell, base) if "value" not in c]:
        return missing[0]
    notes = dict.fromkeys(filter(None, (cell.get("note"), base.get("note"))))
    return {"value": rule(cell["value"], base["value"]), "note": "; ".join(notes)}


def percent(part, whole):
    return 100 * part / whole


# --- the tables: name, title, rows, columns (also as {title: what `cell` takes}), cell(column, row), note ---


def pick(*names):
    return {name: ROWS[name] for name in names}


def table1(columns):
    """Table 1 and what goes with it, of one data set or of both real ones."""
    rows, sets = pick(*TABLE1), pick(*TABLE1[:-1])

    def top1(at, row):
        return at.top1(row) if row else {"note": "its printed figures alone"}

    def relative(at, row):
        return combine(at.top1(row), at.top1(ROWS["full"]), percent)

    def kept(at, _):
        distilled = {"value": at.ipc * len(at.classes) * common.NUM_FRAMES}
        return combine(distilled, at.frame_count("frames of all training clips"), percent)

    prism = {} if "demo IPC 1" in columns else {"prism": None}
    note = "Last epoch, mean ± sample standard deviation (networks), protocol."
    yield "table1", "Table 1: top-1 %", rows | prism, columns, top1, note
    note = "A row's mean in percent of that of all clips."
    yield "table1_relative", "relative to full, %", sets, columns, relative, note
    note = "16 frames per video, of all frames of the training clips."
    yield "table1_frames", "frames kept, %", ["each distilled set"], columns, kept, note
    note = "The .mp4 files of a generated set, the uint8 clips at network size of a real one, the float32 "
    note += "values of a learnt one."
    yield "table1_bytes", "stored bytes", rows, columns, Results.size, note
    note = "Each set, real or generated, as .mp4 at network size by the same encoder."
    yield "table1_mp4", "bytes by one measure", rows, columns, Results.mp4_size, note


def tables_2_to_4(at1, at5):
    def across(column, row):
        at, net, base = column
        cell = at.top1(row, net)
        return combine(cell, at.top1(row), operator.sub) if base else cell

    def composed(pattern, frames):
        stated = [f"pattern {pattern}"] * (pattern != "4x4")
        stated += ["frames continuous"] * (frames == "continuous" and pattern != "1x16")
        name = "-".join(["gvd", *(text.split()[1] for text in stated)])
        return at5.top1((name, "hard", stated))

    columns = {f"IPC {at.ipc}, {net}": (at, net, "") for at in (at1, at5) for net in NETS}
    columns |= {f"IPC {at.ipc}, {net} - minic3d": (at, net, "-") for at in (at1, at5) for net in NETS[1:]}
    note = f"{DANCING}: the paper's Dancing w/ Images. Its figures are lost."
    yield "table2", "Table 2: networks, top-1 %", pick("random", DANCING, "gvd"), columns, across, note
    made = [f"{name}{step}" for name in SAMPLERS for step in (", before composition", "")]
    rows = ["all real clips", "random real clips", DANCING, *made]
    note = "The paper says neither the entropy's base nor whether per class or of all: it is by both."
    yield "table3", f"Table 3: diversity, IPC {at5.ipc}", rows, METRICS, at5.metric, note
    note = "Videos of a group x frames of each; 1x16 is without composition. The paper's IPC is not stated."
    yield "table4", f"Table 4: composition, top-1 %, IPC {at5.ipc}", FRAMES, PATTERNS, composed, note


def figures(columns, at5):
    """Fig. 7 to 10 and the cost of sampling."""
    top1, pairs = Results.top1, ("gvd without decay", "gvd")
    yield "fig7a", "Fig. 7 a: samplers, composed alike, top-1 %", pick(*SAMPLERS), columns, top1, ""
    yield "fig7b", "Fig. 7 b: decay, top-1 %", pick(*pairs), columns, top1, ""
    rows = pick("gvd without composition", *claims.OWN)
    yield "fig7c", "Fig. 7 c: composition, then soft labels, top-1 %", rows, columns, top1, ""
    rows = {"dancing": DANCING, "knoise": "knoise-samples", "gvd before composition": "gvd-samples"}
    rows |= {"gvd": "gvd", "real": "full"}
    note = "By MiniC3D of all clips, (videos); real: its own training clips. knoise: before composition."
    yield "fig7d", f"Fig. 7 d: recognised, %, IPC {at5.ipc}", rows, {"score": at5}, Results.score, note
    counted = {"before": "frames per clip, training and test", "after": "frames per distilled video"}
    rows = {at5.dataset: at5}
    yield "fig8", "Fig. 8: frames per video", rows, counted, lambda name, at: at.frame_count(name), ""
    title = f"Fig. 9: clustering, top-1 %, IPC {at5.ipc}"
    note = "The Frobenius distance is the Euclidean one of flattened latents, that of direct."
    yield "fig9", title, CLUSTERS, {"top-1": at5}, top1, note
    rows = {
        f"{title} {v:g}": (f"{key}-{v:g}", {key: v}) for title, (key, all_v) in SWEEPS.items() for v in all_v
    }
    rows |= {title: (name, rows[title][1]) for title, name in SAME.items()}
    rows["stop 1"] = rows["lambda 0"]  # never guided: the same videos
    title = f"Fig. 10: lambda and stop, recognised %, IPC {at5.ipc}"
    note = "One draw per prototype, before composition, (videos). stop s: guided while t > s T. "
    note += "The paper, on MiniUCF, without the values of lambda and stop: "
    note += ", ".join(f"{row} {cell['paper']}" for (t, row, _), cell in PAPER.items() if t == "fig10") + "."
    yield "fig10", title, rows, {"score": at5}, lambda at, row: at.score(f"{row[0]}-samples", row[1]), note
    rows = ("seconds per video", "peak memory, GB")
    paper = PAPER["claims", "GPU memory, GB", "any IPC"]["paper"]
    note = f"Stage 03 from start to end, (videos). The paper: {paper} GB at every IPC, on an A100."
    yield "efficiency", "sampling", rows, columns, Results.cost, note


# --- files ------------------------------------------------------------------------------------------------


def printed(name, row, place):
    """The paper's figure for a row and a place such as "hmdb51 IPC 5", as part of a cell; {} without one."""
    table, place = name.removeprefix("table"), place.replace("IPC ", "ipc")
    dataset = place.split()[0]
    keys = (place, place.split("_")[0], dataset)  # Table 3: by metric; all real clips, shares: at any IPC
    return next((PAPER[table, row, key] for key in keys if (table, row, key) in PAPER), {})


def cell_text(cell, digits, footnotes):
    """A cell as text. Its note, if it has a value, goes to footnotes {note: number}."""
    text = f"not run: {cell.get('note')}"
    if "value" in cell:
        text = f"{cell['value']:,.{digits}f}"
        text += "" if cell.get("std") is None else f" ± {cell['std']:.{digits}f}"
        text += f" ({cell['n']})" if "n" in cell else ""
        text += f", {cell['protocol']}" if "protocol" in cell else ""
        if cell.get("note"):
            text += f" **[{footnotes.setdefault(cell['note'], len(footnotes) + 1)}]**"
    if "paper" in cell:
        text += f"; paper {cell['paper']}" + f" ± {cell['paper_std']}" * bool(cell["paper_std"])
        text += f" ({cell['mark']})" * (cell["mark"] != "printed")
    return text


def write(folder, dataset, name, title, rows, columns, cell, note):
    """Writes a table; {(row, column): cell}."""
    rows, columns = (x if isinstance(x, dict) else dict(zip(x, x, strict=True)) for x in (rows, columns))
    cells, footnotes = {}, {}
    for row, column in itertools.product(rows, columns):
        place = column if name.startswith("table1") else f"{dataset} {column}"
        cells[row, column] = cell(columns[column], rows[row]) | printed(name, row, place)
    shown = {key: cell_text(found, DIGITS.get(name, 1), footnotes) for key, found in cells.items()}
    text = tables.table([title, *columns], [[row, *(shown[row, c] for c in columns)] for row in rows])
    text += f"\n{note}\n" * bool(note)
    text += "".join(f"\n[{number}] {why}\n" for why, number in footnotes.items())
    contract.save(folder / f"{name}.md", text.encode())
    lines = [(*key, *(found.get(n) for n in CELL)) for key, found in cells.items()]
    contract.save(folder / f"{name}.csv", [("row", "column", *CELL), *lines])
    contract.say(folder / f"{name}.md")
    return cells


def estimate(args):
    return {"paper_tables": ("tables", 1, 2, 1e5, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"paper_tables {contract.plan(args.estimate['paper_tables'])}")
    folder = args.work_dir / args.dataset / "tables"
    if not (own := read_results(args, args.dataset)):
        fix = contract.command(args, "tools/tables.py")
        raise contract.Missing(f"{folder / 'results.csv'} is missing", "the list of results", fix=fix)
    other = {"hmdb51": "miniucf", "miniucf": "hmdb51"}.get(args.dataset)
    both = [*own.values(), *(read_results(args, other).values() if other else ())]
    specs = [*table1({f"{at.dataset} IPC {at.ipc}": at for at in both}), *tables_2_to_4(own[1], own[5])]
    specs += figures({f"IPC {at.ipc}": at for at in own.values()}, own[5])
    cells = {spec[0]: write(folder, args.dataset, *spec) for spec in specs}
    claims.write(folder, own[5], cells)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
