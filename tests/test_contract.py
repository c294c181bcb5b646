"""The contract: identity, fresh or stale, resumption, damage. On the whole chain with a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import CLASSES, REPO, SCRIPTS, Place, load_stage

import common
import contract

FOLDERS = {
    "01": ["01_latents", "01_clips"],
    "02": ["02_prototypes/ipc2/direct"],
    "03": ["03_samples/ipc2/gvd"],
    "04": ["04_distilled/ipc2/gvd"],
    "05": ["05_results/ipc2/gvd/minic3d__hard__demo"],
}
MADE_BY = [(number, folder) for number, folders in FOLDERS.items() for folder in folders]
READER = {"01_latents": "02", "01_clips": "05", "02": "03", "03": "04", "04": "05"}


def reader(folder):
    return READER.get(folder) or READER.get(folder[:2])


# ---------------------------------------------------------------------------------------------------------------------
# What a stage leaves
# ---------------------------------------------------------------------------------------------------------------------


def test_shapes_and_dtypes(done):
    root = done.work / "demo"
    for label in CLASSES:
        for path, shape, dtype in (
            (f"01_latents/{label}.npy", (5, 16, 4, 8, 8), "float16"),
            (f"01_clips/train/{label}.npy", (5, 1, 16, 48, 48, 3), "uint8"),
            (f"01_clips/test/{label}.npy", (2, 1, 16, 48, 48, 3), "uint8"),
            (f"02_prototypes/ipc2/direct/{label}.npy", (2, 16, 4, 8, 8), "float32"),
            (f"03_samples/ipc2/gvd/{label}/1_3.npy", (16, 4, 8, 8), "float16"),
        ):
            array = np.load(root / path, allow_pickle=False)
            assert (array.shape, array.dtype) == (shape, np.dtype(dtype)), path
        for path in (f"03_samples/ipc2/gvd/{label}/0_0.mp4", f"04_distilled/ipc2/gvd/{label}/1.mp4"):
            assert common.read_video(root / path).shape == (16, 32, 32, 3)
    assert len(list((root / "03_samples/ipc2/gvd").rglob("*.mp4"))) == 2 * 2 * 4
    metadata = common.read_csv(root / "04_distilled/ipc2/gvd/metadata.csv")
    assert [row["file_name"] for row in metadata] == ["Walk/0.mp4", "Walk/1.mp4", "Wave/0.mp4", "Wave/1.mp4"]


@pytest.mark.parametrize(("number", "folder"), MADE_BY)
def test_manifest_lists_every_file_and_nothing_volatile(done, number, folder):
    folder = done.work / "demo" / folder
    manifest = json.loads((folder / "manifest.json").read_text())
    own = {"manifest.json", "identity.json", "log.txt", "timing.json"}
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - own
    assert set(manifest["outputs"]) == files
    text = (folder / "manifest.json").read_text()
    assert str(done.work) not in text and str(done.data) not in text and os.uname().nodename not in text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    identity = json.loads((folder / "identity.json").read_text())
    assert identity.pop("sha256") == contract.digest(identity) and manifest["identity"] == identity


def test_results_have_every_raw_value(done):
    folder = done.work / "demo" / FOLDERS["05"][0]
    result = json.loads((folder / "result.json").read_text())
    values = [json.loads((folder / f"repeat_{r}.json").read_text())["top1"] for r in range(2)]
    assert result["top1"]["values"] == values and result["top1"]["n"] == 2
    assert result["complete"] is False  # two epochs are short of the protocol
    assert set(result["per_class"]) == set(CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# Fresh or stale
# ---------------------------------------------------------------------------------------------------------------------


def test_everything_is_fresh_the_second_time(place):
    before = place.files()
    for number in SCRIPTS:
        code, text = place.run(number)
        assert code == 0 and f"{number} fresh" in text and "done" not in text, text
    assert place.files() == before


def test_another_option_is_named_the_old_folder_kept_and_taken_back(place):
    before = place.files()
    code, text = place.run("03", "--guidance", 0.3)
    assert code == 0 and "03 stale: guidance 0.1 -> 0.3" in text, text
    assert len(list((place.work / "demo/03_samples/ipc2").glob("gvd.old-????????"))) == 1
    for number in ("04", "05"):
        code, text = place.run(number)
        assert code == 0 and f"{number} stale: " in text, text
    assert "01 fresh" in place.run("01")[1] and "02 fresh" in place.run("02")[1]
    for number in ("03", "04", "05"):
        code, text = place.run(number)
        assert code == 0 and f"{number} taken back from" in text and f"{number} fresh" in text, text
    now = place.files()
    assert {name: now[name] for name in before} == before


def test_equal_inputs_stay_fresh_whatever_made_them(place):
    """02 is made by another name for the same prototypes: 03 looks at their bytes, not at how they were made."""
    path = place.work / "demo/02_prototypes/ipc2/direct"
    manifest = json.loads((path / "manifest.json").read_text())
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    body["identity"]["code"]["02_kmeans_prototypes.py"]["kmeans"] = "0" * 16
    signed = {**body["identity"], "sha256": contract.digest(body["identity"])}
    (path / "identity.json").write_text(json.dumps(signed))
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": contract.digest(body)}))
    assert "03 fresh" in place.run("03")[1]
    code, text = place.run("02", "--accept-code")
    assert code == 0 and "02 accepted: kmeans in 02_kmeans_prototypes.py changed" in text, text
    assert "02 fresh" in place.run("02")[1]


def edited(tmp_path, number, *changes):
    """A copy of a stage and of the shared modules with changes to their text; runs dry: what it prints."""
    for path in (*SCRIPTS.values(), REPO / "common.py", REPO / "contract.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(REPO / "prompts", tmp_path / "prompts")
    for file, old, new in changes:
        text = (tmp_path / file).read_text()
        assert old in text, old
        (tmp_path / file).write_text(text.replace(old, new, 1))
    return str(tmp_path / SCRIPTS[number].name)


EDITS = [
    ("03", "common.py", "import csv\n", "import csv\n\n# a remark\n", "03 fresh"),
    ("03", "common.py", '"""Guidance strength per frame', '"""Another sentence. Guidance strength per frame', "03 fresh"),
    ("03", "03_guided_sample.py", "must be between 0 and 1", "lies between 0 and 1", "03 fresh"),
    ("03", "03_guided_sample.py", "latents are not finite", "latents are infinite", "03 fresh"),
    ("03", "03_guided_sample.py", 'help="see above (gvd)"', 'help="another text"', "03 fresh"),
    ("03", "03_guided_sample.py", "FPS = 8", "FPS = 10", "03 stale: FPS 8 -> 10"),
    ("03", "03_guided_sample.py", "GUIDANCE = 0.1", "GUIDANCE = 0.3", "03 stale: guidance 0.1 -> 0.3; GUIDANCE 0.1 -> 0.3"),
    ("03", "common.py", "return strength * (1 -", "return 2 * strength * (1 -", "03 stale: linear_decay in common.py changed"),
    ("02", "common.py", "return strength * (1 -", "return 2 * strength * (1 -", "02 fresh"),
    ("04", "common.py", "self.dropout = nn.Dropout(0.5)", "self.dropout = nn.Dropout(0.4)", "04 fresh"),
    ("05", "common.py", "self.dropout = nn.Dropout(0.5)", "self.dropout = nn.Dropout(0.4)", "05 stale: MiniC3D in common.py"),
    ("01", "common.py", "size=(448, 256)", "size=(320, 256)", "01 fresh"),
]


@pytest.mark.parametrize(("number", "file", "old", "new", "expected"), EDITS)
def test_what_an_edit_makes_stale(done, tmp_path, number, file, old, new, expected):
    script = edited(tmp_path, number, (file, old, new))
    words = [sys.executable, script, *done.words(number)[1:], "--dry-run"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0 and expected in run.stdout, run.stdout + run.stderr


def test_what_was_automatic_takes_the_recorded_value(place, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))  # as if copied to a server
    assert "03 fresh" in place.run("03")[1]
    threads = json.loads((place.work / "demo/03_samples/ipc2/gvd/identity.json").read_text())["parameters"]["threads"]
    code, text = place.run("03", "--threads", threads + 1, "--dry-run")
    assert f"03 stale: threads {threads} -> {threads + 1}" in text


def test_larger_extents_add_files_and_change_none(empty, done, tmp_path):
    place = Place(empty.data, empty.model, tmp_path / "work")
    for number, extra in (
        ("01", ["--classes", "Wave"]), ("01", []), ("02", ["--classes", "Walk"]), ("02", []),
        ("03", ["--draws", 1]), ("03", ["--draws", 3, "--classes", "Wave"]), ("03", []), ("04", ["--classes", "Wave"]),
        ("04", []), ("05", ["--repeats", 1]), ("05", []),
    ):  # fmt: skip
        code, text = place.run(number, *extra)
        assert code == 0 and "stale" not in text, text
    assert place.files() == done.files()


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("number", "folder"), MADE_BY)
def test_one_changed_byte_is_found_named_and_mended(done, tmp_path, number, folder):
    names = sorted(json.loads((done.work / "demo" / folder / "manifest.json").read_text())["outputs"])
    kinds = {name.rsplit(".", 1)[-1]: name for name in names}  # one file of every kind
    for kind, name in kinds.items():
        place = done.copy(tmp_path / kind)
        path = place.work / "demo" / folder / name
        flip_byte(path)
        code, text = place.run(number)
        assert code == 3 and str(path) in text and "expected: sha256" in text and "--redo" in text, text
        if reader(folder):
            code, text = place.run(reader(folder))
            assert code == 3 and str(path) in text and SCRIPTS[number].name in text and "--redo" in text, text
        code, text = place.run(number, "--redo")
        assert code == 0, text
        assert place.files() == done.files()


@pytest.mark.parametrize(("number", "folder"), MADE_BY)
def test_a_changed_manifest_is_found_and_mended(place, done, number, folder):
    path = place.work / "demo" / folder / "manifest.json"
    path.write_text(path.read_text().replace('"bytes": ', '"bytes": 1', 1))
    code, text = place.run(number)
    assert code == 3 and "manifest.json" in text and "--redo" in text, text
    if reader(folder):
        assert place.run(reader(folder))[0] == 3
    assert place.run(number, "--redo")[0] == 0
    now = place.files()
    assert {name: now[name] for name in done.files()} == done.files()  # and the damaged folder is kept aside


@pytest.mark.parametrize(("number", "folder"), MADE_BY)
def test_a_missing_file_is_made_again(place, done, number, folder):
    names = sorted(json.loads((place.work / "demo" / folder / "manifest.json").read_text())["outputs"])
    (place.work / "demo" / folder / names[-1]).unlink()
    if reader(folder):
        code, text = place.run(reader(folder))
        assert code == 3 and names[-1] in text and "no such file" in text, text
    assert place.run(number)[0] == 0
    assert place.files() == done.files()


def test_wrong_shape_is_named(place):
    """An array of another shape under a manifest that agrees with it: found when it is read."""
    folder = place.work / "demo/02_prototypes/ipc2/direct"
    contract.save_array(folder / "Walk.npy", np.zeros((3, 16, 4, 8, 8), np.float32))
    body = {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != "sha256"}
    body["outputs"]["Walk.npy"]["sha256"] = contract.Hashes(place.work)(folder / "Walk.npy")
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": contract.digest(body)}))
    code, text = place.run("03")
    assert code == 3 and "expected: float32 [2, 16, 4, n, n]" in text and "found:    float32 [3, 16, 4, 8, 8]" in text, text
    assert "02_kmeans_prototypes.py" in text


def test_pickled_arrays_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(contract.ContractError, match="expected: uint8"):
        contract.load_array(tmp_path / "a.npy", (None,), "uint8", "python x")


def test_more_clusters_than_clips(place):
    code, text = run_with_ipc(place, "02", 6)
    assert code == 3 and "expected: at least 6" in text and "found:    5" in text and "Walk.npy" in text, text


def run_with_ipc(place, number, ipc, *extra):
    words = place.words
    place.words = lambda *a: [word if word != "2" else str(ipc) for word in words(*a)]
    try:
        return place.run(number, *extra)
    finally:
        place.words = words


def test_missing_input_names_the_command(empty, tmp_path):
    place = Place(empty.data, empty.model, tmp_path / "work")
    for number, made_by in (("02", "01"), ("03", "02"), ("04", "03"), ("05", "01")):
        code, text = place.run(number)
        assert code == 3 and f"{contract.python()} {SCRIPTS[made_by].name} demo" in text and "is missing" in text, text


def test_missing_class_in_prompts_and_prototypes(place, tmp_path):
    (tmp_path / "p.json").write_text('{"Walk": "a man walks"}')
    code, text = place.run("03", "--prompt-file", tmp_path / "p.json")
    assert code == 3 and "no prompt for class Wave" in text, text
    code, text = place.run("03", "--classes", "Walk,Kick")
    assert code == 3 and "Kick.npy is missing" in text and "02_kmeans_prototypes.py" in text, text
    code, text = place.run("03", "--classes", "Nobody")
    assert code == 2 and "no class 'Nobody'" in text


def test_a_bare_folder_of_videos_is_taken(place, tmp_path):
    bare = tmp_path / "mine"
    for label in CLASSES:
        shutil.copytree(place.work / "demo/04_distilled/ipc2/gvd" / label, bare / label)
    code, text = place.run("05", "--train-on", bare)
    assert code == 0, text
    values = [
        json.loads((place.work / f"demo/05_results/ipc2/{name}/minic3d__hard__demo/result.json").read_text())["top1"]
        for name in ("mine", "gvd")
    ]
    assert values[0] == values[1]


# ---------------------------------------------------------------------------------------------------------------------
# Killed and repeated
# ---------------------------------------------------------------------------------------------------------------------


def test_two_runs_leave_the_same_bytes(done, empty, tmp_path):
    """Another process, hash seed, thread variable and time zone."""
    place = Place(empty.data, empty.model, tmp_path / "other")
    for number in SCRIPTS:
        process = place.spawn(number, PYTHONHASHSEED="77", OMP_NUM_THREADS="1", TZ="Asia/Tokyo")
        out, _ = process.communicate()
        assert process.returncode == 0, out
    assert place.files() == done.files()


KILLS = [(number, share) for number in SCRIPTS for share in (0.0, 0.4, 0.8)]


@pytest.mark.parametrize(("number", "share"), KILLS)
def test_killed_and_taken_up_again(done, tmp_path, number, share):
    """SIGKILL once a share of the stage's files is written, also while one is being written; then run again."""
    place = done.copy(tmp_path / "work")
    for folder in FOLDERS[number]:
        shutil.rmtree(place.work / "demo" / folder)
    first = place.work / "demo" / FOLDERS[number][0]
    total = len([name for name in done.files() if name.startswith(f"demo/{FOLDERS[number][0]}/")])
    process = place.spawn(number)
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        files = [p for p in first.rglob("*") if p.is_file()] if first.exists() else []
        if len(files) > share * total:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    code, text = place.run(number)
    assert code == 0, text
    assert place.files() == done.files()


