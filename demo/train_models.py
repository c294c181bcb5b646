"""Trains the demo's text-to-video model, in the published layout, on a corpus that stands for the web.

The networks are the library's own classes at a thousandth of the published size, with ModelScope's noise
schedule, so that every stage runs on them by the code that runs the real model. The corpus
(demo/draw_videos.py) shares no clip and no look with the demo's data set, which enters by fine-tuning
(tools/finetune_unet.py) and by the prototypes.

  1. the autoencoder, on single frames: squared error and a little KL
  2. the U-Net and, with it, the text encoder: noise prediction (eq. 3) on the latents of clips

Two things differ from the textbook. The U-Net's latents have a standard deviation of LATENT_STD instead of 1
(Chen 2023, "On the importance of noise scheduling"), see `train_vae`; and an error counts by
min(SNR, SNR_CLIP) / SNR (Hang et al. 2023), see `train_unet`.

Reads:   prompts/demo.json, demo/models/t2v/tokenizer (demo/trim_tokenizer.py)
Writes:  demo/models/t2v/{vae,text_encoder,unet,scheduler,tokenizer}
         work/demo_training/*.pt        checkpoints: a killed run goes on and ends with the same weights
         work/demo_training/curve.csv   the loss, and the seconds since the start, every CURVE_EVERY steps
Run:     python demo/train_models.py               both parts
         python demo/train_models.py --only unet   one part: vae or unet; the U-Net must follow a new vae
Cost:    on two CPU cores: 2 h for the U-Net, other work beside it (results/demo_models/training.csv), 4 min
         for the corpus's latents; by estimate 10 min for the autoencoder
Expect:  the figures of demo/README.md; other hardware, or other threads, other last bits
"""

import argparse
import copy
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from draw_videos import draw_corpus  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

SHIPPED, WORK = ROOT / "demo" / "models" / "t2v", ROOT / "work" / "demo_training"
SEED = 0
CORPUS = 12000  # clips; a training of 6,000 steps sees each of them four times
TEXT_LENGTH = 24  # tokens; the longest caption has 20

# Autoencoder: 3 levels, 4 latent channels, 32 px -> 8x8. AdamW, cosine rate.
VAE_CHANNELS, VAE_STEPS, VAE_BATCH, VAE_RATE, KL_WEIGHT = (32, 64, 64), 1500, 64, 2e-3, 1e-4
LATENT_STD = 0.25  # of the latents that the U-Net sees

# U-Net and text encoder. AdamW; the rate warms up, stays, and falls to zero over the last part of the steps.
UNET_CHANNELS, HEAD, TEXT_WIDTH, TEXT_LAYERS = (48, 96), 16, 64, 2
UNET_STEPS, UNET_BATCH, UNET_RATE, WARM_UP, COOL_DOWN = 6000, 8, 1e-3, 200, 0.3
EMA = 0.998  # of the weights that are shipped
TEXT_DROPOUT = 0.1  # share of clips trained with the empty prompt, for classifier-free guidance
SNR_CLIP = 0.5  # alpha^2 / sigma^2 of the schedule, reached at t = 470
CHECKPOINT_EVERY, CURVE_EVERY = 250, 50  # steps
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def load_checkpoint(path, settings):
    """The state to go on from; a checkpoint of other settings is refused."""
    saved = contract.read(path)
    if saved["settings"] != settings:
        fix = f"start over with: rm {path}"
        raise contract.ContractError(f"{path}: other settings", settings, saved["settings"], fix)
    return saved


