"""The paper's tables from results, and the claims: cells by hand, marks, what is not run."""

import contract

import argparse
import statistics
import sys

import pytest
from conftest import REPO, load

import media

tables, paper_tables, claims = (load(f"tools/{name}.py") for name in ("tables", "paper_tables", "claims"))
LIST = dict.fromkeys(tables.LIST, "")


def cells(folder, name):
    """{(row, column): line} of a table's CSV."""
    return {(line["row"], line["column"]): line for line in contract.read(folder / f"{name}.csv")}


def write_list(folder, *results):
    """results.csv of a work folder from dictionaries of what is not usual."""
    usual = {"net": "minic3d", "labels": "hard", "protocol": "gvd", "std": 1.0, "n": 3, "bytes": 100}
    rows = [[(LIST | usual | result)[name] for name in tables.LIST] for result in results]
    contract.save(folder / "tables/results.csv", [tables.LIST, *rows])


def make(place, *scripts):
    for script in scripts or ("tools/tables.py", "tools/paper_tables.py"):
        place.must(script)
    return place.work / place.dataset / "tables"


def test_tables_of_the_chain(place):
    folder = make(place)
    result = contract.read(place.work / "demo/05_results/ipc2/gvd/minic3d__hard__demo/result.json")
    cell = cells(folder, "table1")["gvd", "demo IPC 2"]
    values = [result["top1"][key] for key in ("mean", "std", "n")]
    assert [float(cell[key]) for key in ("value", "std", "n")] == values and cell["protocol"] == "demo"
    assert "short of its protocol" in cell["note"] and "4 of 864" not in cell["note"]
    text = (folder / "table1.md").read_text("utf-8")
    assert f"{values[0]:.1f} ± {values[1]:.1f} (2), demo **[1]**" in text and "\n[1] short of its" in text
    assert cells(folder, "table1")["knoise", "demo IPC 2"]["note"] == "no such set"
    assert cells(folder, "table1")["random", "demo IPC 2"]["note"] == "not trained on it"
    assert "| dm | not run: no such set |" in text
    assert all((folder / f"{name}.md").read_text("utf-8").strip() for name in paper_tables.DIGITS)
    assert float(cells(folder, "efficiency")["seconds per video", "IPC 2"]["value"]) < 60
    claims = [tuple(row.values()) for row in contract.read(folder / "claims.csv")]
    assert ("fig7a: GVD above naive, IPC 2", "-", "-", "not run: no such set") in claims


def test_marks_of_how_a_set_was_made(place):
    """The row's own difference is none; another is marked, until what it says is true."""
    for words in ("03 --guidance 0.3", "04", "05", "04 --pattern 1x16", "05 --train-on gvd-1x16"):
        place.must(*words.split())
    name = "gvd-no-decay"
    for words in (f"03 --decay none --seed 1 --name {name}", f"04 --samples {name}", f"05 --train-on {name}"):
        place.must(*words.split())
    folder = make(place)
    found = {row["set"]: row["making"] for row in contract.read(folder / "results.csv")}
    other = "steps 2; guidance 0.3; another U-Net".split("; ")
    assert found["gvd"].split("; ")[:2] == other[:2]
    assert found["gvd-1x16"].split("; ")[:3] == ["steps 2", "guidance 0.3", "pattern 1x16"]
    cell = cells(folder, "fig7c")["gvd without composition", "IPC 2"]
    assert "guidance 0.3" in cell["note"] and "pattern" not in cell["note"]
    note = cells(folder, "fig7b")["gvd without decay", "IPC 2"]["note"]
    assert "decay" not in note and "seed 1" in note


