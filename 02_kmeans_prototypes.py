"""Stage 02: latents -> K prototypes per class (section 3.3.1, eq. 5; appendix C, direct clustering).

Per class, k-means with K = IPC on the flattened 16 x 4 x h x w latents of its training videos. A prototype is the mean
of its members, so it has a frame axis of its own: an average movement, not an average picture.

Reads:   work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w], and index.csv
Writes:  work/<data set>/02_prototypes/ipc<K>/direct/<class>.npy  float32 [K, 16, 4, h, w]
         and <class>.csv beside it: name, prototype, distance of every member
Run:     python 02_kmeans_prototypes.py hmdb51 20
         python 02_kmeans_prototypes.py demo 5
Cost:    demo: 1 s. hmdb51 IPC 20, by estimate: 15 min on one CPU core, 1 GB of memory for the largest class
Expect:  K clusters per class, none empty; prototypes are smaller in norm than latents, as means are
Differs: K = IPC, and 03 uses each prototype for as many draws as a composed video has sources (paper_facts.md 2.6)
"""

import numpy as np
from tqdm import tqdm

import common
import contract

N_INIT = 10  # starts of k-means; the one with the least inertia is kept
SECONDS_PER_CLASS = {"demo": 0.5}
SECONDS_PER_CLASS_FULL = 20


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    parser.add_argument("--name", default="direct", help="name of the folder (direct)")
    parser.add_argument("--hmdb-train", choices=("all", "official"), default="all", help="HMDB51's training clips (all)")
    return contract.parse(parser)


def kmeans(latents, num_clusters, seed):
    """Labels [n] and distances to the own centre [n] of rows [n, d] (eq. 5); clusters in the order of first members.

    scikit-learn's labels are arbitrary in order, so they are renumbered.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the last bits of sums depend on the number of threads
        fitted = KMeans(num_clusters, n_init=N_INIT, random_state=seed).fit(latents)
    _, first = np.unique(fitted.labels_, return_index=True)
    order = {fitted.labels_[i]: rank for rank, i in enumerate(sorted(first))}
    distances = np.linalg.norm(latents - fitted.cluster_centers_[fitted.labels_], axis=1)
    return np.array([order[label] for label in fitted.labels_]), distances


def prototypes_of(latents, num_clusters, seed, label):
    """Prototypes float32 [K, 16, 4, h, w], cluster of each video [n], distance of each video to its prototype [n]."""
    flat = latents.reshape(len(latents), -1).astype(np.float32)
    clusters, distances = kmeans(flat, num_clusters, seed)
    sizes = np.bincount(clusters, minlength=num_clusters)
    if (sizes == 0).any():
        raise contract.ContractError(
            f"{label}: only {np.count_nonzero(sizes)} of {num_clusters} clusters have members\n"
            f"  expected: at least {num_clusters} different videos; some may be copies of each other"
        )
    means = [latents[clusters == k].astype(np.float64).mean(0) for k in range(num_clusters)]
    return np.stack(means).astype(np.float32), clusters, distances


def main():
    args = parse_args()
    cost_seconds = SECONDS_PER_CLASS.get(args.dataset, SECONDS_PER_CLASS_FULL) * len(args.classes)
    size = args.ipc * len(args.classes) * 16 * 4 * (args.spec["size"][0] * args.spec["size"][1] // 64) * 4
    cost = ("classes", len(args.classes), cost_seconds, size, "the CPU")
    source = contract.work_folder(args, "01_latents")
    if args.dry_run and (args.after or not (source / "manifest.json").exists()):
        return contract.plan_after(args, "02", cost)
    mend = contract.command("01_encode_latents.py", args)
    manifest = contract.read_folder(source, args, mend)
    contract.need(manifest, [f"{c}.npy" for c in args.classes], source, mend)

    official = args.hmdb_train == "official"
    rows = {c: [] for c in args.classes}
    for row in common.read_csv(source / "index.csv"):
        if row["class"] in rows and (not official or row["official"] == "1"):
            rows[row["class"]].append(row)
    rows = {c: of_class[: args.limit] for c, of_class in rows.items()}
    for label, of_class in rows.items():
        if len(of_class) < args.ipc:
            raise contract.ContractError(
                f"{source / (label + '.npy')}: too few clips for {args.ipc} prototypes\n  expected: at least {args.ipc}\n"
                f"  found:    {len(of_class)}\n  take IPC <= {len(of_class)}, other --classes or a larger --limit"
            )

    folder = contract.work_folder(args, "02_prototypes", f"ipc{args.ipc}", args.name)
    settings = {"ipc": args.ipc, "hmdb_train": args.hmdb_train, "limit": args.limit}
    inputs = {c: contract.content(manifest, (f"{c}.npy", f"index/{c}.csv")) for c in rows}
    identity = contract.identity(__file__, args, settings, {}, inputs)
    wanted = [f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv")]
    todo, identity = contract.begin(folder, identity, wanted, args, cost)
    if todo is None:
        return
    for label in tqdm([c for c in args.classes if {f"{c}.npy", f"{c}.csv"} & {*todo}], desc="02 classes", mininterval=1):
        latents = contract.load_array(source / f"{label}.npy", (None, 16, 4, None, None), "float16", mend)
        latents = latents[[int(row["row"]) for row in rows[label]]]
        seed = contract.generator(args.seed, "02", label).initial_seed() % 2**32
        prototypes, clusters, distances = prototypes_of(latents, args.ipc, seed, label)
        members = [
            [row["name"], k, f"{distance:.4f}"] for row, k, distance in zip(rows[label], clusters, distances, strict=True)
        ]
        common.write_csv(folder / f"{label}.csv", ("name", "prototype", "distance"), members)
        contract.save_array(folder / f"{label}.npy", prototypes)
    kinds = {f"{c}.csv": ([len(rows[c]), 3], "csv") for c in args.classes}
    contract.finish(folder, identity, wanted, args, ["scikit-learn"], kinds)


if __name__ == "__main__":
    contract.run(main)
