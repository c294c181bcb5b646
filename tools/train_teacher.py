"""Fits a VideoMAE to a data set that has no published one: the teacher of soft labels (section 3.5).

The classifier of a VideoMAE fine-tuned on Kinetics-400 is replaced by a logistic regression on its features
of the training clips, plain and mirrored. With --whole all weights are then trained from there. Test clips
are only counted at the end. The demo's VideoMAE is trained from scratch, by demo/train_teacher.py.

Reads:   work/<data set>/01_clips/{train,test}/<class>.npy, window 0, and <class>.csv; --backbone
Writes:  work/<data set>/05_networks/<--name>/{config.json,preprocessor_config.json,model.safetensors} in
         transformers' layout, float32, as soft_labels.py and metrics.py load it
Run:     python tools/train_teacher.py hmdb51
         python tools/train_teacher.py hmdb51 --whole --name videomae-whole      # then --teacher FOLDER
Cost:    hmdb51, by estimate, on an A100: 5 min; --whole 20 min more, 20 GB of its memory
Expect:  it prints the accuracy on training and test clips
Differs: the paper does not say how its teacher was trained. HMDB51: on the training clips that 01 has chosen
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import videomae  # noqa: E402

import media  # noqa: E402

KINETICS = "MCG-NJU/videomae-base-finetuned-kinetics"  # weights CC-BY-NC 4.0
PENALTY = 1e-2  # of the regression: half of it times the squared weights on standardised features
# --whole: AdamW; lr is warmed up for one epoch, then falls as a cosine
EPOCHS, BATCH, LR, WEIGHT_DECAY = 10, 16, 2e-5, 0.05
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
SECONDS, SECONDS_STEP = 0.01, 0.02  # per clip of features, of a training epoch: on an A100, by estimate


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc=False)
    add = parser.add_argument
    add("--backbone", default=KINETICS, metavar="MODEL", help=f"VideoMAE, folder or hub name ({KINETICS})")
    add("--whole", action="store_true", help="train all weights, beginning with the fitted classifier")
    add("--epochs", type=int, default=EPOCHS, help=f"of --whole ({EPOCHS})")
    add("--name", default="videomae", help="name of the folder (videomae)")
    args = contract.parse(parser)
    args.teacher = args.backbone  # for videomae.model_folder
    return args


def features(network, scale, clips, mirrored):
    """Features float32 [n, d] of clips {class: ([name], uint8 [n, windows, 16, S, S, 3])}, class by class."""
    found = []
    for _, array in contract.bar(clips.values(), desc="mirrored" if mirrored else "features"):
        x = array[:, 0]  # window 0: [n, 16, S, S, 3]
        found.append(videomae.run(network, scale, x[:, :, :, ::-1] if mirrored else x)[0])
    return torch.cat(found)


def fit_classifier(x, labels, num_classes):
    """(weight [classes, d], bias [classes]), float64, of the logistic regression on features x [n, d].

    Minimises mean cross-entropy + PENALTY / 2 * |W|^2 on standardised features, by L-BFGS; the
    standardisation is then moved into weight and bias.
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
        loss = torch.nn.functional.cross_entropy(z @ weight.T + bias, labels)
        loss = loss + PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight, bias = weight.detach() / std, bias.detach()
    return weight, bias - weight @ mean


