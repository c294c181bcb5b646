"""Stage 03: prototypes and prompts -> generated videos (section 3.3, eq. 6 to 10).

For every class, prototype and draw: its own noise, then DDIM with classifier-free guidance. In the noisier
half of the steps the noise prediction is also guided towards the prototype, most in the first frame and less
in each later one. The noise depends on class, prototype and draw alone, so the baselines start from the same:

  --sampler gvd     the default, as above
            naive   prompts alone; reads no prototypes
            knoise  unguided; the prototype's first frame, 16 times, is noised to --strength, denoised (D4M)

Reads:   work/<data set>/02_prototypes/ipc<K>/<--prototypes>/<class>.npy  float32 [K, 16, 4, h, w]
         prompts/<data set>.json  one sentence per class; the model: --model; its U-Net: --unet, by default
         work/<data set>/03_unet/default/ (tools/finetune_unet.py) for hmdb51 and miniucf, else the published
Writes:  work/<data set>/03_samples/ipc<K>/<--name>/<class>/<prototype>_<draw>.mp4  H.264, 16 frames
         with --save-latents also <prototype>_<draw>.npy  float16 [16, 4, h, w]
Run:     python 03_guided_sample.py hmdb51 20
         python 03_guided_sample.py demo 5 --sampler naive
         python 03_guided_sample.py demo 5 --sampler knoise       # after 02 with --cluster dummy-video
         python 03_guided_sample.py demo 5 --prompt-file none --name no-text   # guided by the prototype alone
         python 03_guided_sample.py demo 5 --scheduler dpmpp --steps 20 --name dpmpp
         torchrun --nproc-per-node 8 03_guided_sample.py hmdb51 20   # the processes share the batches
Cost:    demo IPC 5: 160 videos, 3 min on two CPU cores. hmdb51 IPC 20: 4,080, 4 h on an H200
Expect:  videos of the class that look like its prototypes
Differs: the minus sign of eq. 9, sigma_t = sqrt(1 - abar_t), 50 steps instead of 2000, and "stop at step
         1000" read as the noisier half: the schedule has 1000 timesteps (docs/paper_notes.md)
"""

import contract

import contextlib
import ctypes
import math
import resource
from pathlib import Path

import numpy as np
import torch

import common
import media

GUIDANCE = 0.1  # lambda of eq. 7
STOP = 0.5  # guide while t > STOP * T: 0 is always, 1 never (section 4.1: half of the timesteps)
STEPS = {"demo": 25}  # DDIM steps; every other data set:
STEPS_FULL = 50
CFG = {"demo": 2.0}  # classifier-free guidance scale; every other data set:
CFG_FULL = 9.0
DRAWS = 4  # videos per prototype: the sources of one composed video (section 3.4)
STRENGTH = 0.7  # K-Noise: share of the steps that its prototype is noised and denoised by
OPTIONS = {"gvd": ("guidance", "guidance_form", "stop", "decay"), "naive": (), "knoise": ("strength",)}
FINE_TUNED = {"hmdb51": 2500, "miniucf": 2500}  # sets whose U-Net is fine-tuned by default (eq. 3): its steps

