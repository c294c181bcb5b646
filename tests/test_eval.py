"""Stage 05, coresets, soft labels, VideoMAE and its training, against references written out by hand."""

import contract

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, load
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import common
import media

stage, vm = load("05"), load("tools/videomae.py")
coresets, fitting = load("tools/coresets.py"), load("tools/train_teacher.py")
CPU, NONE, LABELS = torch.device("cpu"), Path("no checkpoint"), "tools/soft_labels.py"


def outcome(place, name="gvd", kind="minic3d__hard__demo"):
    """(repeats, result) of a set's result."""
    folder = place.work / "demo/05_results/ipc2" / name / kind
    repeats = [contract.read(path) for path in sorted(folder.glob("repeat_*.json"))]
    return repeats, contract.read(folder / "result.json")


def names_in(path):
    return [row["name"] for row in contract.read(path)]


def settings(net="minic3d", **changes):
    return Namespace(net=net, seed=0, classes=CLASSES, protocol=stage.PROTOCOLS["demo"] | changes)


def random_clips(count, side):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 16, side, side, 3), generator=generator, dtype=torch.uint8)


class Probe(torch.nn.Module):
    """A network of one weight per class: brightness tells the class."""

    def __init__(self, num_classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((num_classes,), 3.0))

    def forward(self, clips):
        return clips.mean((1, 2, 3, 4))[:, None] * self.weight


# --- networks and training --------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "layer"), [("cnn-gru", 28_317_696), ("cnn-rnn", 9_439_232)])
def test_recurrent_networks_see_the_central_64_pixels(net, layer):
    network, frames = stage.Recurrent(50, 64, stage.NETS[net]), random_clips(2, 112).numpy()[:, None]
    parts = (network.blocks, network.recurrent, network.head)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [299_520, layer, 51_250]
    clips, labels, _ = stage.tensors({"Walk": (["a", "b"], frames)}, {"Walk": ["b"]}, CPU, net=net)
    assert (clips.numpy() == frames[1:, 0, :, 24:88, 24:88]).all() and labels.tolist() == [0]
    assert network.eval()(stage.network_input(clips, "none")).shape == (1, 50)