def train_whole(network, scale, clips, args, dtype, checkpoint):
    """Trains all weights with cross-entropy on randomly mirrored clips; goes on from `checkpoint` if there.

    What an epoch draws depends on the seed and the epoch alone.
    """
    device, start = network.device, 0
    items = [
        (index, array, row) for index, (_, array) in enumerate(clips.values()) for row in range(len(array))
    ]
    network.requires_grad_(True).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]  # biases and norms
    groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=plain, weight_decay=0.0)]
    optimiser = torch.optim.AdamW(groups, lr=LR)
    if checkpoint.exists():
        start, weights, state = contract.read(checkpoint)
        network.load_state_dict(weights)
        optimiser.load_state_dict(state)
    steps = -(-len(items) // BATCH)
    for epoch in range(start, args.epochs):
        generator = contract.generator(args.seed, "teacher", epoch)
        order = torch.randperm(len(items), generator=generator)
        mirrored = torch.rand(len(items), generator=generator) < 0.5
        bar = contract.bar(order.split(BATCH), desc=f"epoch {epoch + 1} of {args.epochs}")
        for i, batch in enumerate(bar):
            step = epoch * steps + i
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / (args.epochs * steps))
            for group in optimiser.param_groups:
                group["lr"] = LR * min((step + 1) / steps, cosine)
            chosen = [items[j] for j in batch.tolist()]
            x = torch.from_numpy(np.stack([array[row, 0] for _, array, row in chosen])).to(device)
            x = torch.where(mirrored[batch].to(device)[:, None, None, None, None], x.flip(3), x)
            labels = torch.tensor([index for index, _, _ in chosen], device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(videomae.to_input(x, scale)).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if epoch + 1 < args.epochs:
            contract.save(checkpoint, (epoch + 1, network.state_dict(), optimiser.state_dict()))
    network.requires_grad_(False).eval()


def accuracy(network, scale, clips):
    """(percent of the clips that the network gives their class, their number)."""
    correct, count = 0, 0
    for index, (_, array) in enumerate(contract.bar(clips.values(), desc="test")):
        correct += (videomae.run(network, scale, array[:, 0])[1].argmax(1) == index).sum().item()
        count += len(array)
    return 100 * correct / count, count


def estimate(args):
    per_class = args.spec["clips"][0] // len(args.spec["classes"])
    count = min(per_class, args.limit or per_class) * len(args.classes)
    seconds = count * (3 * SECONDS + (SECONDS_STEP * args.epochs if args.whole else 0))
    return {"05_networks": ("files of the teacher", len(FILES), seconds, 3.5e8, "an A100")}


def main(args):
    clips, files = media.real_clips(args)
    test_clips, _ = media.real_clips(args, "test")
    if empty := [c for c in args.classes if not (clips[c][0] and test_clips[c][0])]:
        raise contract.ContractError(
            f"no clip of {empty[0]}", fix="get the whole data set, or choose --classes"
        )
    backbone = videomae.model_folder(args)
    inputs = {"training set": contract.digest(files), "backbone": videomae.model_hash(backbone)}
    parameters = {key: getattr(args, key) for key in ("classes", "whole", "limit", "device")}
    parameters |= {"epochs": args.epochs if args.whole else None, "dtype": None}
    output = contract.Output(args, f"05_networks/{args.name}", parameters, inputs, FILES)
    if not output.todo:
        return

    network, scale = videomae.load(backbone, output.device)
    labels = torch.cat([torch.full((len(names),), i) for i, (names, _) in enumerate(clips.values())])
    both = torch.cat([features(network, scale, clips, mirrored) for mirrored in (False, True)])
    weight, bias = fit_classifier(both, labels.repeat(2), len(args.classes))
    network.classifier = torch.nn.Linear(*weight.T.shape, device=output.device).requires_grad_(False)
    network.classifier.load_state_dict({"weight": weight, "bias": bias})
    checkpoint = output.folder / ".checkpoint.pt"
    if args.whole:
        train_whole(network, scale, clips, args, output.dtype, checkpoint)

    network.config.update({"architectures": [type(network).__name__], "dtype": "float32"})
    network.config.id2label = dict(enumerate(args.classes))
    network.config.label2id = {label: i for i, label in enumerate(args.classes)}
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    contract.save(output.folder / "model.safetensors", save(weights, {"format": "pt"}))
    processor = "preprocessor_config.json"
    contract.save(output.folder / processor, contract.read(backbone / processor))
    contract.save(output.folder / "config.json", network.config.to_json_string().encode())
    checkpoint.unlink(missing_ok=True)
    network, scale = videomae.load(output.folder, output.device)  # as it will be used
    for split, part in (("training", clips), ("test", test_clips)):
        share, count = accuracy(network, scale, part)
        output.log(f"{args.name}: {share:.2f} % of {count} {split} clips correct")
    output.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
