"""Stage 01: real videos -> latents for the generator and clips for the networks (section 3.3.1, eq. 4).

Every listed video is decoded once. Its 16 frames floor((i + 0.5) * n / 16), spread over all n, go two ways: at generator
size through the VAE (training videos), and at network size as uint8 (training and test videos). This is window 0 of a
video. With --windows more are made for the networks, as Dancing with Still Images draws them (protocol `dancing` of 05):
16 frames at stride 4 from a drawn start, flipped by a drawn coin; window 1 of training clips, 1 to 3 of test clips.

Reads:   <data root>/<data set>: the original files and the official split lists, as the archives unpack
Writes:  work/<data set>/01_latents/<class>.npy         float16 [n, 16, 4, h, w]: VAE mean times its scaling factor
         work/<data set>/01_clips/train/<class>.npy     uint8 [n, 1, 16, S, S, 3]
         work/<data set>/01_clips/test/<class>.npy      the same
         work/<data set>/01_clips/windows/{train,test}/<class>.npy  with --windows: uint8 [n, 1 or 3, 16, S, S, 3]
         index.csv in both: class, name, split, row, frames, width, height, official. official is 0 for HMDB51's clips
         that its split 1 leaves unused and that Dancing with Still Images and GVD train on (02 and 05 choose)
Run:     python 01_encode_latents.py hmdb51
         python 01_encode_latents.py demo
         python 01_encode_latents.py demo --windows     also later: what is there stays, the windows are added
         torchrun --nproc-per-node 8 01_encode_latents.py hmdb51      the processes share the classes
Cost:    demo: 25 s on two CPU cores. hmdb51, by estimate: 0.6 h on an A100, 1.2 GB of latents, 4.1 GB of clips,
         and 5.9 GB of windows
Expect:  demo: 864 training and 336 test clips, latents with a standard deviation of 1.0
Differs: the paper says VQGAN encoder; ModelScope's is a KL autoencoder, of which the mean is taken
"""

from pathlib import Path

import numpy as np
import torch

import common
import contract

APART = ("plan", "left_out")  # definitions that only show something
INDEX = ("class", "name", "split", "row", "frames", "width", "height", "official")  # columns of index.csv
WINDOWS = {"train": 1, "test": 3}  # drawn windows of a clip: one for training, one for each test pass (protocol.md 2)
STRIDE = 4  # frames between two frames of a drawn window, less in videos of fewer than 64
ENCODER_BATCH = 16  # frames per forward of the VAE: one clip
SECONDS_PER_CLIP = {"demo": 0.05}  # on two CPU cores; the real sets on an A100, by estimate:
SECONDS_PER_CLIP_GPU = 0.3


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("--model", help="folder or hub name of the text-to-video model (demo/models/t2v, ModelScope)")
    parser.add_argument("--size", type=common.frame_size, help="generator's frame, WxH in pixels (448x256; demo 32x32)")
    parser.add_argument("--windows", action="store_true", help="also the drawn windows that 05 --protocol dancing needs")
    parser.add_argument("--partial", action="store_true", help="work with the listed clips that are present")
    parser.add_argument("--allow-bad", type=int, default=0, metavar="N", help="leave out up to N broken videos (0)")
    args = contract.parse(parser)
    args.size = args.size or args.spec["size"]
    return args


def find_clips(args):
    """{class: [(name, split, official, path, sha256)]} of the listed clips that are present and asked for."""
    listed = [clip for clip in common.list_clips(args.dataset, args.data_root) if clip[0] in args.classes]
    root, hashes = args.data_root / args.spec["videos"], contract.Hashes(args.work_dir)
    if not root.is_dir():
        raise contract.Missing(common.missing_data(args.dataset, args.data_root, root))
    found, missing = {label: [] for label in args.classes}, []
    for label, name, split, official in listed:
        path = root / label / f"{name}.avi"
        if args.limit and sum(clip[1] == split for clip in found[label]) >= args.limit:
            continue
        if path.is_file():
            found[label].append((name, split, official, path, hashes(path)))
        else:
            missing.append(path)
    hashes.save()
    if missing and not args.partial:
        raise contract.Missing(
            f"{missing[0]} is missing\n  expected: {len(listed):,} clips of {args.dataset}\n"
            f"  found:    {len(listed) - len(missing):,}\n"
            f"  to work with those: {contract.again('--partial')}\n"
            f"{common.missing_data(args.dataset, args.data_root, missing[0])}"
        )
    if missing:
        contract.say(f"01 partial: {len(listed) - len(missing):,} of {len(listed):,} listed clips are present")
    return found