def test_recurrent_network_against_a_plain_reference():
    """Frame by frame: convolutions, mean and deviation per channel, tanh states one by one, their mean."""
    net = stage.Recurrent(3, 16, torch.nn.RNN).eval()
    clips = torch.randn(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    w, states = dict(net.named_parameters()), []
    for t in range(16):
        x = clips[:, :, t]
        for a, b in ((0, 1), (4, 5), (8, 9)):
            x = F.conv2d(x, w[f"blocks.{a}.weight"], w[f"blocks.{a}.bias"], padding=1)
            x = (x - x.mean((2, 3), True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
            x = F.relu(x * w[f"blocks.{b}.weight"].view(-1, 1, 1) + w[f"blocks.{b}.bias"].view(-1, 1, 1))
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        step = x.flatten(1) @ w["recurrent.weight_ih_l0"].T + w["recurrent.bias_ih_l0"]
        step = step + (states[-1] @ w["recurrent.weight_hh_l0"].T if states else 0)
        states.append(torch.tanh(step + w["recurrent.bias_hh_l0"]))
    expected = torch.stack(states).mean(0) @ w["head.weight"].T + w["head.bias"]
    assert torch.allclose(net(clips), expected, atol=1e-5)


@pytest.mark.parametrize(("net", "side"), [("minic3d", 48), ("cnn-gru", 16), ("cnn-rnn", 16)])
def test_networks_learn_two_classes(net, side):
    clips, labels = random_clips(12, side) // 3, torch.arange(12) % 2
    clips[labels == 1] += 120
    args = settings(net, epochs=4, min_steps=0, min_batch_size=4)
    trained, _ = stage.train(clips[:8], labels[:8], None, args, 0, torch.float32, NONE)
    assert stage.test(trained, [clips[8:]], labels[8:], CLASSES, torch.float32)["top1"] == 100


def test_input_is_normalised_mirrored_and_standardised():
    clips = random_clips(3, 8)
    clips[1] //= 4
    plain, batch, clip = (stage.network_input(clips, kind) for kind in ("none", "batch", "clip"))
    for i, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):  # ImageNet's, RGB
        assert torch.allclose(plain[:, i], (clips[..., i] / 255 - mean) / std, atol=1e-6)
    assert torch.allclose(batch, (plain - plain.mean()) / plain.std(), atol=1e-5)
    for ours, x in zip(clip, plain, strict=True):
        assert torch.allclose(ours, (x - x.mean()) / x.std(), atol=1e-5)
    marked = torch.zeros(2, 16, 8, 8, 3, dtype=torch.uint8)
    marked[:, :, 1, :2] = 255  # at the left, near the top
    as_it_is, mirrored = stage.network_input(marked, "none", torch.tensor([False, True])) > 0
    assert as_it_is[:, :, 1, :2].all() and mirrored[:, :, 1, -2:].all()  # at the right, near the top
    assert as_it_is.sum() == mirrored.sum() == 3 * 16 * 2


@pytest.mark.parametrize("restart", [False, True])
def test_training_is_sgd_with_momentum_and_weight_decay_by_hand(restart, monkeypatch):
    monkeypatch.setattr(common, "MiniC3D", Probe)
    clips, labels, weight, velocity = random_clips(6, 4), torch.tensor([0, 1, 1, 0, 1, 0]), 3.0, 0.0
    args = settings(epochs=6, min_steps=0, min_batch_size=2, lr=0.5, restart_momentum=restart)
    net, loss = stage.train(clips, labels, None, args, 3, torch.float32, NONE)
    brightness = stage.network_input(clips, "none").mean((1, 2, 3, 4)).double()[:, None]
    for epoch in range(6):  # lr falls after half of them
        order = torch.randperm(6, generator=contract.generator(0, "05", 3, "epoch", epoch))
        velocity, losses = 0.0 if restart and epoch == 3 else velocity, []
        for batch in order.split(2):
            logits = brightness[batch] * weight * torch.ones(2)
            losses.append(F.cross_entropy(logits, labels[batch]).item())
            gradient = ((logits.softmax(1) - F.one_hot(labels[batch], 2)) * brightness[batch]).mean(0)
            velocity = 0.9 * velocity + gradient + 5e-4 * weight
            weight = weight - (0.5 if epoch < 3 else 0.05) * velocity
    assert torch.allclose(net.weight.double(), weight, atol=1e-5)
    assert loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_steps_and_epochs_of_the_protocols():
    dancing, gvd, demo = (stage.PROTOCOLS[name] for name in ("dancing", "gvd", "demo"))
    assert [math.ceil(p["lr_drop_at"] * p["epochs"]) for p in (dancing, gvd, demo)] == [252, 250, 30]
    assert [stage.schedule(n, demo) for n in (8, 80, 160, 864)] == [(8, 300), (8, 60), (16, 60), (64, 60)]
    assert [stage.schedule(n, p) for n in (8, 864) for p in (gvd, dancing)] == [(128, 500), (256, 501)] * 2


def test_accuracy_of_several_passes_is_their_mean():
    net, labels = Probe(2), torch.tensor([0, 0, 1, 1])
    net.weight.data = torch.tensor([-1.0, 1.0])
    passes = [torch.zeros(4, 16, 2, 2, 3, dtype=torch.uint8) for _ in range(3)]
    for clips, bright in zip(passes, ([2, 3], [1, 2, 3], []), strict=True):
        clips[bright] = 255
    assert [stage.test(net, [x], labels, CLASSES, torch.float32)["top1"] for x in passes] == [100, 75, 50]
    wanted = {"top1": 75, "top5": 100, "per_class": {"Walk": 83.3333, "Wave": 66.6667}}
    assert stage.test(net, passes, labels, CLASSES, torch.float32) == wanted
    forgetful = torch.nn.Sequential(torch.nn.Dropout(1.0), net).train()  # dropout is off in a test
    assert stage.test(forgetful, passes, labels, CLASSES, torch.float32) == wanted


def stop_at(monkeypatch, *stop):
    """Ctrl-C when the generator of these names is asked for; the function returned takes it back."""
    draw = contract.generator

    def failing(seed, *names):
        if names[-len(stop) :] == stop:
            raise KeyboardInterrupt
        return draw(seed, *names)

    monkeypatch.setattr(contract, "generator", failing)
    return lambda: monkeypatch.setattr(contract, "generator", draw)


def test_interrupted_training_ends_with_the_same_numbers(place, monkeypatch):
    """It goes on from a checkpoint; one that is cut in half is one message."""
    monkeypatch.setattr(stage, "CHECKPOINT_EVERY", 2)
    words = ("05", "--set", "epochs=3", "--repeats", 1, "--name")
    place.must(*words, "whole")
    for name in ("stopped", "cut"):
        go_on = stop_at(monkeypatch, "epoch", 2)
        with pytest.raises(KeyboardInterrupt):
            place.run(*words, name)
        go_on()
        checkpoint = place.work / f"demo/05_results/ipc2/{name}/minic3d__hard__demo/.checkpoint_0.pt"
        if name == "cut":
            checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
            text = place.refused(*words, name)
            assert f"{checkpoint} is damaged" in text and f"rm {checkpoint}" in text
            checkpoint.unlink()
        place.must(*words, name)
        assert outcome(place, name)[0] == outcome(place, "whole")[0] and not checkpoint.exists()


# --- options, and what a result states --------------------------------------------------------------------


def test_changes_of_the_protocol_are_recorded_and_marked(place):
    place.must("05", "--set", "batch_size=4", "lr=0.02", "--set", "epochs=2", "standardise=clip")
    result, own = outcome(place)[1], stage.PROTOCOLS["demo"]
    changed = {"epochs": 2, "min_steps": 0, "min_batch_size": 4, "max_batch_size": 4, "lr": 0.02}
    assert result["protocol"] == {"name": "demo", **own, **changed, "standardise": "clip"}
    marks = {f"{key} {value}, not {own[key]}" for key, value in changed.items()}
    assert marks | {"2 of 8 classes", "4 of 336 test clips"} < {*result["deviations"]}
    assert not result["complete"]


WRONG = "flip=2 lr=nan lr epochs=0 epochs=1.5 min_steps=-1 sampling=random restart_momentum=1 speed=1".split()
WRONG += ["min_batch_size=999"]  # above max_batch_size
SAVE = "--train-on full --save"


@pytest.mark.parametrize(
    "words", [*(f"--set {w}" for w in WRONG), f"{SAVE} --net cnn-gru", f"{SAVE} --labels soft", "--tau 0"]
)
def test_usage_errors(empty, words):
    code, text = empty.run("05", *words.split())
    assert code == 2 and "error:" in text, text


def test_only_the_whole_protocol_is_complete(monkeypatch):
    """find_deviations with one thing changed at a time."""

    def found(*extra, train=1020, test=1530, hmdb_train="all"):
        monkeypatch.setattr("sys.argv", ["05", "hmdb51", "20", "--train-on", "random", *extra])
        facts = {"videos": train, "test clips": test, "hmdb_train": hmdb_train}
        return stage.find_deviations(stage.parse_args(), facts, {})

    full = ("--train-on", "full")
    assert found() == found("--protocol", "dancing") == found("--repeats", "1") == found("--alpha", "1") == []
    assert found(*full, train=5236) == found(*full, train=3570, hmdb_train="official") == []
    assert found(*full, hmdb_train="official") == ["1,020 of 3,570 training videos"]
    values = {"epochs": 501, "min_steps": 1, "min_batch_size": 64, "max_batch_size": 256, "lr": 0.1}
    values |= {"lr_drop_at": 0.4, "flip": 0.0, "sampling": "drawn", "standardise": "batch"}
    values["restart_momentum"] = True
    for key, value in values.items():
        own = stage.PROTOCOLS["gvd"][key]
        assert found("--set", f"{key}={str(value).lower()}") == [f"{key} {value}, not {own}"]
    assert found("--labels", "soft", "--alpha", "1") == ["alpha 1.0, not 0.5"]
    assert found(test=1529) == ["1,529 of 1,530 test clips"]
    assert found(train=9) == ["9 of 1,020 training videos"]
    assert found("--classes", "wave") == ["1 of 51 classes"]


def test_result_says_what_it_was_made_from(place):
    """Its digest, the parameters of 02 to 04 and the U-Net, and what --keep has accepted on the way."""
    place.must("03", "--guidance", 3, "--name", "strong")
    place.must("04", "--samples", "strong", "--name", "other")
    place.must("04", "--samples", "strong", "--name", "other", "--frames", "continuous", "--keep")
    place.must("05", "--train-on", "other")
    repeats, result = outcome(place, "other")
    path = place.work / "demo/04_distilled/ipc2/other"
    names = [f"{c}/{i}.mp4" for c in CLASSES for i in (0, 1)]
    assert result["training set"] == contract.digest({name: contract.sha256(path / name) for name in names})
    assert result["bytes"] == sum((path / name).stat().st_size for name in names) and result["videos"] == 4
    made = result["provenance"]
    assert made["03_samples"]["guidance"] == 3 and len(made["03_samples"]["unet"]) == 64
    assert made["02_prototypes"]["cluster"] == "direct" and made["04_distilled"]["pattern"] == "4x4"
    assert "04_distilled kept although frames random -> continuous" in result["deviations"]
    assert str(place.work) not in json.dumps(result)

    bare = place.work.parent / "bare"  # the same videos in a folder that no stage made
    for name in names:
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path / name, bare / name)
    place.must("05", "--train-on", bare)
    assert outcome(place, "bare")[0] == repeats
    assert outcome(place, "bare")[1]["training set"] == result["training set"]
    assert "name of a set of real clips" in place.refused("05", "--train-on", bare, "--name", "random")
    place.must("05", "--train-on", place.work / "demo/03_samples/ipc2/strong", "--repeats", 1)
    assert outcome(place, "strong-samples")[1]["videos"] == 16
    (bare / names[0]).write_bytes(b"no video")
    assert str(bare / names[0]) in place.refused("05", "--train-on", bare)


def test_dancing_trains_on_window_1_and_tests_on_windows_1_to_3(place, monkeypatch):
    words = ("05", "--protocol", "dancing", "--train-on", "full", "--repeats", 1)
    assert "--windows" in place.refused(*words)
    place.must("01", "--windows")
    seen, train, test = {}, stage.train, stage.test
    monkeypatch.setattr(stage, "train", lambda x, *rest: train(seen.setdefault("train", x), *rest))
    monkeypatch.setattr(stage, "test", lambda net, x, *rest: test(net, seen.setdefault("test", x), *rest))
    place.must(*words)
    for split in ("train", "test"):
        paths = [place.work / f"demo/01_clips/windows/{split}/{c}.npy" for c in CLASSES]
        windows = np.concatenate([np.load(path) for path in paths]).swapaxes(0, 1)
        ours = seen["test"] if split == "test" else [seen["train"]]
        assert all((a == b.numpy()).all() for a, b in zip(windows, ours, strict=True))


# --- coresets ---------------------------------------------------------------------------------------------


def plain_herding(rows, count):
    """As Welling's rule reads, with plain loops."""
    mean, chosen = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)], []
    for k in range(1, count + 1):
        target = [k * m - math.fsum(rows[i][j] for i in chosen) for j, m in enumerate(mean)]
        chosen.append(min((math.dist(row, target), i) for i, row in enumerate(rows) if i not in chosen)[1])
    return chosen


