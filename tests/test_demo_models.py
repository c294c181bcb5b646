"""demo/train_models.py: a killed training goes on and ends with the same weights; demo/measure_models.py measures.

And the commands of demo/compare_samplers.py and finetune_check.py, and what tools/collect_results.py copies.
"""

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, load_stage, make_world

import contract

pytestmark = pytest.mark.skipif(not (REPO / "demo").is_dir(), reason="the demo world is not here")

PROGRAM = """
import os, signal, sys
sys.path.insert(0, "demo")
import train_models as tm
tm.VAE_CHANNELS, tm.UNET_CHANNELS, tm.VAE_BATCH, tm.UNET_BATCH, tm.CHECKPOINT_EVERY = (8, 8, 8), (16, 16), 4, 2, 3
tm.PAIR, tm.BRIGHT = ("Walk", "Wave"), 0  # the classes of the tests' world; all of its figures count as light
draw = tm.step_generator
def step_generator(part, step):
    if f"{part}:{step}" == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(part, step)
tm.step_generator = step_generator
sys.argv[1:1] = ["--threads", "1", "--vae-steps", "5", "--unet-steps", "4", "4", "4", "4", "4", "4", "4"]
for part in ("vae", "unet"):  # without the figures, which take long
    words = list(sys.argv)
    sys.argv += ["--only", part]
    tm.main()
    sys.argv = words
"""


def train(empty, folder, kill_at=""):
    """Trains a model of the least size below `folder`, or up to a step at which the process kills itself."""
    paths = ["--data-root", empty.data, "--work", folder / "checkpoints", "--out", folder / "t2v"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        cwd=REPO,
        env={**os.environ, "KILL_AT": kill_at},
        capture_output=True,
        text=True,
    )


def test_killed_training_ends_with_the_same_weights(empty, tmp_path):
    """Killed between checkpoints in the autoencoder, and in the U-Net's later rounds."""
    assert train(empty, tmp_path / "whole").returncode == 0
    for kill_at in ("vae:4", "unet:7", "unet:11", "unet:15", "unet:19", "unet:23", "unet:27"):
        assert train(empty, tmp_path / "killed", kill_at).returncode == -9
    assert (tmp_path / "killed/checkpoints/unet.pt").exists() and not (tmp_path / "killed/t2v/unet").exists()
    last = train(empty, tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/t2v").rglob("*.*"))
    assert len([f for f in files if f.suffix == ".safetensors"]) == 3
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    sys.path.insert(0, str(REPO / "demo"))
    import train_models

    train_models.save_checkpoint(tmp_path / "unet.pt", {"step": 3, "settings": {"batch": 8}})
    assert train_models.load_checkpoint(tmp_path / "unet.pt", {"batch": 8})["step"] == 3
    with pytest.raises(SystemExit, match="unet.pt: expected a checkpoint of .*'batch': 4.* found one of .*'batch': 8"):
        train_models.load_checkpoint(tmp_path / "unet.pt", {"batch": 4})


def test_distance_to_the_nearest_training_clip():
    sys.path.insert(0, str(REPO / "demo"))
    import measure_models

    training = torch.stack([torch.full((16 * 4 * 4 * 3,), value) for value in (0.0, 100.0)])
    videos = np.stack([np.full((16, 4, 4, 3), value, np.uint8) for value in (0, 90, 130)])
    found = measure_models.nearest(videos, training)
    assert found == {"videos": 3, "least": 0.0, "5 %": 1.0, "median": 10.0, "95 %": 28.0}


@pytest.mark.parametrize("validation", [False, True])
def test_groups_do_not_cross_the_split(validation):
    sys.path.insert(0, str(REPO / "demo"))
    import draw_videos

    groups, test = draw_videos.groups_of(validation)
    train = set(groups) - set(test)
    assert (len(train), len(test)) == ((13, 5) if validation else (18, 7))
    assert not validation or not set(groups) & set(draw_videos.TEST_GROUPS)  # never the test clips


def commands_of(monkeypatch, name, work, rates):
    """Runs a script of demo/ whose stages only read their command line; a set of videos is recognised by rates(its name).

    Returns {script: [its options]} in order.
    """
    monkeypatch.syspath_prepend(str(REPO / "demo"))
    module, parsed = importlib.import_module(name), {}

    def run(line, **_):
        script = Path(line[1]).stem
        spec = importlib.util.spec_from_file_location(script, REPO / line[1])
        stage = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stage)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", line[1:])
            args = stage.parse_args()  # exits where an option is not the script's
        parsed.setdefault(script[:2], []).append(args)
        if getattr(args, "score", False):
            videos = Path(args.train_on).name
            folder = work / "demo" / "05_results" / f"ipc{args.ipc}" / f"{videos}-samples"
            per_class = {c: rates(videos) for c in args.classes} | {"SitDown": 40.0, "StandUp": 50.0}
            score = {"set": folder.name, "videos": 80, "top1": rates(videos), "per_class": per_class}
            contract.write_json(folder / "score__minic3d__demo.json", score)
        if script == "finetune_unet":
            parameters = {"steps": args.steps, "batch": args.batch, "rate": args.rate}
            contract.write_json(work / "demo" / "03_unet" / args.name / "identity.json", {"parameters": parameters})

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", [name, "--work-dir", str(work)])
    module.main()
    return parsed