def encode(vae, frames, device):
    """Frames uint8 [16, H, W, 3] -> scaled mean latents float16 [16, 4, h, w] (eq. 4)."""
    x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(ENCODER_BATCH)])
    return (z * vae.config.scaling_factor).half().cpu().numpy()


def window_frames(count, generator):
    """Frames of one drawn window of a video of `count` frames, int [16], counted from 0 (protocol.md 2).

    The start is uniform; the last frame of a video is never used, as in the released code. A video of at most 16 frames
    has no window to draw (the released code fails on it): all its frames are spread over the clip.
    """
    if count <= common.NUM_FRAMES:
        return common.uniform_frames(count)
    stride = min(STRIDE, count // common.NUM_FRAMES)
    starts = count - (common.NUM_FRAMES - 1) * stride - 1
    return int(torch.randint(starts, (), generator=generator)) + stride * np.arange(common.NUM_FRAMES)


def drawn_windows(video, names, count, args):
    """Windows 1 to `count` of a video [n, h, w, 3] as the networks see them: uint8 [count, 16, S, S, 3].

    names: class and name of the clip; start and flip depend on the seed, these and the window, on nothing else.
    """
    clips = []
    for window in range(1, count + 1):
        generator = contract.generator(args.seed, "01", *names, "window", window)
        flip = torch.rand((), generator=generator) < 0.5
        clip = common.network_clip(video[window_frames(len(video), generator)], args.dataset)
        clips.append(clip[:, :, ::-1] if flip else clip)
    return np.stack(clips)


def encode_class(clips, label, args, vae, device):
    """All clips of a class: (latents of training clips, {file: network clips}, index rows, [(path, what is wrong)]).

    The files are train, test and, with --windows, windows/train and windows/test.
    """
    latents, network, rows, bad = [], {folder: [] for folder in clip_folders(args)}, [], []
    for name, split, official, path, _ in clips:
        try:
            video = common.read_video(path)
        except common.BadVideo as error:
            bad.append((path, error))
            continue
        frames = video[common.uniform_frames(len(video))]
        height, width = video.shape[1:3]
        rows.append([label, name, split, len(network[split]), len(video), width, height, int(official)])
        network[split].append(common.network_clip(frames, args.dataset)[None])
        if args.windows:
            network[f"windows/{split}"].append(drawn_windows(video, (label, name), WINDOWS[split], args))
        if vae is not None and split == "train":
            latents.append(encode(vae, common.resize_frames(frames, args.size), device))
    return latents, network, rows, bad


def clip_folders(args):
    """{folder below 01_clips: windows of a clip in its files}."""
    drawn = {f"windows/{split}": count for split, count in WINDOWS.items()}
    return {"train": 1, "test": 1} | (drawn if args.windows else {})


def stacked(arrays, shape, dtype):
    """[n, *shape], also for n = 0: under --partial a class may have no clip."""
    return np.stack(arrays) if arrays else np.zeros((0, *shape), dtype)


def left_out(clips, folder, label):
    """Paths of a class that was made before without its broken videos (--allow-bad)."""
    names = {row["name"] for row in common.read_csv(folder / "index" / f"{label}.csv")}
    return [(path, "left out before") for name, _, _, path, _ in clips if name not in names]


def close_folder(folder, identity, wanted, args):
    """Writes index.csv of all classes that are there, and the manifest."""
    of_class = {name: common.read_csv(folder / name) for name in contract.listed(folder, wanted) if name.startswith("index/")}
    common.write_csv(folder / "index.csv", INDEX, [list(row.values()) for rows in of_class.values() for row in rows])
    kinds = {name: ([len(rows), 8], "csv") for name, rows in of_class.items()}
    kinds["index.csv"] = ([sum(map(len, of_class.values())), 8], "csv")
    contract.finish(folder, identity, wanted, args, ["opencv-python-headless", "diffusers"], kinds)


def plan(args):
    """The plans of the two folders, for --dry-run: (item, items, seconds, bytes, machine)."""
    share = len(args.classes) / len(args.spec["classes"])
    train, clips = round(args.spec["clips"][0] * share), round(sum(args.spec["clips"]) * share)
    seconds = SECONDS_PER_CLIP.get(args.dataset, SECONDS_PER_CLIP_GPU) * clips
    machine = "two CPU cores" if args.dataset == "demo" else "an A100"
    latents_size = train * 16 * 4 * (args.size[0] * args.size[1] // 64) * 2
    windows = clips + (train * WINDOWS["train"] + (clips - train) * WINDOWS["test"] if args.windows else 0)
    clips_size = windows * 16 * args.spec["side"] ** 2 * 3
    return ("latents", train, seconds, latents_size, machine), ("clips", clips, 0, clips_size, machine)


def main():
    args = parse_args()
    latents_cost, clips_cost = plan(args)
    try:
        clips, model = find_clips(args), common.model_folder(args, ("vae",))
    except contract.Missing:
        if args.dry_run:
            contract.plan_after(args, "01", latents_cost)
            return contract.plan_after(args, "01", clips_cost)
        raise

    latents_folder, clips_folder = contract.work_folder(args, "01_latents"), contract.work_folder(args, "01_clips")
    of_class = {c: contract.digest([[*clip[:3], clip[4]] for clip in clips[c]]) for c in args.classes}
    of_train = {c: contract.digest([[*x[:3], x[4]] for x in clips[c] if x[1] == "train"]) for c in args.classes}
    factor, vae_hash = common.vae_factor(model), {"vae": contract.folder_hash(model / "vae", args)}
    settings = {"size": args.size, "limit": args.limit, "device": args.device, "threads": args.threads}
    identity = contract.identity(__file__, args, settings, vae_hash, of_train, APART)
    clips_identity = contract.identity(__file__, args, {"limit": args.limit}, {}, of_class, APART)
    index = ["index.csv", *(f"index/{c}.csv" for c in args.classes)]
    wanted = [*index, *(f"{c}.npy" for c in args.classes)]
    clips_wanted = [*index, *(f"{part}/{c}.npy" for part in clip_folders(args) for c in args.classes)]
    todo, identity = contract.begin(latents_folder, identity, wanted, args, latents_cost, ["index.csv"])
    clips_todo, clips_identity = contract.begin(clips_folder, clips_identity, clips_wanted, args, clips_cost, ["index.csv"])
    if todo is None and clips_todo is None:
        return

    vae, device = None, torch.device(identity["parameters"]["device"])
    if todo is not None:
        vae = common.load_part(model / "vae", "vae", device, torch.float32)
    latent_shape = (common.NUM_FRAMES, 4, args.size[1] // factor, args.size[0] // factor)
    clip_shape = (common.NUM_FRAMES, args.spec["side"], args.spec["side"], 3)
    to_make = {Path(name).stem for name in [*(todo or []), *(clips_todo or [])]} & {*args.classes}
    asked = [latents_folder / name for name in wanted if todo is not None]
    asked += [clips_folder / name for name in clips_wanted if clips_todo is not None]
    files = {c: [path for path in asked if path.stem == c] for c in to_make}
    tried = set()
    bad = [item for c in args.classes if c not in to_make for item in left_out(clips[c], clips_folder, c)]
    for label in contract.bar(contract.shared(sorted(to_make), files.get), desc="01 classes", total=len(to_make)):
        tried.add(label)
        latents, network, rows, broken = encode_class(clips[label], label, args, vae, device)
        bad += broken
        if broken and len(bad) > args.allow_bad:
            continue  # go on, so that every broken video is named, but leave this class to be made
        if todo is not None:
            contract.save_array(latents_folder / f"{label}.npy", stacked(latents, latent_shape, np.float16))
            common.write_csv(latents_folder / "index" / f"{label}.csv", INDEX, [row for row in rows if row[2] == "train"])
        if clips_todo is not None:
            for part, windows in clip_folders(args).items():
                if (name := f"{part}/{label}.npy") in clips_todo:
                    contract.save_array(clips_folder / name, stacked(network[part], (windows, *clip_shape), np.uint8))
            common.write_csv(clips_folder / "index" / f"{label}.csv", INDEX, rows)
    bad += [item for c in sorted(to_make - tried) for item in left_out(clips[c], clips_folder, c)]  # another process's
    for path, error in bad:
        contract.say(f"01 broken video: {path}: {error}")
    if len(bad) > args.allow_bad:
        raise contract.ContractError(
            f"{len(bad)} videos cannot be decoded, the first is {bad[0][0]}: {bad[0][1]}\n  expected: at most "
            f"{args.allow_bad}\n  mend them, or leave them out: {contract.again('--allow-bad', len(bad))}"
        )
    if todo is not None:
        close_folder(latents_folder, identity, wanted, args)
    if clips_todo is not None:
        close_folder(clips_folder, clips_identity, clips_wanted, args)


if __name__ == "__main__":
    contract.run(main)
