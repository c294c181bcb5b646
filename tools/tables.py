"""The table of all sets at one IPC, a column of Table 1: the results of stage 05, the paper's beside them.

A row of Table 1 without a result is "not run". A result says where it falls short of its protocol and whether
its set has been made anew since. --results copies the complete ones to a folder that can be committed, as
<set>.json with _soft for soft labels and _<net> for another network than MiniC3D, and writes their table.

Reads:   work/<data set>/05_results/{ipc<K>,full}/<set>/<net>__<labels>__<protocol>/result.json
         the records of 01_clips and 04_distilled; tools/paper_results.csv, printed or computed from the text
Writes:  work/<data set>/tables/ipc<K>.md, ipc<K>.csv
         with --results: FOLDER/<data set>_ipc<K>/{<set>.json,table.md}, FOLDER/metrics_<data set>_ipc<K>.json
Run:     python tools/tables.py demo 5 --results
Cost:    1 s
Expect:  chance is 1 / classes; in the paper GVD is above random, herding and k-center from IPC 5 on
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import common  # noqa: E402

HARD, SOFT = ("random", "herding", "kcenter", "gvd", "full"), ("random", "gvd")  # Table 1's rows by labels
PLACE = {"random": 0, "herding": 1, "kcenter": 2, "full": 4}  # of a set's rows; generated sets: 3, by name
CSV = ("set", "labels", "net", "protocol", "top1", "std", "n", "top5", "videos", "bytes", "paper", "note")
TITLES = ("network, protocol", "top-1 % (n)", "top-5 %", "videos", "stored bytes")
NOTE = """
Last epoch; mean ± sample standard deviation over n networks. Stored bytes: the .mp4 files of a generated set,
the uint8 clips at network size of a real one. Top-1 of each network: """
MEASURED = ("measured.json", "samplers.csv", "finetune.json")  # by demo/experiments.py
OF_PAPER = "Paper: as far as its text lets it be computed, the better one of its two GVD rows.\n"


def parse_args():
    parser = contract.arguments(__file__, __doc__, common.DATASETS)
    folder = {"type": Path, "metavar": "FOLDER", "nargs": "?", "const": contract.ROOT / "results"}
    parser.add_argument("--results", **folder, help="copy complete results to FOLDER (results)")
    return contract.parse(parser)


# --- rows -------------------------------------------------------------------------------------------------


def accuracy(mean, std, n):
    """Mean ± sample standard deviation (number of networks), in percent."""
    return f"{mean:.1f}{'' if std is None else f' ± {std:.1f}'} ({n})"


def row_name(result):
    return result["set"] + ", soft labels" * (result["labels"] == "soft")


def file_name(result):
    net = "" if result["net"] == "minic3d" else f"_{result['net']}"
    return result["set"] + "_soft" * (result["labels"] == "soft") + net


def note(result):
    """What a reader must know of a result: official clips only, short of its protocol, of an older set."""
    found = ["official clips"] * (result.get("hmdb_train") == "official")
    found += [f"short of its protocol: {'; '.join(result['deviations'])}"] * (not result["complete"])
    return "; ".join(found + ["of an older set"] * result.get("older", False))


def paper_figures(dataset, ipc):
    """{row of Table 1: its top-1 % in the paper}; of all real clips at any IPC."""
    rows = contract.read(contract.ROOT / "tools" / "paper_results.csv")
    columns = (dataset, f"{dataset} ipc{ipc}")
    return {row["row"]: row["value"] for row in rows if row["table"] == "1" and row["column"] in columns}


def rows_of(results, paper):
    """The rows in the order of Table 1, {name of CSV: value}; those of Table 1 that are not run included."""
    wanted = [(name, "hard") for name in HARD] + [(name, "soft") for name in SOFT]
    there, rows = {(r["set"], r["labels"]) for r in results if r["net"] == "minic3d"}, []
    for name, labels in (key for key in wanted if key not in there):
        rows.append({"set": name, "labels": labels, "net": "minic3d", "note": "not run"})
    for result in results:
        row = {name: result[name] for name in ("set", "labels", "net", "videos", "bytes")} | result["top1"]
        row |= {"protocol": result["protocol"]["name"], "note": note(result), "top5": result["top5"]["mean"]}
        rows.append(row | {"top1": row["mean"]})
    for row in rows:
        row["paper"] = paper.get(row_name(row)) if row["net"] == "minic3d" else None
    return sorted(rows, key=lambda r: (PLACE.get(r["set"], 3), r["set"], r["net"], r["labels"]))


def markdown(dataset, ipc, results):
    paper = paper_figures(dataset, ipc)
    titles = [f"{dataset}, IPC {ipc}", *TITLES, *["paper"] * bool(paper)]
    lines, each = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"], []
    for row in rows_of(results, paper):
        cells = [row_name(row), row["net"], "not run", "-", "-", "-"]
        if "top1" in row:
            marked = f" **{row['note']}**" if row["note"] else ""
            cells[1:] = (
                f"{row['net']}, {row['protocol']}{marked}",
                accuracy(row["top1"], row["std"], row["n"]),
            )
            cells += [f"{row['top5']:.1f}", f"{row['videos']:,}", f"{row['bytes']:,}"]
            each.append(f"{row_name(row)}: " + ", ".join(f"{value:.2f}" for value in row["values"]))
        lines.append("| " + " | ".join(cells + [row["paper"] or "-"] * bool(paper)) + " |")
    text = "\n".join(lines) + "\n" + NOTE + "; ".join(each) + "\n" + OF_PAPER * bool(paper)
    return text + (f"The best method before it: {paper['best prior']}.\n" if "best prior" in paper else "")


# --- results ----------------------------------------------------------------------------------------------


def is_older(args, result, record):
    """Whether the set has been made anew since it was trained on; False where the records do not tell."""
    name, classes, ipc = result["set"], sorted(result["per_class"]), f"ipc{args.ipc}"
    windows = "windows/" * (result["protocol"]["sampling"] == "drawn")
    clips = [file for c in classes for file in (f"{windows}train/{c}.npy", f"train/{c}.csv")]
    wanted = {"training set": ("01_clips", clips) if name in PLACE else (f"04_distilled/{ipc}/{name}", None)}
    wanted["coreset"] = (f"05_coresets/{ipc}/{name}", [f"{c}.csv" for c in classes])
    for part, (folder, names) in wanted.items():
        made = contract.read(args.work_dir / args.dataset / folder / "manifest.json") or {"outputs": {}}
        files = {file: entry["sha256"] for file, entry in made["outputs"].items()}
        if names is None:  # the first --limit videos of each class
            of_class = ([n for n in sorted(files) if n.startswith(f"{c}/")] for c in classes)
            names = [n for videos in of_class for n in videos[: record["parameters"]["limit"]]]
        now = contract.digest({n: files.get(n) for n in names})
        wanted[part] = bool(files) and record["inputs"].get(part, now) != now
    return any(wanted.values())


def read_results(args):
    """[(result, its file)] at this IPC and of these classes; a damaged one is an error."""
    found, base = [], args.work_dir / args.dataset
    paths = [p for k in (f"ipc{args.ipc}", "full") for p in (base / "05_results" / k).glob("*/*/result.json")]
    for path in sorted(path for path in paths if ".old-" not in path.parent.name):
        fix = contract.command(args, "05_train_eval.py", "--train-on", path.parent.parent.name)
        try:
            source = contract.Input(args, path.parent.relative_to(base), fix)
        except contract.Missing as error:
            contract.say(f"left out, not finished: {str(error).splitlines()[0]}")
            continue
        source.check(source.outputs)
        result = contract.read(path)
        result["older"] = is_older(args, result, source.record)
        found += [(result, path)] * (sorted(result["per_class"]) == args.classes)
    return found


def collect(args, found):
    """Copies complete results of the data set's own protocol, and writes the table of all that are there."""
    folder = args.results / f"{args.dataset}_ipc{args.ipc}"
    own = "demo" if args.dataset == "demo" else "gvd"
    for result, path in found:
        name = result["protocol"]["name"]
        if not result["complete"] or result["older"] or name != own:
            contract.say(f"left out {path.parent}: {note(result) or f'protocol {name}'}")
        else:
            contract.save(folder / f"{file_name(result)}.json", path.read_bytes())
            contract.say(folder / f"{file_name(result)}.json")
    kept = [result for path in folder.glob("*.json") if "top1" in (result := contract.read(path))]
    if kept:
        contract.save(folder / "table.md", markdown(args.dataset, args.ipc, kept).encode())
    copies = {f"{args.dataset}/metrics_ipc{args.ipc}.json": f"metrics_{args.dataset}_ipc{args.ipc}.json"}
    if args.dataset == "demo":
        copies |= {f"demo/{name}": f"demo_models/{name}" for name in MEASURED}
        copies["validation/demo/settings.csv"] = "demo_models/settings.csv"
    for source, copy in copies.items():
        if (args.work_dir / source).exists():
            contract.save(args.results / copy, (args.work_dir / source).read_bytes())


def estimate(args):
    return {"tables": ("tables", 1, 1, 1e4, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"tables {contract.plan(args.estimate['tables'])}")
    folder, found = args.work_dir / args.dataset / "tables", read_results(args)
    if not found:
        what = f"{folder.with_name('05_results')}: no result at IPC {args.ipc}"
        raise contract.ContractError(what, fix=f"bash run_all.sh {args.dataset} {args.ipc}")
    results = [result for result, _ in found]
    text = markdown(args.dataset, args.ipc, results)
    rows = rows_of(results, paper_figures(args.dataset, args.ipc))
    contract.save(folder / f"ipc{args.ipc}.md", text.encode())
    contract.save(folder / f"ipc{args.ipc}.csv", [CSV, *([row.get(name) for name in CSV] for row in rows)])
    contract.say(text.rstrip())
    if args.results:
        collect(args, found)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
