"""Stage 03: prototypes and prompts -> generated videos (section 3.3, eq. 6 to 10).

For every class, prototype and draw: noise of its own, DDIM with classifier-free guidance, and in the noisier half of the
steps a pull of the noise prediction towards the prototype, strongest in the first frame and weaker in each later one.
The noise depends on class, prototype and draw alone, so the paper's baselines start from the same:

  --sampler gvd     the method, as above
            naive   prompts alone: reads no prototypes
            knoise  no pull; the prototype's first frame, 16 times, is noised to --strength and denoised (after D4M)

Reads:   work/<data set>/02_prototypes/ipc<K>/<--prototypes>/<class>.npy  float32 [K, 16, 4, h, w]
         prompts/<data set>.json  one sentence per class; the model: --model; its U-Net: --unet, by default
         work/<data set>/03_unet/default/ (tools/finetune_unet.py) for hmdb51 and miniucf, else the published one
Writes:  work/<data set>/03_samples/ipc<K>/<--name>/<class>/<prototype>_<draw>.npy  float16 [16, 4, h, w] latents
         and the same name .mp4: H.264, 16 frames at generator size
Run:     python 03_guided_sample.py hmdb51 20
         python 03_guided_sample.py demo 5
         python 03_guided_sample.py demo 5 --sampler naive
         python 03_guided_sample.py demo 5 --sampler knoise          # after 02 with --cluster dummy-video
         python 03_guided_sample.py demo 5 --decay none --name no-decay
         python 03_guided_sample.py demo 5 --guidance-form released-ddim --name released-ddim
         python 03_guided_sample.py demo 5 --prompt-file none --name no-text     # guided by the prototype alone
         python 03_guided_sample.py demo 5 --scheduler dpmpp --steps 20 --name dpmpp
         torchrun --nproc-per-node 8 03_guided_sample.py hmdb51 20    the processes share the batches
Cost:    demo IPC 5: 160 videos, 3 min on two CPU cores. hmdb51 IPC 20, by estimate: 4,080 videos, 8 h on an A100
Expect:  videos of the class that look like its prototypes
Differs: the minus sign, sigma_t = sqrt(1 - abar_t), 50 steps instead of 2000 and "stop at step 1000" read as the noisier
         half (the schedule has 1000 steps; paper_facts.md 2.1, 2.5); which U-Net was used stands in the manifest
"""

import contextlib
import ctypes
from pathlib import Path

import numpy as np
import torch

import common
import contract

# EDIT HERE: the method's settings (design choices where the paper is silent or cannot be taken literally)
GUIDANCE = 0.1  # lambda of eq. 7
STOP = 0.5  # guide while t > STOP * T: 0 is always, 1 never (section 4.1: half of the timesteps)
STEPS = {"demo": 25}  # DDIM steps; every other data set:
STEPS_FULL = 50
CFG = {"demo": 2.0}  # classifier-free guidance scale; every other data set:
CFG_FULL = 9.0
FINE_TUNED = ("hmdb51", "miniucf")  # sets whose U-Net is fine-tuned by default (eq. 3)
DRAWS = 4  # samples per prototype: the sources of one composed video (section 3.4)

STRENGTH = 0.7  # K-Noise: share of the steps that its prototype is noised and denoised by
# The options of the method that each sampler has, besides those that all have
OPTIONS = {"gvd": ("guidance", "guidance_form", "stop", "decay"), "naive": ("size",), "knoise": ("strength",)}

