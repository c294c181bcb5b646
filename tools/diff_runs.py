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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402

import media  # noqa: E402

LEFT_OUT = ("log.txt", "manifest.json")
KINDS = {"code": "code", "parameter": "parameters", "library": "versions"}  # of reasons: part of a record
STATES = ("identical", "differ", "only in A", "only in B")  # of files
SHOWN = 5  # reasons in a line


def parse_args():
    formatted = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatted)
    parser.add_argument("a", type=Path, metavar="A", help="folder")
    parser.add_argument("b", type=Path, metavar="B", help="folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    for folder in (args.a, args.b):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    args.dry_run = False
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
    found, inputs = [], {*a["inputs"]} & {*b["inputs"]}
    parts = {kind: [record.get(key, {}) for record in (a, b)] for kind, key in KINDS.items()}
    for name in ("device", "complete"):
        parts[name] = [{"of": record.get(name)} for record in (a, b)]
    parts["input"] = [{name: record["inputs"][name] for name in inputs} for record in (a, b)]
    for kind, (old, new) in parts.items():
        for name in (name for name in sorted({*old, *new}) if old.get(name) != new.get(name)):
            values = str(old.get(name)), str(new.get(name))
            hashed = any(re.fullmatch("[0-9a-f]{16,64}", value) for value in values)
            found.append(f"{kind} {name}" + ("" if hashed else " {} -> {}".format(*values)))
    return found


# --- files ------------------------------------------------------------------------------------------------


def class_of(name):
    """The class of a file: Walk of Walk.npy, train/Walk.npy, Walk/0_0.mp4."""
    path = Path(name)
    inside = len(path.parts) > 1 and path.parts[-2] not in ("train", "test", "features")
    return path.parts[-2] if inside else path.stem


def compare(a, b):
    """{measure: value} of two files that differ, by their kind."""
    try:
        if a.suffix == ".mp4":
            x, y = (media.read_video(path) for path in (a, b))
        elif a.suffix == ".npy":
            x, y = contract.read(a), contract.read(b)
        elif a.suffix == ".csv":
            rows = itertools.zip_longest(contract.read(a), contract.read(b))
            return {"changed rows": sum(old != new for old, new in rows)}
        elif a.suffix == ".json":
            x, y = (np.array(top1(contract.read(path)) or []) for path in (a, b))
        else:
            return {}
    except (contract.ContractError, media.BadVideo):
        return {"unreadable": 1}
    if x.shape != y.shape:
        return {"other shape": 1}
    pairs = zip(np.atleast_1d(x), np.atleast_1d(y), strict=True)
    parts = [np.abs(np.subtract(*pair, dtype=np.float64)) for pair in pairs]
    if a.suffix == ".mp4":
        error = np.mean([np.square(part).mean() for part in parts])
        return {"PSNR": 10 * math.log10(255**2 / error)} if error else {"same frames": 1}
    return {"max": max(p.max() for p in parts), "mean": np.mean([p.mean() for p in parts])} if parts else {}


def top1(value):
    """Top-1 of a JSON file of 05 or of the scores."""
    found = value.get("top1") if isinstance(value, dict) else None
    return found["mean"] if isinstance(found, dict) else found


def add(counts, measured):
    """Adds a file's measures to those of its class: sums, the largest max, the mean mean, the least PSNR."""
    for name, value in measured.items():
        n, old = counts["differ"], counts.get(name, value)
        joined = {"max": max(old, value), "mean": old + (value - old) / n, "PSNR": min(old, value)}
        counts[name] = round(joined.get(name, counts.get(name, 0) + value), 6)


def compare_folder(args, folder, names):
    """What differs in a folder that is in both: {} if nothing does. names: its files in A and in B."""
    found, hashes = {"why": [], "damaged": [], "files": {}}, []
    for root, here in zip((args.a, args.b), names, strict=True):
        hashes.append({name: contract.sha256(root / folder / name) for name in here})
        outputs = (contract.read_record(root / folder, "rm it") or {"outputs": {}})["outputs"]
        bad = [name for name, entry in outputs.items() if hashes[-1].get(name) != entry["sha256"]]
        found["damaged"] += [str(root / folder / name) for name in sorted(bad)]
    if folder:
        found["why"] = reasons(*(contract.read_record(root / folder, "rm it") for root in (args.a, args.b)))
    same = True
    for name in sorted({*hashes[0], *hashes[1]}):
        old, new = (of_root.get(name) for of_root in hashes)
        kind = found["files"].setdefault(Path(name).suffix or name, {})
        counts = kind.setdefault(class_of(name), dict.fromkeys(STATES, 0))
        state = "identical" if old == new else "differ" if old and new else f"only in {'A' if old else 'B'}"
        counts[state] += 1
        same = same and state == "identical"
        if state == "differ":
            paths = [root / folder / name for root in (args.a, args.b)]
            add(counts, compare(*paths))
            if paths[0].name == "result.json":
                found["accuracy"] = accuracy(*map(contract.read, paths))
    return {} if same and not found["why"] + found["damaged"] else found


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
    lines = [f"  damaged: {name}" for name in found["damaged"]]
    if a := found.get("accuracy"):
        within = {True: "beyond", False: "within", None: "a single network, without"}[a["beyond"]]
        error = "" if a["error"] is None else f" ± {a['error']:.2f}"
        change = f"{a['A']:.2f} -> {a['B']:.2f} %: {a['change']:+.2f}{error}"
        lines.append(f"  top-1 {change}, {within} its spread")
    for kind, classes in found["files"].items():
        for label, counts in classes.items():
            values = ", ".join(f"{name} {value:g}" for name, value in counts.items() if value)
            if values.split(" ")[0] != "identical" or "," in values:
                lines.append(f"  {kind} {label}: {values}")
        same = [c for c, counts in classes.items() if sum(counts.values()) == counts["identical"]]
        if same:
            lines.append(f"  {kind}: identical in {', '.join(same[:SHOWN])}" + " ..." * (len(same) > SHOWN))
    return lines


def main(args):
    a, b = find_folders(args.a), find_folders(args.b)
    if not a or not b:
        print(f"error: nothing to compare in {args.b if a else args.a}", file=sys.stderr)
        sys.exit(2)
    different = {}
    for folder in sorted({*a, *b}, key=lambda name: (name == "", name)):
        if folder in a and folder in b:
            found = compare_folder(args, folder, (a[folder], b[folder]))
        else:
            found = {"only in": "A" if folder in a else "B"}
        different |= {folder: found} if found else {}
    first = next(iter(different), None)
    if args.json:
        print(json.dumps({"equal": not different, "first": first, "different": different}, indent=1))
    elif not different:
        print(f"equal: {sum(map(len, a.values())):,} files")
    else:
        print(f"first: {first or 'files without a record'}: {why(different[first])}")
    for folder, found in different.items() if not args.json else ():
        print(f"\n{folder or 'files without a record'}: {why(found)}")
        print("\n".join(report(found) if "files" in found else []))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    contract.run(parse_args, main, lambda args: {})
