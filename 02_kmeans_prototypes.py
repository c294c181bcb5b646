"""Stage 02: latents -> K prototypes per class (section 3.3.1, eq. 5; appendix C).

Per class, k-means with K = IPC on the flattened 16 x 4 x h x w latents of its training videos. A prototype is
the mean of its members, with a frame axis: an average movement, not an average picture. Appendix C has:

  --cluster direct       the default, as above
            real-video   k-means on the first frames; a prototype is the member nearest to its centre
            dummy-video  k-means on the first frames; a prototype is the mean first frame, 16 times (K-Noise)
            herding      the K videos, chosen one by one, whose mean stays nearest to the class's mean
            gmm          as direct, the clusters from a mixture of spherical Gaussians
  --distance euclidean   the default; the Frobenius distance of appendix C is the same on flattened videos
             cosine      the latents are normalised before they are clustered

n videos span at most n - 1 dimensions, whatever the size of a latent. Clustering works on coordinates in that
space, which have exactly the same distances, so it costs next to nothing.

Reads:   work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w], and <class>.csv
Writes:  work/<data set>/02_prototypes/ipc<K>/<--name>/<class>.npy  float32 [K, 16, 4, h, w]
         and <class>.csv: name, prototype, distance to its cluster's centre, of every member
Run:     python 02_kmeans_prototypes.py hmdb51 20
         python 02_kmeans_prototypes.py demo 5 --cluster dummy-video
Cost:    demo: 1 s. hmdb51 IPC 20, by estimate: 1 min on one CPU core, 1 GB of memory for the largest class
Expect:  K clusters per class, none empty; prototypes have a smaller norm than latents, as means do
Differs: K = IPC; 03 draws from each prototype as many videos as one composed video has sources
"""

import contract

import warnings

import numpy as np

import common
import media

N_INIT = 10  # starts of k-means; the one with the least inertia is kept
GMM_FLOOR = 0.01  # least variance of a component, of the class's: one video alone has an infinite likelihood
COLUMNS = 2**14  # of the latents at a time, when their inner products are summed
SAME = 1e-13  # squared distance, of the largest squared norm, at which two videos are copies (float64: 1e-16)
SECONDS = {"demo": 0.1}  # per class, on one CPU core; any other data set:
SECONDS_FULL = 1


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    add, clusters = parser.add_argument, ("direct", "real-video", "dummy-video", "herding", "gmm")
    add("--cluster", choices=clusters, default="direct", help="see above (direct)")
    add("--distance", choices=("euclidean", "cosine"), default="euclidean", help="(euclidean)")
    add("--name", help="name of the folder (the cluster's; direct-cosine for another distance)")
    args = contract.parse(parser)
    args.name = args.name or args.cluster + ("" if args.distance == "euclidean" else f"-{args.distance}")
    return args


def isometry(features, distance):
    """Points float64 [n, m], m < n, with the same distances between them as between the features [n, ...].

    By the eigenvectors of the centred matrix of inner products; equal features get exactly equal points. With
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

    options = {"covariance_type": "spherical", "reg_covar": GMM_FLOOR * points.var(0).mean()}
    return GaussianMixture(num_clusters, **options, max_iter=1000, random_state=seed).fit_predict(points)


def herding(points, num_chosen):
    """Indices of points, chosen one by one so that their mean stays nearest to the mean of all."""
    rest, total, chosen = np.ones(len(points), bool), np.zeros(points.shape[1]), []
    for count in range(1, num_chosen + 1):
        away = np.linalg.norm((total + points) / count - points.mean(0), axis=1)
        chosen.append(int(np.where(rest, away, np.inf).argmin()))
        total += points[chosen[-1]]
        rest &= (points != points[chosen[-1]]).any(1)  # neither this video nor a copy of it again
    return chosen


def cluster_points(points, num_clusters, seed, cluster):
    """Clusters [n], numbered by first members, centres [K, m], and with herding the chosen points."""
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
    """Prototypes float32 [K, 16, 4, h, w], each video's cluster [n] and distance to its centre [n].

    latents: float16 [n, 16, 4, h, w]. Raises ContractError when there are not K different prototypes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    first_frame = cluster in ("real-video", "dummy-video")
    kind, features = ("first frames", latents[:, 0]) if first_frame else ("videos", latents)
    if distance == "cosine" and not all(z.any() for z in features):
        raise contract.ContractError(
            f"{label}: a latent is zero, without direction", fix="--distance euclidean"
        )
    # The last bits of sums depend on the number of threads.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        points = isometry(features, distance)
        different = len(np.unique(points, axis=0))
        if different < num_clusters:
            what = f"{label}: only {different} of {num_clusters} clusters would have members"
            expected, found = f"{num_clusters} different {kind}", f"{different}; the others are copies"
            raise contract.ContractError(what, expected, found, f"IPC <= {different}, or another --cluster")
        try:
            clusters, centres, chosen = cluster_points(points, num_clusters, seed, cluster)
        except ConvergenceWarning as warning:
            raise contract.ContractError(f"{label}: {warning}", fix="another --seed or --cluster") from None
    if len(centres) < num_clusters:
        what = f"{label}: only {len(centres)} of {num_clusters} clusters have members"
        raise contract.ContractError(what, fix="another --seed or --cluster, or a smaller IPC")
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
        raise contract.ContractError(f"{label}: two prototypes are equal", fix="another --seed or --cluster")
    return prototypes, clusters, distances


def estimate(args):
    width, height = args.spec["size"]
    size = args.ipc * len(args.classes) * 16 * 4 * (width * height // 64) * 4
    estimated, figure = SECONDS.get(args.dataset, SECONDS_FULL), f"seconds, {args.cluster}"
    seconds, machine = common.rate(args, estimated, figure, "one CPU core")
    return {"02_prototypes": ("classes", len(args.classes), seconds * len(args.classes), size, machine)}


def main(args):
    source = contract.Input(args, "01_latents", contract.command(args, "01_encode_latents.py"))
    inputs = source.check(f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv"))
    rows = {c: source.load(f"{c}.csv")[: args.limit] for c in args.classes}
    for label in args.classes:
        if (count := len(rows[label])) < args.ipc:
            what, fix = f"{source.folder / label}.npy: too few clips", f"IPC <= {count}, or a larger --limit"
            raise contract.ContractError(what, f"at least {args.ipc}, a clip for each prototype", count, fix)

    parameters = {name: getattr(args, name) for name in ("ipc", "cluster", "distance", "limit")}
    wanted = [f"{c}.{kind}" for c in args.classes for kind in ("npy", "csv")]
    output = contract.Output(args, f"02_prototypes/ipc{args.ipc}/{args.name}", parameters, inputs, wanted)
    for label in output.mine(args.classes, lambda c: (f"{c}.npy", f"{c}.csv")):
        latents = source.load(f"{label}.npy", (None, common.NUM_FRAMES, 4, None, None), "float16")
        seed = contract.generator(args.seed, "02", label).initial_seed() % 2**32
        found = prototypes_of(latents[: args.limit], args.ipc, seed, label, args.cluster, args.distance)
        prototypes, clusters, distances = found
        names = [row["name"] for row in rows[label]]
        members = [[*row[:2], f"{row[2]:.4f}"] for row in zip(names, clusters, distances, strict=True)]
        contract.save(output.folder / f"{label}.csv", [("name", "prototype", "distance"), *members])
        contract.save(output.folder / f"{label}.npy", prototypes)
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
