"""Stage 03 against exact references: diffusers' steps and pipeline, and a model whose denoiser is known."""

import contract

import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import load
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, TextToVideoSDPipeline
from transformers import CLIPTokenizer

import common

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LEADING = {"timestep_spacing": "leading"}
OPTIONS = dict(sampler="gvd", guidance=0.0, guidance_form="ddim", stop=0.5, decay="none", strength=0.7)
OPTIONS |= dict(steps=5, cfg=4.0, seed=0, micro_batch=None)
TEXT, EMPTY, ONE = torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 4, 16, 1, 1)
CPU = torch.device("cpu")


class UnitGaussian:
    """In place of the U-Net: the exact denoiser of unit-Gaussian data, eps = sqrt(1 - abar) * x."""

    dtype = torch.float32

    def __init__(self, scheduler):
        self.alphas, self.inputs, self.timesteps = scheduler.alphas_cumprod, [], []

    def __call__(self, x, t, states, cross_attention_kwargs):
        self.inputs.append(x)
        self.timesteps.append(int(t))
        return Namespace(sample=(1 - self.alphas[t]).sqrt() * x)


def sample(model, scheduler, prototypes, **given):
    """The stage's own loop, with two prompts that differ."""
    generators, args = [contract.generator(0, "toy")], Namespace(**{**OPTIONS, **given})
    return load("03").sample(model, scheduler, TEXT, EMPTY, prototypes, generators, args)


def displacement(scheduler, **given):
    """How far the loop moves the toy towards a prototype at 1 from a start at 0: [16] frames.

    The toy is linear: half the difference between prototypes at 1 and -1, whatever noise it starts from.
    """
    plus, minus = (sample(UnitGaussian(scheduler), scheduler, c, **given) for c in (ONE, -ONE))
    return (plus - minus)[0, 0].flatten() / 2


@pytest.fixture
def scheduler():
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)


TABLE = {  # strength: displacement, rounded to two places (docs/paper_notes.md); two entries are 0.0005 off
    ("ddim", 25): {0.01: 0.02, 0.05: 0.10, 0.1: 0.19, 0.5: 0.84, 1.0: 1.46},
    ("ddim", 50): {0.01: 0.02, 0.05: 0.10, 0.1: 0.20, 0.5: 0.87, 1.0: 1.50},
    ("released-ddim", 25): {0.01: 0.03, 0.05: 0.15, 0.1: 0.29, 0.5: 1.14, 1.0: 1.73},
    ("released-ddim", 50): {0.01: 0.06, 0.05: 0.30, 0.1: 0.57, 0.5: 1.75, 1.0: 2.08},
    ("released-ddpm", 50): {0.01: 0.03, 0.05: 0.12, 0.1: 0.22, 0.5: 0.73, 1.0: 0.93},
    ("x0", 50): {0.05: 0.03, 0.1: 0.05, 0.5: 0.25, 1.0: 0.48},
}


@pytest.mark.parametrize(("form", "steps"), TABLE)
def test_displacement_of_every_guidance_form(scheduler, form, steps):
    for strength, expected in TABLE[form, steps].items():
        moved = displacement(scheduler, guidance_form=form, steps=steps, guidance=strength).mean().item()
        assert moved == pytest.approx(expected, abs=0.0055), strength


def test_solvers_and_step_counts_move_equally_far(scheduler):
    pairs = (scheduler, 25), (DPMSolverMultistepScheduler.from_config(scheduler.config), 20), (scheduler, 100)
    ddim, dpmpp, many = (displacement(s, steps=n, guidance=0.1).mean().item() for s, n in pairs)
    assert ddim == pytest.approx(many, rel=0.1) and dpmpp == pytest.approx(many, rel=0.15)


def test_decay_weakens_later_frames_by_eq_8(scheduler):
    linear, none = (displacement(scheduler, guidance=0.01, steps=50, decay=d) for d in ("linear", "none"))
    assert (linear[0] / linear[15]).item() == pytest.approx(16, rel=0.01)
    assert torch.allclose(none, linear[0].expand(16), atol=1e-6)


