"""Stage 05 beyond its default: protocols, networks, coresets; the drawn windows of stage 01."""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SCRIPTS, Place, load_stage

import common
import contract

DANCING = ["--protocol", "dancing"]


def result_of(place, *parts):
    return json.loads((place.work / "demo/05_results" / "/".join(parts) / "result.json").read_text())


# -- windows


@pytest.mark.parametrize(
    ("count", "stride", "starts"), [(64, 4, 3), (63, 3, 17), (100, 4, 39), (48, 3, 2), (47, 2, 16), (32, 2, 1), (17, 1, 1)]
)
def test_window_rule(count, stride, starts):
    """protocol.md 2 and 11, counted from 0: the start is uniform over so many values."""
    drawn = [load_stage("01").window_frames(count, contract.generator(0, i)) for i in range(60 * starts)]
    assert all((np.diff(frames) == stride).all() and len(frames) == 16 for frames in drawn)
    found, times = np.unique([frames[0] for frames in drawn], return_counts=True)
    assert found.tolist() == list(range(starts)) and times.min() > 25 and times.max() < 110
    assert max(frames[-1] for frames in drawn) == count - 2 if count > 47 else all(f[-1] < count - 1 for f in drawn)


@pytest.mark.parametrize("count", [1, 5, 16])
def test_videos_without_a_window_to_draw(count):
    frames = load_stage("01").window_frames(count, contract.generator(0, "a"))
    assert frames.tolist() == common.uniform_frames(count).tolist()


def test_windows_depend_on_seed_clip_and_window_only():
    """Frames that hold their number, and a mark at the left, tell which were taken and whether they were flipped."""
    stage, video = load_stage("01"), np.zeros((100, 48, 48, 3), np.uint8)
    video[..., 0] = np.arange(100, dtype=np.uint8)[:, None, None]
    video[:, :, :4, 1] = 200
    args = argparse.Namespace(seed=0, dataset="demo")
    made = {(s, n): stage.drawn_windows(video, ("Walk", n), 3, argparse.Namespace(seed=s, dataset="demo"))
            for s in (0, 1) for n in map(str, range(40))}  # fmt: skip
    again = stage.drawn_windows(video, ("Walk", "7"), 3, args)
    assert (again == made[0, "7"]).all() and (again[:1] == stage.drawn_windows(video, ("Walk", "7"), 1, args)).all()
    starts, flips = set(), []
    for clips in made.values():
        frames = clips[:, :, 0, 0, 0].astype(int)
        assert (frames == frames[:, :1] + 4 * np.arange(16)).all()
        starts.add(tuple(frames[:, 0]))
        sides = clips[:, :, :, [0, -1], 1].reshape(3, -1, 2)
        assert (sides == sides[:, :1]).all()  # all frames of a clip alike
        flips += (sides[:, 0, 0] == 0).tolist()
    assert len(starts) > 75 and 0.4 < np.mean(flips) < 0.6


def test_windows_are_added_to_a_finished_folder(empty, place, tmp_path):
    before = place.files()
    code, text = place.run("05", *DANCING)
    assert code == 3 and "01_encode_latents.py demo" in text and "--windows" in text, text
    code, text = place.run("01", "--windows")
    assert code == 0 and "stale" not in text, text
    after = place.files()
    new = {name for name in after if "01_clips/windows/" in name}
    assert {name for name in before if before[name] != after[name]} == {"demo/01_clips/manifest.json"}
    assert len(new) == 4 and {*after} == {*before} | new
    for split, videos, windows in (("train", 5, 1), ("test", 2, 3)):
        array = np.load(place.work / f"demo/01_clips/windows/{split}/Walk.npy")
        assert array.shape == (videos, windows, 16, 48, 48, 3) and array.dtype == np.uint8
    whole = Place(empty.data, empty.model, tmp_path / "whole")
    assert whole.run("01", "--windows")[0] == 0
    assert whole.files() == {name: data for name, data in after.items() if name.startswith("demo/01_")}
    assert "01 fresh" in place.run("01")[1] and place.files() == after


