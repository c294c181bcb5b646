"""Fine-tuning (eq. 3) against the formula, the optimizer by hand, and the folder that stage 03 takes."""

import contract

import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, load
from diffusers import DDIMScheduler

import common
import media

TOOL, WEIGHTS, CPU = "tools/finetune_unet.py", "diffusion_pytorch_model.safetensors", torch.device("cpu")
TINY = ("--steps", 6, "--batch", 4, "--dtype", "float32")
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
tool = load(TOOL)


def unet_of(folder):
    return common.load_part(folder, "unet", CPU, torch.float32)


@pytest.fixture(scope="module")
def tuned(sampled, tmp_path_factory):
    """The chain to stage 04 with a fine-tuned U-Net beside it; not to be changed."""
    place = sampled.copy(tmp_path_factory.mktemp("tuned") / "work")
    code, text = place.run(TOOL, *TINY)
    assert code == 0 and "finetune_unet on cpu, torch.float32: 10 clips, " in text, text
    return place


def test_first_loss_is_eq_3(tuned):
    """Computed again from the formula, with the library's own forward."""
    chosen, dropped, t, noise = tool.draw(0, 10, (4, 16, 8, 8), 1000, Namespace(seed=0, batch=4))
    x0 = np.concatenate([np.load(tuned.work / f"demo/01_latents/{c}.npy") for c in CLASSES])[chosen.numpy()]
    x0 = torch.from_numpy(x0).float().transpose(1, 2)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(-1, 1, 1, 1, 1)
    z, prompts = abar.sqrt() * x0 + (1 - abar).sqrt() * noise, contract.read(REPO / "prompts/demo.json")
    texts = ["" if drop else prompts[CLASSES[i >= 5]] for i, drop in zip(chosen, dropped, strict=True)]
    with torch.no_grad():
        states = torch.cat([common.embed(tuned.model, {"": text}, CPU)[text] for text in texts])
        predicted = unet_of(tuned.model / "unet")(z, t, states).sample
    rows = contract.read(tuned.work / "demo/03_unet/default/loss.csv")
    assert float(rows[0]["loss"]) == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert float(rows[0]["lr"]) == pytest.approx(2e-4 / 50)