def test_older_sets_are_marked(place):
    place.must("05", "--train-on", "full", "--save", "--repeats", 1)
    place.must("tools/metrics.py", 2, "--score")
    make(place, "tools/tables.py")
    args = argparse.Namespace(work_dir=place.work, dataset="demo", classes=place.classes.split(","))
    at = paper_tables.read_results(args, "demo")[2]
    notes = [at.score(name)["note"] for name in ("gvd", "gvd-samples")]
    assert all(text.startswith("network short of its protocol: epochs 2, not 60; ") for text in notes)
    found = at.score("gvd-samples", {"guidance": 0.3, "stop": 0.5})
    assert found["note"].endswith("guidance 0.1") and found["n"] == 4
    place.must("04", "--grouping", "in-order", "--name", "gvd")  # made anew
    assert at.score("gvd")["note"].endswith("; of an older set")
    folder = make(place)
    assert "of an older set" in cells(folder, "table1")["gvd", "demo IPC 2"]["note"]


def test_dancing_is_taken_from_its_metrics_and_score(tmp_path, empty):
    """Table 3 and Fig. 7 d, whose set has arrays; a share's error is binomial."""
    place, base = empty._replace(work=tmp_path), tmp_path / "demo"
    write_list(base, {"ipc": 5, "set": "mtt+d", "top1": 20.0, "protocol": "demo"})
    outputs = {name: {"sha256": name} for name in ("set.json", "Walk.npy", "Wave.npy")}
    contract.save(base / "04_distilled/ipc5/mtt+d/manifest.json", {"outputs": outputs})
    made_of = contract.digest({name: name for name in outputs})  # as tools/metrics.py has it of media.py
    row = {"set": "mtt+d", "mean": dict.fromkeys(paper_tables.METRICS, 0.25), "std": {}}
    row["values"] = dict.fromkeys(paper_tables.METRICS, [0.25])
    counted = ("of all training clips", "per distilled video", "per clip, training and test")
    frames = {f"frames {name}": 16 for name in counted}
    metrics = {"sets": [row], "inputs": {"distilled mtt+d": made_of}, "frames": frames}
    contract.save(base / "metrics_ipc5.json", metrics)
    score = {"short": [], "videos made of": made_of, "top1": 80.0, "videos": 100}
    contract.save(base / "05_results/ipc5/mtt+d/score.json", score)
    for note in ("", "of an older set"):
        folder = make(place, "tools/paper_tables.py")
        found = [cells(folder, "table3")["mtt+d", name] for name in paper_tables.METRICS]
        assert {(cell["value"], cell["n"], cell["note"]) for cell in found} == {("0.25", "1", note)}
        cell = cells(folder, "fig7d")["dancing", "score"]
        assert (cell["value"], cell["n"], cell["note"]) == ("80.0", "100", note)
        outputs["Walk.npy"]["sha256"] = "made anew"
        contract.save(base / "04_distilled/ipc5/mtt+d/manifest.json", {"outputs": outputs})
    args = argparse.Namespace(work_dir=tmp_path, dataset="demo", classes=["Walk", "Wave"])
    assert claims.error(paper_tables.read_results(args, "demo")[5].score("mtt+d")) == 4


