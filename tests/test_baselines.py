"""The baselines of baselines/ against references written out by hand, and stage 05 on what they write."""

import contract

import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, load
from torch import nn

import common

dm = load("baselines/dm.py")
parts, stage = dm.parts, load("05")
CPU = torch.device("cpu")


class Small(nn.Module):
    """A smooth network with MiniC3D's parts, for derivatives."""

    def __init__(self, num_classes):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv3d(3, 4, 3, stride=2), nn.Softplus(), nn.Conv3d(4, 5, 3, stride=3))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv3d(5, num_classes, 1)

    def forward(self, clips):
        return self.head(self.dropout(self.blocks(clips))).mean((2, 3, 4))


@pytest.fixture
def small(monkeypatch):
    """(network of Small, its weights [P]), float64."""
    monkeypatch.setattr(common, "MiniC3D", Small)
    network = parts.Network(2, CPU)
    return network, network.new(0, "w").double()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_gradient(function, x, gradient, places=12):
    """Central differences of function() at some values of x, which it reads."""
    flat, eps = x.detach().view(-1), 1e-5
    for i in torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))[:places].tolist():
        kept, found = flat[i].item(), []
        for sign in (1, -1):
            flat[i] = kept + sign * eps
            found.append(function().item())
        flat[i] = kept
        expected = (found[0] - found[1]) / (2 * eps)
        assert gradient.reshape(-1)[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def run(place, script, *words):
    code, text = place.run(script, *words)
    assert code == 0, text
    return text


def refused(place, script, *words):
    code, text = place.run(script, *words)
    assert code == 3, text
    return text


@pytest.fixture
def world(latents, tmp_path):
    """A copy of the world in which 01 and 02 have run."""
    return latents.copy(tmp_path / "work")


def folder(place, name, ipc=2):
    return place.work / f"demo/04_distilled/ipc{ipc}/{name}"


def learnt(place, name, label, ipc=2):
    """The first variant of the clips of a class, float16 [n, 16, S, S, 3]."""
    return torch.from_numpy(np.array(contract.read(folder(place, name, ipc) / f"{label}.npy")[:, 0]))


def real(place, split="train"):
    """{class: ([name], uint8 [n, 16, S, S, 3])} of 01."""
    found, base = {}, place.work / "demo/01_clips" / split
    for label in CLASSES:
        names = [row["name"] for row in contract.read(base / f"{label}.csv")]
        found[label] = names, contract.read(base / f"{label}.npy")[:, 0]
    return found


def result(place, name, labels="hard"):
    place = place.work / f"demo/05_results/ipc2/{name}/minic3d__{labels}__demo"
    return contract.read(place / "result.json"), contract.read(place / "repeat_0.json")


# --- shared parts -----------------------------------------------------------------------------------------


def test_settings_by_method_ipc_and_data_set():
    for method, dataset, ipc, name, value in (
        ("dm", "miniucf", 1, "lr", 30), ("dm", "hmdb51", 10, "lr", 300), ("dm", "demo", 5, "lr", 1000),
        ("dm+d", "miniucf", 1, "lr", 1e-4), ("dm+d", "miniucf", 5, "lr", 1e3), ("dm+d", "demo", 1, "lr", 200),
        ("mtt", "miniucf", 1, "lr", 1e5), ("mtt+d", "miniucf", 5, "lr", 1e4),
        ("mtt", "miniucf", 1, "inner", 10), ("mtt", "demo", 1, "inner", 5), ("mtt", "demo", 1, "batch", 8),
        ("frepo+d", "demo", 5, "lr_hallucinator", 1e-3), ("static_dc", "hmdb51", 10, "inner", 50),
    ):  # fmt: skip
        assert parts.find_settings(method, dataset, ipc)[name] == value


def test_weights_in_a_vector_are_minic3d_s():
    network, clips = parts.Network(3, CPU), common.to_input(torch.randint(256, (2, 16, 48, 48, 3)).byte())
    weights = network.new(7, "net", 1)
    torch.manual_seed(contract.generator(7, "net", 1).initial_seed())
    net = common.MiniC3D(3)
    assert torch.equal(network.features(weights, clips), net.blocks(clips).flatten(1))
    torch.manual_seed(5)
    expected = net(clips)
    assert torch.equal(network.logits(weights, clips, 5), expected)  # the same dropout
    assert not torch.equal(network.logits(weights, clips, 6), expected)
    assert not torch.equal(weights, network.new(7, "net", 2))


def test_hallucinator_with_an_identity_kernel_repeats_the_image():
    statics = normal(4, 3, 6, 6).float()
    memories = parts.Memories(statics, 2, seed=0)
    assert sum(p.numel() for p in memories.hallucinator.parameters()) == 327
    with torch.no_grad():
        memories.hallucinator.weight.zero_()
        memories.hallucinator.bias.zero_()
        for c in range(3):
            memories.hallucinator.weight[c, c, 1, 1, 1] = 1
    clips = memories(torch.tensor([0, 1, 1]), torch.tensor([[1, 0], [0, 1], [1, 1]]))
    assert torch.equal(clips, statics[[1, 2, 3], :, None].expand(-1, -1, 16, -1, -1))


@pytest.mark.parametrize("ipc", [1, 3, 5])
def test_memories_of_a_video_are_its_own_and_equally_likely(ipc):
    """Image and dynamic memory of video j of class c: 2 n c + 2 j and the next one, by fair coins."""
    count = 2 * 3 * ipc  # of three classes
    statics = torch.arange(count).float()[:, None, None, None].expand(-1, 3, 2, 2)
    memories = parts.Memories(statics, 2, seed=0)
    memories.dynamics.data[:] = torch.arange(count).float()[:, None, None, None, None]
    memories.hallucinator = nn.Identity()  # shows what it is given: [b, 4, 16, S, S]
    seen, generator = {}, contract.generator(0, "coins")
    for _ in range(200):
        rows = torch.arange(3 * ipc)
        given = memories(rows, parts.throw(memories, rows, generator))
        assert (given[:, :3] == given[:, :1, :1, :1, :1]).all() and (
            given[:, 3] == given[:, 3, :1, :1, :1]
        ).all()
        for row, (static, dynamic) in enumerate(given[:, [0, 3], 0, 0, 0].long().tolist()):
            assert static // 2 == dynamic // 2 == row
            key = static % 2, dynamic % 2
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 4 and all(abs(n / (600 * ipc) - 0.25) < 0.06 for n in seen.values())
    single = parts.Memories(statics, 1, seed=0)
    assert not parts.throw(single, torch.arange(50), generator).any()


def test_all_grey_levels_come_back_exactly():
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 1, 1, 3)
    assert np.array_equal(parts.to_grey(common.to_input(levels)), levels.numpy())
    beyond = parts.to_grey(torch.full((1, 3, 1, 1, 1), 4.0))
    assert beyond.dtype == np.float16 and (beyond > 330).all()  # not clipped


