"""The README: its numbers stand in the committed results, its commands run, its links lead somewhere."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text("utf-8")
RESULTS = REPO / "results" / "demo_ipc5"


@pytest.mark.parametrize("name", ["gvd", "random"])
def test_table_agrees_with_the_results(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    assert row in (RESULTS / "table.md").read_text("utf-8").splitlines()
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["complete"] and result["top1"]["n"] == len(result["top1"]["values"]) == 3
    mean, deviation = result["top1"]["mean"], result["top1"]["std"]
    assert f"{mean:.1f} ± {deviation:.1f} (3)" in row and f"{result['bytes']:,}" in row


def test_times_agree_with_the_results():
    times = json.loads((RESULTS / "seconds.json").read_text())
    screen = (RESULTS / "screen.txt").read_text("utf-8")  # of the run that made the results
    for number in ("01", "02", "03", "04", "05"):
        seconds = [int(s) for s in re.findall(rf"^{number} done: .* (\d+) s$", screen, re.M)]
        assert times[number] == (max if number == "01" else sum)(seconds)  # 01 fills two folders at once
    minutes, seconds = map(int, re.search(r"^total: (\d+) min (\d+) s$", screen, re.M).groups())
    assert times["total"] + times["set-up"] == 60 * minutes + seconds
    for number in ("01", "02", "03", "04", "05"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{number}_"))
        assert row.endswith(f"| {times[number]} s |"), row
    assert f"about {round(times['total'] / 60)} minutes" in README
    assert f"takes {times['again']} seconds" in README


def test_links_and_scripts_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (REPO / link).exists(), link
    for script in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", README):
        part = script.split("/")[0]
        assert (REPO / script).exists() or (part in ("demo", "tools") and not (REPO / part).exists()), script


def test_no_line_of_a_machine():
    """No path of one machine and no package index in what is committed."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True).stdout.split("\0")
    if not any(files):
        pytest.skip("not a git checkout")
    for name in files:
        path = REPO / name
        if path.suffix in (".py", ".sh", ".md", ".txt", ".toml", ".json", "") and path.is_file():
            found = re.search(r"(?<![\w.~])/(?:work|root|home|farm)/[\w.]", path.read_text("utf-8"))
            assert not found, f"{name}: {found.group()}"


@pytest.mark.skipif(not (REPO / "demo").is_dir(), reason="the demo world is not here")
def test_drawn_videos_repeat_their_bytes(tmp_path):
    """One group of each class, drawn in two processes."""
    program = (
        "import sys; sys.path.insert(0, 'demo'); import draw_videos, pathlib\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "for c in draw_videos.CLASSES:\n"
        "    (root / 'UCF-101' / c).mkdir(parents=True)\n"
        "    print(sorted(draw_videos.draw_group((root, c, 7, 0)).items()))\n"
    )
    printed = [
        subprocess.run([sys.executable, "-c", program, str(tmp_path / n)], cwd=REPO, capture_output=True, text=True).stdout
        for n in "ab"
    ]
    assert printed[0] == printed[1] and printed[0].count("_g07_c06.avi") == 8