BATCH = 8  # videos per batch, of one class and draw; another cut can change the last bits
SHORT = common.NUM_FRAMES  # tokens up to which the CPU's fused attention is slower than plain products
ATTENTION_LIMIT = 65535  # sequences per attention kernel on a GPU
GPU_BYTES = 6.2e9, 0.9e9  # weights, and a forward per video of 448x256 (results/bench)
FPS = 8  # of the .mp4, as the model was trained
SECONDS = {"demo": 1.1}  # per video, on two CPU cores; any other data set on an A100, by estimate:
SECONDS_FULL = 9.0  # 2.5 times what an H200 takes (results/bench)


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set)
    add = parser.add_argument
    add("--sampler", choices=tuple(OPTIONS), default="gvd", help="see above (gvd)")
    add("--name", help="name of the folder (the sampler's)")
    add("--prototypes", help="folder of stage 02 (direct; knoise: dummy-video; naive reads none)")
    add("--unet", help="published, or a U-Net's folder (hmdb51, miniucf: 03_unet/default; others: published)")
    add("--prompt-file", type=Path, help="JSON {class: prompt}, or none (prompts/<data set>.json)")
    add("--guidance", type=float, default=GUIDANCE, help=f"guidance strength lambda ({GUIDANCE})")
    forms = ("ddim", "released-ddim", "released-ddpm", "x0")
    add("--guidance-form", choices=forms, default="ddim", help="see common.guided_ddim_step (ddim)")
    add("--stop", type=float, default=STOP, help=f"guide while t > STOP * T ({STOP})")
    add("--decay", choices=("linear", "none"), default="linear", help="of lambda over frames, eq. 8 (linear)")
    add("--strength", type=float, default=STRENGTH, help=f"of knoise's noise ({STRENGTH})")
    add("--scheduler", choices=("ddim", "dpmpp"), default="ddim", help="dpmpp: for 20 to 25 steps (ddim)")
    add("--steps", type=int, help=f"sampling steps ({STEPS_FULL}; demo {STEPS['demo']})")
    add("--cfg", type=float, help=f"classifier-free guidance scale ({CFG_FULL}; demo {CFG['demo']})")
    add("--draws", type=int, default=DRAWS, help=f"videos per prototype ({DRAWS})")
    add("--save-latents", action="store_true", help="write the latents beside each video")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the U-Net (bfloat16, if it is fast)")
    add("--micro-batch", type=int, help="videos per forward on a GPU (by its memory, up to 8)")
    args = contract.parse(parser)
    for name in {*sum(OPTIONS.values(), ())} - {*OPTIONS[args.sampler]}:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: not for --sampler {args.sampler}")
    args.steps = args.steps or STEPS.get(args.dataset, STEPS_FULL)
    args.cfg = CFG.get(args.dataset, CFG_FULL) if args.cfg is None else args.cfg
    if not 0 <= args.stop <= 1:
        parser.error("--stop: must be between 0 and 1")
    if args.sampler == "knoise" and not 1 / args.steps <= args.strength <= 1:
        parser.error("--strength: must be at most 1 and leave at least one step")
    if args.scheduler == "dpmpp" and args.guidance_form != "ddim":
        parser.error(f"--guidance-form {args.guidance_form}: only with --scheduler ddim")
    args.name = args.name or args.sampler
    args.prototypes = args.prototypes or ("dummy-video" if args.sampler == "knoise" else "direct")
    return args


