"""The results of stage 05 in one list; with an IPC as a table, a column of Table 1, the paper's beside them.

A row of Table 1 without a result is "not run". A result says where it falls short of its protocol, whether
its set has been made anew since, and how its set was made otherwise than by default. --results copies the
complete ones to a folder that can be committed, as <set>.json with _soft for soft labels and _<net> for
another network than MiniC3D, and writes their table.

Reads:   work/<data set>/05_results/{ipc<K>,full}/<set>/<net>__<labels>__<protocol>/result.json
         the records of 01_clips, 04_distilled, 03_unet; mp4_bytes.json of tools/mp4_bytes.py
         tools/paper_results.csv, printed, computed from the paper's text, or recalled
Writes:  work/<data set>/tables/results.csv, of which tools/paper_tables.py makes the paper's tables
         with an IPC instead: ipc<K>.md, ipc<K>.csv
         --results: FOLDER/<data set>_ipc<K>/{<set>.json,<set>_loss.csv,table.md}, FOLDER/metrics_*.json;
         without an IPC of every IPC, and all of work/<data set>/tables in FOLDER/<data set>_tables/
Run:     python tools/tables.py demo
         python tools/tables.py demo 5 --results
Cost:    1 s
Expect:  chance is 1 / classes; in the paper GVD is above random, herding and k-center from IPC 5 on
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import common  # noqa: E402
import media  # noqa: E402

TABLE1 = [(name, "hard") for name in ("random", "herding", "kcenter", "gvd", "full")]  # set, labels
TABLE1 += [(name, "soft") for name in ("random", "gvd")]
PLACE = {"random": 0, "herding": 1, "kcenter": 2, "full": 4}  # of a set's rows; generated sets: 3, by name
CSV = ("set", "labels", "net", "protocol", "top1", "std", "n", "top5", "videos", "bytes", "paper", "note")
LIST = ("ipc", *CSV[:10], "mp4_bytes", "note", "making")  # columns of results.csv
TITLES = ("network, protocol", "top-1 % (n)", "top-5 %", "videos", "stored bytes")
NOTE = """
Last epoch; mean ± sample standard deviation over n networks. Stored bytes: the .mp4 files of a generated set,
the uint8 clips at network size of a real one, the float32 values of a learnt one. Top-1 of each network: """
OF_PAPER = "Paper: printed, or as it is marked; of its two GVD rows the better one.\n"
MEASURED = ("demo/measured.json", "demo/finetune.json", "validation/demo/*.csv", "sets/demo/*.csv")
DEFAULTS = {  # of each stage; what else a set was made with is listed
    "02_prototypes": {"cluster": "direct", "distance": "euclidean", "seed": 0},
    "03_samples": {
        "sampler": "gvd", "scheduler": "ddim", "steps": 50, "cfg": 9.0, "guidance": 0.1, "stop": 0.5,
        "guidance_form": "ddim", "decay": "linear", "strength": 0.7, "seed": 0},
    "04_distilled": {"pattern": "4x4", "frames": "random", "grouping": "random", "seed": 0}}  # fmt: skip
FINE_TUNED = ("hmdb51", "miniucf")  # by default, before stage 03
DEMO_DEFAULTS = {"steps": 25, "cfg": 2.0}  # of 03


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc="?")
    folder = {"type": Path, "metavar": "FOLDER", "nargs": "?", "const": contract.ROOT / "results"}
    parser.add_argument("--results", **folder, help="copy complete results to FOLDER (results)")
    return contract.parse(parser)


# --- for the other tools too ------------------------------------------------------------------------------


def table(titles, rows):
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def paper_cells():
    """{(table, row, column): the paper's figure, as part of a cell of tools/paper_tables.py}."""
    rows = contract.read(contract.ROOT / "tools" / "paper_results.csv")
    named = {"paper": "value", "paper_std": "std", "mark": "mark"}
    return {(r["table"], r["row"], r["column"]): {key: r[n] for key, n in named.items()} for r in rows}


def hashes(folder):
    """{file: sha256} of what the record of a folder names; {} without a record."""
    record = contract.read(folder / "manifest.json") or {"outputs": {}}
    return {name: entry["sha256"] for name, entry in record["outputs"].items()}


def set_hash(folder, classes, limit=None, ending=".mp4"):
    """Hash of a set, as stage 05 and tools/metrics.py record on what they worked; None without a record."""
    files = hashes(folder)
    if "set.json" in files:  # of arrays
        names = ["set.json", *(f"{c}.npy" for c in classes)]
    else:
        videos = sorted(name for name in files if name.endswith(ending))
        names = [n for c in classes for n in [v for v in videos if v.startswith(f"{c}/")][:limit]]
    return contract.digest({n: files.get(n) for n in names}) if names else None


# --- results ----------------------------------------------------------------------------------------------


def is_older(args, result, record):
    """Whether the set has been made anew since it was trained on; False where the records do not tell."""
    base, place = args.work_dir / args.dataset, f"ipc{result['ipc']}/{result['set']}"
    limit = record["parameters"]["limit"]
    now = {"training set": set_hash(base / "04_distilled" / place, args.classes, limit)}
    if result["set"] in PLACE:
        windows = "windows/" * (result["protocol"]["sampling"] == "drawn")
        clips = [file for c in args.classes for file in (f"{windows}train/{c}.npy", f"train/{c}.csv")]
        wanted = {"training set": ("01_clips", clips)}
        wanted["coreset"] = (f"05_coresets/{place}", [f"{c}.csv" for c in args.classes])
        for part, (folder, names) in wanted.items():
            files = hashes(base / folder)
            now[part] = contract.digest({n: files.get(n) for n in names}) if files else None
    return any(h not in (None, record["inputs"].get(part, h)) for part, h in now.items())


def read_results(args):
    """Results of these classes, at args.ipc and of all clips; at every IPC without one.

    A result gains `ipc` (None: all clips), `path` and `older`. A damaged one is an error.
    """
    found, base, groups = [], args.work_dir / args.dataset, ("full", f"ipc{args.ipc or '*'}")
    paths = [p for group in groups for p in (base / "05_results").glob(f"{group}/*/*/result.json")]
    for path in sorted(path for path in paths if ".old-" not in path.parent.name):
        group, name = path.parts[-4:-2]
        ipc = int(group[3:]) if group != "full" else None
        here = argparse.Namespace(**vars(args) | {"ipc": ipc})
        fix = contract.command(here, "05_train_eval.py", "--train-on", name)
        try:
            source = contract.Input(args, path.parent.relative_to(base), fix)
        except contract.Missing as error:
            contract.say(f"left out, not finished: {str(error).splitlines()[0]}")
            continue
        source.check(source.outputs)
        result = contract.read(path) | {"ipc": ipc, "path": path}
        if sorted(result["per_class"]) == args.classes:
            found.append(result | {"older": is_older(args, result, source.record)})
    return found


def note(result):
    """What a reader must know of a result: official clips only, short of its protocol, of an older set."""
    found = ["official clips"] * (result.get("hmdb_train") == "official")
    found += [f"short of its protocol: {'; '.join(result['deviations'])}"] * (not result["complete"])
    return "; ".join(found + ["of an older set"] * result.get("older", False))


def making(result, dataset, unet):
    """How the set of a result was made otherwise than by default: ["guidance 0.3", "another U-Net"].

    unet: the hash of the U-Net that stage 03 takes by default, None if it is not known.
    """
    made, found = result.get("provenance", {}), []
    if "04_distilled" not in made and result["set"] not in PLACE:
        return ["unknown making"]
    for step, usual in DEFAULTS.items():
        usual = usual | (DEMO_DEFAULTS if (step, dataset) == ("03_samples", "demo") else {})
        used = {key: value for key, value in made.get(step, {}).items() if value is not None}
        found += [f"{key} {used[key]}" for key in usual if used.get(key, usual[key]) != usual[key]]
        found += [f"--set {used.get('set')}"] * ("set" in used)  # of a baseline
        found += ["another U-Net"] * (unet is not None and used.get("unet", unet) != unet)
    size, usual = made.get("03_samples", {}).get("size"), media.DATASETS.get(dataset, {}).get("size")
    found += [f"size {size}"] * (None not in (size, usual) and tuple(size) != usual)
    return list(dict.fromkeys(found))


def own_unet(args):
    """The hash, as stage 03 records it, of the U-Net that it takes by default.

    None if that is not known, "" of one that is to be fine-tuned and is not here.
    """
    if args.dataset == "demo":
        folder = Path(args.model or common.DEMO_MODEL) / "unet"
        return common.folder_hash(folder) if folder.is_dir() else None
    if args.dataset not in FINE_TUNED:
        return None
    files = hashes(args.work_dir / args.dataset / "03_unet/default")
    names = {"config.json", "diffusion_pytorch_model.safetensors"}
    return contract.digest({n: files[n] for n in names}) if names <= {*files} else ""


def mp4_bytes(args, result):
    """Bytes of a set as .mp4 at network size, for each kind of set alike; None where they are not measured.

    Of real clips: of those that each repeat took, their mean.
    """
    measured = contract.read(args.work_dir / args.dataset / "mp4_bytes.json")
    if measured is None:
        return None
    if result["set"] not in PLACE:
        name = f"ipc{result['ipc']}/{result['set']}"
        found = measured["sets"].get(name, {"made of": None})
        now = set_hash(args.work_dir / args.dataset / "04_distilled" / name, args.classes)
        return found["bytes"] if now and now == found["made of"] else None
    sizes = {(c, name): size for c, of_class in measured["real"].items() for name, size in of_class.items()}
    if result["ipc"] is None:
        return sum(sizes.values()) if {*measured["real"]} == {*args.classes} else None
    clips = [contract.read(file)["clips"] for file in sorted(result["path"].parent.glob("repeat_*.json"))]
    taken = [sizes.get((c, name)) for chosen in clips for c in chosen for name in chosen[c]]
    return None if None in taken else sum(taken) / len(clips)


# --- rows -------------------------------------------------------------------------------------------------


def row_name(result):
    return result["set"] + ", soft labels" * (result["labels"] == "soft")


def file_name(result):
    net = "" if result["net"] == "minic3d" else f"_{result['net']}"
    return result["set"] + "_soft" * (result["labels"] == "soft") + net


def row_of(result):
    """{column of CSV: value}, and the top-1 of each network as `values`."""
    row = {name: result[name] for name in ("set", "labels", "net", "videos", "bytes")} | result["top1"]
    row |= {"top1": row["mean"], "top5": result["top5"]["mean"]}
    return row | {"protocol": result["protocol"]["name"], "note": note(result)}


def rows_of(results, paper):
    """The rows in the order of Table 1; those of Table 1 that are not run included. paper: {row: top-1}."""
    there = {(r["set"], r["labels"]) for r in results if r["net"] == "minic3d"}
    missing = [key for key in TABLE1 if key not in there]
    rows = [{"set": s, "labels": labels, "net": "minic3d", "note": "not run"} for s, labels in missing]
    rows += [row_of(result) for result in results]
    for row in rows:
        row["paper"] = paper.get(row_name(row)) if row["net"] == "minic3d" else None
    return sorted(rows, key=lambda r: (PLACE.get(r["set"], 3), r["set"], r["net"], r["labels"]))


def paper_figures(dataset, ipc):
    """{row of Table 1: its top-1 % in the paper, marked if not printed}; of all real clips at any IPC."""
    columns, found = (dataset, f"{dataset} ipc{ipc}"), {}
    for (number, row, column), cell in paper_cells().items():
        if number == "1" and column in columns:
            found[row] = cell["paper"] + f" ({cell['mark']})" * (cell["mark"] != "printed")
    return found


def accuracy(mean, std, n):
    """Mean ± sample standard deviation (number of networks), in percent."""
    return f"{mean:.1f}{'' if std is None else f' ± {std:.1f}'} ({n})"


def markdown(dataset, ipc, results):
    """Table 1's column."""
    paper, lines, each = paper_figures(dataset, ipc), [], []
    for row in rows_of(results, paper):
        cells = [row_name(row), row["net"], "not run", "-", "-", "-"]
        if "top1" in row:
            marked = f" **{row['note']}**" if row["note"] else ""
            top1 = accuracy(row["top1"], row["std"], row["n"])
            cells[1:] = f"{row['net']}, {row['protocol']}{marked}", top1, f"{row['top5']:.1f}"
            cells += [f"{row['videos']:,}", f"{row['bytes']:,}"]
            each.append(f"{row_name(row)}: " + ", ".join(f"{value:.2f}" for value in row["values"]))
        lines.append([*cells, *[row["paper"] or "-"] * bool(paper)])
    text = table([f"{dataset}, IPC {ipc}", *TITLES, *["paper"] * bool(paper)], lines)
    text += NOTE + "; ".join(each) + "\n" + OF_PAPER * bool(paper)
    return text + (f"The best method before it: {paper['best prior']}.\n" if "best prior" in paper else "")


# --- files ------------------------------------------------------------------------------------------------


def collect(args, ipc, results):
    """Copies complete results of the data set's own protocol, and writes the table of all that are there."""
    folder = args.results / f"{args.dataset}_ipc{ipc}"
    own = "demo" if args.dataset == "demo" else "gvd"
    for result in results:
        path, name = result["path"], result["protocol"]["name"]
        if not result["complete"] or result["older"] or name != own:
            contract.say(f"left out {path.parent}: {note(result) or f'protocol {name}'}")
        else:
            contract.save(folder / f"{file_name(result)}.json", path.read_bytes())
            contract.say(folder / f"{file_name(result)}.json")
            curve = args.work_dir / args.dataset / f"04_distilled/ipc{ipc}" / result["set"] / "loss.csv"
            if curve.exists():  # of a baseline
                contract.save(folder / f"{result['set']}_loss.csv", curve.read_bytes())
    kept = [result for path in folder.glob("*.json") if "top1" in (result := contract.read(path))]
    if kept:
        contract.save(folder / "table.md", markdown(args.dataset, ipc, kept).encode())
    copies = {f"{args.dataset}/metrics_ipc{ipc}.json": f"metrics_{args.dataset}_ipc{ipc}.json"}
    if args.dataset == "demo":  # by demo/experiments.py
        found = [path for name in MEASURED for path in args.work_dir.glob(name)]
        copies |= {path.relative_to(args.work_dir): f"demo_models/{path.name}" for path in found}
    for source, copy in copies.items():
        if (args.work_dir / source).exists():
            contract.save(args.results / copy, (args.work_dir / source).read_bytes())


def estimate(args):
    return {"tables": ("tables", 1, 1, 1e4, "one CPU core")}


def main(args):
    if args.dry_run:
        return contract.say(f"tables {contract.plan(args.estimate['tables'])}")
    folder, results = args.work_dir / args.dataset / "tables", read_results(args)
    if not results:
        what = f"{folder.with_name('05_results')}: no result" + f" at IPC {args.ipc}" * bool(args.ipc)
        raise contract.ContractError(what, fix=f"bash run_all.sh {args.dataset} {args.ipc or 'all'}")
    if args.ipc:
        text = markdown(args.dataset, args.ipc, results)
        rows = rows_of(results, paper_figures(args.dataset, args.ipc))
        contract.save(folder / f"ipc{args.ipc}.md", text.encode())
        contract.save(folder / f"ipc{args.ipc}.csv", [CSV, *([row.get(n) for n in CSV] for row in rows)])
        contract.say(text.rstrip())
    else:
        unet, rows = own_unet(args), []
        for result in results:
            row = row_of(result) | {"ipc": result["ipc"], "mp4_bytes": mp4_bytes(args, result)}
            row["making"] = "; ".join(making(result, args.dataset, unet))
            rows.append([row[name] for name in LIST])
        contract.save(folder / "results.csv", [LIST, *rows])
        contract.say(f"{folder / 'results.csv'}: {len(rows)} results")
    if args.results:
        for ipc in [args.ipc] if args.ipc else sorted({r["ipc"] for r in results} - {None}):
            collect(args, ipc, [r for r in results if r["ipc"] in (ipc, None)])
        for path in sorted(folder.glob("*.*")) if not args.ipc else ():
            contract.save(args.results / f"{args.dataset}_tables" / path.name, path.read_bytes())


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
