"""The contract on the whole chain: fresh or stale, damage, hostile input, kills, full disks, Ctrl-C."""

import contract  # isort: skip

import ast
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, REPO, SCRIPTS

FOLDERS = {
    "01": ["01_latents", "01_clips"],
    "02": ["02_prototypes/ipc2/direct"],
    "03": ["03_samples/ipc2/gvd"],
    "04": ["04_distilled/ipc2/gvd"],
    "05": ["05_results/ipc2/gvd/minic3d__hard__demo"],
}
MADE_BY = {folder: number for number, folders in FOLDERS.items() for folder in folders}
READ_BY = {"01_latents": "02", "01_clips": "05", FOLDERS["02"][0]: "03", FOLDERS["03"][0]: "04"}
READ_BY[FOLDERS["04"][0]] = "05"


def record_of(place, folder):
    return json.loads((place.work / "demo" / folder / "manifest.json").read_text())


# --- what is recorded; fresh and stale


@pytest.mark.parametrize("folder", MADE_BY)
def test_record_lists_every_file_and_nothing_volatile(done, folder):
    path, record = done.work / "demo" / folder, record_of(done, folder)
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert {*record["outputs"]} == files - {"manifest.json", "log.txt"} and record["complete"] is True
    for name, entry in record["outputs"].items():
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": contract.sha256(path / name)}
    text = (path / "manifest.json").read_text()
    assert not re.search(rf"20\d\d-\d\d-\d\d|{done.work}|{done.data}|{REPO}", text)
    assert record["versions"]["torch"] and record["device"] == "cpu"


def test_second_run_is_fresh_and_writes_nothing(place):
    before = {path: path.stat().st_mtime_ns for path in place.work.rglob("*.*") if ".cache" not in path.parts}
    for number in SCRIPTS:
        code, text = place.run(number)
        assert code == 0 and f"{number} fresh" in text and "done" not in text, text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_stale_folder_is_renamed_with_the_reason_and_kept(place):
    before = place.files()
    code, text = place.run("03", "--guidance", 0.3, "--dry-run")
    assert code == 0 and "03 stale: guidance 0.1 -> 0.3; 16 of 16 videos left, " in text, text
    assert place.files() == before
    code, text = place.run("03", "--guidance", 0.3)
    assert code == 0 and "stale: guidance 0.1 -> 0.3; the old folder is kept as gvd.old-1" in text, text
    for number in ("04", "05"):
        code, text = place.run(number)
        assert code == 0 and re.search(rf"{number} stale: input \S+ .*changed", text), text
    code, text = place.run("03")
    assert code == 0 and "guidance 0.3 -> 0.1; the old folder is kept as gvd.old-2" in text, text
    now = place.files()
    for name, data in before.items():  # nothing was lost, and the same options make the same bytes again
        if name.startswith(f"demo/{FOLDERS['03'][0]}/"):
            assert now[name] == data == now[name.replace("/gvd/", "/gvd.old-1/")]


def test_keep_accepts_a_stale_folder_and_records_it(place):
    code, text = place.run("03", "--guidance", 0.3, "--keep")
    assert code == 0 and "03 kept although guidance 0.1 -> 0.3; fresh" in text, text
    assert record_of(place, FOLDERS["03"][0])["kept"] == [["guidance 0.1 -> 0.3"]]
    assert "03 fresh" in place.run("03", "--guidance", 0.3)[1]
    assert "04 fresh" in place.run("04")[1]  # its input has the same bytes


def edited(source, node):
    """A file's text with another value of a constant, or another last statement of a function."""
    lines = source.splitlines(keepends=True)
    if isinstance(node, ast.Assign):
        more = "".join(f"{ast.unparse(target)} = None, None\n" for target in node.targets)
    else:
        more = re.match(" *", lines[node.end_lineno - 1])[0] + "pass\n"
    return "".join([*lines[: node.end_lineno], more, *lines[node.end_lineno :]])


