"""What several stages share: the method (guided step, decay, MiniC3D) and the text-to-video model."""

from contract import ROOT, ContractError, Missing, automatic, digest, read, sha256

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

NUM_FRAMES = 16  # frames of every clip, real or generated (section 4.1)


# --- the method


def linear_decay(strength, num_frames=NUM_FRAMES):
    """Guidance strength per frame (eq. 8): lambda * (1 - f / F), f = 0 .. F-1. Returns float32 [F]."""
    return strength * (1 - torch.arange(num_frames, dtype=torch.float32) / num_frames)


def guided_ddim_step(scheduler, noise_pred, t, latents, prototypes, strengths, form="ddim", step_noise=None):
    """One DDIM step, guided towards the prototypes (eq. 6, 9 and 10). Returns z_{t-1}.

    scheduler: a diffusers scheduler with its timesteps set: DDIM, or with form "ddim" another that has
    alphas_cumprod. noise_pred, latents, prototypes: float32 [n, 4, F, h, w], the noise prediction after
    classifier-free guidance. t: the timestep. strengths: [F] (linear_decay). form: where c - x0_hat goes,

    ddim           eps' = eps - lambda_f * sqrt(1 - abar_t) * (c - x0_hat). The parent paper prints a plus,
                   which moves away from the prototype; its Algorithm 1 has this sign (docs/paper_notes.md)
    x0             x0' = x0_hat + lambda_f * (c - x0_hat), eps' from x0'
    released-ddim  z_{t-1} = DDIM(eps) + lambda_f * sqrt(abar_t) * (c - x0_hat), the parent's released code
    released-ddpm  z_{t-1} = DDPM mean + lambda_f * sigma_t * (c - x0_hat) + sigma_t * step_noise, likewise;
                   sigma_t: the posterior's standard deviation, step_noise: standard normal [n, 4, F, h, w]

    With strength 0 the result is the library's own step, bit for bit.
    """
    alpha = scheduler.alphas_cumprod[t].to(latents)  # abar_t
    x0_hat = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    towards = prototypes - x0_hat  # g_t of eq. 6
    strengths = strengths.to(latents).view(1, 1, -1, 1, 1)
    if form == "ddim":  # eq. 9, sigma_t = sqrt(1 - abar_t), then eq. 10
        return scheduler.step(noise_pred - strengths * (1 - alpha).sqrt() * towards, t, latents).prev_sample

    if form == "x0":
        scale = strengths * (alpha / (1 - alpha)).sqrt()
        return scheduler.step(noise_pred - scale * towards, t, latents).prev_sample
    if form == "released-ddim":
        return scheduler.step(noise_pred, t, latents).prev_sample + strengths * alpha.sqrt() * towards
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    previous = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    previous = previous.to(latents)  # abar of the next, less noisy timestep
    sigma = ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
    stepped = scheduler.step(noise_pred, t, latents, eta=1.0, variance_noise=step_noise)  # DDIM, eta 1: DDPM
    return stepped.prev_sample + strengths * sigma * towards


