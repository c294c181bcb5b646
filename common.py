"""What more than one stage uses: the guided DDIM step, the frame-wise decay, MiniC3D, and the agreements of the stages.

Agreements are the data sets and their splits, the sizes, the model's parts, and how a video is read and written. How a
folder of artifacts is identified, checked and written is in contract.py.
"""

import argparse
import csv
import io
import re
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import nn

from contract import ContractError, Hashes, Missing, atomic, digest, python, read_json, work_folder

NUM_FRAMES = 16  # frames of every clip, real or generated (section 4.1)


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def linear_decay(strength, num_frames=NUM_FRAMES, first=0):
    """Guidance strength per frame, eq. 8: lambda_f = lambda * (1 - f / F), f = first .. F-1+first. Returns float32 [F]."""
    return strength * (1 - torch.arange(first, first + num_frames, dtype=torch.float32) / num_frames)


def guided_ddim_step(scheduler, noise_pred, t, latents, prototypes, strengths, form="ddim", step_noise=None):
    """One step of the sampler, bent towards the prototypes (eq. 6, 9 and 10). Returns z_{t-1}.

    scheduler: a diffusers scheduler with its timesteps set: DDIM, or with form "ddim" another with alphas_cumprod.
    noise_pred, latents, prototypes: float32 [n, 4, F, h, w], the noise prediction after classifier-free guidance. t: the
    timestep. strengths: [F] (linear_decay). form: where the difference c - x0_hat goes,

    ddim           eps' = eps - lambda_f * sqrt(1 - abar_t) * (c - x0_hat). The paper's parent prints a plus, which moves
                   the sample away from the prototype; its Algorithm 1 has this sign (paper_facts.md 2.1)
    x0             x0' = x0_hat + lambda_f * (c - x0_hat), eps' from x0'
    released-ddim  z_{t-1} = DDIM(eps) + lambda_f * sqrt(abar_t) * (c - x0_hat), as the parent's released code has it
    released-ddpm  z_{t-1} = DDPM mean + lambda_f * sigma_t * (c - x0_hat) + sigma_t * step_noise, likewise (2.2 there);
                   sigma_t is the posterior's standard deviation, step_noise is standard normal [n, 4, F, h, w]

    With strength 0 the result is the library's own step, bit for bit.
    """
    alpha = scheduler.alphas_cumprod[t].to(latents)
    x0_hat = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    towards = prototypes - x0_hat  # eq. 6
    strengths = strengths.to(latents).view(1, 1, -1, 1, 1)
    if form in ("ddim", "x0"):
        scale = strengths * ((1 - alpha).sqrt() if form == "ddim" else (alpha / (1 - alpha)).sqrt())
        return scheduler.step(noise_pred - scale * towards, t, latents).prev_sample
    if form == "released-ddim":
        return scheduler.step(noise_pred, t, latents).prev_sample + strengths * alpha.sqrt() * towards
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    previous = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).to(latents)
    sigma = ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
    stepped = scheduler.step(noise_pred, t, latents, eta=1.0, variance_noise=step_noise).prev_sample  # DDIM, eta 1: DDPM
    return stepped + strengths * sigma * towards


class MiniC3D(nn.Module):
    """The evaluation network: three strided 3D convolutions without normalisation (protocol.md 3.1).

    forward: float [n, 3, 16, S, S] -> logits [n, num_classes]. S from 43 px up; 3,647,666 parameters at 50 classes.
    """

    def __init__(self, num_classes):
        super().__init__()
        shape = dict(kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))
        self.blocks = nn.Sequential(
            nn.Conv3d(3, 64, **shape), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(64, 128, **shape), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(128, 128, **shape), nn.ReLU(), nn.MaxPool3d(2),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv3d(128, num_classes, 1)

    def forward(self, clips):
        features = self.blocks(clips)  # [n, 128, 4, S', S'], S' = 2 at 112 px and 1 at 48 px
        height, width = features.shape[-2:]
        pooled = nn.functional.avg_pool3d(features, (2, min(2, height), min(2, width)), stride=1)
        logits = self.head(self.dropout(pooled)).flatten(3).mean(3)  # one position is left in space: [n, classes, 3]
        return logits.amax(2)


def soft_label_loss(logits, labels, teacher_logits, alpha, tau):
    """(1 - alpha) * CE(y, p_S) + alpha * tau^2 * KL(p_T^tau || p_S^tau), eq. 11; the mean over the batch.

    logits, teacher_logits: [n, classes]. labels: int64 [n]. alpha: weight of the teacher, 0 to 1 (its place and value are
    [INF]); tau: temperature, > 0 (3 in section 4.4.2); tau^2 keeps the gradient's size whatever the temperature [INF].
    """
    student, teacher = ((x / tau).log_softmax(1) for x in (logits, teacher_logits))
    divergence = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - alpha) * nn.functional.cross_entropy(logits, labels) + alpha * tau**2 * divergence


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------

