"""The baselines of baselines/ against references written out by hand, and stage 05 on what they write."""

import contract

import itertools
import os
import shutil
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, load
from torch import nn
from torch.nn import functional as F

import common
import media

dm, mtt, frepo, static = (load(f"baselines/{name}.py") for name in ("dm", "mtt", "frepo", "static_dc"))
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


def differences(function, x, gradient, places=12):
    """(gradient, central differences) of function() at some values of x, which it reads."""
    (flat, eps), both = (x.detach().view(-1), 1e-5), []
    for i in torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))[:places].tolist():
        kept, found = flat[i].item(), []
        for sign in (1, -1):
            flat[i] = kept + sign * eps
            found.append(function().item())
        flat[i] = kept
        both.append((gradient.reshape(-1)[i].item(), (found[0] - found[1]) / (2 * eps)))
    ours, expected = zip(*both, strict=True)
    return list(ours), pytest.approx(list(expected), rel=1e-5, abs=1e-9)


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
        ("dm+d", "miniucf", 1, "lr", 1e-4), ("dm+d", "miniucf", 5, "lr", 1e3), ("dm+d", "demo", 1, "lr", 20),
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
    learnt = {name: p.numel() for name, p in memories.named_parameters()}  # the images are not
    assert learnt == {"dynamics": 4 * 16 * 36, "hallucinator.weight": 324, "hallucinator.bias": 3}
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
    ours, expected = differences(whole, synthetic, synthetic.grad)
    assert ours == expected


def test_dm_of_features_that_average_to_the_real_mean_is_zero():
    linear = Namespace(features=lambda weights, clips: clips.flatten(1) @ weights)
    real_clips, offset = normal(6, 3, 16, 4, 4), normal(1, 3, 16, 4, 4, seed=2)
    mean = real_clips.mean(0, keepdim=True)
    weights = normal(3 * 16 * 16, 7, seed=3)
    pair = torch.cat([mean + offset, mean - offset])
    assert dm.class_loss(linear, weights, real_clips, pair).item() < 1e-20
    assert dm.class_loss(linear, weights, real_clips, pair + 0.1).item() > 0.1


def test_dm_of_no_steps_is_random_on_the_same_clips_to_the_last_digit(world):
    world.must("baselines/dm.py", 2, "--set", "steps=0")
    clips, set_folder = real(world), folder(world, "dm")
    world.must("05", "--train-on", "random", "--repeats", 1)
    world.must("05", "--train-on", "dm", "--repeats", 1)
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
    preview = media.read_video(set_folder / "preview/Walk.mp4")
    assert preview.shape == (16, 48, 96, 3)


def test_dm_steps_are_sgd_on_fresh_networks_and_other_batches(world):
    """One step by hand: the network, the batch, the rate; and the loss over more steps falls."""
    world.must("baselines/dm.py", 2, "--set", "steps=1", "real=3", "lr=500", "--name", "one")
    world.must("baselines/dm.py", 2, "--set", "steps=0", "--name", "none")
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
    world.must("baselines/dm.py", 2, "--set", "steps=0", "--name", "none")
    world.must("baselines/dm.py", 2, "--set", "steps=8", "real=5", "lr=1000", "--name", "more")
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
        assert "killed" in place.refused(script, *words)
    assert len([*place.work.rglob(".checkpoint.pt")]) == 1
    place.must(script, *words)
    whole.must(script, *words)
    assert "fresh: " in place.must(script, *words) and not [*place.work.rglob(".checkpoint*")]
    return place.files(), whole.files()


def test_dm_killed_and_taken_up_again_leaves_the_same_bytes(world, monkeypatch):
    ours, theirs = killed_and_whole(world, monkeypatch, "baselines/dm.py", 2, "--set", "steps=6", "real=2")
    assert ours == theirs


# --- Static-DC --------------------------------------------------------------------------------------------