def test_every_edit_of_a_definition_counts_and_no_other(tmp_path, monkeypatch):
    """In copies: all that 03 defines, and all of common.py and media.py that a stage reaches."""
    shared = (REPO / "common.py", REPO / "media.py")
    *stages, common, media = (Path(shutil.copy(path, tmp_path)) for path in (*SCRIPTS.values(), *shared))
    monkeypatch.setattr(contract, "ROOT", tmp_path)
    plain = {stage: contract.code_identity(stage) for stage in stages}
    for old, new, stale in (
        ("import torch\n", "import torch  # a remark\n", ""),
        ('"""Guidance strength per frame', '"""Another sentence. Guidance strength per frame', ""),
        ("nn.Dropout(0.5)", "nn.Dropout(0.4)", "05"),
        ("(0.229, 0.224, 0.225)", "(0.5, 0.5, 0.5)", "05"),  # in a tuple assignment
        ("return strength * (1 -", "return 2 * strength * (1 -", "03"),
        ("size=(448, 256)", "size=(320, 256)", ""),  # the data set's sizes are parameters
        ('"crf": "12"', '"crf": "13"', "03 04"),
    ):
        path = next(path for path in (common, media) if old in path.read_text())
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert " ".join(s.name[:2] for s in stages if contract.code_identity(s) != plain[s]) == stale, old
        path.write_text(text)
    for path in (stages[2], common, media):
        source = path.read_text()
        for node in ast.parse(source).body:
            for name in (
                [getattr(node, "name", "")]
                if hasattr(node, "name")
                else [
                    part.id
                    for target in getattr(node, "targets", [])
                    for part in ast.walk(target)
                    if hasattr(part, "id")
                ]
            ):
                key, counts = f"{path.name}: {name}", name not in ("parse_args", "estimate")
                users = [stage for stage in stages if key in plain[stage]]
                path.write_text(edited(source, node))
                for stage in [path] if path in stages else users[:1]:
                    changed = contract.code_identity(stage).get(key) != plain[stage].get(key)
                    assert changed == (counts and not name.startswith("SECONDS")), key
        path.write_text(source)


def test_short_constant_is_shown_with_its_values(place):
    folder, key = place.work / "demo" / FOLDERS["03"][0], "03_guided_sample.py: FPS"
    record = record_of(place, FOLDERS["03"][0])
    record["code"][key] = "10"
    contract.save(folder / "manifest.json", record)
    code, text = place.run("03", "--dry-run")
    assert code == 0 and f"03 stale: {key} 10 -> 8; 16 of 16" in text, text


def test_extents_add_files_and_change_none(empty, done, tmp_path):
    place = empty._replace(work=tmp_path / "work")
    for number, *extra in (
        ("01", "--classes", "Wave"), ("01",), ("02", "--classes", "Walk"), ("02",), ("03", "--draws", 1),
        ("03", "--draws", 3, "--classes", "Wave"), ("03",), ("04", "--classes", "Wave"), ("04",),
        ("05", "--repeats", 1), ("05",),
    ):  # fmt: skip
        code, text = place.run(number, *extra)
        assert code == 0 and "stale" not in text, text
    assert place.files() == done.files()


def test_two_runs_leave_the_same_bytes(done, empty, tmp_path):
    """Another process, hash seed, time zone and caller's folder."""
    place = empty._replace(work=tmp_path / "other")
    for number in SCRIPTS:
        process = place.spawn(number, PYTHONHASHSEED="77", TZ="Asia/Tokyo")
        out, _ = process.communicate()
        assert process.returncode == 0, out
    assert place.files() == done.files()


# --- damage and hostile input


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("folder", MADE_BY)
def test_one_flipped_byte_is_found_named_and_repaired(done, tmp_path, folder):
    number, names = MADE_BY[folder], sorted(record_of(done, folder)["outputs"])
    kinds = {name.rsplit(".", 1)[-1]: name for name in names}  # one file of each kind
    for kind, name in kinds.items():
        place = done.copy(tmp_path / kind)
        path = place.work / "demo" / folder / name
        flip_byte(path)
        code, text = place.run(number)
        assert code == 3 and str(path) in text and "expected: sha256" in text and "--redo" in text, text
        if folder in READ_BY and name.endswith(("npy", "mp4")):  # what the next stage reads
            words = ("--train-on", "random") if name.startswith("train/") else ()
            code, text = place.run(READ_BY[folder], *words)
            assert code == 3 and str(path) in text and SCRIPTS[number].name in text and "--redo" in text, text
        code, text = place.run(number, "--redo")
        assert code == 0, text
        assert place.files() == done.files()


