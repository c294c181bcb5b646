"""Fits a VideoMAE to a data set that has no published one: teacher of soft labels (section 3.5), features of the metrics.

The classifier of a VideoMAE fine-tuned on Kinetics-400 is replaced by a logistic regression on its features of the
data set's training clips, plain and mirrored. With --whole all weights are then trained from there. Test clips are only
counted at the end. The demo's VideoMAE is trained from nothing by demo/train_teacher.py instead.

Reads:   work/<data set>/01_clips/{train,test}/<class>.npy, window 0; the backbone: --backbone
Writes:  work/<data set>/05_networks/<--name>/{config.json,preprocessor_config.json,model.safetensors}: the published
         layout, float32, which 05_train_eval.py and tools/metrics.py take for the data set
Run:     python tools/train_teacher.py hmdb51
         python tools/train_teacher.py hmdb51 --whole --name videomae-whole      then --teacher FOLDER
Cost:    hmdb51, by estimate, on an A100: 5 min; --whole 20 min more, 20 GB of its memory
Expect:  it prints the accuracy on training and test clips
Differs: the paper does not say how its teacher was trained. HMDB51: all non-test clips, as in stage 05
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import contract  # noqa: E402

KINETICS = "MCG-NJU/videomae-base-finetuned-kinetics"  # weights CC-BY-NC 4.0
PENALTY = 1e-2  # of the regression: half of it times the squared weights on standardised features
# --whole: AdamW, cosine rate after one epoch of warm-up
EPOCHS, BATCH, RATE, WEIGHT_DECAY = 10, 16, 2e-5, 0.05

APART = ("plan", "accuracy")  # definitions that only show something
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
SECONDS_PER_CLIP, SECONDS_PER_CLIP_STEP = 0.01, 0.02  # features, a training step: on an A100, by estimate


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("--backbone", default=KINETICS, metavar="MODEL", help=f"VideoMAE, folder or hub name ({KINETICS})")
    parser.add_argument("--whole", action="store_true", help="train all weights from the fitted classifier on")
    parser.add_argument("--epochs", type=contract.positive, default=EPOCHS, help=f"of --whole ({EPOCHS})")
    parser.add_argument("--name", default="videomae", help="name of the folder (videomae)")
    args = contract.parse(parser)
    args.teacher = args.backbone  # for common.videomae_folder
    return args


def read_clips(args, manifest, split):
    """(arrays {class: uint8 [n, windows, 16, S, S, 3], still on the disk}, [(class, row)] by class and name) of a split."""
    folder, mend = contract.work_folder(args, "01_clips"), contract.command("01_encode_latents.py", args)
    contract.need(manifest, [f"{split}/{c}.npy" for c in args.classes], folder, mend)
    index = [row for row in common.read_csv(folder / "index.csv") if row["split"] == split]
    side, arrays, clips = args.spec["side"], {}, []
    for label in args.classes:
        path = folder / split / f"{label}.npy"
        arrays[label] = contract.load_array(path, (None, None, common.NUM_FRAMES, side, side, 3), "uint8", mend)
        rows = sorted((row["name"], int(row["row"])) for row in index if row["class"] == label)[: args.limit]
        if not rows:
            raise contract.ContractError(f"{path}: no clip of {label}\n  get the whole data set, or choose --classes")
        clips += [(label, row) for _, row in rows]
    return arrays, clips


def features(network, scale, arrays, clips, mirrored):
    """Features float32 [n, d] of the clips, class by class, so that one class is in memory at a time."""
    found = []
    for label in tqdm(arrays, desc="mirrored" if mirrored else "features", mininterval=1):
        x = arrays[label][[row for c, row in clips if c == label], 0]
        found.append(common.run_videomae(network, scale, x[:, :, :, ::-1] if mirrored else x)[0])
    return torch.cat(found)


def fit_classifier(x, labels, num_classes):
    """(weight [classes, d], bias [classes]), float64, of the multinomial logistic regression on features x [n, d].

    Minimises mean cross-entropy + PENALTY / 2 * |W|^2 over standardised features, by L-BFGS; the standardisation is then
    moved into weight and bias.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    z = (x - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    limits = {"max_iter": 1000, "tolerance_grad": 1e-8, "tolerance_change": 1e-12}
    optimiser = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **limits)

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, labels) + PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight, bias = weight.detach() / std, bias.detach()
    return weight, bias - weight @ mean


