"""What each stage takes on this machine, a GPU or a CPU, within a few minutes, without data or a download.

The networks have the published configuration and random weights, made in memory; `demo` takes the demo's own
model. A part has its share of the minutes; it is stopped when that is over, and says so. On a GPU every
figure has the peak memory of its part up to there beside it.

03             a step and a video of diffusers' TextToVideoSDPipeline, called as its documentation shows, and
               of stage 03 as at IPC 1 and 20; the peak is that of a large matrix product
01             the VAE, both ways, and a clip of stage 01 from its file
finetune_unet  a clip in a step of the fine-tuning, of all weights and of adapters
05             a clip of an epoch of stage 05, and the same with a DataLoader that decodes the videos
02             a class in stage 02, and scikit-learn's k-means on the raw latents, on one thread

Reads:   demo/models/t2v, with demo
Writes:  results/bench/<device>.json, after every figure; other sizes and models in it stay. --dry-run takes
         its hours from the file of the device at hand
Run:     python tools/bench.py                               on a GPU
         python tools/bench.py demo
         python tools/bench.py --size 64x64 --minutes 2      a rehearsal on a CPU
Cost:    --minutes, and what the libraries take to load. 40 GB of a GPU, by estimate; 64x64 on a CPU: 9 GB
Expect:  demo on two idle CPU cores: stock / ours at least 1.5
Differs: neither side encodes the prompt or writes an .mp4; a step of the fine-tuning writes no checkpoint
"""

import argparse
import gc
import importlib.util
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial, wraps
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # no bars within the table
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contract  # noqa: E402  isort: skip
import make_random_t2v as published  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import media  # noqa: E402

IPC, VIDEOS, RANK = 20, 100, 16  # videos of a class for k-means; of the adapters
TOKENS = 77  # of a prompt
FILM = {"hmdb51": (320, 240), "demo": (32, 32)}  # a video of the data set, 90 frames


class Late(BaseException):
    """The time of a part is over; no library takes it for an error of its own."""


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("what", nargs="?", choices=("real", "demo"), default="real", help="model and sizes (real)")
    add("--size", help="frame of the generated videos, WxH in pixels (448x256; demo 32x32)")
    add("--minutes", type=float, default=8, help="of all parts together (8)")
    parser.set_defaults(dry_run=False)
    args = parser.parse_args()
    args.dataset = "demo" if args.what == "demo" else "hmdb51"
    args.size = args.size or "{}x{}".format(*media.DATASETS[args.dataset]["size"])
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.size) or any(int(x) % 8 for x in args.size.split("x")):
        parser.error("--size: must be WxH with sides that are multiples of 8, as 448x256")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as every stage does; part of a CPU's name
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = getattr(torch, contract.automatic("dtype", args.device.type))
    args.rehearsal = args.what == "real" and args.device.type == "cpu"  # with as few clips as it takes
    return args


def load(script, args, *words):
    """A script of this project, and its arguments with their defaults."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, contract.ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [script, args.dataset, *words]
    own = module.parse_args()
    own.spec = own.spec | {"size": tuple(map(int, args.size.split("x")))}
    pixels = 4 if args.what == "demo" else 8  # of a side, for one of the latent
    own.shape = (4, common.NUM_FRAMES, own.spec["size"][1] // pixels, own.spec["size"][0] // pixels)
    return module, own


def network(part, args, dtype):
    """vae or unet: the demo's, or of the published configuration, as it is before training."""
    if args.what == "demo":
        return common.load_part(common.DEMO_MODEL / part, part, args.device, dtype)
    return published.make(part, args.device).to(args.device, dtype).eval().requires_grad_(False)


def now(args):
    """Seconds, when the device has done what it was told."""
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(args, call, most=3.0):
    """What a call takes: once to warm up, then the median of the calls of about `most` seconds."""
    call()
    times = [now(args)]
    while len(times) == 1 or times[-1] - times[0] < most:
        call()
        times.append(now(args))
    return statistics.median(np.diff(times))


# --- the parts: each yields (figure, value) as it is measured -----------------------------------------------