@pytest.mark.parametrize("text", ["{", "[]", '{"complete": true}', ""])
def test_damaged_record_is_named_and_made_again(place, done, text):
    folder = place.work / "demo" / FOLDERS["03"][0]
    (folder / "manifest.json").write_text(text)
    for number in ("03", "04"):
        code, out = place.run(number)
        assert code == 3 and str(folder / "manifest.json") in out and "--redo" in out, out
    assert place.run("03", "--redo")[0] == 0
    now = place.files()
    assert {name: now[name] for name in done.files()} == done.files()  # the damaged one is kept aside
    assert any("gvd.old-1/manifest.json" in name for name in now)


def test_record_that_names_files_outside_deletes_nothing(place, tmp_path):
    outside = tmp_path / "thesis.txt"
    outside.write_text("years of work")
    folder = place.work / "demo" / FOLDERS["02"][0]
    for name in ("../" * len(folder.parts[1:]) + str(outside)[1:], str(outside)):
        record = record_of(place, FOLDERS["02"][0])
        record["outputs"][name] = {"bytes": 3, "sha256": "0" * 64}
        contract.save(folder / "manifest.json", record)
        for extra in ([], ["--redo"]):
            place.run("02", *extra)
            assert outside.read_text() == "years of work"


def test_names_of_folders_stay_in_the_work_folder(place, tmp_path):
    draft = tmp_path / "deep" / ".tmp-draft.txt"
    contract.save(draft, b"mine")
    for number, option in (("02", "--name"), ("03", "--name"), ("03", "--prototypes"), ("04", "--samples")):
        for value in (str(tmp_path / "deep"), "../../escaped", "..", ".hidden", "gvd.old-1", "a b"):
            code, text = place.run(number, option, value)
            assert code == 2 and "is not a plain folder name" in text, (number, option, value, text)
    (place.work / "demo" / FOLDERS["02"][0] / ".tmp-notes.txt").write_text("mine too")
    assert place.run("02", "--redo")[0] == 0
    assert draft.read_bytes() == b"mine"
    assert (place.work / "demo" / FOLDERS["02"][0] / ".tmp-notes.txt").read_text() == "mine too"


def test_wrong_shape_under_an_agreeing_record(place):
    folder = place.work / "demo" / FOLDERS["02"][0]
    contract.save(folder / "Walk.npy", np.zeros((3, 16, 4, 8, 8), np.float32))
    record = record_of(place, FOLDERS["02"][0])
    record["outputs"]["Walk.npy"]["sha256"] = contract.sha256(folder / "Walk.npy")
    contract.save(folder / "manifest.json", record)
    code, text = place.run("03")
    assert code == 3 and "Walk.npy: unexpected shape or dtype" in text and "[3, 16, 4, 8, 8]" in text, text
    assert "02_kmeans_prototypes.py" in text


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(contract.ContractError, match="a.npy is damaged"):
        contract.read(tmp_path / "a.npy")


def test_missing_input_names_the_command(empty, tmp_path):
    place = empty._replace(work=tmp_path / "work")
    for number, made_by in (("02", "01"), ("03", "02"), ("04", "03"), ("05", "01")):
        code, text = place.run(number)
        assert code == 3 and f"python {SCRIPTS[made_by].name} demo" in text and "is missing" in text, text
        code, text = place.run(number, "--dry-run")
        assert code == 0 and re.search(rf"{number} .* left, .* h on .* GB; .* is missing", text), text


