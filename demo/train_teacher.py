"""Trains the demo's VideoMAE: the teacher of soft labels (section 3.5) and the features of the metrics (appendix A).

The network is the library's own class (VideoMAEForVideoClassification) at an eightieth of the published size, in the
published layout, so that everything runs on it by the code that runs the real one. Only the demo's training clips are
used, each time at another speed and place in time, mirrored, shifted, and in other colours: the test clips' grounds and
figures have colours that no training clip shows.

Reads:   <data root>/demo (demo/draw_videos.py)
Writes:  demo/models/videomae/{config.json,preprocessor_config.json,model.safetensors}
         work/demo_training/videomae.pt   checkpoint: a killed run goes on from it and ends with the same weights
Run:     python demo/train_teacher.py
         nice -n 19 python demo/train_teacher.py &     beside other work
Cost:    about 6 minutes on two idle CPU cores, 1 GB of memory
Expect:  it prints the accuracy on the 336 test clips: 98.8 % when the shipped weights were trained
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import VideoMAEConfig, VideoMAEForVideoClassification  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SEED = 0
# 4 x 4 patches of 12 px and 8 pairs of frames: 128 tokens, 1.1 M parameters.
SHAPE = dict(
    image_size=48, patch_size=12, tubelet_size=2, num_frames=common.NUM_FRAMES, hidden_size=128, num_hidden_layers=5,
    num_attention_heads=4, intermediate_size=512, initializer_range=0.08,  # about 1 / sqrt(128), as 0.02 is of 768
)  # fmt: skip
STEPS, BATCH, RATE, WARM_UP, WEIGHT_DECAY = 1200, 32, 1e-3, 100, 0.05  # AdamW, cosine rate
LEAST_LENGTH = 0.8  # share of a clip that its 16 frames are spread over, at least
SHIFT = 4  # pixels, at most, in both directions
GAIN, LIFT = 0.4, 0.2  # contrast 1 +- GAIN and brightness +- LIFT of each colour
WHITENING_BATCHES = 8  # whose patches the first layer starts from
LEAST_VARIANCE = 0.01  # of a principal component, in squared units of the scaled pixels: less is noise
CHECKPOINT_EVERY = 100  # steps


def step_generator(step):
    """The generator of one training step: what a step draws depends on the seed and the step only."""
    digest = hashlib.sha256(f"{SEED}/videomae/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def read_clips(data_root, split):
    """[(class, frames uint8 [n, h, w, 3])] of the demo's clips of a split."""
    clips = [c for c in common.list_clips("demo", data_root) if c[2] == split]
    folder = Path(data_root) / common.DATASETS["demo"]["videos"]
    return [
        (label, common.read_video(folder / label / f"{name}.avi"))
        for label, name, _, _ in tqdm(clips, desc=f"decode {split}", mininterval=5)
    ]


def draw_frames(count, generator):
    """Indices of 16 frames spread evenly over a random stretch of `count` frames."""
    length, start, offset = torch.rand(3, generator=generator).tolist()
    length = count * (LEAST_LENGTH + (1 - LEAST_LENGTH) * length)
    start *= count - length
    return np.floor(start + (np.arange(common.NUM_FRAMES) + offset) * length / common.NUM_FRAMES).astype(int)


def draw_batch(clips, generator):
    """(uint8 [BATCH, 16, S, S, 3] clips as the network sees them, indices of the clips): random in time and mirrored."""
    chosen = torch.randint(len(clips), (BATCH,), generator=generator).tolist()
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    batch = []
    for i in chosen:
        frames = clips[i][1]
        batch.append(common.network_clip(frames[draw_frames(len(frames), generator)], "demo"))
    x = torch.from_numpy(np.stack(batch))
    return torch.where(mirrored[:, None, None, None, None], x.flip(3), x), chosen


def change_colours(x, generator):
    """Float clips [n, 16, 3, S, S] (0 to 1) shifted, with their colours exchanged, and contrast and brightness changed."""
    n, _, channels, side, _ = x.shape
    padded = F.pad(x.flatten(1, 2), [SHIFT] * 4, mode="replicate").view(n, -1, channels, *[side + 2 * SHIFT] * 2)
    across, down = torch.randint(2 * SHIFT + 1, (2, n), generator=generator).tolist()
    x = torch.stack([padded[i, ..., down[i] : down[i] + side, across[i] : across[i] + side] for i in range(n)])
    order = torch.rand(n, channels, generator=generator).argsort(1)
    x = x.gather(2, order[:, None, :, None, None].expand_as(x))
    gain, lift = torch.rand(2, n, 1, channels, 1, 1, generator=generator) * 2 - 1
    return (x - 0.5) * (1 + GAIN * gain) + 0.5 + LIFT * lift