def plain_kcenter(rows, count):
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    chosen = [min((math.dist(row, mean), i) for i, row in enumerate(rows))[1]]
    while len(chosen) < count:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(math.dist(rows[i], rows[c]) for c in chosen), -i)))
    return chosen


RULES = {"herding": plain_herding, "kcenter": plain_kcenter}


def test_coresets_against_brute_force_and_by_hand():
    for case in range(4):
        rng = np.random.default_rng(case)
        features = rng.standard_normal((30, 64)) * rng.random(64) + 1
        for kind, rule in RULES.items():
            for count in (1, 3, 8, 30):
                assert getattr(coresets, kind)(features, count) == rule(features.tolist(), count)
    same = np.zeros((6, 3))  # in order of name
    assert coresets.herding(same, 6) == coresets.kcenter(same, 6) == [0, 1, 2, 3, 4, 5]
    assert coresets.kcenter(np.array([0.0, 1, 2, 3, 4, 5, 14])[:, None], 3) == [4, 6, 0]
    assert coresets.herding(np.array([[0.0], [1], [4], [7]]), 3) == [2, 1, 3]


def test_coresets_of_the_saved_network(place):
    """The features are the saved network's, the clips those that the rule chooses, in every repeat."""
    assert "tools/coresets.py demo 2" in place.refused("05", "--train-on", "herding")
    assert "--train-on full --save" in place.refused("tools/coresets.py", 2)
    place.must("05", "--train-on", "full", "--save")
    assert place.must("05", "--train-on", "full", "--save").count("fresh") == 2
    place.must("tools/coresets.py", 2)
    net, folder = common.MiniC3D(2).eval(), place.work / "demo/05_networks/minic3d__demo"
    net.load_state_dict(load_file(folder / "network.safetensors"))
    chosen = {kind: {} for kind in RULES}
    for label in CLASSES:
        names = names_in(folder / f"features/{label}.csv")
        features = np.load(folder / f"features/{label}.npy")
        clips = torch.from_numpy(np.load(place.work / f"demo/01_clips/train/{label}.npy")[:, 0])
        with torch.inference_mode():
            expected = net.blocks(stage.network_input(clips, "none")).flatten(1).numpy()
        assert features.shape == (5, 512) and np.allclose(features, expected, atol=1e-5)
        assert names == names_in(place.work / f"demo/01_clips/train/{label}.csv")
        for kind, rule in RULES.items():
            chosen[kind][label] = [names[i] for i in rule(features.astype(float).tolist(), 2)]
    for kind in RULES:
        place.must("05", "--train-on", kind)
        repeats, result = outcome(place, kind)
        assert [r["clips"] for r in repeats] == [chosen[kind]] * 2
        assert repeats[0]["loss"] != repeats[1]["loss"]
        assert "network of the features: epochs 2, not 60" in result["deviations"]
    assert "too few clips" in place.refused("tools/coresets.py", 6)
    assert "Walk.csv: too few clips" in place.refused("05", "--train-on", "random", "--limit", 1)


