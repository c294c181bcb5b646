"""Stage 02: latents -> K prototypes per class (section 3.3.1, eq. 5; appendix C).

Per class, k-means with K = IPC on the flattened 16 x 4 x h x w latents of its training videos. A prototype is the mean
of its members, so it has a frame axis of its own: an average movement, not an average picture. Appendix C's other ways:

  --cluster direct       the default, as above
            real-video   k-means on the first frames; a prototype is the member nearest to its cluster's centre
            dummy-video  k-means on the first frames; a prototype is the mean first frame, 16 times (K-Noise's prototypes)
            herding      the K videos, chosen one after the other, whose mean stays nearest to the class's mean
            gmm          as direct, the clusters from a mixture of spherical Gaussians
  --distance euclidean   the default
             cosine      the rows are normalised before they are clustered
             frobenius   of the frames' h x w matrices: the same as Euclidean on flattened videos, and so are the files

n videos lie in n - 1 dimensions whatever the size of a latent. So everything is clustered there, by coordinates with
exactly the same distances: k-means costs next to nothing.

Reads:   work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w], and index.csv
Writes:  work/<data set>/02_prototypes/ipc<K>/<--name>/<class>.npy  float32 [K, 16, 4, h, w]
         and <class>.csv beside it: name, prototype, distance of every member, as it was clustered
Run:     python 02_kmeans_prototypes.py hmdb51 20
         python 02_kmeans_prototypes.py demo 5
         python 02_kmeans_prototypes.py demo 5 --cluster dummy-video
Cost:    demo: 1 s. hmdb51 IPC 20, by estimate: 1 min on one CPU core, 1 GB of memory for the largest class
Expect:  K clusters per class, none empty; prototypes are smaller in norm than latents, as means are
Differs: K = IPC, and 03 uses each prototype for as many draws as a composed video has sources (paper_facts.md 2.6)
"""

import warnings

import numpy as np
from tqdm import tqdm

import common
import contract

N_INIT = 10  # starts of k-means; the one with the least inertia is kept
GMM_FLOOR = 0.01  # least variance of a component, of the class's own: one video alone would have an infinite likelihood
COLUMNS = 2**14  # of the latents at a time, when their inner products are summed
SAME = 1e-13  # squared distance, of the largest squared norm, at which two videos are copies (float64 rounds at 1e-16)
SECONDS_PER_CLASS = {"demo": 0.1}
SECONDS_PER_CLASS_FULL = 1


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    clusters, distances = ("direct", "real-video", "dummy-video", "herding", "gmm"), ("euclidean", "cosine", "frobenius")
    parser.add_argument("--cluster", choices=clusters, default="direct", help="how prototypes are made, see above (direct)")
    parser.add_argument("--distance", choices=distances, default="euclidean", help="between videos (euclidean)")
    parser.add_argument("--name", help="name of the folder (the cluster's; direct-cosine for another distance)")
    parser.add_argument("--hmdb-train", choices=("all", "official"), default="all", help="HMDB51's training clips (all)")
    args = contract.parse(parser)
    args.name = args.name or args.cluster + ("" if args.distance == "euclidean" else f"-{args.distance}")
    return args


def isometry(features, distance):
    """Points float64 [n, m], m < n, with the same distances between them as between the features [n, ...].

    By the eigenvectors of the centred matrix of inner products; features that are equal get exactly equal points. With
    distance "cosine" the features are normalised first.
    """
    flat = features.reshape(len(features), -1)
    gram = np.zeros((len(flat), len(flat)))
    for start in range(0, flat.shape[1], COLUMNS):
        part = flat[:, start : start + COLUMNS].astype(np.float64)
        gram += part @ part.T
    if distance == "cosine":
        norms = np.sqrt(gram.diagonal())
        gram /= norms[:, None] * norms
    squares = gram.diagonal()
    same = squares[:, None] + squares - 2 * gram <= SAME * squares.max()
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    keep = values > SAME * squares.max()
    keep[-1] = True  # one dimension at least, also where all videos are copies
    points = vectors[:, keep] * np.sqrt(values[keep].clip(0))
    return points[same.argmax(1)]


def kmeans(points, num_clusters, seed):
    """Cluster [n] of each of the points [n, m] (eq. 5)."""
    from sklearn.cluster import KMeans

    return KMeans(num_clusters, n_init=N_INIT, tol=0, random_state=seed).fit(points).labels_


def mixture(points, num_clusters, seed):
    """Most likely component [n] of each of the points [n, m]: spherical Gaussians, begun from k-means."""
    from sklearn.mixture import GaussianMixture

    floor = GMM_FLOOR * points.var(0).mean()
    model = GaussianMixture(num_clusters, covariance_type="spherical", reg_covar=floor, max_iter=1000, random_state=seed)
    return model.fit_predict(points)


