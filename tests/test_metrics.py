"""VideoMAE, the soft-label loss and tools/metrics.py against exact references; demo/train_teacher.py killed."""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, load_stage
from safetensors.torch import load_file, save_file

import common
import contract


def load(path):
    """The module of a script, under a name of its own: demo/ and tools/ both have a train_teacher.py."""
    name = path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPO / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if (REPO / "tools").is_dir():
    metrics, fitting = load("tools/metrics.py"), load("tools/train_teacher.py")
needs_tools = pytest.mark.skipif(not (REPO / "tools").is_dir(), reason="tools/ is not here")
needs_demo = pytest.mark.skipif(not (REPO / "demo").is_dir(), reason="the demo world is not here")

CPU = torch.device("cpu")
PROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}
LABELS = ("Wave", "Sit", "walk", "Kick")  # another order and spelling than the data set's


@pytest.fixture(scope="session")
def videomae(tmp_path_factory):
    """A VideoMAE in the published layout with random weights, biases included: 24 px, 4 outputs."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    folder = tmp_path_factory.mktemp("videomae")
    config = VideoMAEConfig(
        image_size=24, patch_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    network = VideoMAEForVideoClassification(config)
    generator = contract.generator(0, "videomae")
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def copied(videomae, tmp_path):
    return shutil.copytree(videomae, tmp_path / "videomae")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def clips(count, side=48):
    return torch.randint(256, (count, 16, side, side, 3), generator=contract.generator(count, "clips"), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# VideoMAE
# ---------------------------------------------------------------------------------------------------------------------


def attention_by_hand(weights, x, layer, heads=2):
    """One layer's attention in float64 from the file's own tensors: q and v have biases, k has none."""
    path = f"videomae.encoder.layer.{layer}.attention."
    w = {name: value.double() for name, value in weights.items()}
    q = x @ w[path + "attention.query.weight"].T + w[path + "attention.q_bias"]
    k = x @ w[path + "attention.key.weight"].T
    v = x @ w[path + "attention.value.weight"].T + w[path + "attention.v_bias"]
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ w[path + "output.dense.weight"].T + w[path + "output.dense.bias"]


def test_biases_of_published_checkpoints_are_used(videomae):
    """The files name them q_bias and v_bias; versions of the library that do not know these names drop them."""
    weights = load_file(videomae / "model.safetensors")
    assert weights["videomae.encoder.layer.1.attention.attention.q_bias"].abs().min() > 0
    network, scale = common.load_videomae(videomae, CPU)
    assert scale == (24, tuple(PROCESSOR["image_mean"]), tuple(PROCESSOR["image_std"]))
    x = torch.randn(2, 5, 16, generator=contract.generator(0, "x"))
    with torch.inference_mode():
        ours = network.videomae.encoder.layer[1].attention(x)
    assert torch.allclose(ours.double(), attention_by_hand(weights, x.double(), 1), atol=1e-5)


def test_library_that_drops_the_biases_is_refused(videomae):
    """In a process of its own, with the library's table of names emptied as it was in the bad versions."""
    program = (
        "import sys; import transformers.conversion_mapping as m\n"
        "m.register_checkpoint_conversion_mapping('videomae', [], overwrite=True)\n"
        "import common, torch; from contract import run\n"
        "run(lambda: common.load_videomae(sys.argv[1], torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program, videomae], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "8 that do not fit" in done.stderr and "query.bias" in done.stderr and "requirements.txt" in done.stderr


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop("classifier.bias"), "missing classifier.bias"),
        (lambda w: w.update(head=torch.zeros(2)), "unexpected head"),
        (lambda w: w.update({"classifier.bias": torch.zeros(5)}), "mismatched .*classifier.bias"),
        (lambda w: w.pop("videomae.encoder.layer.0.attention.attention.v_bias"), "missing .*value.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied, change, fault):
    change_weights(copied, change)
    with pytest.raises(contract.ContractError, match=fault):
        common.load_videomae(copied, CPU)


def test_damaged_and_incomplete_folders_are_refused(copied):
    (copied / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "rescale_factor": 1 / 127.5}))
    with pytest.raises(contract.ContractError, match="refused the input that it states"):
        common.load_videomae(copied, CPU)
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(contract.ContractError, match="preprocessor_config.json is missing"):
        common.load_videomae(copied, CPU)
    (copied / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(contract.ContractError, match="cannot be loaded"):
        common.load_videomae(copied, CPU)
    weights.unlink()
    with pytest.raises(contract.ContractError, match="cannot be loaded"):
        common.load_videomae(copied, CPU)


@pytest.mark.parametrize(
    ("dataset", "teacher", "message"),
    [
        ("hmdb51", None, "hmdb51/05_networks/videomae is missing(.|\n)*tools/train_teacher.py hmdb51"),
        ("demo", "no/such/folder", "no/such/folder is missing"),
        ("demo", "some/model", "hf download some/model --local-dir FOLDER ; then FOLDER instead"),
    ],
)
def test_missing_videomae_says_what_to_get(tmp_path, monkeypatch, dataset, teacher, message):
    import argparse

    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(contract.Missing, match=message):
        common.videomae_folder(argparse.Namespace(dataset=dataset, teacher=teacher, work_dir=tmp_path))


def test_hash_is_of_what_is_loaded(copied, tmp_path):
    import argparse

    args = argparse.Namespace(work_dir=tmp_path)
    before = common.videomae_hash(copied, args)
    (copied / ".cache").mkdir()
    (copied / "README.md").write_text("downloaded beside the weights")
    assert common.videomae_hash(copied, args) == before
    change_weights(copied, lambda w: w.update({"classifier.bias": torch.ones(4)}))
    assert common.videomae_hash(copied, args) != before


def test_videomae_input():
    scale = (48, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    x = clips(2)
    exact = (x.numpy().astype(np.float64) / 255 - scale[1]) / scale[2]  # no resize at its own size
    ours = common.videomae_input(x, scale)
    assert ours.shape == (2, 16, 3, 48, 48) and ours.dtype == torch.float32
    assert np.allclose(ours.numpy(), exact.transpose(0, 1, 4, 2, 3), atol=1e-5)

    # To twice the size, bilinear with half-pixel centres: each new pixel is 3/4 of one and 1/4 of its neighbour.
    ramp = torch.arange(48, dtype=torch.uint8).view(1, 1, 48, 1, 1).expand(1, 16, 48, 48, 3).contiguous()
    ours = common.videomae_input(ramp, (96, (0.0,) * 3, (1 / 255,) * 3))
    expected = ((torch.arange(96) + 0.5) / 2 - 0.5).clamp(0, 47)
    assert torch.allclose(ours[0, 3, 1, :, 7], expected, atol=1e-3)
    # To half the size, antialiased: the average of a fine pattern, not a sample of it.
    stripes = 255 * (torch.arange(48, dtype=torch.uint8) % 2).view(1, 1, 48, 1, 1).expand(1, 16, 48, 48, 3).contiguous()
    half = common.videomae_input(stripes, (24, (0.0,) * 3, (1.0,) * 3))
    assert (half[..., 2:-2, :] - 0.5).abs().max() < 0.01


def test_features_are_what_the_classifier_sees(videomae):
    network, scale = common.load_videomae(videomae, CPU)
    x = clips(common.VIDEOMAE_BATCH + 3)
    features, logits = common.run_videomae(network, scale, x.numpy())
    assert features.shape == (len(x), 16) and logits.shape == (len(x), 4)
    with torch.inference_mode():
        assert torch.allclose(network.classifier(features), logits, atol=1e-5)
        hidden = network(common.videomae_input(x[-2:], scale), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(network.fc_norm(hidden.mean(1)), features[-2:], atol=1e-5)
    assert logits.std(0).min() > 1e-3 and not network.classifier._forward_pre_hooks


def test_outputs_are_matched_by_name(videomae):
    network, _ = common.load_videomae(videomae, CPU)
    assert common.output_columns(network, ["Walk", "Wave"], "x") == [2, 0]
    with pytest.raises(contract.ContractError, match="x: no output.* 1 of 2 classes, such as Punch"):
        common.output_columns(network, ["Walk", "Punch"], "x")
    network.config.id2label = {0: "Walk", 1: "walk"}
    with pytest.raises(contract.ContractError, match="more than one"):
        common.output_columns(network, ["Walk"], "x")
    network.config.id2label = dict(enumerate(c.replace("HandstandPushups", "HandStandPushups") for c in common.UCF101_CLASSES))
    columns = common.output_columns(network, common.MINIUCF_CLASSES, "x")
    assert [common.UCF101_CLASSES[i] for i in columns] == list(common.MINIUCF_CLASSES)
    assert common.output_columns(network, common.UCF101_CLASSES, "x") == list(range(101))


# ---------------------------------------------------------------------------------------------------------------------
# Soft labels
# ---------------------------------------------------------------------------------------------------------------------


def softmax(values):
    weights = [math.exp(v - max(values)) for v in values]
    return [w / math.fsum(weights) for w in weights]


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 3.0), (0.5, 3.0), (1.0, 1.0), (0.3, 7.0)])
def test_soft_label_loss_is_eq_11(alpha, tau):
    generator = contract.generator(0, "loss")
    student, teacher = 4 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 1])
    losses = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        hard = -math.log(softmax(s)[y])
        p_t, p_s = (softmax([v / tau for v in values]) for values in (t, s))
        soft = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p_t, p_s, strict=True))
        losses.append((1 - alpha) * hard + alpha * tau**2 * soft)
    exact = math.fsum(losses) / len(losses)
    assert common.soft_label_loss(student, labels, teacher, alpha, tau).item() == pytest.approx(exact, rel=1e-12)
    ours = common.soft_label_loss(student.float(), labels, teacher.float(), alpha, tau).item()
    assert ours == pytest.approx(exact, rel=1e-5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: common.soft_label_loss(x, labels, teacher, alpha, tau), (student,))