def sampling(args, folder):
    from diffusers import DDIMScheduler, TextToVideoSDPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # the pipeline is deprecated
    stage, own = load("03_guided_sample.py", args, str(IPC))
    peak = matrix_flop(args)
    yield "the peak, TFLOP/s", peak / 1e12
    steps, scheduler, times = own.steps, DDIMScheduler(**published.SCHEDULER), []
    step = scheduler.step

    @wraps(step)  # the pipeline asks for its parameters
    def timed(*words, **options):
        result = step(*words, **options)
        times.append(now(args))
        return result

    def measure(call, share):
        """Seconds of a step, and of all and what follows: by two steps, then as many as there is time for."""
        end, n = time.monotonic() + share * (args.end - time.monotonic()), 2
        for _ in range(2):
            times.clear()
            call(n)
            taken, rest = statistics.median(np.diff(times)), now(args) - times[-1]  # the first step warms up
            n = min(steps, int((end - time.monotonic() - rest) / taken))
            if n <= 2:
                break
        return taken, steps * taken + rest

    scheduler.step = timed
    unet, vae = network("unet", args, args.dtype), network("vae", args, args.dtype)
    text, empty = torch.randn(2, 1, TOKENS, unet.config.cross_attention_dim, device=args.device)
    flop = count_flop(unet.config, stage.PromptAttention(), own.shape)
    pipe = TextToVideoSDPipeline(vae, None, None, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = dict(zip(("width", "height"), own.spec["size"], strict=True)) | {"guidance_scale": own.cfg}
    options |= {"prompt_embeds": text, "negative_prompt_embeds": empty}
    taken, stock = measure(lambda n: pipe(num_inference_steps=n, **options).frames[0], 0.25)
    yield "stock pipeline, s per step", taken
    yield f"stock pipeline, s per video of {steps} steps", stock

    def sample(videos, n):
        own.steps, names, z = n, [("a", k, 0) for k in range(videos)], torch.randn(videos, *own.shape)
        latents = stage.sample_batch(unet, scheduler, text, empty, z, names, own, args.device)
        for z in latents.transpose(1, 2):
            common.decode(vae, z)

    if args.device.type == "cpu":
        stage.keep_memory()
    unet.set_attn_processor(stage.PromptAttention())
    vae = vae.float()  # as the stage decodes
    for ipc, videos, share in ((1, 1, 0.3), (IPC, stage.micro_batch(own, args.device, own.shape), 0.8)):
        name = f"ours at IPC {ipc}, {videos} per forward"
        if 3 * videos * taken > args.end - time.monotonic():
            yield name, f"left out: a step would take about {videos * taken:.0f} s"
            continue
        taken, whole = measure(partial(sample, videos), share)
        yield f"{name}, s per step of a video", taken / videos
        yield f"{name}, s per video", whole / videos
        yield f"{name}, stock / ours", stock * videos / whole
        yield f"{name}, share of the peak", flop * videos / taken / peak
        yield "seconds", whole / videos


def matrix_flop(args):
    """Of a second, in a product of large matrices."""
    n = 8192 if args.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=args.device).to(args.dtype)
    return 2 * n**3 / seconds(args, lambda: a @ b)


def count_flop(config, attention, shape):
    """Of a step of one video, which are two prompts; counted without computing."""
    from diffusers import UNet3DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet = UNet3DConditionModel.from_config(config)
        unet.set_attn_processor(attention)
        z, text = torch.empty(2, *shape), torch.empty(2, TOKENS, config.cross_attention_dim)
        unet(z, torch.tensor(1.0), text, cross_attention_kwargs={"prompts": 2})
    return counter.get_total_flops()


def encoding(args, folder):
    stage, own = load("01_encode_latents.py", args)
    vae, film = network("vae", args, torch.float32), write_film(args, folder)
    z = torch.randn(own.shape, device=args.device).transpose(0, 1)  # [16, 4, h, w]
    frames = media.resize_frames(read_film(film), own.spec["size"])
    yield "encode, s per video", seconds(args, lambda: stage.encode(vae, frames, film))
    yield "decode, s per video", seconds(args, lambda: common.decode(vae, z))

    def clip():
        frames = read_film(film)
        media.network_clip(frames, own.spec)
        stage.encode(vae, media.resize_frames(frames, own.spec["size"]), film)

    yield "seconds", seconds(args, clip)


def fine_tuning(args, folder):
    from diffusers import DDIMScheduler

    (tool, own), scheduler = load("tools/finetune_unet.py", args), DDIMScheduler(**published.SCHEDULER)
    device, dtype, count = args.device, args.dtype, 1 if args.rehearsal else own.batch
    part = count if device.type == "cpu" else own.micro_batch

    def training_step(rank):
        """A step on `count` random clips, as a function."""
        unet = network("unet", args, torch.float32)
        text = torch.randn(count, TOKENS, unet.config.cross_attention_dim, device=device)
        trained, weights = tool.prepare(unet, device, rank, own.seed)
        weights = list(weights.values())
        average = [p.detach().clone() for p in weights]
        optimizer = torch.optim.AdamW(weights, lr=own.lr, fused=device.type == "cuda")

        def step():
            (x0, noise), t = torch.randn(2, count, *own.shape), torch.arange(count)
            optimizer.zero_grad()
            tool.backward(trained, scheduler, x0, noise, t, text, part, device, dtype)
            torch.nn.utils.clip_grad_norm_(weights, tool.CLIP_NORM)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - tool.EMA)

        return step

    for kind, rank in (("adapters", RANK), ("all weights", None)):
        if rank and not importlib.util.find_spec("peft"):
            yield kind, "left out: no module peft"
        elif not rank and args.rehearsal:
            yield kind, "left out on a CPU: 28 GB of memory"
        else:
            gc.collect()  # the network of the adapters
            yield f"seconds, {kind}", seconds(args, training_step(rank), 10) / count


