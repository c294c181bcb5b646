"""The data sets and their videos: lists, files, clips as the networks see them."""

from contract import (
    ROOT,
    ContractError,
    Input,
    Missing,
    atomic,
    command,
    generator,
    read,
    read_record,
    sha256,
)

import os
import re
import shlex
from pathlib import Path

import numpy as np
import torch

from common import NUM_FRAMES

NAME = r"(?!\.{1,2}\.avi)(?P<name>[ -.0-\[\]-~]{1,240})\.avi"  # ASCII without / and \: stays in its folder
HMDB51_LINE = NAME + r" (?P<mark>[012])"  # of <class>_test_split1.txt; marks: (split, official)
HMDB51_MARKS = {"0": ("train", 0), "1": ("train", 1), "2": ("test", 1)}
UCF101_LINE = r"(?P<label>\w+)[/\\]" + NAME + r"(?: \d+)?"  # the training list has the class's number
ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")  # of one's own videos, in any case
# At least 38 dB on real frames. The macroblock tree and processor-dependent code do not repeat their bytes.
X264 = {"crf": "12", "tune": "psnr", "flags": "+bitexact", "x264-params": "cpu-independent=1:mbtree=0"}
# Of FFmpeg's, those that OpenCV converts: without a statement, and BT.709, FCC, BT.601 twice, 240M, BT.2020.
COLOUR_SPACES = (2, 1, 4, 5, 6, 7, 9)

MATROSKA = (b"\x1aE\xdf\xa3", b"\x18S\x80g")  # its header, and the element with everything else
# --- the data sets


def data_set(name, videos, lists, clips, size=(448, 256), resize=(160, 120), side=112):
    """An entry of DATASETS. Classes are those of prompts/<name>.json, in ASCII order.

    videos, lists: where the official archives unpack to below the data root. clips: training and test clips
    of the official lists. size: the generator's frame (width, height). resize, side: the plain resize
    (width, height) and the centre crop that make the network's frame. All in pixels.
    """
    classes = sorted(read(ROOT / "prompts" / f"{name}.json"))
    keys = ("classes", "videos", "lists", "clips", "size", "resize", "side")
    return dict(zip(keys, (classes, videos, lists, clips, size, resize, side), strict=True))


UCF = ("UCF101/UCF-101", "UCF101/ucfTrainTestlist")
DATASETS = {
    "hmdb51": data_set("hmdb51", "HMDB51/hmdb51_org", "HMDB51/testTrainMulti_7030_splits", (5236, 1530)),
    "miniucf": data_set("miniucf", *UCF, (4662, 1861)),  # 50 of UCF101's classes; not what is called UCF50
    "ucf101": data_set("ucf101", *UCF, (9537, 3783)),
    "demo": data_set("demo", "demo/UCF-101", "demo/ucfTrainTestlist", (864, 336), (32, 32), (48, 48), 48),
}


def find_data_set(args):
    """The entry of args.dataset in DATASETS, or else one's own data set, whose classes are folders of train/.

    One's own has HMDB51's sizes. The generator's frame is always the --size of stage 01's last run, and one's
    own test split its --val.
    """
    root, made = args.data_root / args.dataset, args.work_dir / args.dataset / "01_latents"
    record = read_record(made, f"rm {made / 'manifest.json'}")
    made = record["parameters"] if record else {}
    if args.dataset in DATASETS:
        spec = DATASETS[args.dataset]
        return spec | {"size": tuple(made.get("size", spec["size"]))}
    classes = sorted(path.name for path in root.glob("train/[!.]*") if path.is_dir())
    if not classes:
        expected = f"{', '.join(DATASETS)}, or one's own videos as {root}/train/<class>/*.mp4"
        raise Missing(f"{root / 'train'} has no classes", expected, fix="see docs/data.md; --data-root")
    taken = {"vae", "classes", "manifest.json", "metadata.csv", "README.md", "log.txt"} & {*classes}
    if taken or ((root / "test").exists() and not (root / "test").is_dir()):
        what = f"{root}: " + (f"no class can be called {min(taken)}" if taken else "test is no folder")
        raise ContractError(what, fix="rename it")
    clips = [sum(1 for _ in root.glob(f"{split}/[!.]*/[!.]*")) for split in ("train", "test")]
    spec = DATASETS["hmdb51"] | {"classes": classes, "videos": args.dataset, "lists": None, "clips": clips}
    return spec | {"size": tuple(made.get("size", spec["size"])), "val": made.get("val")}