def test_guidance_ends_at_the_stop(scheduler):
    """Every step before the stop is guided, every later one the library's."""
    model = UnitGaussian(scheduler)
    sample(model, scheduler, ONE, steps=10, guidance=0.3)
    assert model.timesteps == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for t, x, after in zip(model.timesteps, model.inputs, model.inputs[1:], strict=False):
        step = scheduler.step((1 - scheduler.alphas_cumprod[t]).sqrt() * x, t, x).prev_sample
        assert torch.equal(step, after) == (t < 500), t


def test_released_ddpm_without_guidance_is_the_library_s_step(scheduler):
    reference = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(10)
    reference.set_timesteps(10)
    x, eps, c = torch.randn(3, 2, 4, 16, 2, 3, generator=contract.generator(0, "ddpm"))
    for t in scheduler.timesteps[:-1]:  # in the last the two schedulers end at different noise levels
        noise = torch.randn(x.shape, generator=contract.generator(0, int(t)))
        ours = common.guided_ddim_step(scheduler, eps, t, x, c, torch.zeros(16), "released-ddpm", noise)
        theirs = reference.step(eps, t, x, generator=contract.generator(0, int(t))).prev_sample
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), t


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_k_noise_starts_from_the_noised_first_frame(scheduler, solver):
    used, start = scheduler, 20 * 34 + 1
    if solver == "dpmpp":
        used, start = DPMSolverMultistepScheduler(**BETAS, **LEADING), 19 * 35 + 1
    c, model = torch.randn(1, 4, 16, 2, 2, generator=contract.generator(0, "c")), UnitGaussian(scheduler)
    for _ in range(2):  # no state is left from one batch to the next
        sample(model, used, c, sampler="knoise", steps=50)
    x, alpha = model.inputs, scheduler.alphas_cumprod[start]
    assert len(x) == 70 and model.timesteps[0] == start
    assert torch.equal(x[0], x[35]) and torch.equal(x[34], x[69])
    noise = torch.randn(4, 16, 2, 2, generator=contract.generator(0, "toy"))
    assert torch.allclose(x[0][:1], alpha.sqrt() * c[:, :, :1] + (1 - alpha).sqrt() * noise, atol=1e-5)


def test_videos_per_forward_on_a_gpu(monkeypatch):
    """By memory; and no attention over time of more than 65,535 sequences, 2 x videos x h x w of them."""
    sizes = (80, 32, 56, 8), (24, 32, 56, 8), (12, 32, 56, 5), (8, 32, 56, 1), (500, 72, 128, 3)
    for gigabytes, *sides, expected in sizes:
        properties = Namespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        part = load("03").micro_batch(Namespace(**OPTIONS), torch.device("cuda"), (8, 4, 16, *sides))
        assert part == expected


@pytest.mark.parametrize("spacing", [{}, LEADING])
@pytest.mark.parametrize("steps", [*range(1, 26), 50, 100])
def test_step_counts_of_dpmpp_are_the_library_s(steps, spacing):
    solver, config = DPMSolverMultistepScheduler(**BETAS, **spacing), {**BETAS, **spacing}
    solver.set_timesteps(steps)
    config |= {"num_train_timesteps": 1000}
    if min(950, 1000 - 1250 / steps) <= solver.timesteps[0] < 1000:
        return load("03").check_steps(config, steps, "dpmpp")
    with pytest.raises(contract.ContractError, match=f"--steps {steps}:.*\n.*usable: .*25, 50"):
        load("03").check_steps(config, steps, "dpmpp")