APART = ("plan", "micro_batch", "keep_memory")  # definitions that change no value
BATCH = 8  # videos per batch, of one class and draw; how batches are cut can change last bits
DECODE_BATCH = 8  # frames per forward of the VAE's decoder
SHORT = common.NUM_FRAMES  # tokens up to which the CPU's attention is faster product by product
ATTENTION_LIMIT = 65535  # sequences per attention on a GPU (peers.md 4)
GPU_BYTES = 5e9, 2.5e9  # weights, and a forward per video of 448x256, by estimate
FPS = 8  # of the .mp4, as the model was trained
SECONDS_PER_VIDEO = {"demo": 1.1}  # on two CPU cores; the real model on an A100, by estimate:
SECONDS_PER_VIDEO_GPU = 7.0


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    parser.add_argument("--sampler", choices=tuple(OPTIONS), default="gvd", help="see above (gvd)")
    parser.add_argument("--name", help="name of the folder (the sampler's)")
    parser.add_argument("--prototypes", help="folder of stage 02 (direct; knoise dummy-video; naive reads none)")
    parser.add_argument("--model", help="folder or hub name of the text-to-video model (demo/models/t2v, ModelScope)")
    parser.add_argument(
        "--unet", help="published, or the folder of another U-Net (hmdb51, miniucf: 03_unet/default; others: published)"
    )
    parser.add_argument("--prompt-file", type=Path, help="JSON {class: prompt}, or none (prompts/<data set>.json)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"strength lambda ({GUIDANCE})")
    forms = ("ddim", "released-ddim", "released-ddpm", "x0")
    parser.add_argument("--guidance-form", choices=forms, default="ddim", help="see common.guided_ddim_step (ddim)")
    parser.add_argument("--stop", type=float, default=STOP, help=f"guide while t > STOP * T ({STOP})")
    decays = ("linear", "linear1", "none")
    parser.add_argument("--decay", choices=decays, default="linear", help="over frames, eq. 8; linear1: f from 1 (linear)")
    parser.add_argument("--strength", type=float, default=STRENGTH, help=f"of knoise's noise ({STRENGTH})")
    parser.add_argument("--size", type=common.frame_size, help="naive's frame, WxH in pixels (448x256; demo 32x32)")
    parser.add_argument("--scheduler", choices=("ddim", "dpmpp"), default="ddim", help="dpmpp: for 20 to 25 steps (ddim)")
    parser.add_argument("--steps", type=contract.positive, help=f"sampling steps ({STEPS_FULL}; demo {STEPS['demo']})")
    parser.add_argument("--cfg", type=float, help=f"classifier-free guidance scale ({CFG_FULL}; demo {CFG['demo']})")
    parser.add_argument("--draws", type=contract.positive, default=DRAWS, help=f"videos per prototype ({DRAWS})")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the U-Net (bfloat16 where the device computes in it, else float32)",
    )
    parser.add_argument("--micro-batch", type=contract.positive, help="videos per forward on a GPU (by its memory, up to 8)")
    args = contract.parse(parser)
    for sampler, names in OPTIONS.items():
        for name in names:
            if sampler != args.sampler and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')}: only for --sampler {sampler}")
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
    args.size = args.size or args.spec["size"]
    return args


