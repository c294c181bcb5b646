"""The table of claims: each figure that the paper states, ours, and whether it is shown.

tools/paper_tables.py writes it, in Markdown and as CSV. A difference is shown if it exceeds two combined
standard errors in the paper's direction: of n networks, or of a share of n videos. A single network, and the
metrics of a single set, are only "higher" or "not higher". A share is shown if its mean reaches the paper's.
A figure of one data set is judged on that data set alone. What is not shown stays in the table.
"""

import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import tables  # noqa: E402

OWN = ("gvd", "gvd, soft labels")
PRIOR = ("random", "herding", "kcenter", "dm", "mtt", "frepo", "static_dc", "dm+d", "mtt+d", "frepo+d")
ORDERS = (  # claim, table, the higher row, the lower row; the paper's figures where they have other names
    ("GVD above naive", "fig7a", "gvd", "naive"),
    ("GVD above K-Noise", "fig7a", "gvd", "knoise"),
    ("decay helps", "fig7b", "gvd", "gvd without decay", "decay gain, at least"),
    ("composition helps", "fig7c", "gvd", "gvd without composition", "composition gain"),
    ("soft labels help", "fig7c", "gvd, soft labels", "gvd"),
    ("K-Noise above Dancing", "fig7d", "knoise", "dancing"),
    ("GVD above K-Noise", "fig7d", "gvd before composition", "knoise"),
    ("composed above not", "fig7d", "gvd", "gvd before composition"),
    ("real above GVD", "fig7d", "real", "gvd"),
    ("lambda 0.1 above 0.01", "fig10", "lambda 0.1", "lambda 0.01", "lambda, best", "lambda 0.01"),
    ("lambda 0.1 above 1", "fig10", "lambda 0.1", "lambda 1", "lambda, best", "lambda, too large"),
    ("stop 0.5 above 0.25", "fig10", "stop 0.5", "stop 0.25", "stop, best", "stop, lower"),
    ("stop 0.5 above 0.75", "fig10", "stop 0.5", "stop 0.75", "stop, best", "stop, higher"),
    ("random frames above continuous", "table4", "random", "continuous"),
    ("GVD above Dancing", "table2", "gvd", "mtt+d"),
    ("GVD above K-Noise", "table3", "gvd", "knoise"),
    ("K-Noise above Dancing", "table3", "knoise", "mtt+d"),
)
COLUMNS = {"table4": "4x4", "table2": "cnn"}  # what they are claimed of; of other tables: of all
BEST = {"table4": ("random", "4x4"), "fig9": ("direct", "top-1")}  # above every other cell of its table
PAPER = tables.paper_cells()


def printed(dataset, row, place="", table="claims"):
    """The paper's figure for this data set; those of others with their names."""
    found = {c: cell["paper"] for (t, r, c), cell in PAPER.items() if (t, r) == (table, row)}
    others = [f"{value} {c.removesuffix(place)}" for c, value in found.items() if c.endswith(place)]
    return found.get(dataset + place) or ", ".join(others) or "-"


def error(cell):
    """Standard error: of the mean of n, of a share as its cell says; None without a spread."""
    return cell.get("error") if cell.get("std") is None else cell["std"] / math.sqrt(cell["n"])


def judge(higher, lower):
    """(ours, verdict) of two cells, of which the paper has the first higher."""
    if missing := [cell for cell in (higher, lower) if "value" not in cell]:
        return "-", f"not run: {missing[0]['note']}"
    difference, errors = higher["value"] - lower["value"], (error(higher), error(lower))
    marked = ", of marked results" * bool(higher["note"] or lower["note"])
    if None in errors:
        return f"{difference:+.4g}", f"{'higher' if difference > 0 else 'not higher'}, no spread{marked}"
    both = math.hypot(*errors)
    return f"{difference:+.1f} ± {both:.1f}", ("shown" if difference > 2 * both else "not shown") + marked


def best(table, keys):
    """The key of the highest cell; the first one where all are not run."""
    return max(keys, key=lambda key: table[key].get("value", -math.inf))


def judge_best(table, higher, lower, others):
    """`judge`, where one of the two is the best of `others`: how many of these are run, if not all."""
    ours, verdict = judge(table[higher], table[lower])
    run = sum("value" in table[key] for key in others)
    return ours, verdict + f", {run} of {len(others)} others run" * (ours != "-" and run < len(others))


