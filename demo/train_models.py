"""Trains the demo's models: an autoencoder, a text encoder with a 3D U-Net, and a VideoMAE.

The networks are the library's own classes (AutoencoderKL, CLIPTextModel, UNet3DConditionModel) at a
thousandth of the published size, in the published layout and with ModelScope's noise schedule, so the code
that runs the real model runs them too. Only the demo's training clips are used.

Reads:   <data root>/demo (demo/draw_videos.py), prompts/demo.json, demo/models/t2v/tokenizer
Writes:  demo/models/t2v/{vae,text_encoder,unet,scheduler,tokenizer}; demo/models/videomae (train_teacher.py)
         work/demo_training/*.pt   checkpoints; a killed run resumes and ends with the same weights
Run:     python demo/train_models.py                          everything, then experiments.py demo measure
         python demo/train_models.py --only vae               one part: vae, unet or videomae
         python demo/train_models.py --clip-tokenizer FOLDER  makes the trimmed tokenizer again, from CLIP's
Cost:    on two CPU cores 10 minutes for the autoencoder and about 3.5 hours for the U-Net, 6 minutes for the
         VideoMAE, then 30 minutes of measuring
Expect:  the figures of demo/README.md; other hardware, or another number of threads, other last bits
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from bisect import bisect_right
from collections import Counter
from itertools import permutations, product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import contract  # noqa: E402  isort: skip
from train_teacher import read_clips  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

PAIR = ("SitDown", "StandUp")  # the same poses in opposite order

SHIPPED = ROOT / "demo" / "models" / "t2v"
SEED = 0
TEXT_LENGTH = 24  # tokens; the longest demo prompt has 20

# Autoencoder: 3 levels, 4 latent channels, 32 px -> 8x8. AdamW, cosine rate.
VAE_CHANNELS, VAE_STEPS, VAE_BATCH, VAE_RATE, KL_WEIGHT = (32, 64, 64), 1500, 64, 2e-3, 1e-4

# U-Net and text encoder. AdamW; in each round the rate warms up, stays, and falls to zero over the last 30 %
# of its steps. A round starts from the averaged weights of the one before. The first two make figures and
# their movements. The third draws light and dark figures equally often in every class, in all colours, the
# order pair more often and half of its clips backwards as the other class, so that colours tell nothing of a
# class; and noisier timesteps, at which the order is decided. The fourth also fades the clips out towards the
# noisiest step (see `faded`). Until here the two sentences of the pair make no difference to the U-Net. The
# fifth round teaches it that difference on the light figures of the pair alone, the sixth on all of its
# clips, both where the order is decided and fastest in the weights that see the text; the seventh returns to
# all classes. These three learn from `expected_clips` instead of the one clip that was noised, and count an
# error by its size in the clip: by its size in the noise, and beside the chance of which clip it was, what a
# sentence says of the order is too little to be learnt.
UNET_CHANNELS, HEAD, TEXT_WIDTH, TEXT_LAYERS = (48, 96), 16, 64, 2
UNET_ROUNDS = (5500, 4000, 4500, 2400, 320, 240, 700)  # steps of each round
BALANCED_FROM, FADED_FROM, EXPECTED_FROM = 2, 3, 4  # first round that draws so, fades, learns from ...
LIGHT_ROUND, PAIR_ROUNDS = 4, (4, 5)  # of light figures, of the pair alone
COLOUR_ORDERS = tuple(permutations(range(3)))  # as the clips are, then their channels in every other order
BRIGHT = 200  # grey levels: brighter than any background
PAIR_WEIGHT, LAST_PAIR_WEIGHT = 2.0, 4.0  # how much oftener than another class, in the seventh round
FADED_ABOVE = 600  # timestep
NOISY, LAST_NOISY = 0.7, 0.4  # a timestep is 1000 u^NOISY, u uniform: half above 600; last round 750
PAIR_TIMESTEPS = (0.80, 0.97)  # of 1000, in the rounds of the pair
UNET_BATCH, UNET_RATE, WARM_UP, COOL_DOWN = 8, 1e-3, 200, 0.3
LEAST_SHARE = 0.3  # the noisiest step counts as one of this share does (see `faded`)
LAST_RATE, LAST_TEXT_RATE = 3e-4, 3e-3  # from the fifth round on: of all weights, of those that see the text
EMA = 0.999  # of the weights that are shipped
TEXT_DROPOUT = 0.1  # share of clips trained with the empty prompt, for classifier-free guidance
SNR_CLIP = 5.0  # loss weight min(SNR, 5) / SNR: the least noisy steps teach the least per clip
LATENT_OFFSETS = (0.25, 0.75)  # 16 frames of a training clip are taken twice, half a step apart, and mirrored
CHECKPOINT_EVERY = 250  # steps

BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def save_checkpoint(path, state):
    """Atomically, so that a kill leaves the last complete checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path, settings):
    """The state to resume from; a checkpoint of other settings is refused."""
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != settings:
        what = f"{path}: expected a checkpoint of {settings}, found one of {saved['settings']}"
        sys.exit(f"{what}; start over with: rm {path}")
    return saved


