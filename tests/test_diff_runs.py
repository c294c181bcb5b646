"""tools/diff_runs.py says what differs between two runs, which stage first and why."""

import contract

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from conftest import load

diff_runs = load("tools/diff_runs.py")


def diff(*words):
    """(exit code, what it printed)."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["diff_runs.py", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as stop:
            contract.run(diff_runs.parse_args, diff_runs.main, lambda args: {})
    finally:
        sys.argv = before
    return stop.value.code, out.getvalue()


def test_the_same_run_twice(done, place):
    code, text = diff(done.work, place.work)
    assert code == 0 and text.startswith("equal: ")
    code, text = diff(done.work / "demo", place.work / "demo", "--json")
    assert code == 0 and json.loads(text) == {"equal": True, "first": None, "different": {}}


def test_another_guidance(done, place):
    """The stage whose option it was comes first; the later ones have other inputs."""
    for words in (("03", "--guidance", 0.3, "--save-latents"), ("04",), ("05",)):
        place.must(*words)
    code, text = diff(done.work, place.work)
    assert code == 1
    assert text.startswith("first: demo/03_samples/ipc2/gvd: parameter guidance 0.1 -> 0.3\n")
    assert "02_prototypes" not in text and "01_latents" not in text
    assert "demo/04_distilled/ipc2/gvd: input " in text and "demo/05_results/ipc2/gvd/" in text
    assert ".npy Walk: only in B 8" in text and ".mp4 Walk: differ 8, PSNR " in text
    paths = [w.work / "demo/05_results/ipc2/gvd/minic3d__hard__demo/result.json" for w in (done, place)]
    a, b = (contract.read(path)["top1"]["mean"] for path in paths)
    assert re.search(rf"\n  top-1 {a:.2f} -> {b:.2f} %: {re.escape(f'{b - a:+.2f}')} .* its spread\n", text)
    folder = place.work / "demo/03_samples/ipc2"
    code, text = diff(folder / "gvd.old-1", folder / "gvd")
    assert code == 1 and text.startswith("first: .: parameter guidance 0.1 -> 0.3\n")


def test_another_seed(done, place):
    place.must("02", "--seed", 1)
    code, text = diff(done.work, place.work, "--json")
    found = json.loads(text)
    assert code == 1 and found["first"] == "demo/02_prototypes/ipc2/direct" and len(found["different"]) == 1
    assert found["different"][found["first"]]["why"] == ["parameter seed 0 -> 1"]


def test_changed_arrays_and_choices(done, place):
    """Numbers by class: the largest and the mean difference, rows that changed."""
    folder = place.work / "demo/02_prototypes/ipc2/direct"
    array = np.load(folder / "Walk.npy")
    array[0, 0, 0, 0, 0] += 0.5
    contract.save(folder / "Walk.npy", array)
    rows = (folder / "Wave.csv").read_text().splitlines()
    (folder / "Wave.csv").write_text("\n".join([*rows[:-1], "v_other,0,0.0"]) + "\n")
    code, text = diff(done.work, place.work, "--json")
    (found,) = json.loads(text)["different"].values()
    assert code == 1 and len(found["damaged"]) == 2
    walk, wave = found["files"][".npy"]["Walk"], found["files"][".csv"]["Wave"]
    assert walk["differ"] == 1 and walk["max"] == pytest.approx(0.5, abs=1e-3)
    assert walk["mean"] == pytest.approx(0.5 / array.size, rel=1e-2) and wave["changed rows"] == 1
    assert found["files"][".npy"]["Wave"] == {"identical": 1, "differ": 0, "only in A": 0, "only in B": 0}


def test_another_library_and_a_damaged_file(done, place):
    record = place.work / "demo/04_distilled/ipc2/gvd/manifest.json"
    changed = contract.read(record)
    now, changed["versions"]["av"] = changed["versions"]["av"], "0.1"
    contract.save(record, changed)
    code, text = diff(done.work, place.work)
    assert code == 1 and text.startswith(f"first: demo/04_distilled/ipc2/gvd: library av {now} -> 0.1\n")
    assert ".mp4: identical in Walk, Wave" in text
    video = place.work / "demo/03_samples/ipc2/gvd/Walk/0_1.mp4"
    video.write_bytes(video.read_bytes()[:100])
    code, text = diff(done.work, place.work)
    assert code == 1 and text.startswith("first: demo/03_samples/ipc2/gvd: 1 damaged\n")
    record = place.work / "demo/02_prototypes/ipc2/direct/manifest.json"
    record.write_bytes(record.read_bytes()[:100])
    code, text = diff(done.work, place.work)
    assert code == 1 and text.startswith("first: demo/02_prototypes/ipc2/direct: 1 damaged\n")
    assert f"damaged: {record}" in text
    assert f"damaged: {video}" in text and ".mp4 Walk: identical 7, differ 1, unreadable 1" in text


def test_only_one_has_it_and_misuse(done, place, tmp_path):
    shutil.rmtree(place.work / "demo/05_results")
    contract.save(place.work / "demo/metrics_ipc2.json", {"a": 1})
    code, text = diff(done.work, place.work)
    assert code == 1 and "demo/05_results/ipc2/gvd/minic3d__hard__demo: only in A" in text
    assert "files without a record: only in B" in text
    (tmp_path / "empty").mkdir()
    for words in ((done.work,), (done.work, tmp_path / "no"), (done.work, tmp_path / "empty")):
        code, text = diff(*words)
        assert code == 2 and "Traceback" not in text


def test_accuracy_beyond_its_spread():
    def change(new, *stds):
        a, b = ({"top1": {"mean": m, "std": s, "n": 4}} for m, s in zip((50, new), stds, strict=True))
        return diff_runs.accuracy(a, b)

    assert change(52.9, 2, 2) == {"A": 50, "B": 52.9, "change": 2.9, "error": 1.4142, "beyond": True}
    assert change(52.8, 2, 2)["beyond"] is False and change(60, None, 2)["beyond"] is None


def test_order_of_folders():
    """As one is made of another."""
    order = ["02_prototypes/ipc1/direct", "03_unet/default", "03_samples/ipc1/gvd", "04_distilled/ipc1/gvd"]
    order += ["05_networks/minic3d__demo", "05_coresets/ipc1/herding", "05_results/ipc1/gvd", ""]
    assert sorted(sorted(order), key=diff_runs.place) == order


def test_classes_of_files():
    names = ("Walk.npy", "train/Walk.npy", "Walk/0_0.mp4")
    assert {diff_runs.class_of(name) for name in names} == {"Walk"}
