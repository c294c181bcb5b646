"""Fine-tunes the text-to-video model's U-Net on a data set's training clips (section 3.1, eq. 3).

Noise prediction on the latents of stage 01 and the prompts of their classes: |eps - eps_theta(z_t, t, e)|^2,
one timestep per clip, uniform over the schedule. A tenth of the clips gets the empty prompt, for
classifier-free guidance. The averaged weights are written. Text encoder and VAE stay as they are.

Reads:   work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w]
         prompts/<data set>.json  one sentence per class; the model: --model
Writes:  work/<data set>/03_unet/<--name>/: config.json, diffusion_pytorch_model.safetensors (float16), which
         stage 03 takes through --unet; loss.csv and loss.png, the loss of every step
Run:     python tools/finetune_unet.py hmdb51
         python tools/finetune_unet.py hmdb51 --lora 16 --name lora16     adapters of the attention, merged in
         python tools/finetune_unet.py demo --steps 300 --name more
Cost:    hmdb51, by estimate: 2,500 steps of 8 clips, 4 forwards' worth each with gradient checkpointing =
         694 PFLOP, 1.5 h on an A100; 54 GB of its memory: 28 GB of state (1.411 billion weights of 4 bytes,
         gradients, AdamW's two moments, the average), 6 GB of half-precision copies and loose ends, 5 GB for
         each of 4 clips per forward (--micro-batch 1: 39 GB; --lora 16: 31 GB, or 16); 45 GB of disk while it
         runs, since a checkpoint of 23 GB is written beside the last. demo: 5 min on two CPU cores
Expect:  a loss that falls little and slowly: it is the base model's own, and depends mostly on the timestep
Differs: the paper states neither steps nor lr nor batch; ours are usual for fine-tunes of this model. Dropout
         of the temporal convolutions is off, so that a step depends on its own generator alone
"""

import functools
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

# The paper states none of these
STEPS = {"demo": 300}  # every other data set:
STEPS_FULL = 2500
BATCH = 8  # clips per step
LR = {"demo": 2e-4}  # AdamW's, after the warm-up; every other data set:
LR_FULL = 5e-6
LR_LORA = 1e-4  # adapters start from zero and take a larger one
WARM_UP = 50  # steps over which the learning rate rises
WEIGHT_DECAY = 1e-2  # of matrices and kernels
CLIP_NORM = 1.0  # of the gradient
EMA = 0.999  # of the averaged weights; less in the first steps
TEXT_DROPOUT = 0.1  # share of clips with the empty prompt
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # attention over space, time and text

FILES = ("config.json", "diffusion_pytorch_model.safetensors", "loss.csv", "loss.png")
MICRO_BATCH = 4  # clips per forward on a GPU
CHECKPOINT = 250  # steps between checkpoints
SECONDS = {"demo": 0.1}  # per clip and step, on two CPU cores; the real model on an A100, by estimate:
SECONDS_FULL = 4 * 8.67 / (0.4 * 312)  # TFLOP of forward, recomputation and backward, at 40 % of its peak
WEIGHTS = 1.411e9  # of the real U-Net
GB_PER_CLIP = 5  # of a forward at 448x256, kept for the backward pass; by count 3.5 GB in half precision


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc=False)
    add = parser.add_argument
    add("--name", default="default", help="name of the folder (default)")
    add("--prompt-file", type=Path, help="JSON {class: prompt} (prompts/<data set>.json)")
    add("--steps", type=int, help=f"training steps ({STEPS_FULL:,}; demo {STEPS['demo']})")
    add("--batch", type=int, default=BATCH, help=f"clips per step ({BATCH})")
    add("--lr", type=float, help=f"learning rate ({LR_FULL}; demo {LR['demo']}; --lora {LR_LORA})")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank (all weights)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the forward pass (bfloat16, if it is fast)")
    add("--micro-batch", type=int, default=MICRO_BATCH, help=f"clips per forward on a GPU ({MICRO_BATCH})")
    add("--checkpoint", type=int, default=CHECKPOINT, help=f"steps between checkpoints ({CHECKPOINT})")
    args = contract.parse(parser)
    args.steps = args.steps or STEPS.get(args.dataset, STEPS_FULL)
    if args.lr is None:
        args.lr = LR_LORA if args.lora else LR.get(args.dataset, LR_FULL)
    if args.lr <= 0:
        parser.error("--lr: must be positive")
    return args


def temporal_convolution(self, x):
    """nn.Conv3d with kernel (3, 1, 1) as the equal 2D convolution, which trains faster on a CPU."""
    n, _, f, h, w = x.shape
    y = torch.nn.functional.conv2d(x.flatten(3), self.weight[..., 0], self.bias, padding=(1, 0))
    return y.view(n, -1, f, h, w)


