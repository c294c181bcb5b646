"""What the baselines share: settings, real clips, what is learnt, MiniC3D on flat weights, steps, writing.

A baseline learns clips of the networks' input (ImageNet-normalised), float32 [K n, 3, 16, S, S] of K classes
with n = IPC clips each, class after class, or memories from which a hallucinator makes them (--dynamic).
"""

import contract

import itertools
import math
from argparse import ArgumentTypeError, Namespace

import numpy as np
import torch
from torch import nn

import common
import media

# Settings by method: "all", then what differs at an IPC, on a data set, or for both. "lr*ipc": lr divided by
# the IPC, as a clip's gradient goes with 1 / n. steps: of the learning. real: real clips per step and class,
# of frepo in all. lr: of pixels, images or dynamic memories. momentum: of SGD; frepo has Adam.
# Sources: (R) released by Dancing for MiniUCF; (S) by scale from (R); (I) released for images, by the
# method's authors; (O) own choice. The rates of HMDB51, and of DM and MTT at IPC 5, are not published.
SETTINGS = {
    "dm": {
        "all": {"steps": 5000, "real": 64, "lr*ipc": 30.0, "momentum": 0.5},  # (R) at IPC 1, else (S)
        "demo": {"steps": 200, "real": 16, "lr*ipc": 200.0},  # (O): moves pixels by some 0.02 a step
    },
    "dm+d": {
        "all": {"steps": 5000, "real": 64, "lr*ipc": 200.0, "lr_hallucinator": 1e-6, "momentum": 0.95},
        1: {"lr": 1e-4, "lr_hallucinator": 1e-5},  # (R), as "all" at IPC 5; the memories hardly move
        "demo": {"steps": 200, "real": 16, "lr*ipc": 20.0, "lr_hallucinator": 1e-4},  # (O)
    },
    "mtt": {  # inner: steps of the student, of `batch` clips each; beta: their rate at the start
        "all": {"steps": 8000, "lr*ipc": 1e5, "lr_beta": 1e-5, "beta": 0.01}  # (R), (S)
        | {"momentum": 0.5, "momentum_beta": 0.5}  # (R)
        | {"inner": 5, "batch": 128},  # (O): those of mtt+d
        1: {"inner": 10, "batch": 256},  # (R)
        "demo": {"steps": 80, "lr*ipc": 4e3, "beta": 0.03, "inner": 5, "batch": 16},  # (O)
        ("demo", 1): {"batch": 8},
    },
    "mtt+d": {
        "all": {"steps": 10000, "lr*ipc": 2e3, "lr_hallucinator": 1e-3, "momentum": 0.95}  # (R), (S)
        | {"lr_beta": 0.0, "beta": 0.01, "momentum_beta": 0.9, "inner": 5, "batch": 128},  # (R) at IPC 5
        1: {"lr": 1e4, "lr_beta": 1e-5, "inner": 10}  # (R)
        | {"batch": 256},  # all videos; (R) has 50, which are all of MiniUCF's, but one less than HMDB51's
        "demo": {"steps": 80, "lr*ipc": 400.0, "lr_beta": 1e-5, "beta": 0.03, "inner": 5, "batch": 16},  # (O)
        ("demo", 1): {"batch": 8},
    },
    "experts": {  # of MTT, trained by plain SGD; (R) has 50 epochs, of which it reads the first 10
        "all": {"experts": 30, "expert_epochs": 10, "expert_batch": 256, "expert_lr": 0.01},
        "demo": {"experts": 3, "expert_epochs": 6, "expert_batch": 64, "expert_lr": 0.05},  # (O)
    },
    "frepo": {  # pool: networks; each is made anew when it has learnt max_age steps
        "all": {"steps": 10000, "real": 512, "lr": 1e-2, "lr_labels": 1e-3}  # (R), but lr (O)
        | {"pool": 10, "max_age": 100, "lr_pool": 3e-4},  # (R), but lr_pool (I)
        "demo": {"steps": 150, "real": 64, "pool": 4, "max_age": 50}  # (O)
        | {"lr_labels": 1e-2},  # (O): in so few steps labels of 1e-3 hardly change
    },
    "static_dc": {  # outer: steps on the images per network; inner: its epochs on them after each
        "all": {"steps": 3000, "real": 256, "lr": 0.1, "momentum": 0.5, "blocks": 4}  # (R)
        | {"outer": 1, "inner": 1, "lr_net": 0.01, "real_start": 0},  # (I)
        10: {"outer": 10, "inner": 50},  # (I)
        20: {"outer": 20, "inner": 25},  # (I); no other numbers of images have loops
        "demo": {"steps": 100, "real": 16, "blocks": 3, "outer": 1, "inner": 1, "real_start": 1},  # (O)
    },
}
SETTINGS["frepo+d"] = {**SETTINGS["frepo"], "all": SETTINGS["frepo"]["all"] | {"lr_hallucinator": 1e-3}}
STATIC = "static_dc"  # the set whose images are the static memory of --dynamic
COPIES = 2  # statics, and dynamics, per video of DM+D and MTT+D; of FRePo+D one
CHECKPOINT_EVERY = 50  # steps
GRID = 64  # steps of a stored clip per grey level, finer than float16 from level 32 on; real clips are exact
SECONDS, SECONDS_A100 = {"demo": 0.025}, 5.3e-4  # per clip and training step of MiniC3D; A100 by estimate