def train_whole(network, scale, arrays, clips, args, dtype, checkpoint):
    """Trains all weights with cross-entropy on randomly mirrored clips; goes on from `checkpoint` after a kill.

    What an epoch draws depends on the seed and the epoch only.
    """
    device = network.device
    network.requires_grad_(True).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=plain, weight_decay=0.0)]
    optimiser, start = torch.optim.AdamW(groups, lr=RATE), 0
    if checkpoint.exists():
        with contract.checkpoint(checkpoint):
            saved = torch.load(checkpoint, weights_only=True, map_location=device)
            network.load_state_dict(saved["network"])
            optimiser.load_state_dict(saved["optimiser"])
            start = saved["epoch"]
    classes, steps = list(arrays), -(-len(clips) // BATCH)
    for epoch in range(start, args.epochs):
        generator = contract.generator(args.seed, "teacher", epoch)
        order = torch.randperm(len(clips), generator=generator)
        mirrored = torch.rand(len(clips), generator=generator) < 0.5
        bar = tqdm(order.split(BATCH), desc=f"epoch {epoch + 1} of {args.epochs}", mininterval=1)
        for i, batch in enumerate(bar):
            step = epoch * steps + i
            rate = RATE * min((step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / (args.epochs * steps)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            chosen = [clips[j] for j in batch.tolist()]
            x = torch.from_numpy(np.stack([arrays[label][row, 0] for label, row in chosen])).to(device)
            x = torch.where(mirrored[batch].to(device)[:, None, None, None, None], x.flip(3), x)
            labels = torch.tensor([classes.index(label) for label, _ in chosen], device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(common.videomae_input(x, scale)).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if epoch + 1 < args.epochs:
            state = {"epoch": epoch + 1, "network": network.state_dict(), "optimiser": optimiser.state_dict()}
            with contract.atomic(checkpoint) as handle:
                torch.save(state, handle)
    network.requires_grad_(False).eval()


def accuracy(network, scale, arrays, clips):
    """Percent of the clips that the network gives their class."""
    right, classes = 0, list(arrays)
    for label in tqdm(classes, desc="test", mininterval=1):
        x = arrays[label][[row for c, row in clips if c == label], 0]
        right += (common.run_videomae(network, scale, x)[1].argmax(1) == classes.index(label)).sum().item()
    return 100 * right / len(clips)


def plan(args):
    """Name, items, seconds, bytes and machine of the plan, for --dry-run."""
    per_class = args.spec["clips"][0] // len(args.spec["classes"])
    count = min(per_class, args.limit or per_class) * len(args.classes)
    seconds = count * (3 * SECONDS_PER_CLIP + (SECONDS_PER_CLIP_STEP * args.epochs if args.whole else 0))
    return ("files of the teacher", len(FILES), seconds, 3.5e8, "an A100")


def main():
    args = parse_args()
    source = contract.work_folder(args, "01_clips")
    if args.dry_run and (args.after or not (source / "manifest.json").exists()):
        return contract.plan_after(args, "train", plan(args))
    manifest = contract.read_folder(source, args, contract.command("01_encode_latents.py", args))
    arrays, clips = read_clips(args, manifest, "train")
    test = read_clips(args, manifest, "test")
    try:
        backbone = common.videomae_folder(args)
    except contract.Missing:
        if args.dry_run:
            return contract.plan_after(args, "train", plan(args))
        raise
    used = [name for c in args.classes for name in (f"train/{c}.npy", f"index/{c}.csv")]
    inputs = {"training clips": contract.content(manifest, used), "backbone": common.videomae_hash(backbone, args)}
    settings = {"classes": args.classes, "whole": args.whole, "epochs": args.epochs if args.whole else None}
    settings |= {"limit": args.limit, "device": args.device, "threads": args.threads, "dtype": None}
    identity = contract.identity(__file__, args, settings, inputs, {}, APART)
    folder = contract.work_folder(args, "05_networks", args.name)
    todo, identity = contract.begin(folder, identity, FILES, args, plan(args))
    if todo is None:
        return

    device, dtype = torch.device(identity["parameters"]["device"]), getattr(torch, identity["parameters"]["dtype"])
    network, scale = common.load_videomae(backbone, device)
    labels = torch.tensor([args.classes.index(label) for label, _ in clips])
    both = torch.cat([features(network, scale, arrays, clips, mirrored) for mirrored in (False, True)])
    weight, bias = fit_classifier(both, labels.repeat(2), len(args.classes))
    network.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0], device=device).requires_grad_(False)
    network.classifier.load_state_dict({"weight": weight, "bias": bias})
    checkpoint = folder / ".checkpoint.pt"
    if args.whole:
        train_whole(network, scale, arrays, clips, args, dtype, checkpoint)

    network.config.update({"architectures": [type(network).__name__], "dtype": "float32"})
    network.config.id2label = dict(enumerate(args.classes))
    network.config.label2id = {label: i for i, label in enumerate(args.classes)}
    with contract.atomic(folder / "model.safetensors") as handle:
        handle.write(save({k: v.cpu().contiguous() for k, v in network.state_dict().items()}, {"format": "pt"}))
    contract.write_json(folder / "preprocessor_config.json", contract.read_json(backbone / "preprocessor_config.json"))
    with contract.atomic(folder / "config.json") as handle:
        handle.write(network.config.to_json_string().encode())
    checkpoint.unlink(missing_ok=True)
    network, scale = common.load_videomae(folder, device)  # as it will be used
    for split, part in (("training", (arrays, clips)), ("test", test)):
        contract.say(f"train {args.name}: {accuracy(network, scale, *part):.2f} % of {len(part[1])} {split} clips right")
    kinds = {name: ([], "safetensors" if name.endswith(".safetensors") else "json") for name in FILES}
    contract.finish(folder, identity, FILES, args, ["transformers", "safetensors"], kinds)


if __name__ == "__main__":
    contract.run(main)
