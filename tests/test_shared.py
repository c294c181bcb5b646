"""Several processes at one stage: they share its files, leave the bytes of one process, and need nobody that has died."""

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import CLASSES, REPO

import contract

FOLDERS = {"01": ["01_latents", "01_clips"], "03": ["03_samples/ipc2/gvd"]}

# A process that makes the items of a folder, slowly: `python -c PROGRAM <folder> <name of the process> <seconds>`
PROGRAM = """
import sys, time, pathlib
import contract
folder, name, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
contract.lock.handle = open(folder / "locks", "a+b")
print("ready", flush=True)
sys.stdin.readline()
for item in contract.shared(list("abcdefgh"), lambda item: [folder / f"{item}.1", folder / f"{item}.2"]):
    for part in "12":
        with contract.atomic(folder / f"{item}.{part}") as handle:
            handle.write(item.encode())
        time.sleep(seconds)
    with open(folder / "made", "a") as made:
        made.write(f"{item} {name}\\n")
"""


def worker(folder, name, seconds):
    words = [sys.executable, "-c", PROGRAM, str(folder), name, str(seconds)]
    process = subprocess.Popen(words, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(*workers):
    for process in workers:
        process.stdin.write("\n")
        process.stdin.close()


def wait_for(condition, process, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)


def ranks(place, number, count=2):
    """The processes that torchrun would start."""
    return [
        place.spawn(number, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        for rank in range(count)
    ]


@pytest.fixture
def before(request, done, tmp_path):
    """A copy of the finished chain without what stage `request.param` made."""
    place = done.copy(tmp_path / "work")
    for folder in FOLDERS[request.param]:
        shutil.rmtree(place.work / "demo" / folder)
    place.number = request.param
    return place


# ---------------------------------------------------------------------------------------------------------------------
# The sharing itself
# ---------------------------------------------------------------------------------------------------------------------


def test_every_item_is_made_once_and_both_make_some(tmp_path):
    processes = [worker(tmp_path, name, 0.05) for name in ("one", "two")]
    go(*processes)
    assert [process.wait(60) for process in processes] == [0, 0]
    made = dict(line.split() for line in (tmp_path / "made").read_text().splitlines())
    assert len((tmp_path / "made").read_text().splitlines()) == 8 and sorted(made) == list("abcdefgh")
    assert {*made.values()} == {"one", "two"}


def test_the_item_of_a_process_that_died_is_made_by_another(tmp_path):
    slow, fast = worker(tmp_path, "slow", 600), worker(tmp_path, "fast", 0)
    go(slow)
    wait_for((tmp_path / "a.1").exists, slow)
    go(fast)
    wait_for(lambda: (tmp_path / "h.2").exists(), fast)
    time.sleep(3 * contract.POLL)
    assert fast.poll() is None and not (tmp_path / "a.2").exists()  # it waits for the item of the other
    slow.kill()
    assert fast.wait(60) == 0 and (tmp_path / "a.2").read_text() == "a"
    slow.wait()
    assert len((tmp_path / "made").read_text().splitlines()) == 8


def test_one_process_makes_what_is_missing_and_tries_each_item_once(tmp_path, monkeypatch):
    monkeypatch.setattr(contract.lock, "handle", open(tmp_path / "locks", "a+b"))
    (tmp_path / "b").touch()
    assert list(contract.shared(list("abc"), lambda item: [tmp_path / item])) == ["a", "c"]
    contract.lock.handle.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(contract.lock, "handle", open(tmp_path / "locks", "a+b"))
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert contract.lock("item", tmp_path)  # alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(contract.ContractError, match="cannot be locked: (.|\n)*--work-dir"):
        contract.lock("item", tmp_path)
    contract.lock.handle.close()


def test_each_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(contract.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(contract.torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        contract.take_gpu("cuda")
    assert taken == [0, 1]
    with pytest.raises(contract.ContractError, match="found:    --device cuda:1, and 2"):
        contract.take_gpu("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(contract.ContractError, match="3 processes take a GPU each"):
        contract.take_gpu("cuda")


def test_what_several_processes_cannot_share(place, monkeypatch):
    before = place.files()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text = place.run("03", "--redo")
    assert code == 3 and "--redo is for one process" in text, text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    code, text = place.run("03")
    assert code == 3 and "on one machine" in text and place.files() == before, text


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", FOLDERS, indirect=True)
def test_two_processes_leave_the_bytes_of_one(before, done):
    processes = ranks(before, before.number)
    outs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert before.files() == done.files()
    assert outs[0].count(f"{before.number} done") + outs[0].count(f"{before.number} fresh") == len(FOLDERS[before.number])
    assert outs[1] == ""  # only the first one speaks
    folder = before.work / "demo" / FOLDERS[before.number][0]
    assert contract.read_json(folder / "timing.json")["runs"][1:] == []  # one of them wrote the manifest


@pytest.mark.parametrize("before", ["03"], indirect=True)
def test_a_killed_process_stops_nobody(before, done):
    first, second = ranks(before, "03")
    folder = before.work / "demo/03_samples/ipc2/gvd"
    wait_for(lambda: len(list(folder.rglob("*.npy"))) > 2, first)
    first.kill()
    first.communicate()
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0, out
    assert before.files() == done.files()


@pytest.mark.parametrize("before", ["01"], indirect=True)
def test_all_killed_and_a_plain_run_after(before, done):
    processes = ranks(before, "01")
    folder = before.work / "demo/01_latents"
    wait_for(lambda: list(folder.glob("index/*.csv")), processes[0])
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert not (folder / "manifest.json").exists()
    code, text = before.run("01")
    assert code == 0, text
    assert before.files() == done.files()


def test_no_folder_is_taken_from_under_a_process_at_work(place):
    """A lock of another process, as long as it lives, on the finished folder of stage 03."""
    program = "import contract, sys, time, fcntl\ncontract.lock.handle = open(sys.argv[1], 'a+b')\n"
    program += "contract.lock('at work', sys.argv[2], fcntl.LOCK_SH)\nprint('ready', flush=True)\ntime.sleep(600)\n"
    folder, locks = place.work / "demo/03_samples/ipc2/gvd", place.work / ".cache/locks"
    locks.parent.mkdir(parents=True, exist_ok=True)
    other = subprocess.Popen([sys.executable, "-c", program, locks, folder], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    before = place.files()
    for extra, what in (("--guidance=0.3", "guidance 0.1 -> 0.3"), ("--redo", "--redo")):
        code, text = place.run("03", extra)
        assert code == 3 and f"another process is at work in {folder}, and this one differs: {what}" in text, text
    assert "03 fresh" in place.run("03")[1] and place.files() == before
    other.kill()
    other.communicate()
    code, text = place.run("03", "--guidance", 0.3)
    assert code == 0 and "stale: guidance" in text, text


def test_broken_videos_of_all_processes_count(empty, tmp_path, monkeypatch):
    """One broken video in each class; the other process has made Walk, with --allow-bad 1 and without its broken one."""
    from conftest import Place

    shutil.copytree(empty.data, tmp_path / "data")
    for label in CLASSES:
        video = sorted((tmp_path / "data/demo/UCF-101" / label).glob("*.avi"))[0]
        video.write_bytes(video.read_bytes()[:2000])
    other, place = (Place(tmp_path / "data", empty.model, tmp_path / name) for name in ("other", "work"))
    code, text = other.run("01", "--allow-bad", 1)
    assert code == 3 and "2 videos cannot be decoded" in text, text

    def shared(items, files):
        for path in (path for label in items for path in files(label)):
            if path.stem == "Walk":
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(other.work / path.relative_to(place.work), path)
        yield "Wave"

    monkeypatch.setattr(contract, "shared", shared)
    code, text = place.run("01", "--allow-bad", 1)
    assert code == 3 and "2 videos cannot be decoded" in text, text
    monkeypatch.undo()
    code, text = place.run("01", "--allow-bad", 2)
    assert code == 0, text
