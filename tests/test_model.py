"""The text-to-video model: its parts and their files, what is said when one is wrong, the prompts."""

import contract

import fnmatch
import json
import shutil
from argparse import Namespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import REPO, load
from transformers import CLIPTokenizer

import common
import media

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}


def part_of(model, part):
    return common.load_part(model / part, part, torch.device("cpu"), torch.float32)


def change(path, **values):
    """Other values in a JSON file; without any the first 100 bytes of a file, or nothing of a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    elif values:
        contract.save(path, {**contract.read(path), **values})
    else:
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "found:    UNet2DConditionModel"),
        (
            "unet/config.json",
            {"cross_attention_dim": 16},
            "cross_attention_dim\n  expected: 8\n  found:    16",
        ),
        ("unet/config.json", {"in_channels": 9}, "found:    9"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels\n  expected: 4\n  found:    16"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "found:    ['T5EncoderModel']"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("text_encoder", {}, "text_encoder/config.json is missing"),
        ("scheduler", {}, "scheduler/scheduler_config.json is missing"),
        (f"unet/{WEIGHTS}", {}, "unet cannot be loaded as UNet3DConditionModel"),
        ("text_encoder/model.safetensors", {}, "text_encoder cannot be loaded as CLIPTextModel"),
        ("tokenizer/tokenizer.json", {}, "tokenizer cannot be loaded"),
    ],
)
def test_a_model_that_does_not_fit_is_one_message(latents, tmp_path, name, values, expected):
    shutil.copytree(latents.model, tmp_path / "model")
    change(tmp_path / "model" / name, **values)
    place = latents.copy(tmp_path / "work")._replace(model=tmp_path / "model")
    for script in ("03", "tools/finetune_unet.py"):
        code, text = place.run(script)
        assert code == 3 and "error: " in text and "Traceback" not in text, text
        assert expected in text and str(tmp_path / "model") in text, text


def test_a_tokenizer_without_vocabulary_and_a_unet_without_files(latents, tmp_path):
    """The library would take the tokenizer and give every prompt the same embedding."""
    shutil.copytree(latents.model, tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer.json").unlink()
    (tmp_path / "model/unet" / WEIGHTS).unlink()
    place = latents.copy(tmp_path / "work")
    code, text = place._replace(model=tmp_path / "model").run("03")
    assert code == 3 and "tokenizer has no vocabulary" in text, text
    for folder, expected in (
        (tmp_path, "_class_name"),
        (tmp_path / "model/unet", "cannot be loaded as UNet3D"),
    ):
        code, text = place.run("03", "--unet", folder)
        assert code == 3 and expected in text and "Traceback" not in text, text


def test_no_network(latents, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = latents.copy(tmp_path / "work")
    for script in ("03", "tools/finetune_unet.py"):
        code, text = place.run(script, "--model", "nobody/nothing")
        assert code == 3 and "the model nobody/nothing cannot be downloaded" in text, text
        assert "--local-dir FOLDER ; then --model FOLDER" in text, text


@pytest.mark.parametrize("variant", [None, "fp16", "bin", "fp16.bin"])
def test_every_kind_of_weight_file_loads(empty, tmp_path, variant):
    """Half precision is taken where it is: the full one beside it is broken. Old fine-tunes are only .bin."""
    for part, name in PARTS.items():
        network, folder = part_of(empty.model, part), tmp_path / part
        if variant == "fp16":
            network.half().save_pretrained(folder, variant="fp16")
            (folder / WEIGHTS.replace("diffusion_pytorch_model", name)).write_bytes(b"broken")
        elif variant:
            folder.mkdir()
            shutil.copy(empty.model / part / "config.json", folder)
            torch.save(network.state_dict(), folder / f"{name}.{variant}")
        else:
            network.save_pretrained(folder)
        loaded = part_of(tmp_path, part).state_dict()
        assert all(torch.equal(loaded[key], value.float()) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["d.safetensors", "d.fp16.safetensors", "d.bin", "d.fp16.bin"], "d.fp16.safetensors"),
        (["d.safetensors", "d.bin"], "d.safetensors"),
        (["d.bin"], "d.bin"),
    ],
)
def test_what_is_downloaded(empty, tmp_path, monkeypatch, files, expected):
    """From a hub that holds every kind of file, and files that no stage reads."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(empty.model, hub)
    (hub / "unet" / WEIGHTS).unlink()
    for name in [*(f"unet/{name}" for name in files), "README.md"]:
        (hub / name).write_bytes(b"content")

    def snapshot_download(name, allow_patterns, local_files_only):
        for path in (path for path in hub.rglob("*") if path.is_file()):
            name = path.relative_to(hub).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    args = Namespace(model="someone/model", dataset="hmdb51", dry_run=False)
    assert common.model_folder(args) == cache
    assert sorted(path.name for path in (cache / "unet").iterdir()) == ["config.json", expected]
    assert not (cache / "README.md").exists() and (cache / "vae" / WEIGHTS).exists()