def test_files_without_a_record_are_neither_used_nor_lost(place, done):
    folder = place.work / "demo" / FOLDERS["04"][0]
    (folder / "manifest.json").unlink()
    (folder / "Walk/0.mp4").write_bytes(b"mine")
    code, text = place.run("05")
    assert code == 3 and "04_mvic_compose.py" in text, text
    code, text = place.run("04")
    assert code == 0 and "stale: files without manifest.json; the old folder is kept as gvd.old-1" in text, (
        text
    )
    now = place.files()
    assert now["demo/04_distilled/ipc2/gvd.old-1/Walk/0.mp4"] == b"mine"
    assert {name: now[name] for name in done.files()} == done.files()


def test_automatic_device_and_dtype_take_the_recorded_ones(place, monkeypatch):
    monkeypatch.setattr(
        contract, "automatic", lambda name, device: {"device": "cpu", "dtype": "float16"}[name]
    )
    assert "03 fresh" in place.run("03")[1] and "05 fresh" in place.run("05")[1]
    code, text = place.run("03", "--dtype", "float16", "--dry-run")
    assert re.search("03 stale: dtype b?float(16|32) -> float16", text), text


def test_a_folder_of_another_machine(place):
    """One that was begun on a GPU goes on on one; made anew it is made with what is here."""
    folder = place.work / "demo/03_samples/ipc2/gvd"
    record = contract.read(folder / "manifest.json")
    for name, value in (("device", "cuda"), ("dtype", "float16")):
        record["parameters"][name] = value
    contract.save(folder / "manifest.json", record)
    assert "03 fresh" in place.must("03")
    message = place.refused("03", "--draws", 5)
    assert "was begun on a GPU" in message and "--device cpu" in message
    assert contract.read(folder / "manifest.json") == record
    place.must("03", "--guidance", 0.3)
    made = contract.read(folder / "manifest.json")["parameters"]
    assert made["device"] == "cpu" and made["dtype"] == contract.automatic("dtype", "cpu")
    del record["parameters"]["dtype"]  # of another kind of stage
    contract.save(folder / "manifest.json", record)
    assert "stale: device cuda -> cpu" in place.must("03", "--device", "cpu")


def test_what_cannot_be_made_does_not_take_the_place_of_what_is(place, tmp_path):
    contract.save(tmp_path / "p.json", {"Walk": "slowly " * 80, "Wave": "a wave"})
    before = place.files()
    assert "the prompt of Walk is too long" in place.refused("03", "--prompt-file", tmp_path / "p.json")
    assert place.files() == before and "03 fresh" in place.must("03")


# --- kills, Ctrl-C, full disks


def start_and_stop(place, number, share, sign):
    """Starts a stage whose folders are not there, sends a signal once `share` of its files are written."""
    first = place.work / "demo" / FOLDERS[number][0]
    total = len(record_of(place, FOLDERS[number][0])["outputs"])
    for folder in FOLDERS[number]:
        shutil.rmtree(place.work / "demo" / folder)
    process, limit = place.spawn(number), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        files = [p for p in first.rglob("*") if p.is_file()] if first.exists() else []
        if len(files) > share * total:
            process.send_signal(sign)
            break
        time.sleep(0.002)
    return process.communicate()[0], process.returncode


MOMENTS = {"01": (0.0, 0.5), "02": (0.0, 0.5), "03": (0.0, 0.3, 0.6, 0.9), "04": (0.2, 0.8), "05": (0.0, 0.5)}


@pytest.mark.parametrize(("number", "share"), [(n, share) for n in MOMENTS for share in MOMENTS[n]])
def test_killed_and_taken_up_again(done, tmp_path, number, share):
    place = done.copy(tmp_path / "work")
    start_and_stop(place, number, share, signal.SIGKILL)
    code, text = place.run(number)
    assert code == 0 and "stale" not in text, text
    assert place.files() == done.files()


@pytest.mark.parametrize("number", SCRIPTS)
def test_ctrl_c_says_how_to_go_on(done, tmp_path, number):
    place = done.copy(tmp_path / "work")
    text, code = start_and_stop(place, number, 0.2, signal.SIGINT)
    if code != 0:  # it may have been through
        assert code == 130 and "the same command goes on" in text and "Traceback" not in text, text
    assert place.run(number)[0] == 0
    assert place.files() == done.files()