def prepare(unet, device, rank, seed):
    """The U-Net made ready for training: (network, {name: trainable weight})."""
    from diffusers.models.attention_processor import AttnProcessor

    if (
        device.type == "cpu"
    ):  # no gradient checkpointing; two forms that train twice as fast at the demo's size
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

    The library has no switch for this model. The layers inside the blocks are wrapped, not the blocks: the
    largest block keeps 8.6 GB per clip at the real size, its largest layer 1.7.
    """
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    kinds = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)
    for module in (module for module in unet.modules() if isinstance(module, kinds)):
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def add_adapters(unet, rank, seed):
    """LoRA adapters on the attention layers, the U-Net itself frozen; B starts at zero, A from the seed."""
    import peft

    network = peft.get_peft_model(unet, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    for name, p in network.named_parameters():
        if "lora_A" in name:
            generator, a = contract.generator(seed, "finetune", name), torch.empty(p.shape)  # on the CPU
            p.data.copy_(torch.nn.init.kaiming_uniform_(a, math.sqrt(5), generator=generator))
    return network


def draw(step, count, shape, total, args):
    """What a step draws, from the seed and the step alone: clips [batch] out of `count`, whether each loses
    its prompt, timesteps [batch], one in each of `batch` equal parts of `total`, noise [batch, *shape].
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
    z, total = scheduler.add_noise(x0, noise, t), 0.0
    pieces = zip(z.split(part), noise.split(part), t.split(part), states.split(part), strict=True)
    try:
        for z_part, noise_part, t_part, state in pieces:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predicted = network(z_part.to(device), t_part.to(device), state).sample
            loss = (predicted.float() - noise_part.to(device)).square().mean() * len(z_part) / len(z)
            loss.backward()
            total += loss.item()
    except torch.OutOfMemoryError:
        what = f"out of memory on {device} with {part} clips per forward"
        fix = f"--micro-batch {part // 2}" if part > 1 else "--lora 16, or a larger GPU"
        raise contract.ContractError(what, fix=fix) from None
    return total


def lr_at(step, args):
    """The learning rate of a step: it rises over WARM_UP steps, then stays."""
    return args.lr * min(1.0, (step + 1) / WARM_UP)


def train(network, weights, scheduler, arrays, states, args, device, dtype, path):
    """AdamW on eq. 3 with an average of the weights. Returns ({name: averaged weight}, losses [steps]).

    weights: {name: trainable weight}. arrays: float16 [n, 16, 4, h, w] of each class. states: their prompts,
    [classes + 1, tokens, width], the empty one's last. path: the checkpoint. A run that goes on from it ends
    the same: besides weights, moments and average a step depends on seed and number alone.
    """
    clips = [(i, row) for i, array in enumerate(arrays) for row in range(len(array))]
    shape = (4, common.NUM_FRAMES, *arrays[0].shape[3:])
    average = {name: p.detach().clone() for name, p in weights.items()}
    of_shape = ([p for p in weights.values() if (p.ndim > 1) == matrix] for matrix in (True, False))
    decays = zip(of_shape, (WEIGHT_DECAY, 0.0), strict=True)
    groups = [{"params": params, "weight_decay": decay} for params, decay in decays if params]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")
    losses, part = [], args.batch if device.type == "cpu" else args.micro_batch
    needed = 4 * sum(p.numel() * p.element_size() for p in weights.values()) * (1 if path.exists() else 2)
    if (free := shutil.disk_usage(path.parent).free) < needed:
        what = f"{path}: a checkpoint does not fit beside the last one"
        raise contract.ContractError(what, f"{needed:,} bytes", f"{free:,} bytes free", "make room")
    if path.exists():
        saved = contract.read(path)
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(saved["weights"][name])
                average[name].copy_(saved["average"][name])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"].tolist()
        for state in optimizer.state.values():  # copies: the file's space is free when it has been replaced
            state.update({name: value.clone() for name, value in state.items()})
        del saved
    total, left = scheduler.config.num_train_timesteps, range(len(losses), args.steps)
    for step in (bar := contract.bar(left, "finetune", initial=len(losses), total=args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        chosen, dropped, t, noise = draw(step, len(clips), shape, total, args)
        x0 = torch.from_numpy(np.stack([arrays[i][row] for i, row in (clips[k] for k in chosen)]))
        x0 = x0.float().transpose(1, 2)  # [n, 4, 16, h, w]
        rows = torch.where(dropped, len(arrays), torch.tensor([clips[k][0] for k in chosen])).to(device)
        optimizer.zero_grad()
        loss = backward(network, scheduler, x0, noise, t, states[rows], part, device, dtype)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), CLIP_NORM)
        if not math.isfinite(loss) or not norm.isfinite():
            raise contract.ContractError(f"the loss of step {step} is not finite", fix=f"--lr < {args.lr}")
        optimizer.step()
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - decay)
        losses.append(loss)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        if (step + 1) % args.checkpoint == 0 or step + 1 == args.steps:
            state = {"weights": {n: p.detach() for n, p in weights.items()}, "average": average}
            state |= {"optimizer": optimizer.state_dict(), "losses": torch.DoubleTensor(losses)}
            contract.save(path, state)
    return average, losses