def check_steps(config, steps, solver="ddim"):
    """ContractError for a number of steps that the schedule cannot serve. config: scheduler_config.json.

    With the published ("leading") spacing some counts start far below the noisiest timestep, or past it, and
    sampling would begin from noise of the wrong strength.
    """
    total, offset = config["num_train_timesteps"], config.get("steps_offset", 0)
    spacing = config.get("timestep_spacing", "leading" if solver == "ddim" else "linspace")

    def usable(n):
        first = total - 1
        if spacing == "leading":
            first = offset + ((n - 1) * (total // n) if solver == "ddim" else n * (total // (n + 1)))
        return n < total and min(0.95 * total, total - 1.25 * total / n) <= first < total

    if not usable(steps):
        near = [n for n in (*range(1, 21), 25, 50, 100, 200, 250, 500) if usable(n)]
        what = f"--steps {steps}: the schedule of {total} timesteps cannot serve this number"
        raise contract.ContractError(what, f"usable: {', '.join(map(str, near))}")


class PromptAttention:
    """Attention for UNet3DConditionModel instead of diffusers' own: the same values up to their last bits.

    A batch shares its prompts, so cross-attention computes keys and values once per prompt. On a CPU, short
    sequences (those over time) are multiplied in float32, since the fused kernel is slow for them.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, prompts=None):
        """hidden_states: [n, tokens, width] -> the same.

        prompts, through cross_attention_kwargs: how many the batch holds, in blocks of equal size.
        """
        query, source = attn.to_q(hidden_states), hidden_states
        if encoder_hidden_states is not None:
            source = encoder_hidden_states[:: len(hidden_states) // prompts]  # [prompts, tokens, width]
            query = query.reshape(prompts, -1, query.shape[-1])
        projected = (query, attn.to_k(source), attn.to_v(source))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        short = encoder_hidden_states is None and hidden_states.shape[1] <= SHORT
        if short and hidden_states.device.type == "cpu":
            scores = query.float() * attn.scale @ key.float().transpose(2, 3)
            mixed = (scores.softmax(-1) @ value.float()).to(hidden_states.dtype)
        else:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).reshape(*hidden_states.shape[:2], -1))


def keep_memory():
    """Tells glibc to keep freed memory: 1.1 times as fast at the demo's size on two CPU cores."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only larger arrays are mapped by themselves
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed


def sample(unet, scheduler, text, empty, prototypes, generators, args):
    """From noise to latents: float32 [n, 4, 16, h, w] (section 3.3, eq. 6 to 10).

    text, empty: [1, tokens, width] prompt embeddings. prototypes: float32 [n, 4, 16, h, w]; for the naive
    sampler only their shape counts. generators: one on the CPU per video, the source of all its noise.
    """

    def draw():
        noise = [torch.randn(prototypes.shape[1:], generator=g) for g in generators]
        return torch.stack(noise).to(prototypes)

    scheduler.set_timesteps(args.steps)
    timesteps, noise = scheduler.timesteps, draw()
    latents = noise * scheduler.init_noise_sigma
    if args.sampler == "knoise":  # the prototype's first frame stands still, is noised and denoised again
        timesteps = timesteps[args.steps - int(args.strength * args.steps) :]
        latents = scheduler.add_noise(prototypes[:, :, :1].expand_as(noise), noise, timesteps[:1])
    strengths = unguided = torch.zeros(prototypes.shape[2])  # lambda_f: [F]
    if args.sampler == "gvd":
        linear = common.linear_decay(args.guidance, len(unguided))  # eq. 8
        strengths = linear if args.decay == "linear" else unguided + args.guidance
    prompts = [text] if torch.equal(text, empty) or args.cfg == 1 else [empty, text]
    states = torch.cat(prompts).to(unet.dtype).repeat_interleave(len(noise), 0)  # [n or 2 n, tokens, width]
    form, prompted = args.guidance_form, {"prompts": len(prompts)}
    stop = args.stop * scheduler.config.num_train_timesteps  # less noisy steps are not guided (section 4.1)
    for t in timesteps:
        with torch.inference_mode():
            model_input = scheduler.scale_model_input(torch.cat([latents] * len(prompts)), t).to(unet.dtype)
            predicted = unet(model_input, t, states, cross_attention_kwargs=prompted).sample.float()
        without_text, with_text = predicted.chunk(2) if len(prompts) == 2 else (predicted, predicted)
        eps = without_text + args.cfg * (with_text - without_text)  # classifier-free guidance
        used = strengths if t > stop else unguided
        step_noise = draw() if form == "released-ddpm" else None
        latents = common.guided_ddim_step(scheduler, eps, t, latents, prototypes, used, form, step_noise)
    return latents


def micro_batch(args, device, shape):
    """Videos per forward: on the CPU all, on a GPU what its memory (by estimate) and its attention take."""
    if device.type == "cpu":
        return BATCH
    (weights, video), pixels = GPU_BYTES, shape[-1] * shape[-2]  # of a latent
    free = 0.9 * torch.cuda.get_device_properties(device).total_memory - weights
    fitting = int(free / video * 32 * 56 / pixels)
    return args.micro_batch or max(1, min(BATCH, fitting, ATTENTION_LIMIT // (2 * pixels)))


def sample_batch(unet, scheduler, text, empty, prototypes, names, args, device):
    """Latents float32 [n, 4, 16, h, w] of a batch, in micro-batches. names: n (class, prototype, draw)."""
    part = micro_batch(args, device, prototypes.shape)
    generators = [contract.generator(args.seed, "03", *name) for name in names]
    try:
        pieces = [
            sample(unet, scheduler, text, empty, p.to(device), generators[start : start + part], args)
            for start, p in zip(range(0, len(names), part), prototypes.split(part), strict=True)
        ]
    except torch.OutOfMemoryError:
        what = f"out of memory on {device} with {min(part, len(names))} videos per forward"
        raise contract.ContractError(what, fix=f"--micro-batch {max(1, part // 2)}") from None
    return torch.cat(pieces)


def open_model(args):
    """(the model's folder, its U-Net's, {part: content hash}), all checked before any folder is renamed."""
    model, unet = common.model_folder(args), args.work_dir / args.dataset / "03_unet" / "default"
    default = args.unet is None and args.dataset in FINE_TUNED
    if not default:
        unet = model / "unet" if args.unet in (None, "published") else Path(args.unet).absolute()
    hashes = {part: common.folder_hash(model / part) for part in common.CONFIGS if part != "unet"}
    if default or (unet / "manifest.json").is_file():  # fine-tuned; its log is no part of it
        fix = f"--unet published, or {contract.command(args, 'tools/finetune_unet.py')}"
        source = contract.Input(args, unet.absolute(), fix)
        hashes["unet"] = contract.digest(source.check(("config.json", "diffusion_pytorch_model.safetensors")))
        steps, classes = (source.record["parameters"][name] for name in ("steps", "classes"))
        if default and (steps != FINE_TUNED[args.dataset] or not {*args.classes} <= {*classes}):
            what, found = f"{unet} is no default U-Net", f"{steps} steps, {len(classes)} classes"
            expected = f"{FINE_TUNED[args.dataset]} steps on at least the classes asked for"
            raise contract.ContractError(what, expected, found, f"--unet {unet}, or {fix}")
    else:
        hashes["unet"] = common.folder_hash(unet)
    common.check_model(model, unet)
    check_steps(contract.read(model / "scheduler/scheduler_config.json"), args.steps, args.scheduler)
    return model, unet, hashes


def estimate(args):
    videos = min(args.ipc, args.limit or args.ipc) * args.draws * len(args.classes)
    seconds, machine = common.rate(args, SECONDS.get(args.dataset, SECONDS_FULL))
    seconds *= args.steps / STEPS.get(args.dataset, STEPS_FULL)
    size = (0.15 * 16 + args.save_latents * 16 * 4 / 64 * 2) * math.prod(args.spec["size"])
    return {"03_samples": ("videos", videos, seconds * videos, size * videos, machine)}


def main(args):
    prompts, source, inputs = common.read_prompts(args), None, {}
    if args.sampler != "naive":
        known = args.prototypes in ("direct", "real-video", "dummy-video", "herding", "gmm")
        words = ("--cluster" if known else "--name", args.prototypes)
        fix = contract.command(args, "02_kmeans_prototypes.py", *words)
        source = contract.Input(args, f"02_prototypes/ipc{args.ipc}/{args.prototypes}", fix)
        inputs = source.check(f"{c}.npy" for c in args.classes)
    model, unet_folder, hashes = open_model(args)
    inputs |= hashes | {f"prompt of {c}": contract.digest(prompts[c]) for c in args.classes}
    settings = ("sampler", "scheduler", "steps", "cfg", *OPTIONS[args.sampler])
    parameters = {name: getattr(args, name) for name in ("ipc", "limit", "device", "dtype", *settings)}
    number, kinds = min(args.ipc, args.limit or args.ipc), ("mp4", "npy")[: 1 + args.save_latents]
    batches = [  # breadth first: draw 0 of every class and prototype, then draw 1
        (draw, label, range(start, min(start + BATCH, number)))
        for draw in range(args.draws)
        for label in args.classes
        for start in range(0, number, BATCH)
    ]

    def files(batch):
        draw, label, ks = batch
        return [f"{label}/{k}_{draw}.{kind}" for k in ks for kind in kinds]

    wanted = [name for batch in batches for name in files(batch)]
    folder, check = f"03_samples/ipc{args.ipc}/{args.name}", lambda: common.load_tokenizer(model, prompts)
    output = contract.Output(args, folder, parameters, inputs, wanted, shared=True, check=check)
    if not output.todo:
        return

    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    device, dtype = output.device, output.dtype
    if device.type == "cpu":
        keep_memory()
    values = ", ".join(f"{name.replace('_', ' ')} {getattr(args, name)}" for name in settings)
    contract.say(f"03 on {device} in {str(dtype)[6:]}, U-Net {unet_folder}, {values}")
    kind = DDIMScheduler if args.scheduler == "ddim" else DPMSolverMultistepScheduler
    scheduler = kind.from_pretrained(model / "scheduler")
    embeddings = common.embed(model, prompts, device)
    unet = common.load_part(unet_folder, "unet", device, dtype)
    unet.set_attn_processor(PromptAttention())
    vae, factor = common.load_part(model / "vae", "vae", device, torch.float32), common.vae_factor(model)
    shape = (args.ipc, common.NUM_FRAMES, 4, *(side // factor for side in args.spec["size"][::-1]))
    unused = np.zeros(shape, np.float32)  # of naive's prototypes only the shape counts
    for draw, label, ks in contract.bar(output.mine(batches, files), desc="03 batches"):
        prototypes = source.load(f"{label}.npy", shape, "float32") if source else unused
        prototypes = torch.from_numpy(prototypes[list(ks)]).transpose(1, 2)  # [n, 4, 16, h, w] for the U-Net
        text, names = (embeddings[prompts[label]], embeddings[""]), [(label, k, draw) for k in ks]
        latents = sample_batch(unet, scheduler, *text, prototypes, names, args, device)
        if dtype != torch.float32 and not latents.half().isfinite().all():
            output.log(f"03 {label}, draw {draw}: not finite in {unet.dtype}, once more in float32")
            latents = sample_batch(unet.float(), scheduler, *text, prototypes, names, args, device)
            unet.to(dtype)
        for k, z in zip(ks, latents.transpose(1, 2), strict=True):  # z: [16, 4, h, w]
            npy, mp4 = (f"{label}/{k}_{draw}.{kind}" for kind in ("npy", "mp4"))
            if not z.half().isfinite().all():
                what, found = f"{output.folder / mp4}: latents are not finite", f"up to {z.abs().max():.3g}"
                raise contract.ContractError(what, "finite in float16", found, "less guidance, or less --cfg")
            if mp4 in output.todo:
                media.write_mp4(output.folder / mp4, common.decode(vae, z, name=output.folder / mp4), FPS)
            if npy in output.todo:
                contract.save(output.folder / npy, z.half().cpu().numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    output.log(f"03 peak memory {peak / 1e9:.2f} GB")
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