def test_kills_at_the_worst_moment_leave_whole_files(tmp_path):
    """A writer that is killed again and again: the file is always the old or the new one."""
    program = "import contract, sys\nwhile True:\n for c in b'ab':\n  with contract.atomic(sys.argv[1]) as h:\n"
    program += "   h.write(bytes([c]) * 300000)\n"
    path = tmp_path / "file"
    for wait in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=REPO)
        while not path.exists() or process.poll() is not None:
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.wait()
        assert path.read_bytes() in (b"a" * 300000, b"b" * 300000)
    contract.remove_temporaries(tmp_path.glob(".tmp-*"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_killed_training_goes_on_from_its_checkpoint(done, tmp_path, monkeypatch):
    """An interrupt after epoch 20 of 22: the checkpoint is used, and the weights end the same."""
    import torch

    stage, clips = load_stage("05"), torch.randint(256, (8, 16, 48, 48, 3), generator=torch.Generator().manual_seed(0))
    clips, labels = clips.to(torch.uint8), torch.arange(8) % 2
    protocol = {**stage.PROTOCOLS["demo"], "epochs": 22, "min_steps": 0}

    def train(path):
        with torch.random.fork_rng():
            return stage.train(clips, labels, 2, protocol, 0, 0, torch.float32, path)

    whole, _ = train(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    epochs = []

    def stop(*args):
        epochs.append(args)
        if len(epochs) == 21:
            raise KeyboardInterrupt
        return original(*args)

    original = stage.to_input
    monkeypatch.setattr(stage, "to_input", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a.pt")
    monkeypatch.setattr(stage, "to_input", original)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 20
    again, _ = train(tmp_path / "a.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_checkout(tmp_path_factory):
    """The project without demo/ and tools/."""
    root = tmp_path_factory.mktemp("bare") / "gvd"
    ignored = shutil.ignore_patterns("demo", "tools", "work", "data", ".venv", ".git", "__pycache__")
    shutil.copytree(REPO, root, ignore=ignored)
    return root


@pytest.mark.parametrize("number", SCRIPTS)
def test_help_is_the_docstring(bare_checkout, number):
    run = subprocess.run([sys.executable, SCRIPTS[number].name, "--help"], cwd=bare_checkout, capture_output=True, text=True)
    assert run.returncode == 0
    for field in ("Reads:", "Writes:", "Run:", "Cost:", "Expect:", "Differs:", "--dry-run"):
        assert field in run.stdout


def run_all(root, *words):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "run_all.sh", *words], cwd=root, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )


def test_plan_of_the_real_run_without_demo_tools_and_data(bare_checkout):
    run = run_all(bare_checkout, "hmdb51", "20", "--quick", "--unet", "published", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "0 of 6,766 clips" in run.stdout and "0 of 4,080 videos" in run.stdout and "A100" in run.stdout
    assert len(run.stdout.splitlines()) == 7


@pytest.mark.parametrize("words", [["nothing"], ["demo", "0"], ["demo", "x"], ["--bad"], ["--from", "9"], ["--seed"]])
def test_wrong_words_are_usage_errors(bare_checkout, words):
    run = run_all(bare_checkout, *words)
    assert run.returncode == 2 and "--help" in run.stderr


def test_run_all_help(bare_checkout):
    run = run_all(bare_checkout, "-h")
    assert run.returncode == 0 and "usage: bash run_all.sh" in run.stdout


def test_run_all_runs_the_chain_to_its_table(empty, tmp_path, bare_checkout):
    """hmdb51's code path needs 51 classes; here the tiny world under the demo's name, from stage 2 on."""
    work = tmp_path / "work"
    Place(empty.data, empty.model, work).make("01")
    words = ["demo", "2", "--from", "2", "--work-dir", str(work), "--data-root", str(empty.data), "--classes", "Walk,Wave"]
    words += ["--model", str(empty.model), "--03", "--steps 2", "--05", "--epochs 1 --repeats 2", "--to", "4"]
    run = run_all(bare_checkout, *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "$ python 03_guided_sample.py demo 2" in run.stdout
    words = [*words[:-2], "--from", "5"]
    shutil.rmtree(work / "demo/01_clips")
    run = run_all(bare_checkout, *words)
    assert run.returncode == 3 and "01_encode_latents.py demo" in run.stderr


def test_table_says_mean_deviation_number_and_bytes(place):
    assert place.run("05", "--train-on", "random")[0] == 0
    code, text = place.run("05", "--table")
    assert code == 0, text
    rows = [line for line in text.splitlines() if line.startswith(("| gvd", "| random"))]
    assert len(rows) == 2 and all("(2)" in row and "±" in row and "short of its protocol" in row for row in rows)
    size = sum(p.stat().st_size for p in (place.work / "demo/04_distilled/ipc2/gvd").rglob("*.mp4"))
    assert f"| {4 * 16 * 48 * 48 * 3:,} |" in rows[0] and f"| {size:,} |" in rows[1]  # coresets first, as in Table 1
    assert (place.work / "demo/table_ipc2.md").read_text() == text


def test_saved_network_scores_videos(place):
    code, text = place.run("05", "--score")
    assert code == 3 and "--train-on full --save" in text, text
    code, text = place.run("05", "--train-on", "full", "--save", "--repeats", 1)
    assert code == 0, text
    assert "05 fresh" in place.run("05", "--train-on", "full", "--save", "--repeats", 1)[1]
    code, text = place.run("05", "--score")
    assert code == 0 and "of 4 videos recognised" in text, text
    score = json.loads((place.work / "demo/05_results/ipc2/gvd/score__minic3d__demo.json").read_text())
    assert score["videos"] == 4 and f"{score['top1']:.2f} % of 4" in text and sorted(score["per_class"]) == list(CLASSES)
    code, text = place.run("05", "--score", "--train-on", place.work / "demo/03_samples/ipc2/gvd")
    assert code == 0 and (place.work / "demo/05_results/ipc2/gvd-samples/score__minic3d__demo.json").exists(), text


@pytest.mark.parametrize("how", ["digit", "broken"])
@pytest.mark.parametrize("number", SCRIPTS)
def test_a_changed_identity_is_damage_and_not_another_identity(place, done, number, how):
    path = place.work / "demo" / FOLDERS[number][0] / "identity.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1') if how == "digit" else text[:-3])
    code, text = place.run(number)
    assert code == 3 and "identity.json has changed" in text and "--redo" in text, text
    assert place.run(number, "--redo")[0] == 0
    now = place.files()
    assert {name: now[name] for name in done.files()} == done.files()


def test_plan_of_a_stale_folder_counts_nothing_as_done(place):
    before = place.files()
    assert "03 stale: guidance 0.1 -> 0.3; 0 of 16 videos" in place.run("03", "--guidance", 0.3, "--dry-run")[1]
    (place.work / "demo/03_samples/ipc2/gvd/Walk/0_0.mp4").unlink()
    (place.work / "demo/03_samples/ipc2/gvd/Walk/0_0.npy").unlink()
    assert "03 15 of 16 videos" in place.run("03", "--dry-run")[1]
    assert len(place.files()) == len(before) - 2


# ---------------------------------------------------------------------------------------------------------------------
# Corners
# ---------------------------------------------------------------------------------------------------------------------


def test_an_incomplete_set_is_not_trained_on(place):
    folder = place.work / "demo/04_distilled/ipc2/gvd"
    (folder / "manifest.json").unlink()
    (folder / "Walk/0.mp4").unlink()
    code, text = place.run("05")
    assert code == 3 and "an incomplete one" in text and "04_mvic_compose.py" in text, text


@pytest.mark.parametrize("number", ["01", "04"])
def test_one_class_alone_after_a_killed_run(done, tmp_path, number):
    """The identity names both classes, one of them was never made."""
    place = done.copy(tmp_path / "work")
    for folder in FOLDERS[number]:
        folder = place.work / "demo" / folder
        (folder / "manifest.json").unlink()
        for path in [*folder.rglob("*Wave*"), folder / ("index.csv" if number == "01" else "metadata.csv")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    code, text = place.run(number, "--classes", "Walk")
    assert code == 0, text
    file = "01_clips/index.csv" if number == "01" else "04_distilled/ipc2/gvd/metadata.csv"
    assert "Wave" not in (place.work / "demo" / file).read_text()
    assert place.run(number)[0] == 0
    assert place.files() == done.files()


def test_weights_that_are_not_there_are_refused(empty, done, tmp_path):
    from safetensors.torch import load_file, save_file

    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        model = tmp_path / part
        shutil.copytree(empty.model, model)
        weights = load_file(model / part / file)
        weights.pop(sorted(weights)[3])
        save_file(weights, model / part / file)
        place = Place(empty.data, model, tmp_path / f"work_{part}")
        shutil.copytree(done.work, place.work)
        code, text = place.run("03")
        assert code == 3 and "lacks 1 weights" in text, text


@pytest.mark.parametrize(
    ("number", "extra", "words"),
    [
        ("03", ["--steps", "300"], "usable:"),
        ("03", ["--model", "nowhere"], "nowhere is missing"),
        ("03", ["--unet", "nowhere"], "expected: a U-Net"),
        ("03", ["--prompt-file", "tests"], "tests is damaged"),
        ("03", ["--device", "cuda"], "no such device"),
    ],
)
def test_bad_options_leave_the_folder_where_it_is(place, number, extra, words):
    before = place.files()
    code, text = place.run(number, *extra)
    assert code == 3 and words in text, text
    assert place.files() == before


@pytest.mark.parametrize("file", ["timing.json", "../../../../.cache/sha256.json"])
def test_damaged_bookkeeping_costs_nothing(place, done, file):
    folder = place.work / "demo/03_samples/ipc2/gvd"
    (folder / file).write_text("[")
    (folder / "Walk/0_0.npy").unlink()
    assert place.run("03")[0] == 0
    assert place.files() == done.files()


@pytest.mark.parametrize("text", ["{", '{"parameterz": 1}', "[]"])
def test_damaged_identity_of_an_incomplete_folder(place, done, text):
    folder = place.work / "demo/03_samples/ipc2/gvd"
    (folder / "manifest.json").unlink()
    (folder / "identity.json").write_text(text)
    code, out = place.run("03")
    assert code == 3 and "--redo" in out, out
    assert place.run("03", "--redo")[0] == 0
    now = place.files()
    assert {name: now[name] for name in done.files()} == done.files()


def test_a_kept_folder_that_is_damaged_stays_aside(place):
    assert place.run("03", "--guidance", 0.3)[0] == 0
    kept = next((place.work / "demo/03_samples/ipc2").glob("gvd.old-*"))
    (kept / "identity.json").write_text("{")
    for extra in ([], ["--guidance", 0.3], []):
        code, text = place.run("03", *extra)
        assert code == 0, text
    assert (kept / "identity.json").read_text() == "{"


def test_killed_between_the_manifest_and_the_end(place, done):
    folder = place.work / "demo/03_samples/ipc2/gvd"
    shutil.copy(folder / "manifest.json", folder / contract.EARLIER)
    assert "03 fresh" in place.run("03")[1]
    assert place.files() == done.files()


def test_saved_network_of_a_killed_run_is_completed(place):
    assert place.run("05", "--train-on", "full", "--save", "--repeats", 1)[0] == 0
    before = place.files()
    (place.work / "demo/05_networks/minic3d__demo/manifest.json").unlink()
    assert place.run("05", "--train-on", "full", "--save", "--repeats", 1)[0] == 0
    assert place.files() == before


def test_broken_videos_count_over_the_data_set(empty, tmp_path):
    place = Place(tmp_path / "data", empty.model, tmp_path / "work")
    shutil.copytree(empty.data, place.data)
    for label in CLASSES:
        (place.data / f"demo/UCF-101/{label}/v_{label}_g10_c01.avi").write_bytes(b"")
    for _ in range(2):
        code, text = place.run("01", "--allow-bad", 1)
        assert code == 3 and "2 videos cannot be decoded" in text and "--allow-bad 2" in text, text


def test_another_folder_does_not_take_a_set_s_name(place):
    code, text = place.run("05", "--train-on", place.work / "demo/03_samples/ipc2/gvd")
    assert code == 3 and "type --name" in text, text
    code, text = place.run("05", "--train-on", place.work / "demo/03_samples/ipc2/gvd", "--name", "uncomposed")
    assert code == 0, text