def list_clips(args):
    """The clips of a data set, sorted by class and name: [(class, name, split, official, path)].

    name: without its ending. official: 0 for HMDB51's unused clips, on which Dancing with Still Images and
    GVD train too.
    """
    root = args.data_root / args.spec["videos"]
    if not args.spec["lists"]:
        return list_folder(root, args)
    clips = list_official(args.dataset, args.data_root)
    return [(*clip, root / clip[0] / f"{clip[1]}.avi") for clip in clips]


def list_official(dataset, data_root):
    """The clips of the official lists (split 1), as `list_clips`, without paths.

    HMDB51's names hold `# [ ] ! & ; ( ) % @` and begin with `-`: never pass them to a shell or a glob.
    """
    spec, clips = DATASETS[dataset], {}
    pattern, files = UCF101_LINE, {"trainlist01.txt": "train", "testlist01.txt": "test"}
    if dataset == "hmdb51":
        pattern, files = HMDB51_LINE, {f"{label}_test_split1.txt": label for label in spec["classes"]}
    known = DATASETS["ucf101" if dataset == "miniucf" else dataset]["classes"]
    for path, value in ((data_root / spec["lists"] / file, value) for file, value in files.items()):
        if not path.is_file():
            raise missing(dataset, data_root, path)
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            found = re.fullmatch(pattern, line.strip())
            label = found and found.groupdict().get("label", value)
            if label not in known:
                what = f"{path}, line {number}: refused {line!r}"
                raise ContractError(what, f"<clip>.avi of a class of {dataset}, a plain file name")
            clip = HMDB51_MARKS[found["mark"]] if dataset == "hmdb51" else (value, 1)
            if label in spec["classes"] and clips.setdefault((label, found["name"]), clip) != clip:
                raise ContractError(f"{path}, line {number}: {found['name']} is in both splits")
    return [(label, name, *clips[label, name]) for label, name in sorted(clips)]


def list_folder(root, args):
    """The clips of one's own data set, below root/train/<class> and root/test/<class>, as `list_clips`.

    Without a folder test/ the share args.val of a class's clips, the last by name, are the test clips.
    """
    splits, clips, names = ("train", "test")[: 1 + (root / "test").is_dir()], [], {*args.spec["classes"]}
    for split in splits:
        there = sorted((root / split).glob("[!.]*"))
        if odd := [path for path in there if not (path.is_dir() and path.name.isprintable())]:
            what, expected = f"{ascii(str(odd[0]))} is no class", "a folder of videos for each class"
            raise ContractError(what, expected, fix="move it away, or rename it")
        if alone := sorted({path.name for path in there} ^ names):
            raise ContractError(f"{root}: class {alone[0]} is not in both splits", "train and test alike")
    for label in args.classes:
        for split in splits:
            paths = sorted((root / split / label).glob("[!.]*"), key=lambda path: path.stem)
            good = {p for p in paths if p.is_file() and p.suffix.lower() in ENDINGS and p.stem.isprintable()}
            if bad := [p for p in paths if p not in good]:
                what, fix = f"{ascii(str(bad[0]))} is no video file", "move it away, or rename it"
                raise ContractError(what, ", ".join(ENDINGS), f"{len(bad)} such files of {label}", fix)
            if len(paths) < 3 - len(splits):
                raise ContractError(f"{root / split / label}: too few videos", 3 - len(splits), len(paths))
            if twice := [p for p, q in zip(paths, paths[1:], strict=False) if p.stem == q.stem]:
                raise ContractError(f"{twice[0]}: another video has this name", fix="rename one of them")
            cut = len(paths)
            if len(splits) == 1:
                cut -= min(cut - 1, max(1, round(args.val * cut)))
            parts = [split] * cut + ["test"] * (len(paths) - cut)
            clips += [(label, p.stem, part, 1, p) for p, part in zip(paths, parts, strict=True)]
    return clips


