"""The method against exact references: the library's own code, a known denoiser, arithmetic by hand."""

import contract

import numpy as np
import pytest
import torch
from conftest import load
from diffusers import DDIMScheduler, TextToVideoSDPipeline

import common
import media


@pytest.fixture
def scheduler():
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def unit_gaussian(scheduler, steps, strengths):
    """Final latents on unit-Gaussian data, whose denoiser is eps = sqrt(1 - abar) * x; prototype at 1."""
    scheduler.set_timesteps(steps)
    x = torch.zeros(1, 4, 16, 1, 1)
    for t in scheduler.timesteps:
        eps, used = (1 - scheduler.alphas_cumprod[t]).sqrt() * x, strengths if t > 500 else 0 * strengths
        x = common.guided_ddim_step(scheduler, eps, t, x, torch.ones_like(x), used)
    return x


def test_without_guidance_every_step_is_the_library_s(scheduler):
    scheduler.set_timesteps(10)
    generator = contract.generator(0, "test")
    x, prototypes = (torch.randn(2, 4, 16, 3, 5, generator=generator) for _ in range(2))
    for t in scheduler.timesteps:
        eps = torch.randn(x.shape, generator=generator)
        ours = common.guided_ddim_step(scheduler, eps, t, x, prototypes, torch.zeros(16))
        assert torch.equal(ours, scheduler.step(eps, t, x).prev_sample)
        x = ours


