"""Trains the demo's VideoMAE: teacher of the soft labels (section 3.5), feature extractor of the metrics.

The network is the library's own class (VideoMAEForVideoClassification) at an eightieth of the published size
and in the published layout: the code that runs the real one runs it too. It sees the demo's training clips
alone, with random speed, start, mirroring, position and colours, since the test clips have backgrounds and
figures of other colours.

Reads:   <data root>/demo (demo/draw_videos.py)
Writes:  demo/models/videomae/{config.json,preprocessor_config.json,model.safetensors}
         work/demo_training/videomae.pt   checkpoint; a killed run resumes and ends with the same weights
Run:     python demo/train_teacher.py
Cost:    about 6 minutes on two idle CPU cores, 1 GB of memory
Expect:  it prints the accuracy on the 336 test clips: 98.8 % when the shipped weights were trained
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import videomae  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import VideoMAEConfig, VideoMAEForVideoClassification  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

SPEC = media.DATASETS["demo"]
SEED = 0
# 4 x 4 patches of 12 px and 8 pairs of frames: 128 tokens, 1.1 M parameters.
SHAPE = dict(
    image_size=48, patch_size=12, tubelet_size=2, num_frames=common.NUM_FRAMES, hidden_size=128,
    num_hidden_layers=5, num_attention_heads=4, intermediate_size=512,
    initializer_range=0.08,  # about 1 / sqrt(128), as the published 0.02 is for a width of 768
)  # fmt: skip
STEPS, BATCH, LR, WARM_UP, WEIGHT_DECAY = 1200, 32, 1e-3, 100, 0.05  # AdamW, linear warm-up, cosine decay
MIN_LENGTH = 0.8  # share of a clip that its 16 frames cover, at least
SHIFT = 4  # pixels, at most, in both directions
CONTRAST, BRIGHTNESS = 0.4, 0.2  # of each colour channel: contrast 1 +- CONTRAST, brightness +- BRIGHTNESS
WHITENING_BATCHES = 8  # their patches initialise the patch embedding
MIN_VARIANCE = 0.01  # of a principal component, in squared normalised pixels: less is noise
CHECKPOINT_EVERY = 100  # steps


def read_clips(data_root, split):
    """[(class, frames uint8 [n, h, w, 3])] of the demo's clips of a split, sorted by class and name."""
    lines = (data_root / SPEC["lists"] / f"{split}list01.txt").read_text().splitlines()
    names = sorted(line.split()[0] for line in lines)  # <class>/<clip>.avi, for training clips with a number
    videos = [media.read_video(data_root / SPEC["videos"] / name) for name in tqdm(names, f"decode {split}")]
    return [(name.split("/")[0], video) for name, video in zip(names, videos, strict=True)]


def draw_frames(count, generator):
    """Indices of 16 frames, spread evenly over a random part of a clip of `count` frames."""
    length, start, offset = torch.rand(3, generator=generator).tolist()
    length = count * (MIN_LENGTH + (1 - MIN_LENGTH) * length)
    start *= count - length
    return np.floor(start + (np.arange(common.NUM_FRAMES) + offset) * length / common.NUM_FRAMES).astype(int)


def draw_batch(clips, generator):
    """(clips uint8 [BATCH, 16, S, S, 3] at network size, their indices): random frames, half are mirrored."""
    chosen = torch.randint(len(clips), (BATCH,), generator=generator).tolist()
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    videos = [clips[i][1] for i in chosen]
    frames = [video[draw_frames(len(video), generator)] for video in videos]
    x = torch.from_numpy(np.stack([media.network_clip(f, SPEC) for f in frames]))
    return torch.where(mirrored[:, None, None, None, None], x.flip(3), x), chosen


def pixel_values(x, generator):
    """Input float [n, 16, 3, S, S] of clips uint8 [n, 16, S, S, 3]: shifted, other colours, normalised."""
    x = x.permute(0, 1, 4, 2, 3).float() / 255
    n, _, channels, side, _ = x.shape
    wide = side + 2 * SHIFT
    padded = F.pad(x.flatten(1, 2), [SHIFT] * 4, mode="replicate").view(n, -1, channels, wide, wide)
    across, down = torch.randint(2 * SHIFT + 1, (2, n), generator=generator).tolist()
    rows, columns = ([slice(first, first + side) for first in firsts] for firsts in (down, across))
    x = torch.stack([padded[i, ..., rows[i], columns[i]] for i in range(n)])
    order = torch.rand(n, channels, generator=generator).argsort(1)  # of the channels, another for each clip
    x = x.gather(2, order[:, None, :, None, None].expand_as(x))
    contrast, brightness = torch.rand(2, n, 1, channels, 1, 1, generator=generator) * 2 - 1
    x = (x - 0.5) * (1 + CONTRAST * contrast) + 0.5 + BRIGHTNESS * brightness
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return (x - mean) / std