def test_distance_of_gradients_by_rows():
    shapes = [(4, 3, 3, 3), (4,), (2, 8), (5, 2, 1, 2, 2)]
    a, b = ([normal(*shape, seed=10 * k + i) for i, shape in enumerate(shapes)] for k in (1, 2))
    expected = 0.0
    for i in (0, 2, 3):  # not the bias
        for x, y in zip(
            a[i].numpy().reshape(len(a[i]), -1), b[i].numpy().reshape(len(b[i]), -1), strict=True
        ):
            expected += 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-6)
    assert static.distance(a, b).item() == pytest.approx(expected)
    assert abs(static.distance(a, a).item()) < 1e-5 and abs(static.distance(a, [7 * x for x in a])) < 1e-5
    assert static.distance(a, [-x for x in a]).item() == pytest.approx(2 * 11, abs=1e-4)


def test_gradient_of_the_distance_against_central_differences():
    torch.manual_seed(0)
    net = static.convnet(2, 8, 2).double()
    net = nn.Sequential(*(nn.Softplus() if isinstance(m, nn.ReLU) else m for m in net))
    target = static.gradients(net, normal(5, 3, 8, 8, seed=1), torch.zeros(5, dtype=torch.int64))
    images, labels = normal(2, 3, 8, 8).requires_grad_(), torch.zeros(2, dtype=torch.int64)

    def loss():
        return static.distance(target, static.gradients(net, images, labels, create_graph=True))

    loss().backward(inputs=[images])
    ours, expected = differences(lambda: loss().detach(), images, images.grad, places=6)
    assert ours == expected


