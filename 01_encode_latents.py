"""Stage 01: real videos -> latents for the generator and clips for the networks (section 3.3.1, eq. 4).

Every listed video is decoded once. Its 16 frames floor((i + 0.5) * n / 16), spread over all n, go two ways: at generator
size through the VAE (training videos), and at network size as uint8 (training and test videos).

Reads:   <data root>/<data set>: the original files and the official split lists, as the archives unpack
Writes:  work/<data set>/01_latents/<class>.npy         float16 [n, 16, 4, h, w]: VAE mean times its scaling factor
         work/<data set>/01_clips/train/<class>.npy     uint8 [n, 1, 16, S, S, 3]
         work/<data set>/01_clips/test/<class>.npy      the same
         index.csv in both: class, name, split, row, frames, width, height, official. official is 0 for HMDB51's clips
         that its split 1 leaves unused and that Dancing with Still Images and GVD train on (02 and 05 choose)
Run:     python 01_encode_latents.py hmdb51
         python 01_encode_latents.py demo
Cost:    demo: 1 min on two CPU cores. hmdb51, by estimate: 0.5 h on an A100, 9.7 GB of latents, 4.1 GB of clips
Expect:  demo: 864 training and 336 test clips, latents with a standard deviation of 1.0
Differs: the paper says VQGAN encoder; ModelScope's is a KL autoencoder, of which the mean is taken
"""

import csv
import io

import numpy as np
import torch
from tqdm import tqdm

import common
import contract

ENCODER_BATCH = 16  # frames per forward of the VAE: one clip
SECONDS_PER_CLIP = {"demo": 0.05}  # on two CPU cores; the real sets on an A100, by estimate:
SECONDS_PER_CLIP_GPU = 0.3


def parse_args():
    parser = contract.arguments(__doc__, common.DATASETS, ipc=False)
    parser.add_argument("--model", help="folder or hub name of the text-to-video model (demo/models/t2v, ModelScope)")
    parser.add_argument("--size", type=common.frame_size, help="generator's frame, WxH in pixels (448x256; demo 32x32)")
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
        raise contract.ContractError(common.missing_data(args.dataset, args.data_root, root))
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
        raise contract.ContractError(
            f"{missing[0]} is missing\n  expected: {len(listed):,} clips of {args.dataset}\n"
            f"  found:    {len(listed) - len(missing):,}\n"
            f"  to work with those: {contract.command('01_encode_latents.py', args, '--partial')}\n"
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


def encode_class(clips, label, args, vae, device):
    """All clips of a class: (latents of training clips, {split: network clips}, index rows, [(path, what is wrong)])."""
    latents, network, rows, bad = [], {"train": [], "test": []}, [], []
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
        if vae is not None and split == "train":
            latents.append(encode(vae, common.resize_frames(frames, args.size), device))
    return latents, network, rows, bad


def stacked(arrays, shape, dtype):
    """[n, *shape], also for n = 0: under --partial a class may have no clip."""
    return np.stack(arrays) if arrays else np.zeros((0, *shape), dtype)


def save_index(path, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "name", "split", "row", "frames", "width", "height", "official"])
    writer.writerows(rows)
    with contract.atomic(path) as handle:
        handle.write(text.getvalue().encode())