def test_both_real_data_sets_and_the_paper(tmp_path, empty):
    """Invented results, joined, beside the paper's; another protocol only where the own is missing."""
    classes = ",".join(media.DATASETS["hmdb51"]["classes"])
    place, gvd = empty._replace(work=tmp_path, dataset="hmdb51", classes=classes), {"ipc": 20, "set": "gvd"}
    gvd["top1"] = 20.0
    rows = [gvd, gvd | {"protocol": "dancing", "top1": 50.0}, gvd | {"set": "random", "top1": 15.0}]
    rows += [gvd | {"set": "herding", "protocol": "dancing", "top1": 9.0}]
    rows += [gvd | {"set": "full", "ipc": "", "top1": 40}]
    write_list(tmp_path / "hmdb51", *rows, gvd | {"labels": "soft", "top1": 22.0, "note": "short of it"})
    write_list(tmp_path / "miniucf", gvd | {"ipc": 5, "top1": 30.0})
    folder = make(place, "tools/paper_tables.py")
    text = (folder / "table1.md").read_text("utf-8")
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line[:1] == "|"}
    columns = [f"{name} IPC {k}" for name in ("hmdb51", "miniucf") for k in (1, 5, 10, 20)]
    assert " | ".join(lines["Table 1: top-1 %"]) == " | ".join(columns) + " |"
    assert lines["gvd"][3] == "20.0 ± 1.0 (3), gvd" and lines["gvd"][5] == "30.0 ± 1.0 (3), gvd"
    assert lines["herding"][3] == "9.0 ± 1.0 (3), dancing"
    assert lines["gvd, soft labels"][3] == "22.0 ± 1.0 (3), gvd **[1]**; paper 21.1 (computed)"
    assert lines["prism"][4].endswith("; paper 17.9 ± 0.3")
    assert float(cells(folder, "table1_relative")["gvd", "hmdb51 IPC 20"]["value"]) == 50
    verdicts = {row["claim"]: row for row in contract.read(folder / "claims.csv")}
    row = verdicts["table1: best of ours and before, gvd, soft labels above random, IPC 20"]
    assert (row["paper"], row["ours"]) == ("7.9", "+7.0 ± 0.8")
    assert row["verdict"] == "shown, of marked results, 2 of 10 others run"
    row = verdicts["accuracy relative to full, %, hmdb51 IPC 20"]
    assert (row["paper"], row["ours"], row["verdict"]) == (
        "73.83", "55.00 ± 1.65", "not shown, of marked results")  # fmt: skip


def test_verdicts():
    def cell(value, std=None, note=""):
        return {"value": value, "std": std, "n": 4, "note": note}

    assert claims.judge(cell(10, 2), cell(7.1, 2)) == ("+2.9 ± 1.4", "shown")
    assert claims.judge(cell(10, 2), cell(7.3, 2, "a")) == ("+2.7 ± 1.4", "not shown, of marked results")
    assert claims.judge(cell(1, 0), cell(2, 0)) == ("-1.0 ± 0.0", "not shown")
    assert claims.judge(cell(0.5), cell(0.25, 0.1)) == ("+0.25", "higher, no spread")
    assert claims.judge({"note": "no such set"}, cell(1, 1)) == ("-", "not run: no such set")
    assert claims.equal(807013, "807013") == ("807,013", "shown")
    assert claims.equal(1.984, "1.98", 2)[1] == "shown" and claims.equal(1.986, "1.98", 2)[1] == "not shown"
    assert claims.equal(None, "5")[1] == "not run" and claims.equal(3, "5 miniucf")[1] == "another data set"


@pytest.mark.parametrize("dataset", ["demo", "hmdb51"])
def test_defaults_are_those_of_the_stages(monkeypatch, dataset):
    for stage, usual in tables.DEFAULTS.items():
        usual = usual | (tables.DEMO_DEFAULTS if (stage, dataset) == ("03_samples", "demo") else {})
        monkeypatch.setattr(sys, "argv", [stage, dataset, "5"])
        found = vars(load(stage[:2]).parse_args())
        assert usual == {name: found[name] for name in usual}


def test_figures_of_the_paper_belong_to_a_cell():
    """Every line of the list names a row of a table, a claim, or a figure whose setting is lost."""
    lines = contract.read(REPO / "tools/paper_results.csv")
    assert len({(line["table"], line["row"], line["column"]) for line in lines}) == len(lines)
    paths = [REPO / f"tools/{name}.py" for name in ("paper_tables", "claims", "tables")]
    text = "".join(path.read_text("utf-8") for path in paths)
    for line in lines:
        assert float(line["value"]) > 0 and line["mark"] and line["section"]
        name = line["row"] if line["row"] not in ("dm", "dm+d", "lambda 0.01") else "gvd"
        assert f'"{name}"' in text, name
    assert statistics.fmean(float(line["value"]) for line in lines if line["table"] == "4") > 29
