"""Static-DC: images by gradient matching (DC, Zhao et al., 2021), also the static memory of --dynamic.

Of every real video one random frame is drawn, once. Each step draws an untrained 2D network; of every class,
the gradient of the cross-entropy on its synthetic images is turned towards that on a batch of real frames:

  loss = sum over classes, weight tensors [out, ...] and their rows of 1 - cos(gradient real, synthetic)

With outer > 1 the same network is then trained on the images, for `inner` epochs, and matched again. As a set
of videos, each image is repeated 16 times.

Reads:   work/<data set>/01_clips/train/
Writes:  work/<data set>/04_distilled/ipc<K>/static_dc/<class>.npy float16 [K, 1, 16, S, S, 3], grey levels,
         16 equal frames; set.json, loss.csv, preview/<class>.mp4
Run:     python baselines/static_dc.py demo 5
         python baselines/static_dc.py demo 10       # the memory of dm.py and mtt.py demo 5 --dynamic
Cost:    demo IPC 5, by estimate: 3 min on two CPU cores. miniucf on an A100: IPC 5 17 min, IPC 10 15 h
Expect:  the loss falls; it begins near the number of rows, (128 blocks + K) K
Differs: as a row of videos it is our reading: the released code has no script of it. No augmentation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

WIDTH = 128  # channels of each block
EPSILON = 1e-6  # in the denominator of a cosine
TRAIN_BATCH = 256  # images per step between two outer steps
FRAME = {"demo": 0.29}  # cost of a training step on a frame, in those of MiniC3D on a clip, on a CPU; else
FRAME_GPU = 0.12  # by the number of operations


def parse_args():
    return parts.parse(__file__, __doc__, dynamic=False)


class Images(nn.Module):
    """Images that are learnt, from noise; as videos they are repeated 16 times."""

    copies = 1

    def __init__(self, images):  # [K m, 3, S, S]
        super().__init__()
        self.images = nn.Parameter(images)

    def forward(self, rows, coins=None):
        return self.images[rows, :, None].expand(-1, -1, common.NUM_FRAMES, -1, -1)


def convnet(num_classes, side, blocks):
    """Blocks of convolution, instance norm, ReLU and average pooling by 2, then a linear layer."""
    layers, channels = [], 3
    for _ in range(blocks):
        layers += [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.GroupNorm(WIDTH, WIDTH), nn.ReLU()]
        layers, channels = [*layers, nn.AvgPool2d(2)], WIDTH
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH * (side // 2**blocks) ** 2, num_classes))


def gradients(net, images, labels, create_graph=False):
    """The gradients of the mean cross-entropy by each weight tensor."""
    return torch.autograd.grad(
        cross_entropy(net(images), labels), [*net.parameters()], create_graph=create_graph
    )


def distance(real, synthetic):
    """Sum of 1 - cos over the rows [out, -1] of all weight tensors; biases and norms do not count."""
    total = 0.0
    for a, b in zip(real, synthetic, strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum()
    return total


def random_frames(args, clips, device):
    """A frame of each real clip, drawn once: {class: float32 [n, 3, S, S]}."""
    frames = {}
    for label, (_, array) in clips.items():
        generator = contract.generator(args.seed, "static_dc", "frames", label)
        which = torch.randint(common.NUM_FRAMES, (len(array),), generator=generator).tolist()
        still = np.stack([array[i, 0, [f]] for i, f in enumerate(which)])  # uint8 [n, 1, S, S, 3]
        frames[label] = common.to_input(torch.from_numpy(still).to(device))[:, :, 0]
    return frames


def first_images(args, frames, device):
    """Noise, or with the setting real_start random ones of the frames: [K m, 3, S, S]."""
    m, side, generator = args.ipc, args.spec["side"], contract.generator(args.seed, "static_dc", "images")
    if args.settings["real_start"]:
        return torch.cat([real[parts.draw(len(real), m, generator)] for real in frames.values()])
    return torch.randn(len(frames) * m, 3, side, side, generator=generator).to(device)


def train_between(net, images, labels, epochs, lr, generator):
    """Plain SGD on the images as they are."""
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(TRAIN_BATCH):
            found = gradients(net, images[batch], labels[batch])
            with torch.no_grad():
                for weight, gradient in zip(net.parameters(), found, strict=True):
                    weight -= lr * gradient


def estimate(args):
    k, m, s = len(args.classes), args.ipc, args.settings  # a gradient's gradient costs three steps
    real = min(s["real"], args.limit or args.spec["clips"][0] // len(args.spec["classes"]))
    frames = s["outer"] * k * (real + 3 * m) + (s["outer"] - 1) * s["inner"] * k * m
    return parts.plan(args, frames * FRAME.get(args.dataset, FRAME_GPU))


def main(args):
    clips, files = media.real_clips(args, least=args.ipc if args.settings["real_start"] else 1)
    output, s = parts.begin(args, {"training set": contract.digest(files)}), args.settings
    if not output.todo:
        return

    device, m, side = output.device, args.ipc, args.spec["side"]
    frames, labels = (
        random_frames(args, clips, device),
        torch.arange(len(clips)).repeat_interleave(m).to(device),
    )
    videos = Images(first_images(args, frames, device))
    optimiser = torch.optim.SGD(videos.parameters(), lr=s["lr"], momentum=s["momentum"])

    def step(i):
        generator, total = contract.generator(args.seed, "static_dc", i), 0.0
        torch.manual_seed(generator.initial_seed())
        net = convnet(len(clips), side, s["blocks"]).to(device)
        for outer in range(s["outer"]):
            optimiser.zero_grad()
            for index, real in enumerate(frames.values()):
                batch = real[parts.draw(len(real), s["real"], generator)]
                rows = slice(m * index, m * (index + 1))
                target = gradients(net, batch, torch.full((len(batch),), index, device=device))
                found = gradients(net, videos.images[rows], labels[rows], create_graph=True)
                loss = distance(target, found)
                loss.backward(inputs=[videos.images])
                total += loss.item() / s["outer"]
            optimiser.step()
            if outer + 1 < s["outer"]:
                train_between(net, videos.images.detach(), labels, s["inner"], s["lr_net"], generator)
        return total

    losses = parts.run(args, output, s["steps"], [videos, optimiser], step)
    parts.write(args, output, videos, losses)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