# -- networks


@pytest.mark.parametrize(("net", "layer"), [("cnn-gru", 28_317_696), ("cnn-rnn", 9_439_232)])
def test_recurrent_parameters_and_shapes(net, layer):
    """protocol.md 3.2: at 112 px the central 64, 8,192 features, hidden 1,024; 4,608 and 576 at 48 px."""
    stage = load_stage("05")
    network = stage.build(net, 50, 112).eval()
    counts = [sum(p.numel() for p in part.parameters()) for part in (network.blocks, network.recurrent, network.head)]
    assert counts == [299_520, layer, 51_250]
    frame = np.random.default_rng(0).integers(256, size=(2, 1, 16, 112, 112, 3), dtype=np.uint8)
    clips, labels = stage.tensors({"Walk": ({"a": 0, "b": 1}, frame)}, "cpu", net=net)
    assert (clips.numpy() == frame[:, 0, :, 24:88, 24:88]).all() and labels.tolist() == [0, 0]
    with torch.inference_mode():
        assert network(stage.to_input(clips)).shape == (2, 50)
        assert stage.build(net, 8, 48)(torch.zeros(1, 3, 16, 48, 48)).shape == (1, 8)
    small = stage.build(net, 8, 48).recurrent
    assert (small.input_size, small.hidden_size) == (4608, 576)


