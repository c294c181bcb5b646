"""Draws the demo world: short videos of a figure doing one of eight actions.

The real data sets are gigabytes, so the project carries a world of its own that goes through exactly the same
code: Xvid .avi files at 25 fps in UCF101's naming, groups and list files. Two classes, SitDown and StandUp,
show the same poses in opposite order, so that a network which looks at single frames cannot tell them apart.

Reads:   nothing
Writes:  <data root>/demo/UCF-101/<Class>/v_<Class>_g<GG>_c<CC>.avi   32x32, 40 to 120 frames
         <data root>/demo/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt
         <data root>/demo/drawn.json   seed and sha256 of the drawing code and of all files: written last
Run:     python demo/draw_videos.py [--data-root data] [--seed 0]
         python demo/draw_videos.py --data-root data/validation --validation   for choosing settings: the test
         split is groups 8 to 12, of the training groups; groups 1 to 7 are not drawn
Cost:    about 20 s on two cores, 6 MB
Expect:  8 classes, 864 training clips (groups 8 to 25), 336 test clips (groups 1 to 7); a seed's bytes repeat
"""

import argparse
import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np

CLASSES = ("Cartwheel", "JumpingJack", "Kick", "Punch", "SitDown", "StandUp", "Walk", "Wave")
NUM_GROUPS = 25  # as in UCF101; a group shares its background and its figure's colours
TEST_GROUPS = range(1, 8)  # the test split, as in UCF101's list 01
VALIDATION_GROUPS = range(8, 13)  # with --validation the test split; groups 1 to 7 are left out
CLIPS_PER_GROUP = 6
MIN_FRAMES, MAX_FRAMES = 40, 120
FPS = 25
SIDE = 32  # pixels
SUPERSAMPLE = 4  # drawn this much larger and averaged down: smooth limbs
QSCALE = 2  # MPEG-4 quantiser, 1 (best) to 31

# Lengths of the body in units of the figure's height.
TORSO, HEAD, ARM, LEG = 0.30, 0.095, 0.17, 0.25  # ARM and LEG: one segment of two


def smooth(s):
    """Ease in and out: 0 to 1 with zero speed at both ends."""
    s = np.clip(s, 0.0, 1.0)
    return s * s * (3 - 2 * s)


def pose(action, s, phase, style):
    """The pose at progress `s` (0 to 1 over the clip) and `phase` (radians) of the repeated movement.

    Returns x (figure heights from the middle), the height of the hip above the ground, the lean of the torso
    and the rotation of the whole figure (radians), and the two angles of each limb (radians from straight
    down, positive to the front): left and right arm, left and right leg.
    """
    open_ = (1 - np.cos(phase)) / 2
    x, hip, lean, rotation = 0.0, 2 * LEG, 0.0, 0.0
    arms, legs = [(0.25, 0.25), (-0.25, -0.25)], [(0.08, 0.08), (-0.08, -0.08)]
    if action == "Cartwheel":
        rotation = 2 * np.pi * s * style["turns"]
        x = style["reach"] * (2 * s - 1)
        arms, legs = [(2.5, 2.5), (-2.5, -2.5)], [(0.5, 0.5), (-0.5, -0.5)]
    elif action == "JumpingJack":
        a, b = 0.2 + 2.5 * open_, 0.05 + 0.5 * open_
        arms, legs = [(a, a), (-a, -a)], [(b, b), (-b, -b)]
        hip = 2 * LEG * np.cos(b) + 0.06 * abs(np.sin(phase))
    elif action == "Kick":
        k = 1.65 * open_
        legs = [(k, k), (-0.05, -0.05)]
        lean = -0.25 * open_
        arms = [(0.4, 1.2), (-0.5, 0.3)]
    elif action == "Punch":
        x = 0.14 * open_
        arms = [(0.1 + 1.45 * open_, 2.5 - 0.95 * open_), (0.1, 2.4)]
        legs = [(0.15 + 0.35 * open_, 0.1), (-0.2 - 0.25 * open_, -0.3 - 0.25 * open_)]
        lean = 0.3 * open_
        hip = 2 * LEG * np.cos(0.15 + 0.3 * open_)
    elif action in ("SitDown", "StandUp"):
        # The hold at both ends is drawn from one distribution, so the frames of the two classes are the same.
        down = smooth((s - style["hold"][0]) / (1 - sum(style["hold"])))
        if action == "StandUp":
            down = 1 - smooth((s - style["hold"][1]) / (1 - sum(style["hold"])))
        hip = 2 * LEG + (0.09 - 2 * LEG) * down
        lean = 0.5 * np.sin(np.pi * down) - 0.1 * down
        legs = [(0.08 + 2.0 * down, 0.08 + 0.35 * down), (-0.08 + 2.0 * down, -0.08 + 0.45 * down)]
        arms = [(0.25 + 0.9 * np.sin(np.pi * down), 0.35), (-0.25 - 0.4 * down, -0.25 - 0.4 * down)]
    elif action == "Walk":
        x = style["reach"] * (2 * s - 1)
        a = 0.55 * np.sin(phase)
        legs = [(a, a - 0.25 * max(0.0, -np.cos(phase))), (-a, -a - 0.25 * max(0.0, np.cos(phase)))]
        arms = [(-0.8 * a, -0.8 * a + 0.3), (0.8 * a, 0.8 * a + 0.3)]
        hip = 2 * LEG * np.cos(0.5 * a)
    elif action == "Wave":
        swing = np.sin(phase)
        arms = [(2.45 + 0.5 * swing, 2.75 + 0.95 * swing), (-0.25, -0.2)]
    return x, hip, lean, rotation, arms, legs


