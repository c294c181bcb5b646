"""Speed and memory of stage 03 beside diffusers' own pipeline, on the same weights, prompts, steps and dtype.

The stage runs as its command does, --sampler naive (the guidance's arithmetic is done there too, with strength 0), in
batches; its time is that from the end of one batch to the end of the next, .npy and .mp4 included. The stock
TextToVideoSDPipeline is called as its documentation shows, one video per call, then export_to_video; it stays on the
device (the documentation's offloading would only slow it down). Each runs in a process of its own. Models are not loaded
within the times, nor is either's first batch or call.

Reads:   a model's folder in the published layout; prompts/demo.json
Writes:  nothing but --json F
Run:     python tools/bench_sampling.py --json bench.json
         python tools/bench_sampling.py --model FOLDER --steps 50 --cfg 9 --json bench.json    on a GPU
Cost:    demo model on two CPU cores: 2 min. Published size on an A100, by estimate: 15 min
Expect:  at least 1.5 times as many videos per minute as the pipeline; the same peak memory at every IPC
"""

import argparse
import json
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
GPU_SIZES = ("256x256", "448x256", "576x320")
IPCS = (1, 8, 16)  # videos per class at which the peak memory is compared
MEMORY_STEPS = 2  # sampling steps there: memory does not depend on them


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(REPO / "demo/models/t2v"), help="folder in the published layout (demo/models/t2v)"
    )
    parser.add_argument("--device", help="cpu or cuda (a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of both (bfloat16 where the device has it)"
    )
    parser.add_argument("--sizes", help=f"WxH, separated by commas (32x32 on a CPU; {','.join(GPU_SIZES)})")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps (25)")
    parser.add_argument("--cfg", type=float, default=2.0, help="classifier-free guidance scale (2)")
    parser.add_argument("--batches", type=int, default=3, help="batches of the stage, the first untimed (3)")
    parser.add_argument("--calls", type=int, default=5, help="calls of the pipeline, the first untimed (5)")
    parser.add_argument("--batch", type=int, default=8, help="videos per batch of the stage (8)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own: stage, stock or forward
    parser.add_argument("--ipc", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batches < 2 or args.calls < 2 or not 1 <= args.batch <= 8 or args.steps < 1:
        parser.error("at least 2 --batches, 2 --calls and 1 of --steps; --batch between 1 and 8")
    return args


def spawn(part, args, **changed):
    """Runs one part in a process of its own: what it found, as a dictionary."""
    options = {"model": args.model, "device": args.device, "dtype": args.dtype, "sizes": args.sizes, "steps": args.steps}
    options |= {"cfg": args.cfg, "batches": args.batches, "calls": args.calls, "batch": args.batch, "part": part, **changed}
    words = [sys.executable, __file__, *(w for k, v in options.items() for w in (f"--{k}", str(v)))]
    run = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if run.returncode:
        sys.exit(f"error: the {part} part failed\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_memory(device):
    """Gigabytes: allocated on a GPU, resident in the process on a CPU."""
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return torch.cuda.max_memory_allocated(device) / 1e9


def run_stage(args):
    """Stage 03 as its command runs it: seconds per video and peak memory. Classes are batches."""
    ipc, batches = args.ipc or args.batch, 1 if args.ipc else args.batches
    classes = sorted(json.loads((REPO / "prompts/demo.json").read_text()))[:batches]
    work = Path(tempfile.mkdtemp())
    try:
        sys.argv = [str(REPO / "03_guided_sample.py"), "demo", str(ipc), "--sampler", "naive", "--unet", "published"]
        sys.argv += ["--model", args.model, "--work-dir", str(work), "--device", args.device, "--dtype", args.dtype]
        sys.argv += ["--size", args.sizes, "--steps", str(args.steps), "--cfg", str(args.cfg)]
        sys.argv += ["--draws", str(-(-batches // len(classes))), "--classes", ",".join(classes)]
        sys.path.insert(0, str(REPO))
        runpy.run_path(sys.argv[0], run_name="__main__")
        done = sorted(path.stat().st_mtime for path in work.rglob("*.mp4"))
    finally:
        shutil.rmtree(work)
    ends = done[ipc - 1 :: ipc]
    seconds = [(b - a) / ipc for a, b in zip(ends, ends[1:], strict=False)]
    return {"seconds per video": seconds, "peak memory in GB": peak_memory(args.device)}


def run_stock(args):
    """The stock pipeline, one video per call: seconds per video and peak memory."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from diffusers.utils import export_to_video
    from transformers import CLIPTextModel, CLIPTokenizer

    dtype, model = getattr(torch, args.dtype), Path(args.model)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    networks = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {}
    for name, kind in networks.items():
        variant = "fp16" if any(".fp16." in path.name for path in (model / name).iterdir()) else None
        parts[name] = kind.from_pretrained(model / name, torch_dtype=dtype, variant=variant)
    parts |= {"tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer")}
    pipe = TextToVideoSDPipeline(scheduler=DDIMScheduler.from_pretrained(model / "scheduler"), **parts).to(args.device)
    width, height = map(int, args.sizes.split("x"))
    prompts, seconds = list(json.loads((REPO / "prompts/demo.json").read_text()).values()), []
    with tempfile.TemporaryDirectory() as folder:
        for call in range(args.calls):
            start = time.perf_counter()
            options = {"num_inference_steps": args.steps, "guidance_scale": args.cfg, "num_frames": 16}
            frames = pipe(prompts[call % len(prompts)], height=height, width=width, **options).frames[0]
            export_to_video(frames, f"{folder}/{call}.mp4", fps=8)
            seconds.append(time.perf_counter() - start)
    return {"seconds per video": seconds[1:], "peak memory in GB": peak_memory(args.device)}


def run_forward(args):
    """TFLOP of one forward for one video with classifier-free guidance, the device's matrix peak, and a profile."""
    import torch
    from diffusers import UNet3DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    sys.path.insert(0, str(REPO))
    import common

    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    unet = UNet3DConditionModel.from_config(UNet3DConditionModel.load_config(Path(args.model) / "unet"))
    unet = unet.to(device, dtype).eval().requires_grad_(False)  # the weights' values make no difference here
    width, height = (int(side) // common.vae_factor(Path(args.model)) for side in args.sizes.split("x"))
    x = torch.randn(2, 4, 16, height, width, device=device, dtype=dtype)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            unet(x, 500, states)
        unet.set_attn_processor(runpy.run_path(str(REPO / "03_guided_sample.py"))["PromptAttention"]())
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as profile:
            unet(x, 500, states, cross_attention_kwargs={"prompts": 2})
            synchronise()
        side = 1024 if device.type == "cpu" else 8192
        a, times = torch.randn(side, side, device=device, dtype=dtype), []
        for _ in range(10):
            synchronise()
            start = time.perf_counter()
            a @ a
            synchronise()
            times.append(time.perf_counter() - start)
    where = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    rows = sorted(((getattr(row, where), row.key) for row in profile.key_averages()), reverse=True)
    total = sum(spent for spent, _ in rows)
    shares = {key: round(spent / total, 3) for spent, key in rows[:8]}
    return {"TFLOP": counter.get_total_flops() / 1e12, "peak": 2 * side**3 / min(times) / 1e12, "profile": shares}


def main():
    args = parse_args()
    if args.part:
        return print(json.dumps({"stage": run_stage, "stock": run_stock, "forward": run_forward}[args.part](args)))
    sys.path.insert(0, str(REPO))
    import torch

    import contract

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if contract.has_bfloat16(args.device) else "float32")
    sizes = (args.sizes or ("32x32" if args.device == "cpu" else ",".join(GPU_SIZES))).split(",")
    name = torch.cuda.get_device_name(args.device) if args.device != "cpu" else f"{len(os.sched_getaffinity(0))} CPU cores"
    found = {"device": name, "dtype": args.dtype, "steps": args.steps, "batch": args.batch, "sizes": {}, "memory": {}}
    print(f"{name}, {args.dtype}, {args.steps} steps, the stage in batches of {args.batch}, the pipeline one by one")
    for size in sizes:
        forward, stage, stock = (spawn(part, args, sizes=size) for part in ("forward", "stage", "stock"))
        ours, theirs = (statistics.median(part["seconds per video"]) for part in (stage, stock))
        row = {"stage": stage, "stock": stock, **forward, "ratio": theirs / ours}
        row["TFLOP/s"] = forward["TFLOP"] * args.steps / ours
        row["share of peak"] = row["TFLOP/s"] / forward["peak"]
        found["sizes"][size] = row
        print(
            f"{size}: {ours:.2f} s per video, pipeline {theirs:.2f} s, ratio {row['ratio']:.2f}; "
            f"peak memory {stage['peak memory in GB']:.2f} GB, pipeline {stock['peak memory in GB']:.2f} GB; "
            f"{row['TFLOP/s']:.3f} TFLOP/s of {forward['peak']:.3f} TFLOP/s measured: {row['share of peak']:.0%}"
        )
        print("  a forward is spent in", ", ".join(f"{key} {share:.0%}" for key, share in forward["profile"].items()))
    for ipc in IPCS:
        part = spawn("stage", args, sizes=sizes[0], ipc=ipc, steps=MEMORY_STEPS)
        found["memory"][ipc] = part["peak memory in GB"]
    print(f"peak memory at {sizes[0]}:", ", ".join(f"IPC {ipc} {gb:.2f} GB" for ipc, gb in found["memory"].items()))
    if args.json:
        contract.write_json(args.json, found)


if __name__ == "__main__":
    main()