# --- the command line -------------------------------------------------------------------------------------


def find_settings(method, dataset, ipc):
    """{name: value} of SETTINGS."""
    found = {}
    for key in ("all", ipc, dataset, (dataset, ipc)):
        for name, value in SETTINGS[method].get(key, {}).items():
            found[name.removesuffix("*ipc")] = value * ipc if name.endswith("*ipc") else value
    return found


def setting(word):
    """("lr", "30") of "lr=30", for argparse."""
    key, _, text = word.partition("=")
    try:
        if 0 <= float(text) < math.inf:
            return key, text
    except ValueError:
        pass
    raise ArgumentTypeError(f"{word}: expected <setting>=<number of at least 0>")


def parse(script, doc, dynamic=True, also=()):
    """The arguments of a baseline, with `settings` {name: value}. also: further entries of SETTINGS."""
    parser = contract.arguments(script, doc, media.find_data_set)
    add = parser.add_argument
    parser.set_defaults(dynamic=False)
    if dynamic:
        add("--dynamic", action="store_true", help="learn dynamic memories and a hallucinator (Dancing's +D)")
    options = {"nargs": "+", "action": "extend", "type": setting, "default": [], "metavar": "KEY=VALUE"}
    add("--set", help="other values of the settings in baselines/parts.py, to be used with --name", **options)
    add("--name", help="name of the set (that of the script; +d with --dynamic)")
    args = contract.parse(parser)
    args.method = args.script.stem + "+d" * args.dynamic
    args.name = args.name or args.method
    args.settings = {}
    for method in (args.method, *also):
        args.settings |= find_settings(method, args.dataset, args.ipc)
    for key, text in args.set:
        kind = type(args.settings.get(key))
        if key not in args.settings or (kind is int and not text.isdecimal()):
            parser.error(f"--set {key}={text}: expected a number of {', '.join(args.settings)}")
        args.settings[key] = kind(text)
    return args


def machine(args):
    return "two CPU cores" if args.dataset in SECONDS else "an A100"


def seconds(args):
    """Of a training step of MiniC3D on one clip."""
    return SECONDS.get(args.dataset, SECONDS_A100)


def plan(args, clips, copies=1):
    """The estimate of a set. clips: the cost of a step, in training steps of MiniC3D on one clip."""
    count, files = len(args.classes) * args.ipc * copies**2, wanted(args)
    size = 2 * count * common.NUM_FRAMES * args.spec["side"] ** 2 * 3
    cost = args.settings["steps"] * clips * seconds(args), size, machine(args)
    return {"04_distilled": (f"files of {args.name}", len(files), *cost)}


# --- real clips -------------------------------------------------------------------------------------------


def start_clips(args, clips, device):
    """`ipc` real clips of each class, [K n, 3, 16, S, S]: those that 05 --train-on random has in repeat 0."""
    chosen, starts = media.select_random(clips, args.ipc, args.seed, 0), []
    for label, (names, array) in clips.items():
        starts.append(torch.from_numpy(array[[names.index(name) for name in chosen[label]], 0]))
    return common.to_input(torch.cat(starts).to(device))


def on_device(clips, device):
    """{class: uint8 [n, 16, S, S, 3]} in the device's memory."""
    return {label: torch.from_numpy(np.array(array[:, 0])).to(device) for label, (_, array) in clips.items()}


def draw(count, size, generator):
    """`size` of `count` rows (all if there are fewer), drawn without replacement."""
    return torch.randperm(count, generator=generator)[:size]


# --- what is learnt ---------------------------------------------------------------------------------------


class Learnt(nn.Module):
    """A tensor that is learnt beside the clips: labels, a learning rate."""

    def __init__(self, start):
        super().__init__()
        self.values = nn.Parameter(start)