def test_samplers_are_compared_on_the_same_noise(monkeypatch, tmp_path):
    parsed = commands_of(monkeypatch, "compare_samplers", tmp_path, lambda name: 80.0 + int(name[-1]))
    prototypes = {args.name: (args.cluster, args.seed) for args in parsed["02"]}
    runs = {(args.sampler, args.decay, args.seed): args for args in parsed["03"]}
    assert len(runs) == 12 == len({args.name for args in parsed["03"]}) and {args.draws for args in parsed["03"]} == {2}
    for (sampler, _, seed), args in runs.items():
        assert args.name not in ("gvd", "naive", "knoise")  # the stage's own folders
        cluster = {"gvd": "direct", "knoise": "dummy-video"}.get(sampler)
        assert cluster is None or prototypes[args.prototypes] == (cluster, seed)
    assert {args.seed for args in parsed["05"] + parsed["01"]} == {0} and parsed["05"][0].save
    rows = (tmp_path / "demo" / "samplers.csv").read_text().splitlines()
    assert rows[1] == "naive,80,81.00,1.00,80.00 81.00 82.00,45.00,0.00,45.00 45.00 45.00" and len(rows) == 5


def test_fine_tuning_is_measured_before_and_after(monkeypatch, tmp_path):
    parsed = commands_of(monkeypatch, "finetune_check", tmp_path, lambda name: {"captions_before": 20.0}.get(name, 60.0))
    before, after = parsed["03"]
    differ = {option for option in vars(before) if getattr(before, option) != getattr(after, option)}
    assert differ == {"name", "unet"} and before.unet is None and before.sampler == "naive"
    assert parsed["fi"][0].prompt_file == before.prompt_file and Path(after.unet).name == parsed["fi"][0].name
    found = json.loads((tmp_path / "demo" / "finetune.json").read_text())
    assert [found["samples recognised, %"][name]["all classes"] for name in ("before", "after")] == [20.0, 60.0]
    assert found["fine-tuning"]["steps"] == 300 and str(tmp_path) not in json.dumps(found)


