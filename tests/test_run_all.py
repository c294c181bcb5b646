"""run_all.sh: which commands it gives, with an interpreter that writes them down and runs nothing."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, load_stage

WRITES_DOWN = """#!/bin/bash
[ "$1" = - ] && exit  # setup.sh asks whether it fits
printf '%q ' "$@" >> commands
echo >> commands
name="${1##*/}"
state="0 of 1 files"
[ -n "$FRESH" ] && grep -qE -- "$FRESH" <<< "$*" && state="fresh: folder"
echo "${name%%_*} $state"
"""
PATHS = "--work-dir work --data-root data"


@pytest.fixture
def commands(tmp_path):
    """A function of run_all.sh's words: the commands in order; without --dry-run and the folders, which all have."""
    for name in ("run_all.sh", "setup.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    for name, text in ((".venv/bin/python", WRITES_DOWN), ("tools/finetune_unet.py", ""), ("tools/train_teacher.py", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def run(*words, fresh="", code=0):
        (tmp_path / "commands").write_text("")
        done = subprocess.run(
            ["bash", "run_all.sh", *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "FRESH": fresh}
        )
        assert done.returncode == code, done.stdout + done.stderr
        lines = (tmp_path / "commands").read_text().replace(PATHS, "").replace("--dry-run", "").splitlines()
        return done.stderr if code else [" ".join(line.split()) for line in lines]

    run.root = tmp_path
    return run


def column(dataset, ipc, once="", tuned=False, teacher=False):
    """The commands of a column and what each waits for, when everything is to do."""
    five = f"05_train_eval.py {dataset}"
    sets = [("01_encode_latents.py " + dataset, ""), (f"02_kmeans_prototypes.py {dataset} {ipc}", "01")]
    sets += [(f"tools/finetune_unet.py {dataset}", "01")] if tuned else []
    sets += [(f"03_guided_sample.py {dataset} {ipc}", "02"), (f"04_mvic_compose.py {dataset} {ipc}", "03")]
    sets += [(f"{five} {ipc} --train-on gvd", "04"), (f"{five} {ipc} --train-on random", "01")]
    rest = [(f"tools/train_teacher.py {dataset}", "01")] if teacher else []
    rest += [(f"{five} {ipc} --train-on {name} --labels soft", after) for name, after in (("gvd", "04"), ("random", "01"))]
    rest += [(f"{five} --train-on full --save{once}", "01")]
    rest += [(f"{five} {ipc} --train-on {name}", "full") for name in ("herding", "kcenter")]
    return sets, rest


COLUMNS = [
    ("demo", "5", {"once": " --repeats 1"}),
    ("hmdb51", "20", {"tuned": True, "teacher": True}),
    ("miniucf", "20", {"tuned": True}),
    ("ucf101", "5", {}),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("dataset", "ipc", "made"), COLUMNS)
def test_commands_of_a_column(commands, dataset, ipc, made, quick):
    sets, rest = column(dataset, ipc, **made)
    wanted = sets if quick else sets + rest
    words = [dataset, ipc, *["--quick"] * quick]
    assert commands(*words, "--dry-run") == [line + f" --after {after}" * bool(after) for line, after in wanted]
    real = commands(*words)
    before = ["demo/draw_videos.py --data-root data"] if dataset == "demo" else []
    after = [f"demo/contact_sheet.py {ipc} --work-dir work"] if dataset == "demo" else []
    after += [f"05_train_eval.py {dataset} {ipc} --table"]
    assert real == before + [line for line, _ in wanted] + after
    assert len(set(real)) == len(real)


def test_without_a_data_set_it_is_the_quick_demo(commands):
    quick = commands("demo", "5", "--quick")
    assert commands() == commands("--quick") == quick and len(quick) == 9
    assert commands("--dry-run") == commands("demo", "--quick", "--dry-run")
    assert commands("demo") == commands("demo", "5") != quick


def waits(lines):
    """{what is trained on and with which labels: what it waits for} of 05's commands; the teacher's under `teacher`."""
    found = {}
    for line in lines:
        name = re.search(r"--train-on (\w+)", line)
        name = name[1] + " soft" * ("--labels soft" in line) if name else "teacher" if "teacher" in line else None
        if name:
            found[name] = (re.search(r"--after (\w+)", line) or [None] * 2)[1]
    return found


@pytest.mark.parametrize(
    ("fresh", "waiting"),
    [
        (".", {}),
        ("^0[1245]|tools", {"gvd": "03", "gvd soft": "03"}),  # another option of 03; 04 is asked with --after
        ("^0[1-4]|finetune", {"gvd soft": "train", "random soft": "train", "herding": "full", "kcenter": "full"}),
        ("^0|finetune", {"gvd soft": "train", "random soft": "train"}),
    ],
)
def test_rows_wait_for_what_they_read(commands, fresh, waiting):
    found = waits(commands("hmdb51", "20", "--dry-run", fresh=fresh))
    rows = ("gvd", "random", "teacher", "gvd soft", "random soft", "full", "herding", "kcenter")
    assert tuple(found) == rows and {name: after for name, after in found.items() if after} == waiting
    waiting = {name: after for name, after in waiting.items() if after != "train"}  # its VideoMAE is there
    found = waits(commands("demo", "5", "--dry-run", fresh=fresh))
    assert len(found) == 7 and {name: after for name, after in found.items() if after} == waiting


OPTIONS = [
    ("--repeats 5", " --repeats 5", " --repeats 5"),
    ("--tau 2 --repeats 5 --alpha=1", " --repeats 5", " --tau 2 --repeats 5 --alpha=1"),
    ("--teacher m --protocol dancing", " --protocol dancing", " --teacher m --protocol dancing"),
    ("--sampling=drawn", " --sampling=drawn", " --sampling=drawn"),
    ("--net cnn-gru --epochs 3", " --net cnn-gru --epochs 3", " --net cnn-gru --epochs 3"),
    ("--net=minic3d", " --net=minic3d", " --net=minic3d"),
]


@pytest.mark.parametrize("dataset", ["demo", "hmdb51"])
@pytest.mark.parametrize(("options", "hard", "soft"), OPTIONS)
def test_options_of_05_reach_every_row_that_takes_them(commands, monkeypatch, dataset, options, hard, soft):
    once, teacher = " --repeats 1" * (dataset == "demo"), dataset == "hmdb51" and "--teacher" not in options
    sets, rest = column(dataset, "5", once, dataset == "hmdb51", teacher)
    wanted = [line for line, _ in sets + rest]
    for i, line in enumerate(wanted):
        if line.startswith("05"):
            wanted[i] += soft if "--labels soft" in line else hard
    if "cnn" in options:  # --save is MiniC3D's, so that the coresets have its features
        index = next(i for i, line in enumerate(wanted) if "--save" in line)
        wanted.append(wanted[index].replace(" --save", ""))
        wanted[index] += " --net minic3d --repeats 1"
    wanted[0] += " --windows" * ("dancing" in options or "drawn" in options)
    lines = commands(dataset, "5", "--05", options)
    assert [line for line in lines if not line.startswith("demo/") and "--table" not in line] == wanted
    stage = load_stage("05")
    for line in lines:
        if line.startswith("05"):
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            args = stage.parse_args()  # takes these words
            if not args.table and "--net minic3d --repeats 1" not in line:
                alone = dataset == "demo" and args.train_on == "full" and "--repeats 5" not in options
                assert args.repeats == (1 if alone else 5 if dataset != "demo" or "--repeats 5" in options else 3)


def test_the_table_is_that_of_the_classes(commands):
    line = commands("hmdb51", "2", "--quick", "--classes", "walk,wave", "--seed", "3")[-1].replace("\\", "")
    assert line == "05_train_eval.py hmdb51 2 --table --classes walk,wave --seed 3"


def test_soft_labels_of_the_short_run_keep_their_teacher(commands):
    lines = commands("demo", "5", "--quick", "--05", "--labels soft --teacher m --tau 2")
    rows = [line for line in lines if "--train-on" in line]
    assert len(rows) == 2 and all(line.endswith("--labels soft --teacher m --tau 2") for line in rows)


def test_the_teacher_s_options_are_taken(commands, monkeypatch):
    if not (REPO / "tools").is_dir():
        pytest.skip("tools/ is not here")
    lines = commands("hmdb51", "5", "--seed", "3", "--classes", "walk,wave", "--limit", "8", "--device", "cpu")
    (line,) = [line for line in lines if "train_teacher" in line]
    spec = importlib.util.spec_from_file_location("train_teacher_words", REPO / "tools/train_teacher.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    args = tool.parse_args()
    assert (args.seed, args.classes, args.limit, args.device, args.name) == (3, ["walk", "wave"], 8, "cpu", "videomae")


def test_a_column_without_the_tools_says_what_to_type(commands):
    (commands.root / "tools/train_teacher.py").unlink()
    message = commands("hmdb51", "20", "--dry-run", code=2)
    assert "tools/train_teacher.py is missing" in message and "--quick" in message
    assert (commands.root / "commands").read_text() == ""
    for words in (["hmdb51", "20", "--quick"], ["hmdb51", "20", "--to", "4"], ["hmdb51", "20", "--05", "--teacher m"]):
        assert not any("teacher.py" in line for line in commands(*words))
    assert commands("miniucf", "20") and commands("demo", "5")
    (commands.root / "tools/finetune_unet.py").unlink()
    assert "--unet published" in commands("hmdb51", "20", "--quick", "--dry-run", code=2)
    assert (commands.root / "commands").read_text() == ""
    assert commands("hmdb51", "20", "--quick", "--from", "4") and commands("hmdb51", "20", "--quick", "--unet", "published")


def test_commands_of_the_readme_are_taken(commands):
    found = re.findall(r"bash run_all\.sh([^`#\n]*)", (REPO / "README.md").read_text("utf-8"))
    assert len(found) > 8
    for words in found:
        commands(*shlex.split(words))
