"""run_all.sh: its commands, by an interpreter that only writes them down, and that the scripts take them."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, load

WRITES_DOWN = """#!/bin/bash
[ "$1" = - ] && exit  # setup.sh asks whether it fits
if [[ "$1" = *tools/plan.py ]]; then
  while read -r line; do
    printf '%q %s --dry-run\n' "$PWD" "$line" >> "$COMMANDS"
    echo planned
    [ "${FAIL:-0}" = 0 ] || exit "$FAIL"
  done
  exit
fi
printf '%q ' "$PWD" "$@" >> "$COMMANDS"; echo >> "$COMMANDS"
exit "${FAIL:-0}"
"""
RECIPE = """
D- demo/draw_videos.py --data-root data
-- 01_encode_latents.py SET
HA tools/train_teacher.py SET
-A tools/soft_labels.py SET --train-on random
-- 02_kmeans_prototypes.py SET 20 --name direct
U- tools/finetune_unet.py SET
-- 03_guided_sample.py SET 20
-- 04_mvic_compose.py SET 20 --name gvd
-- 05_train_eval.py SET 20 --train-on gvd
-- 05_train_eval.py SET 20 --train-on random
-A tools/soft_labels.py SET 20 --train-on gvd
-A 05_train_eval.py SET 20 --train-on gvd --labels soft
-A 05_train_eval.py SET 20 --train-on random --labels soft
-A 05_train_eval.py SET --train-on full --save --net minic3d
-A tools/coresets.py SET 20
-A 05_train_eval.py SET 20 --train-on herding
-A 05_train_eval.py SET 20 --train-on kcenter
D- demo/contact_sheet.py SET 20
-- tools/tables.py SET 20
"""  # A: not with --quick; the first letter: only for some data sets


def recipe(dataset, quick=False):
    allowed = {"demo": "-DA", "hmdb51": "-UHA", "miniucf": "-UA", "ucf101": "-A"}[dataset].rstrip("A" * quick)
    lines = [line.replace("SET", dataset) for line in RECIPE.splitlines() if line]
    return [line[3:] for line in lines if {*line[:2]} <= {*allowed}]


@pytest.fixture
def commands(tmp_path):
    """A function of run_all.sh's words: its commands in order; `commands.text` is what it printed."""
    repo, elsewhere = tmp_path / "a repository", tmp_path / "elsewhere"
    python, listed = repo / ".venv/bin/python", tmp_path / "commands"
    python.parent.mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("run_all.sh", "setup.sh", "requirements.txt", "tools/all.sh", "baselines/rows.sh"):
        (repo / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, repo / name)
    python.write_text(WRITES_DOWN)
    python.chmod(0o755)

    def run(*words, code=0, fail="0"):
        listed.write_text("")
        options = {"cwd": elsewhere, "env": {**os.environ, "COMMANDS": str(listed), "FAIL": fail}}
        line = ["bash", "../a repository/run_all.sh", *words]
        done = subprocess.run(line, capture_output=True, text=True, **options)
        assert done.returncode == code, done.stdout + done.stderr
        lines = [shlex.split(line) for line in listed.read_text().splitlines()]
        assert all(line[0] == str(elsewhere) for line in lines)  # relative paths keep their meaning
        run.text = done.stdout + done.stderr
        return [shlex.join([line[1].removeprefix("../a repository/"), *line[2:]]) for line in lines]

    return run


@pytest.mark.parametrize("dataset", ["demo", "hmdb51", "miniucf", "ucf101"])
def test_commands_of_a_column(commands, dataset):
    assert commands(dataset, "20") == recipe(dataset) and re.search(r"\ntotal: \d+ s\n$", commands.text)
    assert commands(dataset, "20", "--quick") == recipe(dataset, quick=True)
    middle = [line for line in recipe(dataset) if re.match("02|03|tools/fine", line)]
    assert commands(dataset, "20", "--from", "2", "--to", "3") == middle
    plans = commands(dataset, "20", "--dry-run")
    stages = [line for line in recipe(dataset) if not re.search("demo/|tables", line)]
    assert plans == [f"{line} --dry-run" for line in stages]
    assert commands.text.splitlines().count("planned") == len(plans)


def test_options_reach_their_scripts(commands):
    assert commands() == commands("--quick") == commands("demo", "5", "--quick") != commands("demo")
    shared = "--seed 3 --work-dir 'my work' --data-root D --classes walk,wave --limit 8 --redo"
    words = ["--seed=3", *shlex.split(shared)[2:], "--03", "", "--02", "--name 'a b'", "--03=--cfg 4"]
    own, wanted = {"02": " --name 'a b'", "03": " --cfg 4"}, []
    for line in recipe("hmdb51"):
        line, last, _ = line.partition(" --net minic3d")
        wanted.append(f"{line} {shared}{own.get(line[:2], last)}")
    assert commands("hmdb51", "20", *words) == wanted


