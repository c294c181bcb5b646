"""Fine-tuning (eq. 3), the prompts, and the real model: its configuration, its parts, what is said when one is wrong."""

import contextlib
import fnmatch
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, Place, load_stage

import common
import contract

TOOL = REPO / "tools" / "finetune_unet.py"
if not TOOL.exists():
    pytest.skip("tools/ is not here", allow_module_level=True)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


def load_tool(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


tool = load_tool("finetune_unet")


def words(place, *extra):
    """A command line of the tool on the tiny world and model: 6 steps of 4 clips."""
    shared = ["--work-dir", place.work, "--data-root", place.data, "--model", place.model, "--classes", ",".join(CLASSES)]
    return [*map(str, [TOOL, "demo", "--steps", 6, "--batch", 4, "--dtype", "float32", *shared, *extra])]


def tune(place, *extra):
    """Runs the tool in this process: (exit code, what it printed)."""
    out, before, code = io.StringIO(), sys.argv, 0
    sys.argv = words(place, *extra)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            contract.run(tool.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv, contract.open_log.path = before, None
    return code, out.getvalue()


def run_all(root, *options):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(["bash", "run_all.sh", *options], cwd=root, capture_output=True, text=True, env=environment)


def load(folder, part="unet"):
    return common.load_part(folder, part, CPU, torch.float32)


@pytest.fixture(scope="module")
def tuned(done, tmp_path_factory):
    """The finished chain with a fine-tuned U-Net beside it; not to be changed."""
    place = done.copy(tmp_path_factory.mktemp("tuned") / "work")
    code, text = tune(place)
    assert code == 0, text
    return place


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the step
# ---------------------------------------------------------------------------------------------------------------------


def test_first_loss_is_eq_3(tuned):
    """Computed again from the formula, with the library's own forward."""
    args = SimpleNamespace(seed=0, batch=4)
    chosen, dropped, t, noise = tool.draw(0, 10, (4, 16, 8, 8), 1000, args)
    x0 = np.concatenate([np.load(tuned.work / f"demo/01_latents/{c}.npy") for c in CLASSES])[chosen.numpy()]
    x0 = torch.from_numpy(x0).float().transpose(1, 2)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(-1, 1, 1, 1, 1)
    z = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    prompts = json.loads((REPO / "prompts/demo.json").read_text())
    texts = ["" if drop else prompts[CLASSES[i >= 5]] for i, drop in zip(chosen, dropped, strict=True)]
    with torch.no_grad():
        states = torch.cat([common.embed(tuned.model, [text], CPU)[text] for text in texts])
        predicted = load(tuned.model / "unet")(z, t, states).sample
    rows = common.read_csv(tuned.work / "demo/03_unet/default/loss.csv")
    assert float(rows[0]["loss"]) == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert float(rows[0]["rate"]) == pytest.approx(tool.RATE["demo"] / tool.WARM_UP)


def test_what_a_step_draws():
    args = SimpleNamespace(seed=0, batch=8)
    a, b = (tool.draw(7, 100, (4, 16, 2, 2), 1000, args) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (tool.draw(8, 100, (4, 16, 2, 2), 1000, args),
                  tool.draw(7, 100, (4, 16, 2, 2), 1000, SimpleNamespace(seed=1, batch=8))):  # fmt: skip
        assert not torch.equal(a[3], other[3]) and not torch.equal(a[2], other[2])
    draws = [tool.draw(step, 100, (1,), 1000, args) for step in range(1000)]
    assert (torch.stack([t for _, _, t, _ in draws]) // 125 == torch.arange(8)).all()
    share = torch.cat([dropped for _, dropped, _, _ in draws]).float().mean().item()
    assert abs(share - tool.TEXT_DROPOUT) < 0.015  # 4.5 standard deviations
    clips = torch.cat([chosen for chosen, *_ in draws]).bincount(minlength=100)
    assert len(clips) == 100 and clips.min() > 30


def gradients(network, part=4):
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 16, 8, 8, generator=generator)
    states, t = torch.randn(4, 12, 8, generator=generator), torch.tensor([1, 250, 600, 999])
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    loss = tool.backward(network, scheduler, x0, noise, t, states, part, CPU, torch.float32)
    return loss, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance):
    assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert (gradient - b[1][name]).norm() <= tolerance * (gradient.norm() + 1e-6), name


def test_forms_for_the_cpu_and_micro_batches_change_nothing(empty):
    plain = gradients(load(empty.model / "unet").requires_grad_(True))
    fast, _ = tool.prepare(load(empty.model / "unet"), CPU, None, 0)
    assert_same(plain, gradients(fast), 1e-4)
    for part in (1, 3):
        assert_same(plain, gradients(load(empty.model / "unet").requires_grad_(True), part), 1e-4)


def test_gradient_checkpointing_keeps_less_and_changes_nothing(empty):
    def kept(network):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            result = gradients(network)
        return result, sum(sizes)

    network = load(empty.model / "unet").requires_grad_(True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        network.enable_gradient_checkpointing()  # why the tool wraps the layers itself
    plain, much = kept(network)
    network = load(empty.model / "unet").requires_grad_(True)
    tool.checkpoint_layers(network)
    wrapped, little = kept(network)
    assert_same(plain, wrapped, 0)
    assert little < much / 4


def test_a_loss_that_is_not_finite_stops(done, tmp_path):
    place = done.copy(tmp_path / "work")
    code, text = tune(place, "--rate", "1e30")
    assert code == 3 and "not finite" in text and "smaller --rate" in text, text


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def test_folder_is_an_artifact_that_stage_03_takes(tuned, tmp_path):
    place = tuned.copy(tmp_path / "work")
    folder = place.work / "demo/03_unet/default"
    assert sorted(json.loads((folder / "manifest.json").read_text())["outputs"]) == sorted(tool.FILES)
    assert not (folder / ".checkpoint.pt").exists()
    assert (folder / "config.json").read_bytes() == (place.model / "unet/config.json").read_bytes()
    before, after = load(place.model / "unet").state_dict(), load(folder).state_dict()
    moved = [(after[name] - value).abs().max().item() for name, value in before.items()]
    assert 0 < max(moved) < 0.01
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "finetune fresh" in tune(place)[1]

    assert "03 fresh" in place.run("03")[1]
    code, text = place.run("03", "--unet", folder, "--name", "tuned")
    assert code == 0, text
    pair = [np.load(place.work / f"demo/03_samples/ipc2/{name}/Walk/0_0.npy") for name in ("gvd", "tuned")]
    assert not np.array_equal(*pair)
    (folder / "log.txt").write_text("another run's")  # no part of the U-Net
    assert "03 fresh" in place.run("03", "--unet", folder, "--name", "tuned")[1]

    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    code, text = place.run("03", "--unet", folder, "--name", "tuned")
    assert code == 3 and f"{WEIGHTS} is damaged" in text and "tools/finetune_unet.py" in text, text
    code, text = tune(place)
    assert code == 3 and "python tools/finetune_unet.py demo" in text.replace(sys.executable, "python"), text
    assert tune(place, "--redo")[0] == 0
    assert place.run("03", "--unet", folder, "--name", "tuned")[0] == 0


def test_steps_and_inputs_make_it_stale(tuned, tmp_path):
    place = tuned.copy(tmp_path / "work")
    text = tune(place, "--steps", 7, "--dry-run")[1]
    assert "stale: steps 6 -> 7" in text and "0 of 7 steps" in text, text
    prompts = {c: "a person" for c in CLASSES}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    assert "stale: prompts changed" in tune(place, "--prompt-file", tmp_path / "p.json", "--dry-run")[1]


def test_killed_while_a_checkpoint_is_written(tuned, done, tmp_path):
    """SIGKILL with the third checkpoint half on disk: taken up from the second, with the same bytes in the end."""
    killed = f"""
import os, runpy, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(REPO)!r})
import torch
count, save = [], torch.save
def stop(state, handle):
    count.append(1)
    if len(count) == 3:
        handle.write(b"half")
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, handle)
torch.save = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    place = done.copy(tmp_path / "work")
    run = subprocess.run([sys.executable, "-c", killed, *words(place, "--checkpoint", 2)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    folder = place.work / "demo/03_unet/default"
    assert len(torch.load(folder / ".checkpoint.pt", weights_only=True)["losses"]) == 4
    assert len(list(folder.glob(".tmp-*"))) == 1 and not (folder / "manifest.json").exists()
    steps, original = [], tool.rate_at
    tool.rate_at = lambda step, args: steps.append(step) or original(step, args)
    try:
        code, text = tune(place, "--checkpoint", 100)
    finally:
        tool.rate_at = original
    assert code == 0, text
    assert steps == [4, 5, *range(6)]  # trained: only what was left; then the rows of loss.csv
    assert place.files() == tuned.files()


def test_lora_moves_attention_alone_and_keeps_the_layout(tuned, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    place = tuned.copy(tmp_path / "work")
    code, text = tune(place, "--lora", 2, "--name", "lora", "--checkpoint", 3)
    assert code == 0, text
    before, after = load(place.model / "unet").half().state_dict(), load(place.work / "demo/03_unet/lora").half().state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0") and ".attn" in name for name in moved), moved
    change = (after[name := sorted(moved)[0]] - before[name]).float()
    assert torch.linalg.matrix_rank(change, atol=1e-3 * change.norm()) <= 4  # rank 2, and float16's rounding
    again = tuned.copy(tmp_path / "again")
    assert tune(again, "--lora", 2, "--name", "lora")[0] == 0
    assert place.files() == again.files()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 03's choice, and the whole run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "fine_tuned"), [("hmdb51", 1), ("miniucf", 1), ("ucf101", 0), ("demo", 0)])
def test_default_unet(tuned, tmp_path, monkeypatch, dataset, fine_tuned):
    stage = load_stage("03")
    options = ["--work-dir", str(tmp_path), "--model", str(tuned.model)]
    monkeypatch.setattr(sys, "argv", [str(REPO / "03_guided_sample.py"), dataset, "2", *options])
    if not fine_tuned:
        assert stage.open_model(stage.parse_args())[1] == tuned.model / "unet"
        return
    with pytest.raises(contract.Missing) as error:
        stage.open_model(stage.parse_args())
    assert f"tools/finetune_unet.py {dataset} --work-dir" in str(error.value)
    assert f"03_guided_sample.py {dataset} 2 {' '.join(options)} --unet published" in str(error.value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--unet", "published"])
    assert stage.open_model(stage.parse_args())[1] == tuned.model / "unet"
    shutil.copytree(tuned.work / "demo/03_unet", tmp_path / dataset / "03_unet")
    sys.argv = sys.argv[:-2]
    _, unet, inputs = stage.open_model(stage.parse_args())
    assert unet == tmp_path / dataset / "03_unet/default"
    (unet / "timing.json").write_text("{}")
    assert stage.open_model(stage.parse_args())[2] == inputs


@pytest.mark.parametrize(
    ("dataset", "extra", "fine_tuned"), [("hmdb51", [], 1), ("hmdb51", ["published"], 0), ("ucf101", [], 0)]
)
def test_plan_of_the_whole_run(tmp_path, dataset, extra, fine_tuned):
    unet = ["--unet", *extra] if extra else []
    run = run_all(REPO, dataset, "20", "--from", "3", "--to", "3", "--work-dir", str(tmp_path), "--dry-run", *unet)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1].startswith("03 after finetune" if fine_tuned else "03 its input is not there yet")
    assert len(lines) == (3 if fine_tuned else 1)
    if fine_tuned:
        assert "28 GB for weights" in lines[0]
        assert lines[1].startswith("finetune its input is not there yet: 0 of 2,500 steps; about 1.5 h on an A100")


def test_fine_tuning_needs_tools(tmp_path):
    ignored = shutil.ignore_patterns("demo", "tools", "work", "data", ".venv", ".git", "__pycache__", "tests")
    shutil.copytree(REPO, tmp_path / "gvd", ignore=ignored)
    run = run_all(tmp_path / "gvd", "hmdb51", "20", "--from", "3", "--to", "3", "--dry-run")
    assert run.returncode == 2 and "--unet published" in run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def set_key(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: set_key(m / "unet/config.json", _class_name="UNet2DConditionModel"), "found:    UNet2DConditionModel"),
        (lambda m: set_key(m / "unet/config.json", cross_attention_dim=16), "expected: cross_attention_dim 8"),
        (lambda m: set_key(m / "unet/config.json", in_channels=9), "found:    [9, 4]"),
        (lambda m: set_key(m / "vae/config.json", latent_channels=16), "expected: latent_channels 4"),
        (lambda m: set_key(m / "text_encoder/config.json", architectures=["T5EncoderModel"]), "found:    ['T5EncoderModel']"),
        (lambda m: set_key(m / "scheduler/scheduler_config.json", prediction_type="v_prediction"), "prediction_type"),
        (lambda m: shutil.rmtree(m / "text_encoder"), "text_encoder/config.json is missing"),
        (lambda m: (m / "unet" / WEIGHTS).unlink(), "unet holds no weights"),
        (lambda m: (m / "tokenizer/tokenizer.json").unlink(), "tokenizer holds no vocabulary"),
        (lambda m: (m / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing"),
        (lambda m: cut(m / "unet" / WEIGHTS), "cannot be loaded as UNet3DConditionModel"),
        (lambda m: cut(m / "text_encoder/model.safetensors"), "cannot be loaded as CLIPTextModel"),
        (lambda m: cut(m / "tokenizer/tokenizer.json"), "tokenizer"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_one_message(done, tmp_path, change, expected):
    model = tmp_path / "model"
    shutil.copytree(done.model, model)
    change(model)
    place = Place(done.data, model, done.copy(tmp_path / "work").work)
    for code, text in (place.run("03"), tune(place)):
        assert code == 3 and "error: " in text and "Traceback" not in text, text
        assert expected in text and str(model) in text, text


@pytest.mark.parametrize("name", ["nobody/nothing", "ali-vilab/text-to-video-ms-1.7b"])
def test_no_network(done, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = done.copy(tmp_path / "work")
    for code, text in (place.run("03", "--model", name), tune(place, "--model", name)):
        assert code == 3 and f"hf download {name} --local-dir FOLDER ; then --model FOLDER" in text, text


def test_half_precision_files_are_taken_where_present(done, tmp_path):
    """The full-precision files beside them are broken, so only the others can have been read."""
    model = tmp_path / "model"
    shutil.copytree(done.model, model)
    for part in ("unet", "vae", "text_encoder"):
        network = load(done.model / part, part).half()
        network.save_pretrained(model / part, variant="fp16")
        whole = [path for path in (model / part).glob("*.safetensors") if ".fp16." not in path.name]
        assert len(whole) == 1
        whole[0].write_bytes(b"broken")
        loaded = load(model / part, part).state_dict()
        for key, value in network.state_dict().items():
            assert torch.equal(loaded[key], value.float()), key


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_models_without_safetensors_load(empty, tmp_path, variant):
    """Older fine-tunes are only there as .bin."""
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        folder, expected = tmp_path / part, load(empty.model / part, part).state_dict()
        folder.mkdir()
        shutil.copy(empty.model / part / "config.json", folder)
        torch.save(expected, folder / f"{name}{variant}.bin")
        loaded = load(folder, part).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("unet", "expected"),
    [
        (["d.safetensors", "d.fp16.safetensors", "d.bin", "d.fp16.bin"], ["d.fp16.safetensors"]),
        (["d.safetensors", "d.bin"], ["d.safetensors"]),
        (["d.bin"], ["d.bin"]),
    ],
)
def test_what_is_downloaded(empty, tmp_path, monkeypatch, unet, expected):
    """From a hub that holds every kind of file, and files that no stage reads."""
    import huggingface_hub

    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(empty.model, hub)
    for name in unet:
        (hub / "unet" / name).write_bytes(b"weights")
    if WEIGHTS not in unet:
        (hub / "unet" / WEIGHTS).unlink()
    (hub / "README.md").write_text("read me")

    def snapshot_download(name, allow_patterns, local_files_only):
        assert name == "someone/model"
        for path in hub.rglob("*"):
            relative = path.relative_to(hub).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / relative)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    args = SimpleNamespace(model="someone/model", dataset="hmdb51", dry_run=False)
    assert common.model_folder(args) == cache
    assert sorted(path.name for path in (cache / "unet").iterdir()) == ["config.json", *expected]
    assert not (cache / "README.md").exists() and (cache / "vae" / WEIGHTS).exists()


def test_random_model_has_the_published_configuration(tmp_path):
    random = load_tool("make_random_t2v")
    counts = {part: sum(p.numel() for p in random.make(part).parameters()) for part in ("unet", "vae", "text_encoder")}
    assert counts == {"unet": 1_411_233_860, "vae": 83_653_863, "text_encoder": 340_387_840}
    assert abs(counts["unet"] - tool.WEIGHTS) < 1e6
    schedule = random.SCHEDULER
    assert schedule["steps_offset"] == 1 and not schedule["clip_sample"] and not schedule["set_alpha_to_one"]
    abar = np.cumprod(1 - np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000) ** 2)
    assert abar[[999, 501]] == pytest.approx([0.0047, 0.275], rel=0.01)


def test_random_weights_load_and_repeat(tmp_path, monkeypatch):
    """The same code at a small size: every weight is given a finite value, the same for the same seed."""
    random = load_tool("make_random_t2v")
    small = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 8}
    monkeypatch.setattr(random, "UNET", {**random.UNET, **small})
    monkeypatch.setattr(random, "TEXT_ENCODER", {**random.TEXT_ENCODER, "hidden_size": 32, "intermediate_size": 32})
    for part in ("unet", "text_encoder"):
        for name in ("a", "b"):
            random.write_network(random.make(part), tmp_path / name / part, torch.bfloat16, 0)
        files = [next((tmp_path / name / part).glob("*.safetensors")).read_bytes() for name in ("a", "b")]
        assert files[0] == files[1]
        assert all(p.isfinite().all() for p in load(tmp_path / "a" / part, part).parameters())
    random.write_tokenizer(tmp_path / "tokenizer")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer("a man, 2 dogs", padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(tokenizer) == 49408 and len(ids) == 77 and ids[0] == 49406 and ids[-1] == 49407 and max(ids[1:11]) < 512


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", sorted(common.DATASETS))
def test_every_class_has_one_descriptive_sentence(dataset):
    file = "ucf101" if dataset == "miniucf" else dataset
    prompts = json.loads((REPO / "prompts" / f"{file}.json").read_text())
    assert set(common.DATASETS[dataset]["classes"]) <= prompts.keys()
    assert dataset == "miniucf" or len(prompts) == len(common.DATASETS[dataset]["classes"])
    assert len(set(prompts.values())) == len(prompts)
    for label, prompt in prompts.items():
        count = len(prompt.replace("-", " ").split())
        assert 12 <= count <= 24, f"{label}: {count} words"  # at three tokens a word still below CLIP's 77
        assert prompt.isascii() and prompt == prompt.strip() and "." not in prompt and "_" not in prompt


def test_prompts_fit_the_text_encoder(real_data):
    """By CLIP's own vocabulary; the longest has 29 tokens with its two ends."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(real_data / "clip_tokenizer")
    for file in ("hmdb51", "ucf101", "demo"):
        prompts = json.loads((REPO / "prompts" / f"{file}.json").read_text())
        assert max(len(tokenizer(prompt).input_ids) for prompt in prompts.values()) <= tokenizer.model_max_length == 77


def test_a_missing_class_is_named(done, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"Walk": "a person walks"}))
    place = done.copy(tmp_path / "work")
    for code, text in (
        place.run("03", "--prompt-file", tmp_path / "p.json"),
        tune(place, "--prompt-file", tmp_path / "p.json"),
    ):
        assert code == 3 and "no prompt for class Wave" in text, text