def test_what_a_step_draws():
    args, shape = Namespace(seed=0, batch=8), (4, 16, 2, 2)
    a, b, *others = (tool.draw(step, 100, shape, 1000, args) for step in (7, 7, 8))
    others.append(tool.draw(7, 100, shape, 1000, Namespace(seed=1, batch=8)))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(a[i], other[i]) for other in others for i in (2, 3))
    draws = [tool.draw(step, 100, (1,), 1000, args) for step in range(1000)]
    chosen, dropped, t, _ = zip(*draws, strict=True)
    assert (torch.stack(t) // 125 == torch.arange(8)).all()
    assert abs(torch.cat(dropped).float().mean() - 0.1) < 0.015  # 4.5 standard deviations
    counts = torch.cat(chosen).bincount(minlength=100)
    assert len(counts) == 100 and counts.min() > 30


class Line(torch.nn.Module):
    """A network whose gradient is known: 30 * a * z + b; `idle` gets none, so only the decay moves it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = (torch.nn.Parameter(torch.ones(n)) for n in ((1, 1), (1,), (2, 2)))

    def forward(self, z, t, states):
        return Namespace(sample=30 * self.a * z + self.b + 0 * self.idle.sum())


def test_optimizer_and_average_by_hand(tmp_path):
    """AdamW with decay of matrices alone, clipping, warm-up and the average, in plain numbers."""
    args = Namespace(seed=0, batch=4, steps=8, lr=5.0, micro_batch=4, checkpoint=100)
    arrays, network, scheduler = (
        [np.random.randn(6, 16, 4, 1, 1).astype("f2")],
        Line(),
        DDIMScheduler(**BETAS),
    )
    data = torch.from_numpy(arrays[0]).float().transpose(1, 2)
    given = (dict(network.named_parameters()), scheduler, arrays, torch.zeros(2, 1, 1), args, CPU)
    average, losses = tool.train(network, *given, torch.float32, tmp_path / ".checkpoint.pt")
    w, mean, m, v, norms = np.ones(3), np.ones(3), np.zeros(2), np.zeros(2), []
    for k in range(8):
        chosen, _, t, noise = tool.draw(k, 6, (4, 16, 1, 1), 1000, args)
        z, noise = scheduler.add_noise(data[chosen], noise, t).double().numpy(), noise.double().numpy()
        error, lr = 30 * w[0] * z + w[1] - noise, 5.0 * (k + 1) / 50
        assert losses[k] == pytest.approx(np.square(error).mean(), rel=1e-4)
        g = np.array([(2 * error * 30 * z).mean(), (2 * error).mean()])
        norms.append(np.linalg.norm(g))
        g *= min(1, 1 / norms[-1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w *= 1 - lr * np.array([0.01, 0, 0.01])
        w[:2] -= lr * m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
        mean += (1 - min(0.999, (k + 1) / (k + 10))) * (w - mean)
    ours = [average[name].flatten()[0].item() for name in ("a", "b", "idle")]
    assert ours == pytest.approx(mean, rel=1e-4) and min(norms) > 1 and max(norms) > 2 * min(norms)


def test_the_average_is_what_is_written(sampled, tmp_path, monkeypatch):
    place, train, kept = sampled.copy(tmp_path / "work"), tool.train, []

    def keep(network, weights, *given):
        average, losses = train(network, weights, *given)
        kept.extend([average, {name: p.detach().clone() for name, p in weights.items()}])
        return average, losses

    monkeypatch.setattr(tool, "train", keep)
    assert place.run(TOOL, *TINY, "--lr", 0.01)[0] == 0
    written = unet_of(place.work / "demo/03_unet/default").state_dict()
    for name, value in kept[0].items():
        assert torch.equal(written[name], value.half().float()), name
    assert any(not torch.equal(written[name], value.half().float()) for name, value in kept[1].items())


def gradients(network, part=4):
    generator, t = torch.Generator().manual_seed(0), torch.tensor([1, 250, 600, 999])
    x0, noise = torch.randn(2, 4, 4, 16, 8, 8, generator=generator)
    states = torch.randn(4, 12, 8, generator=generator)
    loss = tool.backward(network, DDIMScheduler(**BETAS), x0, noise, t, states, part, CPU, torch.float32)
    return loss, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance):
    assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert (gradient - b[1][name]).norm() <= tolerance * (gradient.norm() + 1e-6), name


def test_forms_for_the_cpu_micro_batches_and_checkpointed_layers_change_no_gradient(empty):
    def kept(network):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            return gradients(network), sum(sizes)

    fresh = [unet_of(empty.model / "unet").requires_grad_(True) for _ in range(3)]
    fast, _ = tool.prepare(unet_of(empty.model / "unet"), CPU, None, 0)
    tool.checkpoint_layers(fresh[0])
    (plain, much), (wrapped, little) = kept(fresh[1]), kept(fresh[0])
    assert_same(plain, wrapped, 0)
    assert little < much / 4
    assert_same(plain, gradients(fast), 1e-4)
    assert_same(plain, gradients(fresh[2], 3), 1e-4)


def test_a_loss_that_is_not_finite_and_too_little_disk(sampled, tmp_path, monkeypatch):
    place = sampled.copy(tmp_path / "work")
    code, text = place.run(TOOL, *TINY, "--lr", "1e30")
    assert code == 3 and "not finite" in text and "--lr < 1e+30" in text, text
    count = sum(p.numel() for p in unet_of(place.model / "unet").parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=2 * 16 * count - 1))
    code, text = place.run(TOOL, *TINY, "--name", "full")
    assert code == 3 and f"{2 * 16 * count:,} bytes" in text and "checkpoint" in text, text


def test_folder_is_an_artifact_that_stage_03_takes(tuned, tmp_path):
    place = tuned.copy(tmp_path / "work")
    folder, words = place.work / "demo/03_unet/default", ("--draws", 1, "--name", "tuned", "--save-latents")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*tool.FILES, "log.txt", "manifest.json"])
    assert (folder / "config.json").read_bytes() == (place.model / "unet/config.json").read_bytes()
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "finetune_unet fresh" in place.run(TOOL, *TINY)[1] and "03 fresh" in place.run("03")[1]
    text = place.run(TOOL, "--batch", 4, "--steps", 7, "--dry-run")[1]
    assert "stale: steps 6 -> 7" in text and "7 of 7 steps" in text, text
    contract.save(tmp_path / "p.json", dict.fromkeys(CLASSES, "a person"))
    text = place.run(TOOL, *TINY, "--prompt-file", tmp_path / "p.json", "--dry-run")[1]
    assert "stale: input prompts changed" in text, text
    code, text = place.run("03", "--unet", folder, *words)
    assert code == 0 and f"U-Net {folder}" in text, text
    assert place.run("03", "--unet", "published", *words, "--name", "plain")[0] == 0
    root = place.work / "demo/03_samples/ipc2"
    a, b = (np.load(root / name / "Walk/0_0.npy") for name in ("tuned", "plain"))
    assert not np.array_equal(a, b)
    (folder / "log.txt").write_text("another run's")  # no part of the U-Net
    assert "03 fresh" in place.run("03", "--unet", folder, *words)[1]
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    for script, given in (("03", ("--unet", folder, *words)), (TOOL, TINY)):
        code, text = place.run(script, *given)
        assert code == 3 and WEIGHTS in text and "--redo" in text, text
    assert place.run(TOOL, *TINY, "--redo")[0] == 0
    assert "03 fresh" in place.run("03", "--unet", folder, *words)[1]


def test_stopped_while_a_checkpoint_is_written(tuned, sampled, tmp_path, monkeypatch):
    """With the third one half on disk: taken up from the second, the same bytes in the end."""
    place, save, draw, steps, held = sampled.copy(tmp_path / "work"), torch.save, tool.draw, [], []
    folder, saved = place.work / "demo/03_unet/default", []

    def stop(state, handle):
        saved.append(len(state["losses"]))
        save(state, handle)
        if len(saved) == 3:
            handle.truncate(1000)
            raise KeyboardInterrupt

    def watched(step, *given):
        steps.append(step)
        with open("/proc/self/maps") as maps:
            held.append(".checkpoint.pt" in maps.read())
        return draw(step, *given)

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        place.run(TOOL, *TINY, "--checkpoint", 2)
    monkeypatch.undo()
    assert saved == [2, 4, 6] and len(contract.read(folder / ".checkpoint.pt")["losses"]) == 4
    monkeypatch.setattr(tool, "draw", watched)
    code, text = place.run(TOOL, *TINY, "--checkpoint", 100)
    assert code == 0 and steps == [4, 5], text
    assert not any(held)  # the old file's disk space is free once it has been replaced
    assert place.files() == tuned.files()


def test_lora_moves_attention_alone_and_keeps_the_layout(tuned, tmp_path):
    place = tuned.copy(tmp_path / "work")
    code, text = place.run(TOOL, *TINY, "--lora", 2, "--name", "lora")
    assert code == 0, text
    folders = (place.model / "unet", place.work / "demo/03_unet/lora")
    before, after = (unet_of(folder).half().state_dict() for folder in folders)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and {name.split(".")[-2] for name in moved} <= {"to_q", "to_k", "to_v", "0"}
    assert all(".attn" in name for name in moved)
    change = (after[name := sorted(moved)[0]] - before[name]).float()
    assert torch.linalg.matrix_rank(change, atol=1e-3 * change.norm()) <= 4  # rank 2, and float16's rounding


@pytest.mark.parametrize("dataset", ["ucf101", "demo"])
def test_the_default_unet_is_the_published_one(tuned, monkeypatch, dataset):
    monkeypatch.setattr(sys, "argv", tuned._replace(dataset=dataset, classes="Punch").words("03"))
    assert load("03").open_model(load("03").parse_args())[1] == tuned.model / "unet"


@pytest.mark.parametrize("dataset", ["hmdb51", "miniucf"])
def test_the_default_unet_is_tuned_on_the_classes_asked_for(tuned, tmp_path, monkeypatch, dataset):
    stage, classes = load("03"), media.DATASETS[dataset]["classes"]
    place = tuned._replace(work=tmp_path, dataset=dataset, classes=",".join(classes))
    unet = tmp_path / dataset / "03_unet/default"

    def opened(*extra):
        monkeypatch.setattr(sys, "argv", place.words("03", *extra))
        return stage.open_model(stage.parse_args())

    with pytest.raises(contract.Missing, match=f"--unet published, or python {TOOL} {dataset} --work-dir"):
        opened()
    assert opened("--unet", "published")[1] == tuned.model / "unet"
    shutil.copytree(tuned.work / "demo/03_unet/default", unet)
    record = contract.read(unet / "manifest.json")
    for steps, trained in ((6, classes), (2500, classes[1:])):
        record["parameters"] |= {"steps": steps, "classes": trained}
        contract.save(unet / "manifest.json", record)
        with pytest.raises(contract.ContractError, match=f"expected: 2500 steps .*\n.* {steps} steps, "):
            opened()
        assert opened("--unet", unet)[1] == unet
    assert opened("--classes", classes[1])[1] == unet and stage.FINE_TUNED[dataset] == tool.STEPS_FULL