def test_real_clips_are_composed_as_stage_04_composes(monkeypatch, tmp_path, capsys):
    """Each clip once, the plan stage 04's; too many videos and a broken clip are refused before anything is removed."""
    monkeypatch.syspath_prepend(REPO / "demo")
    import compose_real

    import common

    make_world(tmp_path, train=5)
    folder = tmp_path / "work" / "demo" / "composed" / "ipc1" / "real-composed"
    (folder / "Walk").mkdir(parents=True)
    (folder / "Walk" / "7.mp4").write_bytes(b"of an earlier run")
    monkeypatch.setattr(sys, "argv", ["", "1", "--data-root", str(tmp_path), "--work-dir", str(tmp_path / "work")])
    compose_real.main()
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.mp4")) == ["Walk/0.mp4", "Wave/0.mp4"]
    size = common.DATASETS["demo"]["size"]
    for label in ("Walk", "Wave"):
        videos = [compose_real.generator_clip(p, size) for p in sorted((tmp_path / "demo/UCF-101" / label).glob("*_g1*.avi"))]
        frames = common.read_video(folder / label / "0.mp4").astype(float)
        (plan,) = load_stage("04").compose_plan(label, 1, 0)
        used = []
        for i, (_, numbers) in enumerate(plan):
            part = frames[4 * i : 4 * i + 4]
            errors = [np.abs(part - video[numbers]).mean() for video in videos]
            used.append(int(np.argmin(errors)))
            assert min(errors) < 12  # H.264, of grey levels
        assert len(set(used)) == 4
    sys.argv[1] = "2"
    with pytest.raises(SystemExit) as stop:
        contract.run(compose_real.main)
    assert stop.value.code == 3 and "type at most 1" in capsys.readouterr().err and (folder / "Walk" / "0.mp4").is_file()
    sys.argv[1] = "1"
    wave = tmp_path / "demo/UCF-101/Wave"
    for clip in wave.glob("*_g1*.avi"):
        clip.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        contract.run(compose_real.main)
    assert stop.value.code == 3 and str(wave) in capsys.readouterr().err and (folder / "Walk" / "0.mp4").is_file()


