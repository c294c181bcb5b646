"""The table of claims: each figure that the paper states, ours, and whether it is shown.

A difference is shown if it exceeds two combined standard errors in the paper's direction: of n networks, or
of a share of n videos. A single network, and the metrics of a single set, are only "higher" or "not higher".
A figure of one data set is judged on that data set alone. What is not shown stays in the table.

Reads:   work/<data set>/tables/<name>.csv of tools/paper_tables.py; 01_clips/{train,test}/<class>.csv
         tools/paper_results.csv
Writes:  work/<data set>/tables/claims.md, claims.csv
Run:     python tools/claims.py demo
Cost:    1 s
Expect:  shown, not shown or not run
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import media  # noqa: E402

OWN = ("gvd", "gvd, soft labels")
PRIOR = ("random", "herding", "kcenter", "dm", "mtt", "frepo", "static_dc", "dm+d", "mtt+d", "frepo+d")
ORDERS = (  # claim, table, the higher row, the lower row, columns ("": all), the paper's figures
    ("GVD above naive", "fig7a", "gvd", "naive", "", ()),
    ("GVD above K-Noise", "fig7a", "gvd", "knoise", "", ()),
    ("decay helps", "fig7b", "gvd", "gvd without decay", "", ("decay gain, at least",)),
    ("composition helps", "fig7c", "gvd", "gvd without composition", "", ("composition gain",)),
    ("soft labels help", "fig7c", "gvd, soft labels", "gvd", "", ()),
    ("K-Noise above Dancing", "fig7d", "knoise", "dancing", "", ("knoise", "dancing")),
    (
        "GVD above K-Noise",
        "fig7d",
        "gvd before composition",
        "knoise",
        "",
        ("gvd before composition", "knoise"),
    ),
    ("composed above not", "fig7d", "gvd", "gvd before composition", "", ("gvd", "gvd before composition")),
    ("real above GVD", "fig7d", "real", "gvd", "", ("real", "gvd")),
    ("lambda 0.1 above 0.01", "fig10", "lambda 0.1", "lambda 0.01", "", ("lambda, best", "lambda 0.01")),
    ("lambda 0.1 above 1", "fig10", "lambda 0.1", "lambda 1", "", ("lambda, best", "lambda, too large")),
    ("stop 0.5 above 0.25", "fig10", "stop 0.5", "stop 0.25", "", ("stop, best", "stop, lower")),
    ("stop 0.5 above 0.75", "fig10", "stop 0.5", "stop 0.75", "", ("stop, best", "stop, higher")),
    ("random frames above continuous", "table4", "random", "continuous", "4x4", ()),
    ("GVD above Dancing", "table2", "gvd", "mtt+d", "cnn", ()),
    ("GVD above K-Noise", "table3", "gvd", "knoise", "", ()),
    ("K-Noise above Dancing", "table3", "knoise", "mtt+d", "", ()),
)


def parse_args():
    return contract.parse(contract.arguments(__file__, __doc__, media.find_data_set, ipc=False))


def read_tables(folder):
    """{table: {(row, column): (value, standard error or None, marks) or why there is none}}."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        if "value" not in (lines := contract.read(path))[0]:
            continue
        for line in lines:
            value, n = line["value"] and float(line["value"]), int(line["n"] or 0)
            error = float(line["std"]) / math.sqrt(n) if line["std"] else None
            if path.stem in ("fig7d", "fig10") and value != "":  # a share of n videos, in percent
                error = math.sqrt(value * (100 - value) / n)
            cell = line["note"] if value == "" else (value, error, line["note"])
            found.setdefault(path.stem, {})[line["row"], line["column"]] = cell
    return found


def judge(higher, lower):
    """(ours, verdict) of two cells, of which the paper has the first higher."""
    if missing := [cell for cell in (higher, lower) if not isinstance(cell, tuple)]:
        return "-", f"not run: {missing[0]}"
    difference = higher[0] - lower[0]
    marked = ", of marked results" * bool(higher[2] or lower[2])
    if None in (higher[1], lower[1]):
        return f"{difference:+.4g}", f"{'higher' if difference > 0 else 'not higher'}, no spread{marked}"
    error = math.hypot(higher[1], lower[1])
    return f"{difference:+.1f} ± {error:.1f}", ("shown" if difference > 2 * error else "not shown") + marked


def best(table, keys):
    """(key, cell) of the highest of the cells that are there; the first of them without any."""
    there = [key for key in keys if isinstance(table.get(key), tuple)]
    key = max(there, key=lambda key: table[key][0]) if there else [*keys, ("none", "")][0]
    return key, table.get(key, "no such row")


def main_claims(dataset, table1, printed):
    """Of Table 1: the gain over the best method before, and the accuracy relative to all clips."""
    rows = []
    columns = {c: int(c.split()[-1]) for row, c in table1 if row == "gvd" and c.startswith(f"{dataset} ")}
    for column, ipc in columns.items():
        pair = [best(table1, [(row, column) for row in group]) for group in (OWN, PRIOR)]
        if (dataset, ipc) == ("miniucf", 1):  # the paper: GVD is below
            pair = pair[::-1]
        text = f"table1: best of ours and before, {' above '.join(key[0] for key, _ in pair)}, IPC {ipc}"
        paper = printed("gain over best prior", f" ipc{ipc}")
        rows.append((text, paper, *judge(*(cell for _, cell in pair))))
    if not columns:
        return rows
    full, (_, top) = table1.get(("full", column), "no such row"), best(table1, [(row, column) for row in OWN])
    missing = next((cell for cell in (top, full) if not isinstance(cell, tuple)), None)
    ours, verdict, paper = "-", f"not run: {missing}", printed("accuracy relative to full")
    if missing is None:
        relative, error = 100 * top[0] / full[0], 100 * (top[1] or 0) / full[0]
        ours, verdict = f"{relative:.2f} ± {error:.2f}", "another data set"
        if " " not in paper and columns[column] == 20:
            verdict = "shown" if relative + 2 * error >= float(paper) else "not shown"
    rows.append((f"accuracy relative to full, %, {column}", paper, ours, verdict))
    return rows


