"""Video files: reading, resizing to the networks' frames, writing."""

from contract import ContractError, atomic

from pathlib import Path

import numpy as np

from common import NUM_FRAMES

# At least 38 dB on real frames. The macroblock tree and processor-dependent code do not repeat their bytes.
X264 = {"crf": "12", "tune": "psnr", "flags": "+bitexact", "x264-params": "cpu-independent=1:mbtree=0"}
# Of FFmpeg's, those that OpenCV converts: without a statement, and BT.709, FCC, BT.601 twice, 240M, BT.2020.
COLOUR_SPACES = (2, 1, 4, 5, 6, 7, 9)


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
    """Whether nothing of an .avi or .mp4 file is cut off; some of these state frames that are never shown."""
    import av

    size, end = path.stat().st_size, 0
    with open(path, "rb") as file:
        while end < size:  # by the lengths of its parts: one RIFF, or several boxes
            file.seek(end)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if head[:4] == b"RIFF":
                length = 8 + int.from_bytes(head[4:8], "little")
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


def network_clips(folder, names, spec):
    """16 frames of each of the videos below a folder as the networks see them: uint8 [n, 16, S, S, 3]."""
    clips = []
    for name in names:
        try:
            frames, _ = read_frames(folder / name, uniform_frames)
        except BadVideo as error:
            raise ContractError(f"{folder / name}: {error}", "a video") from None
        clips.append(network_clip(frames, spec))
    return np.stack(clips)


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