def test_hash_of_the_weights_that_are_read(empty, tmp_path):
    """A hub's folder gains other kinds when another program downloads them; nothing goes stale by that."""
    folder, name = tmp_path / "vae", "diffusion_pytorch_model"
    shutil.copytree(empty.model / "vae", folder)
    (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    before = common.folder_hash(folder)
    (folder / f"{name}.safetensors").write_bytes(b"in float32")
    (folder / f"{name}.bin").write_bytes(b"as a pickle")
    assert common.folder_hash(folder) == before
    (folder / f"{name}.fp16.safetensors").write_bytes(b"others")
    assert common.folder_hash(folder) != before


def test_random_model_has_the_published_configuration():
    tool = load("tools/make_random_t2v.py")
    counts = {part: sum(p.numel() for p in tool.make(part).parameters()) for part in PARTS}
    assert counts == {"unet": 1_411_233_860, "vae": 83_653_863, "text_encoder": 340_387_840}
    assert abs(counts["unet"] - load("tools/finetune_unet.py").WEIGHTS) < 1e6
    schedule = tool.SCHEDULER
    assert schedule["steps_offset"] == 1 and not schedule["clip_sample"] and not schedule["set_alpha_to_one"]
    abar = np.cumprod(1 - np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000) ** 2)
    assert abar[[999, 501]] == pytest.approx([0.0047, 0.275], rel=0.01)


def test_random_weights_load_and_repeat(tmp_path, monkeypatch):
    """At a small size: every weight is given a finite value, the same for the same seed."""
    tool = load("tools/make_random_t2v.py")
    small = {"block_out_channels": (32,) * 4, "cross_attention_dim": 32, "attention_head_dim": 8}
    monkeypatch.setattr(tool, "UNET", {**tool.UNET, **small})
    monkeypatch.setattr(
        tool, "TEXT_ENCODER", {**tool.TEXT_ENCODER, "hidden_size": 32, "intermediate_size": 32}
    )
    for part in ("unet", "text_encoder"):
        for name in ("a", "b"):
            tool.write_network(tool.make(part), tmp_path / name / part, torch.bfloat16, 0)
        files = [next((tmp_path / name / part).glob("*.safetensors")).read_bytes() for name in ("a", "b")]
        assert files[0] == files[1]
        assert all(p.isfinite().all() for p in part_of(tmp_path / "a", part).parameters())
    tool.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer("a man, 2 dogs", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert len(tokenizer) == 49408 and len(ids) == 77 and ids[0] == 49406 and ids[-1] == 49407
    assert len({*ids[1:11]}) > 5 and max(ids[1:11]) < 512


@pytest.mark.parametrize("dataset", sorted(media.DATASETS))
def test_every_class_has_one_descriptive_sentence(dataset):
    prompts = json.loads((REPO / "prompts" / f"{dataset}.json").read_text())
    assert len(prompts) == {"hmdb51": 51, "ucf101": 101, "miniucf": 50, "demo": 8}[dataset]
    assert len(set(prompts.values())) == len(prompts)
    for label, prompt in prompts.items():
        count = len(prompt.replace("-", " ").split())
        assert 12 <= count <= 24, f"{label}: {count} words"  # at three tokens a word below CLIP's 77
        assert prompt.isascii() and prompt == prompt.strip() and "." not in prompt and "_" not in prompt


def test_prompts_fit_the_text_encoder(real_data):
    """By CLIP's own vocabulary; the longest has 29 tokens with its two ends."""
    tokenizer = CLIPTokenizer.from_pretrained(real_data / "clip_tokenizer")
    for file in media.DATASETS:
        prompts = json.loads((REPO / "prompts" / f"{file}.json").read_text())
        assert max(len(tokenizer(p).input_ids) for p in prompts.values()) <= tokenizer.model_max_length == 77


def test_a_missing_prompt_is_named(latents, tmp_path):
    contract.save(tmp_path / "p.json", {"Walk": "a person walks"})
    for script in ("03", "tools/finetune_unet.py"):
        code, text = latents.run(script, "--prompt-file", tmp_path / "p.json")
        assert code == 3 and "no prompt for class Wave" in text, text