def test_soft_label_loss_at_its_limits():
    logits = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    assert common.soft_label_loss(logits, labels, logits.detach(), 1.0, 3.0).item() == 0  # the teacher itself
    loss = common.soft_label_loss(logits, labels, -logits.detach(), 0.5, 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def unit(*angles):
    """Points on the unit circle at angles in degrees: two at distance d apart are 2 sin(d / 2)."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def chord(degrees):
    return 2 * math.sin(math.radians(degrees) / 2)


@needs_tools
def test_entropy():
    one_hot = torch.eye(4)
    assert metrics.entropy(one_hot, 2) == pytest.approx(2)  # each class once
    assert metrics.entropy(one_hot, np.e) == pytest.approx(math.log(4))
    assert metrics.entropy(one_hot[:1].repeat(5, 1), 2) == 0  # one class alone
    assert metrics.entropy(one_hot[[0, 0, 0, 1]], 2) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)
    assert metrics.entropy(torch.full((3, 50), 0.02), 2) == pytest.approx(math.log2(50), rel=1e-6)


@needs_tools
def test_nearest_against_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    a, b = torch.randn(2, 20, 5, generator=contract.generator(0, "points"), dtype=torch.float64)
    brute = (a[:, None] - b[None]).square().sum(-1).sqrt()
    assert torch.allclose(metrics.nearest(a, b), brute.amin(1), rtol=1e-12)
    own = (a[:, None] - a[None]).square().sum(-1).sqrt()
    assert metrics.mean_pairwise_distance(a) == pytest.approx((own.sum() / 380).item(), rel=1e-12)
    assert torch.allclose(metrics.nearest(a), own.fill_diagonal_(torch.inf).amin(1), rtol=1e-12)


@needs_tools
def test_coverage_of_hand_made_sets():
    real = unit(0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 90)  # nearest others 1 1 2 3 4 5 6 7 8 9 45 degrees
    assert torch.allclose(metrics.nearest(real), torch.tensor([chord(d) for d in (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 45)]).double())
    # The 90th percentile of eleven values is the tenth: 9 degrees.
    limit = metrics.percentile(metrics.nearest(real))
    assert limit == pytest.approx(chord(9))
    assert metrics.coverage(real, real, limit) == 1  # identical sets
    assert metrics.coverage(real, unit(180), limit) == 0  # disjoint sets
    assert metrics.coverage(real, unit(21), limit) == pytest.approx(3 / 11)  # one point: 15, 21 and 28 degrees
    assert metrics.coverage(real, unit(21, 21, 21), limit) == pytest.approx(3 / 11)  # again and again the same
    assert metrics.coverage(real, unit(21, 88), limit) == pytest.approx(4 / 11)
    # With the other threshold it is 10 of 11 whatever the set, as long as no two are at equal distances.
    for distilled in (unit(21), unit(180), unit(3, 50)):
        assert metrics.coverage(real, distilled) == pytest.approx(10 / 11)
    assert metrics.coverage(real, real) == 1


@needs_tools
def test_mean_pairwise_distance_of_hand_made_sets():
    assert metrics.mean_pairwise_distance(unit(17)) is None  # one point has no pair
    assert metrics.mean_pairwise_distance(unit(17, 17, 17)) == 0
    assert metrics.mean_pairwise_distance(unit(0, 180)) == pytest.approx(2)
    assert metrics.mean_pairwise_distance(unit(0, 90, 180, 270)) == pytest.approx((4 * math.sqrt(2) + 2 * 2) / 6)


@needs_tools
def test_measure_per_class_and_global():
    """Features of any length count by their direction; the outputs by the data set's columns."""
    real = {"A": unit(0, 10, 20), "B": unit(90, 100, 110)}
    limits = {"A": chord(10.1), "B": chord(0), "": chord(10.1)}
    logits = torch.log(torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6]]))
    distilled = {"A": (7 * unit(0, 10), logits), "B": (0.1 * unit(0, 10).float(), logits)}
    found = metrics.measure(real, limits, distilled, columns=[0, 2])
    assert found["coverage_per_class"] == 0.5  # A's three clips are within 10 degrees, none of B's
    assert found["coverage_all"] == 0.5
    assert found["mpd_per_class"] == pytest.approx(chord(10), abs=1e-6)
    assert found["mpd_all"] == pytest.approx(4 * chord(10) / 6, abs=1e-6)
    p = (8 / 9 + 0.25) / 2
    assert found["entropy_bits_classes"] == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), abs=1e-6)
    assert found["entropy_nats_outputs"] == pytest.approx(-sum(q * math.log(q) for q in (0.5, 0.15, 0.35)), abs=1e-6)
    one = metrics.measure(real, limits, {c: (unit(0), logits[:1]) for c in real}, [0, 2])
    assert one["mpd_per_class"] is None and one["mpd_all"] == 0  # IPC 1


