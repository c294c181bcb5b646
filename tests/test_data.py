"""Stage 01: official lists, windows, hostile names, broken files, latents decoded again, real clips."""

import contract

import argparse
import hashlib
import os
import re
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, Place, load, write_video

import common
import media

STAGE = load("01")
# Clips of a split, and the sha256 of their sorted names without .avi, one a line.
LISTS = """
    miniucf train 4662 57cb5b1b5b0659b3fcf6dba965eb88b59567ca9bee963422e2a190d2e1ca126c
    miniucf test 1861 03151d5e9b7b129607e0a91e89b71ac986434f039338bca919d518a95ac50c98
    ucf101 train 9537 88ec191e9d2c91ab54299c8d29de96a93b1aaa63dee65a9b982dd6e1cb2824b0
    ucf101 test 3783 9786bbada20940362aae03b58ce6a8affb5a1944060b6bb4148edacd89b835df
    hmdb51 train 5236 b28ccfc83b36aaf170e796ff692a51d3f2bb6db193167b2329a37797ae345eea
    hmdb51 test 1530 d377318886e1191fc1c11e66021a90c0b1830fd473671969fb94c5b3e1378220"""
HMDB51_TRAIN = """77 77 72 79 100 78 82 97 73 115 134 78 106 86 77 75 83 97 88 121 100 98 72 98 76 76 74 96 86
    73 73 86 202 132 101 82 73 112 75 72 79 110 124 113 97 97 90 72 210 518 74"""  # clips of each class


@pytest.mark.parametrize(
    ("dataset", "split", "count", "sha256"), [line.split() for line in LISTS.splitlines()[1:]]
)
def test_official_lists(real_data, dataset, split, count, sha256):
    clips = [clip for clip in media.list_official(dataset, real_data) if clip[2] == split]
    names, spec = "\n".join(sorted(clip[1] for clip in clips)), media.DATASETS[dataset]
    assert hashlib.sha256(names.encode()).hexdigest() == sha256
    assert len(clips) == int(count) == spec["clips"][split == "test"]
    assert all(f"{label}_".lower() in name.lower() for label, name, _, _ in clips)  # HandStandPushups
    counts = [sum(clip[0] == label for clip in clips) for label in spec["classes"]]
    if dataset == "hmdb51":
        assert counts == ([30] * 51 if split == "test" else [int(n) for n in HMDB51_TRAIN.split()])
        assert sum(clip[3] for clip in clips) == (1530 if split == "test" else 3570)  # of the official split


def test_frames_and_windows_of_a_video():
    for count in (1, 5, 16, 64, 100):
        frames = media.uniform_frames(count)
        assert frames.tolist() == [int((i + 0.5) * count / 16) for i in range(16)]
        if count <= 16:  # no window to choose
            assert (STAGE.window_frames(count, contract.generator(0)) == frames).all()
    for count, stride, starts in ((64, 4, 3), (63, 3, 17), (100, 4, 39), (47, 2, 16), (32, 2, 1), (17, 1, 1)):
        windows = [STAGE.window_frames(count, contract.generator(0, i)) for i in range(60 * starts)]
        assert all((np.diff(frames) == stride).all() and frames[-1] < count - 1 for frames in windows)
        found, times = np.unique([frames[0] for frames in windows], return_counts=True)
        assert found.tolist() == list(range(starts)) and 25 < times.min() <= times.max() < 110  # uniform


def test_windows_depend_on_seed_clip_and_window_only():
    starts, flips = set(), []
    for seed, name in ((seed, str(name)) for seed in (0, 1) for name in range(40)):
        frames, flipped = STAGE.draw_windows("Walk", name, 3, seed, 100)
        again = STAGE.draw_windows("Walk", name, 1, seed, 100)
        assert (frames[:2] == again[0]).all() and (flipped[:2] == again[1]).all() and not flipped[0]
        assert (np.diff(frames[1:]) == 4).all() and (frames[0] == media.uniform_frames(100)).all()
        starts.add(tuple(frames[1:, 0]))
        flips += flipped[1:].tolist()
    assert len(starts) > 75 and 0.4 < np.mean(flips) < 0.6


