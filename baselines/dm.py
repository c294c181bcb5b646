"""DM, distribution matching (Zhao and Bilen, 2023), on videos, and DM+D (Dancing with Still Images).

Each step draws an untrained MiniC3D. Of every class, the mean feature of its synthetic clips is moved towards
that of a batch of real ones:

  loss = sum over classes of | mean f(real) - mean f(synthetic) |^2,   f: the last block's output

Reads:   work/<data set>/01_clips/train/; --dynamic: 04_distilled/ipc<2K>/static_dc/
Writes:  work/<data set>/04_distilled/ipc<K>/{dm,dm+d}/<class>.npy float16 [K, V, 16, S, S, 3], grey levels;
         V = 1, --dynamic 4; set.json, loss.csv, preview/<class>.mp4
Run:     python baselines/dm.py demo 5
         python baselines/static_dc.py demo 10 ; python baselines/dm.py demo 5 --dynamic
         bash baselines/grid.sh dm 5 100 1000 10000      # rates, on validation groups
Cost:    demo IPC 5, by estimate: 6 min on two CPU cores. miniucf IPC 5: 55 min on an A100
Expect:  the loss falls; after 0 steps the set is what 05 --train-on random has in repeat 0
Differs: one window of each real clip, never mirrored; no augmentation, as in the released code. Its tests
         while it learns chose the best step by the test clips: here the last step counts
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import parts  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402


def parse_args():
    return parts.parse(__file__, __doc__)


def class_loss(network, weights, real, synthetic):
    """| mean f(real) - mean f(synthetic) |^2 of the clips [b, 3, 16, S, S] of one class."""
    with torch.no_grad():
        target = network.features(weights, real).mean(0)
    return (target - network.features(weights, synthetic).mean(0)).square().sum()


def estimate(args):
    k, s = len(args.classes), args.settings  # a forward pass is a third of a step, frozen weights two thirds
    clips, copies = k * s["real"] / 3 + k * args.ipc * 2 / 3, parts.COPIES if args.dynamic else 1
    return parts.plan(args, clips, copies)


def main(args):
    clips, statics, inputs = parts.read_inputs(args, parts.COPIES)
    output, s = parts.begin(args, inputs), args.settings
    if not output.todo:
        return

    device, network = output.device, parts.Network(len(args.classes), output.device)
    videos, groups = parts.make_videos(args, clips, statics, parts.COPIES, device)
    optimiser, real = torch.optim.SGD(groups, momentum=s["momentum"]), parts.on_device(clips, device)

    def step(i):
        weights, total = network.new(args.seed, "dm", i), 0.0
        optimiser.zero_grad()
        for index, label in enumerate(args.classes):  # one class after the other: a K-th of the memory
            generator = contract.generator(args.seed, "dm", i, label)
            batch = real[label][parts.draw(len(real[label]), s["real"], generator)]
            rows = torch.arange(args.ipc * index, args.ipc * (index + 1), device=device)
            synthetic = videos(rows, parts.throw(videos, rows, generator))
            loss = class_loss(network, weights, common.to_input(batch), synthetic)
            loss.backward()
            total += loss.item()
        optimiser.step()
        return total

    losses = parts.run(args, output, s["steps"], [videos, optimiser], step)
    parts.write(args, output, videos, losses)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
