"""The experiments on the demo world, by the stages and tools as commands; a killed experiment resumes.

  measure       is the world hard enough, is the model good enough, does it copy? Accuracy of a network of all
                real clips, and on the order pair with frames in order, shuffled, or one frame 16 times; PSNR
                of the VAE; generated videos that the network recognises; errors of the U-Net by timestep and
                caption; classes told by mean colours alone; distances to the training clips
  sets          accuracy by sampler over sets: noise, composition and network each of a seed of its own, as
                every network on random real clips has clips of its own; tuned: GVD by a U-Net fine-tuned on
                the training clips (eq. 3), as for hmdb51
  settings      accuracy by settings of 03 and 04 (SETTINGS) on a validation split of the training groups; the
                demo's defaults are chosen here, never on its test clips
  compose-real  accuracy on real clips, composed by 04 like generated videos: what composition costs without a
                generator. They are stored as H.264 before it, as generated videos are, and again after it
  take-over     from which step on does the U-Net lose what drawn clips have? Accuracy on freshly drawn clips,
                noised to a timestep, brought back by the U-Net from their prompts and composed by 04; on the
                validation split. At 0 by the VAE alone, at 1000 nothing is left of a clip
  finetune      generated videos that the network recognises, from captions unknown to the U-Net, before and
                after fine-tuning on them (eq. 3). Class names would not do: the text encoder, which is not
                tuned, tells "kick" from "punch" by a hundredth of an embedding's norm, captions by a third

Reads:   the demo's videos (demo/draw_videos.py), the model (demo/models/t2v)
Writes:  the stages' folders below work/demo, and there measured.json, finetune.json,
         03_samples/ipc<K>/real/; work/orders/{shuffled,one}/demo/01_clips/; below work/sets/demo
         sets_ipc<K>.csv; below work/validation/demo settings.csv, take_over.csv,
         03_samples/ipc<K>/take-over-<timestep>/
Run:     python demo/experiments.py demo measure
         python demo/experiments.py demo compose-real 10
Cost:    on two CPU cores, by estimate: measure 30 min, sets 110 at IPC 5, settings 40, compose-real 5,
         take-over 20, finetune 10, and once 14 for the network of all real clips
Expect:  demo/README.md has the figures that are measured with the shipped model
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import contract  # noqa: E402  isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from draw_videos import CLASSES, draw_corpus  # noqa: E402
from sklearn.ensemble import RandomForestClassifier  # noqa: E402
from sklearn.model_selection import StratifiedKFold, cross_val_score  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

PAIR = ("SitDown", "StandUp")  # the same poses in opposite order
PAIR_EPOCHS = 30  # enough for the network that sees the frames in order
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95}
SETS = {  # --sampler, --cluster, sets
    "gvd": ("gvd", "direct", 10),
    "naive": ("naive", "direct", 5),
    "knoise": ("knoise", "dummy-video", 5),
    "tuned": ("gvd", "direct", 5),
}
RESULT = "minic3d__hard__demo/result.json"  # of a set, in 05_results
RANDOM = 10  # sets: networks, each on random clips of its own
DRAWS = 2  # finetune: videos per prototype, 80 in all at IPC 5
SETTINGS = {"random": ("", ""), "cfg2": ("--cfg 2", ""), "cfg4": ("--cfg 4", "")}  # options of 03, of 04
SOURCES, FPS = 4, 8  # compose-real: clips in a composed video (04 --pattern 4x4), frame rate (03)
CFG, STEPS = 2.0, 25  # take-over: as 03 for the demo
TAKE_OVER = (0, 600, 800, 1000)  # timesteps
NOISY = (500, 700, 800, 900, 960, 999)  # measure: timesteps
CORPUS_SEED = 1  # of the drawn clips; the training's corpus has 0
CAPTIONS = ROOT / "demo" / "captions.json"  # finetune: {class: a sentence that is not the class's prompt}
OPTIONS = ("work_dir", "data_root", "model", "seed", "limit", "device", "threads", "redo", "keep", "dry_run")


def parse_args():
    parser = contract.arguments(__file__, __doc__, media.find_data_set, ipc=False)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="see above")
    parser.add_argument("ipc", type=int, nargs="?", help="instances per class (5; settings 10)")
    args = contract.parse(parser)
    if args.dataset != "demo":
        parser.error("these are experiments on the demo")
    args.ipc = args.ipc or (10 if args.experiment == "settings" else 5)
    args.commands = []  # what `run` has run
    return args


def run(args, script, *words):
    """Runs a stage or tool on the demo, with this run's shared options except those among `words`.

    A command that fails has said why, and its exit code becomes this run's.
    """
    line = ["python", script, "demo", *map(str, words)]
    args.commands.append(shlex.join(line))
    print(f"\n$ {args.commands[-1]}", flush=True)
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in OPTIONS}
    if args.classes != sorted(args.spec["classes"]):
        options["--classes"] = ",".join(args.classes)
    for option, value in options.items():
        if value not in (None, False) and option not in words:
            line += [option] if value is True else [option, str(value)]
    if code := subprocess.run([sys.executable, str(ROOT / script), *line[2:]]).returncode:
        sys.exit(code)


def train_full(args):
    run(args, "01_encode_latents.py")
    run(args, "05_train_eval.py", "--train-on", "full", "--save")


def found(args, *path):
    """A JSON file of 05_results that a command has written. With --dry-run there is none: this run ends."""
    if args.dry_run:
        sys.exit()
    return contract.read(args.work_dir.joinpath("demo", "05_results", *path))


def top1(args, *folders):
    """{mean, std, n, values} of the accuracies in percent, of a set's result.json."""
    return found(args, *folders, RESULT)["top1"]


