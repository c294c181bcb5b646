"""Several processes of torchrun at one stage: the bytes of one process, also when one is killed."""

import contract

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

FOLDERS = {"01": ["01_latents", "01_clips"], "03": ["03_samples/ipc2/gvd"]}


@pytest.fixture
def without(sampled, tmp_path):
    """without("03"): a copy of the finished chain that lacks what stage 03 made."""

    def copy(number):
        place = sampled.copy(tmp_path / number)
        for folder in FOLDERS[number]:
            shutil.rmtree(place.work / "demo" / folder)
        return place

    return copy


def end(*processes):
    """What they printed, when all have ended well."""
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), texts
    return texts


def workers(launcher):
    """{rank: pid} of the processes that a torchrun has started."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    return {int(v[5:]): int(pid) for pid, values in variables.items() for v in values if v[:5] == b"RANK="}


def test_every_item_is_one_process_s(monkeypatch):
    output, items, shares = contract.Output.__new__(contract.Output), list("abcdefg"), []
    output.todo = {*items} - {"c"}  # made before
    monkeypatch.setattr(contract, "WORLD", 3)
    for rank in range(3):
        monkeypatch.setattr(contract, "RANK", rank)
        shares.append(output.mine(items, lambda item: [item]))
    assert shares == [["a", "d", "g"], ["b", "e"], ["f"]]


def test_two_processes_leave_the_bytes_of_one(without, sampled):
    place = without("01")
    (text,) = end(place.spawn("01", processes=2))
    assert place.files() == sampled.files()
    assert text.count("01 done: ") == 2  # two folders; only the first process speaks
    assert "01 fresh" in place.run("01")[1]


def test_one_is_killed_and_the_same_command_goes_on(without, sampled):
    """torchrun ends the other one too; what both had finished is kept."""
    place, limit = without("03"), time.monotonic() + 120
    folder, words = place.work / "demo/03_samples/ipc2/gvd", ("--draws", 12)
    first = place.spawn("03", *words, processes=2)
    while len(found := list(folder.glob("*/[0-9]*.mp4"))) < 6 and time.monotonic() < limit:
        assert first.poll() is None
        time.sleep(0.005)
    os.kill(workers(first)[0], signal.SIGKILL)
    text, _ = first.communicate(timeout=120)
    assert first.returncode != 0 and "03 done" not in text
    assert not contract.read(folder / "manifest.json")["complete"]
    times = {path: path.stat().st_mtime_ns for path in found}
    end(place.spawn("03", *words, processes=2))
    assert len(times) >= 6 and times == {path: path.stat().st_mtime_ns for path in times}
    whole = sampled.copy(place.work.parent / "whole")
    assert whole.run("03", *words)[0] == 0 and "03 fresh" in place.run("03", *words)[1]
    assert whole.files() == place.files()


def test_two_launchers_that_share_a_work_folder(without, sampled):
    """As on two machines: torchrun's own rendezvous."""
    place = without("03")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *place.words("03")]
    options = {"cwd": REPO, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    texts = end(*(subprocess.Popen(torchrun, **options) for _ in range(2)))
    assert place.files() == sampled.files() and sum("03 done: " in text for text in texts) == 1


def test_ranks_in_the_environment_without_torchrun_are_ignored(without, sampled):
    place = without("03")
    variables = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"}
    (text,) = end(place.spawn("03", **variables))
    assert place.files() == sampled.files() and "03 done: " in text


def test_a_stage_of_one_process_says_so(sampled, monkeypatch):
    monkeypatch.setattr(contract, "WORLD", 2)
    code, text = sampled.run("04")
    assert code == 3 and "04_mvic_compose.py runs in one process" in text, text