# --- DM ---------------------------------------------------------------------------------------------------


def test_dm_gradient_against_central_differences_and_per_class_is_the_whole(small):
    network, weights = small
    batches, synthetic = normal(2, 5, 3, 16, 8, 8), normal(4, 3, 16, 8, 8, seed=1).requires_grad_()

    def whole():
        f = [network.features(weights, x) for x in (batches.flatten(0, 1), synthetic)]
        means = f[0].unflatten(0, (2, 5)).mean(1) - f[1].unflatten(0, (2, 2)).mean(1)  # [K, D]
        return means.square().sum()

    losses = []
    for index in range(2):  # as the script does, class by class
        rows = slice(2 * index, 2 * index + 2)
        losses.append(dm.class_loss(network, weights, batches[index], synthetic[rows]))
        losses[-1].backward()
    assert sum(losses).item() == pytest.approx(whole().item(), rel=1e-12)
    check_gradient(whole, synthetic, synthetic.grad)


def test_dm_of_features_that_average_to_the_real_mean_is_zero():
    linear = Namespace(features=lambda weights, clips: clips.flatten(1) @ weights)
    real_clips, offset = normal(6, 3, 16, 4, 4), normal(1, 3, 16, 4, 4, seed=2)
    mean = real_clips.mean(0, keepdim=True)
    weights = normal(3 * 16 * 16, 7, seed=3)
    pair = torch.cat([mean + offset, mean - offset])
    assert dm.class_loss(linear, weights, real_clips, pair).item() < 1e-20
    assert dm.class_loss(linear, weights, real_clips, pair + 0.1).item() > 0.1