def test_options_of_03_05_and_soft_labels(commands):
    given = "--repeats 2 --net cnn-gru --protocol dancing"
    options = ("--05", given, "--soft", "--teacher m", "--03", "--unet published")
    lines = commands("hmdb51", *options)
    assert not any(re.search("finetune|train_teacher", line) for line in lines)
    assert lines[0].endswith(" --windows") and all(given in line for line in lines if line.startswith("05"))
    assert [line.endswith("--teacher m") for line in lines if "soft_labels" in line] == [True, True]
    ends = [line.partition(given)[2] for line in lines if "full" in line]
    assert ends == [" --net minic3d", ""]  # coresets are chosen by MiniC3D's features
    measured = [line for line in commands("hmdb51", "all", *options) if "tools/metrics.py" in line]
    assert len(measured) == 2 and all("--protocol dancing --teacher m" in line for line in measured)


def test_all_of_own_videos_goes_as_far_as_they_do(commands, tmp_path):
    for label, clips in (("A", 30), ("B", 15)):
        (tmp_path / "D/mine/train" / label).mkdir(parents=True)
        for i in range(clips):
            (tmp_path / f"D/mine/train/{label}/{i}.mp4").touch()
    for held, last in (("train", 10), ("test", 10), ("train/B/0.mp4", 10)):
        (tmp_path / "D/mine" / held).mkdir(exist_ok=True) if "." not in held else None
        lines = commands("mine", "all", "--data-root", tmp_path / "D")
        ipcs = [int(line.split()[2]) for line in lines if line.startswith("03")]
        assert max(ipcs) == last, held
    shutil.rmtree(tmp_path / "D/mine/test")
    assert commands("mine", "all", "--data-root", tmp_path / "D", "--01", "--val 0.7", code=2) == []
    assert "5 training clips of each class, not 4" in commands.text


@pytest.mark.parametrize("dataset", ["demo", "hmdb51"])
def test_scripts_take_these_words(commands, monkeypatch, dataset):
    for line in commands(dataset, "20", "--seed", "3", "--limit", "8", "--05", "--repeats 2", "--keep"):
        if "draw_videos" not in line:
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            args = load(sys.argv[0][:2] if line[0] == "0" else sys.argv[0]).parse_args()
            assert (args.seed, args.limit, args.keep, args.dataset) == (3, 8, True, dataset), line


@pytest.mark.parametrize("dataset", ["demo", "hmdb51", "ucf101"])
def test_commands_of_all(commands, monkeypatch, dataset):
    """Each call once; every IPC's column; the sets of the tables and figures, made before they are read."""
    lines = commands(dataset, "all", "--seed", "3")
    assert len(lines) == len({*lines})
    for ipc in (1, 5, 10) if dataset == "demo" else (1, 5, 10, 20):
        for line in recipe(dataset)[:-1]:
            line = line.replace(" 20", f" {ipc}")
            if "contact_sheet" not in line and "draw_videos" not in line:
                word, net, last = line.partition(" --net minic3d")
                assert any(
                    found.startswith(f"{word} ") and found.endswith(f"--seed 3{net}") for found in lines
                ), line
    assert (f"03_guided_sample.py {dataset} 20 --seed 3" in lines) == (dataset != "demo")
    made, trained = {}, set()
    for line in (line for line in lines if "draw_videos" not in line):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        script = line[:2] if line[0] == "0" else sys.argv[0]
        args = load(script).parse_args()
        if script == "02":
            made["02", args.ipc, args.name] = 0
        elif script == "03":
            assert args.sampler == "naive" or ("02", args.ipc, args.prototypes) in made, line
            made["03", args.ipc, args.name] = args.draws
        elif script == "04":
            pattern = load("04").PATTERNS[args.pattern]
            assert made["03", args.ipc, args.samples] >= len(pattern), line
            made["04", args.ipc, args.name] = 0
        elif script == "05":
            real = args.train_on in ("random", "full", "herding", "kcenter")
            assert real or ("04", args.ipc, args.train_on) in made, line
            trained.add((args.ipc, args.train_on, args.net, args.labels))
    tables, figures = load("tools/paper_tables.py"), load("tools/figures.py")
    sets = {(5, "gvd" + f"-{c}" * (c != "direct"), "minic3d", "hard") for c in tables.CLUSTERS}
    sets |= {(k, "gvd", net, "hard") for k in (1, 5) for net in tables.NETS}
    rows = [row for name, row in tables.ROWS.items() if name not in tables.BASELINES]
    sets |= {
        (k if name != "full" else None, name, "minic3d", labels)
        for k in (1, 5, 10)
        for name, labels, _ in rows
    }
    patterns = [p for p in tables.PATTERNS if p != "4x4"]
    names = [*patterns, *(f"{p}-continuous" for p in patterns if p != "1x16"), "continuous"]
    sets |= {(5, f"gvd-{name}", "minic3d", "hard") for name in names}
    assert sets <= trained, sets - trained
    swept = {f"{name}-{v:g}" for name, values in tables.SWEEPS.values() for v in values}
    swept -= {"guidance-0.1", "stop-0.5", "stop-1"}  # of other names
    assert {("03", 5, name) for name in swept | {*figures.STRENGTHS.values()}} <= {*made}
    score = next(line for line in lines if "--score" in line)
    assert swept <= {*re.split("[ ,]", score)}

    plans = commands(dataset, "all", "--dry-run")
    assert len(plans) >= len(lines) - 2  # but for the demo's videos and contact sheet