def joints(x, hip, lean, rotation, arms, legs):
    """Lines [n, 2, 2] and the head's centre [2] in figure heights, y upwards, the ground at 0."""
    hip_at = np.array([x, hip])
    neck = hip_at + TORSO * np.array([np.sin(lean), np.cos(lean)])
    head = neck + (HEAD + 0.02) * np.array([np.sin(lean), np.cos(lean)])
    lines = [(hip_at, neck)]
    shoulder = hip_at + 0.9 * (neck - hip_at)
    for start, length, limbs in ((shoulder, ARM, arms), (hip_at, LEG, legs)):
        for angles in limbs:
            at = start
            for angle in angles:
                to = at + length * np.array([np.sin(angle), -np.cos(angle)])
                lines.append((at, to))
                at = to
    lines = np.array(lines)
    centre = np.array([x, 0.5])
    turn = np.array([[np.cos(rotation), np.sin(rotation)], [-np.sin(rotation), np.cos(rotation)]])
    return (lines - centre) @ turn.T + centre, (head - centre) @ turn.T + centre


def hsv(hue, saturation, value):
    """BGR colour of hue, saturation and value in 0 to 1."""
    pixel = np.uint8([[[round(hue * 179), round(saturation * 255), round(value * 255)]]])
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def generator(seed, *names):
    """A generator that depends on the seed and on the item's name only."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_look(rng):
    """What a group shares: hue, saturation, value of the background (0 to 1), and the figure's BGR colour."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.15, 0.5), rng.uniform(0.42, 0.6)
    light = rng.uniform() < 0.5
    figure_hue, figure_saturation = rng.uniform(), rng.uniform(0, 0.35)
    figure = hsv(figure_hue, figure_saturation, rng.uniform(0.88, 1.0) if light else rng.uniform(0.0, 0.14))
    return hue, saturation, value, figure


def draw_frames(action, look, rng, progress=None):
    """Frames of a clip, uint8 BGR [n, SIDE, SIDE, 3]. rng draws size, place, speed and phase.

    progress: float [n], the moments to draw, 0 to 1 over the clip (all frames of a clip of random length).
    """
    hue, saturation, value, figure = look
    hue, value = (hue + rng.normal(0, 0.015)) % 1, value + rng.normal(0, 0.015)

    count = int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1))
    height = rng.uniform(0.58, 0.70) * SIDE
    ground = rng.uniform(0.82, 0.92) * SIDE
    middle = (0.5 + rng.uniform(-0.12, 0.12)) * SIDE
    mirror = -1 if rng.uniform() < 0.5 else 1
    cycles, phase0 = rng.uniform(1.2, 2.4), rng.uniform(0, 2 * np.pi)
    turns, reach, hold = rng.uniform(0.8, 1.1), rng.uniform(0.35, 0.6), rng.uniform(0.05, 0.3, 2)
    style = {"turns": turns, "reach": reach, "hold": hold}

    top, bottom = hsv(hue, saturation, value + 0.06), hsv(hue, saturation, value - 0.06)
    rows = np.linspace(0, 1, SIDE * SUPERSAMPLE, dtype=np.float32)[:, None, None]
    canvas = np.repeat(top * (1 - rows) + bottom * rows, SIDE * SUPERSAMPLE, axis=1)
    canvas[round(ground * SUPERSAMPLE) :] = hsv((hue + 0.08) % 1, saturation, value - 0.14)
    canvas = canvas.round().astype(np.uint8)

    progress = np.arange(count) / (count - 1) if progress is None else progress
    thick = max(1, round(0.105 * height * SUPERSAMPLE))
    frames = np.empty((len(progress), SIDE, SIDE, 3), np.uint8)
    for f, s in enumerate(progress):
        lines, head = joints(*pose(action, s, phase0 + 2 * np.pi * cycles * s, style))
        scale = np.array([mirror * height, -height]) * SUPERSAMPLE
        origin = np.array([middle, ground]) * SUPERSAMPLE
        picture = canvas.copy()
        for start, end in (lines * scale + origin).round().astype(int):
            cv2.line(picture, start.tolist(), end.tolist(), figure.tolist(), thick)
        at = (head * scale + origin).round().astype(int).tolist()
        cv2.circle(picture, at, round(HEAD * height * SUPERSAMPLE), figure.tolist(), -1)
        frames[f] = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return frames