def check_steps(config, steps, solver="ddim"):
    """ContractError for a number of steps that the schedule cannot serve.

    config: scheduler_config.json. With the published ("leading") spacing some counts start far below the noisiest step,
    or past it (peers.md 0.2), where sampling would begin from noise of the wrong strength.
    """
    total, offset = config["num_train_timesteps"], config.get("steps_offset", 0)
    spacing = config.get("timestep_spacing", "leading" if solver == "ddim" else "linspace")  # the library's defaults

    def usable(n):
        first = total - 1
        if spacing == "leading":
            first = (n - 1) * (total // n) + offset if solver == "ddim" else n * (total // (n + 1)) + offset
        return n < total and min(0.95 * total, total - 1.25 * total / n) <= first < total

    if not usable(steps):
        near = [n for n in (*range(1, 21), 25, 50, 100, 200, 250, 500) if usable(n)]
        raise contract.ContractError(
            f"--steps {steps}: the schedule of {total} steps cannot serve this number\n  usable: {', '.join(map(str, near))}"
        )


class PromptAttention:
    """Attention for UNet3DConditionModel, in place of diffusers' default: the same values but for their last bits.

    The frames and videos of a batch share its prompts, so cross-attention takes keys and values of each prompt once. And
    on a CPU short sequences, those over time, are multiplied in float32, product by product: the fused kernel is slow
    for them. Together 1.1 times as fast at the demo's size.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, prompts=None):
        """hidden_states: [n, tokens, width] -> the same. prompts: how many different ones the batch holds, one after the
        other and equally often (through cross_attention_kwargs)."""
        query, source = attn.to_q(hidden_states), hidden_states
        if encoder_hidden_states is not None:
            source = encoder_hidden_states[:: len(hidden_states) // prompts]
            query = query.reshape(prompts, -1, query.shape[-1])
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, attn.to_k(source), attn.to_v(source))
        )
        if encoder_hidden_states is None and hidden_states.shape[1] <= SHORT and hidden_states.device.type == "cpu":
            scores = query.float() * attn.scale @ key.float().transpose(2, 3)
            mixed = (scores.softmax(-1) @ value.float()).to(hidden_states.dtype)
        else:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).reshape(*hidden_states.shape[:2], -1))


def keep_memory():
    """Tells glibc to keep freed memory: else the system takes back and zeroes a forward's large arrays, layer by layer.

    On two CPU cores 1.1 times as fast at the demo's size; where there is no glibc, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only larger arrays are mapped by themselves
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed


def sample(unet, scheduler, text, empty, prototypes, generators, args):
    """From noise to latents: float32 [n, 4, 16, h, w] (section 3.3, eq. 6 to 10).

    text, empty: [1, tokens, width] prompt embeddings, in the U-Net's dtype. prototypes: float32 [n, 4, 16, h, w]; of the
    naive sampler only their shape counts. generators: one on the CPU per video, from which all of its noise is drawn.
    """

    def draw():
        return torch.stack([torch.randn(prototypes.shape[1:], generator=g) for g in generators]).to(prototypes)

    scheduler.set_timesteps(args.steps)
    timesteps, noise = scheduler.timesteps, draw()
    latents = noise * scheduler.init_noise_sigma
    if args.sampler == "knoise":  # the prototype's first frame stands still, is noised and denoised again
        timesteps = timesteps[args.steps - int(args.strength * args.steps) :]
        latents = scheduler.add_noise(prototypes[:, :, :1].expand_as(noise), noise, timesteps[:1])
    strengths = torch.zeros(prototypes.shape[2])
    if args.sampler == "gvd":
        strengths += args.guidance
        if args.decay != "none":
            strengths = common.linear_decay(args.guidance, len(strengths), first=int(args.decay == "linear1"))  # eq. 8
    prompts = [text] if torch.equal(text, empty) or args.cfg == 1 else [empty, text]
    states = torch.cat(prompts).repeat_interleave(len(noise), 0)
    for t in timesteps:
        with torch.inference_mode():
            model_input = scheduler.scale_model_input(torch.cat([latents] * len(prompts)), t).to(unet.dtype)
            predicted = unet(model_input, t, states, cross_attention_kwargs={"prompts": len(prompts)}).sample.float()
        without_text, with_text = predicted.chunk(2) if len(prompts) == 2 else (predicted, predicted)
        noise_pred = without_text + args.cfg * (with_text - without_text)
        guided = args.sampler == "gvd" and t > args.stop * scheduler.config.num_train_timesteps
        used = strengths if guided else torch.zeros_like(strengths)
        step_noise = draw() if args.guidance_form == "released-ddpm" else None
        latents = common.guided_ddim_step(scheduler, noise_pred, t, latents, prototypes, used, args.guidance_form, step_noise)
    return latents


def decode(vae, latents):
    """Latents float32 [4, 16, h, w] -> frames uint8 [16, H, W, 3]."""
    z = latents.transpose(0, 1) / vae.config.scaling_factor
    with torch.inference_mode():
        frames = torch.cat([vae.decode(part).sample for part in z.split(DECODE_BATCH)])
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def micro_batch(args, device, shape):
    """Videos per forward: on the CPU the whole batch, on a GPU what its memory (by estimate) and its attention take."""
    if device.type == "cpu":
        return BATCH
    weights, video = GPU_BYTES
    pixels = shape[-1] * shape[-2]
    memory = (0.9 * torch.cuda.get_device_properties(device).total_memory - weights) / video * 32 * 56 / pixels
    return args.micro_batch or max(1, min(BATCH, int(memory), ATTENTION_LIMIT // (2 * pixels)))


def sample_batch(unet, scheduler, embeddings, prompt, prototypes, names, args, device):
    """Latents of one batch, through the device in micro-batches. names: of each video (label, prototype, draw)."""
    part = micro_batch(args, device, prototypes.shape)
    text, empty = (embeddings[p].to(unet.dtype) for p in (prompt, ""))
    generators = [contract.generator(args.seed, "03", *name) for name in names]
    try:
        pieces = [
            sample(unet, scheduler, text, empty, p.to(device), generators[start : start + part], args)
            for start, p in zip(range(0, len(names), part), prototypes.split(part), strict=True)
        ]
    except torch.OutOfMemoryError:
        raise contract.ContractError(
            f"out of memory on {device} with {min(part, len(names))} videos per forward\n"
            f"  type --micro-batch {max(1, part // 2)}"
        ) from None
    return torch.cat(pieces)


def plan(args, number):
    """The plan, for --dry-run: (item, items, seconds, bytes, machine)."""
    videos = number * args.draws * len(args.classes)
    per_video = SECONDS_PER_VIDEO.get(args.dataset, SECONDS_PER_VIDEO_GPU) * args.steps
    width, height = args.spec["size"]
    size = videos * (16 * 4 * width * height // 64 * 2 + 0.15 * 16 * width * height)
    machine = "two CPU cores" if args.dataset == "demo" else "an A100"
    return "videos", videos, per_video * videos / STEPS.get(args.dataset, STEPS_FULL), size, machine


def open_model(args):
    """(the model's folder, the U-Net's folder, {part: content hash}), checked before anything is put aside."""
    tuned = contract.work_folder(args, "03_unet", "default")
    default = tuned if args.dataset in FINE_TUNED else "published"
    mend = contract.command("tools/finetune_unet.py", args)
    if args.unet is None and default == tuned and not (tuned / "manifest.json").is_file():
        raise contract.Missing(
            f"{tuned / 'manifest.json'} is missing\n  expected: the U-Net fine-tuned on {args.dataset} (eq. 3)\n"
            f"  to make it, 1.5 h on an A100: {mend}\n"
            f"  or take the published one:    {contract.again('--unet', 'published')}"
        )
    model, choice = common.model_folder(args), args.unet or default
    unet = model / "unet" if choice == "published" else Path(choice)
    if not isinstance(contract.read_json(unet / "config.json"), dict):
        raise contract.ContractError(f"{unet / 'config.json'} is missing\n  expected: a U-Net in diffusers layout")
    common.check_model(model, unet)
    check_steps(contract.read_json(model / "scheduler" / "scheduler_config.json"), args.steps, args.scheduler)
    inputs = {part: contract.folder_hash(model / part, args) for part in common.PARTS if part != "unet"}
    if (unet / "manifest.json").is_file():  # fine-tuned: its log and times are no part of it
        inputs["unet"] = contract.content(contract.read_folder(unet, args, mend), sorted(common.UNET_FILES))
    else:
        inputs["unet"] = contract.folder_hash(unet, args)
    return model, unet, inputs


def open_prototypes(source, args):
    """{class: its entry in the manifest of stage 02's folder, with the path}, and the command that makes that folder."""
    kinds = ("direct", "real-video", "dummy-video", "herding", "gmm")
    option = "--cluster" if args.prototypes in kinds else "--name"
    mend = contract.command("02_kmeans_prototypes.py", args, option, args.prototypes)
    manifest = contract.read_folder(source, args, mend)
    contract.need(manifest, [f"{c}.npy" for c in args.classes], source, mend)
    return {c: manifest["outputs"][f"{c}.npy"] for c in args.classes}, mend


def main():
    args = parse_args()
    number = min(args.ipc, args.limit or args.ipc)
    cost = plan(args, number)
    prompts, entries = common.read_prompts(args), {}
    if args.sampler != "naive":
        source = contract.work_folder(args, "02_prototypes", f"ipc{args.ipc}", args.prototypes)
        if args.dry_run and (args.after or not (source / "manifest.json").exists()):
            return contract.plan_after(args, "03", cost)
        entries, mend = open_prototypes(source, args)
    try:
        model, unet_folder, inputs = open_model(args)
    except contract.Missing:
        if args.dry_run:
            return contract.plan_after(args, "03", cost)
        raise

    folder = contract.work_folder(args, "03_samples", f"ipc{args.ipc}", args.name)
    names = ("sampler", *OPTIONS[args.sampler], "scheduler", "steps", "cfg", "limit", "device", "threads", "dtype")
    settings = {"ipc": args.ipc, **{name: getattr(args, name) for name in names}}
    of_class = {c: contract.digest([prompts[c], entries.get(c, {}).get("sha256")]) for c in args.classes}
    identity = contract.identity(__file__, args, settings, inputs, of_class, APART)
    batches = [  # breadth first: draw 0 of every class and prototype, then draw 1
        (draw, label, range(start, min(start + BATCH, number)))
        for draw in range(args.draws)
        for label in args.classes
        for start in range(0, number, BATCH)
    ]
    wanted = [f"{c}/{k}_{draw}.{kind}" for draw, c, ks in batches for k in ks for kind in ("npy", "mp4")]
    todo, identity = contract.begin(folder, identity, wanted, args, cost)
    if todo is None:
        return

    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    device, dtype = torch.device(identity["parameters"]["device"]), getattr(torch, identity["parameters"]["dtype"])
    kind = DDIMScheduler if args.scheduler == "ddim" else DPMSolverMultistepScheduler
    scheduler = kind.from_pretrained(model / "scheduler")
    if device.type == "cpu":
        keep_memory()
    embeddings = common.embed(model, ["", *prompts.values()], device)
    unet = common.load_part(unet_folder, "unet", device, dtype)
    unet.set_attn_processor(PromptAttention())
    vae = common.load_part(model / "vae", "vae", device, torch.float32)
    todo, factor = set(todo), common.vae_factor(model)
    told = [f"{name} {getattr(args, name)}" for name in ("sampler", "scheduler", "steps", "cfg", *OPTIONS[args.sampler])]
    contract.say("03 " + ", ".join(told).replace("_", " "))
    shapes = {c: [args.ipc, 16, 4, args.size[1] // factor, args.size[0] // factor] for c in args.classes}  # of naive
    shapes |= {c: entry["shape"] for c, entry in entries.items()}
    kinds, videos = {}, [name for name in wanted if name.endswith(".mp4")]
    for name in videos:
        height, width = shapes[name.split("/")[0]][3:]
        kinds[name] = ([16, height * factor, width * factor, 3], "uint8")
    bar = contract.bar(total=len(videos), initial=(len(wanted) - len(todo)) // 2, desc="03 videos")

    def files(batch):
        """What is made in one go."""
        draw, label, ks = batch
        return [folder / label / f"{k}_{draw}.{kind}" for k in ks for kind in ("npy", "mp4")]

    for draw, label, ks in contract.shared(batches, files):
        stems = [f"{label}/{k}_{draw}" for k in ks]
        prototypes = np.zeros(shapes[label], np.float32)  # naive: nothing of them but the shape is used
        if entries:
            prototypes = contract.load_array(source / f"{label}.npy", (args.ipc, 16, 4, None, None), "float32", mend)
        prototypes = torch.from_numpy(prototypes[list(ks)]).transpose(1, 2)  # [n, 4, 16, h, w], as the U-Net takes them
        names = [(label, k, draw) for k in ks]
        latents = sample_batch(unet, scheduler, embeddings, prompts[label], prototypes, names, args, device)
        if dtype != torch.float32 and not latents.isfinite().all():
            contract.say(f"03 {label}, draw {draw}: not finite in {unet.dtype}, once more in float32")
            latents = sample_batch(unet.float(), scheduler, embeddings, prompts[label], prototypes, names, args, device)
            unet.to(dtype)
        for stem, z in zip(stems, latents, strict=True):
            if not z.isfinite().all():
                raise contract.ContractError(f"{folder / stem}: the latents are not finite, in float32 too")
            if f"{stem}.npy" in todo:
                contract.save_array(folder / f"{stem}.npy", z.transpose(0, 1).half().cpu().numpy())
            if f"{stem}.mp4" in todo:
                common.write_mp4(folder / f"{stem}.mp4", decode(vae, z), FPS)
        bar.update(sum((folder / name).is_file() for name in videos) - bar.n)  # also those of the other processes
    bar.close()
    contract.finish(folder, identity, wanted, args, ["diffusers", "transformers", "av"], kinds)


if __name__ == "__main__":
    contract.run(main)