HMDB51_CLASSES = tuple(
    """brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing
    flic_flac golf handstand hit hug jump kick kick_ball kiss laugh pick pour pullup punch push pushup ride_bike
    ride_horse run shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke somersault stand swing_baseball
    sword sword_exercise talk throw turn walk wave""".split()
)
UCF101_CLASSES = tuple(
    """ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball
    BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag
    BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen
    Diving Drumming Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut HammerThrow
    Hammering HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing
    JavelinThrow JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade Mixing
    MoppingFloor Nunchucks ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar
    PlayingPiano PlayingSitar PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting
    RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving
    SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus
    TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo""".split()
)
MINIUCF_CLASSES = tuple(  # 50 of UCF101's classes; not the set that is called UCF50
    """ApplyEyeMakeup BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk Biking Billiards BlowingCandles
    Bowling BreastStroke CleanAndJerk CliffDiving CricketShot Diving FloorGymnastics FrisbeeCatch GolfSwing HammerThrow
    HighJump HorseRace HorseRiding HulaHoop IceDancing JumpingJack Knitting MilitaryParade Mixing ParallelBars
    PlayingPiano PlayingViolin PoleVault PommelHorse Punch Rafting Rowing SkateBoarding Skiing Skijet SkyDiving
    SoccerPenalty StillRings SumoWrestling Surfing Swing TennisSwing TrampolineJumping UnevenBars VolleyballSpiking
    WritingOnBoard""".split()
)
DEMO_CLASSES = ("Cartwheel", "JumpingJack", "Kick", "Punch", "SitDown", "StandUp", "Walk", "Wave")

# Per data set: its classes in ASCII order; where the official archives unpack to below the data root; the generator's
# frame (width, height); the plain resize (width, height) and the centre crop (side) that make the network's frame
# (protocol.md 2); and the numbers of clips in the official lists (training, test).
DATASETS = {
    "hmdb51": dict(
        classes=HMDB51_CLASSES, videos="HMDB51/hmdb51_org", lists="HMDB51/testTrainMulti_7030_splits",
        size=(448, 256), resize=(160, 120), side=112, clips=(5236, 1530),
    ),
    "miniucf": dict(
        classes=MINIUCF_CLASSES, videos="UCF101/UCF-101", lists="UCF101/ucfTrainTestlist",
        size=(448, 256), resize=(160, 120), side=112, clips=(4662, 1861),
    ),
    "ucf101": dict(
        classes=UCF101_CLASSES, videos="UCF101/UCF-101", lists="UCF101/ucfTrainTestlist",
        size=(448, 256), resize=(160, 120), side=112, clips=(9537, 3783),
    ),
    "demo": dict(
        classes=DEMO_CLASSES, videos="demo/UCF-101", lists="demo/ucfTrainTestlist",
        size=(32, 32), resize=(48, 48), side=48, clips=(864, 336),
    ),
}  # fmt: skip

