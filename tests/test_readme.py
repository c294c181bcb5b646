"""The README: its figures stand in committed files, its sizes are right, its links and commands lead on."""

import csv
import json
import re
import shlex
import statistics

import pytest
from conftest import REPO, SCRIPTS

README = (REPO / "README.md").read_text("utf-8")
DEMO = (REPO / "demo" / "README.md").read_text("utf-8")
RESULTS = REPO / "results"


def cell(result):
    """Mean, sample standard deviation and number of networks as the tables write them."""
    spread = "" if result["top1"]["std"] is None else f" ± {result['top1']['std']:.1f}"
    return f"{result['top1']['mean']:.1f}{spread} ({result['top1']['n']})"


def rows(text, head):
    """The rows of the Markdown tables whose first header cell begins with `head`: [{column: cell}]."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *lines = [[c.strip() for c in line.strip("|\n").split("|")] for line in block.splitlines()]
        if header[0].startswith(head):
            found += [dict(zip(header, line, strict=True)) for line in lines]
    return found


def result_of(ipc, name):
    """Of demo/experiments.py sets, where each set counts once, if it has this one; else of stage 05."""
    path = RESULTS / "demo_models" / f"sets_ipc{ipc}.csv"
    for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
        if row["set"] == name:
            top1 = {"mean": float(row["top1_mean"]), "std": float(row["top1_std"]), "n": int(row["n"])}
            values = [float(value) for value in row["top1_values"].split()]
            assert len(values) == top1["n"] and abs(statistics.fmean(values) - top1["mean"]) < 0.01
            return {"top1": top1, "bytes": int(row["bytes"])}
    soft = "_soft" * name.endswith(", soft labels")
    path = RESULTS / f"demo_ipc{ipc}" / f"{name.removesuffix(', soft labels')}{soft}.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("text", [README, DEMO], ids=["README", "demo"])
def test_every_accuracy_is_of_a_committed_result(text):
    found = rows(text, "demo, top-1 %")
    assert {row["demo, top-1 % (n networks)"] for row in found} or text is DEMO
    for row in found:
        name = row.pop("demo, top-1 % (n networks)")
        for column, value in row.items():
            result = result_of(column.split()[-1], name)
            expected = (
                "-"
                if result is None
                else cell(result)
                if column.startswith("IPC")
                else f"{result['bytes']:,}"
            )
            assert value == expected, (name, column)


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*_ipc*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_committed_results_are_complete_and_in_their_table(path):
    result = json.loads(path.read_text())
    if "top1" not in result:
        pytest.skip("not a result of stage 05")
    values = result["top1"]["values"]
    assert result["complete"] and not result["deviations"] and result["top1"]["n"] == len(values)
    table = (path.parent / "table.md").read_text("utf-8")
    assert f" {cell(result)} |" in table and all(f"{value:.2f}" in table for value in values)


def test_paper_figures_are_those_of_the_committed_list():
    with open(REPO / "tools" / "paper_results.csv", newline="") as file:
        paper = {(row["row"], row["column"]): f"{float(row['value']):.1f}" for row in csv.DictReader(file)}
    for row in rows(README, "top-1 %, IPC 1 / 5 / 20"):
        name = row["top-1 %, IPC 1 / 5 / 20, MiniC3D"].lower()
        gvd = [paper.get(("gvd, soft labels", f"{name} ipc{ipc}"), "-") for ipc in (1, 5, 20)]
        assert row["paper, GVD"] == " / ".join(gvd) and row["paper, all clips"] == paper["full", name]


def test_sizes_and_times_of_the_stages():
    seconds = json.loads((RESULTS / "demo_ipc5" / "seconds.json").read_text())
    screen = (RESULTS / "demo_ipc5" / "screen.txt").read_text()
    found = rows(README, "script")
    assert [row["script"].strip("`") for row in found] == [path.name for path in SCRIPTS.values()]
    for row, (number, path) in zip(found, SCRIPTS.items(), strict=True):
        assert int(row["lines"]) == len(path.read_text().splitlines()), row["script"]
        assert row["demo"] == f"{seconds[number]} s"
        done = [int(s) for s in re.findall(rf"^{number} done: .*, (\d+) s$", screen, re.M)]
        assert seconds[number] == (sum(done) if number == "05" else max(done))  # 01 makes two folders at once
    assert f"about {round(seconds['total'] / 60)} minutes" in README.replace("\n", " ")
    assert seconds["again"] <= 20


def test_length_links_and_commands():
    assert len(README.split()) <= 1300
    for text, folder in ((README, REPO), (DEMO, REPO / "demo")):
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("https://") or (folder / target).exists(), target
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            for line in block.splitlines() if not language else ():
                words = shlex.split(line.split("  #")[0])
                assert words[0] in ("bash", "python", "torchrun") and (REPO / words[1]).exists(), line
        for name in re.findall(r"`(?:python )?((?:\w+/)*\w+\.(?:py|sh|md|json|csv|txt))", text):
            assert (REPO / name).exists() or name in ("metadata.csv", "data/mine/prompts.json"), name


def test_no_file_of_the_repository_cites_one_that_is_not_there():
    """Comments and docstrings of the code: names of documents."""
    for path in [*REPO.glob("*.py"), *REPO.glob("*/*.py"), *REPO.glob("*.sh"), *REPO.glob("docs/*.md")]:
        for name in re.findall(r"[\w/]+\.md\b", path.read_text("utf-8")):
            known = (REPO / name).exists() or any(REPO.glob(f"*/{name}"))
            assert known or re.fullmatch(r"(table|ipc|fig|claims|README)\w*\.md", name.split("/")[-1]), (
                path.name,
                name,
            )
