"""Fixtures: stages loaded by path, a model with random weights, a world of 20 tiny videos, the chain run on them."""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import contract  # noqa: E402

SCRIPTS = {path.name[:2]: path for path in sorted(REPO.glob("0[1-5]_*.py"))}
CLASSES = ("Walk", "Wave")
TINY = {  # options that make a stage small enough for tests
    "01": [],
    "02": ["2"],
    "03": ["2", "--steps", "2"],
    "04": ["2"],
    "05": ["2", "--epochs", "2", "--repeats", "2"],
}


def load_stage(number):
    """The module of a stage: a name that begins with a digit cannot be imported."""
    path = SCRIPTS[number]
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def write_video(path, count, seed, size=(40, 32), speed=1):
    """An Xvid .avi of a bright square that moves over a plain ground."""
    import cv2

    rng = np.random.default_rng(seed)
    ground, x0 = rng.integers(40, 120, 3), rng.integers(0, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"XVID"), 25, size)
    assert writer.isOpened()
    for f in range(count):
        frame = np.tile(ground.astype(np.uint8), (size[1], size[0], 1))
        x = int(x0 + speed * f) % (size[0] - 8)
        frame[12:22, x : x + 8] = 230
        writer.write(frame)
    writer.release()


def make_world(root, train=5, test=2):
    """<root>/demo in UCF101's layout: two classes that move to the right and to the left."""
    lists = {"trainlist01.txt": [], "testlist01.txt": []}
    for index, label in enumerate(CLASSES):
        for split, file, count in (("train", "trainlist01.txt", train), ("test", "testlist01.txt", test)):
            for i in range(count):
                name = f"v_{label}_g{10 + i if split == 'train' else 1 + i:02d}_c01"
                write_video(root / "demo/UCF-101" / label / f"{name}.avi", 18 + 3 * i, 10 * index + i, speed=1 - 2 * index)
                lists[file].append(f"{label}/{name}.avi" + (f" {index + 1}" if split == "train" else ""))
    folder = root / "demo/ucfTrainTestlist"
    folder.mkdir(parents=True)
    for file, lines in lists.items():
        (folder / file).write_text("\n".join(lines) + "\n")


def make_model(folder):
    """A text-to-video model in the published layout with random weights, of the least size that the library takes."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            mid_block_add_attention=False,
        )
        unet = UNet3DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
        text = CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=len(vocab) - 2,
            eos_token_id=len(vocab) - 1,
            pad_token_id=len(vocab) - 1,
        )
        encoder = CLIPTextModel(text)
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    for part, name in (
        (vae, "vae"),
        (unet, "unet"),
        (encoder, "text_encoder"),
        (tokenizer, "tokenizer"),
        (scheduler, "scheduler"),
    ):
        part.save_pretrained(folder / name)


class Place:
    """A data root, a model and a work folder, with a stage to run on them."""

    def __init__(self, data, model, work):
        self.data, self.model, self.work = data, model, work

    def words(self, number, *extra):
        model = ["--model", str(self.model)] if number in ("01", "03") else []
        shared = ["--work-dir", str(self.work), "--data-root", str(self.data), "--classes", ",".join(CLASSES)]
        return [str(SCRIPTS[number]), "demo", *TINY[number], *model, *shared, *map(str, extra)]

    def run(self, number, *extra):
        """Runs a stage in this process: (exit code, what it printed)."""
        stage, out, before = load_stage(number), io.StringIO(), sys.argv
        sys.argv = self.words(number, *extra)
        code = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                contract.run(stage.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv, contract.open_log.path = before, None
        return code, out.getvalue()

    def make(self, *numbers):
        for number in numbers:
            code, text = self.run(number)
            assert code == 0, text

    def spawn(self, number, *extra, **environment):
        """Starts a stage as a process of its own."""
        return subprocess.Popen(
            [sys.executable, *self.words(number, *extra)],
            cwd=REPO,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def files(self):
        """{relative path: bytes} of every artifact: without logs, times and caches, as `diff -r` compares two runs."""
        skipped = ("log.txt", "timing.json")
        return {
            path.relative_to(self.work).as_posix(): path.read_bytes()
            for path in sorted(self.work.rglob("*"))
            if path.is_file() and path.name not in skipped and ".cache" not in path.parts
        }

    def copy(self, work):
        shutil.copytree(self.work, work)
        return Place(self.data, self.model, work)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """The world and the model, nothing run yet."""
    root = tmp_path_factory.mktemp("world")
    make_world(root / "data")
    make_model(root / "model")
    return Place(root / "data", root / "model", root / "none")


@pytest.fixture(scope="session")
def done(empty, tmp_path_factory):
    """The whole chain run once in this process; not to be changed."""
    place = Place(empty.data, empty.model, tmp_path_factory.mktemp("done") / "work")
    place.make("01", "02", "03", "04", "05")
    return place


@pytest.fixture
def place(done, tmp_path):
    """A copy of the finished chain that a test may change."""
    return done.copy(tmp_path / "work")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real HMDB51 and UCF101 clips."""
    folder = os.environ.get("GVD_REAL_DATA")
    if not folder:
        pytest.skip("GVD_REAL_DATA is not set: no real clips here")
    return Path(folder)
