"""Metrics of sets by hand and by brute force; the closing table and its collected results; the benchmark."""

import contract

import math
import sys
import time
from argparse import Namespace
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, load
from safetensors.torch import load_file

import common
import media

CPU = torch.device("cpu")
bench, metrics, tables, vm = (load(f"tools/{name}.py") for name in ("bench", "metrics", "tables", "videomae"))


def unit(*angles):
    """Points on the unit circle at angles in degrees."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def chord(degrees):
    """The distance of two points on the unit circle that are so far apart."""
    return 2 * math.sin(math.radians(degrees) / 2)


def test_entropy():
    one_hot = torch.eye(4)
    assert metrics.entropy(one_hot, 2) == pytest.approx(2)  # each class once
    assert metrics.entropy(one_hot, np.e) == pytest.approx(math.log(4))
    assert metrics.entropy(one_hot[:1].repeat(5, 1), 2) == 0  # one class alone
    assert metrics.entropy(one_hot[[0, 0, 0, 1]], 2) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)


def test_distances_by_brute_force():
    a, b = torch.randn(2, 20, 5, generator=contract.generator(0, "points"), dtype=torch.float64)
    brute, own = ((x[:, None] - y[None]).square().sum(-1).sqrt() for x, y in ((a, b), (a, a)))
    assert torch.allclose(metrics.nearest(a, b), brute.amin(1), rtol=1e-12)
    assert metrics.mean_pairwise_distance(a) == pytest.approx((own.sum() / 380).item(), rel=1e-12)
    assert torch.allclose(metrics.nearest(a), own.fill_diagonal_(torch.inf).amin(1), rtol=1e-12)
    assert metrics.nearest(a, a).max() == 0


def test_coverage_and_distances_on_a_circle():
    real = unit(0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 90)
    apart = torch.tensor([chord(d) for d in (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 45)]).double()
    assert torch.allclose(metrics.nearest(real), apart)
    limit = metrics.percentile(metrics.nearest(real))  # of eleven values the tenth
    assert limit == pytest.approx(chord(9))
    assert metrics.coverage(real, real, 0) == 1 and metrics.coverage(real, unit(180), limit) == 0
    assert metrics.coverage(real, unit(21), limit) == pytest.approx(3 / 11)  # 15, 21 and 28 degrees
    assert metrics.coverage(real, unit(21, 21, 21), limit) == pytest.approx(3 / 11)
    assert metrics.coverage(real, unit(21, 88), limit) == pytest.approx(4 / 11)
    mpd = metrics.mean_pairwise_distance
    assert mpd(unit(17)) is None and mpd(unit(17, 17, 17)) == 0  # one point has no pair
    assert mpd(unit(0, 90, 180, 270)) == pytest.approx((4 * 2**0.5 + 4) / 6)


def test_metrics_per_class_and_of_all():
    """Features of any length count by their direction, outputs by the data set's columns."""
    real = {"A": unit(0, 10, 20), "B": unit(90, 100, 110)}
    limits = {"A": chord(10.1), "B": chord(0), "": chord(10.1)}
    logits = torch.log(torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6]]))
    distilled = {"A": (7 * unit(0, 10), logits), "B": (0.1 * unit(0, 10).float(), logits)}
    found, p = metrics.measure(real, limits, distilled, columns=[0, 2]), (8 / 9 + 0.25) / 2
    pairs, nats = (chord(10), 4 * chord(10) / 6), -sum(q * math.log(q) for q in (0.5, 0.15, 0.35))
    wanted = {"coverage_per_class": 0.5, "coverage_all": 0.5}  # A's clips are within 10 degrees, none of B's
    wanted |= {"mpd_per_class": pairs[0], "mpd_all": pairs[1], "entropy_nats_outputs": nats}
    wanted["entropy_bits_classes"] = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert found == pytest.approx(wanted, abs=1e-6)
    one = metrics.measure(real, limits, {c: (unit(0), logits[:1]) for c in real}, [0, 2])
    assert one["mpd_per_class"] is None and one["mpd_all"] == 0  # IPC 1