def test_only_complete_results_are_collected(place, tmp_path, capsys, monkeypatch):
    """Short of its protocol: left out. With the protocol's own epochs: copied. Unfinished: refused."""
    spec = importlib.util.spec_from_file_location("collect_results", REPO / "tools" / "collect_results.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def collect(work):
        words = ["collect_results.py", "demo", "--work-dir", work, "--results", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        try:
            contract.run(tool.main)
        except SystemExit as stop:
            return stop.code
        return 0

    assert collect(place.work) == 0
    assert "left out demo/05_results/ipc2/gvd/minic3d__hard__demo: epochs 2, not 60" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    folder = place.work / "demo" / "05_results" / "ipc2" / "gvd" / "minic3d__hard__demo"
    result = json.loads((folder / "result.json").read_text())
    contract.write_json(folder / "result.json", {**result, "complete": True, "deviations": []})
    assert collect(place.work) == 3 and "result.json is damaged" in capsys.readouterr().err
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "result.json").read_bytes()
    manifest["outputs"]["result.json"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    contract.write_json(folder / "manifest.json", {**body, "sha256": contract.digest(body)})
    assert collect(place.work) == 0
    assert (tmp_path / "results" / "demo_ipc2" / "gvd.json").read_bytes() == data
    (folder / "manifest.json").unlink()
    assert collect(place.work) == 3 and "an incomplete one" in capsys.readouterr().err


def test_expected_clips():
    """Against Bayes' rule in plain loops; where hardly any noise is left, the clip itself."""
    sys.path.insert(0, str(REPO / "demo"))
    import train_models

    generator = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(6, 2, 4, 1, 1, generator=generator), torch.tensor([0, 0, 0, 1, 1, 1])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    signal, noise, text = torch.tensor([0.3, 0.5, 0.2, 1.0]), torch.tensor([0.9, 0.8, 0.7, 1e-2]), torch.tensor([0, 1, -1, 1])
    x = signal[:, None, None, None, None] * latents[[1, 4, 2, 5]].movedim(1, 2)
    x = x + noise[:, None, None, None, None] * torch.randn(x.shape, generator=generator)
    squares = latents.flatten(1).square().sum(1)
    found = train_models.expected_clips(x, signal, noise, text, latents, squares, labels, weights)
    for i in range(4):
        chances = []
        for z, label, w in zip(latents, labels, weights, strict=True):
            square = (x[i].double() - signal[i] * z.movedim(0, 1)).square().sum().item()
            likelihood = math.exp(-square / (2 * noise[i].item() ** 2))
            chances.append(w.item() * likelihood if text[i] in (-1, label) else 0.0)
        want = sum(c * z.movedim(0, 1).double() for c, z in zip(chances, latents, strict=True)) / sum(chances)
        assert torch.allclose(found[i].double(), want, atol=1e-5)
    assert torch.allclose(found[3], latents[5].movedim(0, 1), atol=1e-4)


def test_last_rounds_have_the_pair_in_both_orders():
    sys.path.insert(0, str(REPO / "demo"))
    import train_models

    n = 24 * 6
    latents = torch.randn(n, 16, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    labels, light = torch.arange(n) % 3, torch.arange(n) % 2 == 0
    given = (latents, labels, light, torch.ones(n, dtype=torch.float64), [1, 2])
    clips, found, weights = train_models.clips_of_round(*given, max(train_models.PAIR_ROUNDS) + 1)
    a, b, c = (latents[labels == label] for label in (0, 1, 2))
    assert torch.equal(clips, torch.cat([a, b, c.flip(1), c, b.flip(1)])) and torch.equal(found, found.sort().values)
    assert weights[found == 0].sum() == weights[found == 1].sum() / train_models.LAST_PAIR_WEIGHT * train_models.PAIR_WEIGHT
    clips, found, _ = train_models.clips_of_round(*given, train_models.LIGHT_ROUND)
    b, c = (latents[light & (labels == label) & (torch.arange(n) < n // 6)] for label in (1, 2))
    assert torch.equal(clips, torch.cat([b, c.flip(1), c, b.flip(1)])) and set(found.tolist()) == {1, 2}


def test_pair_rounds_show_each_clip_in_both_orders():
    sys.path.insert(0, str(REPO / "demo"))
    import train_models

    n, half = 24 * 6, train_models.UNET_BATCH // 2
    latents = torch.randn(n, 16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    draw = (latents, 1 + torch.arange(n) % 2, torch.ones(n, dtype=torch.float64), [1, 2])
    x0, text, spread, noise = train_models.draw_batch(*draw, train_models.LIGHT_ROUND, train_models.step_generator("unet", 0))
    assert torch.equal(x0[:half], x0[half:].flip(2)) and torch.equal(text[:half] + text[half:], torch.full((half,), 3))
    assert torch.equal(noise[:half], noise[half:]) and torch.equal(spread[:half], spread[half:]) and noise.shape == x0.shape
    low, high = train_models.PAIR_TIMESTEPS
    assert low <= spread.min() and spread.max() < high
    for which in (0, train_models.BALANCED_FROM, max(train_models.PAIR_ROUNDS) + 1):
        *_, noise = train_models.draw_batch(*draw, which, train_models.step_generator("unet", 0))
        assert len(noise) == 2 * half and not torch.equal(noise[:half], noise[half:])


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_sampling_follows_the_faded_path(steps):
    """A U-Net that has learned its target exactly leads DDIM from noise to the clip, at any number of steps."""
    sys.path.insert(0, str(REPO / "demo"))
    import train_models
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**train_models.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    fade, share = train_models.faded(scheduler.alphas_cumprod)
    assert fade[-1] == 0 and bool((fade[: train_models.FADED_ABOVE + 1] == 1).all()) and bool((fade.diff() <= 0).all())
    scheduler.set_timesteps(steps)
    clip, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])
    first = scheduler.timesteps[0]
    a, s = (part.sqrt() for part in (scheduler.alphas_cumprod, 1 - scheduler.alphas_cumprod))
    x = a[first] * fade[first] * clip + s[first] * noise
    for t in scheduler.timesteps:
        x = scheduler.step((x - a[t] * share[t] * clip) / s[t], t, x).prev_sample
    a, s = a[0], s[0]
    assert torch.allclose(x, a * clip + s * noise, atol=0.05)
