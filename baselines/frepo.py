"""FRePo (Zhou et al., 2022), ridge regression on the features of a pool of networks, and FRePo+D.

Each step takes a random network of the pool. From the features Fs of all synthetic clips and their labels Y,
which are learnt too, ridge regression predicts the targets one-hot - 1/K of a batch of real clips:

  prediction = Ft Fs' (Fs Fs' + 1e-6 trace(Fs Fs') / n I)^-1 Y
  loss = mean over real clips of |prediction - target|^2 + mean over rows of Y of -min(top1 - top2, 1/K)

Then that network trains for one step on the synthetic clips. It is reinitialised after max_age steps.

Reads:   work/<data set>/01_clips/train/; --dynamic: 04_distilled/ipc<K>/static_dc/
Writes:  work/<data set>/04_distilled/ipc<K>/{frepo,frepo+d}/<class>.npy float16 [K, 1, 16, S, S, 3], grey
         levels; <class>.labels.npy float32 [K, classes]; set.json, loss.csv, preview/<class>.mp4
Run:     python baselines/frepo.py demo 5
         python baselines/static_dc.py demo 5 ; python baselines/frepo.py demo 5 --dynamic
         python 05_train_eval.py demo 5 --train-on frepo [--labels stored]
Cost:    demo IPC 5, by estimate: 6 min on two CPU cores. miniucf IPC 5: 50 min on an A100
Expect:  the loss begins near 1 and falls, first of all by the labels
Differs: FRePo of pixels was not released for videos. The released +D warms the pool's rate up for longer than
         a network lives, so that the pool hardly learns: here it is constant, as in the authors' FRePo. One
         cosine for each rate, to a tenth of it. Trained on by 05 like any other set
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import parts  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

RIDGE = 1e-6  # times the mean of the kernel's diagonal
POOL_BATCH = 500  # synthetic clips of a pool network's step, at most
FLOOR = 0.1  # of each rate, where its cosine ends


def parse_args():
    return parts.parse(__file__, __doc__)


def first_labels(num_classes, ipc):
    """(one-hot - 1/K) / sqrt(K/10): float32 [K n, K]."""
    centred = torch.eye(num_classes) - 1 / num_classes
    return (centred / math.sqrt(num_classes / 10)).repeat_interleave(ipc, 0)


def predict(real, synthetic, labels):
    """Kernel ridge regression in float64: features [b, D] and [n, D], labels [n, K] -> predictions [b, K]."""
    real, synthetic, labels = real.double(), synthetic.double(), labels.double()
    kernel = synthetic @ synthetic.T
    ridge = RIDGE * kernel.trace() / len(kernel) * torch.eye(len(kernel), device=kernel.device)
    return real @ synthetic.T @ torch.linalg.solve(kernel + ridge, labels)


def margin_loss(labels):
    """Mean of -min(largest - second largest label, 1/K): a margin beyond 1/K has no gradient."""
    top = labels.topk(2, 1).values
    return -(top[:, 0] - top[:, 1]).clamp(max=1 / labels.shape[1]).mean()


class Pool:
    """Networks that learn from the synthetic clips, each from anew at `max_age` steps."""

    def __init__(self, settings, num_classes, device, seed):
        self.settings, self.num_classes, self.device, self.seed = settings, num_classes, device, seed
        size = settings["pool"]
        self.ages = [settings["max_age"] * i // size for i in range(size)]  # so that they differ in age
        self.births, self.networks, self.optimisers = [0] * size, [None] * size, [None] * size
        for member in range(size):
            self.renew(member)

    def renew(self, member):
        names = self.seed, "frepo", "network", member, self.births[member]
        torch.manual_seed(contract.generator(*names).initial_seed())
        network = common.MiniC3D(self.num_classes).to(self.device, memory_format=torch.channels_last_3d)
        self.networks[member] = network.requires_grad_(False)
        self.optimisers[member] = torch.optim.Adam(network.parameters(), lr=self.settings["lr_pool"])

    def features(self, member, clips):
        return self.networks[member].blocks(clips).flatten(1)

    def learn(self, member, clips, labels, seed):
        """One step of a network by squared error; dropout by `seed`."""
        network = self.networks[member].requires_grad_(True).train()
        torch.manual_seed(seed)
        loss = (network(clips) - labels).square().sum(1).mean()
        self.optimisers[member].zero_grad()
        loss.backward()
        self.optimisers[member].step()
        network.requires_grad_(False)
        self.ages[member] += 1
        if self.ages[member] >= self.settings["max_age"]:
            self.ages[member], self.births[member] = 0, self.births[member] + 1
            self.renew(member)

    def state_dict(self):
        states = [[x.state_dict() for x in of_pool] for of_pool in (self.networks, self.optimisers)]
        return {"ages": self.ages, "births": self.births, "states": states}

    def load_state_dict(self, state):
        self.ages, self.births = [*state["ages"]], [*state["births"]]
        for of_pool, values in zip((self.networks, self.optimisers), state["states"], strict=True):
            for x, value in zip(of_pool, values, strict=True):
                x.load_state_dict(value)


def estimate(args):
    count = len(args.classes) * args.ipc  # forward passes are a third of a step, frozen weights two thirds
    return parts.plan(args, args.settings["real"] / 3 + count * 2 / 3 + min(count, POOL_BATCH))


def main(args):
    clips, statics, inputs = parts.read_inputs(args, 1)
    output, s, k = parts.begin(args, inputs), args.settings, len(args.classes)
    if not output.todo:
        return

    device = output.device
    videos, groups = parts.make_videos(args, clips, statics, 1, device)
    labels = parts.Learnt(first_labels(k, args.ipc).to(device))
    optimiser = torch.optim.Adam([*groups, {"params": labels.parameters(), "lr": s["lr_labels"]}])
    rates = [group["lr"] for group in optimiser.param_groups]
    pool, real = Pool(s, k, device, args.seed), torch.cat([*parts.on_device(clips, device).values()])
    classes = torch.cat([torch.full((len(names),), i) for i, (names, _) in enumerate(clips.values())])
    targets = torch.eye(k, device=device)[classes] - 1 / k
    rows = torch.arange(k * args.ipc, device=device)
    coins = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)  # one image and one memory per clip

    def step(i):
        generator = contract.generator(args.seed, "frepo", i)
        member = int(torch.randint(s["pool"], (), generator=generator))
        batch = parts.draw(len(real), s["real"], generator)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * i / s["steps"])) / 2)
        with torch.no_grad():
            of_real = pool.features(member, common.to_input(real[batch]))
        prediction = predict(of_real, pool.features(member, videos(rows, coins)), labels.values)
        error = (prediction - targets[batch]).square().sum(1).mean()
        loss = error + margin_loss(labels.values)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        drawn = parts.draw(len(rows), POOL_BATCH, generator)
        with torch.no_grad():
            learnt = videos(rows[drawn], coins[drawn])
        pool.learn(member, learnt, labels.values[drawn].detach(), generator.initial_seed())
        return loss.item()

    losses = parts.run(args, output, s["steps"], [videos, labels, optimiser, pool], step)
    parts.write(args, output, videos, losses, labels=labels.values.detach())


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