class Pixels(nn.Module):
    """Clips of which every pixel is learnt."""

    copies = 1

    def __init__(self, clips):  # [K n, 3, 16, S, S]
        super().__init__()
        self.clips = nn.Parameter(clips.clone())

    def forward(self, rows, coins):
        return self.clips[rows]


class Memories(nn.Module):
    """Images that stay as they are, dynamic memories that are learnt, and a hallucinator of 327 weights.

    Video j has the images and the dynamic memories copies * j .. copies * (j + 1) - 1 of its own; coins say
    which of them make the clip.
    """

    def __init__(self, statics, copies, seed):  # [K n copies, 3, S, S]
        super().__init__()
        (count, _, *size), generator = statics.shape, contract.generator(seed, "dynamic memories")
        self.copies = copies
        self.register_buffer("statics", statics)
        start = torch.randn(count, 1, common.NUM_FRAMES, *size, generator=generator)
        self.dynamics = nn.Parameter(start.to(statics.device))
        torch.manual_seed(contract.generator(seed, "hallucinator").initial_seed())
        self.hallucinator = nn.Conv3d(4, 3, 3, padding=1).to(statics.device)

    def forward(self, rows, coins):
        """rows: int64 [b], videos. coins: int64 [b, 2], which image and dynamic memory. [b, 3, 16, S, S]."""
        static, dynamic = (self.copies * rows[:, None] + coins).unbind(1)
        still = self.statics[static, :, None].expand(-1, -1, common.NUM_FRAMES, -1, -1)
        return self.hallucinator(torch.cat([still, self.dynamics[dynamic]], 1))


def throw(videos, rows, generator):
    """Coins int64 [b, 2] for videos(rows, coins), each copy equally likely."""
    return torch.randint(videos.copies, (len(rows), 2), generator=generator).to(rows.device)


def read_inputs(args, copies):
    """(real clips, images of the static memory [K n copies, 3, S, S] or None, {input: digest}).

    The images are those of the Static-DC set of copies * IPC images per class.
    """
    clips, files = media.real_clips(args, least=args.ipc)
    digest = contract.digest(files)
    if not args.dynamic:
        return clips, None, {"training set": digest}
    ipc, side = copies * args.ipc, args.spec["side"]
    fix = contract.command(Namespace(**{**vars(args), "ipc": ipc}), f"baselines/{STATIC}.py")
    source = contract.Input(args, f"04_distilled/ipc{ipc}/{STATIC}", fix)
    files, shape = source.check(f"{c}.npy" for c in args.classes), (ipc, 1, common.NUM_FRAMES, side, side, 3)
    frames = [source.load(f"{c}.npy", shape, "float16")[:, 0, :1] for c in args.classes]  # [m, 1, S, S, 3]
    images = common.to_input(torch.from_numpy(np.concatenate(frames)))[:, :, 0]
    return clips, images, {"training set": digest, "statics": contract.digest(files)}


def make_videos(args, clips, statics, copies, device):
    """(what is learnt, groups for an optimiser): pixels of real clips, or memories if there are statics."""
    if statics is None:
        videos = Pixels(start_clips(args, clips, device))
        return videos, [{"params": [videos.clips], "lr": args.settings["lr"]}]
    videos = Memories(statics.to(device), copies, args.seed)
    hallucinator = {"params": [*videos.hallucinator.parameters()], "lr": args.settings["lr_hallucinator"]}
    return videos, [{"params": [videos.dynamics], "lr": args.settings["lr"]}, hallucinator]


class Network:
    """MiniC3D as a function of all its weights in one vector."""

    def __init__(self, num_classes, device):
        self.num_classes, self.device = num_classes, device
        self.net = common.MiniC3D(num_classes).to(device).train()  # its own weights are never used
        self.shapes = {name: weight.shape for name, weight in self.net.named_parameters()}

    def new(self, *names):
        """The weights of an untrained network, drawn for (seed, names...): float32 [P]."""
        torch.manual_seed(contract.generator(*names).initial_seed())
        fresh = common.MiniC3D(self.num_classes)
        return nn.utils.parameters_to_vector(fresh.parameters()).detach().to(self.device)

    def split(self, weights, part=""):
        """{name: tensor} of the weights [P] whose name begins with `part`, without it."""
        values = weights.split([shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), values, strict=True)
        return {n.removeprefix(part): v.view(shape) for (n, shape), v in named if n.startswith(part)}

    def features(self, weights, clips):
        """The last block's output, flattened: [b, D]; no dropout before it."""
        return torch.func.functional_call(self.net.blocks, self.split(weights, "blocks."), (clips,)).flatten(
            1
        )

    def logits(self, weights, clips, seed):
        """As in training; `seed` is that of dropout."""
        torch.manual_seed(seed)
        return torch.func.functional_call(self.net, self.split(weights), (clips,))