def missing(dataset, data_root, path, found=None, absent=()):
    """What to raise when a part of the data set is not there. absent: the listed videos that are missing."""
    expected, names = f"{dataset}'s videos and official lists", {video.stem for video in absent}
    if dataset == "demo":
        fix = f"python demo/draw_videos.py --data-root {shlex.quote(str(data_root))}"
        return Missing(f"{path} is missing", expected, found, fix)
    videos = Path(DATASETS[dataset]["videos"])
    everything = (data_root / videos.parts[0]).rglob("*.*") if names else ()
    everything = (path for path in everything if path.suffix.lower() in ENDINGS and path.stem in names)
    other = sorted(path for path in everything if path not in absent)
    if not other or (dataset == "hmdb51" and other[0].parent.name not in DATASETS[dataset]["classes"]):
        fix = "unpack the data set there, as docs/data.md says"
        return Missing(f"{path} is missing", expected, found, fix)
    found = f"{found}; {len(other):,} videos of these names elsewhere, the first is {other[0]}"
    place = shlex.quote(str(data_root / videos))
    label = "c=${f%/*}; c=${c##*/}"  # the class is the name of the folder; UCF101's names hold it
    if dataset != "hmdb51":
        label = "c=${n#v_}; c=${c%%_*}; c=${c/HandStandP/HandstandP}"
    link = f'mkdir -p {place}/"$c" && cp -ln "$f" {place}/"$c/${{n%.*}}.avi"'  # nothing moves
    script = shlex.quote(f"for f; do n=${{f##*/}}; {label}; {link}; done")
    folder = shlex.quote(os.path.commonpath([video.parent for video in other]))
    fix = f"find {folder} -name '*{other[0].suffix}' -exec bash -c {script} - {{}} +"
    return Missing(f"{path} is missing", expected, found, fix)


# --- video files


class BadVideo(Exception):
    """A video file that cannot be decoded as a whole."""


def uniform_frames(count):
    """Indices of 16 frames spread over `count`: floor((i + 0.5) * count / 16). Short videos repeat frames."""
    return np.floor((np.arange(NUM_FRAMES) + 0.5) * count / NUM_FRAMES).astype(int)


def opencv():
    """The module, or ContractError where it cannot decode as on other machines."""
    import cv2

    if cv2.CAP_FFMPEG not in cv2.videoio_registry.getBackends():
        what, fix = "OpenCV has no FFmpeg back end", "unset OPENCV_VIDEOIO_PRIORITY_FFMPEG"
        raise ContractError(what, "opencv-python-headless of requirements.txt", cv2.__version__, fix)
    return cv2


def read_video(path):
    """All frames of a video, uint8 RGB [n, h, w, 3], as `read_frames`."""
    return read_frames(path, np.arange)[0]


def read_frames(path, choose):
    """(frames, count): the chosen frames of a video, uint8 RGB [n, h, w, 3], and how many frames it has.

    choose(count): indices of frames, as `uniform_frames`; only these are held in memory. OpenCV decodes, PyAV
    what OpenCV has no decoder for. Raises BadVideo when the file is missing, empty or cut off, or when its
    colours cannot be converted.
    """
    path = Path(path).absolute()  # names may begin with -
    if not path.is_file() or not path.stat().st_size:
        raise BadVideo("empty file" if path.is_file() else "no such file")
    stated = check_colours(path)
    for decode in (opencv_frames, av_frames):
        kept, count = decode(path, choose(stated) if stated else ())
        if count and not kept.keys() >= {*choose(count)}:  # the header was wrong
            kept, count = decode(path, choose(count))
        if count:
            break
    else:
        raise BadVideo("no frame can be decoded")
    if len({frame.shape for frame in kept.values()}) > 1:
        raise BadVideo("the frames change their size")
    if count < 0.9 * stated and not is_whole(path):
        raise BadVideo(f"only {count} of {stated} frames can be decoded")
    return np.stack([kept[i] for i in choose(count)]), count


def check_colours(path):
    """The number of frames that a file's header states, 0 where it does not; BadVideo for unknown colours."""
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            space, stated = getattr(stream.codec_context, "colorspace", 2), stream.frames
            if not stated and container.duration and stream.average_rate:
                stated = round(container.duration / av.time_base * stream.average_rate)
    except (av.error.FFmpegError, IndexError):  # no container, or without a video
        return 0  # OpenCV may know more
    if space not in COLOUR_SPACES:
        raise BadVideo(f"colour space {space} cannot be converted; re-encode it as bt709")
    return stated