# --- soft labels ------------------------------------------------------------------------------------------


def softmax(values):
    weights = [math.exp(v - max(values)) for v in values]
    return [w / math.fsum(weights) for w in weights]


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 3.0), (0.5, 3.0), (1.0, 1.0), (0.3, 7.0)])
def test_soft_label_loss_is_eq_11_in_loops(alpha, tau):
    student, teacher = 4 * torch.randn(2, 5, 7, generator=contract.generator(0, "loss"), dtype=torch.float64)
    labels, losses = torch.tensor([0, 6, 3, 3, 1]), []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p_t, p_s = (softmax([v / tau for v in values]) for values in (t, s))
        divergence = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p_t, p_s, strict=True))
        losses.append((1 - alpha) * -math.log(softmax(s)[y]) + alpha * tau**2 * divergence)
    ours = stage.soft_label_loss(student, labels, teacher, alpha, tau).item()
    assert ours == pytest.approx(math.fsum(losses) / 5, rel=1e-12)
    extreme = torch.tensor([[200.0, -200.0], [0.0, 0.0]], requires_grad=True)
    stage.soft_label_loss(extreme, torch.tensor([0, 1]), -extreme.detach(), alpha, tau).backward()
    assert extreme.grad.isfinite().all()


def test_soft_labels_of_a_distilled_set(place, videomae, tmp_path):
    soft = ("--labels", "soft", "--dtype", "float32")
    teacher = shutil.copytree(videomae, tmp_path / "teacher")
    assert "tools/soft_labels.py demo 2" in place.refused("05", *soft)
    place.must(LABELS, 2, "--teacher", teacher)
    folder, network = place.work / "demo/05_labels/ipc2/gvd", vm.load(teacher, CPU)
    for label in CLASSES:
        names, videos = names_in(folder / f"{label}.csv"), place.work / "demo/04_distilled/ipc2/gvd"
        clips = media.network_clips(videos, (names, None), media.DATASETS["demo"])
        logits = vm.run(*network, clips)[1][:, [2, 0]]  # walk, Wave
        assert (np.load(folder / f"{label}.npy") == logits.numpy()).all()
        assert names == [f"{label}/0.mp4", f"{label}/1.mp4"]
    assert names_in(folder / "classes.csv") == ["Walk", "Wave"]

    # Without weight the teacher changes nothing, with it it does; the result says what deviates.
    place.must("05", *soft[2:], "--name", "hard")
    place.must("05", *soft, "--name", "none", "--alpha", 0)
    place.must("05", *soft, "--name", "all", "--alpha", 1, "--tau", 1)
    none, all_soft = (outcome(place, name, "minic3d__soft__demo") for name in ("none", "all"))
    hard, _ = outcome(place, "hard")
    assert none[0] == hard and "alpha 0.0, not 0.5" in none[1]["deviations"]
    assert all(a["loss"] != b["loss"] for a, b in zip(hard, all_soft[0], strict=True))
    assert [all_soft[1][key] for key in ("labels", "teacher", "alpha", "tau")] == ["soft", "teacher", 1, 1]

    # The teacher is not needed again, unless the videos are others.
    shutil.rmtree(teacher)
    assert "fresh" in place.must(LABELS, 2, "--teacher", teacher)
    place.must("04", "--seed", 1)
    text = place.refused("05", *soft)
    assert "has the logits of other videos" in text and "tools/soft_labels.py demo 2" in text
    assert f"{teacher} is missing" in place.refused(LABELS, 2, "--teacher", teacher)
    assert (folder / "Walk.npy").exists()