@needs_tools
def test_condensation():
    rows = [{"split": "train", "frames": "40"}, {"split": "train", "frames": "60"}, {"split": "test", "frames": "20"}]
    found = metrics.condensation(rows, 5)
    assert found["frames per training clip"] == 50 and found["frames per clip, training and test"] == 40
    assert found["of all frames"] == 0.8 and found["frames of a distilled set"] == 80
    headline = metrics.condensation([{"split": "train", "frames": "807013"}, {"split": "test", "frames": "1"}], 20 * 50)
    assert round(100 * headline["of all frames"], 2) == 1.98  # section 1: MiniUCF at IPC 20


def run_tool(main, *words):
    """Runs a tool in this process: (exit code, what it printed)."""
    out, before = io.StringIO(), sys.argv
    sys.argv = list(map(str, words))
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            contract.run(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv, contract.open_log.path = before, None
    return code, out.getvalue()


def run_metrics(place, *extra):
    shared = ("--work-dir", place.work, "--classes", ",".join(CLASSES))
    return run_tool(metrics.main, "tools/metrics.py", "demo", 2, *shared, *extra)


@needs_tools
def test_metrics_of_the_chain(place, videomae, tmp_path):
    code, text = run_metrics(place, "--teacher", videomae, "--device", "cpu")
    assert code == 0, text
    path = place.work / "demo" / "metrics_ipc2.json"
    first, result = path.read_bytes(), json.loads(path.read_bytes())
    rows = {row["set"]: row for row in result["sets"]}
    assert list(rows) == ["gvd, before composition", "gvd", "random real clips"]
    assert all(row["videos"] == 4 and f"| {row['bytes']:,} |" in text for row in rows.values())
    assert rows["gvd"]["bytes"] == sum(p.stat().st_size for p in (place.work / "demo/04_distilled/ipc2/gvd").glob("*/*.mp4"))
    assert rows["random real clips"]["bytes"] == 4 * 16 * 48 * 48 * 3
    code, text = place.run("05", "--train-on", "random")
    assert code == 0, text
    repeats = sorted((place.work / "demo/05_results/ipc2/random").glob("*/repeat_*.json"))
    assert [contract.read_json(p)["clips"] for p in repeats] == result["random"][: len(repeats)] and len(repeats) == 2

    # A row again, from the files: the set's own videos through the network.
    network, scale = common.load_videomae(videomae, CPU)
    real, found = {}, {}
    for label in CLASSES:
        clips_of_class = np.load(place.work / f"demo/01_clips/train/{label}.npy")[:, 0]
        real[label] = metrics.unit_length(common.run_videomae(network, scale, clips_of_class)[0])
        videos = [common.read_video(place.work / f"demo/04_distilled/ipc2/gvd/{label}/{i}.mp4") for i in range(2)]
        found[label] = common.run_videomae(network, scale, np.stack([common.network_clip(v, "demo") for v in videos]))
    limits = {label: metrics.percentile(metrics.nearest(points)) for label, points in real.items()}
    limits[""] = metrics.percentile(metrics.nearest(torch.cat([*real.values()])))
    assert metrics.measure(real, limits, found, [2, 0]) == pytest.approx(rows["gvd"]["mean"], abs=2e-6)

    assert run_metrics(place, "--teacher", videomae, "--device", "cpu")[0] == 0
    assert path.read_bytes() == first  # the same command, the same bytes
    assert str(tmp_path) not in first.decode() and str(videomae.parent) not in first.decode()

    bare = tmp_path / "bare"  # a folder of <class>/*.mp4 that no stage made
    for label in CLASSES:
        (bare / label).mkdir(parents=True)
        shutil.copy(place.work / f"demo/04_distilled/ipc2/gvd/{label}/1.mp4", bare / label / "a.mp4")
    assert run_metrics(place, "--teacher", videomae, "--sets", bare, "--device", "cpu", "--threshold", "distilled")[0] == 0
    row = json.loads(path.read_bytes())["sets"][0]
    assert (row["set"], row["step"], row["videos"]) == ("bare", "folder", 2) and "mpd_per_class" not in row["mean"]
    assert row["mean"]["coverage_per_class"] == 0.8  # four of five clips of a class, whatever the set


@needs_tools
def test_metrics_refuses_what_it_cannot_measure(place, videomae):
    code, text = run_metrics(place, "--teacher", videomae, "--sets", "other")
    assert code == 3 and "no set other" in text and "04_mvic_compose.py demo 2" in text
    video = place.work / "demo/04_distilled/ipc2/gvd/Walk/0.mp4"
    video.write_bytes(video.read_bytes()[:-1] + b"x")
    code, text = run_metrics(place, "--teacher", videomae, "--device", "cpu")
    assert code == 3 and "Walk/0.mp4 is damaged" in text and not (place.work / "demo/metrics_ipc2.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 05 with soft labels
# ---------------------------------------------------------------------------------------------------------------------

SOFT = ("--labels", "soft", "--device", "cpu", "--threads", 1, "--dtype", "float32")


def outcome(place, name, labels):
    """Losses, accuracies and the summary of a set's result."""
    folder = place.work / f"demo/05_results/ipc2/{name}/minic3d__{labels}__demo"
    return [contract.read_json(folder / f"repeat_{r}.json") for r in range(2)], contract.read_json(folder / "result.json")


def test_soft_labels_of_a_distilled_set(place, copied):
    code, text = place.run("05", *SOFT, "--teacher", copied)
    assert code == 0, text
    folder = place.work / "demo/05_labels/ipc2/gvd__videomae"
    network, scale = common.load_videomae(copied, CPU)
    for label in CLASSES:
        names = [row["name"] for row in common.read_csv(folder / f"{label}.csv")]
        assert names == [f"{label}/0.mp4", f"{label}/1.mp4"]
        clips_of_class = common.network_clips(place.work / "demo/04_distilled/ipc2/gvd", names, "demo")
        logits = common.run_videomae(network, scale, clips_of_class)[1][:, [2, 0]]  # walk, Wave
        assert (np.load(folder / f"{label}.npy") == logits.numpy()).all()
    assert [row["name"] for row in common.read_csv(folder / "classes.csv")] == ["Walk", "Wave"]
    repeats, result = outcome(place, "gvd", "soft")
    assert [result[k] for k in ("labels", "teacher", "alpha", "tau")] == ["soft", "videomae", 0.5, 3.0]
    assert not any("alpha" in text or "tau" in text for text in result["deviations"])

    # Without the teacher: the same bytes from the logits; refused for other videos than theirs.
    before = place.files()
    shutil.rmtree(copied)
    assert "05 fresh" in place.run("05", *SOFT, "--teacher", copied)[1]
    shutil.rmtree(place.work / "demo/05_results/ipc2/gvd/minic3d__soft__demo")
    assert place.run("05", *SOFT, "--teacher", copied)[0] == 0
    assert place.files() == before
    assert place.run("04", "--seed", 1)[0] == 0
    code, text = place.run("05", *SOFT, "--teacher", copied)
    assert code == 3 and "logits of other videos" in text and "videomae is missing" in text


def test_soft_labels_change_the_loss_alone(place, videomae):
    """Without weight the teacher changes nothing; with it, it does, and the result says what deviates."""
    assert place.run("05", "--name", "hard", *SOFT[2:])[0] == 0
    assert place.run("05", "--name", "none", *SOFT, "--teacher", videomae, "--alpha", 0)[0] == 0
    assert place.run("05", "--name", "all", *SOFT, "--teacher", videomae, "--alpha", 1, "--tau", 1)[0] == 0
    (hard, _), (none, result), (soft, _) = (
        outcome(place, n, k) for n, k in (("hard", "hard"), ("none", "soft"), ("all", "soft"))
    )
    assert none == hard and "alpha 0.0, not 0.5" in result["deviations"]
    assert all(a["loss"] != b["loss"] for a, b in zip(hard, soft, strict=True))


def test_soft_labels_of_real_clips_follow_the_repeat(place, videomae):
    code, text = place.run("05", *SOFT, "--teacher", videomae, "--train-on", "random")
    assert code == 0, text
    stage, folder = load_stage("05"), place.work / f"demo/05_labels/full/real__{videomae.name}"
    network, scale = common.load_videomae(videomae, CPU)
    index = {row["name"]: int(row["row"]) for row in common.read_csv(place.work / "demo/01_clips/index.csv")}
    repeats, result = outcome(place, "random", "soft")
    for record in repeats:
        clips_of = {c: (index, np.load(place.work / f"demo/01_clips/train/{c}.npy")) for c in CLASSES}
        args = argparse.Namespace(classes=list(CLASSES))
        found = stage.teacher_logits(args, folder, clips_of, record["clips"], CPU)
        seen, _ = stage.tensors(clips_of, CPU, record["clips"])
        wanted = common.run_videomae(network, scale, seen.numpy())[1][:, [2, 0]]
        assert torch.allclose(found, wanted, atol=1e-6) and len(found) == 4
    assert repeats[0]["clips"] != repeats[1]["clips"] and result["labels"] == "soft"
    code, text = place.run("05", "--table")
    assert code == 0 and "| random, soft labels |" in text and "| gvd |" in text


@pytest.mark.parametrize("extra", [("--alpha", 2), ("--tau", 0), ("--train-on", "full", "--save")])
def test_soft_labels_refuse_nonsense(place, extra):
    assert place.run("05", *SOFT, *extra)[0] == 2
    assert place.run("05", "--alpha", 0.5)[0] == 2


def test_soft_labels_need_a_teacher_of_the_classes(place, copied):
    config = json.loads((copied / "config.json").read_text())
    config["id2label"]["2"] = "Run"
    (copied / "config.json").write_text(json.dumps(config))
    code, text = place.run("05", *SOFT, "--teacher", copied)
    assert code == 3 and "Walk" in text, text
    code, text = place.run("05", *SOFT, "--teacher", copied / "no")
    assert code == 3 and "is missing" in text and "model.safetensors" in text
    assert not (place.work / "demo/05_results/ipc2/gvd/minic3d__soft__demo").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A VideoMAE for a data set without one
# ---------------------------------------------------------------------------------------------------------------------


@needs_tools
@pytest.mark.parametrize("num_classes", [2, 3])
def test_classifier_is_the_regression_s_minimum(num_classes):
    from sklearn.linear_model import LogisticRegression

    generator = contract.generator(num_classes, "regression")
    labels = torch.arange(60) % num_classes
    x = torch.randn(60, 5, generator=generator) + 0.7 * torch.nn.functional.one_hot(labels, 5)
    x = 100 + x * torch.tensor([1.0, 1e-3, 10.0, 1.0, 0.0])  # of any scale and place, one feature constant
    weight, bias = fitting.fit_classifier(x, labels, num_classes)
    z = (x.double() - x.double().mean(0)) / x.double().std(0).clamp(min=1e-6)
    # Two classes in the library are one logit: half of it each, so twice the penalty of the two rows.
    strength = 1 / (60 * fitting.PENALTY) * (2 if num_classes == 2 else 1)
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10000).fit(z.numpy(), labels.numpy())
    ours = (x.double() @ weight.T + bias).softmax(1).numpy()
    assert np.allclose(ours, reference.predict_proba(z.numpy()), atol=1e-4)


@needs_tools
def test_fitted_videomae(place, videomae, tmp_path, monkeypatch):
    words = ["tools/train_teacher.py", "demo", "--work-dir", place.work, "--data-root", place.data, "--device", "cpu"]
    words += ["--classes", ",".join(CLASSES), "--backbone", videomae]
    nowhere = [*words[:-1], tmp_path / "nowhere"]
    code, text = run_tool(fitting.main, *nowhere, "--dry-run")
    assert code == 0 and text.startswith("train its input is not there yet: 0 of 3 files of the teacher"), text
    assert run_tool(fitting.main, *nowhere)[0] == 3
    code, text = run_tool(fitting.main, *words)
    assert code == 0 and "% of 10 training clips right" in text and "% of 4 test clips right" in text, text
    folder = place.work / "demo/05_networks/videomae"
    before, after = load_file(videomae / "model.safetensors"), load_file(folder / "model.safetensors")
    backbone, _ = common.load_videomae(videomae, CPU)
    network, scale = common.load_videomae(folder, CPU)
    assert network.config.id2label == {0: "Walk", 1: "Wave"} and after["classifier.weight"].shape == (2, 16)
    same = [torch.equal(a, b) for a, b in zip(backbone.videomae.parameters(), network.videomae.parameters(), strict=True)]
    assert all(same) and len(before) == len(after)
    code, text = run_tool(fitting.main, *words)
    assert code == 0 and "fresh" in text

    whole = [*words, "--whole", "--epochs", 3]
    assert run_tool(fitting.main, *whole, "--name", "whole")[0] == 0
    draw = contract.generator

    def failing(seed, *names):
        if names == ("teacher", 2):
            raise KeyboardInterrupt
        return draw(seed, *names)

    monkeypatch.setattr(contract, "generator", failing)
    assert run_tool(fitting.main, *whole, "--name", "stopped")[0] == 130
    stopped = place.work / "demo/05_networks/stopped"
    assert (stopped / ".checkpoint.pt").exists() and not (stopped / "model.safetensors").exists()
    monkeypatch.setattr(contract, "generator", draw)
    assert run_tool(fitting.main, *whole, "--name", "stopped")[0] == 0 and not (stopped / ".checkpoint.pt").exists()
    weights = (stopped / "model.safetensors").read_bytes()
    assert weights == (stopped.with_name("whole") / "model.safetensors").read_bytes()
    assert weights != (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The demo's VideoMAE
# ---------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
sys.path.insert(0, "demo")
import train_teacher as tt
tt.SHAPE.update(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
tt.BATCH, tt.CHECKPOINT_EVERY = 2, 2
draw = tt.step_generator
def step_generator(step):
    if str(step) == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(step)
tt.step_generator = step_generator
sys.argv[1:1] = ["--threads", "1"]
tt.main()
"""


def train_teacher(empty, folder, steps=5, **environment):
    paths = ["--data-root", empty.data, "--work", folder / "checkpoints", "--out", folder / "videomae", "--steps", steps]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@needs_demo
def test_killed_training_of_the_teacher_ends_with_the_same_weights(empty, tmp_path):
    whole = train_teacher(empty, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert train_teacher(empty, tmp_path / "killed", KILL_AT="3").returncode == -9
    assert (tmp_path / "killed/checkpoints/videomae.pt").exists() and not (tmp_path / "killed/videomae").exists()
    last = train_teacher(empty, tmp_path / "killed")
    assert last.returncode == 0 and last.stdout == whole.stdout and "of 4 test clips right" in last.stdout
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "whole/videomae" / file).read_bytes() == (tmp_path / "killed/videomae" / file).read_bytes(), file
    config = json.loads((tmp_path / "whole/videomae/config.json").read_text())
    assert config["id2label"] == {"0": "Walk", "1": "Wave"} and config["dtype"] == "float16"


@needs_demo
def test_checkpoint_of_other_settings_is_refused(tmp_path):
    tt = load("demo/train_teacher.py")
    torch.save({"settings": {"steps": 5}}, tmp_path / "videomae.pt")
    with pytest.raises(SystemExit, match="videomae.pt: expected a checkpoint of {'steps': 6.* found one of {'steps': 5}"):
        tt.train([], ["Walk", "Wave"], tmp_path / "videomae.pt", CPU, 6)


@needs_demo
def test_frames_and_colours_drawn_in_training():
    tt = load("demo/train_teacher.py")
    for count in (3, 16, 40, 120):
        for i in range(50):
            frames = tt.draw_frames(count, contract.generator(i, "frames"))
            assert frames.shape == (16,) and frames.min() >= 0 and frames.max() < count and (np.diff(frames) >= 0).all()
            assert frames[-1] - frames[0] >= math.floor(tt.LEAST_LENGTH * count * 15 / 16) - 1
    x = torch.full((3, 16, 3, 48, 48), 0.5)
    x[:, 4:8, 1] = 0.9
    y = tt.change_colours(x, contract.generator(0, "colours"))
    flat = y.flatten(3)
    assert y.shape == x.shape and torch.equal(flat.amin(-1), flat.amax(-1))  # the same for all pixels of a frame
    moved = (flat[:, 4, :, 0] - flat[:, 0, :, 0]).abs() > 0.1
    assert (moved.sum(1) == 1).all() and torch.equal(y[:, 0], y[:, 15])  # one colour, another one per clip, all frames alike