def training(args, folder):
    stage, own = load("05_train_eval.py", args, str(IPC), "--set", "epochs=1")
    side, classes = own.spec["side"], len(own.spec["classes"])
    count = 4 if args.rehearsal else IPC * classes
    batch = min(count, stage.schedule(count, own.protocol)[0])
    clips = torch.randint(256, (count, 16, side, side, 3), dtype=torch.uint8, device=args.device)
    data = clips, torch.arange(count, device=args.device) % classes, None, own, 0, args.dtype
    ours = seconds(args, lambda: stage.train(*data, folder / "none.pt"), 10) / count
    yield "seconds, minic3d", ours

    net = common.MiniC3D(classes).to(args.device, memory_format=torch.channels_last_3d)
    optimizer = torch.optim.SGD(net.parameters(), own.protocol["lr"], stage.MOMENTUM, 0, stage.WEIGHT_DECAY)
    film, workers = write_film(args, folder), 0 if args.device.type == "cpu" else torch.get_num_threads()

    def read(indices):
        clips = [media.network_clip(read_film(film), own.spec) for _ in indices]
        return common.to_input(torch.from_numpy(np.stack(clips))), torch.tensor(indices) % classes

    loader = torch.utils.data.DataLoader(range(count), batch, True, num_workers=workers, collate_fn=read)

    def epoch():
        for x, labels in loader:
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
                logits = net(x.to(args.device).contiguous(memory_format=torch.channels_last_3d)).float()
            loss = torch.nn.functional.cross_entropy(logits, labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    plain = seconds(args, epoch, 10) / count
    yield f"DataLoader with {workers} workers, s per clip", plain
    yield "DataLoader / ours", plain / ours


def kmeans(args, folder):
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    stage, own = load("02_kmeans_prototypes.py", args, str(IPC))
    latents = np.random.default_rng(0).standard_normal((VIDEOS, *own.shape)).astype(np.float16)
    flat = latents.reshape(VIDEOS, -1).astype(np.float32)
    with threadpool_limits(1):
        ours = seconds(args, lambda: stage.prototypes_of(latents, IPC, 0, ""))
        yield "seconds, direct", ours
        theirs = KMeans(IPC, n_init=stage.N_INIT, random_state=0)
        plain = seconds(args, lambda: theirs.fit(flat))
    yield "scikit-learn, s per class", plain
    yield "scikit-learn / ours", plain / ours


def write_film(args, folder):
    """A video as the data set has them, Xvid in .avi: soft shapes that move."""
    cv2, size, path = media.opencv(), FILM[args.dataset], folder / "film.avi"
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"XVID"), 25, size)
    for shift in range(90):
        writer.write(np.roll(picture, shift, 1))
    writer.release()
    return path


def read_film(path):
    """16 of its frames, by OpenCV alone."""
    kept, _ = media.opencv_frames(path, media.uniform_frames(90))
    return np.stack([*kept.values()])


PARTS = {  # by what --dry-run knows a script: the part, its share of the time that is left
    "03": (sampling, 0.5), "finetune_unet": (fine_tuning, 0.4), "05": (training, 0.5),
    "01": (encoding, 0.5), "02": (kmeans, 1.0),
}  # fmt: skip


def main(args):
    path, failed, end = common.bench_file(args.device), [], time.monotonic() + 60 * args.minutes
    results = contract.read(path) or {}
    figures = results.setdefault(f"{args.what} {args.size}", {})
    figures |= {"torch": torch.__version__, "dtype": str(args.dtype)[6:], "minutes": args.minutes}

    def stop(*_):
        raise Late

    signal.signal(signal.SIGALRM, stop)
    for part, (measure, share) in PARTS.items():
        limit, record = max(1.0, share * (end - time.monotonic())), {}
        figures[part], args.end, gpu = record, time.monotonic() + limit, args.device.type == "cuda"
        signal.setitimer(signal.ITIMER_REAL, limit)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                for name, value in measure(args, Path(folder)):
                    record[name] = value if isinstance(value, str) else float(f"{value:.4g}")
                    memory = ""
                    if gpu:
                        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
                        record[f"{name}: peak memory"] = memory
                    contract.say(f"{part:13}  {name:55}  {record[name]}  {memory}")
                    contract.save(path, results)
        except Late:
            record["note"] = f"stopped after its {limit:.0f} s"
        except (ImportError, torch.OutOfMemoryError, contract.ContractError) as error:
            record["note"] = f"left out: {str(error).splitlines()[0]}"
        except Exception as error:  # the other parts are worth their minutes on a GPU that is lent
            traceback.print_exc()
            record["note"] = f"failed: {type(error).__name__}: {error}"
            failed.append(part)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()  # networks that hold each other
        if "note" in record:
            contract.say(f"{part:13}  {record['note']}")
            contract.save(path, results)
    contract.say(path)
    if failed:
        raise contract.ContractError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    contract.run(parse_args, main, lambda args: {})
