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


def tables(text):
    """The Markdown tables of a text: [[{column: cell}, ...]], the first column under the name ""."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(["", *header[1:]], row, strict=True)) | {"head": header[0]} for row in rows])
    return found


def name_of(result):
    """How a row of a table names a result, and (tools/collect_results.py) how its file is called."""
    soft, net = result["labels"] == "soft", "" if result["net"] == "minic3d" else result["net"]
    shown = result["set"] + ", soft labels" * soft + f", {net}" * bool(net)
    return shown, result["set"] + "_soft" * soft + f"_{net}" * bool(net)


def sampler_rows(lines):
    """{sampler: (recognised, of the order pair)} of samplers.csv as the README writes them."""
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    return {
        row["sampler"]: [f"{float(row[k + 'mean']):.1f} ± {float(row[k + 'std']):.1f}" for k in ("", "pair_")] for row in rows
    }


def wrong_cells(text, results):
    """(cells of a README's tables about accuracies that no file of the results has as they stand, cells that one has).

    A table of the demo's sets has columns "top-1 %, IPC 5 (n)" and "bytes, IPC 5"; "-" stands for what is not there yet.
    A table whose first column is "sampler" has "recognised, %" and "order pair, %", one of "fine-tuning" "recognised, %".
    """
    expected = {}  # (head of the table, row, column): cell
    for path in results.glob("demo_ipc*/*.json"):
        result = json.loads(path.read_text())
        ipc = path.parent.name.removeprefix("demo_ipc")
        if "top1" in result:
            row = ("demo", name_of(result)[0])
            expected |= {(*row, f"top-1 %, IPC {ipc} (n)"): cell(result), (*row, f"bytes, IPC {ipc}"): f"{result['bytes']:,}"}
    if (path := results / "demo_models" / "samplers.csv").exists():
        for name, (every, pair) in sampler_rows(path.read_text().splitlines()).items():
            expected |= {("sampler", name, "recognised, %"): every, ("sampler", name, "order pair, %"): pair}
    if (path := results / "demo_models" / "finetune.json").exists():
        for name, score in json.loads(path.read_text())["samples recognised, %"].items():
            expected["fine-tuning", name, "recognised, %"] = f"{score['all classes']:.1f}"
    wrong, right = [], []
    for row in sum(tables(text), []):
        for column in row.keys() - {"", "head"} if row["head"] in ("demo", "sampler", "fine-tuning") else ():
            key = (row["head"], row[""], column)
            (right if row[column] == expected.get(key, "-") else wrong).append((*key, row[column], expected.get(key)))
    return sorted(wrong), [found for found in right if found[3] != "-"]


def test_tables_agree_with_the_results():
    wrong, right = wrong_cells(README, REPO / "results")
    assert wrong == []
    rows = {(name, column) for _, name, column, _, _ in right}
    assert {(name, column) for name in ("gvd", "random") for column in ("top-1 %, IPC 5 (n)", "bytes, IPC 5")} <= rows


def test_a_wrong_cell_is_found(tmp_path):
    """In a small README: one that no file has, one that differs from its file, and what is not there yet."""
    result = {"set": "gvd", "labels": "soft", "net": "cnn-gru", "bytes": 1234, "top1": {"mean": 41.26, "std": 1.0, "n": 3}}
    for folder in ("demo_ipc5", "demo_models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "demo_ipc5" / "gvd_soft_cnn-gru.json").write_text(json.dumps(result))
    (tmp_path / "demo_models" / "samplers.csv").write_text(
        "sampler,videos,mean,std,values,pair_mean,pair_std,pair_values\nnaive,80,90.04,1.26,90 91 90,60.00,5.00,55 60 65\n"
    )
    score = {"samples recognised, %": {"before": {"all classes": 18.75}}}
    (tmp_path / "demo_models" / "finetune.json").write_text(json.dumps(score))
    text = (
        "| demo | top-1 %, IPC 5 (n) | bytes, IPC 5 | bytes, IPC 10 |\n| --- | --- | --- | --- |\n"
        "| gvd, soft labels, cnn-gru | 41.3 ± 1.0 (3) | 1,234 | - |\n| random | - | 1,234 | - |\n\n"
        "| sampler | recognised, % | order pair, % |\n| --- | --- | --- |\n| naive | 90.0 ± 1.3 | 60.0 ± 5.0 |\n\n"
        "| fine-tuning | recognised, % |\n| --- | --- |\n| before | 18.8 |\n| after | - |\n"
    )
    wrong, right = wrong_cells(text, tmp_path)
    assert wrong == [("demo", "random", "bytes, IPC 5", "1,234", None)] and len(right) == 5
    for cell_, other in (("41.3", "41.2"), ("60.0", "61.0"), ("18.8", "18.7")):
        wrong, _ = wrong_cells(text.replace(cell_, other), tmp_path)
        assert len(wrong) == 2 and any(found.startswith(other) for *_, found, _ in wrong)


@pytest.mark.parametrize("path", sorted((REPO / "results").glob("*_ipc*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_results_are_complete(path):
    """Each is of its protocol, under its own name, and stands in the closing table of its folder."""
    result = json.loads(path.read_text())
    if "top1" not in result:
        pytest.skip("no result of stage 05")
    shown, file = name_of(result)
    assert result["complete"] and not result["deviations"] and path.stem == file
    assert result["top1"]["n"] == len(result["top1"]["values"]) >= (1 if result["set"] == "full" else 3)
    rows = [row for row in (path.parent / "table.md").read_text("utf-8").splitlines() if row.startswith(f"| {result['set']}")]
    assert any(cell(result) in row and result["net"] in row for row in rows), shown


@pytest.mark.parametrize("path", sorted((REPO / "results").glob("*_ipc*/table.md")), ids=lambda p: p.parent.name)
def test_closing_tables_have_no_other_rows(path):
    results = [json.loads(file.read_text()) for file in path.parent.glob("*.json")]
    lines = path.read_text("utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) - 2 == sum("top1" in result for result in results)  # without its head


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


def test_rates_agree_with_the_results():
    for rate in ("0.01", "0.005"):
        result = json.loads((REPO / "results" / "demo_models" / f"validation_rate_{rate}.json").read_text())
        assert result["protocol"]["rate"] == float(rate) and result["set"].startswith("random")
        assert f"{cell(result)} at {rate}" in README


def test_settings_agree_with_the_results():
    lines = (REPO / "results" / "demo_models" / "settings.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert {row["set"] for row in rows} >= {"random", "cfg2"}
    for row in rows:
        options = f"`{row['options']}`" if row["options"] else "defaults"
        found = f"| {row['set']} | {options} | {float(row['top1_mean']):.1f} ± {float(row['top1_std']):.1f} |"
        assert found in README.splitlines()


def test_composition_agrees_with_the_results():
    """The paragraph on what composition costs: accuracies at IPC 5 and 10, coverage in VideoMAE features."""

    def top1(ipc, name):
        return json.loads((REPO / "results" / f"demo_ipc{ipc}" / f"{name}.json").read_text())["top1"]["mean"]

    text, ten = " ".join(README.split()), {n: top1(10, n) for n in ("random", "gvd", "gvd-1x16", "real-composed")}
    assert f"as random real clips ({ten['gvd-1x16']:.1f} and {ten['random']:.1f})" in text
    five = [f"{top1(5, name):.1f}" for name in ("gvd", "gvd-1x16", "real-composed")]
    assert "GVD {}, uncomposed {}, composed real clips {}.".format(*five) in text
    real, generated = ten["random"] - ten["real-composed"], ten["gvd-1x16"] - ten["gvd"]
    assert f"With ten it costs real clips {real:.0f} points" in text and f"and GVD {generated:.0f};" in text
    sets = json.loads((REPO / "results" / "metrics_demo_ipc5.json").read_text())["sets"]
    cover = {found["set"]: (found["mean"]["coverage_per_class"], found["std"].get("coverage_per_class")) for found in sets}
    mean, std = cover["random real clips"]
    shown = f"coverage per class {cover['gvd, before composition'][0]:.2f}, of real clips {mean:.2f} ± {std:.2f}"
    shown += f", of videos from prompts alone {cover['naive, before composition'][0]:.2f})"
    assert f"{shown}, and composed ones less, {cover['gvd'][0]:.2f}." in text


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