def to_tensor(frames):
    """uint8 [..., h, w, 3] -> float [..., 3, h, w] in -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def make_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=VAE_CHANNELS, layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        latent_channels=4, sample_size=32, force_upcast=False,
    )  # fmt: skip


def train_vae(clips, work, out, device, steps):
    """Trains and writes the autoencoder. clips: uint8 [n, 16, 32, 32, 3]."""
    torch.manual_seed(SEED)
    vae = make_vae().to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=VAE_RATE / 50)
    frames = clips.reshape(-1, *clips.shape[2:])
    settings = dict(steps=steps, batch=VAE_BATCH, rate=VAE_RATE, frames=len(frames))
    start, path, parts = 0, work / "vae.pt", dict(vae=vae, optimiser=optimiser, schedule=schedule)
    if path.exists():
        saved = load_checkpoint(path, settings)
        start = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, steps), desc="vae", initial=start, total=steps, mininterval=5)
    for step in bar:
        generator = contract.generator(SEED, "vae", step)
        chosen = torch.randint(len(frames), (VAE_BATCH,), generator=generator)
        x = to_tensor(frames[chosen.numpy()]).to(device)
        noise = torch.randn(VAE_BATCH, 4, 8, 8, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(y.float(), x)
        loss = error + KL_WEIGHT * posterior.kl().mean() / (4 * 8 * 8)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(dB=f"{10 * np.log10(4 / error.item()):.1f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            contract.save(path, {"step": step + 1, "settings": settings, **state})

    # The mean latent is moved to zero inside the 1x1 convolutions around it; the function stays the same.
    vae.eval()
    means = encode(vae, clips[:1000], device)
    centre = means.mean((0, 1, 3, 4))
    with torch.no_grad():
        vae.quant_conv.bias[:4] -= centre.to(device)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre.to(device)
    # ModelScope's schedule ends at alpha = 0.07, and noise averaged over the 16 x 8 x 8 places of a clip is
    # 1/32. So latents of standard deviation 1 still show their colours at the noisiest step: a U-Net learns
    # to read them there, not to choose them, and 25 DDIM steps from noise alone reach 0.42 of their spread,
    # were every step exact. With LATENT_STD they reach 0.85.
    std = (means - centre[:, None, None]).std().item()
    vae.register_to_config(scaling_factor=round(LATENT_STD / std, 5))
    vae.half().save_pretrained(out / "vae")


@torch.no_grad()
def encode(vae, clips, device, batch=64):
    """Posterior means of clips uint8 [n, 16, 32, 32, 3]: float32 [n, 16, 4, 8, 8] on the CPU, unscaled."""
    latents = torch.empty(len(clips), 16, 4, 8, 8)
    for start in tqdm(range(0, len(clips), batch), desc="latents", mininterval=5):
        x = to_tensor(clips[start : start + batch]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            means = vae.encode(x.flatten(0, 1)).latent_dist.mean
        latents[start : start + batch] = means.float().unflatten(0, x.shape[:2]).cpu()
    return latents


def corpus_latents(clips, work, out, device):
    """Scaled latents of the corpus, float16 [n, 16, 4, 8, 8]; kept below `work` for a run that goes on."""
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(device).eval()
    file, path = out / "vae" / "diffusion_pytorch_model.safetensors", work / "latents.pt"
    settings = dict(clips=len(clips), vae=contract.sha256(file))
    if not path.exists() or torch.load(path, mmap=True, weights_only=True)["settings"] != settings:
        contract.save(path, dict(settings=settings, latents=encode(vae, clips, device).half()))
    return torch.load(path, weights_only=True)["latents"] * vae.config.scaling_factor


def temporal_convolution(self, x):
    """nn.Conv3d with kernel (3, 1, 1) as the equal 2D convolution, in training faster on a CPU."""
    n, c, f, h, w = x.shape
    y = F.conv2d(x.reshape(n, c, f, h * w), self.weight[..., 0], self.bias, padding=(1, 0))
    return y.view(n, -1, f, h, w)


def make_unet():
    """Attention over space and text at the coarser of two levels alone, where it costs a quarter."""
    return UNet3DConditionModel(
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=UNET_CHANNELS, layers_per_block=1, norm_num_groups=16, sample_size=8,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=HEAD,
    )  # fmt: skip


def make_text_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH,
        hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def train_unet(latents, captions, work, out, device, steps):
    """Noise prediction (eq. 3) of the U-Net and the text encoder; writes the averaged weights.

    latents: float [n, 16, 4, 8, 8], scaled; captions: n texts.
    """
    vae = contract.digest({path.name: contract.sha256(path) for path in sorted((out / "vae").iterdir())})
    settings = dict(clips=len(latents), batch=UNET_BATCH, rate=UNET_RATE, snr=SNR_CLIP, vae=vae)
    torch.manual_seed(SEED)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    net = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}).to(device)
    net.eval()  # the temporal convolutions' dropout of 0.1 stays off: it costs a tenth of the time
    if device.type == "cpu":  # twice as fast as the fused attention's backward pass at this size
        net["unet"].set_attn_processor(AttnProcessor())
        for module in net.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 1, 1):
                module.forward = temporal_convolution.__get__(module)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimiser = torch.optim.AdamW(net.parameters(), UNET_RATE, (0.9, 0.99), weight_decay=1e-2, fused=True)
    padded = dict(padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    ids, empty = (tokenizer(texts, **padded).input_ids.to(device) for texts in (captions, [""]))
    # At the noisiest steps, where colours, place and the order of the poses are decided, all but a thousandth
    # of the noise can be told, so that they have next to no part in the plain loss. Here an error counts by
    # its size in the noise there, and where the SNR is above SNR_CLIP by its size in the clip.
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = (snr.clamp(max=SNR_CLIP) / snr).to(device)

    start, path, rows, before = 0, work / "unet.pt", [], 0.0
    if path.exists():
        saved = load_checkpoint(path, settings)
        start, rows, before = saved["step"], saved["rows"], saved["seconds"]
        ema = {name: p.to(device) for name, p in saved["ema"].items()}
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
    began, losses = time.monotonic(), []
    bar = tqdm(range(start, steps), desc="unet", initial=start, total=steps, mininterval=5)
    for step in bar:
        generator = contract.generator(SEED, "unet", step)
        chosen = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        dropped = torch.rand(UNET_BATCH, generator=generator) < TEXT_DROPOUT
        t = torch.arange(UNET_BATCH) + torch.rand(UNET_BATCH, generator=generator)  # spread evenly
        t = (t / UNET_BATCH * scheduler.config.num_train_timesteps).long()
        x0 = latents[chosen].float().movedim(1, 2)  # [n, 4, 16, 8, 8], as the U-Net takes them
        noise = torch.randn(x0.shape, generator=generator)
        x, t, noise = scheduler.add_noise(x0, noise, t).to(device), t.to(device), noise.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            text = torch.where(dropped.to(device)[:, None], empty, ids[chosen.to(device)])
            predicted = net["unet"](x, t, net["text_encoder"](text).last_hidden_state).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3, 4))
        loss = (error * weights[t]).mean()
        factor = min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))
        optimiser.param_groups[0]["lr"] = UNET_RATE * factor
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in net.parameters()], 1 - decay)
        losses.append(loss.item())
        seconds = before + time.monotonic() - began
        if (step + 1) % CURVE_EVERY == 0:
            rows, losses = [*rows, f"{step + 1},{np.mean(losses):.6f},{seconds:.0f}"], []
            bar.set_postfix(loss=rows[-1].split(",")[1], refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = dict(settings=settings, step=step + 1, rows=rows, seconds=seconds, ema=ema)
            contract.save(path, state | dict(net=net.state_dict(), optimiser=optimiser.state_dict()))
            (work / "curve.csv").write_text("\n".join(["step,loss,seconds", *rows, ""]))
            export(net, ema, scheduler, work / "t2v")  # to look at while it trains
    export(net, ema, scheduler, out)


def export(net, ema, scheduler, folder):
    """Writes U-Net, text encoder and schedule in the published layout, averaged weights in half precision."""
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.load_state_dict(ema, strict=False)
    for part in ("unet", "text_encoder"):
        copy.deepcopy(net[part]).half().save_pretrained(folder / part)
    net.load_state_dict(trained, strict=False)
    scheduler.save_pretrained(folder / "scheduler")


def parse_args():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.set_defaults(dry_run=False)
    add = parser.add_argument
    add("--work", type=Path, default=WORK, help="folder of the checkpoints (work/demo_training)")
    add("--out", type=Path, default=SHIPPED, help="folder of the model (demo/models/t2v)")
    add("--only", choices=("vae", "unet"), help="one part alone")
    for name, value in (("corpus", CORPUS), ("vae-steps", VAE_STEPS), ("unet-steps", UNET_STEPS)):
        add(f"--{name}", type=int, default=value, help=f"clips or steps ({value:,})")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main(args):
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips, captions = draw_corpus(args.corpus, SEED)
    if not (args.out / "tokenizer").exists():
        shutil.copytree(SHIPPED / "tokenizer", args.out / "tokenizer")
    if args.only != "unet":
        train_vae(clips, args.work, args.out, device, args.vae_steps)
    if args.only != "vae":
        latents = corpus_latents(clips, args.work, args.out, device)
        train_unet(latents, captions, args.work, args.out, device, args.unet_steps)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate=lambda args: {})