def test_ctrl_c_while_the_libraries_load(done):
    process = done.spawn("05")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130 and "Traceback" not in text, text


@pytest.mark.parametrize(("number", "size"), [("01", 100_000), ("03", 3_000), ("05", 200)])
def test_full_disk_is_one_message_and_loses_nothing(done, tmp_path, number, size):
    """RLIMIT_FSIZE stands for the disk: EFBIG where a full one says ENOSPC."""
    place = done.copy(tmp_path / "work")
    for folder in FOLDERS[number]:
        shutil.rmtree(place.work / "demo" / folder)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    words = [sys.executable, *place.words(number)]
    run = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, cwd=REPO)
    assert run.returncode == 3 and "cannot be written: File too large" in run.stderr, run.stderr
    assert "bytes free" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not [path for path in place.work.rglob(".tmp-*")]
    assert place.run(number)[0] == 0
    assert place.files() == done.files()


def test_failed_torch_save_and_mp4_say_so_too(tmp_path):
    program = (
        "import contract, resource, sys, torch, numpy as np, media\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "value = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)\n"
        "for path in ('a.pt', 'a.mp4'):\n"
        "  try:\n"
        "    save = media.write_mp4 if path == 'a.mp4' else contract.save\n"
        "    save(path, value if path == 'a.mp4' else torch.tensor(value))\n"
        "  except contract.ContractError as error:\n    print(path, error)\n"
    )
    words = [sys.executable, "-c", program]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(REPO)})
    assert run.stdout.count("cannot be written: File too large") == 2, run.stdout + run.stderr
    assert not list(tmp_path.iterdir())


def test_second_run_in_a_folder_is_refused_and_the_lock_ends_with_its_process(place):
    import filelock

    lock = place.work / ".cache" / "demo--02_prototypes--ipc2--direct.lock"
    program = f"import filelock, time\nlock = filelock.FileLock({str(lock)!r})\nlock.acquire()\n"
    program += "print(1, flush=True)\ntime.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, text = place.run("02")
        assert code == 3 and "another run is at work in" in text, text
        other.kill()
    assert place.run("02")[0] == 0 and filelock.FileLock(lock).acquire(timeout=0)


# --- the command line


@pytest.mark.parametrize("number", SCRIPTS)
def test_help_is_the_docstring(empty, number):
    code, text = empty.run(number, "--help")
    assert code == 0
    for field in ("Reads:", "Writes:", "Run:", "Cost:", "Expect:", "Differs:", "--dry-run"):
        assert field in text


@pytest.mark.parametrize(
    ("number", "extra", "code", "words"),
    [
        ("03", ["--steps", "300"], 3, "usable"),
        ("03", ["--model", "nowhere"], 3, "nowhere is missing"),
        ("03", ["--unet", "nowhere"], 3, "nowhere"),
        ("03", ["--prompt-file", "nowhere.json"], 3, "nowhere.json is missing"),
        ("03", ["--device", "cuda"], 3, "no such device"),
        ("03", ["--classes", "Nobody"], 2, "no class 'Nobody'"),
        ("02", ["--limit", "0"], 2, "must be at least 1"),
        ("02", ["--limit", "1"], 3, "too few clips"),
    ],
)
def test_bad_options_change_nothing(place, number, extra, code, words):
    before = place.files()
    found, text = place.run(number, *extra)
    assert found == code and words in text, text
    assert place.files() == before


def test_profile_of_stage_02(empty, latents, tmp_path):
    """The contract stays small to read: functions of it that a run of stage 02 enters."""
    entered = set()

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename == contract.__file__ and "<" not in code.co_name:
            entered.add(code.co_qualname)

    place = latents.copy(tmp_path / "work")
    shutil.rmtree(place.work / "demo/02_prototypes")
    sys.setprofile(profile)
    try:
        assert place.run("02")[0] == 0
    finally:
        sys.setprofile(None)
    assert len(entered) <= 20, sorted(entered)
    assert {*CLASSES} == {p.stem for p in (place.work / "demo" / FOLDERS["02"][0]).glob("*.npy")}