def training_clips(data_root):
    """[(class, frames uint8 [n, 32, 32, 3])] of the demo's training clips."""
    size = common.DATASETS["demo"]["size"]
    return [(label, media.resize_frames(video, size)) for label, video in read_clips(data_root, "train")]


def spread_frames(count, offset=0.5):
    """media.uniform_frames, from `offset` of a step on."""
    return np.floor((np.arange(common.NUM_FRAMES) + offset) * count / common.NUM_FRAMES).astype(int)


def to_tensor(frames):
    """uint8 [..., h, w, 3] -> float [..., 3, h, w] in -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def trim_tokenizer(source, prompts, out):
    """Writes CLIP's tokenizer with only the merges that the prompts' words need (and all single bytes)."""
    full = CLIPTokenizer.from_pretrained(source)
    merges = [
        tuple(line.split()) for line in Path(source, "merges.txt").read_text("utf-8").splitlines()[1:] if line
    ]
    rank = {pair: i for i, pair in enumerate(merges)}
    words = sorted({token for text in prompts.values() for token in text.lower().replace(",", " , ").split()})
    used = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            used.add(best)
            i = next(i for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair == best)
            parts[i : i + 2] = ["".join(best)]
    kept = sorted(used, key=rank.get)
    vocabulary = full.get_vocab()
    single = sorted((t for t in vocabulary if len(t.removesuffix("</w>")) == 1), key=vocabulary.get)
    tokens = [*single, *("".join(pair) for pair in kept), "<|startoftext|>", "<|endoftext|>"]
    small = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=kept,
        model_max_length=TEXT_LENGTH,
    )
    for text in prompts.values():
        assert small.convert_ids_to_tokens(small(text).input_ids) == full.convert_ids_to_tokens(
            full(text).input_ids
        )
    small.save_pretrained(out / "tokenizer")


def make_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def train_vae(clips, work, out, device, steps):
    """Trains the autoencoder: squared error plus a little KL; at the end it centres the latents."""
    torch.manual_seed(SEED)
    vae = make_vae().to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=VAE_RATE / 50)
    frames = np.concatenate([f for _, f in clips])
    settings = dict(
        steps=steps, batch=VAE_BATCH, rate=VAE_RATE, channels=list(VAE_CHANNELS), frames=len(frames)
    )
    start, path = 0, work / "vae.pt"
    if path.exists():
        saved = load_checkpoint(path, settings)
        start = saved["step"]
        for part, name in ((vae, "vae"), (optimiser, "optimiser"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, steps), desc="vae", initial=start, total=steps, mininterval=5)
    for step in bar:
        generator = contract.generator(SEED, "vae", step)
        x = to_tensor(frames[torch.randint(len(frames), (VAE_BATCH,), generator=generator).numpy()])
        flip = torch.rand(VAE_BATCH, generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x).to(device)
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
            state = dict(
                vae=vae.state_dict(), optimiser=optimiser.state_dict(), schedule=schedule.state_dict()
            )
            state["settings"] = settings
            save_checkpoint(path, {"step": step + 1, **state})

    # The mean latent is moved to zero inside the two 1x1 convolutions around it (the function stays the
    # same), since a mean that shows through the noisiest step in training is absent there in sampling. Then
    # scaling_factor = 1 / std.
    vae.eval()
    means = encode(vae, torch.cat([to_tensor(f[spread_frames(len(f))]) for _, f in clips]), device)
    centre = means.mean((0, 2, 3))
    with torch.no_grad():
        vae.quant_conv.bias[:4] -= centre.to(device)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre.to(device)
    vae.register_to_config(scaling_factor=round(1 / (means - centre[None, :, None, None]).std().item(), 5))
    vae.half().save_pretrained(out / "vae")


@torch.no_grad()
def encode(vae, x, device, batch=256):
    """Posterior means of frames [n, 3, h, w], float32 on the CPU, not yet scaled."""
    return torch.cat([vae.encode(part.to(device)).latent_dist.mean.float().cpu() for part in x.split(batch)])


def training_latents(clips, out, device):
    """What the U-Net learns from, of v variants of n clips: (latents, classes, light, weights).

    latents: float32 [v n, 16, 4, 8, 8], scaled, of two offsets, plain and mirrored, and of these in every
    order of the colours, the clips' own first. light: bool [v n], whether a figure is light. weights: float64
    [v n], how often a balanced round draws each.
    """
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(device).eval()
    latents = []
    for order, offset, mirrored in tqdm(
        list(product(COLOUR_ORDERS, LATENT_OFFSETS, (False, True))), desc="latents"
    ):
        x = torch.stack([to_tensor(f[spread_frames(len(f), offset)]) for _, f in clips])
        x = (x.flip(-1) if mirrored else x)[:, :, order]
        z = encode(vae, x.flatten(0, 1), device) * vae.config.scaling_factor
        latents.append(z.unflatten(0, x.shape[:2]))
    kinds = [(label, bool(np.quantile(f.mean(-1), 0.99) > BRIGHT)) for label, f in clips]
    counts = Counter(kinds)
    weights = [(PAIR_WEIGHT if kind[0] in PAIR else 1.0) / counts[kind] for kind in kinds]
    labels = [label for label, _ in clips]
    light, weights = torch.tensor([bright for _, bright in kinds]), torch.tensor(weights, dtype=torch.float64)
    return torch.cat(latents), labels * len(latents), light.repeat(len(latents)), weights.repeat(len(latents))


def temporal_convolution(self, x):
    """nn.Conv3d with kernel (3, 1, 1) as the equal 2D convolution, which trains faster on a CPU."""
    n, c, f, h, w = x.shape
    y = F.conv2d(x.reshape(n, c, f, h * w), self.weight[..., 0], self.bias, padding=(1, 0))
    return y.view(n, -1, f, h, w)


def make_unet():
    return UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEAD,
    )


def make_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_optimiser(net):
    """AdamW of four groups: matrices, which decay, and vectors; those that see the text and the others."""
    groups = [
        dict(params=[], weight_decay=decay, sees_text=text) for decay in (1e-2, 0.0) for text in (False, True)
    ]
    for name, p in net.named_parameters():
        text = name.startswith("text_encoder.") or ".attn2." in name
        groups[2 * (p.ndim <= 1) + text]["params"].append(p)
    return torch.optim.AdamW(groups, lr=UNET_RATE, betas=(0.9, 0.99))


def faded(alphas_cumprod):
    """(fade, share), each float32 [1000]: the clip's part of a noised clip, and of what the U-Net finds.

    With ModelScope's betas seven per cent of the clip are left at the noisiest step. In 8x8 latents that
    shows its colours and the order of its poses, so a U-Net learns to read them there and not to choose them
    by the prompt; but sampling starts from noise alone. Here the noised clip is x = a fade x0 + s noise, a =
    sqrt(abar), s = sqrt(1 - abar), where fade rises smoothly from 0 at the noisiest step to 1 at FADED_ABOVE.
    DDIM's steps, which take x for a x0 + s noise, follow that path if they are told x0' = share x0 and noise'
    = (x - a x0') / s, where share = fade + d fade / d log(a / s): both move x equally far.
    """
    ratio = (alphas_cumprod.double() / (1 - alphas_cumprod.double())).log() / 2  # log(a / s)
    width = ratio[FADED_ABOVE] - ratio[-1]
    place = ((ratio - ratio[-1]) / width).clamp(max=1)
    fade = place**2 * (3 - 2 * place)
    return fade.float(), (fade + 6 * place * (1 - place) / width).float()


def clips_of_round(latents, labels, light, weights, pair, which):
    """(latents, labels, weights) that a round draws from. pair: the numbers of PAIR.

    From the fifth round on each clip of the pair is there in both orders, and they are sorted by class.
    """
    if which < EXPECTED_FROM:
        return latents, labels, weights
    of_pair = torch.isin(labels, torch.tensor(pair))
    forwards = of_pair if which in PAIR_ROUNDS else torch.ones_like(of_pair)
    if which == LIGHT_ROUND:  # in their own colours
        forwards = forwards & light & (torch.arange(len(latents)) < len(latents) // len(COLOUR_ORDERS))
    weights = torch.where(of_pair, weights * LAST_PAIR_WEIGHT / PAIR_WEIGHT / 2, weights)
    backwards = forwards & of_pair
    both = torch.cat([labels[forwards], sum(pair) - labels[backwards]])
    order = both.argsort(stable=True)
    latents = torch.cat([latents[forwards], latents[backwards].flip(1)])[order]
    return latents, both[order], torch.cat([weights[forwards], weights[backwards]])[order]


def draw_batch(latents, labels, weights, pair, which, generator):
    """What a step of round `which` learns from: clips [n, 4, 16, 8, 8] as the U-Net takes them, the numbers
    of their classes (-1: without text), timesteps in 0 to 1, noise.

    A round that is not balanced draws from the clips in their own colours alone. In the rounds of the pair
    each clip comes in both orders, with its text each, at one timestep with one noise. pair: the numbers of
    PAIR.
    """
    n = UNET_BATCH // 2 if which in PAIR_ROUNDS else UNET_BATCH
    if which >= BALANCED_FROM:
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
    else:
        chosen = torch.randint(len(latents) // len(COLOUR_ORDERS), (n,), generator=generator)
    dropped = torch.rand(n, generator=generator) < TEXT_DROPOUT
    x0, text = latents[chosen], labels[chosen]
    if BALANCED_FROM <= which < EXPECTED_FROM:  # later they are among the clips
        backwards = (torch.rand(n, generator=generator) < 0.5) & torch.isin(text, torch.tensor(pair))
        x0[backwards], text[backwards] = x0[backwards].flip(1), sum(pair) - text[backwards]
    spread = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    noise = torch.randn(x0.movedim(1, 2).shape, generator=generator)
    if which in PAIR_ROUNDS:
        spread = PAIR_TIMESTEPS[0] + (PAIR_TIMESTEPS[1] - PAIR_TIMESTEPS[0]) * spread
        both = torch.cat([x0, x0.flip(1)]).movedim(1, 2)
        return both, torch.cat([text, sum(pair) - text]), spread.repeat(2), noise.repeat(2, 1, 1, 1, 1)
    if which >= BALANCED_FROM:
        spread = spread ** (LAST_NOISY if which >= EXPECTED_FROM else NOISY)
    return x0.movedim(1, 2), torch.where(dropped, -1, text), spread, noise


def expected_clips(x, signal, noise, text, latents, squares, labels, weights):
    """E[x0 | x, text] over the training clips, each with its weight: what a U-Net of no error would see in x.

    Standard training leads to the same U-Net, since x0 varies about its expectation; without that variation
    the gradients are far less noisy. x [n, 4, 16, 8, 8] = signal x0 + noise standard normal; text: the
    classes, -1 for any. latents [m, 16, 4, 8, 8] and the sums of their squares, labels (sorted) and weights
    [m].
    """
    expected = torch.empty_like(x)
    for label in text.unique():
        mine, those = text == label, slice(None)
        if label >= 0:
            those = slice(torch.searchsorted(labels, label), torch.searchsorted(labels, label, right=True))
        clips, a, s = latents[those].flatten(1), signal[mine, None], noise[mine, None]
        likelihood = (a * x[mine].movedim(1, 2).flatten(1) @ clips.T - a * a * squares[those] / 2) / s**2
        chance = (likelihood + weights[those].log().float()).softmax(1)
        expected[mine] = (chance @ clips).unflatten(1, latents.shape[1:]).movedim(1, 2)
    return expected


def train_unet(latents, labels, light, weights, prompts, work, out, device, rounds):
    """Noise prediction (eq. 3) of the U-Net and, with it, the text encoder; writes the averaged weights."""
    settings = dict(
        rounds=list(rounds),
        batch=UNET_BATCH,
        rate=UNET_RATE,
        channels=list(UNET_CHANNELS),
        clips=len(latents),
    )
    torch.manual_seed(SEED)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    net = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}).to(device)
    net.eval()  # the temporal convolutions' dropout of 0.1 stays off: it costs a tenth of the time
    if device.type == "cpu":  # twice as fast in training as the fused attention's backward pass at this size
        net["unet"].set_attn_processor(AttnProcessor())
        for module in net.modules():
            if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 1, 1):
                module.forward = temporal_convolution.__get__(module)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    fade, share = faded(scheduler.alphas_cumprod)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    classes = sorted(prompts)
    texts = [prompts[c] for c in classes] + [""]
    padded = dict(padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    ids = tokenizer(texts, **padded).input_ids.to(device)
    labels = torch.tensor([classes.index(label) for label in labels])
    pair = [classes.index(label) for label in PAIR]

    start, path, steps = 0, work / "unet.pt", sum(rounds)
    starts = [sum(rounds[:i]) for i in range(len(rounds))]
    optimiser = make_optimiser(net)
    if path.exists():
        saved = load_checkpoint(path, settings)
        start, ema = saved["step"], {n: p.to(device) for n, p in saved["ema"].items()}
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
    bar, average, which = (
        tqdm(range(start, steps), desc="unet", initial=start, total=steps, mininterval=5),
        None,
        None,
    )
    for step in bar:
        if step in starts[1:]:
            ema = {name: p.half().float() for name, p in ema.items()}  # as they would be shipped
            net.load_state_dict(ema, strict=False)
            optimiser = make_optimiser(net)
        if which != bisect_right(starts, step) - 1:
            which = bisect_right(starts, step) - 1
            clips = clips_of_round(latents, labels, light, weights, pair, which)
            squares = clips[0].flatten(1).square().sum(1)
        done, length = step - starts[which], rounds[which]
        factor = min(1.0, (done + 1) / min(WARM_UP, length / 8), (length - done) / (COOL_DOWN * length))
        for group in optimiser.param_groups:
            rates = (LAST_RATE, LAST_TEXT_RATE) if which >= EXPECTED_FROM else (UNET_RATE, UNET_RATE)
            group["lr"] = factor * rates[group["sees_text"]]
        generator = contract.generator(SEED, "unet", step)
        x0, text, spread, target = draw_batch(*clips, pair, which, generator)
        t = (spread * scheduler.config.num_train_timesteps).long()
        x = scheduler.add_noise(x0 if which < FADED_FROM else fade[t, None, None, None, None] * x0, target, t)
        weight = snr[t].clamp(max=SNR_CLIP) / snr[t]
        if which >= FADED_FROM:
            a, s = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
            if which >= EXPECTED_FROM:
                x0 = expected_clips(x, a * fade[t], s, text, clips[0], squares, *clips[1:])
                weight = (
                    weight * (snr[FADED_ABOVE] / snr[t]).clamp(min=1) / share[t].clamp(LEAST_SHARE, 1) ** 2
                )
            target = (x - (a * share[t])[:, None, None, None, None] * x0) / s[:, None, None, None, None]
        x, text = x.to(device), torch.where(text < 0, len(classes), text).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states = net["text_encoder"](ids).last_hidden_state[text]
            predicted = net["unet"](x, t.to(device), states).sample
        error = (predicted.float() - target.to(device)).square().mean((1, 2, 3, 4))
        loss = (error * weight.to(device)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA, (done + 1) / (done + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in net.parameters()], 1 - decay)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = dict(net=net.state_dict(), ema=ema, optimiser=optimiser.state_dict(), settings=settings)
            save_checkpoint(path, {"step": step + 1, **state})
            export(net, ema, scheduler, work / "t2v")  # to look at while it trains
    export(net, ema, scheduler, out)


def export(net, ema, scheduler, folder):
    """Writes U-Net, text encoder and schedule in the published layout, averaged weights in half precision."""
    with torch.no_grad():
        for part, make in (("unet", make_unet), ("text_encoder", None)):
            module = make() if make else CLIPTextModel(net[part].config)
            state = {n.removeprefix(part + "."): p.cpu() for n, p in ema.items() if n.startswith(part + ".")}
            missing, unexpected = module.load_state_dict(state, strict=False)
            assert not unexpected and not [n for n in missing if "position_ids" not in n], (
                missing,
                unexpected,
            )
            module.half().save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", type=Path, default=ROOT / "data", help="folder that holds demo/ (data)"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work" / "demo_training", help="where checkpoints go"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the model (demo/models/t2v)")
    parser.add_argument(
        "--only", choices=("vae", "unet", "videomae"), help="one part alone, without the figures"
    )
    parser.add_argument("--clip-tokenizer", help="folder of CLIP's tokenizer: trims it anew")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet-steps", type=int, nargs="+", default=UNET_ROUNDS, help="steps of each round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*Deprecated.*")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = json.loads((ROOT / "prompts" / "demo.json").read_text())
    if args.clip_tokenizer:
        trim_tokenizer(args.clip_tokenizer, prompts, args.out)
    elif not (args.out / "tokenizer").exists():
        shutil.copytree(SHIPPED / "tokenizer", args.out / "tokenizer")
    clips = training_clips(args.data_root) if args.only != "videomae" else []
    if args.only in (None, "vae"):
        train_vae(clips, args.work, args.out, device, args.vae_steps)
    if args.only in (None, "unet"):
        train_unet(
            *training_latents(clips, args.out, device), prompts, args.work, args.out, device, args.unet_steps
        )
    if args.only in (None, "videomae"):
        words = ["--data-root", args.data_root, "--work", args.work, "--out", args.out.with_name("videomae")]
        words += ["--threads", str(args.threads)]
        subprocess.run([sys.executable, ROOT / "demo" / "train_teacher.py", *words], check=True)
    if args.only is None:
        words = ["demo", "measure", "--data-root", args.data_root, "--model", args.out]
        subprocess.run([sys.executable, ROOT / "demo" / "experiments.py", *words], check=True)


if __name__ == "__main__":
    main()
