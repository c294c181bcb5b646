"""Stage 03: prototypes and prompts -> generated videos (section 3.3, eq. 6 to 10).

For every class, prototype and draw: noise of its own, DDIM with classifier-free guidance, and in the noisier half of the
steps a pull of the noise prediction towards the prototype, strongest in the first frame and weaker in each later one.

Reads:   work/<data set>/02_prototypes/ipc<K>/<--prototypes>/<class>.npy  float32 [K, 16, 4, h, w]
         prompts/<data set>.json  one sentence per class; the model: --model
Writes:  work/<data set>/03_samples/ipc<K>/<--name>/<class>/<prototype>_<draw>.npy  float16 [16, 4, h, w] latents
         and the same name .mp4: H.264, 16 frames at generator size
Run:     python 03_guided_sample.py hmdb51 20
         python 03_guided_sample.py demo 5
         torchrun --nproc-per-node 8 03_guided_sample.py hmdb51 20    the processes share the batches
Cost:    demo IPC 5: 160 videos, 4 min on two CPU cores. hmdb51 IPC 20, by estimate: 4,080 videos, 8 h on an A100
Expect:  videos of the class that look like its prototypes; --guidance 0 is the naive baseline, with prompts alone
Differs: the minus sign, sigma_t = sqrt(1 - abar_t), 50 steps instead of 2000 and "stop at step 1000" read as the noisier
         half (the schedule has 1000 steps; paper_facts.md 2.1, 2.5); the U-Net is the published one
"""

from pathlib import Path

import torch

import common
import contract

# EDIT HERE: the method's settings (design choices where the paper is silent or cannot be taken literally)
GUIDANCE = 0.1  # lambda of eq. 7
STOP = 0.5  # guide while t > STOP * T: 0 is always, 1 never (section 4.1: half of the timesteps)
STEPS = {"demo": 25}  # DDIM steps; every other data set:
STEPS_FULL = 50
CFG = {"demo": 4.0}  # classifier-free guidance scale; every other data set:
CFG_FULL = 9.0
DRAWS = 4  # samples per prototype: the sources of one composed video (section 3.4)

APART = ("plan",)  # definitions that only show something
BATCH = 8  # videos per batch, of one class and draw; how batches are cut can change last bits
DECODE_BATCH = 16  # frames per forward of the VAE's decoder
FPS = 8  # of the .mp4, as the model was trained
SECONDS_PER_VIDEO = {"demo": 1.4}  # on two CPU cores; the real model on an A100, by estimate:
SECONDS_PER_VIDEO_GPU = 7.0


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS)
    parser.add_argument("--name", default="gvd", help="name of the folder (gvd)")
    parser.add_argument("--prototypes", default="direct", help="folder of stage 02 (direct)")
    parser.add_argument("--model", help="folder or hub name of the text-to-video model (demo/models/t2v, ModelScope)")
    parser.add_argument("--unet", default="published", help="folder of another U-Net, in diffusers layout (published)")
    parser.add_argument("--prompt-file", type=Path, help="JSON {class: prompt} (prompts/<data set>.json)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"strength lambda ({GUIDANCE})")
    parser.add_argument("--stop", type=float, default=STOP, help=f"guide while t > STOP * T ({STOP})")
    parser.add_argument("--steps", type=contract.positive, help=f"DDIM steps ({STEPS_FULL}; demo {STEPS['demo']})")
    parser.add_argument("--cfg", type=float, help=f"classifier-free guidance scale ({CFG_FULL}; demo {CFG['demo']})")
    parser.add_argument("--draws", type=contract.positive, default=DRAWS, help=f"videos per prototype ({DRAWS})")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the U-Net (bfloat16 where the device computes in it, else float32)",
    )
    parser.add_argument("--micro-batch", type=contract.positive, default=BATCH, help=f"videos per forward on a GPU ({BATCH})")
    args = contract.parse(parser)
    args.steps = args.steps or STEPS.get(args.dataset, STEPS_FULL)
    args.cfg = CFG.get(args.dataset, CFG_FULL) if args.cfg is None else args.cfg
    if not 0 <= args.stop <= 1:
        parser.error("--stop: must be between 0 and 1")
    return args