def test_recurrent_network_against_a_plain_reference():
    """Frame by frame and step by step: convolution, a mean and deviation per channel, tanh states, their mean."""
    stage = load_stage("05")
    net = stage.build("cnn-rnn", 3, 16).double().eval()
    clips = torch.randn(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, F = dict(net.named_parameters()), torch.nn.functional
    states = []
    for t in range(16):
        x = clips[:, :, t]
        for block in (0, 4, 8):
            x = F.conv2d(x, weights[f"blocks.{block}.weight"], weights[f"blocks.{block}.bias"], padding=1)
            x = (x - x.mean((2, 3), True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            scale, shift = (weights[f"blocks.{block + 1}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
            x = F.relu(x * scale + shift)
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        step = x.flatten(1).float() @ weights["recurrent.weight_ih_l0"].float().T + weights["recurrent.bias_ih_l0"].float()
        if states:
            step = step + states[-1] @ weights["recurrent.weight_hh_l0"].float().T
        states.append(torch.tanh(step + weights["recurrent.bias_hh_l0"].float()))
    expected = torch.stack(states).mean(0) @ weights["head.weight"].float().T + weights["head.bias"].float()
    net.recurrent.float(), net.head.float()
    assert torch.allclose(net(clips), expected, atol=1e-5)


@pytest.mark.parametrize("net", ["minic3d", "cnn-gru", "cnn-rnn"])
def test_networks_train_and_test(place, net):
    """The same command twice writes the same bytes."""
    words = ["--net", net, "--epochs", 1, "--limit", 1, "--name", "small"]
    texts = []
    for _ in range(2):
        code, text = place.run("05", *words, "--redo")
        assert code == 0, text
        texts.append((place.work / f"demo/05_results/ipc2/small/{net}__hard__demo/result.json").read_bytes())
    result = json.loads(texts[0])
    assert texts[0] == texts[1] and result["net"] == net and result["repeats"] == [0, 1] and result["seed"] == 0
    assert result["device"] == "cpu" and result["top1"]["n"] == len(result["top1"]["values"]) == 2


@pytest.mark.parametrize(("net", "side"), [("minic3d", 48), ("cnn-gru", 16), ("cnn-rnn", 16)])
def test_networks_learn_two_classes(net, side):
    """Bright and dark clips are told apart after a few steps."""
    stage = load_stage("05")
    clips = torch.randint(100, (12, 16, side, side, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(12) % 2
    clips[labels == 1] += 120
    protocol = {**stage.PROTOCOLS["demo"], "batch": 4, "epochs": 4, "min_steps": 0}
    with torch.random.fork_rng():
        trained, _ = stage.train(clips[:8], labels[:8], 2, protocol, 0, 0, torch.float32, Path("none.pt"), net)
    assert stage.test(trained, [clips[8:]], labels[8:], CLASSES, torch.float32)["top1"] == 100


# -- protocols


def test_standardisation():
    stage = load_stage("05")
    clips = torch.randint(256, (3, 16, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    clips[1] //= 4
    plain, batch, clip = (stage.to_input(clips, kind) for kind in ("none", "batch", "clip"))
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (stage.MEAN, stage.STD))
    assert torch.equal(plain[0], ((clips[0].permute(3, 0, 1, 2) / 255) - mean) / std)
    assert torch.allclose(batch, (plain - plain.mean()) / plain.std(), atol=1e-6)
    for i in range(3):
        assert torch.allclose(clip[i], stage.to_input(clips[i : i + 1], "batch")[0], atol=1e-5)
    assert not torch.allclose(batch[0], clip[0], atol=1e-2)


class Probe(torch.nn.Module):
    """A network of one weight: brightness tells the class."""

    def __init__(self, num_classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(num_classes))

    def forward(self, clips):
        return clips.mean((1, 2, 3, 4))[:, None] * self.weight


@pytest.mark.parametrize(("protocol", "full", "epochs"), [("dancing", 252, 501), ("gvd", 250, 500)])
def test_schedule(protocol, full, epochs, monkeypatch, tmp_path):
    """Epochs at the full rate, then at a tenth; dancing forgets its momentum there, gvd does not."""
    stage, steps = load_stage("05"), []
    monkeypatch.setattr(stage, "build", lambda net, num_classes, side: Probe(num_classes))
    original = torch.optim.SGD.step

    def step(optimiser, *args):
        known = bool(optimiser.state)
        steps.append((optimiser.param_groups[0]["lr"], known))
        return original(optimiser, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    clips = torch.randint(256, (2, 16, 2, 2, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.random.fork_rng():
        stage.train(clips, torch.arange(2), 2, stage.PROTOCOLS[protocol], 0, 0, torch.float32, tmp_path / "a.pt")
    assert [rate for rate, _ in steps] == pytest.approx([0.01] * full + [0.001] * (epochs - full))
    assert [i for i, (_, known) in enumerate(steps) if not known] == ([0, full] if protocol == "dancing" else [0])


def test_accuracy_over_passes_is_their_mean():
    stage, net = load_stage("05"), Probe(2)
    net.weight.data = torch.tensor([-1.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1])
    passes = [torch.zeros(4, 16, 2, 2, 3, dtype=torch.uint8) for _ in range(3)]
    for clips, bright in zip(passes, ([2, 3], [1, 2, 3], []), strict=True):
        clips[bright] = 255
    single = [stage.test(net, [clips], labels, CLASSES, torch.float32) for clips in passes]
    assert [s["top1"] for s in single] == [100, 75, 50]
    together = stage.test(net, passes, labels, CLASSES, torch.float32)
    assert together["top1"] == 75 and together["per_class"] == {"Walk": 83.3333, "Wave": 66.6667}


def test_dancing_trains_on_window_1_and_tests_on_windows_1_to_3(place, monkeypatch):
    assert place.run("01", "--windows")[0] == 0
    stage, seen = load_stage("05"), {}
    train, test = stage.train, stage.test

    def spy_train(clips, *args):
        seen["train"] = clips.clone()
        return train(clips, *args)

    def spy_test(net, passes, *args):
        seen["test"] = [clips.clone() for clips in passes]
        return test(net, passes, *args)

    monkeypatch.setattr(stage, "train", spy_train)
    monkeypatch.setattr(stage, "test", spy_test)
    code, text = place.run("05", *DANCING, "--train-on", "full", "--repeats", 1)
    assert code == 0, text
    folder = place.work / "demo/01_clips/windows"
    expected = {s: np.concatenate([np.load(folder / s / f"{c}.npy") for c in CLASSES]) for s in ("train", "test")}
    assert (seen["train"].numpy() == expected["train"][:, 0]).all()
    assert [(clips.numpy() == expected["test"][:, w]).all() for w, clips in enumerate(seen["test"])] == [True] * 3
    protocol = result_of(place, "full/full/minic3d__hard__dancing")["protocol"]
    assert (protocol["name"], protocol["standardise"], protocol["flip"], protocol["batch"]) == ("dancing", "batch", 0.0, 256)


def test_an_overridden_knob_is_recorded_and_marked(place):
    code, text = place.run("05", "--batch", 4, "--rate", 0.02, "--flip", 0, "--standardise", "clip", "--repeats", 1)
    assert code == 0, text
    result = result_of(place, "ipc2/gvd/minic3d__hard__demo")
    assert result["protocol"] == {
        "name": "demo", "batch": 4, "max_batch": 4, "epochs": 2, "min_steps": 0, "rate": 0.02, "drop": 0.5, "flip": 0.0,
        "sampling": "uniform", "frames": "in-order", "standardise": "clip", "restart": False,
    }  # fmt: skip
    for text in ("batch 4, not 8", "epochs 2, not 60", "rate 0.02, not 0.005", "flip 0.0, not 0.5", "2 of 8 classes"):
        assert text in result["deviations"]
    assert not result["complete"]
    code, text = place.run("05", "--table")
    assert code == 0 and "**short of its protocol: batch 4, not 8;" in text, text


def test_only_the_whole_protocol_is_complete(monkeypatch):
    """find_deviations with one thing changed at a time."""
    stage, spec = load_stage("05"), common.DATASETS["hmdb51"]
    words = ["05", "hmdb51", "20", "--train-on", "random"]

    def found(*extra, train=1020, test=1530):
        monkeypatch.setattr("sys.argv", [*words, *extra])
        return stage.find_deviations(stage.parse_args(), train, test)

    assert found() == [] and found("--protocol", "dancing") == [] and found("--repeats", "1") == []
    assert found("--batch", "128") == [] and found("--train-on", "full", train=5236) == []
    assert found("--train-on", "full", "--hmdb-train", "official", train=3570) == []
    assert found("--train-on", "full", "--hmdb-train", "official", train=5236) == ["5,236 of 3,570 training videos"]
    for knob, value in (("batch", "256"), ("epochs", "501"), ("min-steps", "1"), ("rate", "0.1"), ("drop", "0.4"),
                        ("flip", "0"), ("sampling", "drawn"), ("standardise", "batch")):  # fmt: skip
        assert len(found("--" + knob, value)) == 1 + (knob == "batch"), knob  # batch alone sets max_batch too
    assert found("--restart") == ["restart True, not False"]
    assert found(test=1529) == ["1,529 of 1,530 test clips"] and found(train=1019) == ["1,019 of 1,020 training videos"]
    assert found("--classes", "wave") == ["1 of 51 classes"] and len(spec["classes"]) == 51


@pytest.mark.parametrize(
    "words", [["--flip", "2"], ["--rate", "nan"], ["--drop", "-1"], ["--features", "full"], ["--min-steps", "-1"],
              ["--train-on", "full", "--save", "--net", "cnn-gru"], ["--net", "c3d"], ["--sampling", "random"]],
)  # fmt: skip
def test_usage_errors(empty, words):
    code, text = empty.run("05", *words)
    assert code == 2 and "error:" in text, text


# -- coresets


def plain_herding(rows, count):
    """As Welling's rule reads, with plain loops."""
    size = len(rows[0])
    mean = [math.fsum(row[j] for row in rows) / len(rows) for j in range(size)]
    chosen = []
    for k in range(1, count + 1):
        target = [k * mean[j] - math.fsum(rows[i][j] for i in chosen) for j in range(size)]
        chosen.append(min((i for i in range(len(rows)) if i not in chosen), key=lambda i: (math.dist(rows[i], target), i)))  # noqa: B023
    return chosen


def plain_kcenter(rows, count):
    mean = [math.fsum(row[j] for row in rows) / len(rows) for j in range(len(rows[0]))]
    chosen = [min(range(len(rows)), key=lambda i: (math.dist(rows[i], mean), i))]
    while len(chosen) < count:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(math.dist(rows[i], rows[c]) for c in chosen), -i)))
    return chosen


@pytest.mark.parametrize("count", range(1, 9))
def test_coresets_against_brute_force(count):
    stage = load_stage("05")
    for case in range(5):
        features = np.random.default_rng(case).standard_normal((30, 512)) * np.random.default_rng(case).random(512) + 1
        rows = features.tolist()
        assert stage.herding(features, count) == plain_herding(rows, count)
        assert stage.kcenter(features, count) == plain_kcenter(rows, count)


@pytest.mark.parametrize("name", ["herding", "kcenter"])
def test_coresets_without_replacement_and_ties(name):
    choose = getattr(load_stage("05"), name)
    assert choose(np.zeros((6, 3)), 6) == [0, 1, 2, 3, 4, 5]  # all equal: in order of name
    features = np.random.default_rng(0).standard_normal((8, 4))
    assert sorted(choose(features, 8)) == list(range(8))


def test_kcenter_by_hand():
    line = np.array([0.0, 1, 2, 3, 4, 5, 14])[:, None]
    assert load_stage("05").kcenter(line, 3) == [4, 6, 0]
    assert load_stage("05").herding(np.array([[0.0], [1], [4], [7]]), 3) == [2, 1, 3]


def test_coresets_on_saved_features(place):
    """The features are the saved network's, the clips are those that the rule chooses, in every repeat."""
    code, text = place.run("05", "--train-on", "herding")
    assert code == 3 and "05_train_eval.py demo --work-dir" in text and "--train-on full --save" in text, text
    code, text = place.run("05", "--train-on", "full", "--save", "--repeats", 1)
    assert code == 0, text
    stage, folder = load_stage("05"), place.work / "demo/05_networks/minic3d__demo"
    net = common.MiniC3D(2).eval()
    net.load_state_dict(stage.load_file(folder / "network.safetensors"))
    chosen = {}
    for label in CLASSES:
        names = [row["name"] for row in common.read_csv(folder / f"features/{label}.csv")]
        features = np.load(folder / f"features/{label}.npy")
        clips = torch.from_numpy(np.load(place.work / f"demo/01_clips/train/{label}.npy")[:, 0])
        with torch.inference_mode():
            expected = net.blocks(stage.to_input(clips)).flatten(1).numpy()
        assert features.shape == (5, 512) and np.allclose(features, expected, atol=1e-5) and names == sorted(names)
        rows = features.astype(float).tolist()
        rules = {"herding": plain_herding, "kcenter": plain_kcenter}
        chosen[label] = {kind: [names[i] for i in rule(rows, 2)] for kind, rule in rules.items()}
    for kind in ("herding", "kcenter"):
        code, text = place.run("05", "--train-on", kind)
        assert code == 0, text
        results = place.work / f"demo/05_results/ipc2/{kind}/minic3d__hard__demo"
        repeats = [json.loads((results / f"repeat_{r}.json").read_text()) for r in range(2)]
        assert [r["clips"] for r in repeats] == [{c: chosen[c][kind] for c in CLASSES}] * 2
        assert repeats[0]["loss"] != repeats[1]["loss"]
        deviations = result_of(place, f"ipc2/{kind}/minic3d__hard__demo")["deviations"]
        assert "features of a network with another protocol" in deviations  # 2 epochs
    (folder / "manifest.json").unlink()
    assert place.run("05", "--train-on", "kcenter")[0] == 3


def test_coreset_by_an_untrained_network(place):
    code, text = place.run("05", "--train-on", "kcenter", "--features", "random", "--repeats", 1)
    assert code == 0 and not (place.work / "demo/05_networks").exists(), text
    folder = place.work / "demo/05_results/ipc2/kcenter_untrained/minic3d__hard__demo"
    first = (folder / "repeat_0.json").read_bytes()
    assert json.loads((folder / "result.json").read_text())["features"] == "random"
    assert place.run("05", "--train-on", "kcenter", "--features", "random", "--repeats", 1, "--redo")[0] == 0
    assert (folder / "repeat_0.json").read_bytes() == first


def test_too_few_clips_for_a_coreset(place):
    code, text = place.run("05", "--train-on", "herding", "--features", "random", "--limit", 1)
    assert code == 3 and "too few training clips of Walk" in text, text


# -- real clips


def test_dancing_on_real_hmdb51_clips(real_data, empty, tmp_path):
    """Original files at 112 px: drawn windows, MiniC3D at 112 and CNN+RNN at the central 64."""
    spec, root = common.DATASETS["hmdb51"], tmp_path / "data"
    shutil.copytree(real_data / spec["lists"], root / spec["lists"])
    originals = sorted((real_data / spec["videos"]).rglob("*.avi"))
    count = {}
    for label, name, split, _ in common.list_clips("hmdb51", root):
        if label in ("hug", "wave") and count.setdefault((label, split), 0) < 1:
            target = root / spec["videos"] / label / f"{name}.avi"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(originals[len(count) % len(originals)], target)
            count[label, split] += 1
    shared = ["--work-dir", tmp_path / "work", "--data-root", root, "--classes", "hug,wave"]

    def run(number, *words):
        place = Place(root, empty.model, tmp_path / "work")
        place.words = lambda *_: [str(SCRIPTS[number]), "hmdb51", *map(str, [*words, *shared])]
        return place.run(number)

    code, text = run("01", "--partial", "--windows", "--model", empty.model, "--size", "16x8")
    assert code == 0, text
    assert np.load(tmp_path / "work/hmdb51/01_clips/windows/test/hug.npy").shape == (1, 3, 16, 112, 112, 3)
    for net in ("minic3d", "cnn-rnn"):
        for protocol in ("gvd", "dancing"):
            words = ["1", "--train-on", "random", "--net", net, "--protocol", protocol, "--epochs", 1, "--repeats", 1]
            code, text = run("05", *words)
            assert code == 0, text


def test_frames_out_of_order():
    """The same frames in another order, or one of them; drawn for each clip, and never twice differently."""
    stage = load_stage("05")
    array = np.arange(3 * 16, dtype=np.uint8).reshape(3, 1, 16, 1, 1, 1).repeat(3, -1)
    clips = {"Walk": ({"a": 0, "b": 2}, array)}
    assert stage.reorder(clips, "in-order", 0) is clips
    shuffled = stage.reorder(clips, "shuffled", 0)["Walk"][1]
    assert (np.sort(shuffled, 2) == array).all() and (shuffled[[0, 2]] != array[[0, 2]]).any((2, 3, 4, 5)).all()
    assert (shuffled[0] != shuffled[2] - 32).any()
    one = stage.reorder(clips, "one", 0)["Walk"][1]
    assert (one[[0, 2]] == one[[0, 2], :, :1]).all() and one[0, 0, 0, 0, 0, 0] == shuffled[0, 0, 0, 0, 0, 0]
    alone = stage.reorder({"Walk": ({"b": 0}, array[2:])}, "shuffled", 0)["Walk"][1]
    assert (alone[0] == shuffled[2]).all()


@pytest.mark.parametrize(("clips", "demo", "gvd"), [(8, 8, 128), (80, 8, 128), (160, 16, 128), (864, 64, 128)])
def test_a_step_takes_a_tenth_of_the_set(clips, demo, gvd):
    stage = load_stage("05")
    assert stage.batch_size(clips, stage.PROTOCOLS["demo"]) == demo
    assert stage.batch_size(clips, stage.PROTOCOLS["gvd"]) == gvd