def order_claims(tables, printed):
    """Of the other tables: which row is above which."""
    rows = []
    for claim, name, higher, lower, part, stated in ORDERS:
        table = tables.get(name, {})
        columns = [c for row, c in table if row == higher and part in c and " - " not in c]
        for column in columns:
            paper = " / ".join(printed(row, table=name) for row in stated) or "-"
            if name == "table3":
                names, metric = (higher, lower.replace("mtt+d", "dancing")), " " + column.split("_")[0]
                paper = " / ".join(printed(row, metric, name[5:]) for row in names)
            elif stated and name in ("fig7b", "fig7c"):
                paper = printed(stated[0])
            pair = (table.get((row, column), "no such row") for row in (higher, lower))
            rows.append((f"{name}: {claim}" + f", {column}" * (column != "score"), paper, *judge(*pair)))
    for name, own in (("table4", ("random", "4x4")), ("fig9", ("direct", "top-1"))):
        table = tables.get(name, {})
        other, cell = best(table, [key for key in table if key != own])
        text = f"{name}: {' '.join(own)} above the best other, {' '.join(other)}"
        rows.append((text, "-", *judge(table.get(own, "no such row"), cell)))
    return rows


def equal(ours, paper, digits=0):
    """A figure that is printed and must come out the same."""
    if ours is None or " " in paper:
        return ("-", "not run") if ours is None else (f"{ours:,.{digits}f}", "another data set")
    same = f"{ours:.{digits}f}" == f"{float(paper):.{digits}f}"
    return f"{ours:,.{digits}f}", "shown" if same else "not shown"


def count_claims(args, tables, printed):
    """Of the data set and the machine: clips, frames, memory."""
    base = args.work_dir / args.dataset
    paths = [base / f"01_clips/{part}/{c}.csv" for part in ("train", "test") for c in args.classes]
    clips = sum(len(contract.read(p)) for p in paths) if all(p.exists() for p in paths) else None
    metrics = sorted(base.glob("metrics_ipc*.json"))
    frames = contract.read(metrics[0])["frames"]["frames of all training clips"] if metrics else None
    kept = tables.get("table1_frames", {}).get(("each distilled set", f"{args.dataset} IPC 20"), None)
    kept = kept[0] if isinstance(kept, tuple) else None
    figures = {"videos": clips, "classes": len(args.classes), "training frames": frames, "frames kept": kept}
    rows = []
    for name, value in figures.items():
        paper, digits = printed(name), 2 if name == "frames kept" else 0
        rows.append((name + ", IPC 20, %" * (name == "frames kept"), paper, *equal(value, paper, digits)))
    memory = {k[1]: cell for k, cell in tables.get("efficiency", {}).items() if k[0].startswith("peak")}
    values = [cell[0] for cell in memory.values() if isinstance(cell, tuple)]
    verdict = f"not run: {next(iter(memory.values()), 'no table')}"
    if len(values) > 1:
        verdict = "shown" if max(values) <= 1.05 * min(values) else "not shown"
    text = " / ".join(f"{v:.2f}" for v in values) or "-"
    claim = "the same peak memory at every IPC (to 5 %), GB"
    return [*rows, (claim, printed("GPU memory, GB"), text, verdict)]


def estimate(args):
    return {"claims": ("tables", 1, 1, 1e4, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"claims {contract.plan(args.estimate['claims'])}")
    folder = args.work_dir / args.dataset / "tables"
    if not (tables := read_tables(folder) if (folder / "table1.csv").exists() else None):
        fix = contract.command(args, "tools/paper_tables.py")
        raise contract.Missing(f"{folder / 'table1.csv'} is missing", "the paper's tables", fix=fix)
    paper = contract.read(contract.ROOT / "tools" / "paper_results.csv")

    def printed(row, ipc="", table="claims"):
        """The paper's figure for this data set; those of others with their names."""
        lines = [line for line in paper if (line["table"], line["row"]) == (table, row)]
        found = {line["column"]: line["value"] for line in lines if line["column"].endswith(ipc)}
        others = [f"{value} {column.removesuffix(ipc)}" for column, value in found.items()]
        return found.get(args.dataset + ipc) or ", ".join(others) or "-"

    rows = main_claims(args.dataset, tables["table1"], printed) + order_claims(tables, printed)
    rows += count_claims(args, tables, printed)
    titles = ("claim", "paper", "ours", "verdict")
    lines = [titles, ["---"] * 4, *rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    text += "\nOurs: difference ± its standard error; shown: above two of them, in the paper's direction.\n"
    contract.save(folder / "claims.md", text.encode())
    contract.save(folder / "claims.csv", [titles, *rows])
    contract.say(text)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