def test_share_of_frames():
    found = metrics.condensation([40, 60], [20], 5)
    assert found["frames per training clip"] == 50 and found["frames per clip, training and test"] == 40
    assert found["of all frames"] == 0.8 and found["frames of a distilled set"] == 80
    found = metrics.condensation([807013], [1], 20 * 50)
    assert round(100 * found["of all frames"], 2) == 1.98  # section 1: MiniUCF at IPC 20


def test_metrics_of_the_chain(place, videomae):
    text = place.must("tools/metrics.py", 2, "--teacher", videomae)
    path, folder = place.work / "demo/metrics_ipc2.json", place.work / "demo/04_distilled/ipc2/gvd"
    first, result = path.read_bytes(), contract.read(path)
    rows = {row["set"]: row for row in result["sets"]}
    everything = rows.pop("all real clips")
    assert everything["mean"]["coverage_all"] == 1 and everything["videos"] == 10
    assert list(rows) == ["gvd, before composition", "gvd", "random real clips"]
    features = {path.stem: np.load(path) for path in place.work.glob("demo/features/ipc2/*.npy")}
    assert {name: len(p) for name, p in features.items()} == {"real": 10, "gvd": 4, "gvd-samples": 4}
    assert np.allclose(np.linalg.norm(features["gvd"], axis=1), 1, atol=1e-6)
    assert all(row["videos"] == 4 and f"| {row['bytes']:,} |" in text for row in rows.values())
    assert rows["gvd"]["bytes"] == sum(file.stat().st_size for file in folder.glob("*/*.mp4"))
    assert rows["random real clips"]["bytes"] == 4 * 16 * 48 * 48 * 3
    place.must("05", "--train-on", "random")
    repeats = [contract.read(p) for p in sorted(place.work.glob("demo/05_results/ipc2/random/*/repeat_*"))]
    assert [repeat["clips"] for repeat in repeats] == result["random"][:2]

    # The row of gvd once more, from the files.
    network, scale = vm.load(videomae, torch.device("cpu"))
    real, found = {}, {}
    for label in CLASSES:
        clips = np.load(place.work / f"demo/01_clips/train/{label}.npy")[:, 0]
        real[label] = metrics.unit_length(vm.run(network, scale, clips)[0])
        found[label] = vm.run(network, scale, seen(folder / label))
    limits = {label: metrics.percentile(metrics.nearest(points)) for label, points in real.items()}
    limits[""] = metrics.percentile(metrics.nearest(torch.cat([*real.values()])))
    assert metrics.measure(real, limits, found, [2, 0]) == pytest.approx(rows["gvd"]["mean"], abs=2e-6)

    place.must("tools/metrics.py", 2, "--teacher", videomae)
    assert path.read_bytes() == first
    code, text = place.run("tools/metrics.py", 2, "--teacher", videomae, "--sets", "other")
    assert code == 3 and "no set other" in text and "04_mvic_compose.py demo 2" in text
    video = folder / "Walk/0.mp4"
    video.write_bytes(video.read_bytes()[:-1] + b"x")
    code, text = place.run("tools/metrics.py", 2, "--teacher", videomae)
    assert code == 3 and "Walk/0.mp4 is damaged" in text and path.read_bytes() == first


def seen(folder):
    """The videos of a folder as the networks see them."""
    videos = [media.read_video(path) for path in sorted(folder.glob("*.mp4"))]
    return np.stack([media.network_clip(video, media.DATASETS["demo"]) for video in videos])