def test_dm_of_no_steps_is_random_on_the_same_clips_to_the_last_digit(world):
    run(world, "baselines/dm.py", 2, "--set", "steps=0")
    clips, set_folder = real(world), folder(world, "dm")
    run(world, "05", "--train-on", "random", "--repeats", 1)
    run(world, "05", "--train-on", "dm", "--repeats", 1)
    (ours, own), (theirs, other) = result(world, "dm"), result(world, "random")
    for label in CLASSES:
        names, array = clips[label]
        stored = contract.read(set_folder / f"{label}.npy")
        assert stored.dtype == np.float16 and stored.shape == (2, 1, 16, 48, 48, 3)
        chosen = [array[names.index(name)] for name in other["clips"][label]]
        assert np.array_equal(stored[:, 0], np.stack(chosen))
    assert {**own, "clips": 0} == {**other, "clips": 0} and own["loss"] == other["loss"]
    assert ours["top1"]["values"] == theirs["top1"]["values"] and ours["deviations"] == theirs["deviations"]
    about = contract.read(set_folder / "set.json")
    assert about == {
        "method": "dm",
        "variants": 1,
        "bytes": 4 * 4 * 3 * 16 * 48**2,
        "lr": None,
        "labels": False,
    }
    assert ours["bytes"] == about["bytes"] and theirs["bytes"] * 4 == ours["bytes"]
    preview = common.read_video(set_folder / "preview/Walk.mp4")
    assert preview.shape == (16, 48, 96, 3)


def test_dm_steps_are_sgd_on_fresh_networks_and_other_batches(world):
    """One step by hand: the network, the batch, the rate; and the loss over more steps falls."""
    run(world, "baselines/dm.py", 2, "--set", "steps=1", "real=3", "lr=500", "--name", "one")
    run(world, "baselines/dm.py", 2, "--set", "steps=0", "--name", "none")
    network, before, after = parts.Network(2, CPU), [], []
    weights = network.new(0, "dm", 0)
    for label, (_, array) in real(world).items():
        picked = torch.randperm(5, generator=contract.generator(0, "dm", 0, label))[:3]
        target = network.features(weights, common.to_input(torch.from_numpy(array[picked.numpy()])))
        x = common.to_input(learnt(world, "none", label)).requires_grad_()
        loss = (target.mean(0) - network.features(weights, x).mean(0)).square().sum()
        (gradient,) = torch.autograd.grad(loss, x)
        before.append(loss.item())
        stored = common.to_input(learnt(world, "one", label))
        after.append((stored - (x - 500 * gradient)).abs().max().item())
        assert (500 * gradient).abs().max() > 0.05
    assert max(after) < 2e-3  # float16
    (row,) = contract.read(folder(world, "one") / "loss.csv")
    assert float(row["loss"]) == pytest.approx(sum(before), rel=1e-4)


def test_dm_lowers_the_loss_on_networks_that_it_has_not_seen(world):
    run(world, "baselines/dm.py", 2, "--set", "steps=0", "--name", "none")
    run(world, "baselines/dm.py", 2, "--set", "steps=8", "real=5", "lr=1000", "--name", "more")
    assert len(contract.read(folder(world, "more") / "loss.csv")) == 8
    network = parts.Network(2, CPU)
    for seed in range(3):
        weights, losses = network.new("unseen", seed), {"none": 0.0, "more": 0.0}
        for name, label in itertools.product(losses, CLASSES):
            clips = [torch.from_numpy(np.array(real(world)[label][1])), learnt(world, name, label)]
            losses[name] += dm.class_loss(network, weights, *map(common.to_input, clips)).item()
        assert losses["more"] < 0.95 * losses["none"]


class Killed(contract.tqdm):
    """A progress bar whose run ends in the fifth step."""

    def __iter__(self):
        for i in super().__iter__():
            if i == 4:
                raise contract.ContractError("killed")
            yield i


def killed_and_whole(place, monkeypatch, script, *words):
    """The files of a run that is killed and goes on, and of one that is not; both must be fresh then."""
    whole = place.copy(place.work.parent / "whole")
    monkeypatch.setattr(parts, "CHECKPOINT_EVERY", 3)
    with monkeypatch.context() as patch:
        patch.setattr(contract, "tqdm", Killed)
        assert "killed" in refused(place, script, *words)
    assert len([*place.work.rglob(".checkpoint.pt")]) == 1
    run(place, script, *words)
    run(whole, script, *words)
    assert "fresh: " in run(place, script, *words) and not [*place.work.rglob(".checkpoint*")]
    return place.files(), whole.files()


def test_dm_killed_and_taken_up_again_leaves_the_same_bytes(world, monkeypatch):
    ours, theirs = killed_and_whole(world, monkeypatch, "baselines/dm.py", 2, "--set", "steps=6", "real=2")
    assert ours == theirs


# --- stage 05 on such a set -------------------------------------------------------------------------------


def replace(place, name, file, value):
    """Another content of a file of a set, with a record that fits."""
    record = contract.read(folder(place, name) / "manifest.json")
    contract.save(folder(place, name) / file, value)
    record["outputs"][file] = {"bytes": 1, "sha256": contract.sha256(folder(place, name) / file)}
    contract.save(folder(place, name) / "manifest.json", record)