def scaled(x, generator):
    """pixel_values of a batch of clips uint8 [n, 16, S, S, 3], in changed colours."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return (change_colours(x.permute(0, 1, 4, 2, 3).float() / 255, generator) - mean) / std


@torch.no_grad()
def whiten(projection, clips):
    """Sets the patch projection to the leading principal components of training patches, each at about unit variance.

    In a raw patch the colour of the ground is all, and movement almost nothing: from random weights a network of this
    size takes most of its time to find it.
    """
    size = projection.kernel_size
    patches = []
    for i in range(WHITENING_BATCHES):
        generator = step_generator(f"patches/{i}")
        x = scaled(draw_batch(clips, generator)[0], generator).transpose(1, 2)  # [n, 3, 16, S, S]
        for axis, side in zip((2, 3, 4), size, strict=True):
            x = x.unfold(axis, side, side)
        patches.append(x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3))
    patches = torch.cat(patches).double()
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    count = projection.out_channels
    weight = (components[:, -count:] / (variances[-count:] + LEAST_VARIANCE).sqrt()).T
    projection.weight.copy_(weight.unflatten(1, (3, *size)))
    projection.bias.copy_(-weight @ mean)


def train(clips, classes, path, device, steps):
    """Trains from random weights with cross-entropy. Returns the network."""
    settings = dict(steps=steps, batch=BATCH, rate=RATE, weight_decay=WEIGHT_DECAY, clips=len(clips), **SHAPE)
    settings |= dict(warm_up=WARM_UP, length=LEAST_LENGTH, shift=SHIFT, gain=GAIN, lift=LIFT)
    settings |= dict(whitening=[WHITENING_BATCHES, LEAST_VARIANCE])
    torch.manual_seed(SEED)
    names = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    network = VideoMAEForVideoClassification(VideoMAEConfig(**SHAPE, **names)).to(device)
    if device.type == "cpu":  # faster in training than the fused attention's backward pass at this size
        network.set_attn_implementation("eager")
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=plain, weight_decay=0.0)]
    optimiser = torch.optim.AdamW(groups, lr=RATE)
    start = 0
    if not path.exists():
        whiten(network.videomae.embeddings.patch_embeddings.projection, clips)
    else:
        saved = torch.load(path, weights_only=True)
        if saved["settings"] != settings:  # its weights would not be what they say
            sys.exit(f"{path}: expected a checkpoint of {settings}, found one of {saved['settings']}; remove it to start anew")
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    network.train()
    bar, average = tqdm(range(start, steps), desc="videomae", initial=start, total=steps, mininterval=5), None
    for step in bar:
        rate = RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = step_generator(step)
        x, chosen = draw_batch(clips, generator)
        labels = torch.tensor([classes.index(clips[i][0]) for i in chosen], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(scaled(x, generator).to(device)).logits
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        right = (logits.argmax(1) == labels).float().mean().item()
        average = right if average is None else 0.95 * average + 0.05 * right
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{average:.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = dict(step=step + 1, settings=settings, network=network.state_dict(), optimiser=optimiser.state_dict())
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the last complete checkpoint
    return network


def export(network, folder):
    """Writes the model in the published layout, in half precision."""
    network.half().save_pretrained(folder)
    side = SHAPE["image_size"]
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(common.IMAGENET_MEAN),
        "image_std": list(common.IMAGENET_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder that holds demo/ (data)")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "demo_training", help="where the checkpoint goes")
    parser.add_argument("--out", type=Path, default=common.DEMO_VIDEOMAE, help="folder of the model (demo/models/videomae)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = read_clips(args.data_root, "train")
    classes = sorted({label for label, _ in clips})
    network = train(clips, classes, args.work / "videomae.pt", device, args.steps)
    export(network, args.out)

    network, scale = common.load_videomae(args.out, device)
    test = read_clips(args.data_root, "test")
    seen = np.stack([common.network_clip(frames[common.uniform_frames(len(frames))], "demo") for _, frames in test])
    _, logits = common.run_videomae(network, scale, seen)
    right = np.array([classes[i] == label for i, (label, _) in zip(logits.argmax(1).tolist(), test, strict=True)])
    per_class = {c: round(100 * right[[label == c for label, _ in test]].mean(), 1) for c in classes}
    print(f"{right.sum()} of {len(test)} test clips right: {100 * right.mean():.2f} %")
    print("  " + ", ".join(f"{c} {rate}" for c, rate in per_class.items()))


if __name__ == "__main__":
    main()