def test_one_guided_step_by_hand(scheduler):
    """Eq. 6, 9 and 10 in plain numbers, for each frame its own strength."""
    scheduler.set_timesteps(50)
    generator, t = contract.generator(0, "hand"), scheduler.timesteps[10]
    x, eps, c = (torch.randn(2, 4, 16, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    now, then = abar[int(t)], abar[int(t) - 20]
    guided = torch.empty_like(x)
    for f in range(16):
        x0 = (x[:, :, f] - (1 - now) ** 0.5 * eps[:, :, f]) / now**0.5
        moved = eps[:, :, f] - 0.3 * (1 - f / 16) * (1 - now) ** 0.5 * (c[:, :, f] - x0)
        x0 = (x[:, :, f] - (1 - now) ** 0.5 * moved) / now**0.5
        guided[:, :, f] = then**0.5 * x0 + (1 - then) ** 0.5 * moved
    ours = common.guided_ddim_step(scheduler, eps, t, x, c, common.linear_decay(0.3))
    assert torch.allclose(ours, guided, atol=1e-5)


def test_printed_plus_sign_moves_away(scheduler):
    towards, away = (unit_gaussian(scheduler, 50, torch.full((16,), sign * 0.1)) for sign in (1, -1))
    assert towards.mean() == pytest.approx(0.196, abs=0.002) and away.mean() < -0.2


def test_decay_weakens_later_frames_by_the_ratio_of_eq_8(scheduler):
    assert torch.equal(common.linear_decay(0.4, 4), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    moved = unit_gaussian(scheduler, 50, common.linear_decay(0.01)).flatten()[:16]
    assert (moved[0] / moved[15]).item() == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("steps", [*range(1, 21), 25, 50, 100])
def test_step_counts_that_the_schedule_can_serve(scheduler, steps):
    """The rule by arithmetic says the same as the library's timesteps."""
    load("03").check_steps(scheduler.config, steps)
    scheduler.set_timesteps(steps)
    first = scheduler.timesteps[0]
    assert len(scheduler.timesteps) == steps and min(950, 1000 - 1250 / steps) <= first < 1000


def test_decoding_is_the_library_s(empty):
    """Scaling factor, frame order and value range of TextToVideoSDPipeline, to the last grey level."""
    vae = common.load_part(empty.model / "vae", "vae", torch.device("cpu"), torch.float32)
    latents = torch.randn(1, 4, 16, 4, 5, generator=contract.generator(0, "decode"))
    pipeline = TextToVideoSDPipeline(vae=vae, tokenizer=None, text_encoder=None, unet=None, scheduler=None)
    with torch.inference_mode():
        video = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), "np")[0]
    ours = common.decode(vae, latents[0].transpose(0, 1))
    assert ours.shape == (16, 16, 20, 3) and ours.std() > 1 and np.abs(ours - video * 255).max() <= 0.5001


def test_minic3d_parameters_and_shapes():
    net = common.MiniC3D(50).eval()
    assert sum(p.numel() for p in net.parameters()) == 3_647_666
    for side, spatial in ((112, 2), (48, 1), (43, 1)):
        with torch.inference_mode():
            assert net.blocks(torch.zeros(1, 3, 16, side, side)).shape == (1, 128, 4, spatial, spatial)
            assert net(torch.zeros(2, 3, 16, side, side)).shape == (2, 50)


@pytest.mark.parametrize("grouping", ["random", "in-order"])
@pytest.mark.parametrize("frames", ["random", "continuous"])
@pytest.mark.parametrize("pattern", ["4x4", "8x2", "3-3-3-3-2-2", "2x8", "1x16"])
def test_every_video_is_used_once_and_frames_rise(pattern, frames, grouping):
    compose = load("04")
    plan = compose.compose_plan("Walk", 5, 0, pattern, frames, grouping)
    counts = compose.PATTERNS[pattern]
    used = [sample for video in plan for sample, _ in video]
    assert sorted(used) == sorted(f"{k}_{draw}" for k in range(5) for draw in range(len(counts)))
    for k, video in enumerate(plan):
        steps = [np.diff(numbers) for _, numbers in video]
        assert [len(numbers) for _, numbers in video] == [*counts] and sum(counts) == 16
        assert all((step > 0).all() and (frames == "random" or (step == 1).all()) for step in steps)
        assert grouping == "random" or {sample.split("_")[0] for sample, _ in video} == {str(k)}
    assert plan == compose.compose_plan("Walk", 5, 0, pattern, frames, grouping)
    assert grouping == "in-order" or plan != compose.compose_plan("Walk", 5, 1, pattern, frames, grouping)


def test_a_distilled_video_is_the_planned_frames(sampled):
    """Of the generated videos, joined source after source; both were compressed once more: in dB."""
    root = sampled.work / "demo"
    for row in contract.read(root / "04_distilled/ipc2/gvd/metadata.csv"):
        ours, expected = media.read_video(root / "04_distilled/ipc2/gvd" / row["file_name"]), []
        for source, numbers in zip(row["sources"].split(), row["frames"].split(), strict=True):
            video = media.read_video(root / "03_samples/ipc2/gvd" / row["label"] / f"{source}.mp4")
            expected += [video[int(number)] for number in numbers.split("-")]
        error = np.square(ours.astype(float) - np.stack(expected)).mean()
        assert len(ours) == 16 and 10 * np.log10(255**2 / error) > 30


def test_the_distilled_set_opens_in_datasets(sampled, tmp_path, monkeypatch):
    """Also one video beside manifest.json and metadata.csv, which without the card are taken for the data."""
    datasets, place = pytest.importorskip("datasets"), sampled.copy(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert place.run("04", "--limit", 1, "--classes", "Walk", "--name", "one")[0] == 0
    for name, count in (("gvd", 4), ("one", 1)):
        folder, keys = place.work / "demo/04_distilled/ipc2" / name, ("label", "sources", "frames")
        rows = contract.read(folder / "metadata.csv")
        expected = {str(folder / row["file_name"]): tuple(row[key] for key in keys) for row in rows}
        for words, given in (("videofolder", {"data_dir": str(folder)}), (str(folder), {})):
            split = datasets.load_dataset(words, **given)["train"]
            split = split.cast_column("video", datasets.Video(decode=False))
            assert {row["video"]["path"]: tuple(row[key] for key in keys) for row in split} == expected
        assert len(expected) == count