HOW_TO_GET = {
    "HMDB51": """Download hmdb51_org.rar (2 GB) and test_train_splits.rar from the official page,
https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/ , then (unrar or 7z x):
  mkdir -p {root}/HMDB51/hmdb51_org && cd {root}/HMDB51
  unrar x test_train_splits.rar
  unrar x hmdb51_org.rar hmdb51_org/
  cd hmdb51_org && for f in *.rar; do unrar x "$f" && rm "$f"; done
The folder must then look like this:
  {root}/HMDB51/hmdb51_org/<class>/<clip>.avi                         51 folders, 6,766 clips
  {root}/HMDB51/testTrainMulti_7030_splits/<class>_test_split1.txt    51 files for split 1""",
    "UCF101": """Download UCF101.rar (6.5 GB) and UCF101TrainTestSplits-RecognitionTask.zip from the official page,
https://www.crcv.ucf.edu/research/data-sets/ucf101/ , then (unrar or 7z x):
  mkdir -p {root}/UCF101 && cd {root}/UCF101
  unrar x UCF101.rar
  unzip UCF101TrainTestSplits-RecognitionTask.zip
The folder must then look like this:
  {root}/UCF101/UCF-101/<Class>/v_<Class>_g01_c01.avi        101 folders, 13,320 clips
  {root}/UCF101/ucfTrainTestlist/trainlist01.txt, testlist01.txt, classInd.txt""",
    "demo": """The demo's videos are drawn:
  python demo/draw_videos.py --data-root {root}""",
}


def check_name(name, source):
    """Returns `name`, one path component from a file that is not ours; ContractError when it could leave its folder.

    Only such a check is safe: HMDB51's names hold `# [ ] ! & ; ( ) % @` and begin with `-`, so names are never passed
    through a shell or a glob either.
    """
    if name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name) or len(name.encode()) > 250:
        raise ContractError(f"{source}: refused name {name!r}\n  expected: a plain file name below the data root")
    return name


def list_clips(dataset, data_root):
    """The clips of the official lists (split 1), sorted by class and name.

    Returns a list of (class, name without .avi, split, official): split is "train" or "test"; official is False for
    HMDB51's "unused" clips, which Dancing with Still Images and GVD train on too (protocol.md 1.2).
    Raises ContractError when the lists are missing or hold a line that is no clip of the data set.
    """
    spec = DATASETS[dataset]
    lists = Path(data_root) / spec["lists"]
    if dataset == "hmdb51":
        files = [(lists / f"{c}_test_split1.txt", c, None) for c in spec["classes"]]
    else:
        files = [(lists / "trainlist01.txt", None, "train"), (lists / "testlist01.txt", None, "test")]
    clips = {}
    for path, klass, split in files:
        if not path.is_file():
            raise Missing(missing_data(dataset, data_root, path))
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if dataset == "hmdb51":
                found = re.fullmatch(r"(.+)\.avi ([012])", line.strip())
                name, mark = found.groups() if found else (None, None)
                label, split, official = klass, "test" if mark == "2" else "train", mark != "0"
            else:
                found = re.fullmatch(r"([^/]+)/(.+)\.avi(?: (\d+))?", line.strip())
                label, name, official = (found.group(1), found.group(2), True) if found else (None, None, True)
            if not found:
                raise ContractError(f"{where}: refused {line.strip()!r}\n  expected: a <clip>.avi of the official list")
            check_name(name, where)
            if label not in spec["classes"] + (UCF101_CLASSES if dataset == "miniucf" else ()):
                raise ContractError(f"{where}: refused class {label!r}\n  expected: a class of {dataset}")
            if label not in spec["classes"]:
                continue  # MiniUCF reads UCF101's lists
            if clips.setdefault((label, name), (split, official)) != (split, official):
                raise ContractError(f"{where}: {name} stands twice, in training and in test")
    return [(label, name, *clips[label, name]) for label, name in sorted(clips)]


def missing_data(dataset, data_root, path):
    """The message for a data set that is not there."""
    how = HOW_TO_GET[DATASETS[dataset]["lists"].split("/")[0]].format(root=data_root)
    return f"{dataset}: {path} is missing\n{how}"


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

MODELSCOPE = "ali-vilab/text-to-video-ms-1.7b"  # weights CC-BY-NC 4.0
DEMO_MODEL = Path(__file__).resolve().parent / "demo" / "models" / "t2v"
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
NETWORKS = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "unet": "UNet3DConditionModel"}
UNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # of a fine-tuned U-Net
WEIGHTS = ("*.fp16.safetensors", "*.safetensors", "*.fp16.bin", "*.bin")  # the first kind that is there is downloaded


