"""k-means of stage 02 beside scikit-learn's on the raw features: seconds, their ratio, both inertias.

Random latents in groups that overlap, at the size of a class of HMDB51; both get the same latents, the same seed for
their starts and one thread. Ours is the stage's own function, from float16 latents to float32 prototypes; the library's
is KMeans.fit on the flattened latents as float32, without reading them and without the prototypes.

Reads:   nothing
Writes:  nothing but --json F
Run:     python tools/bench_kmeans.py --json kmeans.json
Cost:    1 min on one CPU core, 1 GB
Expect:  at least 10 times as fast, inertias that differ by less than 1e-6 of their value
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import contract  # noqa: E402

SHAPE = (16, 4, 32, 56)  # latents of a 448x256 video: d = 114,688


def stage_02():
    """The stage as a module: a name that begins with a digit cannot be imported."""
    spec = importlib.util.spec_from_file_location("stage_02", ROOT / "02_kmeans_prototypes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_latents(count, groups, seed):
    """Latents float16 [count, 16, 4, 32, 56] of variance 1, a fifth of it between the groups."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, *SHAPE), np.float32) * 0.2**0.5
    noise = rng.standard_normal((count, *SHAPE), np.float32) * 0.8**0.5
    return (centres[rng.integers(0, groups, count)] + noise).astype(np.float16)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=contract.positive, default=100, metavar="N", help="videos of the class (100)")
    parser.add_argument("--clusters", type=contract.positive, default=20, metavar="K", help="clusters (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents and of the starts (0)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file too")
    args = parser.parse_args()

    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    stage = stage_02()
    latents = random_latents(args.videos, args.clusters, args.seed)
    flat = latents.reshape(len(latents), -1).astype(np.float32)

    def inertia(clusters):
        """Sum of the squared distances to the means of the clusters, in float64 on the raw features."""
        of_cluster = (flat[clusters == k].astype(np.float64) for k in range(args.clusters))
        return float(sum(np.square(members - members.mean(0)).sum() for members in of_cluster))

    with threadpool_limits(1):
        KMeans(2, n_init=1, random_state=0).fit(flat[:4, :8])  # loads the library's parts before the clock runs
        start = time.perf_counter()
        _, clusters, _ = stage.prototypes_of(latents, args.clusters, args.seed, "bench")
        middle = time.perf_counter()
        theirs = KMeans(args.clusters, n_init=stage.N_INIT, random_state=args.seed).fit(flat)
        end = time.perf_counter()
    ours, library = inertia(clusters), inertia(theirs.labels_)
    figures = dict(
        videos=args.videos,
        features=flat.shape[1],
        clusters=args.clusters,
        starts=stage.N_INIT,
        seconds=round(middle - start, 3),
        library_seconds=round(end - middle, 3),
        ratio=round((end - middle) / (middle - start), 1),
        inertia=ours,
        library_inertia=library,
        inertia_difference=abs(ours / library - 1),
        same_clusters=len({*zip(clusters, theirs.labels_, strict=True)}) == args.clusters,
    )
    print("\n".join(f"{name:20} {value}" for name, value in figures.items()))
    if args.json:
        contract.write_json(args.json, figures)


if __name__ == "__main__":
    contract.run(main)
