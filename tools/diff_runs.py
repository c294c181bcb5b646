"""What differs between two runs: which stage first and why, each kind of artifact by class, the accuracy.

A and B are work folders, data sets' folders in them, or two folders of artifacts, such as one and its .old-1.
Why is what their records say: code, parameters, libraries, device, inputs. A file that is not as its record
says is damaged. An accuracy changes beyond its spread if the difference exceeds two combined standard errors.

Reads:   every manifest.json below A and B, and the files that it names; of other files their bytes
Writes:  nothing; --json prints one JSON object instead of text
Run:     python tools/diff_runs.py work_a work_b
         python tools/diff_runs.py work/demo/03_samples/ipc5/gvd.old-1 work/demo/03_samples/ipc5/gvd
Cost:    the time to read every file once
Expect:  exit 0: equal; 1: different; 2: no such folder, or nothing to compare
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402

import media  # noqa: E402

LEFT_OUT = ("log.txt", "manifest.json")
KINDS = {"code": "code", "parameter": "parameters", "library": "versions"}  # of reasons: part of a record
STATES = ("identical", "differ", "only in A", "only in B")  # of files
JOINED = {"max": max, "mean": statistics.fmean, "PSNR": min}  # of the files of a class; other measures: sum
ORDER = ("03_unet", "03_samples", "05_networks", "05_coresets", "05_labels", "05_results")  # not by name
SHOWN = 5  # reasons in a line


def parse_args():
    formatted = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatted)
    parser.add_argument("a", type=Path, metavar="A", help="folder")
    parser.add_argument("b", type=Path, metavar="B", help="folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    args.dry_run, args.roots = False, (args.a, args.b)
    if odd := [folder for folder in args.roots if not folder.is_dir()]:
        parser.error(f"{odd[0]} is no folder")
    args.folders = [find_folders(folder) for folder in args.roots]
    if empty := [root for root, found in zip(args.roots, args.folders, strict=True) if not found]:
        parser.error(f"nothing to compare in {empty[0]}")
    return args


# --- folders and records ----------------------------------------------------------------------------------


def find_folders(root):
    """{relative path: files' names} of the folders with a record, and "": of the files outside of them."""
    here = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    here = {p for p in here if not any(part[:1] == "." or ".old-" in part for part in p.parts)}
    folders = {p.parent.as_posix(): [] for p in here if p.name == "manifest.json"}
    for path in sorted(path for path in here if path.name not in LEFT_OUT):
        inside = next((p.as_posix() for p in path.parents if p.as_posix() in folders), "")
        folders.setdefault(inside, []).append(path.relative_to(inside or ".").as_posix())
    return folders


def reasons(a, b):
    """["parameter guidance 0.1 -> 0.3"] of two records; an input that only one of them has is an extent."""
    parts = {kind: [record.get(key, {}) for record in (a, b)] for kind, key in KINDS.items()}
    parts |= {name: [{"of": record.get(name)} for record in (a, b)] for name in ("device", "complete")}
    common = a["inputs"].keys() & b["inputs"].keys()
    parts["input"] = [{name: record["inputs"][name] for name in common} for record in (a, b)]
    found = []
    for kind, (old, new) in parts.items():
        for name in sorted({*old, *new}):
            x, y = (str(values.get(name)) for values in (old, new))
            hashed = any(re.fullmatch("[0-9a-f]{16,64}", value) for value in (x, y))
            found += [f"{kind} {name}" + ("" if hashed else f" {x} -> {y}")] if x != y else []
    return found


# --- files ------------------------------------------------------------------------------------------------


def class_of(name):
    """The class of a file: Walk of Walk.npy, train/Walk.npy, Walk/0_0.mp4."""
    path = Path(name)
    inside = len(path.parts) > 1 and path.parts[-2] not in ("train", "test", "features")
    return path.parts[-2] if inside else path.stem


def read(path):
    """What can be compared of a file: frames, an array, rows, the top-1 of a result; None of others."""
    if path.suffix == ".mp4":
        return media.read_video(path)
    if path.suffix == ".json":
        top1 = contract.read(path).get("top1")
        return None if top1 is None else np.array([top1["mean"] if isinstance(top1, dict) else top1])
    return contract.read(path) if path.suffix in (".npy", ".csv") else None


def compare(a, b):
    """{measure: value} of two files that differ, by their kind."""
    try:
        x, y = read(a), read(b)
    except (contract.ContractError, media.BadVideo):
        return {"unreadable": 1}
    if x is None or y is None:
        return {}
    if a.suffix == ".csv":
        return {"changed rows": sum(old != new for old, new in itertools.zip_longest(x, y))}
    if x.shape != y.shape:
        return {"other shape": 1}
    parts = [np.abs(np.subtract(*pair, dtype=np.float64)) for pair in zip(x, y, strict=True)]
    if a.suffix == ".mp4":
        error = np.mean(np.square(parts))
        return {"PSNR": 10 * math.log10(255**2 / error)} if error else {"same frames": 1}
    return {"max": np.max(parts), "mean": np.mean(parts)}


def compare_files(roots, hashes):
    """{kind: {class: {state or measure: value}}} of the files {name: hash} in A and in B."""
    found = {}
    for name in sorted({*hashes[0], *hashes[1]}):
        old, new = (files.get(name) for files in hashes)
        kind = found.setdefault(Path(name).suffix or name, {})
        measures = kind.setdefault(class_of(name), {state: [] for state in STATES})
        state = "identical" if old == new else "differ" if old and new else f"only in {'A' if old else 'B'}"
        measures[state].append(1)
        for measure, value in compare(*(root / name for root in roots)).items() if state == "differ" else ():
            measures.setdefault(measure, []).append(value)
    for measures in (of_class for kind in found.values() for of_class in kind.values()):
        for measure, values in measures.items():
            measures[measure] = round(JOINED.get(measure, sum)(values), 6)
    return found


def compare_folder(roots, names):
    """What differs in a folder that is in both: {} if nothing does. names: its files in A and in B."""
    hashes = [{n: contract.sha256(root / n) for n in here} for root, here in zip(roots, names, strict=True)]
    found, records = {"why": [], "damaged": []}, []
    for root in roots:
        try:
            records.append(contract.read_record(root, "rm it"))
        except contract.ContractError:
            records.append(None)
            found["damaged"].append(str(root / "manifest.json"))
    if all(records):
        found["why"] = reasons(*records)
        for root, record, files in zip(roots, records, hashes, strict=True):
            wrong = [n for n, entry in record["outputs"].items() if files.get(n) != entry["sha256"]]
            found["damaged"] += [str(root / name) for name in sorted(wrong)]
    if hashes[0] == hashes[1] and not found["why"] + found["damaged"]:
        return {}
    found["files"] = compare_files(roots, hashes)
    a, b = (files.get("result.json") for files in hashes)
    if a and b and a != b:
        found["accuracy"] = accuracy(*(contract.read(root / "result.json") for root in roots))
    return found


def accuracy(a, b):
    """The change of a result's top-1, and whether it exceeds two combined standard errors."""
    (x, y), change = (a["top1"], b["top1"]), b["top1"]["mean"] - a["top1"]["mean"]
    found = {"A": x["mean"], "B": y["mean"], "change": round(change, 4), "error": None, "beyond": None}
    if None not in (x["std"], y["std"]):
        error = math.hypot(x["std"] / x["n"] ** 0.5, y["std"] / y["n"] ** 0.5)
        found |= {"error": round(error, 4), "beyond": abs(change) > 2 * error}
    return found


# --- the report -------------------------------------------------------------------------------------------


def why(found):
    """Why a folder differs, in a line."""
    if "only in" in found:
        return f"only in {found['only in']}"
    texts = [f"{len(found['damaged'])} damaged"] * bool(found["damaged"]) + found["why"]
    more = f" and {len(texts) - SHOWN} more" * (len(texts) > SHOWN)
    return "; ".join(texts[:SHOWN]) + more or "nothing that a record knows of"


def report(found):
    """The lines of a folder that is in both."""
    yield from (f"  damaged: {name}" for name in found["damaged"])
    if a := found.get("accuracy"):
        within = {True: "beyond", False: "within", None: "a single network, without"}[a["beyond"]]
        error = "" if a["error"] is None else f" ± {a['error']:.2f}"
        yield f"  top-1 {a['A']:.2f} -> {a['B']:.2f} %: {a['change']:+.2f}{error}, {within} its spread"
    for kind, classes in found["files"].items():
        same = [c for c, counts in classes.items() if not any(counts[state] for state in STATES[1:])]
        for label in (label for label in classes if label not in same):
            values = (f"{name} {value:g}" for name, value in classes[label].items() if value)
            yield f"  {kind} {label}: {', '.join(values)}"
        if same:
            yield f"  {kind}: identical in {', '.join(same[:SHOWN])}" + " ..." * (len(same) > SHOWN)


def place(folder):
    """Sorts folders as one is made of another; files without a record come last."""
    part = folder.split("/")[0]
    return not folder, part[:2], ORDER.index(part) if part in ORDER else -1, folder


def main(args):
    (a, b), different = args.folders, {}
    for folder in sorted({*a, *b}, key=place):
        found = {"only in": "A" if folder in a else "B"}
        if folder in a and folder in b:
            found = compare_folder([root / folder for root in args.roots], (a[folder], b[folder]))
        different |= {folder: found} if found else {}
    first = next(iter(different), None)
    if args.json:
        print(json.dumps({"equal": not different, "first": first, "different": different}, indent=1))
    elif not different:
        print(f"equal: {sum(map(len, a.values())):,} files")
    else:
        print(f"first: {first or 'files without a record'}: {why(different[first])}")
        for folder, found in different.items():
            print(f"\n{folder or 'files without a record'}: {why(found)}")
            print("\n".join(report(found) if "files" in found else []))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    contract.run(parse_args, main, lambda args: {})