def test_windows_are_added_to_a_finished_folder(latents, tmp_path):
    place, whole = latents.copy(tmp_path / "work"), latents._replace(work=tmp_path / "whole")
    assert place.run("01", "--windows")[0] == whole.run("01", "--windows")[0] == 0
    before, after = latents.files(), place.files()
    new = {f"demo/01_clips/windows/{split}/{label}.npy" for split in ("train", "test") for label in CLASSES}
    assert {*after} == {*before} | new
    assert {name for name in before if before[name] != after[name]} == {"demo/01_clips/manifest.json"}
    assert whole.files() == {name: data for name, data in after.items() if "/01_" in name}
    clips, spec = np.load(place.work / "demo/01_clips/windows/test/Walk.npy"), media.DATASETS["demo"]
    assert clips.shape == (2, 3, 16, 48, 48, 3)
    for row, views in zip(contract.read(place.work / "demo/01_clips/test/Walk.csv"), clips, strict=True):
        video = media.read_video(place.data / f"demo/UCF-101/Walk/{row['name']}.avi")
        drawn = zip(*STAGE.draw_windows("Walk", row["name"], 3, 0, len(video)), strict=True)
        expected = [media.network_clip(video[f], spec)[:, :, :: -1 if flip else 1] for f, flip in drawn]
        assert (views == expected[1:]).all()


@pytest.fixture
def fresh(empty, tmp_path):
    """A copy of the world that a test may change; nothing run yet."""
    return Place(shutil.copytree(empty.data, tmp_path / "data"), empty.model, tmp_path / "work")


def test_hostile_list_lines_are_refused(fresh):
    lines = "Walk/../../x.avi 1,../../x,-rf,Walk/..avi 1,Walk/a\\b.avi 1,Nowhere/v_x_g08_c01.avi 1"
    path = fresh.data / "demo/ucfTrainTestlist/trainlist01.txt"
    before = path.read_text()
    for line in (*lines.split(","), "Walk/v_Walk_g01_c01.avi"):  # a test clip
        path.write_text(before + line)
        code, text = fresh.run("01")
        assert code == 3 and ("trainlist01.txt, line 11: refused" in text or "in both splits" in text), text
        assert not fresh.work.exists()


def test_missing_data_and_partial(fresh):
    code, text = fresh._replace(data=fresh.work / "no data").run("01")
    assert code == 3 and f"python demo/draw_videos.py --data-root '{fresh.work}/no data'" in text, text
    code, text = fresh._replace(dataset="hmdb51", classes="hug").run("01")
    assert code == 3 and "docs/data.md" in text, text
    for path in (fresh.data / "demo/UCF-101/Walk").glob("v_Walk_g0*"):
        path.unlink()
    code, text = fresh.run("01")
    assert code == 3 and "12 of 14 listed clips; --partial" in text, text
    assert fresh.run("01", "--partial")[0] == 0
    assert np.load(fresh.work / "demo/01_clips/test/Walk.npy").shape == (0, 1, 16, 48, 48, 3)
    (fresh.data / "demo/UCF-101/Walk").rename(fresh.data / "Walk")
    assert "none of Walk\n" in fresh.run("01", "--partial", "--dry-run")[1]


@pytest.mark.parametrize(
    "layout", ["UCF-101/{split}/{label}/{name}.avi", "{name}.avi", "UCF-101/jumpingjack/{name}.avi",
               "videos of it/{label}/{name}.avi", "UCF-101/{label}/{name}.mp4"],
)  # fmt: skip
def test_clips_elsewhere_are_found_and_the_command_mends_it(empty, tmp_path, layout):
    place, source = (
        Place(tmp_path / "data", empty.model, tmp_path / "work", "miniucf", "JumpingJack"),
        empty.data,
    )
    for split, group in (("train", 10), ("test", 1)):
        name, made = f"v_JumpingJack_g{group:02d}_c01", f"Walk/v_Walk_g{group:02d}_c01.avi"
        lists = place.data / f"UCF101/ucfTrainTestlist/{split}list01.txt"
        contract.save(lists, f"JumpingJack\\{name}.avi\n".encode())
        path = place.data / "UCF101" / layout.format(split=split, label="JumpingJack", name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "demo/UCF-101" / made, path)
    code, text = place.run("01", "--size", "32x32")
    assert code == 3 and "2 videos of these names elsewhere" in text, text
    subprocess.run(text.split("to fix:  ")[1], shell=True, check=True)
    code, text = place.run("01", "--size", "32x32")
    assert code == 0, text


