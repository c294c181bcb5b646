"""Fine-tunes the text-to-video model's U-Net on a data set's training clips (section 3.1, eq. 3).

Noise prediction on the latents of stage 01 and the prompts of their classes: loss = |eps - eps_theta(z_t, t, e)|^2, one
noise level per clip, uniform over the schedule. A tenth of the clips gets the empty prompt, for classifier-free guidance.
What is written are the averaged weights. Text encoder and VAE stay as they are.

Reads:   work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w], and index.csv
         prompts/<data set>.json  one sentence per class; the model: --model
Writes:  work/<data set>/03_unet/<--name>/: config.json and diffusion_pytorch_model.safetensors (float16), which stage 03
         takes through --unet; loss.csv and loss.png, the loss of every step
Run:     python tools/finetune_unet.py hmdb51
         python tools/finetune_unet.py hmdb51 --lora 16 --name lora16      adapters of the attention layers, merged in
         python tools/finetune_unet.py demo --steps 300 --name more
Cost:    hmdb51, by estimate: 2,500 steps of 8 clips, 4 forwards' worth each with gradient checkpointing = 694 PFLOP, 1.5 h
         on an A100; 54 GB of its memory: 28 GB of state (1.411 billion weights of 4 bytes, their gradients, AdamW's two
         moments, the average), 6 GB of half-precision copies and loose ends, 5 GB for each of 4 clips per forward
         (--micro-batch 1: 39 GB). --lora 16: 31 GB, or 16. A checkpoint is 23 GB. demo: 4 to 6 min on two CPU cores
Expect:  a loss that falls little and slowly: it is the base model's own, and most of it is noise level
Differs: the paper states neither steps nor rate nor batch; ours are those that fine-tunes of this model usually take. The
         dropout of the temporal convolutions is off, so that a step depends on its own generator alone
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

# EDIT HERE: the paper states none of these
STEPS = {"demo": 300}  # every other data set:
STEPS_FULL = 2500
BATCH = 8  # clips per step
RATE = {"demo": 2e-4}  # AdamW's, after the warm-up; every other data set:
RATE_FULL = 5e-6
RATE_LORA = 1e-4  # adapters start from nothing and take a larger one
WARM_UP = 50  # steps over which the rate rises
WEIGHT_DECAY = 1e-2
CLIP_NORM = 1.0  # of the gradient
EMA = 0.999  # of the averaged weights; less in the first steps
TEXT_DROPOUT = 0.1  # share of clips with the empty prompt
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # attention of space, time and text

APART = ("plan", "memory", "MICRO_BATCH", "CHECKPOINT", "WEIGHTS", "GB_PER_CLIP")  # definitions that change no value
FILES = (*common.UNET_FILES, "loss.csv", "loss.png")
PARTS = ("text_encoder", "tokenizer", "unet", "scheduler")  # of the model: what the training reads
MICRO_BATCH = 4  # clips per forward on a GPU
CHECKPOINT = 250  # steps between checkpoints
SECONDS_PER_CLIP = {"demo": 0.1}  # of one step, on two CPU cores; the real model on an A100, by estimate:
SECONDS_PER_CLIP_GPU = 4 * 8.67 / (0.4 * 312)  # TFLOP of forward, recomputation and backward at 40 % of its peak
WEIGHTS = 1.411e9  # of the real U-Net
GB_PER_CLIP = 5  # of one forward at 448x256: tensors kept for the backward pass, by count 3.5 GB in half precision


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("--name", default="default", help="name of the folder (default)")
    parser.add_argument("--model", help="folder or hub name of the text-to-video model (demo/models/t2v, ModelScope)")
    parser.add_argument("--prompt-file", type=Path, help="JSON {class: prompt} (prompts/<data set>.json)")
    parser.add_argument("--hmdb-train", choices=("all", "official"), default="all", help="HMDB51's training clips (all)")
    parser.add_argument("--steps", type=contract.positive, help=f"training steps ({STEPS_FULL:,}; demo {STEPS['demo']})")
    parser.add_argument("--batch", type=contract.positive, default=BATCH, help=f"clips per step ({BATCH})")
    parser.add_argument("--rate", type=float, help=f"learning rate ({RATE_FULL}; demo {RATE['demo']}; --lora {RATE_LORA})")
    parser.add_argument("--lora", type=contract.positive, metavar="RANK", help="train adapters of this rank (all weights)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the forward pass; weights are float32 (bfloat16 where the device computes in it, else float32)",
    )
    parser.add_argument("--micro-batch", type=contract.positive, default=MICRO_BATCH, help="clips per forward on a GPU (4)")
    parser.add_argument("--checkpoint", type=contract.positive, default=CHECKPOINT, help="steps between checkpoints (250)")
    args = contract.parse(parser)
    args.steps = args.steps or STEPS.get(args.dataset, STEPS_FULL)
    if args.rate is None:
        args.rate = RATE_LORA if args.lora else RATE.get(args.dataset, RATE_FULL)
    if args.rate <= 0:
        parser.error("--rate: must be positive")
    return args


def training_clips(args, source):
    """[(class, row of its .npy)] of the training clips, in the order of classes and rows."""
    official = args.hmdb_train == "official"
    rows = {label: [] for label in args.classes}
    for row in common.read_csv(source / "index.csv"):
        if row["class"] in rows and (not official or row["official"] == "1"):
            rows[row["class"]].append(int(row["row"]))
    clips = [(label, row) for label in args.classes for row in rows[label][: args.limit]]
    if not clips:
        raise contract.ContractError(f"{source / 'index.csv'}: no training clip of {', '.join(args.classes)}")
    return clips


def temporal_convolution(self, x):
    """nn.Conv3d with kernel (3, 1, 1) as the equal 2D convolution, which the CPU's library runs faster in training."""
    n, _, f, h, w = x.shape
    y = torch.nn.functional.conv2d(x.flatten(3), self.weight[..., 0], self.bias, padding=(1, 0))
    return y.view(n, -1, f, h, w)