# --- steps and writing ------------------------------------------------------------------------------------


def run(args, output, steps, state, step):
    """Calls step(i), which returns the loss, for i below `steps`. Returns all losses.

    state: what the steps change, with state_dict and load_state_dict; kept in a checkpoint, from which a run
    that was stopped goes on. What a step draws depends on the seed and i alone.
    """
    start, losses, checkpoint = 0, [], output.folder / ".checkpoint.pt"
    if checkpoint.exists():
        start, losses, saved = contract.read(checkpoint)
        for part, values in zip(state, saved, strict=True):
            part.load_state_dict(values)
    bar = contract.bar(range(start, steps), desc=args.name, initial=start, total=steps)
    for i in bar:
        losses.append(step(i))
        if not math.isfinite(losses[-1]):
            what = f"{args.name}: the loss of step {i + 1} is not finite"
            raise contract.ContractError(what, fix="a smaller rate: --set lr=...")
        bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
        if (i + 1) % CHECKPOINT_EVERY == 0 and i + 1 < steps:
            contract.save(checkpoint, (i + 1, losses, [part.state_dict() for part in state]))
    return losses


def wanted(args):
    """The files of a set."""
    labels = [f"{c}.labels.npy" for c in args.classes if "frepo" in args.method]
    shown = [f"preview/{c}.mp4" for c in args.classes]
    return [*(f"{c}.npy" for c in args.classes), *labels, *shown, "set.json", "loss.csv"]


def begin(args, inputs):
    """The set's folder."""
    parameters = {key: getattr(args, key) for key in ("ipc", "method", "classes", "limit", "device")}
    place, changed = f"04_distilled/ipc{args.ipc}/{args.name}", " ".join(map("=".join, args.set))
    parameters |= args.settings | ({"set": changed} if changed else {})  # the tables mark it
    return contract.Output(args, place, parameters, inputs, wanted(args))


def to_grey(clips):
    """[n, 3, 16, S, S] as the networks see them -> float16 [n, 16, S, S, 3] in grey levels, not clipped."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    grey = (clips.detach().cpu().double().permute(0, 2, 3, 4, 1) * std + mean) * 255
    return ((grey * GRID).round() / GRID).to(torch.float16).numpy()


@torch.no_grad()
def write(args, output, videos, losses, lr=None, labels=None):
    """Writes the set: every variant of each clip, previews, the loss of each step, and what it stores.

    lr: the learning rate that the method has learnt. labels: float [K n, K], likewise.
    """
    n, both = args.ipc, list(itertools.product(range(videos.copies), repeat=2))  # image, dynamic memory
    for index, label in enumerate(args.classes):
        rows = torch.arange(n * index, n * (index + 1), device=output.device)
        coins = [torch.tensor([pair] * n, device=output.device) for pair in both]
        clips = np.stack([to_grey(videos(rows, pair)) for pair in coins], 1)  # [n, V, 16, S, S, 3]
        if not np.isfinite(clips).all():
            what = f"{args.name}: a clip of {label} is not finite"
            raise contract.ContractError(what, fix="a smaller rate: --set lr=...")
        contract.save(output.folder / f"{label}.npy", clips)
        shown = np.concatenate(list(clips[:, 0]), 2)  # [16, S, n S, 3]: beside each other
        path = output.folder / f"preview/{label}.mp4"
        media.write_mp4(path, shown.astype(np.float32).clip(0, 255).round().astype(np.uint8))
        if labels is not None:
            contract.save(output.folder / f"{label}.labels.npy", labels[rows].cpu().float().numpy())
    stored = [*videos.state_dict().values()] + ([] if labels is None else [labels])
    size = sum(4 * value.numel() for value in stored) + (0 if lr is None else 4)  # in float32
    about = {"method": args.method, "variants": len(both), "bytes": size, "lr": lr}
    contract.save(output.folder / "set.json", about | {"labels": labels is not None})
    curve = [(i + 1, f"{loss:.6g}") for i, loss in enumerate(losses)]
    contract.save(output.folder / "loss.csv", [("step", "loss"), *curve])
    (output.folder / ".checkpoint.pt").unlink(missing_ok=True)
    output.finish()
