"""The demo: its world, its models and their training, which may be killed, its experiments and its sheet."""

import contract

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, REPO, TINY, load
from diffusers import DDIMScheduler

import common
import media

TRAIN = """
import os, signal, sys
sys.path.insert(0, "demo")
import contract
{module}
data, place, kill_at = sys.argv[1:]
draw = contract.generator

def generator(seed, *names):
    if "/".join(map(str, names)) == kill_at and kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(seed, *names)

contract.generator = generator
for folder, kill, steps in (("whole", 0, "5"), ("killed", 1, "5"), ("killed", 0, "5"), ("killed", 0, "6")):
    if (child := os.fork()) == 0:  # to import the libraries once
        folder = f"{{place}}/{{folder}}"
        sys.argv = ["", "--threads", "1", "--work", folder, "--out", folder + "/out"]
        {main}
        sys.exit()
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TEACHER = {
    "module": """import train_teacher as t
t.SHAPE.update(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
t.BATCH, t.CHECKPOINT_EVERY = 2, 2""",
    "main": """sys.argv += ["--steps", steps, "--data-root", data]
        contract.run(t.parse_args, t.main, lambda args: {})""",
}
MODELS = {
    "module": """import train_models as t
t.VAE_CHANNELS, t.UNET_CHANNELS, t.VAE_BATCH, t.UNET_BATCH, t.CHECKPOINT_EVERY = (8, 8, 8), (16, 16), 4, 2, 3
draw_corpus, unet_steps = t.draw_corpus, 8""",
    "main": """clips = 24 if steps == "5" else 16
        t.draw_corpus = lambda count, seed: draw_corpus(clips, seed)
        sys.argv += ["--vae-steps", "5", "--unet-steps", "8"]
        contract.run(t.parse_args, t.main, lambda args: {})""",
}


@pytest.mark.parametrize(
    ("program", "kill_at"), [(TEACHER, "videomae/3"), (MODELS, "vae/4"), (MODELS, "unet/7")]
)
def test_killed_training_ends_with_the_same_weights(empty, tmp_path, program, kill_at):
    """Trained through; killed in a step; taken up again; taken up with other settings, which is refused."""
    line = [sys.executable, "-c", TRAIN.format(**program), empty.data, tmp_path, kill_at]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)
    status = [text.split()[1] for text in done.stdout.splitlines() if text.startswith("status")]
    assert status[:3] == ["0", "-9", "0"] and status[3] != "0", done.stderr
    assert "start over with: rm" in done.stderr
    files = [p for p in tmp_path.glob("whole/out/**/*.*") if p.is_file()]
    assert sum(p.suffix == ".safetensors" for p in files) == (1 if program == TEACHER else 3)
    for path in files:
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()


@torch.inference_mode()
def test_shipped_models_fit_their_world():
    """On a new clip of each class: reconstruction, noise prediction (eq. 3), classes."""
    folder, spec, cpu = common.DEMO_MODEL, media.DATASETS["demo"], torch.device("cpu")
    assert sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file()) < 16 * 2**20
    common.check_model(folder, folder / "unet")
    vae, unet = (common.load_part(folder / part, part, cpu, torch.float32) for part in ("vae", "unet"))
    videos = [load("demo/draw_videos.py").draw_clip(label, 1, 1, 1)[..., ::-1] for label in spec["classes"]]
    clips = np.stack([video[media.uniform_frames(len(video))] for video in videos])  # RGB [8, 16, 32, 32, 3]
    x = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
    z = vae.encode(x).latent_dist.mean * vae.config.scaling_factor  # [128, 4, 8, 8]
    y = torch.from_numpy(common.decode(vae, z)).permute(0, 3, 1, 2) / 127.5 - 1
    assert 10 * (4 / (x - y).square().mean()).log10() > 29 and 0.22 < z.std() < 0.28

    prompts, latents = contract.read(REPO / "prompts/demo.json"), z.unflatten(0, (8, 16)).transpose(1, 2)
    embeddings = common.embed(folder, prompts, cpu)
    states = torch.cat([embeddings[prompts[label]] for label in spec["classes"]])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))  # [8, 4, 16, 8, 8]
    scheduler, t = DDIMScheduler.from_pretrained(folder / "scheduler"), torch.full((8,), 300)
    predicted = unet(scheduler.add_noise(latents, noise, t), t, states).sample
    assert (predicted - noise).square().mean() < 0.06

    videomae = load("tools/videomae.py")
    network, scale = videomae.load(folder.with_name("videomae"), cpu)
    _, logits = videomae.run(network, scale, np.stack([media.network_clip(clip, spec) for clip in clips]))
    labels = [network.config.id2label[i] for i in logits.argmax(1).tolist()]
    assert sum(a == b for a, b in zip(labels, spec["classes"], strict=True)) >= 7


def test_drawn_videos_repeat_their_bytes_and_no_group_crosses_the_split(tmp_path):
    draw = load("demo/draw_videos.py")
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "UCF-101/Walk").mkdir(parents=True)
        files = draw.draw_group((folder, "Walk", 7, 0))
    assert all((tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes() for name in files)
    for validation, sizes in ((False, (18, 7)), (True, (13, 5))):
        groups, test = map(set, draw.groups_of(validation))
        assert (len(groups - test), len(groups & test)) == sizes
        assert not validation or not groups & set(draw.TEST_GROUPS)  # never the test clips


def test_the_corpus_is_apart_from_the_data_set():
    """Each clip has a look of its own, none of them a group's; captions fit the text encoder."""
    draw, train = load("demo/draw_videos.py"), load("demo/train_models.py")
    clips, captions = draw.draw_corpus(64)
    assert clips.shape == (64, 16, 32, 32, 3) and (draw.draw_corpus(16)[0] == clips[:16]).all()
    names = [(c, group) for c in draw.CLASSES for group in range(1, draw.NUM_GROUPS + 1)]
    names += [("corpus", number) for number in range(64)]
    looks = {draw.draw_look(draw.generator(0, *name))[:3] for name in names}
    assert len(looks) == len(names)
    known = contract.read(REPO / "prompts/demo.json"), contract.read(REPO / "demo/wordings.json")
    assert set(captions) == {*known[0].values(), *sum(known[1].values(), [])}
    tokenizer = train.CLIPTokenizer.from_pretrained(common.DEMO_MODEL / "tokenizer")
    assert max(len(tokenizer(text).input_ids) for text in captions) <= train.TEXT_LENGTH


def test_small_latents_keep_the_spread_of_the_clips():
    """Exact DDIM from noise alone, along the direction in which clips differ most: 25 latents' deviations."""
    train = load("demo/train_models.py")
    scheduler = DDIMScheduler(**train.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(25)
    for std, low, high in ((1.0, 0.3, 0.5), (train.LATENT_STD, 0.8, 1.0)):
        variance, x = (25 * std) ** 2, 1.0
        for t in scheduler.timesteps:
            alpha = scheduler.alphas_cumprod[t]
            noise = (1 - alpha).sqrt() * x / (alpha * variance + 1 - alpha)  # the mean: all is Gaussian
            x = scheduler.step(torch.tensor([noise]), t, torch.tensor([x])).prev_sample.item()
        assert low < x / variance**0.5 < high


def test_clips_are_brought_back():
    """At 0 through the VAE alone; from noise nothing is left of them, and the noise is the class's own."""
    module = load("demo/experiments.py")
    clips = module.draw_corpus(16, module.CORPUS_SEED)[0][::8]  # two cartwheels
    made = {
        first: module.bring_back(common.DEMO_MODEL, clips, "Cartwheel", first, 2.0, 2)
        for first in (0, 600, 1000)
    }
    errors = {first: np.square(video.astype(float) - clips).mean() ** 0.5 for first, video in made.items()}
    assert errors[0] < 12 < errors[1000] and errors[0] < errors[600] < errors[1000]
    other = module.bring_back(common.DEMO_MODEL, 255 - clips, "Cartwheel", 1000, 2.0, 2)
    assert (other == made[1000]).all()


def experiment(place, monkeypatch, *words):
    """(module, arguments) of demo/experiments.py, with the tests' classes as the order pair."""
    module = load("demo/experiments.py")
    monkeypatch.setattr(module, "PAIR", CLASSES)
    monkeypatch.setattr(sys, "argv", place.words("demo/experiments.py", *words))
    args = module.parse_args()
    args.estimate = module.estimate(args)
    return module, args


def test_frames_are_reordered(latents, tmp_path, monkeypatch):
    place = latents.copy(tmp_path / "work")
    module, args = experiment(place, monkeypatch, "measure")
    for order in ("shuffled", "one"):
        folder = module.reorder(args, order).work_dir
        for name in (f"{split}/{label}" for split in ("train", "test") for label in CLASSES):
            real, found = (np.load(work / f"demo/01_clips/{name}.npy") for work in (place.work, folder))
            for i, row in enumerate(contract.read(folder / f"demo/01_clips/{name}.csv")):
                seed = contract.generator(0, "05", "frames", name.split("/")[1], row["name"])
                frames = torch.randperm(16, generator=seed).numpy()
                assert (found[i] == real[i][:, frames if order == "shuffled" else [frames[0]] * 16]).all()
        code, text = place._replace(work=folder).run("05", "--train-on", "full", "--repeats", "1")
        assert code == 0 and "top-1" in text, text


def test_distance_to_the_nearest_training_clip():
    training = torch.stack([torch.full((16 * 4 * 4 * 3,), value) for value in (0.0, 100.0)])
    videos = np.stack([np.full((16, 4, 4, 3), value, np.uint8) for value in (0, 90, 130)])
    found = load("demo/experiments.py").nearest(videos, training)
    assert found == {"videos": 3, "least": 0.0, "5 %": 1.0, "median": 10.0, "95 %": 28.0}


def test_prediction_errors(empty, monkeypatch):
    """1 of a U-Net that predicts the mean clip, 0 of one that knows the noise."""
    module, load_part = load("demo/experiments.py"), common.load_part
    args = SimpleNamespace(model=empty.model, dataset="demo", dry_run=False)
    vae = common.load_part(empty.model / "vae", "vae", torch.device("cpu"), torch.float32)
    clips = module.encode(vae, module.draw_corpus(64, module.CORPUS_SEED)[0])
    scheduler = module.DDIMScheduler.from_pretrained(empty.model / "scheduler")
    for known, expected in ((clips.mean(0).expand_as(clips), 1.0), (clips, 0.0)):
        calls = []

        def unet(noised, t, text, known=known, calls=calls):
            calls.append(t)
            part, alpha = known.split(16)[(len(calls) - 1) % 4], scheduler.alphas_cumprod[t]
            return SimpleNamespace(sample=(noised - alpha.sqrt() * part) / (1 - alpha).sqrt())

        unet.dtype = torch.float32
        with monkeypatch.context() as patch:
            patch.setattr(
                common, "load_part", lambda *a, unet=unet: unet if a[1] == "unet" else load_part(*a)
            )
            errors = module.prediction_errors(args)
        assert [*errors] == [str(t) for t in module.NOISY]
        found = [value for of_step in errors.values() for value in of_step.values()]
        assert found == pytest.approx([expected] * 18, abs=2e-3)


def test_real_clips_are_composed_by_stage_04(latents, tmp_path, monkeypatch):
    """Four frames of each of four clips, as metadata.csv states; more clips than there are are refused."""
    place = latents.copy(tmp_path / "work")
    module, args = experiment(place, monkeypatch, "compose-real", 1)
    module.write_real_samples(args)
    monkeypatch.setitem(TINY, "04", "1")
    code, text = place.run("04", "--samples", "real", "--name", "real-composed")
    assert code == 0, text
    folder = place.work / "demo/04_distilled/ipc1/real-composed"
    for row in contract.read(folder / "metadata.csv"):
        composed, label, used = media.read_video(folder / row["file_name"]), row["label"], set()
        clips = contract.read(place.work / f"demo/01_clips/train/{label}.csv")
        videos = np.stack([module.real_video(args, label, clip["name"]) for clip in clips]).astype(float)
        for i, frames in enumerate(row["frames"].split()):
            part, chosen = composed[4 * i : 4 * i + 4], [int(frame) for frame in frames.split("-")]
            errors = np.abs(part - videos[:, chosen]).mean((1, 2, 3, 4))  # of H.264, twice
            used.add(int(errors.argmin()))
            assert errors.min() < 12
        order = torch.randperm(5, generator=contract.generator(0, "compose_real", label)).tolist()
        assert used == set(order[:4])
    args.ipc = 2
    with pytest.raises(contract.ContractError, match="IPC <= 1"):
        module.write_real_samples(args)


REPORTS = {  # file, a part of its text
    "measure": ("demo/measured.json", '"order pair": 66.0'),
    "sets": ("sets/demo/sets_ipc5.csv", "\ntuned,5,50.00,0.00,50.00 50.00 50.00 50.00 50.00,7\n"),
    "settings": ("validation/demo/settings.csv", "\ncfg2,--cfg 2,52.00,2.00,50.00 52.00 54.00\n"),
    "take-over": ("validation/demo/take_over.csv", "\n600,52.00,2.00,50.00 52.00 54.00\n"),
    "finetune": ("demo/finetune.json", '"all classes": 81.0'),
}


@pytest.mark.parametrize("name", REPORTS)
def test_commands_and_report_of_an_experiment(latents, tmp_path, monkeypatch, name):
    """Its stages only parse their command lines, and results are made up."""
    place, parsed = latents.copy(tmp_path / "work"), {}
    module, args = experiment(place, monkeypatch, name)
    for measurement in ("distances", "told_by_colours"):
        monkeypatch.setattr(module, measurement, lambda args, sets: {})
    monkeypatch.setattr(module, "prediction_errors", lambda args: {})
    monkeypatch.setattr(module, "write_take_over", lambda args, first: None)

    def run(line, **_):
        path = Path(line[1]).relative_to(REPO)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["", *map(str, line[2:])])
            stage = load(str(path)).parse_args() if path.stem != "draw_videos" else None  # exits if misused
        parsed.setdefault(path.stem, []).append(stage)
        if path.stem == "05_train_eval":
            results = stage.work_dir / "demo/05_results" / (f"ipc{stage.ipc}" if stage.ipc else "full")
            file = results / (stage.name or stage.train_on) / "minic3d__hard__demo/result.json"
            top1 = {"mean": 52.0, "std": 2.0, "n": 3, "values": [50.0, 52.0, 54.0][: stage.repeats]}
            contract.save(file, {"top1": top1, "bytes": 7, "videos": 40})
        for i, one in enumerate(stage.sets.split(",") if path.stem == "metrics" else ()):
            score = {"videos": 80, "top1": 80.0 + i, "per_class": {"Walk": 70.0 + i, "Wave": 60.0 + i}}
            contract.save(place.work / f"demo/05_results/ipc{stage.ipc}/{one}-samples/score.json", score)
        if path.stem == "finetune_unet":
            parameters = {key: getattr(stage, key) for key in ("steps", "batch", "lr")}
            contract.save(place.work / "demo/03_unet/captions/manifest.json", {"parameters": parameters})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    module.main(args)
    report, part = REPORTS[name]
    text, runs = (place.work / report).read_text(), parsed.get("03_guided_sample", [])
    assert part in text and str(tmp_path) not in text and str(REPO) not in text
    if name == "measure":
        assert len({stage.work_dir for stage in parsed["05_train_eval"]}) == 3
    if name == "sets":  # each of a seed of its own in all three stages
        for script in ("03_guided_sample", "04_mvic_compose", "05_train_eval"):
            ours = [stage for stage in parsed[script] if getattr(stage, "train_on", "") != "random"]
            named = {getattr(stage, "train_on", stage.name): stage.seed for stage in ours}
            assert len(named) == 25 and all(set_.endswith(f"-seed{seed}") for set_, seed in named.items())
        assert {stage.prototypes for stage in runs if stage.sampler == "knoise"} == {"dummy-video"}
        assert {stage.name[:5] for stage in runs if stage.unet} == {"tuned"}
    if name == "finetune":
        before, after = map(vars, runs)
        assert {key for key in before if before[key] != after[key]} == {"name", "unet"}
        assert parsed["finetune_unet"][0].prompt_file == before["prompt_file"]


def test_validation_table_is_of_committed_results():
    text, folder = (REPO / "demo/README.md").read_text("utf-8"), REPO / "results/demo_models"
    for name in ("random", "gvd"):
        found = [contract.read(folder / f"validation_{name}_ipc{ipc}.json")["top1"] for ipc in (1, 5)]
        cells = [f"{one['mean']:.1f} ± {one['std']:.1f} ({one['n']})" for one in found]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_measured_figures_in_the_readme():
    text, folder = (REPO / "demo/README.md").read_text("utf-8"), REPO / "results/demo_models"
    rows = contract.read(folder / "take_over.csv")
    cells = [f"{float(row['top1_mean']):.1f} ± {float(row['top1_std']):.1f}" for row in rows]
    assert f"| top-1 % | {' | '.join(cells)} |" in text
    found = contract.read(folder / "measured.json")
    sets, pair = found["samples recognised, %"], found["order pair, top-1 % by the frames seen"]
    parts = {
        "%": [[pair[order]["mean"] for order in ("in-order", "shuffled", "one")]]
        + [[sets[name][key] for name in ("gvd", "naive")] for key in ("all classes", "order pair")]
        + [[found["classes told by mean colours, %"][name] for name in ("gvd", "naive", "drawn clips")]],
        "dB": [[found["autoencoder on test clips, dB"]["mean"]]],
    }
    distance = found["distance to the nearest training clip, grey levels"]
    parts["grey levels"] = [
        [distance[name]["median"] for name in ("gvd samples", "naive samples", "test clips")]
    ]
    for unit, lines in parts.items():
        for values in lines:
            assert f"| {'; '.join(f'{value:.1f}' for value in values)} {unit} |" in text, values
    errors = found["error of predicted clips, of their variance, by timestep and caption"]
    right = [f"{errors[t]['right']:.2f}" for t in ("500", "800", "900", "999")]
    assert f"| {'; '.join(right)} |" in text


def test_contact_sheet(sampled, tmp_path, monkeypatch):
    place, shown, module = sampled.copy(tmp_path / "work"), {}, load("demo/contact_sheet.py")
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda rows: shown.update(rows) or draw(rows))
    code, text = place.run("demo/contact_sheet.py", 2)
    assert code == 0 and (place.work / "demo/contact_sheet/ipc2/contact_sheet.png").is_file(), text
    for label, (real, _, generated, composed) in shown.items():
        clips = np.load(place.work / f"demo/01_clips/train/{label}.npy")[:, 0]
        members = contract.read(place.work / f"demo/02_prototypes/ipc2/direct/{label}.csv")  # in 01's order
        away = [float(row["distance"]) if row["prototype"] == "0" else np.inf for row in members]
        assert (real == clips[np.argmin(away)]).all()
        errors = np.abs(composed[:, None].astype(float) - generated).mean((2, 3, 4))  # [16, 16], by frames
        assert (errors.min(1) < 12).sum() >= 4
    assert "fresh" in place.run("demo/contact_sheet.py", 2)[1]