def test_05_refuses_what_is_no_set_of_a_baseline(world):
    run(world, "baselines/dm.py", 2, "--set", "steps=0")
    good = np.array(contract.read(folder(world, "dm") / "Walk.npy"))
    holed = good.copy()
    holed[1, 0, 3, 2, 1, 0] = np.nan
    for array, message in (
        (good.astype(np.float32), "expected: float16 [None, 1, 16, 48, 48, 3]"),
        (good[:, :, :, :46, :46], "found:    float16 [2, 1, 16, 46, 46, 3]"),
        (np.repeat(good, 2, 1), "found:    float16 [2, 2, 16, 48, 48, 3]"),
        (holed, "Walk.npy: a value is not finite"),
    ):
        replace(world, "dm", "Walk.npy", array)
        assert message in refused(world, "05", "--train-on", "dm")
    replace(world, "dm", "Walk.npy", good)
    run(world, "05", "--train-on", "dm", "--repeats", 1)
    assert "labels.npy is missing" in refused(world, "05", "--train-on", "dm", "--labels", "stored")
    (folder(world, "dm") / "Walk.npy").unlink()
    text = refused(world, "05", "--train-on", "dm")
    assert "Walk.npy is damaged" in text and "python baselines/dm.py demo 2" in text


def test_05_draws_a_variant_per_clip_and_epoch(monkeypatch, tmp_path):
    class Seen(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(num_classes))

        def forward(self, clips):
            seen.append((clips[:, 0].mean((1, 2, 3)) * 0.229 + 0.485) * 255)
            return clips.mean((1, 2, 3, 4))[:, None] * self.weight

    seen, epochs = [], 300
    monkeypatch.setattr(common, "MiniC3D", Seen)
    levels = torch.arange(8).half().view(2, 4, 1, 1, 1, 1).expand(2, 4, 16, 4, 4, 3)  # clip i: 4 i .. 4 i + 3
    protocol = stage.PROTOCOLS["demo"] | {"epochs": epochs, "min_steps": 0, "flip": 0.0}
    args = Namespace(net="minic3d", seed=0, classes=CLASSES, protocol=protocol, alpha=None)
    labels = torch.arange(2)
    stage.train(levels, labels, None, args, 0, torch.float32, tmp_path / "1.pt")
    shown = torch.stack(seen).sort(1).values.round().long()  # [epochs, 2]
    assert (shown // 4 == torch.tensor([0, 1])).all()
    pairs = (4 * (shown[:, 0] % 4) + shown[:, 1] % 4).bincount(minlength=16)
    assert pairs.min() > 0 and pairs.sum() == epochs  # of both clips, each for itself
    seen.clear()
    stage.train(levels, labels, None, args, 0, torch.float32, tmp_path / "2.pt")
    assert torch.equal(torch.stack(seen).sort(1).values.round().long(), shown)


def test_stored_labels_and_rate_are_marked(world):
    run(world, "baselines/dm.py", 2, "--set", "steps=0")
    about = contract.read(folder(world, "dm") / "set.json")
    run(world, "05", "--train-on", "dm", "--repeats", 1)
    replace(world, "dm", "set.json", about | {"lr": 0.02})
    run(world, "05", "--train-on", "dm", "--repeats", 1, "--labels", "stored")
    plain, learnt = (result(world, "dm", labels)[0] for labels in ("hard", "stored"))
    assert plain["protocol"]["lr"] == 0.005 and learnt["protocol"]["lr"] == 0.02
    assert {*learnt["deviations"]} - {*plain["deviations"]} == {
        "lr 0.02, not 0.005",
        "labels or lr that are stored with the set",
    }


def test_stored_labels_are_learnt_by_squared_error(monkeypatch, tmp_path):
    class Constant(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(num_classes))

        def forward(self, clips):
            return self.weight.expand(len(clips), -1)

    monkeypatch.setattr(common, "MiniC3D", Constant)
    stored, clips = torch.tensor([[0.5, -0.5], [-0.3, 0.7]]), torch.zeros(2, 16, 4, 4, 3).byte()
    protocol = stage.PROTOCOLS["demo"] | {"epochs": 1, "min_steps": 0, "lr": 0.1}
    args = Namespace(net="minic3d", seed=0, classes=CLASSES, protocol=protocol, alpha=None)
    net, loss = stage.train(clips, torch.arange(2), stored, args, 0, torch.float32, tmp_path / "1.pt")
    assert loss == pytest.approx(stored.square().sum(1).mean().item())
    assert torch.allclose(net.weight, 0.1 * 2 * stored.mean(0))  # one step from 0