def test_broken_videos_are_named_and_counted(fresh):
    """What is good is kept, and a repaired video concerns its class alone."""
    walk = sorted((fresh.data / "demo/UCF-101/Walk").glob("v_Walk_g1*"))
    good = walk[3].read_bytes()
    for path, data in zip(walk, (b"", b"noise" * 600, good[:2500], good[: len(good) * 2 // 3]), strict=False):
        path.write_bytes(data)
    code, text = fresh.run("01", "--allow-bad", 3)
    assert code == 3 and "4 videos cannot be decoded" in text and "--allow-bad 4" in text, text
    assert all(path.name in text for path in walk[:4]), text
    kept = {name: data for name, data in fresh.files().items() if name.endswith("npy")}
    assert {name.split("/")[-1] for name in kept} == {"Wave.npy"}
    walk[3].write_bytes(good)
    code, text = fresh.run("01", "--allow-bad", 3)
    assert code == 0 and "stale" not in text and kept.items() <= fresh.files().items(), text
    assert np.load(fresh.work / "demo/01_clips/train/Walk.npy").shape == (2, 1, 16, 48, 48, 3)
    rows = contract.read(fresh.work / "demo/01_latents/Walk.csv")
    assert [row["name"] for row in rows] == [path.stem for path in walk[3:]]


def test_broken_videos_of_all_processes_count(fresh):
    for label in CLASSES:
        (fresh.data / f"demo/UCF-101/{label}/v_{label}_g10_c01.avi").write_bytes(b"")
    process = fresh.spawn("01", "--allow-bad", 1, processes=2)
    texts = [process.communicate(timeout=120)[0], fresh.run("01", "--allow-bad", 1)[1]]
    assert process.returncode and all(
        f"v_{c}_g10_c01.avi: empty file" in text for c in CLASSES for text in texts
    )
    assert all("2 videos cannot be decoded" in text and "--allow-bad 2" in text for text in texts), texts
    assert fresh.run("01", "--allow-bad", 2)[0] == 0


def test_latents_decode_to_the_clip(tmp_path):
    """With the demo's VAE, its scaling factor set far from 1; a wrong pixel range costs 5 dB or more."""
    vae, lists = tmp_path / "model/vae", tmp_path / "demo/ucfTrainTestlist"
    shutil.copytree(common.DEMO_MODEL / "vae", vae)
    contract.save(vae / "config.json", contract.read(vae / "config.json") | {"scaling_factor": 0.2})
    draw, path = load("demo/draw_videos.py"), tmp_path / "demo/UCF-101/Walk/v_Walk_g08_c01.avi"
    contract.save(lists / "trainlist01.txt", b"Walk/v_Walk_g08_c01.avi 7")
    contract.save(lists / "testlist01.txt", b"")
    path.parent.mkdir(parents=True)
    draw.write_avi(path, video := draw.draw_clip("Walk", 8, 1, 0))  # uint8 BGR [n, 32, 32, 3]
    code, text = Place(tmp_path, tmp_path / "model", tmp_path, "demo", "Walk").run("01")
    assert code == 0, text
    latents = np.load(tmp_path / "demo/01_latents/Walk.npy")
    network = common.load_part(vae, "vae", torch.device("cpu"), torch.float32)
    decoded = common.decode(network, torch.from_numpy(latents[0]).float())
    error = decoded - video[media.uniform_frames(len(video)), :, :, ::-1].astype(float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 28 and 0.15 < latents.std() < 0.3
    network.encoder.conv_out.bias[0] = float("nan")
    network.save_pretrained(vae)
    code, text = Place(tmp_path, tmp_path / "model", tmp_path / "nan", "demo", "Walk").run("01")
    assert code == 3 and f"{path}: its latents are not finite" in text, text
    assert not [name for name in os.listdir(tmp_path / "nan/demo/01_latents") if name.endswith("npy")]


def test_short_portrait_and_long_videos(tmp_path):
    spec, path = media.DATASETS["hmdb51"], tmp_path / "-a#1[b]!&;(c)%@.avi"
    for count, size in ((1, (40, 32)), (3, (24, 64)), (200, (64, 48))):
        write_video(path, count, 0, size)
        video = media.read_video(path)
        assert video.shape == (count, size[1], size[0], 3)
        assert media.network_clip(video[media.uniform_frames(count)], spec).shape == (16, 112, 112, 3)
    frames = np.zeros((16, 120, 160, 3), np.uint8)
    frames[:, 4:116, 24:136] = 255  # the central crop
    assert media.network_clip(frames, spec).min() == 255


def test_real_clips(real_data, tmp_path):
    """As many frames as PyAV decodes; as .mp4 at least 38 dB, and the same bytes each time."""
    for path in sorted(real_data.rglob("*.avi")):
        with av.open(str(path), metadata_errors="ignore") as container:
            count = sum(1 for _ in container.decode(video=0))
        video, made = media.read_video(path), set()
        frames = media.resize_frames(video[media.uniform_frames(count)], (448, 256))
        for _ in range(3):
            media.write_mp4(tmp_path / "a.mp4", frames)
            made.add((tmp_path / "a.mp4").read_bytes())
        error = np.square(media.read_video(tmp_path / "a.mp4").astype(float) - frames).mean()
        assert (len(video), len(made)) == (count, 1) and 10 * np.log10(255**2 / error) >= 38, path.name


def test_hmdb51_with_and_without_unused_clips(empty, tmp_path):
    """At 112 px, under names as odd as the official ones; of the other classes nothing is listed."""
    place = Place(tmp_path / "data", empty.model, tmp_path / "work", "hmdb51", "hug")
    names = [
        "-_FREE_HUGS_-_hug_u_cm_np2_ba_goo_10",
        "x y_hug_f_cm_np1_ba_med_1",
        "a#1[b]!&;(c)%@~_hug_f_cm_np1_ba_med_0",
    ]
    for label in media.DATASETS["hmdb51"]["classes"]:
        lines = [
            f"{name}.avi {mark} \n" for name, mark in zip(names, (1, 0, 2), strict=True) if label == "hug"
        ]
        path = place.data / f"HMDB51/testTrainMulti_7030_splits/{label}_test_split1.txt"
        contract.save(path, "".join(lines).encode())
    for seed, name in enumerate(names):
        write_video(place.data / f"HMDB51/hmdb51_org/hug/{name}.avi", 70, seed, (64, 48))
    for mode, count in (("all", 2), ("official", 1)):
        code, text = place.run("01", "--windows", "--size", "64x32", "--hmdb-train", mode)
        assert code == 0, text
        rows = contract.read(place.work / "hmdb51/01_latents/hug.csv")
        assert [(row["name"], row["official"]) for row in rows] == [*zip(names, "10", strict=False)][:count]
        assert np.load(place.work / "hmdb51/01_latents/hug.npy").shape == (count, 16, 4, 8, 16)
        assert np.load(place.work / "hmdb51/01_clips/windows/test/hug.npy").shape == (1, 3, 16, 112, 112, 3)


def test_another_size_holds_for_the_later_stages(latents, tmp_path):
    """Also for naive, which reads no prototypes; without --size it is the data set's own again."""
    place = latents.copy(tmp_path / "work")
    place.must("01", "--size", "48x32")
    place.must("02")
    for sampler in ("gvd", "naive"):
        place.must("03", "--sampler", sampler, "--draws", 1)
        video = media.read_video(place.work / f"demo/03_samples/ipc2/{sampler}/Walk/0_0.mp4")
        assert video.shape == (16, 32, 48, 3)
    assert "size [48, 32] -> [32, 32]" in place.must("01")


@pytest.fixture
def own(empty, tmp_path):
    """The demo's clips as one's own folder: `mine/{train,test}/<class>/*.avi`."""
    root = tmp_path / "data/mine"
    for split, label in ((split, label) for split in ("train", "test") for label in CLASSES):
        lines = (empty.data / f"demo/ucfTrainTestlist/{split}list01.txt").read_text().split()
        for name in (line for line in lines if line.startswith(f"{label}/")):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(empty.data / "demo/UCF-101" / name, root / split / name)
    return Place(tmp_path / "data", empty.model, tmp_path / "work", "mine")


def test_ones_own_folder_gives_what_the_demo_gives(own, sampled):
    shutil.copy(REPO / "prompts/demo.json", own.data / "mine/prompts.json")
    for script, words in (("01", ("--size", "32x32")), ("02", ()), ("03", ("--cfg", 2)), ("04", ())):
        code, text = own.run(script, *words)
        assert code == 0, text
    mine, demo = ({n.split("/", 1)[1]: data for n, data in place.files().items()} for place in (own, sampled))
    kinds = re.compile(r"(01_latents|02_|03_).*\.(npy|csv|mp4)|04_.*mp4|01_clips.*csv")
    assert {n: mine[n] for n in mine if kinds.match(n)} == {n: demo[n] for n in demo if kinds.match(n)}
    assert np.load(own.work / "mine/01_clips/train/Walk.npy").shape == (5, 1, 16, 112, 112, 3)
    code, text = own.run("05", "--train-on", "random", "--repeats", 1)
    assert code == 0, text
    result = next((own.work / "mine/05_results/ipc2/random").rglob("result.json"))
    assert (contract.read(result)["test clips"], result.parent.name) == (4, "minic3d__hard__gvd")
    assert own.run("01")[1].count("fresh: ") == 2  # of the size for which it was last asked


def test_ones_own_classes_endings_and_test_split(own):
    (root := own.data / "mine").joinpath("test").rename(root / "later")
    (root / "train/Wave").rename(root / "train/TaiChi - slow_motion")
    for path, ending in zip(
        sorted((root / "train/Walk").iterdir()), ("MP4", "mkv", "WebM", "m4v", "mov"), strict=True
    ):
        path.rename(path.with_name(f"clip {path.stem[-5:-4]}.{ending}"))
    own = own._replace(classes="TaiChi - slow_motion,Walk")
    code, text = own.run("01", "--size", "32x32", "--val", 0.4)
    assert code == 0, text
    rows = [contract.read(own.work / f"mine/01_clips/{split}/Walk.csv") for split in ("train", "test")]
    assert [[row["name"] for row in of_split] for of_split in rows] == [
        ["clip 0", "clip 1", "clip 2"],
        ["clip 3", "clip 4"],
    ]
    args = argparse.Namespace(
        prompt_file=None, dataset="mine", data_root=own.data, classes=own.classes.split(",")
    )
    assert common.read_prompts(args)["TaiChi - slow_motion"] == "a video of tai chi slow motion"
    assert own.run("02")[0] == own.run("03")[0] == 0
    assert own.run("01")[1].count("fresh: ") == 2  # with the same test split
    (root / "later").rename(root / "test")
    code, text = own.run("01", "--val", 0.4)
    assert code == 2 and "without a folder test" in text, text


ODD = {  # a command in the folder of one's own clips: what stage 01 says
    "mv train other": "data/mine/train has no classes",
    "rm train/Walk/*": "mine/train/Walk: too few videos",
    "rm test/Walk/*": "mine/test/Walk: too few videos",
    "touch train/labels.csv": "train/labels.csv' is no class",
    "mkdir train/Run": "class Run is not in both splits",
    "mv test/Wave test/wave": "class Wave is not in both splits",
    "touch train/Walk/notes.txt": "train/Walk/notes.txt' is no video file",
    "cp train/Walk/v_Walk_g10_c01.avi train/Walk/v_Walk_g10_c01.mp4": "another video has this name",
    "touch train/Walk/a.mp4": "train/Walk/a.mp4: empty file",
    "ln -s nowhere train/Walk/a.mp4": "train/Walk/a.mp4' is no video file",
    "mv train/Wave train/vae": "no class can be called vae",
    "rm -r test; touch test": "test is no folder",
}


@pytest.mark.parametrize("command", ODD)
def test_odd_folders_are_named(own, command):
    subprocess.run(command, shell=True, check=True, cwd=own.data / "mine")
    code, text = own.run("01", "--size", "32x32")
    assert code == 3 and ODD[command] in text and "Traceback" not in text, text