class MiniC3D(nn.Module):
    """The evaluation network: three strided 3D convolutions without normalisation.

    forward: float [n, 3, 16, S, S] -> logits [n, num_classes]. S from 43 px; 3,647,666 weights at 50 classes.
    """

    def __init__(self, num_classes):
        super().__init__()
        shape = dict(kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))
        self.blocks = nn.Sequential(
            nn.Conv3d(3, 64, **shape), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(64, 128, **shape), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(128, 128, **shape), nn.ReLU(), nn.MaxPool3d(2),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv3d(128, num_classes, 1)

    def forward(self, clips):
        features = self.blocks(clips)  # [n, 128, 4, S', S'], S' = 2 at 112 px and 1 at 48 px
        height, width = features.shape[-2:]
        pooled = nn.functional.avg_pool3d(features, (2, min(2, height), min(2, width)), stride=1)
        logits = self.head(self.dropout(pooled)).flatten(3).mean(3)  # one position in space: [n, classes, 3]
        return logits.amax(2)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0 to 1


def to_input(clips):
    """uint8 [n, 16, S, S, 3] -> float32 [n, 3, 16, S, S], ImageNet's mean and std, in channels_last_3d."""
    mean, std = (torch.tensor(v, device=clips.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return clips.float().div_(255).sub_(mean).div_(std).permute(0, 4, 1, 2, 3)


# --- what tools/bench.py has measured

BENCH = ROOT / "results" / "bench"


def device_name(device):
    """The GPU's name, or the CPU's and its threads."""
    if str(device) != "cpu":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", cpu.read_text() if cpu.exists() else "", re.M)
    return f"{found[1] if found else 'CPU'}, {torch.get_num_threads()} threads"


def bench_file(device):
    return BENCH / (re.sub(r"[^A-Za-z0-9.-]+", "_", device_name(device)) + ".json")


def rate(args, estimated, figure="seconds", machine="an A100"):
    """(seconds of an item of a script, the machine) for --dry-run, as measured on the device at hand.

    Where that was not measured, those `estimated` for the machine, or for the demo on two CPU cores.
    """
    machine = "two CPU cores" if args.dataset == "demo" else machine
    if not args.dry_run or getattr(args, "dtype", None):  # it is measured in the automatic dtype
        return estimated, machine
    device, (width, height) = automatic("device", args.device), getattr(args, "size", args.spec["size"])
    model = "demo" if args.dataset == "demo" else "real"
    figures = (read(bench_file(device)) or {}).get(f"{model} {width}x{height}", {}).get(args.number, {})
    if figure not in figures:
        return estimated, machine
    return figures[figure], f"{device_name(device)}, measured"


# --- the text-to-video model

MODELSCOPE = "ali-vilab/text-to-video-ms-1.7b"  # weights CC-BY-NC 4.0
DEMO_MODEL = ROOT / "demo" / "models" / "t2v"
CONFIGS = {"vae": "", "text_encoder": "", "unet": "", "tokenizer": "tokenizer_", "scheduler": "scheduler_"}
NETWORKS = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "unet": "UNet3DConditionModel"}
WEIGHTS = ("*.fp16.safetensors", "*.safetensors", "*.fp16.bin", "*.bin")  # the first that is there counts


def model_folder(args, parts=tuple(CONFIGS)):
    """The local folder of the text-to-video model in diffusers layout; a hub name is downloaded once.

    Raises Missing when it, or one of its `parts`, is not there.
    """
    name = args.model or (DEMO_MODEL if args.dataset == "demo" else MODELSCOPE)
    fix = f"hf download {MODELSCOPE} --local-dir FOLDER ; then --model FOLDER"
    if name == DEMO_MODEL:
        fix = "python demo/train_models.py"
    folder, expected = Path(name), f"a folder with {', '.join(CONFIGS)}"
    if not folder.is_dir():
        if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise Missing(f"{name} is missing", expected, fix=fix)
        try:
            folder = download(name, local=args.dry_run)
        except Exception as error:  # of the network or the hub
            found = f"{type(error).__name__}; is there a network?"
            raise Missing(f"the model {name} cannot be downloaded", expected, found, fix) from None
    for part in parts:
        path = folder / part / f"{CONFIGS[part]}config.json"
        if not isinstance(read(path), dict):
            raise Missing(f"{path} is missing or no JSON object", expected, fix=fix)
    vocabulary = [folder / "tokenizer" / name for name in ("tokenizer.json", "vocab.json")]
    if "tokenizer" in parts and not any(path.is_file() for path in vocabulary):  # the library says nothing
        raise Missing(f"{folder / 'tokenizer'} has no vocabulary", expected, fix=fix)
    return folder


def download(name, local):
    """The folder of a hub's model: everything but the weights, and of these the first kind of WEIGHTS.

    local: take what is on this machine already.
    """
    from huggingface_hub import snapshot_download

    def get(*patterns):
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=local))

    for part in NETWORKS:
        next((kind for kind in WEIGHTS if any((get(f"{part}/{kind}") / part).glob(kind))), None)
    return get("*/*.json", "*/*.txt")


def folder_hash(folder):
    """Content hash of a folder that has no record, such as a part of the model.

    Of its weights, those that `load_part` reads: a hub's folder may have other kinds too.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    kinds = [[path for path in files if path.match(kind)] for kind in WEIGHTS]
    used = next(filter(None, kinds), [])
    files = [path for path in files if path in used or not any(path in kind for kind in kinds)]
    return digest({path.relative_to(folder).as_posix(): sha256(path) for path in files})


def check_model(model, unet):
    """ContractError unless the model is of ModelScope's architecture and the U-Net fits its other parts."""
    folders = {part: unet if part == "unet" else model / part for part in CONFIGS}
    configs = {part: read(folders[part] / f"{name}config.json") or {} for part, name in CONFIGS.items()}
    for part, key, expected, default in (
        ("vae", "_class_name", NETWORKS["vae"], None),
        ("vae", "latent_channels", 4, None),
        ("text_encoder", "architectures", [NETWORKS["text_encoder"]], None),
        ("unet", "_class_name", NETWORKS["unet"], None),
        ("unet", "in_channels", 4, 4),
        ("unet", "out_channels", 4, 4),
        ("unet", "cross_attention_dim", configs["text_encoder"].get("hidden_size"), 1024),
        ("scheduler", "prediction_type", "epsilon", "epsilon"),
    ):
        if (found := configs[part].get(key, default)) != expected:
            what = f"{folders[part]} is not of ModelScope's text-to-video architecture: {key}"
            raise ContractError(what, expected, found, f"{MODELSCOPE} or a fine-tune of it")