@pytest.fixture(scope="module")
def parts(empty):
    """The random model's U-Net as stage 03 prepares it, the same untouched, embeddings of two prompts."""
    torch.set_num_threads(1)
    ours, stock = (common.load_part(empty.model / "unet", "unet", CPU, torch.float32) for _ in range(2))
    for network in (ours, stock):  # the last temporal convolutions begin at zero and would hide others
        generator = contract.generator(0, "weights")
        for weight in (weight for weight in network.parameters() if not weight.any()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    ours.set_attn_processor(load("03").PromptAttention())
    text = common.embed(empty.model, {"Walk": "a man walks"}, CPU)
    return ours, stock, (text["a man walks"], text[""])


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_sampling_without_guidance_equals_the_library_s_pipeline(empty, parts, cfg, monkeypatch):
    """After every step: same weights, noise, prompt, steps and scale; tolerance 1e-5 in float32."""
    unet, stock, text = parts
    scheduler, step = DDIMScheduler.from_pretrained(empty.model / "scheduler"), common.guided_ddim_step
    reached, passed, generator, shape = [], [], contract.generator(0, "p"), (1, 4, 16, 8, 10)
    noise, args = torch.randn(shape[1:], generator=generator)[None], Namespace(**{**OPTIONS, "cfg": cfg})
    monkeypatch.setattr(common, "guided_ddim_step", lambda *a: reached.append(step(*a)) or reached[-1])
    given = (*text, torch.ones(shape), [contract.generator(0, "p")], args)
    ours = load("03").sample(unet, scheduler, *given)
    networks = {p: common.load_part(empty.model / p, p, CPU, torch.float32) for p in ("vae", "text_encoder")}
    tokenizer = CLIPTokenizer.from_pretrained(empty.model / "tokenizer")
    pipeline = TextToVideoSDPipeline(unet=stock, tokenizer=tokenizer, scheduler=scheduler, **networks)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=5, guidance_scale=cfg, height=32, width=40, output_type="latent")
    options |= dict(latents=noise.clone(), callback=lambda i, t, z: passed.append(z))
    theirs = pipeline("a man walks", **options).frames
    assert len(reached) == len(passed) == 5
    for mine, library in zip([*reached, ours], [*passed, theirs], strict=True):
        assert (mine - library).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["ddim", "released-ddpm"])
def test_a_video_does_not_depend_on_the_rest_of_its_batch(parts, form):
    (unet, _, text), scheduler, sample_batch = parts, DDIMScheduler(**BETAS), load("03").sample_batch
    c, names = torch.randn(3, 4, 16, 4, 4), [("Walk", k, 1) for k in range(3)]
    args = Namespace(**{**OPTIONS, "guidance": 0.1, "guidance_form": form, "steps": 3})
    whole, alone = (sample_batch(unet, scheduler, *text, c[i:], names[i:], args, CPU) for i in (0, 2))
    assert torch.allclose(whole[2:], alone, atol=1e-4) and not torch.allclose(whole[:1], alone, atol=0.1)


# --- the stage


def latents(place, name):
    return np.load(place.work / f"demo/03_samples/ipc2/{name}/Walk/1_0.npy")


def test_every_class_prototype_and_draw_has_its_own_noise(sampled, tmp_path, monkeypatch):
    place, drawn, draw = sampled.copy(tmp_path / "work"), [], contract.generator
    monkeypatch.setattr(contract, "generator", lambda seed, *names: drawn.append(names) or draw(seed, *names))
    assert place.run("03", "--name", "own", "--sampler", "naive")[0] == 0
    numbers = sorted({path.stem for path in place.work.glob("demo/03_samples/ipc2/own/*/*.mp4")})
    files = [(label, *map(int, number.split("_"))) for label in ("Walk", "Wave") for number in numbers]
    assert sorted(drawn) == sorted(("03", *file) for file in files) and len({*drawn}) == len(files) > 8


def test_variants_have_folders_of_their_own(sampled, tmp_path):
    """naive reads no prototypes and is gvd at strength 0, bit for bit; another value makes a folder stale."""
    place, once = sampled.copy(tmp_path / "work"), "--draws 1 --dtype float32 --save-latents"
    knoise = "--sampler knoise --prototypes direct --name knoise"
    variants = (
        "--guidance 0 --name zero",
        knoise,
        "--decay none --name plain",
        "--prompt-file none --name empty",
    )
    variants += "--scheduler dpmpp --steps 5 --name dpm", "--guidance-form released-ddpm --name released"
    for words in variants:
        code, text = place.run("03", *once.split(), *words.split())
        assert code == 0 and "03 on cpu in float32, U-Net " in text, text
    text = place.run("03", *once.split(), *knoise.split(), "--strength", 0.5)[1]
    assert "03 stale: strength 0.7 -> 0.5" in text, text
    code, text = place.run("03", "--sampler", "knoise", "--name", "other")
    assert code == 3 and "ipc2/dummy-video" in text and "--cluster dummy-video" in text, text
    shutil.rmtree(place.work / "demo/02_prototypes")
    assert place.run("03", *once.split(), "--sampler", "naive")[0] == 0
    names = ("zero", "knoise.old-1", "plain", "empty", "dpm", "released", "naive")
    found = [latents(place, name).tobytes() for name in names]
    assert found[0] == found[-1] and len({*found}) == 6