def main():
    args = parse_args()
    train, test = args.spec["clips"]
    items = (train + test) * len(args.classes) // len(args.spec["classes"])
    seconds = SECONDS_PER_CLIP.get(args.dataset, SECONDS_PER_CLIP_GPU) * items
    size = train * 16 * 4 * (args.size[0] * args.size[1] // 64) * 2 + items * 16 * args.spec["side"] ** 2 * 3
    cost = ("clips", items, seconds, size, "two CPU cores" if args.dataset == "demo" else "an A100")
    try:
        clips = find_clips(args)
        model = common.model_folder(args, ("vae",))
    except contract.ContractError:
        if args.dry_run:
            return contract.plan_after(args, "01", cost)
        raise

    latents_folder, clips_folder = contract.work_folder(args, "01_latents"), contract.work_folder(args, "01_clips")
    of_class = {c: contract.digest([[*clip[:3], clip[4]] for clip in clips[c]]) for c in args.classes}
    of_train = {c: contract.digest([[*x[:3], x[4]] for x in clips[c] if x[1] == "train"]) for c in args.classes}
    settings = {"size": args.size, "limit": args.limit, "device": args.device, "threads": args.threads}
    vae_hash = {"vae": contract.folder_hash(model / "vae", args)}
    identity = contract.identity(__file__, args, settings, vae_hash, of_train)
    clips_identity = contract.identity(__file__, args, {"limit": args.limit}, {}, of_class)
    wanted = ["index.csv", *(f"{c}.npy" for c in args.classes), *(f"index/{c}.csv" for c in args.classes)]
    clips_wanted = ["index.csv", *(f"index/{c}.csv" for c in args.classes)]
    clips_wanted += [f"{split}/{c}.npy" for split in ("train", "test") for c in args.classes]
    todo, identity = contract.begin(latents_folder, identity, wanted, args, cost, ["index.csv"])
    clips_todo, clips_identity = contract.begin(clips_folder, clips_identity, clips_wanted, args, cost, ["index.csv"])
    if todo is None and clips_todo is None:
        return

    factor = common.vae_factor(model)
    width, height = args.size[0] // factor, args.size[1] // factor
    vae, device = None, torch.device(identity["parameters"]["device"])
    if todo is not None:
        vae = common.load_part(model / "vae", "vae", device, torch.float32)
    stems = {name.rsplit("/", 1)[-1].rsplit(".", 1)[0] for name in [*(todo or []), *(clips_todo or [])]}
    bad = []
    for label in tqdm([c for c in args.classes if c in stems], desc="01 classes", mininterval=1):
        latents, network, rows, broken = encode_class(clips[label], label, args, vae, device)
        bad += broken
        if broken and len(bad) > args.allow_bad:
            continue  # go on, so that every broken video is named, but leave this class to be made
        if todo is not None:
            contract.save_array(latents_folder / f"{label}.npy", stacked(latents, (16, 4, height, width), np.float16))
            save_index(latents_folder / "index" / f"{label}.csv", [row for row in rows if row[2] == "train"])
        if clips_todo is not None:
            shape = (1, common.NUM_FRAMES, args.spec["side"], args.spec["side"], 3)
            for split in ("train", "test"):
                contract.save_array(clips_folder / split / f"{label}.npy", stacked(network[split], shape, np.uint8))
            save_index(clips_folder / "index" / f"{label}.csv", rows)
    for path, error in bad:
        contract.say(f"01 broken video: {path}: {error}")
    if len(bad) > args.allow_bad:
        raise contract.ContractError(
            f"{len(bad)} videos cannot be decoded, the first is {bad[0][0]}: {bad[0][1]}\n  expected: at most "
            f"{args.allow_bad}\n  mend them, or leave them out: "
            f"{contract.command('01_encode_latents.py', args, '--allow-bad', len(bad))}"
        )
    for folder, state, names, todo_here in (
        (latents_folder, identity, wanted, todo),
        (clips_folder, clips_identity, clips_wanted, clips_todo),
    ):
        if todo_here is None:
            continue
        rows = [row for c in sorted(state["classes"]) for row in common.read_csv(folder / "index" / f"{c}.csv")]
        save_index(folder / "index.csv", [list(row.values()) for row in rows])
        kinds = {"index.csv": ([len(rows), 8], "csv")}
        for c in state["classes"]:
            count = sum(row["class"] == c for row in rows)
            kinds[f"index/{c}.csv"] = ([count, 8], "csv")
        contract.finish(folder, state, names, args, ["opencv-python-headless", "diffusers"], kinds)


if __name__ == "__main__":
    contract.run(main)
