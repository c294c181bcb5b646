"""MTT, matching training trajectories (Cazenavette et al., 2022), on videos, and MTT+D with --dynamic.

Experts are MiniC3Ds trained on the real clips; their weights are kept at the start and after each epoch.
Each step takes an expert at a random epoch and trains a student from there, N inner steps on synthetic clips,

  theta_{i+1} = theta_i - beta grad CE(theta_i; x_i)
  loss = |theta_N - target|^2 / |theta_0 - target|^2,

towards the expert's weights an epoch later. Clips and beta are learnt. The gradient is that of the unrolled
steps, exactly, but only one of them is held in memory: with lambda = d loss / d theta_N, for i = N-1 .. 0

  d loss / d x_i  = -beta lambda' d g_i / d x_i,   g_i = grad CE(theta_i; x_i)
  d loss / d beta = -sum lambda' g_i
  lambda         <- lambda - beta lambda' d g_i / d theta_i

Reads:   work/<data set>/01_clips/train/; --dynamic: 04_distilled/ipc<2K>/static_dc/
Writes:  work/<data set>/05_networks/experts/expert_<i>.npy float32 [epochs + 1, weights], .csv of its losses;
         04_distilled/ipc<K>/{mtt,mtt+d}/<class>.npy float16 [K, V, 16, S, S, 3], grey levels; V = 1,
         --dynamic 4; set.json with beta, loss.csv, preview/<class>.mp4
Run:     python baselines/mtt.py demo 5
         python baselines/static_dc.py demo 10 ; python baselines/mtt.py demo 5 --dynamic
         python 05_train_eval.py demo 5 --train-on mtt [--labels stored]
Cost:    demo IPC 5, by estimate: 13 min on two CPU cores, the experts 6 min, once. miniucf IPC 5: 4 h on an
         A100, the experts 12 min and 5 GB
Expect:  the loss falls below 1, its value of a student that stays where it starts; beta stays above 0.001
Differs: all experts are used, where the released code reads a third of them, and only their first epochs are
         trained, since no others are read. Tests while it learns chose the best step: here the last counts
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import common  # noqa: E402

EXPERT = ("expert_epochs", "expert_batch", "expert_lr")  # settings that decide an expert's bytes
LEAST_BETA = 0.001
INNER = 5  # cost of an inner step and of its gradient's gradient, in training steps; measured at 48 px


def parse_args():
    return parts.parse(__file__, __doc__, also=["experts"])


def gradient(network, weights, clips, labels, seed, create_graph=False):
    """(grad CE by the weights [P], the mean cross-entropy); dropout by `seed`."""
    loss = cross_entropy(network.logits(weights, clips, seed), labels)
    return torch.autograd.grad(loss, weights, create_graph=create_graph)[0], loss.item()


def train_expert(args, network, real, labels, index):
    """Plain SGD on the real clips. Returns the weights float32 [epochs + 1, P] and each epoch's mean loss."""
    s, weights = args.settings, network.new(args.seed, "mtt", "expert", index)
    snapshots, curve = [weights.cpu().numpy().copy()], []
    for epoch in contract.bar(range(s["expert_epochs"]), desc=f"expert {index + 1} of {s['experts']}"):
        generator = contract.generator(args.seed, "mtt", "expert", index, epoch)
        order, losses = torch.randperm(len(real), generator=generator), []
        for batch in order.split(s["expert_batch"]):
            seed = int(torch.randint(2**31, (), generator=generator))
            weights.requires_grad_()
            found, loss = gradient(network, weights, common.to_input(real[batch]), labels[batch], seed)
            weights = weights.detach() - s["expert_lr"] * found
            losses.append(loss)
        snapshots.append(weights.cpu().numpy().copy())
        curve.append(sum(losses) / len(losses))
    return np.stack(snapshots), curve


def chunks(count, size, inner, generator):
    """Rows of each of `inner` batches: all of `count`, or chunks of permutations, a new one when used up."""
    found = []
    while len(found) < inner:
        order = torch.randperm(count, generator=generator)
        found += order.split(size) if size < count else [torch.arange(count)]
    return found[:inner]


def match(network, start, target, steps, beta):
    """(loss of a student, d loss / d beta); adds the gradient by the clips to the .grad of what made them.

    start, target: weights [P]. steps: (make, labels, seed of dropout) of each inner step; make() returns the
    clips [b, 3, 16, S, S] with the graph that leads to them.
    """
    states, of_beta = [start.detach()], torch.zeros_like(target[0])
    scale = (states[0] - target).square().sum()
    for make, labels, seed in steps:
        with torch.no_grad():
            clips = make()
        weights = states[-1].requires_grad_()
        states.append(weights.detach() - beta * gradient(network, weights, clips, labels, seed)[0])
    adjoint = 2 * (states[-1] - target) / scale  # lambda: d loss / d theta_N
    for weights, (make, labels, seed) in zip(states[-2::-1], steps[::-1], strict=True):
        made = make()
        clips = made.detach().requires_grad_()
        found, _ = gradient(network, weights, clips, labels, seed, create_graph=True)
        of_weights, of_clips = torch.autograd.grad(found, [weights, clips], -beta * adjoint)
        made.backward(of_clips)
        of_beta -= adjoint @ found.detach()
        adjoint = adjoint + of_weights
    return ((states[-1] - target).square().sum() / scale).item(), of_beta