def test_latents_are_added_later(sampled, tmp_path):
    """Asked for later they are sampled again: the same as at once, and no .mp4 is written anew."""
    later, at_once = (sampled.copy(tmp_path / name) for name in ("later", "at once"))
    videos = {path: path.stat().st_mtime_ns for path in later.work.glob("demo/03_samples/**/*.mp4")}
    assert len(videos) == 16 and not list(later.work.glob("demo/03_samples/**/*.npy"))
    code, text = later.run("03", "--save-latents")
    assert code == 0 and "32 files" in text and "stale" not in text, text
    assert videos == {path: path.stat().st_mtime_ns for path in videos}
    shutil.rmtree(at_once.work / "demo/03_samples")
    assert at_once.run("03", "--save-latents")[0] == 0
    assert later.files() == at_once.files() and "03 fresh" in later.run("03")[1]


def test_options_that_do_not_go_together_are_usage_errors(empty):
    for words in (
        "--scheduler dpmpp --guidance-form x0", "--sampler naive --guidance 0.3", "--sampler knoise --stop 0",
        "--strength 0.5", "--sampler knoise --strength 0.1", "--decay linear1", "--size 64x64",
    ):  # fmt: skip
        code, text = empty.run("03", *words.split())
        assert code == 2 and "error: " in text, words


def test_a_batch_that_is_not_finite_is_sampled_again_in_float32(sampled, tmp_path, monkeypatch):
    """Weights that overflow float16 in their sums, not float32."""
    place, load_part = sampled.copy(tmp_path / "work"), common.load_part

    def overflowing(folder, part, device, dtype):
        network = load_part(folder, part, device, dtype)
        if part == "unet":
            network.conv_in.weight.mul_(30000)
        return network

    monkeypatch.setattr(common, "load_part", overflowing)
    for dtype in ("float16", "float32"):
        words = f"--classes Walk --draws 1 --save-latents --dtype {dtype} --name {dtype}"
        code, text = place.run("03", *words.split())
        again = "03 Walk, draw 0: not finite in torch.float16, once more in float32" in text
        assert code == 0 and again == (dtype == "float16"), text
    assert np.allclose(latents(place, "float16"), latents(place, "float32"), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_stays_not_finite_is_an_error_that_names_the_item(sampled, tmp_path, monkeypatch, dtype):
    """Latents that float16 cannot hold; frames of a VAE with a NaN. What is finished stays."""
    place, stage, model = sampled.copy(tmp_path / "work"), load("03"), tmp_path / "model"
    sample_batch, factor = stage.sample_batch, torch.tensor([1, 1e6]).view(2, 1, 1, 1, 1)
    monkeypatch.setattr(stage, "sample_batch", lambda *a: sample_batch(*a) * factor)
    code, text = place.run("03", "--dtype", dtype, "--name", "large")
    assert code == 3 and "large/Walk/1_0.mp4: latents are not finite" in text, text
    assert ("once more" in text) == (dtype == "bfloat16")
    assert [p.name for p in place.work.glob("demo/03_samples/ipc2/large/*/*")] == ["0_0.mp4"]
    monkeypatch.undo()
    shutil.copytree(place.model, model)
    vae = common.load_part(model / "vae", "vae", CPU, torch.float32)
    vae.decoder.conv_out.bias[0] = torch.nan
    vae.save_pretrained(model / "vae")
    code, text = place._replace(model=model).run("03", "--dtype", dtype, "--name", "nan", "--save-latents")
    assert code == 3 and "nan/Walk/0_0.mp4: a decoded frame is not finite" in text, text
    assert not list(place.work.glob("demo/03_samples/ipc2/nan/*/*"))