def opencv_frames(path, wanted):
    """{index: frame} of the wanted frames, and the number of all that can be decoded."""
    cv2, kept, count = opencv(), {}, 0
    capture, wanted = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), {*wanted}
    while capture.grab():
        if count in wanted:
            found, frame = capture.retrieve()
            if not found:
                break
            kept[count] = frame[..., ::-1]  # OpenCV gives BGR
        count += 1
    capture.release()
    return kept, count


def av_frames(path, wanted):
    """As `opencv_frames`, by PyAV, which has more decoders."""
    import av

    kept, count, wanted = {}, 0, {*wanted}
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            for frame in container.decode(video=0):
                if count in wanted:
                    kept[count] = frame.to_ndarray(format="rgb24")
                count += 1
    except (av.error.FFmpegError, IndexError):  # the end of what can be decoded
        pass
    return kept, count


def is_whole(path):
    """Whether nothing of an .avi, .mp4, .mkv or .webm file is cut off.

    Header frame counts do not tell: some include frames never shown, others give only the duration.
    """
    import av

    size, end = path.stat().st_size, 0
    with open(path, "rb") as file:
        while end < size:  # by the lengths of its parts: one RIFF, several boxes, or Matroska's elements
            file.seek(end)
            head = file.read(16).ljust(16, b"\0")
            length = int.from_bytes(head[:4], "big")
            if head[:4] == b"RIFF":
                length = 8 + int.from_bytes(head[4:8], "little")
            elif head[:4] in MATROSKA:  # a length of n bytes, the first of which says n
                n = 9 - head[4].bit_length()
                length = int.from_bytes(head[4 : 4 + n], "big") % 2 ** (7 * n)
                length = 0 if length == 2 ** (7 * n) - 1 else 4 + n + length  # all ones: to the end
            elif length == 1:
                length = int.from_bytes(head[8:], "big")
            elif 1 < length < 8:  # no box
                return False
            end += length or size - end
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return end == size and not any(packet.is_corrupt for packet in container.demux(video=0))
    except av.error.FFmpegError:
        return False


def resize_frames(frames, size):
    """Plain bilinear resize of uint8 frames [n, h, w, 3] to `size` (width, height), aspect ratio ignored."""
    import cv2

    if (frames.shape[2], frames.shape[1]) == tuple(size):
        return np.ascontiguousarray(frames)
    frames = map(np.ascontiguousarray, frames)
    return np.stack([cv2.resize(f, tuple(size), interpolation=cv2.INTER_LINEAR) for f in frames])


def network_clip(frames, spec):
    """Frames [16, h, w, 3] as the networks see them, resized and cropped: uint8 [16, S, S, 3]."""
    (width, height), side = spec["resize"], spec["side"]
    top, left = (height - side) // 2, (width - side) // 2
    return resize_frames(frames, spec["resize"])[:, top : top + side, left : left + side]


def write_mp4(path, frames, rate=8):
    """Writes uint8 RGB frames [n, h, w, 3] (even sides) as H.264, yuv420p, `rate` per second, atomically.

    The same frames give the same bytes: one encoder thread, no dates, and the conversion to yuv420p is done
    here, since the encoder's own threaded conversion is not repeatable.
    """
    import av

    options = {"format": "mp4", "options": {"fflags": "+bitexact"}}
    with atomic(path) as handle, av.open(handle, "w", **options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = dict(X264)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode())


# --- clips as the networks see them


def real_clips(args, split="train", windows=False, least=1):
    """Clips of stage 01 {class: ([name], uint8 [n, windows, 16, S, S, 3], on the disk)}, {file: sha256}.

    windows: the random ones of 01 --windows. least: clips that a class must have.
    """
    source = Input(args, "01_clips", command(args, "01_encode_latents.py", *["--windows"] * windows))
    folder, clips, side = "windows/" * windows + split, {}, args.spec["side"]
    files = [f"{place}/{c}.{k}" for c in args.classes for place, k in ((folder, "npy"), (split, "csv"))]
    files = source.check(files)
    for label in args.classes:
        names = [row["name"] for row in source.load(f"{split}/{label}.csv")]
        array = source.load(f"{folder}/{label}.npy", (len(names), None, NUM_FRAMES, side, side, 3), "uint8")
        clips[label] = names[: args.limit], array[: args.limit]
        if (found := len(clips[label][0])) < least:
            what = f"{source.folder}/{split}/{label}.csv: too few clips"
            raise ContractError(what, f"at least {least}", found, "a smaller IPC, a larger --limit")
    return clips, files


