"""The README: its numbers stand in the committed results, its commands run, its links lead somewhere."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text("utf-8")
RESULTS = REPO / "results" / "demo_ipc5"
MEASURED = json.loads((REPO / "results" / "demo_models" / "measured.json").read_text("utf-8"))


def cell(result):
    """Mean, sample deviation and number of networks as the README writes them."""
    spread = "" if result["top1"]["std"] is None else f" ± {result['top1']['std']:.1f}"
    return f"{result['top1']['mean']:.1f}{spread} ({result['top1']['n']})"


@pytest.mark.parametrize("name", ["gvd", "random"])
def test_table_agrees_with_the_results(name):
    cells = []
    for ipc in (5, 10):
        folder = REPO / "results" / f"demo_ipc{ipc}"
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["complete"] and result["top1"]["n"] == len(result["top1"]["values"]) >= 3
        assert any(line.startswith(f"| {name} |") and cell(result) in line for line in (folder / "table.md").open())
        cells += [cell(result), f"{result['bytes']:,}"]
    assert f"| {name} | {cells[0]} | {cells[2]} | {cells[1]} | {cells[3]} |" in README.splitlines()


def test_figures_of_the_demo_world_agree_with_the_results():
    top1 = {name: cell({"top1": value}) for name, value in MEASURED["order pair, top-1 % by the frames seen"].items()}
    full, recognised = cell({"top1": MEASURED["full data, top-1 %"]}), MEASURED["samples recognised, %"]
    far, psnr = MEASURED["distance to the nearest training clip, grey levels"], MEASURED["autoencoder on test clips, dB"]
    rows = [
        f"| MiniC3D on all real training clips, top-1 % | {full} |",
        f"| order pair: frames in order; shuffled; one | {top1['in-order']}; {top1['shuffled']}; {top1['one']} |",
        f"| autoencoder on test clips: mean; least | {psnr['mean']:.1f} dB; {psnr['least']:.1f} dB |",
    ]
    for name, what in (("naive", "from prompts alone"), ("gvd", "guided")):
        score = recognised[name]
        rates = f"{score['all classes']:.1f} %; {score['order pair']:.1f} %"
        rows.append(f"| samples {what} that MiniC3D recognises: all; order pair | {rates} |")
    medians = "; ".join(f"{far[name]['median']:.1f}" for name in ("test clips", "naive samples", "gvd samples"))
    rows.append(f"| distance to the nearest training clip, median: test clips; from prompts; guided | {medians} |")
    least = "; ".join(f"{far[name]['least']:.1f}" for name in ("test clips", "naive samples", "gvd samples"))
    rows.append(f"| the same, least | {least} |")
    assert [row for row in rows if row not in README.splitlines()] == []


def test_settings_agree_with_the_results():
    lines = (REPO / "results" / "demo_models" / "settings.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    for row in rows:
        first = f"{row['guidance']} | {float(row['cfg']):g}" if row["cfg"] else "random real clips |"
        assert f"| {first} | {float(row['top1_mean']):.1f} ± {float(row['top1_std']):.1f} |" in README.splitlines()


def test_times_agree_with_the_results():
    times = json.loads((RESULTS / "seconds.json").read_text())
    screen = (RESULTS / "screen.txt").read_text("utf-8")  # of the run that made the results
    for number in ("01", "02", "03", "04", "05"):
        seconds = [int(s) for s in re.findall(rf"^{number} done: .* (\d+) s$", screen, re.M)]
        assert times[number] == (max if number == "01" else sum)(seconds)  # 01 fills two folders at once
    minutes, seconds = map(int, re.search(r"^total: (\d+) min (\d+) s$", screen, re.M).groups())
    assert times["total"] == 60 * minutes + seconds
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