@torch.no_grad()
def whiten(projection, clips):
    """Initialises the patch embedding with the principal components of training patches, at unit variance.

    The variance of a raw patch is nearly all background colour and hardly any motion: from random weights, a
    network of this size spends most of its training on finding the motion.
    """
    size = projection.kernel_size
    patches = []
    for i in range(WHITENING_BATCHES):
        generator = contract.generator(SEED, "videomae", "patches", i)
        x = pixel_values(draw_batch(clips, generator)[0], generator).transpose(1, 2)  # [n, 3, 16, S, S]
        for axis, side in zip((2, 3, 4), size, strict=True):
            x = x.unfold(axis, side, side)
        patches.append(x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3))
    patches = torch.cat(patches).double()
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    count = projection.out_channels
    weight = (components[:, -count:] / (variances[-count:] + MIN_VARIANCE).sqrt()).T
    projection.weight.copy_(weight.unflatten(1, (3, *size)))
    projection.bias.copy_(-weight @ mean)


def train(clips, classes, path, device, steps):
    """Trains with cross-entropy from the whitened patch embedding and random weights. Returns the network."""
    settings = dict(steps=steps, batch=BATCH, lr=LR, weight_decay=WEIGHT_DECAY, clips=len(clips), **SHAPE)
    settings |= dict(warm_up=WARM_UP, length=MIN_LENGTH, shift=SHIFT, colour=[CONTRAST, BRIGHTNESS])
    settings |= dict(whitening=[WHITENING_BATCHES, MIN_VARIANCE])
    torch.manual_seed(SEED)
    names = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    network = VideoMAEForVideoClassification(VideoMAEConfig(**SHAPE, **names)).to(device)
    if device.type == "cpu":  # at this size faster than the backward pass of the fused attention
        network.set_attn_implementation("eager")
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == m] for m in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimiser, start = torch.optim.AdamW(groups, lr=LR), 0
    if not path.exists():
        whiten(network.videomae.embeddings.patch_embeddings.projection, clips)
    else:
        saved = contract.read(path)
        if saved["settings"] != settings:
            what, fix = f"{path} is a checkpoint of another training", f"start over with: rm {path}"
            raise contract.ContractError(what, settings, saved["settings"], fix)
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    network.train()
    bar = tqdm(range(start, steps), desc="videomae", initial=start, total=steps, mininterval=5)
    for step in bar:
        lr = LR * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = lr
        generator = contract.generator(SEED, "videomae", step)
        x, chosen = draw_batch(clips, generator)
        labels = torch.tensor([classes.index(clips[i][0]) for i in chosen], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(pixel_values(x, generator).to(device)).logits
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = dict(step=step + 1, settings=settings, network=network.state_dict())
            contract.save(path, {**state, "optimiser": optimiser.state_dict()})  # atomically
    return network


def export(network, folder):
    """Saves the model in the published layout, in half precision."""
    network.half().save_pretrained(folder)
    side = SHAPE["image_size"]
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side},
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(common.IMAGENET_MEAN), "image_std": list(common.IMAGENET_STD),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def parse_args():
    kind, shipped = argparse.RawDescriptionHelpFormatter, ROOT / "demo/models/videomae"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.set_defaults(dry_run=False)
    add = parser.add_argument
    add("--data-root", type=Path, default=ROOT / "data", help="folder that holds demo/ (data)")
    add("--work", type=Path, default=ROOT / "work/demo_training", help="for the checkpoint (work/...)")
    add("--out", type=Path, default=shipped, help="folder of the model (demo/models/videomae)")
    add("--steps", type=int, default=STEPS, help=f"({STEPS})")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main(args):
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = read_clips(args.data_root, "train")
    classes = sorted({label for label, _ in clips})
    network = train(clips, classes, args.work / "videomae.pt", device, args.steps)
    export(network, args.out)

    network, scale = videomae.load(args.out, device)
    test = read_clips(args.data_root, "test")
    seen = [media.network_clip(frames[media.uniform_frames(len(frames))], SPEC) for _, frames in test]
    _, logits = videomae.run(network, scale, np.stack(seen))
    predicted = [classes[i] for i in logits.argmax(1).tolist()]
    correct = np.array([p == label for p, (label, _) in zip(predicted, test, strict=True)])
    per_class = {c: round(100 * correct[[label == c for label, _ in test]].mean(), 1) for c in classes}
    print(f"{correct.sum()} of {len(test)} test clips correct: {100 * correct.mean():.2f} %")
    print("  " + ", ".join(f"{c} {accuracy}" for c, accuracy in per_class.items()))


if __name__ == "__main__":
    contract.run(parse_args, main, estimate=lambda args: {})