def herding(points, num_chosen):
    """Indices of the points that are chosen one after the other so that their mean stays nearest to the mean of all."""
    rest, total, chosen = np.ones(len(points), bool), np.zeros(points.shape[1]), []
    for count in range(1, num_chosen + 1):
        away = np.linalg.norm((total + points) / count - points.mean(0), axis=1)
        chosen.append(int(np.where(rest, away, np.inf).argmin()))
        total += points[chosen[-1]]
        rest &= (points != points[chosen[-1]]).any(1)  # neither this video nor a copy of it again
    return chosen


def cluster_points(points, num_clusters, seed, cluster):
    """Cluster of each point [n], numbered by first members, and its centres [K, m]; herding: the chosen points' indices."""
    if cluster == "herding":
        chosen = herding(points, num_clusters)
        return np.linalg.norm(points[:, None] - points[chosen], axis=2).argmin(1), points[chosen], chosen
    fit = mixture if cluster == "gmm" and num_clusters > 1 else kmeans  # a mixture of one needs two videos
    labels = fit(points, num_clusters, seed)
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    clusters = first.argsort().argsort()[labels]
    centres = np.stack([points[clusters == k].mean(0) for k in range(len(first))])
    return clusters, centres, None


def prototypes_of(latents, num_clusters, seed, label, cluster="direct", distance="euclidean"):
    """Prototypes float32 [K, 16, 4, h, w], cluster of each video [n], distance of each video to its centre [n].

    latents: float16 [n, 16, 4, h, w]. Raises ContractError when there are not K different prototypes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    first_frame = cluster in ("real-video", "dummy-video")
    what = "first frames" if first_frame else "videos"
    with threadpool_limits(1), warnings.catch_warnings():  # the last bits of sums depend on the number of threads
        warnings.simplefilter("error", ConvergenceWarning)
        if distance == "cosine" and not all(z.any() for z in (latents[:, 0] if first_frame else latents)):
            raise contract.ContractError(f"{label}: a latent is zero and has no direction\n  take --distance euclidean")
        points = isometry(latents[:, 0] if first_frame else latents, distance)
        different = len(np.unique(points, axis=0))
        if different < num_clusters:
            raise contract.ContractError(
                f"{label}: only {different} of {num_clusters} clusters would have members\n  expected: at least "
                f"{num_clusters} different {what}\n  found:    {different}, the others are copies\n"
                f"  take IPC <= {different}, other --classes or another --cluster"
            )
        try:
            clusters, centres, chosen = cluster_points(points, num_clusters, seed, cluster)
        except ConvergenceWarning as warning:
            raise contract.ContractError(f"{label}: {warning}\n  take another --seed or another --cluster") from None
    if len(centres) < num_clusters:
        raise contract.ContractError(
            f"{label}: only {len(centres)} of {num_clusters} clusters have members\n"
            f"  take another --seed, a smaller IPC or another --cluster"
        )
    distances = np.linalg.norm(points - centres[clusters], axis=1)
    members = [np.flatnonzero(clusters == k) for k in range(num_clusters)]
    if cluster == "herding":
        members = [[i] for i in chosen]
    if cluster == "real-video":
        members = [[of_cluster[distances[of_cluster].argmin()]] for of_cluster in members]
    means = [latents[of_cluster].astype(np.float64).mean(0) for of_cluster in members]
    if cluster == "dummy-video":
        means = [mean[:1].repeat(len(mean), 0) for mean in means]
    prototypes = np.stack(means).astype(np.float32)
    if len({prototype.tobytes() for prototype in prototypes}) < num_clusters:
        raise contract.ContractError(
            f"{label}: two of its prototypes are the same\n  take another --seed or another --cluster"
        )
    return prototypes, clusters, distances


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
    settings = {name: getattr(args, name) for name in ("ipc", "cluster", "distance", "hmdb_train", "limit")}
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
        prototypes, clusters, distances = prototypes_of(latents, args.ipc, seed, label, args.cluster, args.distance)
        members = [
            [row["name"], k, f"{distance:.4f}"] for row, k, distance in zip(rows[label], clusters, distances, strict=True)
        ]
        common.write_csv(folder / f"{label}.csv", ("name", "prototype", "distance"), members)
        contract.save_array(folder / f"{label}.npy", prototypes)
    kinds = {f"{c}.csv": ([len(rows[c]), 3], "csv") for c in args.classes}
    contract.finish(folder, identity, wanted, args, ["scikit-learn"], kinds)


if __name__ == "__main__":
    contract.run(main)