def test_score_is_that_of_the_network(place):
    code, text = place.run("tools/metrics.py", 2, "--score")
    assert code == 3 and "05_train_eval.py demo 2" in text and "--train-on full --save" in text
    place.must("05", "--train-on", "full", "--save", "--repeats", 1)
    place.must("tools/metrics.py", 2, "--score")
    network = common.MiniC3D(2).eval()
    network.load_state_dict(load_file(place.work / "demo/05_networks/minic3d__demo/network.safetensors"))
    for folder, name, count in (("03_samples", "gvd-samples", 8), ("04_distilled", "gvd", 2)):
        right = {}
        for index, label in enumerate(CLASSES):
            clips = seen(place.work / f"demo/{folder}/ipc2/gvd/{label}")
            x = (clips / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            with torch.inference_mode():
                logits = network(torch.from_numpy(x).float().permute(0, 4, 1, 2, 3))
            right[label] = (logits.argmax(1) == index).double()
        result = contract.read(place.work / f"demo/05_results/ipc2/{name}/score.json")
        assert result["videos"] == 2 * count == len(torch.cat([*right.values()]))
        assert result["per_class"] == {c: 100 * rates.mean().item() for c, rates in right.items()}
        assert result["top1"] == 100 * torch.cat([*right.values()]).mean().item()
        if name == "gvd-samples":  # of the first draw alone, Fig. 10
            first = torch.cat([values[::4] for values in right.values()])  # files 0_0, 0_1 ... 1_0
            assert result["first draw"]["videos"] == 4
            assert result["first draw"]["top1"] == 100 * first.mean().item()
    real = contract.read(place.work / "demo/05_results/ipc2/full/score.json")  # its own training clips
    assert real["videos"] == 10 and set(real["per_class"]) == set(CLASSES)


@pytest.mark.parametrize("ipc", [1, 5, 10])
def test_table_of_the_committed_results(ipc):
    """They are of commit 8207400, whose names of a protocol's settings were others."""
    folder = REPO / "results" / f"demo_ipc{ipc}"
    results = [r for path in folder.glob("*.json") if "top1" in (r := contract.read(path))]
    assert tables.markdown("demo", ipc, results) == (folder / "table.md").read_text("utf-8")
    assert {tables.file_name(r) for r in results} == {p.stem for p in folder.glob("*.json")} - {"seconds"}


def test_rows_that_are_not_run_and_the_paper():
    lines = tables.markdown("hmdb51", 20, []).splitlines()
    rows = [line.split(" | ") for line in lines[2:9]]
    names = ["random", "random, soft labels", "herding", "kcenter", "gvd", "gvd, soft labels", "full"]
    assert [row[0][2:] for row in rows] == names and {row[2] for row in rows} == {"not run"}
    assert [row[-1] for row in rows] == ["- |"] * 5 + [
        "21.1 (computed) |",
        "28.58 (computed; std recalled) |",
    ]
    assert "The best method before it: 13.2 (computed)." in lines
    assert tables.paper_figures("miniucf", 10) == {"full": "57.22 (computed; std recalled)", "prism": "31.0"}
    assert "paper" not in tables.markdown("demo", 5, [])


def seal(folder, **changes):
    """Changes result.json and its record as if 05 had written it so."""
    result, record = (contract.read(folder / name) for name in ("result.json", "manifest.json"))
    contract.save(folder / "result.json", result | changes)
    record["outputs"]["result.json"]["sha256"] = contract.sha256(folder / "result.json")
    contract.save(folder / "manifest.json", record)


def test_table_and_collected_results(place, tmp_path):
    target, folder = tmp_path / "results", place.work / "demo/05_results/ipc2/gvd/minic3d__hard__demo"
    words = ("tools/tables.py", 2, "--results", target)
    place.must("05", "--train-on", "random")
    text = place.must(*words)
    assert f"left out {folder}: short of its protocol: epochs 2" in text and not target.exists()
    (line,) = [line for line in text.splitlines() if line.startswith("| gvd |")]
    result = contract.read(folder / "result.json")
    assert f"{result['top1']['mean']:.1f} ± {result['top1']['std']:.1f} (2)" in line and "**short" in line
    assert (place.work / "demo/tables/ipc2.md").read_text() in text
    rows = {(r["set"], r["labels"]): r for r in contract.read(place.work / "demo/tables/ipc2.csv")}
    assert float(rows["gvd", "hard"]["top1"]) == result["top1"]["mean"]
    assert rows["herding", "hard"]["note"] == rows["gvd", "soft"]["note"] == "not run" and len(rows) == 7

    seal(folder, complete=True, deviations=[])
    (place.work / "demo/04_distilled/ipc2/gvd/loss.csv").write_text("step,loss\n1,0.5\n")  # as a baseline's
    place.must(*words)
    copy = target / "demo_ipc2/gvd.json"
    assert [p.name for p in sorted(copy.parent.iterdir())] == ["gvd.json", "gvd_loss.csv", "table.md"]
    assert contract.read(copy.with_name("gvd_loss.csv")) == [{"step": "1", "loss": "0.5"}]
    assert copy.read_bytes() == (folder / "result.json").read_bytes()
    assert (copy.parent / "table.md").read_text() == tables.markdown("demo", 2, [contract.read(copy)])

    copy.unlink()
    place.must("04", "--seed", 1)  # the set is made anew
    text = place.must(*words)
    assert "| gvd | minic3d, demo **of an older set** |" in text and not copy.exists()
    assert "of an older set" not in next(line for line in text.splitlines() if line.startswith("| random |"))
    record = contract.read(folder / "manifest.json")
    contract.save(folder / "manifest.json", record | {"complete": False})
    text = place.must(*words)
    assert f"not finished: {folder}" in text and "| gvd | minic3d | not run" in text
    contract.save(folder / "manifest.json", record)
    contract.save(folder / "result.json", result)
    code, text = place.run(*words)
    assert code == 3 and "result.json is damaged" in text


def bench_args(**values):
    return Namespace(
        what="demo", dataset="demo", size="32x32", device=CPU, dtype=torch.float32, rehearsal=False, **values
    )


def test_benchmark_and_the_hours_of_a_dry_run(place, tmp_path, monkeypatch):
    """Every part with as little as it takes; then its figures decide --dry-run's hours."""

    original = bench.load

    def short(script, args, *words):
        module, own = original(script, args, *words)
        own.steps = 3
        return module, own

    def seconds(args, call, most=0):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for module, name, value in (
        (bench, "seconds", seconds), (bench, "load", short), (bench, "IPC", 2), (bench, "VIDEOS", 12),
        (common, "BENCH", tmp_path), (common, "DEMO_MODEL", place.model), (sys, "argv", []),
        (common, "device_name", lambda device: "a CPU"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    bench.main(bench_args(minutes=5))
    results = contract.read(common.bench_file(CPU))
    figures = results["demo 32x32"]
    assert not any("note" in figures[part] for part in bench.PARTS), figures
    who = "ours at IPC 2, 8 per forward"
    ours, stock = (
        figures["03"][name] for name in (f"{who}, s per video", "stock pipeline, s per video of 3 steps")
    )
    ratio = figures["03"][f"{who}, stock / ours"]
    assert ours == figures["03"]["seconds"] and ratio == pytest.approx(stock / ours, rel=1e-3)
    for number, figure, words, hours in (
        ("01", "seconds", ("--redo",), 300 * 9000 / 3600),
        ("03", "seconds", ("--draws", 5, "--classes", "Walk"), 2 * 9000 * (2 / 25) / 3600),
        ("05", "seconds, minic3d", ("--repeats", 4, "--set", "lr=1"), 4 * 2 * 4 * 9000 / 3600),
        ("finetune_unet", "seconds, adapters", ("--lora", 4, "--batch", 2, "--steps", 3), 6 * 9000 / 3600),
    ):  # fmt: skip
        figures[number][figure] = 9000.0
        contract.save(common.bench_file(CPU), results)
        text = place.run("tools/finetune_unet.py" if number[0] == "f" else number, *words, "--dry-run")[1]
        assert f", {hours:.3f} h on a CPU, measured" in text, text
    assert "two CPU cores, estimate, " in place.run("03", "--redo", "--dtype", "float32", "--dry-run")[1]


def test_benchmark_bounds_its_parts(tmp_path, monkeypatch, capsys):
    """One is stopped, one lacks a module, one has a fault: the others and the file remain."""

    def part(*steps):
        def measure(args, folder):
            yield "first", 1.23456
            yield "second", [step() for step in steps][-1]

        return measure, 0.1

    parts = {"slow": part(lambda: time.sleep(60)), "lacking": part(lambda: import_module("no_such_module"))}
    parts |= {"broken": part(lambda: 1 / 0), "good": part(lambda: "left out: a reason")}
    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(common, "BENCH", tmp_path)
    contract.save(common.bench_file(CPU), {"real 448x256": {"03": {"seconds": 2.0}}})
    with pytest.raises(contract.ContractError, match="failed, see above: broken"):
        bench.main(bench_args(minutes=0.01))
    results = contract.read(common.bench_file(CPU))
    assert results["real 448x256"] == {"03": {"seconds": 2.0}}  # of another size: stays
    found = {name: results["demo 32x32"][name] for name in parts}
    assert all(record["first"] == 1.235 for record in found.values())
    assert (
        found["slow"]["note"] == "stopped after its 1 s" and found["good"]["second"] == "left out: a reason"
    )
    assert "no_such_module" in found["lacking"]["note"] and "ZeroDivisionError" in found["broken"]["note"]
    assert "stopped after its 1 s" in capsys.readouterr().out


def test_bytes_by_one_measure(place, tmp_path):
    """Of the set, of all clips and, for random, of the clips that each repeat took; then as results.csv."""
    place.must("05", "--train-on", "random")
    place.must("05", "--train-on", "full", "--repeats", 1)
    arrays = place.work / "demo/04_distilled/ipc2/dm"  # a baseline's set: one real clip, twice
    clip = np.load(place.work / "demo/01_clips/train/Walk.npy")[3, 0]
    for label in CLASSES:
        contract.save(arrays / f"{label}.npy", np.stack([clip, clip])[:, None].astype(np.float16))
    contract.save(arrays / "set.json", {"variants": 1})
    outputs = {p.name: {"bytes": 1, "sha256": contract.sha256(p)} for p in arrays.iterdir()}
    record = contract.read(place.work / "demo/04_distilled/ipc2/gvd/manifest.json")
    contract.save(arrays / "manifest.json", record | {"outputs": outputs})
    place.must("tools/mp4_bytes.py")
    place.must("tools/tables.py")
    sizes, spec = contract.read(place.work / "demo/mp4_bytes.json"), media.DATASETS["demo"]
    media.write_mp4(tmp_path / "a.mp4", clip)
    name = contract.read(place.work / "demo/01_clips/train/Walk.csv")[3]["name"]
    assert sizes["real"]["Walk"][name] == (tmp_path / "a.mp4").stat().st_size
    total = 0
    for path in place.work.glob("demo/04_distilled/ipc2/gvd/*/*.mp4"):
        media.write_mp4(tmp_path / "a.mp4", media.network_clip(media.read_video(path), spec))
        total += (tmp_path / "a.mp4").stat().st_size
    wanted = {"ipc2/gvd": total, "ipc2/dm": 4 * sizes["real"]["Walk"][name]}
    assert {name: entry["bytes"] for name, entry in sizes["sets"].items()} == wanted
    rows = {row["set"]: row for row in contract.read(place.work / "demo/tables/results.csv")}
    assert float(rows["gvd"]["mp4_bytes"]) == total
    assert float(rows["full"]["mp4_bytes"]) == sum(sum(c.values()) for c in sizes["real"].values())
    repeats = [contract.read(p) for p in place.work.glob("demo/05_results/ipc2/random/*/repeat_*.json")]
    each = [sum(sizes["real"][c][n] for c in CLASSES for n in repeat["clips"][c]) for repeat in repeats]
    assert float(rows["random"]["mp4_bytes"]) == sum(each) / 2
    place.must("04", "--grouping", "in-order", "--name", "gvd")  # made anew: no longer what was measured
    place.must("tools/mp4_bytes.py", "--classes", "Walk")  # where a set has one class, and of one class alone
    place.must("tools/tables.py")
    assert {row["mp4_bytes"] for row in contract.read(place.work / "demo/tables/results.csv")} == {""}
