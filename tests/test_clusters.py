"""Stages 02 and 04: every clustering and distance of appendix C, every composition of appendix D.3."""

import contract  # isort: skip

import warnings

import numpy as np
import pytest
from conftest import load

import media

CLUSTERS = ("direct", "real-video", "dummy-video", "herding", "gmm")


def videos(count=40, groups=5, seed=0, size=4):
    """Latents float16 [count, 16, 4, size, size] in loose groups away from the origin, as real latents."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0.5, 1, (groups, 16, 4, size, size))
    return (centres[rng.integers(0, groups, count)] + rng.normal(0, 1, (count, 16, 4, size, size))).astype(
        np.float16
    )


@pytest.fixture
def stage():
    return load("02")


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_points_have_the_distances_of_the_latents(stage, distance):
    latents = videos(size=16)  # 16,384 values and a half: more than one block of columns
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    if distance == "cosine":
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    points = stage.isometry(latents, distance)
    assert points.shape == (40, 39) and points.dtype == np.float64
    for i in range(len(flat)):
        expected, found = np.linalg.norm(flat - flat[i], axis=1), np.linalg.norm(points - points[i], axis=1)
        assert np.abs(found - expected).max() < 1e-12 * np.linalg.norm(flat, axis=1).max()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_has_the_inertia_of_the_library_on_raw_features(stage, distance, seed):
    from sklearn.cluster import KMeans

    latents = videos(seed=seed)
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    if distance == "cosine":
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    expected = KMeans(6, n_init=stage.N_INIT, random_state=seed).fit(flat)
    _, clusters, distances = stage.prototypes_of(latents, 6, seed, "Walk", distance=distance)
    centres = np.stack([flat[clusters == k].mean(0) for k in range(6)])
    inertia = np.square(flat - centres[clusters]).sum()
    assert abs(inertia / expected.inertia_ - 1) < 1e-6
    assert abs(np.square(distances).sum() / expected.inertia_ - 1) < 1e-6


def test_frobenius_of_videos_is_euclidean_of_flattened_ones(stage):
    """A video is 16 * 4 matrices h x w: their squared Frobenius norms sum to the square of the flat norm."""
    latents = videos(12)
    difference = (latents[:, None].astype(np.float64) - latents).reshape(-1, 64, 4, 4)
    frobenius = np.sqrt(np.square(np.linalg.norm(difference, "fro", axis=(2, 3))).sum(1))
    euclidean = np.linalg.norm(difference.reshape(len(difference), -1), axis=1)
    assert np.abs(frobenius - euclidean).max() < 1e-12 * euclidean.max() and euclidean.max() > 1


def test_cosine_looks_at_directions_alone(stage):
    """Two directions, each at many lengths: cosine finds the directions, Euclidean the lengths."""
    rng = np.random.default_rng(0)
    directions = rng.normal(0, 1, (2, 16, 4, 2, 2))
    directions[1] = directions[0] + 0.2 * directions[1]
    lengths = np.array([1, 1.1, 1.2, 8, 9, 10])
    latents = np.concatenate([lengths[:, None, None, None, None] * d for d in directions]).astype(np.float16)
    _, clusters, distances = stage.prototypes_of(latents, 2, 0, "Walk", distance="cosine")
    assert clusters.tolist() == [0] * 6 + [1] * 6 and distances.max() < 0.01
    prototypes, clusters, _ = stage.prototypes_of(latents, 2, 0, "Walk")
    assert clusters.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert (prototypes[1] == latents[clusters == 1].astype(np.float64).mean(0).astype(np.float32)).all()
    with pytest.raises(contract.ContractError, match="Walk: a latent is zero"):
        stage.prototypes_of(latents * np.float16(0), 2, 0, "Walk", distance="cosine")


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypes_are_what_appendix_c_says(stage, cluster, distance):
    latents = videos()
    prototypes, clusters, distances = stage.prototypes_of(latents, 4, 0, "Walk", cluster, distance)
    assert prototypes.shape == (4, 16, 4, 4, 4) and prototypes.dtype == np.float32
    assert sorted(set(clusters)) == [0, 1, 2, 3] and distances.shape == (40,)
    for k in range(4):
        members = latents[clusters == k].astype(np.float64)
        if cluster in ("direct", "gmm"):
            assert (prototypes[k] == members.mean(0).astype(np.float32)).all()
        elif cluster == "dummy-video":
            assert (prototypes[k] == members[:, 0].mean(0).astype(np.float32)).all()  # in every frame
        else:  # a real video, with its motion; of its own cluster
            (found,) = np.flatnonzero([(z == prototypes[k]).all() for z in latents])
            assert clusters[found] == k
    if (
        cluster == "real-video" and distance == "euclidean"
    ):  # nearest to the centre in the first frame, of all members
        for k in range(4):
            first = latents[clusters == k, 0].reshape(-1, 64).astype(np.float64)
            nearest = np.linalg.norm(first - first.mean(0), axis=1).argmin()
            assert (latents[clusters == k][nearest] == prototypes[k]).all()
    if cluster in ("direct", "real-video", "dummy-video", "gmm"):  # numbered by their first members
        assert [np.flatnonzero(clusters == k)[0] for k in range(4)] == sorted(
            np.flatnonzero(clusters == k)[0] for k in range(4)
        )


def test_first_frame_clusterings_look_at_the_first_frame_alone(stage):
    latents = videos()
    other = latents.copy()
    other[:, 1:] = videos(seed=9)[:, 1:]
    for cluster in ("real-video", "dummy-video"):
        a, b = (
            stage.prototypes_of(latents, 4, 0, "Walk", cluster),
            stage.prototypes_of(other, 4, 0, "Walk", cluster),
        )
        assert (a[1] == b[1]).all() and (a[2] == b[2]).all()
        assert (a[0] == b[0]).all() == (cluster == "dummy-video")


def test_herding_is_greedy_in_the_mean(stage):
    latents = videos(12)
    flat = latents.reshape(12, -1).astype(np.float64)
    chosen = []
    for count in range(1, 6):
        away = [
            np.linalg.norm(flat[[*chosen, i]].mean(0) - flat.mean(0)) if i not in chosen else np.inf
            for i in range(12)
        ]
        chosen.append(int(np.argmin(away)))
        prototypes, clusters, _ = stage.prototypes_of(latents, count, 0, "Walk", "herding")
        assert (prototypes == latents[chosen]).all() and clusters[chosen].tolist() == list(range(count))
    nearest = np.linalg.norm(flat[:, None] - flat[chosen], axis=2).argmin(1)
    assert (clusters == nearest).all()


def test_gmm_is_a_mixture_of_spherical_gaussians(stage):
    """A tight and a wide cloud: k-means cuts midway between them, the mixture nearer to the tight one."""
    rng = np.random.default_rng(0)
    latents = np.concatenate(
        [rng.normal(0, 0.02, (30, 16, 4, 2, 2)), rng.normal(0, 1, (30, 16, 4, 2, 2))]
    ).astype(np.float16)
    latents[30:, 0, 0] += 3
    _, clusters, _ = stage.prototypes_of(latents, 2, 0, "Walk", "gmm")
    assert clusters.tolist() == [0] * 30 + [1] * 30


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_copies_are_an_error_with_the_class_and_no_warning(stage, cluster, distance):
    rng = np.random.default_rng(0)
    latents = rng.normal(0, 1, (3, 16, 4, 4, 4)).astype(np.float16)[[0, 1, 2, 0, 1, 2, 0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(contract.ContractError, match="Walk: only 3 of 4(.|\n)*IPC <= 3"):
            stage.prototypes_of(latents, 4, 0, "Walk", cluster, distance)
        prototypes, clusters, _ = stage.prototypes_of(latents, 3, 0, "Walk", cluster, distance)
    for k in range(3):  # copies stay together
        assert len({i % 3 for i in np.flatnonzero(clusters == k)}) == 1
    one, clusters, _ = stage.prototypes_of(latents[:1], 1, 0, "Walk", cluster, distance)
    assert clusters.tolist() == [0] and (one[0, 0] == latents[0, 0]).all()


def test_equal_first_frames_are_an_error_where_only_they_count(stage):
    latents = videos(6)
    latents[:, 0] = latents[0, 0]
    stage.prototypes_of(latents, 2, 0, "Walk")
    with pytest.raises(contract.ContractError, match="different first frames"):
        stage.prototypes_of(latents, 2, 0, "Walk", "real-video")


def test_equal_prototypes_are_an_error(stage):
    """A mixture may lay two components around one centre: pairs v, -v of short and of long videos."""
    rng, latents = np.random.default_rng(0), np.zeros((44, 16, 4, 2, 2), np.float16)
    flat = latents.reshape(44, -1)
    for i in range(0, 44, 4):
        flat[i, :4], flat[i + 2, :4] = rng.integers(-8, 9, 4), rng.integers(-300, 301, 4)
        flat[i + 1], flat[i + 3] = -flat[i], -flat[i + 2]
    with pytest.raises(contract.ContractError, match="Walk: two prototypes are equal"):
        stage.prototypes_of(latents, 2, 1, "Walk", "gmm")


def test_empty_components_and_endless_fits_are_errors(stage, monkeypatch):
    from sklearn.exceptions import ConvergenceWarning

    latents = videos(8)
    monkeypatch.setattr(stage, "mixture", lambda points, *_: np.array([0, 0, 2, 2, 0, 0, 2, 2]))
    with pytest.raises(contract.ContractError, match="Walk: only 2 of 3 clusters have members(.|\n)*--seed"):
        stage.prototypes_of(latents, 3, 0, "Walk", "gmm")
    monkeypatch.setattr(
        stage, "mixture", lambda *_: warnings.warn("did not converge", ConvergenceWarning, stacklevel=1)
    )
    with pytest.raises(contract.ContractError, match="Walk: did not converge(.|\n)*--seed"):
        stage.prototypes_of(latents, 3, 0, "Walk", "gmm")


def test_clusters_do_not_depend_on_the_number_of_threads(stage):
    from threadpoolctl import threadpool_limits

    latents, found = videos(size=16), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append([stage.prototypes_of(latents, 5, 0, "Walk", cluster) for cluster in CLUSTERS])
    for one, two in zip(*found, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


def test_every_clustering_has_a_folder_of_its_own(latents, tmp_path):
    place = latents.copy(tmp_path / "work")
    for words, name in (
        (["--cluster", "real-video"], "real-video"),
        (["--cluster", "gmm", "--distance", "cosine"], "gmm-cosine"),
    ):
        code, text = place.run("02", *words)
        assert code == 0 and f"02_prototypes/ipc2/{name}," in text and "stale" not in text, text
    code, text = place.run("02", "--name", "direct", "--cluster", "herding", "--dry-run")
    assert "cluster direct -> herding" in text, text
    assert place.run("03", "--prototypes", "real-video", "--dry-run")[0] == 0


def test_ten_starts_of_kmeans(stage):
    """In these loose groups one start ends in a worse optimum than the best of ten: N_INIT counts."""
    from sklearn.cluster import KMeans

    found = []
    for seed in range(8):
        latents = videos(60, groups=12, seed=seed)
        flat = latents.reshape(len(latents), -1).astype(np.float64)
        _, _, distances = stage.prototypes_of(latents, 12, seed, "Walk")
        best = KMeans(12, n_init=10, random_state=seed).fit(flat).inertia_
        one = KMeans(12, n_init=1, random_state=seed).fit(flat).inertia_
        found.append((np.square(distances).sum() / best, one / best))
    ours, one = np.mean(found, axis=0)
    assert ours < 1.005 and one > 1.02


COUNTS = {"4x4": [4] * 4, "8x2": [2] * 8, "3-3-3-3-2-2": [3, 3, 3, 3, 2, 2], "2x8": [8] * 2, "1x16": [16]}


@pytest.mark.parametrize("pattern", COUNTS)
@pytest.mark.parametrize("frames", ["random", "continuous"])
@pytest.mark.parametrize("grouping", ["random", "in-order"])
def test_every_composition_uses_every_video_once(pattern, frames, grouping):
    stage = load("04")
    plan = stage.compose_plan("Walk", 5, 0, pattern, frames, grouping)
    counts, size = COUNTS[pattern], len(COUNTS[pattern])
    used = [sample for group in plan for sample, _ in group]
    every = [f"{k}_{draw}" for k in range(5) for draw in range(size)]
    assert len(plan) == 5 and sorted(used) == sorted(every)
    assert (used == every) == (grouping == "in-order")
    steps = set()
    for group in plan:
        assert [len(numbers) for _, numbers in group] == counts
        assert sum(len(numbers) for _, numbers in group) == 16
        for _, numbers in group:
            assert numbers == sorted({*numbers}) and numbers[0] >= 0 and numbers[-1] < 16
            steps |= {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    assert (steps == {1}) == (frames == "continuous" or pattern == "1x16")
    assert stage.compose_plan("Walk", 5, 1, pattern, frames, grouping) != plan or (
        pattern == "1x16" and used == every
    )


def test_continuous_frames_begin_everywhere():
    import torch

    generator = torch.Generator().manual_seed(0)
    starts = [load("04").draw_frames(4, "continuous", generator)[0] for _ in range(1000)]
    assert sorted({*starts}) == list(range(13)) and min(starts.count(start) for start in range(13)) > 40


def test_the_default_composition_is_what_it_was():
    assert load("04").compose_plan("Walk", 2, 0) == [
        [("1_0", [5, 8, 12, 13]), ("0_0", [0, 3, 5, 6]), ("0_1", [2, 6, 10, 14]), ("1_1", [2, 3, 5, 15])],
        [("1_3", [2, 7, 10, 14]), ("0_3", [0, 2, 5, 8]), ("1_2", [0, 1, 2, 9]), ("0_2", [3, 4, 11, 14])],
    ]


def test_more_sources_ask_for_more_draws_and_name_the_command(sampled, tmp_path):
    """8x2 takes draws 0 to 7, of which 03 has made four; what 03 has made is kept."""
    place = sampled.copy(tmp_path / "work")
    code, text = place.run("04", "--pattern", "8x2")
    assert code == 3 and "Walk/0_4.mp4 is missing" in text, text
    assert "03_guided_sample.py demo 2 " in text and "--draws 8" in text, text
    assert place.run("03", "--draws", 8)[0] == 0
    code, text = place.run("04", "--pattern", "8x2")
    assert code == 0 and "04_distilled/ipc2/gvd-8x2," in text and "stale" not in text, text
    assert "04 fresh" in place.run("04")[1]
    before, now = sampled.files(), place.files()
    del before["demo/03_samples/ipc2/gvd/manifest.json"]
    assert {name: now[name] for name in before} == before


def test_every_composition_has_a_folder_of_its_own(sampled, tmp_path):
    place = sampled.copy(tmp_path / "work")
    variants = {
        "gvd-2x8": ["--pattern", "2x8"],
        "gvd-1x16": ["--pattern", "1x16"],
        "gvd-continuous": ["--frames", "continuous"],
        "gvd-in-order": ["--grouping", "in-order"],
        "gvd-2x8-continuous-in-order": [
            "--pattern",
            "2x8",
            "--frames",
            "continuous",
            "--grouping",
            "in-order",
        ],
    }
    for words in variants.values():
        code, text = place.run("04", *words)
        assert code == 0 and "stale" not in text, text
    root = place.work / "demo/04_distilled/ipc2"
    assert sorted(path.name for path in root.iterdir()) == sorted(["gvd", *variants])
    rows = contract.read(root / "gvd-2x8-continuous-in-order/metadata.csv")
    assert [row["sources"] for row in rows] == ["0_0 0_1", "1_0 1_1"] * 2
    assert all(len(row["frames"].split(" ")) == 2 for row in rows)
    whole = media.read_video(place.work / "demo/03_samples/ipc2/gvd/Walk/0_0.mp4")
    rows = contract.read(root / "gvd-1x16/metadata.csv")
    assert rows[0]["frames"] == "-".join(map(str, range(16)))
    (index,) = [i for i, row in enumerate(rows) if (row["label"], row["sources"]) == ("Walk", "0_0")]
    composed = media.read_video(root / f"gvd-1x16/Walk/{index}.mp4")
    assert np.abs(composed.astype(int) - whole).mean() < 4  # the same video, written twice
    code, text = place.run("04", "--name", "gvd", "--pattern", "2x8", "--dry-run")
    assert "pattern 4x4 -> 2x8" in text, text
