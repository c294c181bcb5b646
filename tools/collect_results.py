"""Copies what a work folder has measured to results/, under the names that the README's tables are checked against.

05's results go to results/<data set>_ipc<K>/<set>.json, with _soft for soft labels and _<net> for a network that is not
MiniC3D (gvd.json, gvd_soft.json, random_cnn-gru.json); `full` stands in the folder of every IPC that has another set.
Left out are results that are not of the data set's own protocol or are short of it (their `deviations`), and folders
that were set aside. A folder that is unfinished or damaged is refused: nothing of it is copied, and the exit code is 3.

Reads:   work/<data set>/05_results/, table_ipc<K>.md, metrics_ipc<K>.json; for the demo what demo/*.py measure
Writes:  results/; what is there already is replaced, nothing is removed
Run:     python tools/collect_results.py demo
Cost:    a second
Expect:  tests/test_readme.py passes when the README says what the files say. By hand remain the contact sheet, and the
         screen and the seconds of a run of run_all.sh; the benchmarks write there themselves: --json results/bench/eval.json
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

MEASURED = {  # of the demo: below the work folder -> below results/demo_models
    "demo/measured.json": "measured.json",
    "demo/samplers.csv": "samplers.csv",
    "demo/finetune.json": "finetune.json",
    "validation/demo/settings.csv": "settings.csv",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(common.DATASETS), help="data set")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="folder of the artifacts (work)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the copies go (results)")
    args = parser.parse_args()
    args.data_root, args.seed, refused = Path("data"), 0, []
    protocol = "demo" if args.dataset == "demo" else "gvd"

    def copy(source, *target):
        if source.is_file():
            with contract.atomic(args.results.joinpath(*target)) as handle:
                handle.write(source.read_bytes())
            print(Path(*target))

    def copy_results(sets, ipc):
        """Copies the results of the sets (a pattern below 05_results) to the folder of an IPC; returns how many."""
        count = 0
        for folder in sorted(contract.work_folder(args, "05_results").glob(f"{sets}/*__{protocol}")):
            try:
                contract.read_folder(folder, args, f"python 05_train_eval.py {args.dataset} ...")
            except contract.ContractError as error:
                refused.append(str(error))
                continue
            result = contract.read_json(folder / "result.json")
            if not result["complete"]:
                print(f"left out {folder.relative_to(args.work_dir)}: {'; '.join(result['deviations'])}")
                continue
            soft, net = "_soft" * (result["labels"] == "soft"), "" if result["net"] == "minic3d" else f"_{result['net']}"
            copy(folder / "result.json", f"{args.dataset}_{ipc}", f"{result['set']}{soft}{net}.json")
            count += 1
        return count

    for path in sorted(contract.work_folder(args, "05_results").glob("ipc*")):
        ipc = path.name
        if copy_results(f"{ipc}/*", ipc):
            copy_results("full/full", ipc)
            copy(contract.work_folder(args, f"table_{ipc}.md"), f"{args.dataset}_{ipc}", "table.md")
        copy(contract.work_folder(args, f"metrics_{ipc}.json"), f"metrics_{args.dataset}_{ipc}.json")
    for name, target in MEASURED.items() if args.dataset == "demo" else ():
        copy(args.work_dir / name, "demo_models", target)
    if refused:
        raise contract.ContractError("\n".join(dict.fromkeys(refused)))


if __name__ == "__main__":
    contract.run(main)