def test_soft_labels_of_real_clips_follow_the_repeat(place, videomae, monkeypatch):
    place.must(LABELS, 2, "--teacher", videomae, "--train-on", "random")
    seen, train = [], stage.train
    monkeypatch.setattr(stage, "train", lambda *args: seen.append(args[:3]) or train(*args))
    place.must("05", "--labels", "soft", "--train-on", "random")
    repeats, _ = outcome(place, "random", "minic3d__soft__demo")
    assert repeats[0]["clips"] != repeats[1]["clips"]
    for clips, labels, teacher in seen:
        wanted = vm.run(*vm.load(videomae, CPU), clips.numpy())[1][:, [2, 0]]
        assert torch.allclose(teacher, wanted, atol=1e-6) and labels.tolist() == [0, 0, 1, 1]


# --- VideoMAE ---------------------------------------------------------------------------------------------


def test_biases_of_published_checkpoints_are_used(videomae):
    """The files name them q_bias and v_bias. One layer's attention in float64 from the file's own tensors."""
    weights, path = load_file(videomae / "model.safetensors"), "videomae.encoder.layer.1.attention."
    w = {name.removeprefix(path): value.double() for name, value in weights.items()}
    x = torch.randn(2, 5, 16, generator=contract.generator(0, "x"))
    q = x.double() @ w["attention.query.weight"].T + w["attention.q_bias"]
    k = x.double() @ w["attention.key.weight"].T
    v = x.double() @ w["attention.value.weight"].T + w["attention.v_bias"]
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))  # two heads
    y = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    network, scale = vm.load(videomae, CPU)
    with torch.inference_mode():
        ours = network.videomae.encoder.layer[1].attention(x).double()
    assert torch.allclose(ours, y @ w["output.dense.weight"].T + w["output.dense.bias"], atol=1e-5)
    assert scale == (24, common.IMAGENET_MEAN, common.IMAGENET_STD) and w["attention.q_bias"].abs().min() > 0


