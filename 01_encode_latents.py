"""Stage 01: real videos -> latents for the generator and clips for the networks (section 3.3.1, eq. 4).

Every listed video is decoded once. Its 16 frames floor((i + 0.5) * n / 16), spread over all n, go two ways:
at generator size through the VAE (training videos), at network size as uint8 (training and test videos).
This is window 0. --windows adds those of Dancing with Still Images (05 --protocol dancing): 16 frames at
stride 4 from a random start, flipped with probability 0.5; one for training, three for the test passes.

Reads:   <data root>: the original files and the official split lists, unpacked, or one's own videos,
         <data set>/{train,test}/<class>/* (docs/data.md)
Writes:  work/<data set>/01_latents/<class>.npy  float16 [n, 16, 4, h, w]: VAE mean times its scaling factor
         work/<data set>/01_clips/{train,test}/<class>.npy  uint8 [n, 1, 16, S, S, 3]
         work/<data set>/01_clips/windows/{train,test}/<class>.npy  uint8 [n, 1 or 3, 16, S, S, 3]
         <class>.csv beside these: name, official, frames, width, height of the clip in each row
Run:     python 01_encode_latents.py hmdb51
         python 01_encode_latents.py demo --windows     also later: adds the windows to what is there
         torchrun --nproc-per-node 8 01_encode_latents.py hmdb51      the processes share the classes
Cost:    demo: 25 s on two CPU cores. hmdb51, by estimate: 0.6 h on an A100, 5.3 GB, 11.2 GB with --windows
Expect:  demo: 864 training and 336 test clips, latents with a standard deviation of 0.25
Differs: the paper says VQGAN encoder; ModelScope's is a KL autoencoder, of which the mean is taken
"""

import contract

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
import media

COLUMNS = ("name", "official", "frames", "width", "height")  # of <class>.csv
WINDOWS = {"windows/train": 1, "windows/test": 3}  # of a clip: for training, for each test pass
STRIDE = 4  # frames between two frames of a random window, less in videos of fewer than 64
SECONDS, SECONDS_FULL = {"demo": 0.05}, 0.3  # per clip: two CPU cores; an A100, by estimate


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc=False)
    add = parser.add_argument
    add("--size", help="generator's frame, WxH in pixels (448x256, demo 32x32; one's own data: as before)")
    add("--windows", action="store_true", help="also the random windows that 05 --protocol dancing needs")
    add("--partial", action="store_true", help="work with the listed clips that are present")
    add("--allow-bad", type=int, default=0, metavar="N", help="leave out up to N broken videos (0)")
    add("--val", type=float, help="one's own data without test/: the share of test clips (as before; 0.2)")
    add("--hmdb-train", choices=("all", "official"), help="HMDB51's training clips: with the unused (all)")
    args = contract.parse(parser)
    usual = media.DATASETS.get(args.dataset, args.spec)["size"]
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.size or "{}x{}".format(*usual))
    if not size or any(int(side) % 8 for side in size.groups()):
        parser.error("--size: must be WxH with sides that are multiples of 8, as 448x256")
    if args.hmdb_train and args.dataset != "hmdb51":
        parser.error("--hmdb-train is for hmdb51")
    split = args.spec["lists"] or (args.data_root / args.dataset / "test").exists()
    if args.val is not None and (split or not 0 < args.val < 1):
        parser.error("--val is for one's own data set without a folder test, above 0 and below 1")
    args.val = None if split else args.val or args.spec["val"] or 0.2
    args.size = tuple(int(side) for side in size.groups())
    args.spec = args.spec | {"size": args.size}  # as later stages find it
    if not args.spec["lists"]:
        args.spec["val"] = args.val
    args.hmdb_train = args.hmdb_train or ("all" if args.dataset == "hmdb51" else None)
    args.parts = {"train": 1, "test": 1} | (WINDOWS if args.windows else {})  # windows of a clip per folder
    return args