def select_random(clips, ipc, seed, repeat):
    """{class: names} of `ipc` random training clips of each class, of stage 05's `random` in a repeat."""
    chosen = {}
    for label, names in ((label, sorted(names)) for label, (names, _) in clips.items()):
        order = torch.randperm(len(names), generator=generator(seed, "05", "random", repeat, label))
        chosen[label] = sorted(names[i] for i in order[:ipc].tolist())
    return chosen


def find_videos(args, folder, ending=".mp4"):
    """A set of videos: {class: ([file], None)}, {file: sha256}, and the Input of a set that a script made.

    folder: of stage 03 or 04, or any of <class>/*.mp4. A set of baselines/ has arrays in place of None:
    float16 [n, V, 16, S, S, 3], V variants of each clip, in grey levels that may exceed 0 to 255.
    """
    source, there = None, [path.relative_to(folder).as_posix() for path in folder.glob("*/[!.]*.mp4")]
    if folder.parent.parent.parent == args.work_dir / args.dataset or (folder / "manifest.json").exists():
        method, dynamic, _ = folder.name.partition("+")
        words = ["--dynamic"] if dynamic else ["--name", folder.name]
        script = "03_guided_sample.py" if "03_samples" in folder.parts else "04_mvic_compose.py"
        if (ROOT / f"baselines/{method}.py").exists():
            script, words = f"baselines/{method}.py", words * bool(dynamic)
        source = Input(args, folder.absolute(), command(args, script, *words))
        if "set.json" in source.outputs:
            return read_arrays(args, source)
        there = [name for name in source.outputs if name.endswith(".mp4")]
    ours = sorted(name for name in there if name.endswith(ending))
    videos = {c: [name for name in ours if name.startswith(f"{c}/")][: args.limit] for c in args.classes}
    if empty := [c for c in args.classes if not videos[c]]:
        raise ContractError(f"{folder / empty[0]}: no video", f"*{ending} of each class")
    names = [name for of_class in videos.values() for name in of_class]
    files = source.check(names) if source else {name: sha256(folder / name) for name in names}
    return {c: (videos[c], None) for c in videos}, files, source


def read_arrays(args, source):
    """As `find_videos`, of a set of baselines/."""
    files, clips = source.check(["set.json", *(f"{c}.npy" for c in args.classes)]), {}
    variants, side = source.load("set.json")["variants"], args.spec["side"]
    for label in args.classes:
        array = source.load(f"{label}.npy", (None, variants, NUM_FRAMES, side, side, 3), "float16")
        if not np.isfinite(array).all():
            what = f"{source.folder / label}.npy: a value is not finite"
            raise ContractError(what, fix=f"{source.fix} --redo")
        clips[label] = [f"{label}/{i}" for i in range(len(array))][: args.limit], array[: args.limit]
    return clips, files, source


def set_bytes(folder, files):
    """Stored bytes of a set: of its files, or what set.json says of what a baseline really stores."""
    return (read(folder / "set.json") or {}).get("bytes") or sum((folder / f).stat().st_size for f in files)


def network_clips(folder, of_class, spec):
    """Videos ([file], array or None) of `find_videos` as the networks see them: uint8 [n, 16, S, S, 3].

    Of each clip of a set of baselines/ variant 0, rounded to grey levels.
    """
    (names, array), clips = of_class, []
    if array is not None:
        return np.rint(array[:, 0].astype(np.float32)).clip(0, 255).astype(np.uint8)
    for name in names:
        try:
            frames, _ = read_frames(folder / name, uniform_frames)
        except BadVideo as error:
            raise ContractError(f"{folder / name}: {error}", "a video") from None
        clips.append(network_clip(frames, spec))
    return np.stack(clips)