def test_library_that_drops_the_biases_is_refused(videomae):
    """With the library's table of names emptied, as in transformers 5.5 to 5.17."""
    import transformers.conversion_mapping as table

    names = table.get_checkpoint_conversion_mapping("videomae")
    table.register_checkpoint_conversion_mapping("videomae", [], overwrite=True)
    try:
        with pytest.raises(contract.ContractError, match="8 faults.*query.bias"):
            vm.load(videomae, CPU)
    finally:
        table.register_checkpoint_conversion_mapping("videomae", names, overwrite=True)


V_BIAS, LAST = "videomae.encoder.layer.0.attention.attention.v_bias", "classifier.bias"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda weights, _: weights.pop(LAST), "missing classifier.bias"),
        (lambda weights, _: weights.pop(V_BIAS), "missing .*value.bias"),
        (lambda weights, _: weights.update(head=torch.zeros(2)), "unexpected head"),
        (lambda weights, _: weights.update({LAST: torch.zeros(5)}), "mismatched .*classifier.bias"),
        (lambda _, stated: stated.update(rescale_factor=1 / 127.5), "unexpected input format"),
    ],
)
def test_what_does_not_fit_is_refused(videomae, tmp_path, change, fault):
    folder = shutil.copytree(videomae, tmp_path / "videomae")
    file, processor = folder / "model.safetensors", folder / "preprocessor_config.json"
    weights, stated, before = load_file(file), contract.read(processor), vm.model_hash(folder)
    change(weights, stated)
    save_file(weights, file, metadata={"format": "pt"})
    contract.save(processor, stated)
    with pytest.raises(contract.ContractError, match=fault):
        vm.load(folder, CPU)
    assert vm.model_hash(folder) != before
    shutil.copytree(videomae, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text("beside the weights")
    assert vm.model_hash(folder) == before
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(contract.ContractError, match="cannot be loaded"):
        vm.load(folder, CPU)


@pytest.mark.parametrize(
    ("dataset", "teacher", "message"),
    [
        ("hmdb51", None, "hmdb51/05_networks/videomae is missing(.|\n)*tools/train_teacher.py hmdb51"),
        ("demo", "no/such/folder", "no/such/folder is missing"),
        ("demo", "some/model", "hf download some/model --local-dir FOLDER"),
    ],
)
def test_missing_videomae_says_what_to_get(tmp_path, monkeypatch, dataset, teacher, message):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(contract.Missing, match=message):
        vm.model_folder(Namespace(dataset=dataset, teacher=teacher, work_dir=tmp_path, dry_run=False))


def test_videomae_input():
    x, (mean, std) = random_clips(2, 48), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    exact = ((x.numpy().astype(np.float64) / 255 - mean) / std).transpose(0, 1, 4, 2, 3)  # at its own size
    assert np.allclose(vm.to_input(x, (48, mean, std)).numpy(), exact, atol=1e-5)
    # To twice the size, bilinear with half-pixel centres: each new pixel is 3/4 of one, 1/4 of its neighbour.
    ramp = torch.arange(48, dtype=torch.uint8).view(1, 1, 48, 1, 1).expand(1, 16, 48, 48, 3)
    ours = vm.to_input(ramp, (96, (0.0,) * 3, (1 / 255,) * 3))
    assert torch.allclose(ours[0, 3, 1, :, 7], ((torch.arange(96) + 0.5) / 2 - 0.5).clamp(0, 47), atol=1e-3)
    # To half the size, antialiased: the average of a fine pattern, not a sample of it.
    half = vm.to_input(255 * (ramp % 2), (24, (0.0,) * 3, (1.0,) * 3))
    assert (half[..., 2:-2, :] - 0.5).abs().max() < 0.01


def test_features_are_what_the_classifier_sees(videomae):
    (network, scale), x = vm.load(videomae, CPU), random_clips(vm.BATCH + 3, 48)
    features, logits = vm.run(network, scale, x.numpy())
    assert features.shape == (len(x), 16) and logits.shape == (len(x), 4) and logits.std(0).min() > 1e-3
    with torch.inference_mode():
        assert torch.allclose(network.classifier(features), logits, atol=1e-5)
        hidden = network(vm.to_input(x[-2:], scale), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(network.fc_norm(hidden.mean(1)), features[-2:], atol=1e-5)
    assert not network.classifier._forward_pre_hooks


def test_outputs_are_matched_by_name():
    def columns(outputs, classes):
        config = Namespace(id2label=dict(enumerate(outputs)))
        return vm.output_columns(Namespace(config=config), classes, "model")

    assert columns(["Wave", "Sit", "walk"], ["Walk", "Wave"]) == [2, 0]
    for outputs in (["Walk"], ["Walk", "Punch", "punch"]):
        with pytest.raises(contract.ContractError, match="no output, or several.* 1 of 2 classes: Punch"):
            columns(outputs, ["Walk", "Punch"])
    ucf101, miniucf = (media.DATASETS[name]["classes"] for name in ("ucf101", "miniucf"))
    outputs = [c.replace("HandstandPushups", "HandStandPushups") for c in ucf101]
    assert columns(outputs, ucf101) == list(range(101))
    assert [ucf101[i] for i in columns(outputs, miniucf)] == miniucf


@pytest.mark.parametrize("num_classes", [2, 3])
def test_classifier_is_the_minimum_of_the_regression(num_classes):
    from sklearn.linear_model import LogisticRegression

    labels = torch.arange(60) % num_classes
    x = torch.randn(60, 5, generator=contract.generator(num_classes, "x")) + 0.7 * F.one_hot(labels, 5)
    x = 100 + x * torch.tensor([1.0, 1e-3, 10.0, 1.0, 0.0])  # of any scale and place, one feature constant
    weight, bias = fitting.fit_classifier(x, labels, num_classes)
    z = (x.double() - x.double().mean(0)) / x.double().std(0).clamp(min=1e-6)
    # Two classes in the library are one logit: half of it each, so twice the penalty of the two rows.
    strength = 1 / (60 * fitting.PENALTY) * (2 if num_classes == 2 else 1)
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10000).fit(z.numpy(), labels.numpy())
    ours = (x.double() @ weight.T + bias).softmax(1).numpy()
    assert np.allclose(ours, reference.predict_proba(z.numpy()), atol=1e-4)


def test_fitted_videomae(place, videomae, monkeypatch):
    """The classifier alone changes; with --whole all weights do, also when the training is interrupted."""
    words, networks = ("tools/train_teacher.py", "--backbone", videomae), place.work / "demo/05_networks"
    text = place.must(*words)
    assert "% of 10 training clips correct" in text and "% of 4 test clips correct" in text
    assert "fresh" in place.must(*words)
    (before, _), (network, _) = vm.load(videomae, CPU), vm.load(networks / "videomae", CPU)
    assert network.config.id2label == {0: "Walk", 1: "Wave"} and network.classifier.weight.shape == (2, 16)
    pairs = zip(before.videomae.parameters(), network.videomae.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    whole = (*words, "--whole", "--epochs", 3, "--name")
    place.must(*whole, "whole")
    go_on = stop_at(monkeypatch, "teacher", 2)
    with pytest.raises(KeyboardInterrupt):
        place.run(*whole, "stopped")
    go_on()
    assert (networks / "stopped/.checkpoint.pt").exists() and not (networks / "stopped/config.json").exists()
    place.must(*whole, "stopped")
    weights = [(networks / n / "model.safetensors").read_bytes() for n in ("whole", "stopped", "videomae")]
    assert weights[0] == weights[1] != weights[2] and not (networks / "stopped/.checkpoint.pt").exists()