def recognised(args, names):
    """{folder of 03: its videos, and the percentages that the network of all real clips recognises}."""
    if not args.dry_run:  # it needs the videos
        run(args, "tools/metrics.py", args.ipc, "--score", "--sets", ",".join(names))
    rates = {}
    for name in names:
        score = found(args, f"ipc{args.ipc}", f"{name}-samples", "score.json")
        pair = round(statistics.fmean(score["per_class"][c] for c in PAIR), 2)
        shares = {"all classes": score["top1"], "order pair": pair, "per class": score["per_class"]}
        rates[name] = {"videos": score["videos"], **shares}
    return rates


def summary(values):
    """Mean, sample standard deviation and values, as cells of a CSV file."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return [f"{mean:.2f}", f"{spread:.2f}", " ".join(f"{v:.2f}" for v in values)]


def report(args, name, value):
    """Writes a JSON or CSV file below work/demo and prints it."""
    contract.save(args.work_dir / "demo" / name, value)
    print((args.work_dir / "demo" / name).read_text("utf-8"))


def clips_folder(args):
    return contract.Input(args, "01_clips", contract.command(args, "01_encode_latents.py"))


def real_video(args, label, name):
    """The 16 frames that 01 encodes of a real clip, at generator size: uint8 [16, H, W, 3]."""
    path = args.data_root / args.spec["videos"] / label / f"{name}.avi"
    try:
        frames, _ = media.read_frames(path, media.uniform_frames)
    except media.BadVideo as error:
        raise contract.ContractError(f"{path}: {error}", fix="python demo/draw_videos.py") from None
    return media.resize_frames(frames, args.spec["size"])


def reorder(args, order):
    """The arguments for a work folder of its own, whose 01_clips has the pair's clips with other frames.

    order: "shuffled", in an order drawn for each clip, or "one", the first frame of that order 16 times.
    """
    source = clips_folder(args)
    names = [f"{split}/{c}.{kind}" for split in ("train", "test") for c in PAIR for kind in ("npy", "csv")]
    args = argparse.Namespace(**{**vars(args), "work_dir": args.work_dir / "orders" / order})
    parameters = {**source.record["parameters"], "frames": order}
    output = contract.Output(args, "01_clips", parameters, source.check(names), names)
    for name in output.mine(names, lambda name: [name]):
        if name.endswith(".csv"):
            contract.save(output.folder / name, (source.folder / name).read_bytes())
            continue
        clips, label = np.array(source.load(name)), Path(name).stem  # uint8 [n, windows, 16, S, S, 3]
        for i, row in enumerate(source.load(f"{name[:-4]}.csv")):
            generator = contract.generator(args.seed, "05", "frames", label, row["name"])
            frames = torch.randperm(common.NUM_FRAMES, generator=generator)
            clips[i] = clips[i][:, frames if order == "shuffled" else frames[:1].expand(len(frames))]
        contract.save(output.folder / name, clips)
    output.finish()
    return args


def write_real_samples(args):
    """03_samples/ipc<K>/real: random training clips take the places of SOURCES draws of K prototypes."""
    source, clips = clips_folder(args), {}
    samples = sorted(f"{k}_{draw}" for k in range(args.ipc) for draw in range(SOURCES))
    for label in args.classes:
        names = [row["name"] for row in source.load(f"train/{label}.csv")]
        if len(names) < len(samples):
            what, fix = f"IPC {args.ipc}: too few training clips", f"IPC <= {len(names) // SOURCES}"
            raise contract.ContractError(what, f"{len(samples)} of {label}", len(names), fix)
        order = torch.randperm(len(names), generator=contract.generator(args.seed, "compose_real", label))
        chosen = zip(samples, order.tolist(), strict=False)  # as many as there are samples
        clips |= {f"{label}/{sample}.mp4": (label, names[i]) for sample, i in chosen}
    inputs = source.check(f"train/{label}.{kind}" for label in args.classes for kind in ("npy", "csv"))
    output = contract.Output(args, f"03_samples/ipc{args.ipc}/real", {"ipc": args.ipc}, inputs, list(clips))
    for file in contract.bar(output.mine(list(clips), lambda file: [file]), desc="real clips"):
        media.write_mp4(output.folder / file, real_video(args, *clips[file]), FPS)
    output.finish()


def autoencoder_psnr(args):
    """Peak signal-to-noise ratio in dB of the test clips through the VAE at generator size, per clip."""
    folder, source, values = common.model_folder(args, ("vae",)), clips_folder(args), []
    vae = common.load_part(folder / "vae", "vae", torch.device("cpu"), torch.float32)
    clips = [(c, row["name"]) for c in args.classes for row in source.load(f"test/{c}.csv")]
    for clip in contract.bar(clips, desc="VAE"):
        x = torch.from_numpy(real_video(args, *clip)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * np.log10(4 / (y - x).square().mean().item()))
    return {"clips": len(values), "mean": round(float(np.mean(values)), 2), "least": round(min(values), 2)}


def generated(args, name):
    """A set of 03 as the networks see it, uint8 [n, 16, S, S, 3], and its n classes."""
    folder = args.work_dir / "demo" / f"03_samples/ipc{args.ipc}" / name
    videos = sorted(path.relative_to(folder) for path in folder.glob("*/*.mp4"))
    return media.network_clips(folder, (videos, None), args.spec), [path.parent.name for path in videos]


def told_by_colours(args, sets):
    """{set: % of classes that a random forest tells from mean colours}, in five folds; by chance 12.5.

    As many freshly drawn clips stand beside, each with a look of its own.
    """
    values = {name: generated(args, name) for name in sets}
    count = max(len(labels) for _, labels in values.values())
    values["drawn clips"] = draw_corpus(count, CORPUS_SEED)[0], (CLASSES * count)[:count]
    folds, found = StratifiedKFold(5, shuffle=True, random_state=0), {}
    for name, (clips, labels) in values.items():
        forest = RandomForestClassifier(500, random_state=0)
        rates = cross_val_score(forest, clips.mean((1, 2, 3)), labels, cv=folds)
        found[name] = round(100 * rates.mean(), 2)
    return found


def nearest(videos, training):
    """Quantiles of the videos' distances to their nearest training clips: rms difference in grey levels.

    videos: uint8 [n, 16, S, S, 3]. training: float32 [m, d], the training clips, plain and mirrored.
    """
    flat = torch.from_numpy(videos).flatten(1).float()
    squared = flat.square().sum(1, keepdim=True) - 2 * flat @ training.T + training.square().sum(1)
    values = (squared.clamp(min=0).amin(1) / flat.shape[1]).sqrt().numpy()
    return {"videos": len(values)} | {
        k: round(float(np.quantile(values, q)), 2) for k, q in QUANTILES.items()
    }


def distances(args, sets):
    """{set: nearest} of the test clips and of the sets of 03."""
    source = clips_folder(args)
    clips = [[source.load(f"{s}/{c}.npy")[:, 0] for c in args.classes] for s in ("train", "test")]
    train, test = map(np.concatenate, clips)  # uint8 [n, 16, S, S, 3]
    training = torch.from_numpy(np.concatenate([train, train[:, :, :, ::-1]])).flatten(1).float()
    values = {"test clips": nearest(test, training)}
    for name in sets:
        values[f"{name} samples"] = nearest(generated(args, name)[0], training)
    return values


def encode(vae, clips):
    """Scaled mean latents [n, 4, 16, h, w] of clips uint8 [n, 16, H, W, 3]."""
    x = torch.from_numpy(clips).movedim(-1, 2).float() / 127.5 - 1  # [n, 16, 3, H, W]
    z = vae.encode(x.flatten(0, 1)).latent_dist.mean.unflatten(0, x.shape[:2]).movedim(1, 2)
    return z * vae.config.scaling_factor


@torch.inference_mode()
def prediction_errors(args):
    """{timestep: {caption: squared error of the U-Net's predicted clips, as a share of their variance}}.

    1 is what the mean clip has. On drawn clips that the training has not seen, in the dtype of stage 03.
    """
    model, (clips, _), cpu = common.model_folder(args), draw_corpus(64, CORPUS_SEED), torch.device("cpu")
    vae = common.load_part(model / "vae", "vae", cpu, torch.float32)
    unet = common.load_part(model / "unet", "unet", cpu, getattr(torch, contract.automatic("dtype", "cpu")))
    prompts, found = contract.read(ROOT / "prompts/demo.json"), {}
    embeddings = common.embed(model, prompts, cpu)
    right = torch.cat([embeddings[prompts[label]] for label in CLASSES]).repeat(8, 1, 1)  # as they are drawn
    captions = {"right": right, "none": embeddings[""].expand_as(right), "wrong": right.roll(1, 0)}
    z = encode(vae, clips)
    scheduler, variance = DDIMScheduler.from_pretrained(model / "scheduler"), (z - z.mean(0)).square().mean()
    for t in NOISY:
        noise = torch.randn(z.shape, generator=contract.generator(CORPUS_SEED, "errors", t))
        alpha = scheduler.alphas_cumprod[t]
        noised = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        for name, states in captions.items():
            batches = zip(noised.split(16), states.to(unet.dtype).split(16), strict=True)
            predicted = torch.cat([unet(one.to(unet.dtype), t, text).sample.float() for one, text in batches])
            error = (predicted - noise).square().mean() * (1 - alpha) / alpha / variance
            found.setdefault(str(t), {})[name] = round(error.item(), 3)
    return found


def measure(args):
    train_full(args)
    run(args, "02_kmeans_prototypes.py", args.ipc)
    for sampler in ("naive", "gvd"):
        run(args, "03_guided_sample.py", args.ipc, "--sampler", sampler)
    places = {"in-order": args, **{order: reorder(args, order) for order in ("shuffled", "one")}}
    for order, place in places.items():
        words = ("--classes", ",".join(PAIR), "--set", f"epochs={PAIR_EPOCHS}", "--name", f"pair-{order}")
        run(place, "05_train_eval.py", "--train-on", "full", *words)
    pair = {order: top1(place, "full", f"pair-{order}") for order, place in places.items()}
    rates = recognised(args, ("naive", "gvd"))
    measured = {
        "full data, top-1 %": top1(args, "full", "full"),
        "order pair, top-1 % by the frames seen": pair,
        "autoencoder on test clips, dB": autoencoder_psnr(args),
        "samples recognised, %": rates,
        "error of predicted clips, of their variance, by timestep and caption": prediction_errors(args),
        "classes told by mean colours, %": told_by_colours(args, rates),
        "distance to the nearest training clip, grey levels": distances(args, rates),
    }
    report(args, "measured.json", measured)


def sets(args):
    args = argparse.Namespace(**{**vars(args), "work_dir": args.work_dir / "sets"})
    run(args, "01_encode_latents.py")
    rows = [("set", "n", "top1_mean", "top1_std", "top1_values", "bytes")]

    def add(name, folders):
        """A row of the table, which is written with each: the whole takes more than an hour."""
        if args.dry_run:
            return
        results = [found(args, f"ipc{args.ipc}", folder, RESULT) for folder in folders]
        values = [value for result in results for value in result["top1"]["values"]]
        size = round(statistics.fmean(result["bytes"] for result in results))
        rows.append([name, len(values), *summary(values), size])
        report(args, f"sets_ipc{args.ipc}.csv", rows)

    run(args, "05_train_eval.py", args.ipc, "--train-on", "random", "--repeats", RANDOM)
    add("random", ["random"])
    for row, (sampler, cluster, number) in SETS.items():
        words = ["--sampler", sampler]
        if row == "tuned":
            run(args, "tools/finetune_unet.py")
            words += ["--unet", args.work_dir / "demo/03_unet/default"]
        run(args, "02_kmeans_prototypes.py", args.ipc, "--cluster", cluster)
        names = [f"{row}-seed{seed}" for seed in range(number)]
        for seed, name in enumerate(names):
            ours = "--seed", seed
            run(args, "03_guided_sample.py", args.ipc, "--name", name, *words, *ours)
            run(args, "04_mvic_compose.py", args.ipc, "--samples", name, "--name", name, *ours)
            run(args, "05_train_eval.py", args.ipc, "--train-on", name, "--repeats", 1, *ours)
        add(row, names)


def validation(args):
    """The arguments for the validation split, with a data root and a work folder of its own; draws it."""
    folders = {name: getattr(args, name) / "validation" for name in ("work_dir", "data_root")}
    args = argparse.Namespace(**{**vars(args), **folders})
    draw = [sys.executable, ROOT / "demo/draw_videos.py", "--data-root", args.data_root, "--validation"]
    if not args.dry_run:
        subprocess.run(draw, check=True)
    run(args, "01_encode_latents.py")
    return args


def settings(args):
    args = validation(args)
    run(args, "02_kmeans_prototypes.py", args.ipc)
    for name, (of_03, of_04) in SETTINGS.items():
        if name != "random":
            run(args, "03_guided_sample.py", args.ipc, "--name", name, *of_03.split())
            run(args, "04_mvic_compose.py", args.ipc, "--samples", name, "--name", name, *of_04.split())
        run(args, "05_train_eval.py", args.ipc, "--train-on", name)
    values = {name: summary(top1(args, f"ipc{args.ipc}", name)["values"]) for name in SETTINGS}
    rows = [[name, " ".join(options).strip(), *values[name]] for name, options in SETTINGS.items()]
    report(args, "settings.csv", [("set", "options", "top1_mean", "top1_std", "top1_values"), *rows])


def compose_real(args):
    run(args, "01_encode_latents.py")
    write_real_samples(args)
    run(args, "04_mvic_compose.py", args.ipc, "--samples", "real", "--name", "real-composed")
    run(args, "05_train_eval.py", args.ipc, "--train-on", "real-composed")


@torch.inference_mode()
def bring_back(model, clips, label, first, cfg, steps):
    """Clips of a class, noised to the largest DDIM timestep <= first and denoised; at 1000 from noise alone.

    clips: uint8 [n, 16, H, W, 3], the result too. cfg: classifier-free guidance scale.
    """
    cpu, prompt = torch.device("cpu"), contract.read(ROOT / "prompts/demo.json")[label]
    vae = common.load_part(model / "vae", "vae", cpu, torch.float32)
    unet = common.load_part(model / "unet", "unet", cpu, torch.bfloat16)
    states = common.embed(model, {label: prompt}, cpu)
    states = torch.cat([states[""], states[prompt]]).to(unet.dtype).repeat_interleave(len(clips), 0)
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(steps)
    z = encode(vae, clips)
    noise = torch.randn(z.shape, generator=contract.generator(CORPUS_SEED, "take-over", label))
    times = [t for t in scheduler.timesteps if t <= first]
    if times:
        z = (
            noise
            if first == scheduler.config.num_train_timesteps
            else scheduler.add_noise(z, noise, times[0])
        )
    for t in times:
        without_text, with_text = unet(torch.cat([z, z]).to(unet.dtype), t, states).sample.float().chunk(2)
        z = scheduler.step(without_text + cfg * (with_text - without_text), t, z).prev_sample
    return np.stack([common.decode(vae, latents) for latents in z.movedim(1, 2)])


def write_take_over(args, first):
    """03_samples/ipc<K>/take-over-<first>: freshly drawn clips in the place of draws, brought back."""
    model, number = common.model_folder(args), args.ipc * SOURCES
    inputs = {part: common.folder_hash(model / part) for part in common.CONFIGS}
    names = {c: [f"{c}/{k}_{d}.mp4" for k in range(args.ipc) for d in range(SOURCES)] for c in args.classes}
    wanted, parameters = sum(names.values(), []), {"ipc": args.ipc, "first": first}
    output = contract.Output(args, f"03_samples/ipc{args.ipc}/take-over-{first}", parameters, inputs, wanted)
    clips = draw_corpus(number * len(CLASSES), CORPUS_SEED)[0] if output.todo else None
    for label in output.mine(args.classes, names.get):
        videos = bring_back(model, clips[CLASSES.index(label) :: len(CLASSES)], label, first, CFG, STEPS)
        for name, video in zip(names[label], videos, strict=True):
            media.write_mp4(output.folder / name, video, FPS)
    output.finish()


def take_over(args):
    args, rows = validation(args), [("timestep", "top1_mean", "top1_std", "top1_values")]
    for first in TAKE_OVER:
        write_take_over(args, first)
        name = f"take-over-{first}"
        run(args, "04_mvic_compose.py", args.ipc, "--samples", name, "--name", name)
        run(args, "05_train_eval.py", args.ipc, "--train-on", name)
        rows.append([first, *summary(top1(args, f"ipc{args.ipc}", name)["values"])])
    report(args, "take_over.csv", rows)


def finetune(args):
    demo, sets = args.work_dir / "demo", ("captions_before", "captions_after")
    words, unet = (
        ("--sampler", "naive", "--draws", DRAWS, "--prompt-file", CAPTIONS),
        demo / "03_unet/captions",
    )
    train_full(args)
    run(args, "03_guided_sample.py", args.ipc, "--name", sets[0], *words)
    run(args, "tools/finetune_unet.py", "--name", "captions", "--prompt-file", CAPTIONS)
    run(args, "03_guided_sample.py", args.ipc, "--name", sets[1], *words, "--unet", unet)
    rates = recognised(args, sets)
    parameters = contract.read(unet / "manifest.json")["parameters"]
    result = {
        "prompts": contract.read(CAPTIONS),
        "commands": [c.replace(f"{demo}/", "work/demo/").replace(f"{ROOT}/", "") for c in args.commands],
        "fine-tuning": {name: parameters[name] for name in ("steps", "batch", "lr")},
        "samples recognised, %": {name.removeprefix("captions_"): rates[name] for name in sets},
    }
    report(args, "finetune.json", result)


EXPERIMENTS = (measure, sets, settings, compose_real, take_over, finetune)
EXPERIMENTS = {function.__name__.replace("_", "-"): function for function in EXPERIMENTS}


def estimate(args):
    """Of the two folders that are written here; the stages print their own."""
    videos = SOURCES * args.ipc * len(args.classes)
    cost = {"03_samples": ("videos", videos, 0.02 * videos, 2.5e3 * videos, "one CPU core")}
    return cost | {"01_clips": ("files", 8, 5, 3.3e7, "one CPU core")}


def main(args):
    EXPERIMENTS[args.experiment](args)


if __name__ == "__main__":
    contract.run(parse_args, main, estimate)