def load_part(folder, part, device, dtype):
    """A network of the model (vae, text_encoder or unet) in evaluation mode; half-precision files if any."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    kind = getattr(transformers if part == "text_encoder" else diffusers, NETWORKS[part])
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    if part == "text_encoder":
        options = {"dtype": dtype}
    options["variant"] = "fp16" if any(".fp16." in path.name for path in folder.iterdir()) else None
    try:
        network, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise ContractError(f"{folder} cannot be loaded as {NETWORKS[part]}", found=error) from None
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing := [key for key in missing if "position_ids" not in key]:
        raise ContractError(f"{folder} lacks {len(missing)} weights of {NETWORKS[part]}: {missing[0]} ...")
    return network.to(device).eval().requires_grad_(False)


def vae_factor(model):
    """Pixels per latent pixel in each direction: the VAE halves once per level but the last (8; demo 4)."""
    return 2 ** (len(read(model / "vae" / "config.json").get("block_out_channels", [64])) - 1)


def decode(vae, latents, batch=8, name="a video"):
    """Latents float32 [16, 4, h, w] -> frames uint8 [16, H, W, 3], `batch` frames per forward."""
    with torch.inference_mode():
        parts = (latents / vae.config.scaling_factor).split(batch)
        frames = torch.cat([vae.decode(part).sample for part in parts])
    if not frames.isfinite().all():
        raise ContractError(f"{name}: a decoded frame is not finite")
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_prompts(args):
    """{class: prompt} of args.prompt_file, else of the data set; all empty with `none`.

    One's own data set may have its prompts.json; without it a prompt is "a video of" and the class in words.
    """
    if args.prompt_file == Path("none"):
        return dict.fromkeys(args.classes, "")
    path = args.prompt_file or ROOT / "prompts" / f"{args.dataset}.json"
    if not args.prompt_file and not path.exists():
        path = args.data_root / args.dataset / "prompts.json"
        if not path.exists():
            words = {c: re.sub(r"(?<=[a-z])(?=[A-Z])|[-_\s]+", " ", c).strip().lower() for c in args.classes}
            return {label: f"a video of {words[label]}" for label in args.classes}
    prompts = read(path, 'mend it: {"class": "a sentence", ...}')
    if not isinstance(prompts, dict):
        raise ContractError(f"{path} is missing or no JSON object", "{class: prompt}")
    for label in args.classes:
        if not isinstance(prompts.get(label), str):
            raise ContractError(f"{path}: no prompt for class {label}", f"one for each of {args.dataset}")
    return {label: prompts[label] for label in args.classes}


def load_tokenizer(folder, prompts):
    """A model's tokenizer; ContractError if one of {class: prompt} is so long that its end would be lost."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise ContractError(f"{folder / 'tokenizer'} cannot be loaded", found=error) from None
    limit = tokenizer.model_max_length
    for label, prompt in prompts.items():
        if len(ids := tokenizer(prompt).input_ids) > limit:
            what, found = f"the prompt of {label} is too long", f"{len(ids)}; without the end it lacks "
            lost = tokenizer.decode(ids[limit - 1 : -1])
            raise ContractError(what, f"at most {limit} tokens", found + repr(lost), "a shorter prompt")
    return tokenizer


def embed(folder, prompts, device):
    """{prompt: float32 [1, tokens, width]} of {class: prompt}, and of "", by the text encoder of a model."""
    tokenizer = load_tokenizer(folder, prompts)
    padded = {"padding": "max_length", "max_length": tokenizer.model_max_length, "return_tensors": "pt"}
    encoder, embeddings = load_part(folder / "text_encoder", "text_encoder", device, torch.float32), {}
    for prompt in sorted({"", *prompts.values()}):
        ids = tokenizer(prompt, **padded).input_ids.to(device)
        with torch.inference_mode():
            embeddings[prompt] = encoder(ids).last_hidden_state
    return embeddings