def test_convnet_and_its_training_between_outer_steps():
    net = static.convnet(5, 112, 4)
    assert sum(p.numel() for p in net.parameters()) == 3 * 128 * 9 + 3 * 128 * 128 * 9 + 4 * 3 * 128 + 5 * (
        6272 + 1
    )
    torch.manual_seed(0)
    ours = static.convnet(2, 8, 2)
    theirs = static.convnet(2, 8, 2)
    theirs.load_state_dict(ours.state_dict())
    images, labels = normal(4, 3, 8, 8).float(), torch.tensor([0, 0, 1, 1])
    static.train_between(ours, images, labels, 3, 0.01, contract.generator(0, "between"))
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(theirs(images), labels).backward()
        optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_static_dc_makes_still_videos_of_frames_drawn_once(world, monkeypatch):
    words = ("--set", "steps=6", "outer=2", "inner=1", "real=3", "real_start=0")
    ours, theirs = killed_and_whole(world, monkeypatch, "baselines/static_dc.py", 2, *words)
    assert ours == theirs
    for label in CLASSES:
        clips = contract.read(folder(world, "static_dc") / f"{label}.npy")
        assert clips.shape == (2, 1, 16, 48, 48, 3) and (clips == clips[:, :, :1]).all()
    about = contract.read(folder(world, "static_dc") / "set.json")
    assert about["bytes"] == 12 * 48**2 * 4 and about["variants"] == 1
    curve = [float(row["loss"]) for row in contract.read(folder(world, "static_dc") / "loss.csv")]
    assert curve[-1] < curve[0]
    args = Namespace(seed=0, ipc=2, settings={"real_start": 1}, spec={"side": 48})
    clips = {label: (names, array[:, None]) for label, (names, array) in real(world).items()}
    frames = static.random_frames(args, clips, CPU)  # of window 0
    for label, (_, array) in real(world).items():
        for frame, clip in zip(frames[label], np.array(array), strict=True):
            shown = common.to_input(torch.from_numpy(clip[None]))[0].transpose(0, 1)  # [16, 3, S, S]
            assert any(torch.equal(frame, x) for x in shown)
    for i, image in enumerate(static.first_images(args, frames, CPU)):
        assert any(torch.equal(image, x) for x in frames[CLASSES[i // 2]])


# --- FRePo ------------------------------------------------------------------------------------------------


def test_ridge_regression_against_a_float64_solve_and_its_gradient():
    ft, fs, y = normal(6, 9), normal(4, 9, seed=1), normal(4, 3, seed=2)
    kernel = fs.numpy() @ fs.numpy().T
    alpha = np.linalg.inv(kernel + 1e-6 * np.trace(kernel) / 4 * np.eye(4)) @ y.numpy()
    expected = (ft.numpy() @ fs.numpy().T) @ alpha
    assert np.allclose(frepo.predict(ft, fs, y).numpy(), expected, rtol=1e-8)
    assert np.allclose(frepo.predict(ft.float(), fs.float(), y.float()).numpy(), expected, atol=1e-3)
    fs.requires_grad_()
    y.requires_grad_()
    frepo.predict(ft, fs, y).square().sum().backward()
    for x in (fs, y):
        ours, expected = differences(lambda: frepo.predict(ft, fs, y).detach().square().sum(), x, x.grad)
        assert ours == expected
    twice = fs.detach()[[0, 0, 1, 1]].requires_grad_()  # a kernel without an inverse
    value = frepo.predict(ft, twice, y.detach()[[0, 0, 1, 1]]).square().sum()
    (gradient,) = torch.autograd.grad(value, twice)
    assert value.isfinite() and gradient.isfinite().all()


def test_first_labels_and_the_margin_that_is_asked_for():
    labels = frepo.first_labels(4, 3)
    assert labels.shape == (12, 4) and labels.sum(1).abs().max() < 1e-6
    assert labels[3].tolist() == pytest.approx([-0.25 / 0.4**0.5, 0.75 / 0.4**0.5] + [-0.25 / 0.4**0.5] * 2)
    y = torch.tensor([[0.5, 0.4, 0.0, 0.0], [0.9, 0.1, 0.0, 0.2]], requires_grad=True)
    loss = frepo.margin_loss(y)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.1 + 0.25) / 2)
    assert torch.allclose(y.grad, torch.tensor([[-0.5, 0.5, 0, 0], [0.0, 0, 0, 0]]))


def test_pool_renews_a_network_exactly_at_its_age_and_learns_at_its_rate(small):
    settings = {"pool": 4, "max_age": 6, "lr_pool": 3e-4}
    pool = frepo.Pool(settings, 2, CPU, 0)
    assert pool.ages == [0, 1, 3, 4]
    clips, labels = normal(3, 3, 16, 8, 8).float(), normal(3, 2).float()
    for step in range(5):
        before = [p.clone() for p in pool.networks[1].parameters()]
        assert pool.births[1] == 0 and pool.ages[1] == 1 + step
        pool.learn(1, clips, labels, step)
        change = max((a - b).abs().max() for a, b in zip(before, pool.networks[1].parameters(), strict=True))
        if step == 0:  # Adam's first step is its rate in every weight that has a gradient
            assert change.item() == pytest.approx(3e-4, rel=1e-2)
    assert pool.births == [0, 1, 0, 0] and pool.ages == [0, 0, 3, 4]
    assert not pool.optimisers[1].state_dict()["state"]
    torch.manual_seed(contract.generator(0, "frepo", "network", 1, 1).initial_seed())
    fresh = Small(2)
    for a, b in zip(fresh.parameters(), pool.networks[1].parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad


def test_frepo_learns_clips_and_labels_and_goes_on_after_a_kill(world, monkeypatch):
    words = ("--set", "steps=6", "real=4", "pool=2", "max_age=3", "lr_labels=1e-3")
    ours, theirs = killed_and_whole(world, monkeypatch, "baselines/frepo.py", 2, *words)
    assert ours == theirs
    labels = [contract.read(folder(world, "frepo") / f"{label}.labels.npy") for label in CLASSES]
    start = frepo.first_labels(2, 2).numpy()
    assert (
        np.concatenate(labels).dtype == np.float32 and 0 < np.abs(np.concatenate(labels) - start).max() < 0.05
    )
    assert contract.read(folder(world, "frepo") / "set.json")["bytes"] == 4 * (4 * 3 * 16 * 48**2 + 4 * 2)
    world.must("05", "--train-on", "frepo", "--labels", "stored", "--repeats", 1)
    assert "labels or lr that are stored with the set" in result(world, "frepo", "stored")[0]["deviations"]


# --- MTT --------------------------------------------------------------------------------------------------


def trajectory(small, inner=3):
    network, start = small
    target = start + 0.05 * normal(len(start), seed=4)
    clips, labels = normal(4, 3, 16, 8, 8).requires_grad_(), torch.tensor([0, 0, 1, 1])
    rows = [torch.tensor(r) for r in ([0, 2, 3], [1, 3], [0, 1, 2], [2, 3])[:inner]]
    steps = [(lambda r=r: clips[r], labels[r], 100 + i) for i, r in enumerate(rows)]
    return network, start, target, clips, steps


def unrolled(network, start, target, steps, beta):
    weights = start.detach().clone().requires_grad_()
    for make, labels, seed in steps:
        loss = F.cross_entropy(network.logits(weights, make(), seed), labels)
        weights = weights - beta * torch.autograd.grad(loss, weights, create_graph=True)[0]
    return (weights - target).square().sum() / (start.detach() - target).square().sum()


def test_adjoint_is_the_gradient_of_the_unrolled_steps_also_in_beta(small):
    network, start, target, clips, steps = trajectory(small, 4)
    beta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = unrolled(network, start, target, steps, beta)
    of_clips, of_beta = torch.autograd.grad(expected, [clips, beta])
    loss, found = mtt.match(network, start, target, steps, 0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert (clips.grad - of_clips).abs().max() <= 1e-10 * of_clips.abs().max()
    assert found.item() == pytest.approx(of_beta.item(), rel=1e-9)
    clips.grad = None
    assert mtt.match(network, start, target, steps, 0.0)[0] == 1  # a student that does not move


def test_adjoint_through_the_hallucinator_on_minic3d():
    """In float32, as it is used: to 1e-6 of the largest value for the memories, the hallucinator and beta."""
    network, memories = parts.Network(2, CPU), parts.Memories(normal(4, 3, 48, 48).float(), 2, 0)
    start, target = network.new(0, "a"), network.new(0, "b")
    steps, learnt = [], [memories.dynamics, *memories.hallucinator.parameters()]
    for i, row in enumerate((0, 1)):
        rows, coins = torch.tensor([row]), torch.tensor([[i, 1 - i]])
        steps.append((lambda rows=rows, coins=coins: memories(rows, coins), rows, i))
    beta = torch.tensor(0.5, requires_grad=True)
    expected = torch.autograd.grad(unrolled(network, start, target, steps, beta), [*learnt, beta])
    _, of_beta = mtt.match(network, start, target, steps, 0.5)
    for value, other in zip([*(p.grad for p in learnt), of_beta], expected, strict=True):
        assert (value - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_student_steps_like_sgd_with_the_same_dropout(small):
    network, start, target, _, steps = trajectory(small, 1)
    torch.manual_seed(0)
    net = Small(2).double().train()
    nn.utils.vector_to_parameters(start.clone(), net.parameters())
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3)
    make, labels, seed = steps[0]
    torch.manual_seed(seed)
    F.cross_entropy(net(make()), labels).backward()
    optimiser.step()
    weights = nn.utils.parameters_to_vector(net.parameters()).detach()
    expected = (weights - target).square().sum() / (start - target).square().sum()
    assert mtt.match(network, start, target, steps, 0.3)[0] == pytest.approx(expected.item(), rel=1e-12)


def test_only_one_inner_step_is_held_in_memory(small):
    """The most bytes that the graphs hold at once, for more inner steps and more clips per class."""

    def most(inner, clips_of_class):
        network, start, target, _, _ = trajectory(small, 1)
        clips, live, peak = normal(2 * clips_of_class, 3, 16, 8, 8).requires_grad_(), [0], [0]
        steps = [(lambda: clips[:3], torch.tensor([0, 0, 0]), i) for i in range(inner)]

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                live[0] += tensor.numel()
                peak[0] = max(peak[0], live[0])

            def __del__(self):
                live[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            mtt.match(network, start, target, steps, 0.1)
        return peak[0]

    assert most(2, 2) == most(6, 2) == most(2, 8)


def test_chunks_are_permutations():
    generator = contract.generator(0, "chunks")
    found = mtt.chunks(10, 4, 6, generator)
    assert [len(rows) for rows in found] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(found[:3]), torch.cat(found[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == [*range(10)]
    assert first.tolist() != second.tolist()
    assert [rows.tolist() for rows in mtt.chunks(4, 4, 2, generator)] == [[0, 1, 2, 3]] * 2


def test_mtt_trains_experts_uses_all_of_them_and_goes_on_after_a_kill(world, monkeypatch):
    used, match, words = (
        [],
        mtt.match,
        ("--set", "steps=6", "experts=2", "expert_epochs=2", "inner=1", "beta=0.01"),
    )

    def watched(network, start, target, *rest):
        used.append((start.sum().item(), target.sum().item()))
        return match(network, start, target, *rest)

    monkeypatch.setattr(mtt, "match", watched)
    ours, theirs = killed_and_whole(world, monkeypatch, "baselines/mtt.py", 1, *words, "expert_lr=0.1")
    assert ours == theirs
    experts = [contract.read(world.work / f"demo/05_networks/experts/expert_{i}.npy") for i in range(2)]
    assert {expert.shape for expert in experts} == {(3, 3_641_216 + 2 * 129)}
    snapshots = [row for expert in experts for row in expert]
    for a, b in itertools.combinations(snapshots, 2):
        assert not np.array_equal(a, b)
    pairs = {(i, e): [torch.from_numpy(x[k].copy()).sum().item() for k in (e, e + 1)]
             for i, x in enumerate(experts) for e in range(2)}  # fmt: skip
    seen = [next(i for (i, e), pair in pairs.items() if pair == list(found)) for found in used[-6:]]
    assert all(sorted(seen[i : i + 2]) == [0, 1] for i in (0, 2, 4))
    about = contract.read(folder(world, "mtt", 1) / "set.json")
    assert about["lr"] >= 0.001 and about["lr"] != 0.01 and about["bytes"] == 4 * 2 * 3 * 16 * 48**2 + 4
    curve = [float(row["loss"]) for row in contract.read(folder(world, "mtt", 1) / "loss.csv")]
    assert all(0 < loss < 1.2 for loss in curve)


# --- the +D of each ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dm", "frepo", "mtt"])
def test_dynamic_memories_are_learnt_and_statics_are_not(world, method):
    copies = 1 if method == "frepo" else 2
    text = world.refused(f"baselines/{method}.py", 2, "--dynamic")
    assert f"python baselines/static_dc.py demo {2 * copies}" in text
    world.must("baselines/static_dc.py", 2 * copies, "--set", "steps=1", "real=2")
    small_run = {
        "dm": ("real=2",),
        "frepo": ("real=4", "pool=1"),
        "mtt": ("inner=1", "experts=1", "expert_epochs=1"),
    }
    words = (2, "--dynamic", "--set", "steps=2", *small_run[method])
    text = world.must(f"baselines/{method}.py", *words)
    name, variants = f"{method}+d", copies**2
    about = contract.read(folder(world, name) / "set.json")
    of_labels, of_beta = 4 * 2 * (method == "frepo"), method == "mtt"
    memories = 2 * 2 * copies * (3 + 16) * 48**2
    assert about["variants"] == variants and about["bytes"] == 4 * (memories + 327 + of_labels + of_beta)
    clips = contract.read(folder(world, name) / "Walk.npy")
    assert (
        clips.shape == (2, variants, 16, 48, 48, 3) and len({clip.tobytes() for clip in clips[0]}) == variants
    )
    world.must("05", "--train-on", name, "--repeats", 1)
    assert result(world, name)[0]["bytes"] == about["bytes"]


# --- stage 05 on such a set -------------------------------------------------------------------------------


def replace(place, name, file, value):
    """Another content of a file of a set, with a record that fits."""
    record = contract.read(folder(place, name) / "manifest.json")
    contract.save(folder(place, name) / file, value)
    record["outputs"][file] = {"bytes": 1, "sha256": contract.sha256(folder(place, name) / file)}
    contract.save(folder(place, name) / "manifest.json", record)


def test_05_refuses_what_is_no_set_of_a_baseline(world):
    world.must("baselines/dm.py", 2, "--set", "steps=0")
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
        assert message in world.refused("05", "--train-on", "dm")
    replace(world, "dm", "Walk.npy", good)
    world.must("05", "--train-on", "dm", "--repeats", 1)
    assert "labels.npy is missing" in world.refused("05", "--train-on", "dm", "--labels", "stored")
    (folder(world, "dm") / "Walk.npy").unlink()
    text = world.refused("05", "--train-on", "dm")
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
    world.must("baselines/dm.py", 2, "--set", "steps=0")
    about = contract.read(folder(world, "dm") / "set.json")
    world.must("05", "--train-on", "dm", "--repeats", 1)
    replace(world, "dm", "set.json", about | {"lr": 0.02})
    world.must("05", "--train-on", "dm", "--repeats", 1, "--labels", "stored")
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


# --- run_all.sh -------------------------------------------------------------------------------------------

ROWS = """
-- baselines/dm.py demo 3
-- 05_train_eval.py demo 3 --train-on dm
-- baselines/static_dc.py demo 3
-- 05_train_eval.py demo 3 --train-on static_dc
-- baselines/static_dc.py demo 6
-- baselines/dm.py demo 3 --dynamic
-- 05_train_eval.py demo 3 --train-on dm+d
-- baselines/frepo.py demo 3
-- 05_train_eval.py demo 3 --train-on frepo
-- baselines/frepo.py demo 3 --dynamic
-- 05_train_eval.py demo 3 --train-on frepo+d
-- baselines/mtt.py demo 3
-- 05_train_eval.py demo 3 --train-on mtt
-- baselines/mtt.py demo 3 --dynamic
-- 05_train_eval.py demo 3 --train-on mtt+d
"""


def test_rows_of_run_all_and_that_the_scripts_take_them(tmp_path, monkeypatch):
    """With an interpreter that only writes its words down."""
    python, listed, repo = tmp_path / ".venv/bin/python", tmp_path / "listed", contract.ROOT
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\n[ "$1" = - ] || printf "%s\\n" "$*" >> "$LISTED"\n')
    python.chmod(0o755)
    for name in ("run_all.sh", "setup.sh", "requirements.txt", "baselines"):
        copy = shutil.copytree if (repo / name).is_dir() else shutil.copy
        copy(repo / name, tmp_path / name)
    words = [
        "bash",
        tmp_path / "run_all.sh",
        "demo",
        "3",
        "--quick",
        "--baselines",
        "--from",
        "4",
        "--seed",
        "2",
    ]
    environment = {**os.environ, "LISTED": str(listed)}
    subprocess.run(words, check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = [line.replace(f"{tmp_path}/", "") for line in listed.read_text().splitlines()]
    expected = [line.removeprefix("-- ") + " --seed 2" for line in ROWS.split("\n") if line]
    start = found.index(expected[0])
    assert found[start : start + len(expected)] == expected
    for line in expected:
        script, *given = line.split()
        monkeypatch.setattr("sys.argv", [script, *given])
        args = load(script.split("_")[0] if script[0] == "0" else script).parse_args()
        assert args.ipc in (3, 6) and args.seed == 2


def test_estimates_and_dry_runs(world):
    for method, hours in (("dm", 0.9), ("frepo", 0.75), ("static_dc", 0.28), ("mtt", 3.5)):
        module = load(f"baselines/{method}.py")
        spec = media.DATASETS["miniucf"]
        values = {"dataset": "miniucf", "ipc": 5, "spec": spec, "classes": spec["classes"], "limit": None}
        values |= {"method": method, "name": method, "dynamic": False}
        args = Namespace(**values, settings=parts.find_settings(method, "miniucf", 5))
        args.settings |= parts.find_settings("experts", "miniucf", 5)
        item, count, seconds, size, machine = module.estimate(args)["04_distilled"]
        assert seconds / 3600 == pytest.approx(hours, rel=0.25) and machine == "an A100"
        assert size == 50 * 5 * 16 * 112 * 112 * 3 * 2 and count == len(parts.wanted(args))
    text = world.must("baselines/mtt.py", 2, "--dry-run")
    lines = text.splitlines()
    assert len(lines) == 2 and "experts left" in lines[0] and "of mtt left" in lines[1]
    assert not [*world.work.glob("demo/05_networks/*"), *world.work.glob("demo/04_distilled/ipc2/mtt/*")]


def test_misuse(world):
    for words in (["lr=x"], ["lr"], ["steps=1.5"], ["unknown=1"], ["lr=-1"], ["lr=nan"]):
        code, text = world.run("baselines/dm.py", 2, "--set", *words)
        assert code == 2 and words[0].partition("=")[0] in text
    assert "too few clips" in world.refused("baselines/dm.py", 9)
    text = world.refused("baselines/dm.py", 2, "--set", "steps=30", "lr=1e12")
    assert "not finite" in text and "a smaller rate" in text