def make_experts(args, clips, inputs):
    """The weights [[epochs + 1, P], on the disk], trained if they are not there, and a digest."""
    s, parameters = args.settings, {key: getattr(args, key) for key in ("classes", "limit", "device")}
    parameters |= {key: s[key] for key in EXPERT}
    names = [f"expert_{i}" for i in range(s["experts"])]
    wanted = [f"{name}.{kind}" for name in names for kind in ("npy", "csv")]
    output = contract.Output(args, "05_networks/experts", parameters, inputs, wanted)
    if output.todo:
        real = torch.cat([*parts.on_device(clips, output.device).values()])
        labels = [torch.full((len(of_class),), i) for i, (of_class, _) in enumerate(clips.values())]
        network, labels = parts.Network(len(clips), output.device), torch.cat(labels).to(output.device)
        for name in output.mine(names, lambda name: [f"{name}.npy", f"{name}.csv"]):
            weights, curve = train_expert(args, network, real, labels, names.index(name))
            contract.save(output.folder / f"{name}.npy", weights)
            rows = [(epoch + 1, f"{loss:.6g}") for epoch, loss in enumerate(curve)]
            contract.save(output.folder / f"{name}.csv", [("epoch", "loss"), *rows])
            output.log(f"{name}: loss {curve[0]:.3f} in its first epoch, {curve[-1]:.3f} in its last")
        output.finish()
    args.estimate.pop("05_networks")  # --dry-run has said it
    source = contract.Input(args, "05_networks/experts", contract.command(args, "baselines/mtt.py"))
    digest = contract.digest(source.check(f"{name}.npy" for name in names))
    shape = s["expert_epochs"] + 1, None
    return [source.load(f"{name}.npy", shape, "float32") for name in names], digest


def estimate(args):
    s, count, copies = args.settings, len(args.classes) * args.ipc, parts.COPIES if args.dynamic else 1
    costs = parts.plan(args, INNER * s["inner"] * min(s["batch"], count), copies)
    clips = args.limit or args.spec["clips"][0] // len(args.spec["classes"])
    seconds = s["experts"] * s["expert_epochs"] * clips * len(args.classes) * parts.seconds(args)
    size = s["experts"] * (s["expert_epochs"] + 1) * 1.46e7
    return costs | {"05_networks": ("files of experts", 2 * s["experts"], seconds, size, parts.machine(args))}


def main(args):
    clips, statics, inputs = parts.read_inputs(args, parts.COPIES)
    experts, inputs["experts"] = make_experts(args, clips, {"training set": inputs["training set"]})
    output, s = parts.begin(args, inputs), args.settings
    if not output.todo:
        return

    device, network = output.device, parts.Network(len(clips), output.device)
    videos, groups = parts.make_videos(args, clips, statics, parts.COPIES, device)
    rate = parts.Learnt(torch.tensor(s["beta"], device=device))
    groups.append({"params": [rate.values], "lr": s["lr_beta"], "momentum": s["momentum_beta"]})
    optimiser, count = torch.optim.SGD(groups, lr=0.0, momentum=s["momentum"]), len(clips) * args.ipc

    def step(i):
        turn, place = divmod(i, len(experts))  # each expert once, then each again in another order
        order = torch.randperm(len(experts), generator=contract.generator(args.seed, "mtt", "experts", turn))
        generator, steps = contract.generator(args.seed, "mtt", i), []
        epoch = int(torch.randint(s["expert_epochs"], (), generator=generator))
        start, target = torch.from_numpy(experts[order[place]][epoch : epoch + 2].copy()).to(device)
        for rows in chunks(count, s["batch"], s["inner"], generator):
            rows = rows.to(device)
            coins = parts.throw(videos, rows, generator)
            seed = int(torch.randint(2**31, (), generator=generator))
            steps.append((functools.partial(videos, rows, coins), rows // args.ipc, seed))
        optimiser.zero_grad()
        loss, rate.values.grad = match(network, start, target, steps, rate.values.item())
        optimiser.step()
        rate.values.data.clamp_(min=LEAST_BETA)
        return loss

    losses = parts.run(args, output, s["steps"], [videos, rate, optimiser], step)
    parts.write(args, output, videos, losses, lr=rate.values.item() if s["lr_beta"] else None)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