def read_prompts(args):
    """{class: prompt}; ContractError names a class without one."""
    file = "ucf101" if args.dataset == "miniucf" else args.dataset
    path = args.prompt_file or Path(__file__).parent / "prompts" / f"{file}.json"
    prompts = contract.read_json(path)
    if not isinstance(prompts, dict):
        raise contract.ContractError(f"{path} is missing or no JSON object\n  expected: {{class: prompt}}")
    for label in args.classes:
        if not isinstance(prompts.get(label), str):
            raise contract.ContractError(f"{path}: no prompt for class {label}\n  expected: one for each of {args.dataset}")
    return {label: prompts[label] for label in args.classes}


def check_steps(config, steps):
    """ContractError for a number of DDIM steps that the schedule cannot serve.

    config: scheduler_config.json. With the published ("leading") spacing some counts start far below the noisiest step,
    or past it (peers.md 0.2), where sampling would begin from noise of the wrong strength.
    """
    total, offset = config["num_train_timesteps"], config.get("steps_offset", 0)
    leading = config.get("timestep_spacing", "leading") == "leading"

    def usable(n):
        first = (n - 1) * (total // n) + offset if leading else total - 1
        return n < total and min(0.95 * total, total - 1.25 * total / n) <= first < total

    if not usable(steps):
        near = [n for n in (*range(1, 21), 25, 50, 100, 200, 250, 500) if usable(n)]
        raise contract.ContractError(
            f"--steps {steps}: the schedule of {total} steps cannot serve this number\n  usable: {', '.join(map(str, near))}"
        )


def embed(folder, prompts, device):
    """{prompt: float32 [1, tokens, width]} for the prompts and the empty one; the text encoder is needed only here."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise contract.ContractError(f"{folder / 'tokenizer'} cannot be loaded\n  found: {error}") from None
    encoder = common.load_part(folder / "text_encoder", "text_encoder", device, torch.float32)
    embeddings = {}
    for prompt in ("", *sorted(set(prompts.values()))):
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(prompt, return_tensors="pt", **options).input_ids.to(device)
        with torch.inference_mode():
            embeddings[prompt] = encoder(ids).last_hidden_state
    return embeddings


def sample(unet, scheduler, text, empty, prototypes, noise, args):
    """Guided DDIM from noise to latents: float32 [n, 4, 16, h, w] (section 3.3, eq. 6 to 10).

    text, empty: [1, tokens, width] prompt embeddings, in the U-Net's dtype. prototypes: float32 [n, 4, 16, h, w].
    """
    guided = common.linear_decay(args.guidance, prototypes.shape[2])  # eq. 8
    states = torch.cat([empty.expand(len(noise), -1, -1), text.expand(len(noise), -1, -1)])
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.inference_mode():
            model_input = scheduler.scale_model_input(torch.cat([latents, latents]), t).to(unet.dtype)
            without_text, with_text = unet(model_input, t, states).sample.float().chunk(2)
        noise_pred = without_text + args.cfg * (with_text - without_text)
        strengths = guided if t > args.stop * scheduler.config.num_train_timesteps else torch.zeros_like(guided)
        latents = common.guided_ddim_step(scheduler, noise_pred, t, latents, prototypes, strengths)
    return latents


def decode(vae, latents):
    """Latents float32 [4, 16, h, w] -> frames uint8 [16, H, W, 3]."""
    z = latents.transpose(0, 1) / vae.config.scaling_factor
    with torch.inference_mode():
        frames = torch.cat([vae.decode(part).sample for part in z.split(DECODE_BATCH)])
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sample_batch(unet, scheduler, embeddings, prompt, prototypes, noise, args, device):
    """One batch, through the device in micro-batches; on the CPU always as a whole."""
    part = len(noise) if device.type == "cpu" else args.micro_batch
    text, empty = (embeddings[p].to(unet.dtype) for p in (prompt, ""))
    try:
        pieces = [
            sample(unet, scheduler, text, empty, p.to(device), z.to(device), args)
            for p, z in zip(prototypes.split(part), noise.split(part), strict=True)
        ]
    except torch.OutOfMemoryError:
        raise contract.ContractError(
            f"out of memory on {device} with {min(part, len(noise))} videos per forward\n"
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
    model = common.model_folder(args)
    unet = model / "unet" if args.unet == "published" else Path(args.unet)
    if not (unet / "config.json").is_file():
        raise contract.ContractError(f"{unet / 'config.json'} is missing\n  expected: a U-Net in diffusers layout")
    check_steps(contract.read_json(model / "scheduler" / "scheduler_config.json"), args.steps)
    folders = {part: model / part for part in common.PARTS} | {"unet": unet}
    return model, unet, {part: contract.folder_hash(folder, args) for part, folder in folders.items()}


def main():
    args = parse_args()
    number = min(args.ipc, args.limit or args.ipc)
    cost = plan(args, number)
    source = contract.work_folder(args, "02_prototypes", f"ipc{args.ipc}", args.prototypes)
    prompts = read_prompts(args)
    if args.dry_run and (args.after or not (source / "manifest.json").exists()):
        return contract.plan_after(args, "03", cost)
    mend = contract.command("02_kmeans_prototypes.py", args, "--name", args.prototypes)
    manifest = contract.read_folder(source, args, mend)
    contract.need(manifest, [f"{c}.npy" for c in args.classes], source, mend)
    try:
        model, unet_folder, inputs = open_model(args)
    except contract.Missing:
        if args.dry_run:
            return contract.plan_after(args, "03", cost)
        raise

    folder = contract.work_folder(args, "03_samples", f"ipc{args.ipc}", args.name)
    names = ("guidance", "stop", "steps", "cfg", "limit", "device", "threads", "dtype")
    settings = {"ipc": args.ipc, **{name: getattr(args, name) for name in names}}
    of_class = {c: contract.digest([prompts[c], manifest["outputs"][f"{c}.npy"]["sha256"]]) for c in args.classes}
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

    from diffusers import DDIMScheduler

    device, dtype = torch.device(identity["parameters"]["device"]), getattr(torch, identity["parameters"]["dtype"])
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(args.steps)
    embeddings = embed(model, prompts, device)
    unet = common.load_part(unet_folder, "unet", device, dtype)
    vae = common.load_part(model / "vae", "vae", device, torch.float32)
    todo, factor = set(todo), common.vae_factor(model)
    contract.say(f"03 {args.steps} DDIM steps, classifier-free guidance {args.cfg}, lambda {args.guidance}, stop {args.stop}")
    kinds, videos = {}, [name for name in wanted if name.endswith(".mp4")]
    for name in videos:
        shape = manifest["outputs"][f"{name.split('/')[0]}.npy"]["shape"]
        kinds[name] = ([16, shape[3] * factor, shape[4] * factor, 3], "uint8")
    bar = contract.bar(total=len(videos), initial=(len(wanted) - len(todo)) // 2, desc="03 videos")

    def files(batch):
        """What is made in one go."""
        draw, label, ks = batch
        return [folder / label / f"{k}_{draw}.{kind}" for k in ks for kind in ("npy", "mp4")]

    for draw, label, ks in contract.shared(batches, files):
        stems = [f"{label}/{k}_{draw}" for k in ks]
        prototypes = contract.load_array(source / f"{label}.npy", (args.ipc, 16, 4, None, None), "float32", mend)
        prototypes = torch.from_numpy(prototypes[list(ks)]).transpose(1, 2)  # [n, 4, 16, h, w], as the U-Net takes them
        noise = [contract.generator(args.seed, "03", label, k, draw) for k in ks]
        noise = torch.stack([torch.randn(prototypes.shape[1:], generator=generator) for generator in noise])
        latents = sample_batch(unet, scheduler, embeddings, prompts[label], prototypes, noise, args, device)
        for stem, z in zip(stems, latents, strict=True):
            if not z.isfinite().all():
                raise contract.ContractError(f"{folder / stem}: the latents are not finite\n  type --dtype float32")
            if f"{stem}.npy" in todo:
                contract.save_array(folder / f"{stem}.npy", z.transpose(0, 1).half().cpu().numpy())
            if f"{stem}.mp4" in todo:
                common.write_mp4(folder / f"{stem}.mp4", decode(vae, z), FPS)
        bar.update(sum((folder / name).is_file() for name in videos) - bar.n)  # also those of the other processes
    bar.close()
    contract.finish(folder, identity, wanted, args, ["diffusers", "transformers", "av"], kinds)


if __name__ == "__main__":
    contract.run(main)
