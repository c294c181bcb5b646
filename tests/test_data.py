"""Data sets, split lists and videos: official counts, hostile names, broken files, real clips."""

import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, SCRIPTS, Place, make_world, write_video

import common
import contract

SHA256 = {  # protocol.md 1.3
    ("miniucf", "train"): (4662, "57cb5b1b5b0659b3fcf6dba965eb88b59567ca9bee963422e2a190d2e1ca126c"),
    ("miniucf", "test"): (1861, "03151d5e9b7b129607e0a91e89b71ac986434f039338bca919d518a95ac50c98"),
    ("hmdb51", "train"): (5236, "b28ccfc83b36aaf170e796ff692a51d3f2bb6db193167b2329a37797ae345eea"),
    ("hmdb51", "test"): (1530, "d377318886e1191fc1c11e66021a90c0b1830fd473671969fb94c5b3e1378220"),
}


@pytest.mark.parametrize(("dataset", "split"), SHA256)
def test_official_lists(real_data, dataset, split):
    names = sorted(name for _, name, part, _ in common.list_clips(dataset, real_data) if part == split)
    assert (len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()) == SHA256[dataset, split]
    assert len(names) == common.DATASETS[dataset]["clips"][split == "test"]


def test_official_hmdb51_training_clips(real_data):
    clips = common.list_clips("hmdb51", real_data)
    assert sum(official for _, _, split, official in clips if split == "train") == 3570


@pytest.mark.parametrize("dataset", common.DATASETS)
def test_class_order_is_ascii(dataset):
    classes = common.DATASETS[dataset]["classes"]
    assert list(classes) == sorted(set(classes))


@pytest.mark.parametrize(("count", "first", "last"), [(16, 0, 15), (1, 0, 0), (5, 0, 4), (100, 3, 96), (64, 2, 62)])
def test_uniform_frames(count, first, last):
    indices = common.uniform_frames(count)
    assert len(indices) == 16 and (indices[0], indices[-1]) == (first, last)
    assert indices.tolist() == [int((i + 0.5) * count / 16) for i in range(16)]


@pytest.mark.parametrize(
    "line", ["Walk/../../x.avi 1", "../../x", "-rf", "Walk/..avi 1", "Walk/a\\b.avi 1", "Nowhere/v_x_g08_c01.avi 1"]
)
def test_hostile_list_lines_are_refused(empty, tmp_path, line):
    place = Place(tmp_path / "data", empty.model, tmp_path / "work")
    shutil.copytree(empty.data, place.data)
    lists = place.data / "demo/ucfTrainTestlist/trainlist01.txt"
    lists.write_text(lists.read_text() + line + "\n")
    code, text = place.run("01")
    assert code == 3 and "trainlist01.txt, line 11: refused" in text, text
    assert not place.work.exists() or not list(place.work.rglob("*.npy"))


def test_hmdb51_names_with_odd_characters(tmp_path):
    """Names of the official lists hold brackets, hashes and blanks, and begin with a dash."""
    names = ["-_FREE_HUGS_-_hug_u_cm_np2_ba_goo_10", "a#1[b]!&;(c)%@~_hug_f_cm_np1_ba_med_0", "x y_hug_f_cm_np1_ba_med_1"]
    lists = tmp_path / "HMDB51/testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for label in common.HMDB51_CLASSES:
        lines = [f"{name}.avi {mark} " for name, mark in zip(names, (1, 2, 0), strict=True)] if label == "hug" else []
        (lists / f"{label}_test_split1.txt").write_text("\n".join(lines))
    clips = common.list_clips("hmdb51", tmp_path)
    assert {name: (split, official) for _, name, split, official in clips} == {
        names[0]: ("train", True), names[1]: ("test", True), names[2]: ("train", False),
    }  # fmt: skip
    write_video(tmp_path / f"{names[1]}.avi", 20, 0)
    assert len(common.read_video(tmp_path / f"{names[1]}.avi")) == 20