def prepare(unet, device, rank, seed):
    """The U-Net made ready for training: (network, {name: trainable weight}).

    On a CPU gradient checkpointing would only be slower; there two forms are taken that train about twice as fast at the
    demo's size.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 1, 1):
                module.forward = temporal_convolution.__get__(module)
    else:
        checkpoint_layers(unet)
    network = add_adapters(unet, rank, seed) if rank else unet.requires_grad_(True)
    return network, {name: p for name, p in network.named_parameters() if p.requires_grad}


def checkpoint_layers(unet):
    """Gradient checkpointing: a layer keeps its input alone and runs again in the backward pass.

    The library's own switch is not there for this model. The layers inside the blocks are wrapped, not the blocks: the
    largest block keeps 8.6 GB per clip at the real size, its largest layer 1.7.
    """
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def add_adapters(unet, rank, seed):
    """LoRA adapters on the attention layers, the U-Net itself frozen; B starts at zero, A from the seed."""
    try:
        import peft
    except ImportError:
        raise contract.ContractError(
            "--lora needs the package peft\n  type: pip install peft, as in requirements.txt"
        ) from None
    network = peft.get_peft_model(unet, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    for name, p in network.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(p, math.sqrt(5), generator=contract.generator(seed, "finetune", name))
    return network


def draw(step, count, shape, total, args):
    """What one step draws, from the seed and the step alone.

    Returns (clips [batch] out of `count`, whether each loses its prompt, noise levels [batch] below `total`, one in each
    of `batch` equal parts of the schedule, noise float32 [batch, *shape]).
    """
    generator = contract.generator(args.seed, "finetune", step)
    chosen = torch.randint(count, (args.batch,), generator=generator)
    dropped = torch.rand(args.batch, generator=generator) < TEXT_DROPOUT
    spread = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
    t = (spread * total).long().clamp(max=total - 1)
    return chosen, dropped, t, torch.randn((args.batch, *shape), generator=generator)


def backward(network, scheduler, x0, noise, t, states, part, device, dtype):
    """Adds the gradient of eq. 3 for a batch, `part` clips at a time; returns the loss.

    x0, noise: float32 [n, 4, 16, h, w]. t: [n]. states: [n, tokens, width].
    """
    x, total = scheduler.add_noise(x0, noise, t), 0.0
    pieces = zip(x.split(part), noise.split(part), t.split(part), states.split(part), strict=True)
    try:
        for x_part, noise_part, t_part, state in pieces:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predicted = network(x_part.to(device), t_part.to(device), state).sample
            loss = (predicted.float() - noise_part.to(device)).square().mean() * len(x_part) / len(x)
            loss.backward()
            total += loss.item()
    except torch.OutOfMemoryError:
        more = f"type --micro-batch {part // 2}" if part > 1 else "type --lora 16, or take a larger GPU"
        raise contract.ContractError(f"out of memory on {device} with {part} clips per forward\n  {more}") from None
    return total


def train(network, weights, scheduler, clips, states, args, device, dtype, path):
    """AdamW on eq. 3 with a running average of the weights. Returns ({name: averaged weight}, losses [steps]).

    weights: {name: trainable weight}. clips(chosen) gives float32 [n, 4, 16, h, w] and their rows of `states`; its length
    and shape: clips.count, clips.shape. path: the checkpoint; a run that was killed goes on from it and ends the same,
    since besides weights, moments and average a step depends on the seed and its number alone.
    """
    average = {name: p.detach().clone() for name, p in weights.items()}
    groups = [
        {"params": [p for p in weights.values() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in weights.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.rate, fused=device.type == "cuda")
    losses = []
    part = args.batch if device.type == "cpu" else args.micro_batch
    if path.exists():
        with contract.checkpoint(path):
            saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            with torch.no_grad():
                for name, p in weights.items():
                    p.copy_(saved["weights"][name])
                    average[name].copy_(saved["average"][name])
            optimiser.load_state_dict(saved["optimiser"])
            losses = saved["losses"].tolist()
    bar = tqdm(range(len(losses), args.steps), desc="fine-tuning", initial=len(losses), total=args.steps, mininterval=1)
    for step in bar:
        rate = rate_at(step, args)
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen, dropped, t, noise = draw(step, clips.count, clips.shape, scheduler.config.num_train_timesteps, args)
        x0, rows = clips(chosen)
        rows = torch.where(dropped, len(states) - 1, rows).to(device)
        optimiser.zero_grad()
        loss = backward(network, scheduler, x0, noise, t, states[rows], part, device, dtype)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), CLIP_NORM)
        if not math.isfinite(loss) or not norm.isfinite():
            raise contract.ContractError(f"the loss of step {step} is not finite\n  type a smaller --rate than {args.rate}")
        optimiser.step()
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - decay)
        losses.append(loss)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        if (step + 1) % args.checkpoint == 0 or step + 1 == args.steps:
            state = {"weights": {name: p.detach() for name, p in weights.items()}, "average": average}
            state |= {"optimiser": optimiser.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}
            with contract.atomic(path) as handle:
                torch.save(state, handle)
    return average, losses


def rate_at(step, args):
    """The learning rate of a step: it rises over WARM_UP steps, then stays."""
    return args.rate * min(1.0, (step + 1) / WARM_UP)


class Clips:
    """The training clips' latents, read from the files as they are drawn."""

    def __init__(self, source, clips, args, mend):
        self.clips, self.count = clips, len(clips)
        wanted = (None, common.NUM_FRAMES, 4, None, None)
        self.arrays = {c: contract.load_array(source / f"{c}.npy", wanted, "float16", mend) for c in args.classes}
        self.rows = {label: i for i, label in enumerate(args.classes)}
        frames, channels, height, width = self.arrays[args.classes[0]].shape[1:]
        self.shape = (channels, frames, height, width)

    def __call__(self, chosen):
        """(float32 [n, 4, 16, h, w], rows of the prompts [n]) of chosen clips."""
        picked = [self.clips[i] for i in chosen]
        x0 = torch.from_numpy(np.stack([self.arrays[label][row] for label, row in picked]))
        return x0.float().transpose(1, 2), torch.tensor([self.rows[label] for label, _ in picked])


