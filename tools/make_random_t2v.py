"""Writes a text-to-video model with exactly the published configuration and random weights.

The weights of ali-vilab/text-to-video-ms-1.7b are not at hand everywhere. On this folder every stage and
the fine-tuning do at full size what they would do on those, in the same time and memory; the videos are
noise. tools/bench.py makes the same networks in memory.

Writes:  FOLDER/{vae,text_encoder,tokenizer,unet,scheduler}, model_index.json: 3.7 GB
Run:     python tools/make_random_t2v.py random_t2v
         python 01_encode_latents.py hmdb51 --model random_t2v
         python 03_guided_sample.py hmdb51 1 --model random_t2v --unet published --prompt-file none
Cost:    40 s on two CPU cores, 3.2 GB of memory: one part at a time. The commands above for one video
         (--classes, --limit 1, --draws 1, --steps 2, --dtype bfloat16), on two busy cores: 140 s and 510 s,
         5.4 and 10.4 GB of memory
Expect:  1,411,233,860 weights in the U-Net, 83,653,863 in the VAE, 340,387,840 in the text encoder
Differs: without --tokenizer, CLIP's vocabulary is replaced by one of single characters at the same size, in
         which the prompts are too long: hence `none`
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import torch  # noqa: E402

UNET = dict(
    sample_size=32, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
    up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
    layers_per_block=2, norm_num_groups=32, cross_attention_dim=1024, attention_head_dim=64,
)  # fmt: skip
VAE = dict(
    sample_size=512, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2, norm_num_groups=32, latent_channels=4, scaling_factor=0.18215,
)  # fmt: skip
TEXT_ENCODER = dict(
    vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    max_position_embeddings=77, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip
SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
)  # fmt: skip


def make(part, device="meta"):
    """unet, vae or text_encoder of the published configuration; on "meta" without memory for its weights."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
        return UNet3DConditionModel(**UNET) if part == "unet" else AutoencoderKL(**VAE)


@torch.no_grad()
def write_network(network, folder, dtype, seed):
    """Writes a network of `make` with random weights that keep activations near 1; returns their number."""
    network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")  # diffusers' own warns about nothing
    for name, p in network.named_parameters():
        if p.ndim == 1:
            p.fill_(1.0 if name.endswith("weight") else 0.0)  # normalisations and biases
        else:
            scale = 0.02 if "embedding.weight" in name else 1 / math.sqrt(p[0].numel())
            p.normal_(0, scale, generator=contract.generator(seed, "random t2v", name))
    network.save_pretrained(folder, max_shard_size="20GB")
    return sum(p.numel() for p in network.parameters())


def write_tokenizer(folder):
    """CLIP's tokenizer with single bytes alone; every other entry of its vocabulary is unused."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"<|unused{i}|>" for i in range(TEXT_ENCODER["bos_token_id"] - len(tokens))]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    length = TEXT_ENCODER["max_position_embeddings"]
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length).save_pretrained(folder)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add, dtypes = parser.add_argument, ("bfloat16", "float16")
    add("folder", type=Path, help="folder to write; must not exist")
    add("--dtype", choices=dtypes, default="bfloat16", help="of the weights (bfloat16)")
    add("--tokenizer", type=Path, help="folder of CLIP's tokenizer, to be copied (single characters)")
    add("--seed", type=int, default=0, help="seed of the weights (0)")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists")
    if args.tokenizer and not (args.tokenizer / "tokenizer_config.json").is_file():
        parser.error(f"--tokenizer: {args.tokenizer / 'tokenizer_config.json'} is missing")

    from diffusers import DDIMScheduler

    if args.tokenizer:
        shutil.copytree(args.tokenizer, args.folder / "tokenizer")
    else:
        write_tokenizer(args.folder / "tokenizer")
    DDIMScheduler(**SCHEDULER).save_pretrained(args.folder / "scheduler")
    for part in ("vae", "text_encoder", "unet"):
        count = write_network(make(part), args.folder / part, getattr(torch, args.dtype), args.seed)
        print(f"{part}: {count:,} weights", flush=True)
    parts = {
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet3DConditionModel"),
        "scheduler": ("diffusers", "DDIMScheduler"),
    }
    index = {"_class_name": "TextToVideoSDPipeline", **parts}
    (args.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