def spoil(path, how):
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(3000))
    elif how == "header only":
        path.write_bytes(data[:2500])
    elif how == "half":
        path.write_bytes(data[: len(data) * 2 // 3])


def test_broken_videos_are_named_and_counted(empty, tmp_path):
    place = Place(tmp_path / "data", empty.model, tmp_path / "work")
    make_world(place.data, train=6)
    folder = place.data / "demo/UCF-101/Walk"
    kinds = ("empty", "noise", "header only", "half")
    for path, how in zip(sorted(folder.glob("v_Walk_g1[0-9]*")), kinds, strict=False):
        spoil(path, how)
    code, text = place.run("01")
    assert code == 3 and "4 videos cannot be decoded" in text and "--allow-bad 4" in text, text
    assert all(f"v_Walk_g1{i}_c01.avi" in text for i in range(4)), text
    made = {path.relative_to(place.work / "demo").as_posix() for path in place.work.rglob("*.npy")}
    assert "01_clips/train/Wave.npy" in made and "01_clips/train/Walk.npy" not in made
    before = (place.work / "demo/01_clips/train/Wave.npy").stat().st_mtime_ns

    code, text = place.run("01", "--allow-bad", 4)
    assert code == 0, text
    assert (place.work / "demo/01_clips/train/Wave.npy").stat().st_mtime_ns == before  # not made again
    assert np.load(place.work / "demo/01_clips/train/Walk.npy").shape == (2, 1, 16, 48, 48, 3)
    rows = common.read_csv(place.work / "demo/01_clips/index.csv")
    assert sum(row["class"] == "Walk" and row["split"] == "train" for row in rows) == 2


def test_a_mended_video_does_not_make_the_other_classes_stale(empty, tmp_path):
    place = Place(tmp_path / "data", empty.model, tmp_path / "work")
    make_world(place.data)
    path = place.data / "demo/UCF-101/Walk/v_Walk_g10_c01.avi"
    good = path.read_bytes()
    path.write_bytes(b"")
    assert place.run("01")[0] == 3
    path.write_bytes(good)
    code, text = place.run("01")
    assert code == 0 and "stale" not in text, text


@pytest.mark.parametrize(("count", "size"), [(1, (40, 32)), (3, (24, 64)), (200, (64, 48))])
def test_short_portrait_and_long_videos(tmp_path, count, size):
    write_video(tmp_path / "a.avi", count, 0, size)
    video = common.read_video(tmp_path / "a.avi")
    assert video.shape == (count, size[1], size[0], 3)
    assert common.network_clip(video[common.uniform_frames(count)], "hmdb51").shape == (16, 112, 112, 3)


def test_crop_is_central():
    frames = np.zeros((16, 120, 160, 3), np.uint8)
    frames[:, 4:116, 24:136] = 255
    assert common.network_clip(frames, "hmdb51").min() == 255


def test_mp4_repeats_its_bytes_and_its_quality(tmp_path):
    rng = np.random.default_rng(0)
    small = rng.integers(40, 220, (16, 8, 14, 3), np.uint8)
    frames = common.resize_frames(small, (112, 64))
    for name in "ab":
        common.write_mp4(tmp_path / f"{name}.mp4", frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    error = np.square(common.read_video(tmp_path / "a.mp4").astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 34  # colours that change at every pixel are the worst for yuv420p


def test_mp4_quality_on_real_frames(real_data, tmp_path):
    for path in sorted(real_data.rglob("*.avi")):
        video = common.read_video(path)
        frames = common.resize_frames(video[common.uniform_frames(len(video))], (448, 256))
        made = set()
        for _ in range(3):
            common.write_mp4(tmp_path / "a.mp4", frames)
            made.add((tmp_path / "a.mp4").read_bytes())
        error = np.square(common.read_video(tmp_path / "a.mp4").astype(float) - frames).mean()
        assert len(made) == 1 and 10 * np.log10(255**2 / error) >= 38, path.name


def test_frame_counts_of_real_clips(real_data):
    """Against PyAV, another decoder."""
    import av

    for path in sorted(real_data.rglob("*.avi")):
        with av.open(str(path), metadata_errors="ignore") as container:
            count = sum(1 for _ in container.decode(video=0))
        assert len(common.read_video(path)) == count, path.name


def test_partial_miniucf(real_data, empty, tmp_path):
    """Two test clips alone: 01 finishes, training on the set names the shortage."""
    work = ["--data-root", str(real_data), "--work-dir", str(tmp_path)]
    words = [sys.executable, "01_encode_latents.py", "miniucf", "--partial", "--model", str(empty.model), *work]
    run = subprocess.run([*words, "--size", "64x32"], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0 and "2 of 6,523 listed clips" in run.stdout, run.stdout + run.stderr
    rows = common.read_csv(tmp_path / "miniucf/01_clips/index.csv")
    assert {(r["name"], r["frames"], r["width"]) for r in rows} == {
        ("v_ApplyEyeMakeup_g01_c01", "164", "320"), ("v_BaseballPitch_g01_c01", "107", "320"),
    }  # fmt: skip
    words = [sys.executable, "05_train_eval.py", "miniucf", "1", "--train-on", "random", *work]
    run = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 3 and "too few test clips of BalanceBeam" in run.stderr, run.stderr


def test_chain_on_real_hmdb51_clips(real_data, empty, tmp_path):
    """Original files under official names, odd ones among them: two classes with training and test clips, 112 px."""
    spec, root = common.DATASETS["hmdb51"], tmp_path / "data"
    shutil.copytree(real_data / spec["lists"], root / spec["lists"])
    originals = sorted((real_data / spec["videos"]).rglob("*.avi"))
    wanted = {}
    for label, name, split, _ in common.list_clips("hmdb51", root):
        if label in ("hug", "wave"):
            odd = not name.replace("_", "").isalnum()
            wanted.setdefault((label, split), []).append((not odd, name))
    for (label, _), names in wanted.items():
        for i, (_, name) in enumerate(sorted(names)[:3]):
            target = root / spec["videos"] / label / f"{name}.avi"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(originals[i], target)
    shared = ["--classes", "hug,wave", "--work-dir", str(tmp_path / "work"), "--data-root", str(root)]
    place = Place(root, empty.model, tmp_path / "work")
    place.words = lambda number, *extra: [str(SCRIPTS[number]), "hmdb51", *extra, *shared]
    for number, extra in (
        ("01", ["--partial", "--size", "64x32", "--model", str(empty.model)]),
        ("02", ["1"]),
        ("02", ["1", "--hmdb-train", "official", "--name", "official"]),
        ("03", ["1", "--steps", "2", "--model", str(empty.model), "--unet", "published"]),
        ("04", ["1"]),
        ("05", ["1", "--epochs", "1", "--repeats", "1", "--protocol", "gvd"]),
        ("05", ["1", "--epochs", "1", "--repeats", "1", "--train-on", "random"]),
    ):
        code, text = place.run(number, *extra)
        assert code == 0, text
    assert any("#" in row["name"] or "[" in row["name"] or row["name"][0] == "-"
               for row in common.read_csv(tmp_path / "work/hmdb51/01_clips/index.csv"))  # fmt: skip
    rows = common.read_csv(tmp_path / "work/hmdb51/01_latents/index.csv")
    for folder, official in (("direct", False), ("official", True)):
        members = common.read_csv(tmp_path / f"work/hmdb51/02_prototypes/ipc1/{folder}/hug.csv")
        wanted = [r["name"] for r in rows if r["class"] == "hug" and (r["official"] == "1" or not official)]
        assert [m["name"] for m in members] == wanted
    assert np.load(tmp_path / "work/hmdb51/01_clips/test/wave.npy").shape == (3, 1, 16, 112, 112, 3)
    assert np.load(tmp_path / "work/hmdb51/01_latents/hug.npy").shape == (3, 16, 4, 8, 16)


def test_missing_data_set_says_what_to_get(empty, tmp_path):
    for dataset, words in (
        ("hmdb51", "unrar x hmdb51_org.rar"),
        ("miniucf", "unrar x UCF101.rar"),
        ("demo", "draw_videos.py"),
    ):
        with pytest.raises(contract.ContractError) as error:
            common.list_clips(dataset, tmp_path)
        assert words in str(error.value) and str(tmp_path) in str(error.value)
