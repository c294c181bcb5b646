"""Coresets: as many real clips as a distilled set has, chosen by features of a network (Table 1).

The features are those of the network that was trained on all real clips, its last block's output. Per class:

  herding  the clips, chosen one after the other, whose sum follows the mean of the class (Welling, 2009)
  kcenter  the clip nearest to the mean, then always the one farthest from those chosen (Gonzalez, 1985)

Reads:   work/<data set>/05_networks/minic3d__<protocol>/features/<class>.npy float32 [n, D], <class>.csv
Writes:  work/<data set>/05_coresets/ipc<K>/{herding,kcenter}/<class>.csv: names of clips, in order of choice
Run:     python tools/coresets.py demo 5       # after 05_train_eval.py demo --train-on full --save
         python 05_train_eval.py demo 5 --train-on herding
Cost:    1 s; hmdb51 10 s
Expect:  K clips of each class, none twice
Differs: without replacement; k-center by true distances, where the released code's formula differs from K = 3
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import media  # noqa: E402


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    parser.add_argument("--protocol", help="of the network that gives the features (gvd; demo: demo)")
    args = contract.parse(parser)
    args.protocol = args.protocol or ("demo" if args.dataset == "demo" else "gvd")
    return args


def herding(features, count):
    """Rows of `count` of the features [n, D]: always the one nearest to k * mean - sum of those before."""
    mean, total, chosen = features.mean(0), np.zeros_like(features[0]), []
    for k in range(1, count + 1):
        distances = np.linalg.norm(k * mean - total - features, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))  # the first of equals
        total = total + features[chosen[-1]]
    return chosen


def kcenter(features, count):
    """Rows of `count` of the features [n, D]: the nearest to the mean, then the farthest from its centre."""
    chosen = [int(np.linalg.norm(features - features.mean(0), axis=1).argmin())]
    nearest = np.full(len(features), np.inf)  # distance of each to the nearest one chosen
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.linalg.norm(features - features[chosen[-1]], axis=1))
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    return chosen


def estimate(args):
    return {"05_coresets": ("classes", len(args.classes), 0.2 * len(args.classes), 1e5, "one CPU core")}


def main(args):
    words = ("--train-on", "full", "--save", "--protocol", args.protocol)
    fix = contract.command(args, "05_train_eval.py", *words)
    source = contract.Input(args, f"05_networks/minic3d__{args.protocol}", fix)
    inputs = source.check(f"features/{c}.{kind}" for c in args.classes for kind in ("npy", "csv"))
    parameters = {name: getattr(args, name) for name in ("ipc", "limit", "protocol")}
    parameters["deviations"] = source.record["parameters"]["deviations"]  # 05 repeats them in its results
    wanted = [f"{c}.csv" for c in args.classes]
    for choose in (herding, kcenter):
        place = f"05_coresets/ipc{args.ipc}/{choose.__name__}"
        output = contract.Output(args, place, parameters, inputs, wanted)
        for label in output.mine(args.classes, lambda c: [f"{c}.csv"]):
            names = [row["name"] for row in source.load(f"features/{label}.csv")]
            features = source.load(f"features/{label}.npy", (len(names), None), "float32").astype(np.float64)
            order = np.argsort(names)[: args.limit]  # ties go by name
            if len(order) < args.ipc:
                what = f"{source.folder / 'features' / label}.npy: too few clips"
                raise contract.ContractError(what, f"at least {args.ipc}", len(order), "a smaller IPC")
            chosen = [names[order[i]] for i in choose(features[order], args.ipc)]
            contract.save(output.folder / f"{label}.csv", [("name",), *((name,) for name in chosen)])
        output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