def main_claims(dataset, table1, paper):
    """Of Table 1: the gain over the best method before, and the accuracy relative to all clips."""
    columns = [column for row, column in table1 if row == "gvd" and column.startswith(f"{dataset} ")]
    for column in columns:
        before = [(row, column) for row in PRIOR]
        own, prior = best(table1, [(row, column) for row in OWN]), best(table1, before)
        pair = [prior, own] if column == "miniucf IPC 1" else [own, prior]  # the paper: there GVD is below
        ipc, names = column.split()[-1], " above ".join(row for row, _ in pair)
        text = f"table1: best of ours and before, {names}, IPC {ipc}"
        yield text, paper("gain over best prior", f" ipc{ipc}"), *judge_best(table1, *pair, before)
    column = f"{dataset} IPC 20" if f"{dataset} IPC 20" in columns else column  # the paper's
    top, full = table1[best(table1, [(row, column) for row in OWN])], table1["full", column]
    text, stated = f"accuracy relative to full, %, {column}", paper("accuracy relative to full")
    if missing := [cell for cell in (top, full) if "value" not in cell]:
        yield text, stated, "-", f"not run: {missing[0]['note']}"
        return
    relative = 100 * top["value"] / full["value"]
    spread = relative * math.hypot(*((error(cell) or 0) / cell["value"] for cell in (top, full)))
    verdict = "another data set"
    if " " not in stated and column.endswith(" 20"):
        within = ", within two standard errors" * (relative + 2 * spread >= float(stated))
        verdict = "shown" if relative >= float(stated) else f"not shown{within}"
        verdict += ", of marked results" * bool(top["note"] or full["note"])
    yield text, stated, f"{relative:.2f} ± {spread:.2f}", verdict


def order_claims(cells, paper):
    """Of the other tables: which row is above which."""
    for claim, name, higher, lower, *stated in ORDERS:
        table, part = cells[name], COLUMNS.get(name, "")
        if name in ("fig7d", "table3"):
            stated = (higher, lower)
        source = name.removeprefix("table") if name not in ("fig7b", "fig7c") else "claims"
        for column in [c for row, c in table if row == higher and part in c and " - " not in c]:
            place = " " + column.split("_")[0] if name == "table3" else ""
            figures = " / ".join(paper(row, place, source) for row in stated) or "-"
            text = f"{name}: {claim}" + f", {column}" * (column != "score")
            yield text, figures, *judge(table[higher, column], table[lower, column])
    for name, own in BEST.items():
        others = [key for key in cells[name] if key != own]
        other = best(cells[name], others)
        text = f"{name}: {' '.join(own)} above the best other, {' '.join(other)}"
        yield text, "-", *judge_best(cells[name], own, other, others)


def equal(ours, stated, digits=0):
    """(ours, verdict) of a figure that is printed and must come out the same."""
    if ours is None:
        return "-", "not run"
    if " " in stated:
        return f"{ours:,.{digits}f}", "another data set"
    same = f"{ours:.{digits}f}" == f"{float(stated):.{digits}f}"
    return f"{ours:,.{digits}f}", "shown" if same else "not shown"


def count_claims(at, cells, paper):
    """Of the data set and the machine: clips, frames, memory. at: its Results at any IPC."""
    paths = [at.base / f"01_clips/{part}/{c}.csv" for part in ("train", "test") for c in at.classes]
    clips = sum(len(contract.read(p)) for p in paths) if all(p.exists() for p in paths) else None
    kept = cells["table1_frames"].get(("each distilled set", f"{at.dataset} IPC 20"), {}).get("value")
    yield "videos", paper("videos"), *equal(clips, paper("videos"))
    yield "classes", paper("classes"), *equal(len(at.classes), paper("classes"))
    frames = at.frames.get("frames of all training clips")
    yield "training frames", paper("training frames"), *equal(frames, paper("training frames"))
    yield "frames kept, IPC 20, %", paper("frames kept"), *equal(kept, paper("frames kept"), 2)
    memory = [cell for (row, _), cell in cells["efficiency"].items() if row.startswith("peak")]
    values = [cell["value"] for cell in memory if "value" in cell]
    if len(values) > 1:
        verdict = "shown" if max(values) <= 1.05 * min(values) else "not shown"
    else:
        missing = [cell["note"] for cell in memory if "value" not in cell] or ["at one IPC alone"]
        verdict = f"not run: {missing[0]}"
    ours = " / ".join(f"{v:.2f}" for v in values) or "-"
    yield "the same peak memory at every IPC (to 5 %), GB", paper("GPU memory, GB"), ours, verdict


def write(folder, at, cells):
    """cells: {table: {(row, column): cell}} of tools/paper_tables.py."""
    titles, paper = ("claim", "paper", "ours", "verdict"), functools.partial(printed, at.dataset)
    rows = [*main_claims(at.dataset, cells["table1"], paper), *order_claims(cells, paper)]
    rows += count_claims(at, cells, paper)
    text = tables.table(titles, rows)
    text += "\nOurs: difference ± its standard error; shown: above two of them, in the paper's direction.\n"
    for suffix, content in ((".md", text.encode()), (".csv", [titles, *rows])):
        contract.save(folder / f"claims{suffix}", content)
    contract.say(text)