def model_folder(args, parts=PARTS):
    """The local folder of the text-to-video model in the published layout, with `parts`; a hub name is downloaded once.

    Raises Missing when it is not there or when a part, or its weights, are missing.
    """
    name = args.model or (DEMO_MODEL if args.dataset == "demo" else MODELSCOPE)
    folder = Path(name)
    if not folder.is_dir():
        if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/")):
            make = "\n  to make it: python demo/train_models.py" if name == DEMO_MODEL else ""
            raise Missing(f"{name} is missing\n  expected: a folder with {', '.join(PARTS)}{make}")
        try:
            folder = download(name, args.dry_run)
        except Exception as error:
            raise Missing(
                f"the model {name} is not on this machine and cannot be downloaded: {type(error).__name__}\n"
                f"  expected: network access, or a folder with {', '.join(PARTS)}\n"
                f"  where there is a network: hf download {name} --local-dir FOLDER ; then --model FOLDER"
            ) from None
    names = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
    get = f"to get it: hf download {MODELSCOPE} --local-dir FOLDER ; then --model FOLDER"
    get = "to make it: python demo/train_models.py" if name == DEMO_MODEL else get
    for part in parts:
        path = folder / part / names.get(part, "config.json")
        if not isinstance(read_json(path), dict):
            raise Missing(f"{path} is missing or no JSON object\n  expected: a folder with {', '.join(PARTS)}\n  {get}")
        if part in NETWORKS and not any(any(path.parent.glob(kind)) for kind in WEIGHTS):
            raise Missing(f"{path.parent} holds no weights\n  expected: *.safetensors or *.bin\n  {get}")
        if part == "tokenizer" and not any((path.parent / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise Missing(f"{path.parent} holds no vocabulary\n  expected: vocab.json and merges.txt\n  {get}")
    return folder


def download(name, local):
    """The folder of a hub's model: everything but the weights, and these in half precision where there are such.

    local: take what is on this machine already.
    """
    from huggingface_hub import snapshot_download

    def get(*patterns):
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=local))

    folder = get(*(f"{part}/{kind}" for part in PARTS for kind in ("*.json", "*.txt")))
    for part in NETWORKS:
        for kind in WEIGHTS:
            if any((get(f"{part}/{kind}") / part).glob(kind)):
                break
    return folder


def check_model(model, unet):
    """ContractError when a model is not of ModelScope's architecture, or a U-Net's folder does not fit its other parts."""
    text, vae = (read_json(model / part / "config.json") for part in ("text_encoder", "vae"))
    config, schedule = read_json(unet / "config.json"), read_json(model / "scheduler" / "scheduler_config.json")
    latent = vae.get("latent_channels")
    for path, what, expected, found in (
        (unet, "_class_name", NETWORKS["unet"], config.get("_class_name")),
        (model / "vae", "_class_name", NETWORKS["vae"], vae.get("_class_name")),
        (model / "text_encoder", "architectures", [NETWORKS["text_encoder"]], text.get("architectures")),
        (model / "vae", "latent_channels", 4, latent),
        (unet, "in_channels, out_channels", [latent] * 2, [config.get("in_channels", 4), config.get("out_channels", 4)]),
        (unet, "cross_attention_dim", text.get("hidden_size"), config.get("cross_attention_dim", 1024)),
        (model / "scheduler", "prediction_type", "epsilon", schedule.get("prediction_type", "epsilon")),
    ):
        if expected != found:
            raise ContractError(
                f"{path} is not of ModelScope's text-to-video architecture\n  expected: {what} {expected}\n"
                f"  found:    {found}\n  take {MODELSCOPE} or a fine-tune of it"
            )