def find_clips(args):
    """{class: [(name, split, official, sha256, path)]} of the listed clips that are present and asked for."""
    media.opencv()  # or an error, before any folder is begun
    listed = [clip for clip in media.list_clips(args) if clip[0] in args.classes]
    listed = [clip for clip in listed if clip[3] or args.hmdb_train != "official"]
    clips, absent, root = {label: [] for label in args.classes}, [], args.data_root / args.spec["videos"]
    for label, name, split, official, path in listed:
        if args.limit and sum(clip[1] == split for clip in clips[label]) >= args.limit:
            continue
        if path.is_file():
            clips[label].append((name, split, official, contract.sha256(path), path))
        else:
            absent.append(path)
    present = f"{len(listed) - len(absent):,} of {len(listed):,} listed clips"
    if absent and not (args.partial and root.is_dir()):
        found = f"{present}; --partial works with those"
        raise media.missing(args.dataset, args.data_root, absent[0], found, {*absent})
    if absent:
        empty = [label for label in clips if not clips[label]]
        contract.say("; none of ".join([f"01 partial: {present} are present", *empty]))
    return clips


def encode(vae, frames, path):
    """Frames uint8 [16, H, W, 3] of a video -> scaled mean latents float16 [16, 4, h, w] (eq. 4)."""
    x = torch.from_numpy(frames).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # -1 to 1
    with torch.inference_mode():
        z = (vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half()
    if not z.isfinite().all():
        raise contract.ContractError(f"{path}: its latents are not finite in float16", fix="another --model")
    return z.cpu().numpy()


def window_frames(count, generator):
    """Frames of one random window of a video of `count` frames, int [16], counted from 0.

    As in the code of Dancing with Still Images the start is uniform and the last frame never used. That code
    fails on a video of at most 16 frames, which has no window to choose: here they are spread over the clip.
    """
    if count <= common.NUM_FRAMES:
        return media.uniform_frames(count)
    stride = min(STRIDE, count // common.NUM_FRAMES)
    starts = count - (common.NUM_FRAMES - 1) * stride - 1
    return int(torch.randint(starts, (), generator=generator)) + stride * np.arange(common.NUM_FRAMES)


def draw_windows(label, name, windows, seed, count):
    """(frames [1 + windows, 16], flips [1 + windows]) of window 0, the uniform one, and of random ones.

    They depend on the seed, the clip's class and name and the window, on nothing else.
    """
    frames, flips = [media.uniform_frames(count)], np.zeros(1 + windows, bool)
    for window in range(1, windows + 1):
        generator = contract.generator(seed, "01", label, name, "window", window)
        flips[window] = torch.rand((), generator=generator) < 0.5
        frames.append(window_frames(count, generator))
    return np.stack(frames), flips


def class_files(label, args):
    """The files of a class, in 01_latents and in 01_clips."""
    clips = [f"{part}/{label}.npy" for part in args.parts]
    return [f"{label}.npy", f"{label}.csv"], [*clips, f"train/{label}.csv", f"test/{label}.csv"]


def encode_class(clips, label, args, vae, factor):
    """All clips of a class: ({file: array or csv rows}, broken videos). factor: pixels per latent pixel."""
    side, size, broken = args.spec["side"], (args.size[1] // factor, args.size[0] // factor), 0
    # With --partial a class may have no clip; its arrays have their shape nevertheless.
    latents, tables = [np.zeros((0, 16, 4, *size), np.float16)], {"train": [COLUMNS], "test": [COLUMNS]}
    arrays = {part: [np.zeros((0, n, 16, side, side, 3), np.uint8)] for part, n in args.parts.items()}
    for name, split, official, _, path in clips:
        try:
            draw = partial(draw_windows, label, name, args.parts.get(f"windows/{split}", 0), args.seed)
            frames, count = media.read_frames(path, lambda n, draw=draw: draw(n)[0].ravel())
        except media.BadVideo as error:
            print(f"01 broken video: {path}: {error}", flush=True)  # by whichever process has the class
            broken += 1
            continue
        tables[split].append((name, official, count, frames.shape[2], frames.shape[1]))
        views = media.network_clip(frames, args.spec).reshape(1, -1, 16, side, side, 3)  # by windows
        arrays[split].append(views[:, :1])
        if args.windows:
            flips = draw(count)[1]
            views[0, flips] = views[0, flips, :, :, ::-1]
            arrays[f"windows/{split}"].append(views[:, 1:])
        if vae is not None and split == "train":
            latents.append(encode(vae, media.resize_frames(frames[:16], args.size), path)[None])
    content = {f"{label}.npy": np.concatenate(latents), f"{label}.csv": tables["train"]}
    content |= {f"{part}/{label}.npy": np.concatenate(clips) for part, clips in arrays.items()}
    return content | {f"{split}/{label}.csv": rows for split, rows in tables.items()}, broken


def estimate(args):
    (width, height), share = args.size, len(args.classes) / len(args.spec["classes"])
    train, test = (round(share * clips) for clips in args.spec["clips"])
    seconds, machine = common.rate(args, SECONDS.get(args.dataset, SECONDS_FULL))
    windows = sum(n * (train if "train" in part else test) for part, n in args.parts.items())
    sizes = train * 16 * 4 * (width * height // 64) * 2, windows * 16 * args.spec["side"] ** 2 * 3  # bytes
    return {
        "01_latents": ("training clips", train, seconds * (train + test), sizes[0], machine),
        "01_clips": ("clips", train + test, 0, sizes[1], machine),
    }


def main(args):
    clips, model = find_clips(args), common.model_folder(args, ("vae",))
    wanted = [[name for c in args.classes for name in class_files(c, args)[i]] for i in (0, 1)]
    parameters = {"limit": args.limit, "hmdb_train": args.hmdb_train}
    values = parameters | {"size": args.size, "device": args.device}
    inputs = {c: contract.digest([x[:4] for x in clips[c] if x[1] == "train"]) for c in args.classes}
    inputs["vae"] = common.folder_hash(model / "vae")
    latents = contract.Output(args, "01_latents", values, inputs, wanted[0], shared=True)
    inputs = {c: contract.digest([x[:4] for x in clips[c]]) for c in args.classes}
    network = contract.Output(args, "01_clips", parameters, inputs, wanted[1], shared=True)
    if not latents.todo | network.todo:
        return

    def save(content):
        for output in (latents, network):
            for name in output.todo & content.keys():  # what is there stays
                contract.save(output.folder / name, content[name])

    vae = common.load_part(model / "vae", "vae", latents.device, torch.float32) if latents.todo else None
    mine = latents.mine(args.classes, lambda c: class_files(c, args)[0])
    mine += network.mine(args.classes, lambda c: class_files(c, args)[1])
    held, broken = [], 0
    for label in contract.bar(sorted({*mine}), desc="01 classes"):
        content, count = encode_class(clips[label], label, args, vae, common.vae_factor(model))
        broken += count
        if not count:
            save(content)
        elif broken <= args.allow_bad:  # until it is known how many broken videos all processes have
            held.append(content)
    if (broken := sum(contract.gather(broken))) > args.allow_bad:
        for output in (latents, network) if contract.RANK == 0 else ():  # a repair concerns its class alone
            gone = {Path(name).stem for name in output.wanted if not (output.folder / name).is_file()}
            output.record["inputs"] = {c: h for c, h in output.record["inputs"].items() if c not in gone}
            contract.save(output.folder / "manifest.json", output.record)
        contract.gather()  # torchrun ends all processes with the first
        what, fix = f"{broken} videos cannot be decoded", f"the same command with --allow-bad {broken}"
        raise contract.ContractError(what, f"at most {args.allow_bad}", "those named above", fix)
    for content in held:
        save(content)
    latents.finish()
    network.finish()


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
