"""Scripts loaded by path, a tiny model with random weights, 14 short videos, and the chain run on them."""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

SCRIPTS = {path.name[:2]: path for path in sorted(REPO.glob("0[1-5]_*.py"))}
CLASSES = ("Walk", "Wave")
TINY = {"02": "2", "03": "2 --steps 2", "04": "2", "05": "2 --repeats 2 --set epochs=2"}


def load(script):
    """The module of a script: a stage's number ("01") or a path in the repository ("tools/coresets.py")."""
    path = SCRIPTS.get(script) or REPO / script
    name = str(path) if path.stem == "train_teacher" else path.stem  # tools/ and demo/ both have one
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # as Python does for a script: tools share tools/videomae.py
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def write_video(path, count, seed, size=(40, 32), speed=1):
    """An Xvid .avi of a bright square that moves over a plain background."""
    import cv2

    rng = np.random.default_rng(seed)
    background, start = rng.integers(40, 120, 3), rng.integers(0, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"XVID"), 25, size)
    for f in range(count):
        frame = np.full((size[1], size[0], 3), background, np.uint8)
        left = int(start + speed * f) % (size[0] - 8)
        frame[12:22, left : left + 8] = 230
        writer.write(frame)
    writer.release()


def make_world(root, train=5, test=2):
    """<root>/demo in UCF101's layout: two classes that move to the right and to the left."""
    lists = {"train": "", "test": ""}
    for index, label in enumerate(CLASSES):
        for split, i in [*(("train", i) for i in range(train)), *(("test", i) for i in range(test))]:
            name = f"{label}/v_{label}_g{i + (10 if split == 'train' else 1):02d}_c01.avi"
            write_video(root / "demo/UCF-101" / name, 18 + 3 * i, 10 * index + i, speed=1 - 2 * index)
            lists[split] += name + (f" {index + 1}\n" if split == "train" else "\n")
    for split, text in lists.items():
        contract.save(root / f"demo/ucfTrainTestlist/{split}list01.txt", text.encode())


def make_model(folder):
    """A text-to-video model in diffusers layout with random weights, as small as the libraries allow."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) + end for end in ("", "</w>") for c in range(ord("!"), ord("~") + 1)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    size = dict(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2)
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    unet = dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), cross_attention_dim=8, attention_head_dim=4,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(8, 8), sample_size=8,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=128).save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**size, **vae).save_pretrained(folder / "vae")
        UNet3DConditionModel(**size | unet).save_pretrained(folder / "unet")
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")


class Place(NamedTuple):
    """A data root, a model and a work folder, with scripts to run on them."""

    data: Path
    model: Path
    work: Path
    dataset: str = "demo"
    classes: str = ",".join(CLASSES)

    def words(self, script, *extra):
        """The command line. The options in `extra` come last, so they win; a tool's IPC is its first word."""
        path, tiny = SCRIPTS.get(script) or REPO / script, TINY.get(script, "").split()
        shared = ["--work-dir", self.work, "--data-root", self.data, "--model", self.model, "--threads", 1]
        words = [path, *shared, "--classes", self.classes, self.dataset, *tiny, *extra]
        return [str(word) for word in words]

    def run(self, script, *extra):
        """Runs a script in this process: (exit code, what it printed)."""
        module, out, before, code = load(script), io.StringIO(), sys.argv, 0
        sys.argv = self.words(script, *extra)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                contract.run(module.parse_args, module.main, module.estimate)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = before
        return code, out.getvalue()

    def must(self, script, *extra):
        """What a script printed that has to succeed."""
        code, text = self.run(script, *extra)
        assert code == 0, text
        return text

    def refused(self, script, *extra):
        """The message of a script that has to end with exit code 3."""
        code, text = self.run(script, *extra)
        assert code == 3, text
        return text

    def spawn(self, script, *extra, processes=0, **environment):
        """Starts a script as a process of its own, or with torchrun as several."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = [sys.executable, *(torchrun if processes else []), *self.words(script, *extra)]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(words, cwd=REPO, env={**os.environ, **environment}, **options)

    def files(self):
        """{relative path: bytes} of all artifacts, as `diff -r -x log.txt -x .cache` compares two runs."""
        paths = {p.relative_to(self.work): p for p in sorted(self.work.rglob("*")) if p.is_file()}
        kept = {name for name in paths if name.name != "log.txt" and ".cache" not in name.parts}
        return {name.as_posix(): path.read_bytes() for name, path in paths.items() if name in kept}

    def copy(self, work):
        shutil.copytree(self.work, work)
        return self._replace(work=work)


def chain(before, *scripts):
    """A fixture: `scripts` run once in a copy of what the fixture `before` holds; not to be changed."""

    @pytest.fixture(scope="session")
    def place(request, tmp_path_factory):
        new, old = tmp_path_factory.mktemp("chain") / "work", request.getfixturevalue(before)
        place = old.copy(new) if old.work.exists() else old._replace(work=new)
        for script in scripts:
            code, text = place.run(script)
            assert code == 0, text
        return place

    return place


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """The world and the model, nothing run yet."""
    root = tmp_path_factory.mktemp("world")
    make_world(root / "data")
    make_model(root / "model")
    return Place(root / "data", root / "model", root / "none")


latents = chain("empty", "01", "02")
sampled = chain("latents", "03", "04")
done = chain("sampled", "05")


@pytest.fixture
def place(done, tmp_path):
    """A copy of the finished chain that a test may change."""
    return done.copy(tmp_path / "work")


@pytest.fixture(scope="session")
def videomae(tmp_path_factory):
    """A VideoMAE in the published layout with random weights and biases: 24 px, 4 outputs."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    folder, labels = tmp_path_factory.mktemp("videomae"), dict(enumerate(("Wave", "Sit", "walk", "Kick")))
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = VideoMAEConfig(image_size=24, patch_size=12, id2label=labels, **size)
    network, generator = VideoMAEForVideoClassification(config), contract.generator(0, "videomae")
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    network.save_pretrained(folder)
    stated = {"image_mean": common.IMAGENET_MEAN, "image_std": common.IMAGENET_STD, "rescale_factor": 1 / 255}
    contract.save(folder / "preprocessor_config.json", stated)
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of real HMDB51 and UCF101 clips."""
    if not os.environ.get("GVD_REAL_DATA"):
        pytest.skip("GVD_REAL_DATA is not set: no real clips here")
    return Path(os.environ["GVD_REAL_DATA"])