def load_part(folder, part, device, dtype):
    """A network of the model (part: vae, text_encoder or unet) from its folder, in evaluation mode.

    Half-precision files are taken where present.
    """
    import diffusers
    import transformers
    from safetensors import SafetensorError

    kinds = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet3DConditionModel}
    kind = kinds.get(part, transformers.CLIPTextModel)
    variant = "fp16" if any(".fp16." in path.name for path in folder.iterdir()) else None
    options = {"dtype": dtype} if part == "text_encoder" else {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    try:
        network, report = kind.from_pretrained(folder, variant=variant, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContractError(f"{folder} cannot be loaded as {kind.__name__}\n  found: {error}") from None
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing := [key for key in missing if "position_ids" not in key]:
        raise ContractError(f"{folder} lacks {len(missing)} weights of {kind.__name__}, the first is {missing[0]}")
    return network.to(device).eval().requires_grad_(False)


def read_prompts(args):
    """{class: prompt} of --prompt-file, else of the data set; all empty with --prompt-file none.

    ContractError names a class without one.
    """
    if args.prompt_file == Path("none"):
        return dict.fromkeys(args.classes, "")
    file = "ucf101" if args.dataset == "miniucf" else args.dataset
    path = args.prompt_file or Path(__file__).parent / "prompts" / f"{file}.json"
    prompts = read_json(path)
    if not isinstance(prompts, dict):
        raise ContractError(f"{path} is missing or no JSON object\n  expected: {{class: prompt}}")
    for label in args.classes:
        if not isinstance(prompts.get(label), str):
            raise ContractError(f"{path}: no prompt for class {label}\n  expected: one for each of {args.dataset}")
    return {label: prompts[label] for label in args.classes}


def embed(folder, prompts, device):
    """{prompt: float32 [1, tokens, width]} by a model's text encoder, which is needed only here."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise ContractError(f"{folder / 'tokenizer'} cannot be loaded\n  found: {error}") from None
    encoder = load_part(folder / "text_encoder", "text_encoder", device, torch.float32)
    embeddings = {}
    for prompt in sorted(set(prompts)):
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(prompt, return_tensors="pt", **options).input_ids.to(device)
        with torch.inference_mode():
            embeddings[prompt] = encoder(ids).last_hidden_state
    return embeddings


# ---------------------------------------------------------------------------------------------------------------------
# VideoMAE: teacher of soft labels (section 3.5) and features of the metrics (appendix A)
# ---------------------------------------------------------------------------------------------------------------------

UCF101_VIDEOMAE = "nateraw/videomae-base-finetuned-ucf101"  # 101 outputs, weights CC-BY-NC 4.0
DEMO_VIDEOMAE = DEMO_MODEL.with_name("videomae")
VIDEOMAE_FILES = "a folder with config.json, preprocessor_config.json and model.safetensors"
VIDEOMAE_BATCH = 16  # clips
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0 to 1


def videomae_folder(args):
    """The folder of args.teacher, a folder or hub name (downloaded once); without it, of the data set's own VideoMAE.

    Raises Missing, with what to get, when it is not there.
    """
    name = args.teacher
    if name is None and args.dataset in ("miniucf", "ucf101"):
        name = UCF101_VIDEOMAE
    if name is None:
        own = args.dataset == "demo"
        name = DEMO_VIDEOMAE if own else work_folder(args, "05_networks", "videomae")
        script = "demo/train_teacher.py" if own else f"tools/train_teacher.py {args.dataset} --work-dir {args.work_dir}"
        if not name.is_dir():
            raise Missing(f"{name} is missing\n  expected: {VIDEOMAE_FILES}\n  to make it: {python()} {script}")
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise Missing(f"{name} is missing\n  expected: {VIDEOMAE_FILES}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*config.json", "model*.safetensors*", "pytorch_model*.bin*"]))
    except Exception as error:
        raise Missing(
            f"the model {name} is not on this machine and cannot be downloaded: {type(error).__name__}\n"
            f"  expected: network access, or {VIDEOMAE_FILES}\n"
            f"  where there is a network: hf download {name} --local-dir FOLDER ; then FOLDER instead of the name"
        ) from None


def videomae_hash(folder, args):
    """Content hash of what `load_videomae` reads; the folder may hold other files."""
    hashes = Hashes(args.work_dir)
    files = sorted(p for p in Path(folder).iterdir() if p.name.endswith(("config.json", ".safetensors", ".bin")))
    value = digest({path.name: hashes(path) for path in files})
    hashes.save()
    return value


def load_videomae(folder, device):
    """The VideoMAE classifier of a folder, float32, in evaluation mode. Returns (network, scale).

    network: transformers' VideoMAEForVideoClassification. scale: (S, mean, std) for `videomae_input`: the side of its
    frames from config.json, the rest from preprocessor_config.json (the library's defaults are not those of the weights).
    Raises ContractError when a file is missing or damaged, and when a weight is missing, unexpected or of another shape:
    transformers 5.5 to 5.17 drop the biases of queries and values.
    """
    import transformers
    from safetensors import SafetensorError

    kind, wanted = transformers.VideoMAEForVideoClassification, f"  expected: {VIDEOMAE_FILES}"
    processor = read_json(Path(folder, "preprocessor_config.json"))
    if not isinstance(processor, dict):
        raise ContractError(f"{Path(folder, 'preprocessor_config.json')} is missing or no JSON object\n{wanted}")
    try:
        network, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come into the report, which is refused below, by their names
        )
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ContractError(f"{folder} cannot be loaded as {kind.__name__}\n{wanted}\n  found:    {error}") from None
    if faults := [f"{what.removesuffix('_keys')} {key}" for what, keys in report.items() for key in sorted(map(str, keys))]:
        raise ContractError(
            f"{folder} does not fit {kind.__name__} of transformers {transformers.__version__}\n  expected: every weight of "
            f"such a network and no other\n  found:    {len(faults)} that do not fit, the first: {faults[0]}\n  take a model "
            "that was fine-tuned for classification, and the library of requirements.txt"
        )
    config, (mean, std) = network.config, (processor.get(key) for key in ("image_mean", "image_std"))
    scaled = processor.get("do_normalize", True) and abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-4
    square = isinstance(config.image_size, int) and (config.num_frames, config.num_channels) == (NUM_FRAMES, 3)
    if not (scaled and square and mean and std):
        raise ContractError(
            f"{folder}: refused the input that it states\n  expected: {NUM_FRAMES} square RGB frames, times 1/255, then "
            f"image_mean and image_std\n  found:    {config.num_frames} frames of {config.image_size} px; {processor}"
        )
    return network.to(device).eval().requires_grad_(False), (config.image_size, tuple(mean), tuple(std))


def videomae_input(clips, scale):
    """Network-size clips uint8 [n, 16, S, S, 3] -> a VideoMAE's pixel_values, float32 [n, 16, 3, S', S'].

    scale: (S', mean, std) of `load_videomae`. Bilinear resize of the whole frame, real and distilled clips alike.
    """
    side, mean, std = scale
    x = clips.permute(0, 1, 4, 2, 3).float() / 255
    if x.shape[-1] != side:
        x = nn.functional.interpolate(x.flatten(0, 1), (side, side), mode="bilinear", antialias=True).unflatten(0, x.shape[:2])
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x - mean) / std


@torch.inference_mode()
def run_videomae(network, scale, clips):
    """(features [n, d], logits [n, outputs]), float32 on the CPU, of network-size clips: uint8 array [n, 16, S, S, 3].

    Features are what the classifier sees: the layer-normalised mean over the tokens.
    """
    from tqdm import tqdm

    features, logits = [], []
    hook = network.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        for start in tqdm(range(0, len(clips), VIDEOMAE_BATCH), desc="VideoMAE", mininterval=1, leave=False):
            part = torch.from_numpy(np.ascontiguousarray(clips[start : start + VIDEOMAE_BATCH])).to(network.device)
            logits.append(network(videomae_input(part, scale)).logits.float().cpu())
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(logits)


def output_columns(network, classes, folder):
    """The outputs of a VideoMAE that are `classes`, matched by name: a list of columns in the classes' order.

    Only letters and digits count, in any case: UCF101 itself writes HandstandPushups and HandStandPushups.
    Raises ContractError, with the model's `folder`, when a class has no output of its own.
    """

    def plain(text):
        return re.sub(r"[^a-z0-9]", "", text.lower())

    outputs = {}
    for column, label in network.config.id2label.items():
        outputs.setdefault(plain(label), []).append(int(column))
    if unknown := [c for c in classes if len(outputs.get(plain(c), ())) != 1]:
        have = ", ".join(list(network.config.id2label.values())[:5])
        raise ContractError(
            f"{folder}: no output, or more than one, for {len(unknown)} of {len(classes)} classes, such as {unknown[0]}\n"
            f"  expected: a VideoMAE fine-tuned on the data set\n  found:    {network.config.num_labels} outputs: {have} ..."
        )
    return [outputs[plain(c)][0] for c in classes]


def frame_size(text):
    """WxH in pixels, for argparse: a pair of multiples of 8."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    size = tuple(int(side) for side in found.groups()) if found else ()
    if not size or min(size) < 8 or any(side % 8 for side in size):
        raise argparse.ArgumentTypeError("must be WxH with sides that are multiples of 8, as 448x256")
    return size


def vae_factor(model):
    """Pixels per latent pixel, in both directions: the VAE halves once per level but the last (8; the demo's 4)."""
    levels = read_json(model / "vae" / "config.json").get("block_out_channels")
    if not isinstance(levels, list):
        raise ContractError(f"{model / 'vae' / 'config.json'} is no autoencoder's\n  expected: block_out_channels")
    return 2 ** (len(levels) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


class BadVideo(Exception):
    """A video file that cannot be decoded as a whole."""


def uniform_frames(count, offset=0.5):
    """Indices of the 16 frames spread over `count`: floor((i + offset) * count / 16). Short videos repeat frames."""
    return np.floor((np.arange(NUM_FRAMES) + offset) * count / NUM_FRAMES).astype(int)


def read_video(path):
    """All frames of a video file, uint8 RGB [n, height, width, 3], n >= 1.

    Raises BadVideo when the file is missing, empty or broken, and when less than nine tenths of the frames that its
    header states can be decoded.
    """
    import cv2

    path = Path(path)
    if not path.is_file():
        raise BadVideo("no such file")
    if path.stat().st_size == 0:
        raise BadVideo("empty file")
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)  # absolute: a name may begin with - or file:
    frames = []
    try:
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        while capture.isOpened():
            good, frame = capture.read()
            if not good:
                break
            frames.append(frame)
    finally:
        capture.release()
    if not frames:
        raise BadVideo("no frame can be decoded")
    if len({frame.shape for frame in frames}) > 1:
        raise BadVideo("the frames change their size")
    if len(frames) < 0.9 * stated:
        raise BadVideo(f"only {len(frames)} of {stated} frames can be decoded")
    return np.stack(frames)[..., ::-1]


def resize_frames(frames, size):
    """Plain bilinear resize of uint8 frames [n, h, w, 3] to `size` (width, height), aspect ratio ignored."""
    import cv2

    if (frames.shape[2], frames.shape[1]) == tuple(size):
        return np.ascontiguousarray(frames)
    return np.stack([cv2.resize(np.ascontiguousarray(f), tuple(size), interpolation=cv2.INTER_LINEAR) for f in frames])


def network_clip(frames, dataset):
    """Frames [16, h, w, 3] as the networks see them: resize and centre crop to uint8 [16, S, S, 3] (protocol.md 2)."""
    spec = DATASETS[dataset]
    (width, height), side = spec["resize"], spec["side"]
    top, left = (height - side) // 2, (width - side) // 2
    return resize_frames(frames, spec["resize"])[:, top : top + side, left : left + side]


# At least 38 dB on real frames. The macroblock tree and processor-dependent code do not repeat their bytes.
X264 = {"crf": "12", "tune": "psnr", "flags": "+bitexact", "x264-params": "cpu-independent=1:mbtree=0"}


def network_clips(folder, names, dataset):
    """Videos below a folder as the networks see them: uint8 [n, 16, S, S, 3]; ContractError names one that is none."""
    clips = []
    for name in names:
        try:
            video = read_video(folder / name)
        except BadVideo as error:
            raise ContractError(f"{folder / name}: {error}\n  expected: a video") from None
        clips.append(network_clip(video[uniform_frames(len(video))], dataset))
    return np.stack(clips)


def write_mp4(path, frames, rate=8):
    """Writes uint8 RGB frames [n, h, w, 3] (even sides) as H.264, yuv420p, at `rate` frames per second, atomically.

    The same frames give the same bytes: one encoder thread, no dates, and the conversion to yuv420p done here, since the
    encoder's own threaded conversion is not repeatable.
    """
    import av

    with atomic(path) as handle, av.open(handle, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = dict(X264)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode())


def write_csv(path, header, rows):
    """A CSV file with a header, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with atomic(path) as handle:
        handle.write(text.getvalue().encode())


def read_csv(path):
    """The rows of a CSV file with a header, as dictionaries of strings."""
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
