"""The method against exact references: the library's DDIM step, a model whose denoiser is known, hand-made data."""

import pytest
import torch
from conftest import load_stage
from diffusers import DDIMScheduler

import common
import contract

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def scheduler():
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def unit_gaussian(scheduler, steps, strengths, stop=0.5, sign=1.0, start=0.0):
    """Final latents on unit-Gaussian data, whose exact denoiser is eps = sqrt(1 - abar) * x; prototype at 1."""
    scheduler.set_timesteps(steps)
    x = torch.full((1, 4, 16, 1, 1), start)
    for t in scheduler.timesteps:
        eps = (1 - scheduler.alphas_cumprod[t]).sqrt() * x
        used = strengths if t > stop * 1000 else torch.zeros_like(strengths)
        x = common.guided_ddim_step(scheduler, eps, t, x, torch.ones_like(x), sign * used)
    return x


def test_without_guidance_every_step_is_the_library_s(scheduler):
    scheduler.set_timesteps(10)
    generator = contract.generator(0, "test")
    x = torch.randn(2, 4, 16, 3, 5, generator=generator)
    prototypes = torch.randn(x.shape, generator=generator)
    for t in scheduler.timesteps:
        eps = torch.randn(x.shape, generator=generator)
        ours = common.guided_ddim_step(scheduler, eps, t, x, prototypes, torch.zeros(16))
        assert torch.equal(ours, scheduler.step(eps, t, x).prev_sample)
        x = ours


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [(25, 0.01, 0.02), (25, 0.1, 0.19), (50, 0.05, 0.10), (50, 0.1, 0.20), (50, 0.5, 0.87), (50, 1.0, 1.50)],
)
def test_displacement_towards_the_prototype(scheduler, steps, strength, expected):
    """The table of paper_facts.md 2.3, which rounds to two places."""
    moved = unit_gaussian(scheduler, steps, torch.full((16,), strength)).mean().item()
    assert moved == pytest.approx(expected, abs=0.0051)


def test_printed_plus_sign_moves_away(scheduler):
    assert unit_gaussian(scheduler, 50, torch.full((16,), 0.1), sign=-1.0).mean() < -0.2


def test_decay_weakens_later_frames_by_the_ratio_of_eq_8(scheduler):
    moved = unit_gaussian(scheduler, 50, common.linear_decay(0.01)).flatten()[:16]
    assert (moved[0] / moved[15]).item() == pytest.approx(16, rel=0.01)


def test_nothing_is_guided_after_the_stop(scheduler):
    plain = unit_gaussian(scheduler, 50, torch.zeros(16), start=1.3)
    assert torch.equal(unit_gaussian(scheduler, 50, torch.full((16,), 0.1), stop=1.0, start=1.3), plain)


def test_linear_decay():
    assert torch.equal(common.linear_decay(0.4, 4), torch.tensor([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize("steps", [1000, 300, 600, 2000])
def test_step_counts_that_the_schedule_cannot_serve(scheduler, steps):
    with pytest.raises(contract.ContractError, match="usable: .*50"):
        load_stage("03").check_steps(scheduler.config, steps)


@pytest.mark.parametrize("steps", [*range(1, 21), 25, 50, 100])
def test_step_counts_that_it_can_serve(scheduler, steps):
    """The rule by arithmetic says the same as the library's timesteps."""
    load_stage("03").check_steps(scheduler.config, steps)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    assert min(950, 1000 - 1250 / steps) <= scheduler.timesteps[0] < 1000


def test_minic3d_parameters_and_shapes():
    """protocol.md 3.1."""
    net = common.MiniC3D(50).eval()
    assert sum(p.numel() for p in net.parameters()) == 3_647_666
    for side, spatial in ((112, 2), (48, 1), (43, 1)):
        with torch.inference_mode():
            features = net.blocks(torch.zeros(1, 3, 16, side, side))
            assert features.shape == (1, 128, 4, spatial, spatial)
            assert net(torch.zeros(2, 3, 16, side, side)).shape == (2, 50)


def test_kmeans_prototypes_are_means_of_members():
    stage, generator = load_stage("02"), torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, 4, 2, 2, generator=generator) * 10
    latents = centres.repeat_interleave(4, 0) + torch.randn(12, 16, 4, 2, 2, generator=generator) * 0.1
    latents = latents.half().numpy()
    prototypes, clusters, distances = stage.prototypes_of(latents, 3, 0, "Walk")
    assert clusters.tolist() == [0] * 4 + [1] * 4 + [2] * 4  # numbered by their first members
    for k in range(3):
        expected = latents[4 * k : 4 * k + 4].astype("float64").mean(0).astype("float32")
        assert (prototypes[k] == expected).all()
    assert distances.max() < 3


def test_kmeans_refuses_copies():
    latents = torch.ones(4, 16, 4, 2, 2).half().numpy()
    with pytest.raises(contract.ContractError, match="Walk: only 1 of 2 clusters"):
        load_stage("02").prototypes_of(latents, 2, 0, "Walk")


def test_composition_uses_every_video_once_and_keeps_temporal_order():
    plan = load_stage("04").compose_plan("Walk", 5, seed=0)
    used = [sample for group in plan for sample, _ in group]
    assert sorted(used) == sorted(f"{k}_{draw}" for k in range(5) for draw in range(4))
    assert all(len(group) == 4 for group in plan)
    assert all(frames == sorted(set(frames)) and len(frames) == 4 for group in plan for _, frames in group)
    assert plan != load_stage("04").compose_plan("Wave", 5, seed=0)


def test_composition_joins_the_planned_frames():
    import numpy as np

    videos = {f"{k}_0": np.full((16, 2, 2, 3), 16 * k, np.uint8) + np.arange(16, dtype=np.uint8)[:, None, None, None]
              for k in range(4)}  # fmt: skip
    plan = [(f"{k}_0", [0, 3, 7, 15]) for k in (2, 0, 3, 1)]
    out = load_stage("04").compose(videos, plan)
    assert out[:, 0, 0, 0].tolist() == [32, 35, 39, 47, 0, 3, 7, 15, 48, 51, 55, 63, 16, 19, 23, 31]


def test_summary_is_mean_and_sample_deviation():
    assert load_stage("05").summary([1.0, 2.0, 4.0]) == {"mean": 2.3333, "std": 1.5275, "n": 3, "values": [1.0, 2.0, 4.0]}
    assert load_stage("05").summary([1.0])["std"] is None


@pytest.mark.parametrize(("clips", "epochs"), [(8, 300), (40, 60), (80, 60), (9, 150)])
def test_small_sets_train_for_at_least_300_steps(clips, epochs):
    stage = load_stage("05")
    assert stage.num_epochs(clips, stage.PROTOCOLS["demo"]) == epochs


def test_random_clips_depend_on_the_repeat_and_the_class_only():
    select = load_stage("05").select_random
    clips = {c: ({f"{c}{i}": i for i in range(20)}, None) for c in ("Walk", "Wave", "Kick")}
    chosen = select(clips, 5, 0, 1)
    assert all(len(set(names)) == 5 for names in chosen.values())
    assert select({"Wave": clips["Wave"]}, 5, 0, 1)["Wave"] == chosen["Wave"]
    assert select(clips, 5, 0, 2) != chosen
