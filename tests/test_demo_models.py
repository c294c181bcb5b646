"""demo/train_models.py: a killed training goes on and ends with the same weights; demo/measure_models.py measures."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO

pytestmark = pytest.mark.skipif(not (REPO / "demo").is_dir(), reason="the demo world is not here")

PROGRAM = """
import os, signal, sys
sys.path.insert(0, "demo")
import train_models as tm
tm.VAE_CHANNELS, tm.UNET_CHANNELS, tm.VAE_BATCH, tm.UNET_BATCH, tm.CHECKPOINT_EVERY = (8, 8, 8), (16, 16), 4, 2, 3
draw = tm.step_generator
def step_generator(part, step):
    if f"{part}:{step}" == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(part, step)
tm.step_generator = step_generator
sys.argv[1:1] = ["--threads", "1", "--vae-steps", "5", "--unet-steps", "4", "4"]
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
    """Killed between checkpoints in the autoencoder, and in the U-Net's second round after one checkpoint in it."""
    assert train(empty, tmp_path / "whole").returncode == 0
    for kill_at in ("vae:4", "unet:7"):
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