def draw_clip(action, group, clip, seed):
    """A clip of the data set, uint8 BGR [n, SIDE, SIDE, 3]."""
    return draw_frames(
        action, draw_look(generator(seed, action, group)), generator(seed, action, group, clip)
    )


def draw_corpus_part(job):
    """Clips of the corpus, uint8 RGB [n, 16, SIDE, SIDE, 3]. job: the seed and their numbers."""
    seed, numbers = job
    cv2.setNumThreads(1)
    clips = np.empty((len(numbers), 16, SIDE, SIDE, 3), np.uint8)
    for row, number in enumerate(numbers):
        rng = generator(seed, "corpus", number)  # no group of the data set has such a name
        progress = (np.arange(16) + rng.uniform(0.25, 0.75)) / 16
        clips[row] = draw_frames(CLASSES[number % len(CLASSES)], draw_look(rng), rng, progress)[..., ::-1]
    return clips


def draw_corpus(count, seed=0):
    """The corpus of demo/train_models.py, which stands for the web: each clip has a look of its own.

    Returns uint8 RGB [count, 16, SIDE, SIDE, 3], 16 frames spread over each clip, and a caption of each.
    """
    parts = [(seed, range(start, min(start + 500, count))) for start in range(0, count, 500)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        clips = np.concatenate(list(pool.map(draw_corpus_part, parts)))
    root = Path(__file__).resolve().parent.parent
    sentence = json.loads((root / "prompts/demo.json").read_text("utf-8"))
    others = json.loads((root / "demo/wordings.json").read_text("utf-8"))
    captions = [(sentence[action], *others[action]) for action in CLASSES]
    return clips, [captions[i % len(CLASSES)][i // len(CLASSES) % 4] for i in range(count)]


def write_avi(path, frames):
    """Xvid-tagged MPEG-4 in AVI; one thread and bit-exact flags, so the bytes depend on the frames alone."""
    temporary = path.with_suffix(".tmp")
    with av.open(str(temporary), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.codec_tag = "XVID"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"flags": "+bitexact+qscale", "global_quality": str(QSCALE * 118)}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode())
    os.replace(temporary, path)


def draw_group(job):
    """Draws the clips of one group; returns {path below the demo folder: sha256}."""
    root, action, group, seed = job
    cv2.setNumThreads(1)
    digests = {}
    for clip in range(1, CLIPS_PER_GROUP + 1):
        name = f"UCF-101/{action}/v_{action}_g{group:02d}_c{clip:02d}.avi"
        write_avi(root / name, draw_clip(action, group, clip, seed))
        digests[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    return digests


def groups_of(validation):
    """(all groups, those of the test split)."""
    test = VALIDATION_GROUPS if validation else TEST_GROUPS
    return range(test.start, NUM_GROUPS + 1), test


def write_lists(root, groups, test_groups):
    """classInd.txt, trainlist01.txt and testlist01.txt as UCF101 has them; returns their sha256."""
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for label, action in enumerate(CLASSES, 1):
        for group in groups:
            for clip in range(1, CLIPS_PER_GROUP + 1):
                name = f"{action}/v_{action}_g{group:02d}_c{clip:02d}.avi"
                (test.append(name) if group in test_groups else train.append(f"{name} {label}"))
    texts = {
        "classInd.txt": [f"{label} {action}" for label, action in enumerate(CLASSES, 1)],
        "trainlist01.txt": train,
        "testlist01.txt": test,
    }
    digests = {}
    for name, lines in texts.items():
        data = ("\n".join(lines) + "\n").encode()
        (folder / name).write_bytes(data)
        digests[f"ucfTrainTestlist/{name}"] = hashlib.sha256(data).hexdigest()
    return digests


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds the data sets (data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (0)")
    parser.add_argument("--validation", action="store_true", help="draw the split to choose settings on")
    args = parser.parse_args()

    root, record = args.data_root / "demo", args.data_root / "demo" / "drawn.json"
    identity = {"seed": args.seed, "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if record.exists():
        try:
            drawn = json.loads(record.read_text())
            # the driver draws without the option
            args.validation = args.validation or drawn["identity"]["validation"]
            identity["validation"] = args.validation
            same = drawn["identity"] == identity and all((root / name).is_file() for name in drawn["files"])
        except (ValueError, KeyError, TypeError):  # damaged: drawn again
            same = False
        if same:
            print(f"demo videos: fresh, {len(drawn['files'])} files below {root}")
            return
        record.unlink()
    identity["validation"] = args.validation
    groups, test_groups = groups_of(args.validation)
    for action in CLASSES:
        (root / "UCF-101" / action).mkdir(parents=True, exist_ok=True)
    jobs = [(root, action, group, args.seed) for action in CLASSES for group in groups]
    files = write_lists(root, groups, test_groups)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for digests in pool.map(draw_group, jobs, chunksize=5):
            files.update(digests)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps({"identity": identity, "files": files}, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, record)
    print(f"demo videos: {len(files) - 3} clips of {len(CLASSES)} classes below {root}")


if __name__ == "__main__":
    sys.exit(main())