def test_dancing_is_measured_where_there_are_baselines(commands):
    """Tables 2 and 3, Fig. 7 d."""
    lines = commands("demo", "all", "--baselines")
    trained = [line for line in lines if re.search(r"--train-on mtt\+d --net", line)]
    assert trained == [
        f"05_train_eval.py demo {k} --train-on mtt+d --net {net}"
        for k in (1, 5)
        for net in ("cnn-gru", "cnn-rnn")
    ]
    assert [",mtt+d" in line for line in lines if "tools/metrics.py" in line] == [True, True]
    assert not any("mtt" in line for line in commands("demo", "all"))


def test_plan_adds_up(place, monkeypatch, capsys):
    """Several commands in one process; a fresh one, one with several parts, one that fails."""
    stages = [
        shlex.join(place.words(*words)) for words in (("02",), ("02", "--seed", 1), ("03", "--draws", 5))
    ]
    monkeypatch.setattr(sys, "stdin", [line + "\n" for line in stages])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys.modules["common"], "BENCH", REPO / "nothing measured")
    load("tools/plan.py").main()
    text = capsys.readouterr().out
    assert text.startswith("02 fresh: ") and "02 stale: seed 0 -> 1; 2 of 2 classes left, " in text
    assert (
        "\n03 4 of 20 videos left, 0.000 h on two CPU cores, estimate" in text
        and "\n03, 1 parts: 0.0 h" in text
    )
    lines = [
        "03 stale: cfg 1 -> 2; 8 of 8 videos left, 1.250 h on a B (9 GB), estimate, 0.125 GB; no x",
        "01 x",
        "02 fresh: y",
    ]
    lines += [
        "03 1 of 1 videos left, 2.000 h on a C, measured (9 GB), 1.000 GB",
        "05 1 of 1 y left, 3.000 h on a B, estimate, 0.300 GB",
    ]
    sums = [
        "03, 2 parts: 3.2 h (2.0 measured, 1.2 estimate), 1.1 GB",
        "05, 1 parts: 3.0 h (0.0 measured, 3.0 estimate), 0.3 GB",
        "in all, 3 parts: 6.2 h (2.0 measured, 4.2 estimate), 1.4 GB",
    ]
    assert load("tools/plan.py").totals(lines) == sums
    experts = "mtt 6 of 6 files of experts left, 1.000 h on a B, estimate, 0.100 GB"
    (once, _) = load("tools/plan.py").totals([experts, experts])
    assert once == "mtt, 1 parts: 1.0 h (0.0 measured, 1.0 estimate), 0.1 GB"
    monkeypatch.setattr(sys, "stdin", [shlex.join(place.words("02", "--no-such-option"))])
    with pytest.raises(SystemExit) as stop:
        load("tools/plan.py").main()
    assert stop.value.code == 2


def test_misuse_and_failure(commands):
    for words in (
        ["demo", "all", "--quick"],
        ["demo", "all", "--03", "--guidance 0.3"],
        ["demo", "all", "--04", "--frames continuous"],
        ["demo", "0"],
        ["demo", "5", "6"],
        ["--from", "0"],
        ["--03"],
        ["--03", "'"],
    ):
        assert commands(*words, code=2) == [] and "bash run_all.sh --help" in commands.text
    for words in (["hmdb51"], ["hmdb51", "--dry-run"]):
        assert len(commands(*words, fail="3", code=3)) == 1
    assert commands("--help") == [] and "--dry-run" in commands.text and "set -e" not in commands.text
    for words in re.findall(r"bash run_all\.sh([^`#\n]*)", (REPO / "README.md").read_text("utf-8")):
        commands(*shlex.split(words))