def write_unet(folder, source, network, weights, average, lora):
    """The U-Net with the averaged weights, adapters merged in: one layout, whatever was trained."""
    from safetensors.torch import save_file

    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(average[name])
    unet = network.merge_and_unload() if lora else network
    state = {name: value.to("cpu", torch.float16).contiguous() for name, value in unet.state_dict().items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise contract.ContractError(f"{folder}: weight {name} is not finite in float16\n  type a smaller --rate")
    with contract.atomic(folder / FILES[1]) as handle:
        save_file(state, handle.name, metadata={"format": "pt"})
    with contract.atomic(folder / FILES[0]) as handle:
        handle.write((source / "config.json").read_bytes())  # the library's own would state the path it was loaded from


def write_curve(folder):
    """loss.png from loss.csv: every step's loss and the mean of the last 50."""
    from matplotlib.figure import Figure

    rows = common.read_csv(folder / "loss.csv")
    steps, loss = (np.array([float(row[column]) for row in rows]) for column in ("step", "loss"))
    sums = np.concatenate([[0], np.cumsum(loss)])
    first = np.maximum(np.arange(len(loss)) - 49, 0)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (eq. 3)")
    axes.plot(steps, loss, color="0.8", linewidth=0.8, label="of the step")
    axes.plot(steps, (sums[1:] - sums[first]) / (np.arange(len(loss)) + 1 - first), label="mean of the last 50")
    axes.set_ylim(bottom=0)
    axes.legend()
    with contract.atomic(folder / "loss.png") as handle:
        figure.savefig(handle, format="png", dpi=100, metadata={"Software": None})


def plan(args):
    """The plan, for --dry-run: (item, items, seconds, bytes, machine)."""
    demo = args.dataset == "demo"
    seconds = SECONDS_PER_CLIP.get(args.dataset, SECONDS_PER_CLIP_GPU) * args.batch * args.steps
    size = 2e6 if demo else 2 * WEIGHTS
    return "steps", args.steps, seconds, size, "two CPU cores" if demo else "an A100"


def memory(args):
    """One line about the memory of the real model, by arithmetic."""
    clips = min(args.micro_batch, args.batch)
    state = (1 if args.lora else 5) * 4 * WEIGHTS / 1e9  # float32; the adapters are small
    total = state + 2 * 2 * WEIGHTS / 1e9 + GB_PER_CLIP * clips
    kinds = "the weights" if args.lora else "weights, gradients, two moments, average"
    checkpoint = "" if args.lora else f"; {4 * 4 * WEIGHTS / 1e9:.0f} GB of disk for a checkpoint"
    return (
        f"finetune memory: about {total:.0f} GB on the GPU, of which {state:.0f} GB for {kinds}, "
        f"{GB_PER_CLIP * clips} GB for {clips} clips per forward{checkpoint}"
    )


def main():
    args = parse_args()
    cost, prompts = plan(args), common.read_prompts(args)
    if args.dry_run and args.dataset != "demo":
        print(memory(args))
    source = contract.work_folder(args, "01_latents")
    if args.dry_run and (args.after or not (source / "manifest.json").exists()):
        return contract.plan_after(args, "finetune", cost)
    mend = contract.command("01_encode_latents.py", args)
    manifest = contract.read_folder(source, args, mend)
    contract.need(manifest, [f"{c}.npy" for c in args.classes], source, mend)
    clips = training_clips(args, source)
    try:
        model = common.model_folder(args)
    except contract.Missing:
        if args.dry_run:
            return contract.plan_after(args, "finetune", cost)
        raise
    common.check_model(model, model / "unet")

    folder = contract.work_folder(args, "03_unet", args.name)
    names = ("steps", "batch", "rate", "lora", "hmdb_train", "limit", "classes", "device", "threads", "dtype")
    settings = {name: getattr(args, name) for name in names}
    inputs = {part: contract.folder_hash(model / part, args) for part in PARTS}
    read = [name for c in args.classes for name in (f"{c}.npy", f"index/{c}.csv")]
    inputs |= {"latents": contract.content(manifest, read), "prompts": contract.digest(prompts)}
    identity = contract.identity(__file__, args, settings, inputs, {}, APART)
    todo, identity = contract.begin(folder, identity, FILES, args, cost)
    if todo is None:
        return
    path = folder / ".checkpoint.pt"
    if args.redo:
        path.unlink(missing_ok=True)
    if {*todo} - {"loss.png"}:
        fine_tune(args, identity["parameters"], model, source, clips, prompts, folder, path, mend)
    write_curve(folder)
    path.unlink(missing_ok=True)
    kinds = {FILES[0]: ([], "json"), FILES[1]: ([], "float16"), FILES[2]: ([args.steps, 3], "csv")}
    kinds[FILES[3]] = ([400, 700, 4], "png")
    contract.finish(folder, identity, FILES, args, ["diffusers", "transformers", "matplotlib"], kinds)


def fine_tune(args, parameters, model, source, clips, prompts, folder, path, mend):
    """Trains and writes the U-Net and loss.csv."""
    from diffusers import DDIMScheduler

    device, dtype = torch.device(parameters["device"]), getattr(torch, parameters["dtype"])
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    texts = [*(prompts[c] for c in args.classes), ""]
    embeddings = common.embed(model, texts, device)
    states = torch.cat([embeddings[text] for text in texts]).clone()  # made in inference mode, now part of a graph
    unet = common.load_part(model / "unet", "unet", device, torch.float32)
    network, weights = prepare(unet, device, args.lora, args.seed)
    count = sum(p.numel() for p in weights.values())
    contract.say(f"finetune {len(clips):,} clips of {len(args.classes)} classes, {count:,} weights, rate {args.rate}")
    data = Clips(source, clips, args, mend)
    average, losses = train(network, weights, scheduler, data, states, args, device, dtype, path)
    if device.type == "cuda":
        contract.say(f"finetune peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    write_unet(folder, model / "unet", network, weights, average, args.lora)
    rows = [[step, f"{rate_at(step, args):.6g}", f"{loss:.6g}"] for step, loss in enumerate(losses)]
    common.write_csv(folder / "loss.csv", ("step", "rate", "loss"), rows)


if __name__ == "__main__":
    contract.run(main)
