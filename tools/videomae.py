"""VideoMAE: the teacher of soft labels (section 3.5), the features of the metrics (appendix A).

Shared by the scripts of this folder; not a command. Any VideoMAE in transformers' layout that was fine-tuned
to classify videos will do; without --teacher it is the data set's own.
"""

import contract

from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

import common

UCF101 = "nateraw/videomae-base-finetuned-ucf101"  # 101 outputs, weights CC-BY-NC 4.0
DEMO = common.DEMO_MODEL.with_name("videomae")
FILES = "a folder with config.json, preprocessor_config.json and model.safetensors"
BATCH = 16  # clips


def model_name(args):
    """args.teacher, a folder or hub name; without it, the data set's own VideoMAE."""
    own = {"demo": DEMO, "miniucf": UCF101, "ucf101": UCF101}
    return args.teacher or own.get(args.dataset, args.work_dir / args.dataset / "05_networks" / "videomae")


def model_folder(args):
    """The local folder of model_name(args); a hub name is downloaded once. Raises Missing without it."""
    name, train = model_name(args), contract.command(args, "tools/train_teacher.py")
    if Path(name).is_dir():
        return Path(name)
    fix = "python demo/train_teacher.py" if name == DEMO else None if args.teacher else train
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise contract.Missing(f"{name} is missing", FILES, fix=fix)
    from huggingface_hub import snapshot_download

    try:
        kinds = ["*config.json", "model*.safetensors*", "pytorch_model*.bin*"]
        return Path(snapshot_download(name, allow_patterns=kinds, local_files_only=args.dry_run))
    except Exception as error:  # of the network or the hub
        what, found = f"{name} is not here and cannot be downloaded", type(error).__name__
        fix = f"where there is a network: hf download {name} --local-dir FOLDER ; then FOLDER for its name"
        raise contract.Missing(what, FILES, found, fix) from None


def model_hash(folder):
    """Content hash of what `load` reads; the folder may hold other files."""
    read = ("config.json", ".safetensors", ".bin")
    return contract.digest({p.name: contract.sha256(p) for p in folder.iterdir() if p.name.endswith(read)})


def load(folder, device):
    """The classifier of a folder, float32, in evaluation mode: (VideoMAEForVideoClassification, scale).

    scale: (S, mean, std) for `to_input`: the side of its frames from config.json, the rest from
    preprocessor_config.json, since the library's defaults are not those of the weights. A weight that is
    missing, unexpected or misshapen is refused: transformers 5.5 to 5.17 silently drop the biases of q and v.
    """
    import transformers
    from safetensors import SafetensorError

    stated = contract.read(folder / "preprocessor_config.json")
    if not isinstance(stated, dict):
        what = f"{folder / 'preprocessor_config.json'} is missing or no JSON object"
        raise contract.ContractError(what, FILES)
    options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # the report names them, and is refused below
    try:
        network, report = transformers.VideoMAEForVideoClassification.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError, EOFError) as error:
        raise contract.ContractError(f"{folder} cannot be loaded as a VideoMAE", FILES, error) from None
    faults = [f"{kind[:-5]} {key}" for kind, keys in report.items() for key in sorted(map(str, keys))]
    if faults:  # kind: missing_keys, unexpected_keys, mismatched_keys, error_msgs
        what = f"{folder} does not fit the VideoMAE of transformers {transformers.__version__}"
        fix = "a model fine-tuned for classification, and the transformers of requirements.txt"
        found = f"{len(faults)} faults, the first: {faults[0]}"
        raise contract.ContractError(what, "all of its weights and no others", found, fix)
    config, mean, std = network.config, stated.get("image_mean"), stated.get("image_std")
    scaled = stated.get("do_normalize", True) and abs(stated.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-4
    square = isinstance(config.image_size, int) and config.num_frames == common.NUM_FRAMES
    if not (scaled and square and config.num_channels == 3 and mean and std):
        expected = f"{common.NUM_FRAMES} square RGB frames, times 1/255, then image_mean and image_std"
        found = f"{config.num_frames} frames of {config.image_size} px; {stated}"
        raise contract.ContractError(f"{folder}: unexpected input format", expected, found)
    return network.to(device).eval().requires_grad_(False), (config.image_size, tuple(mean), tuple(std))


def to_input(clips, scale):
    """Network-size clips uint8 [n, 16, S, S, 3] -> pixel_values float32 [n, 16, 3, S', S'].

    Bilinear resize of the whole frame, of real and generated clips alike. scale: (S', mean, std) of `load`.
    """
    side, mean, std = scale
    x = clips.permute(0, 1, 4, 2, 3).float() / 255
    if x.shape[-1] != side:
        frames = x.flatten(0, 1)  # [n * 16, 3, S, S]
        frames = torch.nn.functional.interpolate(frames, (side, side), mode="bilinear", antialias=True)
        x = frames.unflatten(0, x.shape[:2])
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x - mean) / std


@torch.inference_mode()
def run(network, scale, clips):
    """(features [n, d], logits [n, outputs]), float32 on the CPU, of a uint8 array [n, 16, S, S, 3].

    Features are what the classifier sees: the layer-normalised mean over the tokens.
    """
    features, logits = [], []
    hook = network.classifier.register_forward_pre_hook(lambda _, x: features.append(x[0].float().cpu()))
    try:
        for start in range(0, len(clips), BATCH):
            part = torch.from_numpy(np.array(clips[start : start + BATCH])).to(network.device)
            logits.append(network(to_input(part, scale)).logits.float().cpu())
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(logits)


def output_columns(network, classes, folder):
    """The columns of a VideoMAE's logits that are `classes`, in their order, matched by name.

    Only letters and digits count, in any case: UCF101 writes both HandstandPushups and HandStandPushups.
    Raises ContractError, with the model's folder, when a class has no output of its own.
    """

    def plain(text):
        return "".join(filter(str.isalnum, text.lower()))

    outputs, labels = {}, network.config.id2label
    for column, label in labels.items():
        outputs.setdefault(plain(label), []).append(int(column))
    if unknown := [c for c in classes if len(outputs.get(plain(c), ())) != 1]:
        what = f"{folder}: no output, or several, for {len(unknown)} of {len(classes)} classes: {unknown[0]}"
        found = f"{len(labels)} outputs: {', '.join([*labels.values()][:5])} ..."
        raise contract.ContractError(what, "a VideoMAE fine-tuned on the data set", found)
    return [outputs[plain(c)][0] for c in classes]