def write_unet(folder, source, network, weights, average, lora):
    """The U-Net with the averaged weights, adapters merged in: one layout, whatever was trained."""
    from safetensors.torch import save

    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(average[name])
    unet = network.merge_and_unload() if lora else network
    state = {name: value.to("cpu", torch.float16).contiguous() for name, value in unet.state_dict().items()}
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise contract.ContractError(f"{folder}: {bad[0]} is not finite in float16", fix="a smaller --lr")
    contract.save(folder / FILES[1], save(state, metadata={"format": "pt"}))
    # The library's own config.json would state the path that the U-Net was loaded from
    contract.save(folder / FILES[0], (source / "config.json").read_bytes())


def write_curve(folder):
    """loss.png from loss.csv: every step's loss and the mean of the last 50."""
    from matplotlib.figure import Figure

    loss = np.array([float(row["loss"]) for row in contract.read(folder / "loss.csv")])
    means = [loss[max(0, i - 49) : i + 1].mean() for i in range(len(loss))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (eq. 3)")
    axes.plot(loss, color="0.8", linewidth=0.8, label="of the step")
    axes.plot(means, label="mean of the last 50")
    axes.set_ylim(bottom=0)
    axes.legend()
    with contract.atomic(folder / "loss.png") as handle:
        figure.savefig(handle, format="png", dpi=100, metadata={"Software": None})


def estimate(args):
    kind, estimated = "adapters" if args.lora else "all weights", SECONDS.get(args.dataset, SECONDS_FULL)
    seconds, machine = common.rate(args, estimated, f"seconds, {kind}")
    seconds *= args.batch * args.steps
    if args.dataset == "demo":
        return {"03_unet": ("steps", args.steps, seconds, 2e6, machine)}
    per_weight = 8 if args.lora else 24  # bytes on the GPU: one or five copies in float32, two in bfloat16
    memory = per_weight * WEIGHTS / 1e9 + GB_PER_CLIP * min(args.micro_batch, args.batch)
    disk = (2 if args.lora else 34) * WEIGHTS  # the U-Net in float16, two checkpoints in float32
    return {"03_unet": ("steps", args.steps, seconds, disk, f"{machine} ({memory:.0f} GB of its memory)")}


def main(args):
    prompts = common.read_prompts(args)
    source = contract.Input(args, "01_latents", contract.command(args, "01_encode_latents.py"))
    latents = source.check(f"{c}.npy" for c in args.classes)
    model = common.model_folder(args)
    common.check_model(model, model / "unet")
    inputs = {part: common.folder_hash(model / part) for part in common.CONFIGS if part != "vae"}
    inputs |= {"latents": contract.digest(latents), "prompts": contract.digest(prompts)}
    names = ("steps", "batch", "lr", "lora", "limit", "classes", "device", "dtype")
    parameters = {name: getattr(args, name) for name in names}
    folder, check = f"03_unet/{args.name}", lambda: common.load_tokenizer(model, prompts)
    output = contract.Output(args, folder, parameters, inputs, FILES, check=check)
    if not output.todo:
        return
    path = output.folder / ".checkpoint.pt"
    if args.redo:
        path.unlink(missing_ok=True)
    if output.todo & {*FILES[:3]}:
        fine_tune(args, output, model, source, prompts, path)
    write_curve(output.folder)
    path.unlink(missing_ok=True)
    output.finish()


def fine_tune(args, output, model, source, prompts, path):
    """Trains and writes the U-Net and loss.csv."""
    from diffusers import DDIMScheduler

    device = output.device
    texts = [*(prompts[c] for c in args.classes), ""]
    embeddings = common.embed(model, prompts, device)
    states = torch.cat([embeddings[text] for text in texts]).clone()  # no inference tensor: part of a graph
    unet = common.load_part(model / "unet", "unet", device, torch.float32)
    network, weights = prepare(unet, device, args.lora, args.seed)
    shape = (None, common.NUM_FRAMES, 4, None, None)
    arrays = [source.load(f"{c}.npy", shape, "float16")[: args.limit] for c in args.classes]
    clips, count = sum(map(len, arrays)), sum(p.numel() for p in weights.values())
    contract.say(f"finetune_unet on {device}, {output.dtype}: {clips:,} clips, {count:,} weights")
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    average, losses = train(network, weights, scheduler, arrays, states, args, device, output.dtype, path)
    if device.type == "cuda":
        output.log(f"finetune_unet peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    write_unet(output.folder, model / "unet", network, weights, average, args.lora)
    rows = [[step, f"{lr_at(step, args):.6g}", f"{loss:.6g}"] for step, loss in enumerate(losses)]
    contract.save(output.folder / "loss.csv", [("step", "lr", "loss"), *rows])


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
