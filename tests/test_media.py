"""Videos as they are: colours, headers, codecs, lengths. The files are made here, bit by bit."""

import contract

import subprocess
import sys

import av
import numpy as np
import pytest
from conftest import REPO

import media


def wall(i, width, height):
    """A block moves over a plain wall."""
    picture, x = np.full((height, width, 3), (40, 90, 160), np.uint8), 3 * i % (width - 16)
    picture[height // 4 : height // 2, x : x + 16] = (230, 60, 30)
    return picture


def noise(i, width, height):
    return np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)


def film(path, count=16, size=(96, 64), codec="libx264", options=(), make=wall, place=None, rate=8, **tags):
    """Writes a video. place(i): the time of frame i; tags: of the codec, as colorspace."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = tags.pop("pix_fmt", "yuv420p")
        stream.codec_context.options = dict(options)
        for key, value in tags.items():
            setattr(stream.codec_context, key, value)
        written = 0
        for i in range(count + 1):
            frame = None  # the last one flushes the encoder
            if i < count:
                frame = av.VideoFrame.from_ndarray(make(i, *size), format="rgb24").reformat(
                    format=stream.pix_fmt
                )
            for packet in stream.encode(frame):
                if place:
                    packet.pts = packet.dts = place(written)
                    packet.time_base = stream.codec_context.time_base
                written += 1
                container.mux(packet)
    return path


@pytest.mark.parametrize("space", [1, 5, 6, 9, 8, 10, 14])
def test_colours_are_converted_or_refused(tmp_path, space):
    """8, 10 and 14 (YCgCo, constant luminance, ICtCp) have no conversion: OpenCV returns memory left over."""
    media.read_video(film(tmp_path / "other.mp4", make=noise))
    path = film(tmp_path / "a.mp4", colorspace=space, color_range=1)
    if space in (8, 10, 14):
        with pytest.raises(media.BadVideo, match=f"colour space {space}"):
            media.read_video(path)
    else:
        expected = np.stack([wall(i, 96, 64) for i in range(16)]).astype(float)
        assert np.abs(media.read_video(path) - expected).mean() < 15


def test_black_is_no_fault(tmp_path):
    path = film(tmp_path / "black.mp4", make=lambda i, width, height: np.zeros((height, width, 3), np.uint8))
    assert media.read_video(path).max() < 20


def test_frames_that_the_header_counts_but_nobody_sees(tmp_path):
    """An edit list hides 60 of 80 frames; an .avi repeats every third frame."""
    path = film(tmp_path / "source.mp4", 80, rate=30, options={"bf": "0", "g": "200"})
    with (
        av.open(str(path)) as source,
        av.open(str(tmp_path / "edit.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        old = source.streams.video[0]
        new = target.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.dts is not None:
                packet.pts -= int(2 / old.time_base)
                packet.dts -= int(2 / old.time_base)
                packet.stream = new
                target.mux(packet)
    assert len(media.read_video(tmp_path / "edit.mp4")) == 20
    options = {"codec": "mpeg4", "rate": 25, "make": noise}
    repeat = film(tmp_path / "repeat.avi", 40, place=lambda i: i + i // 3, **options)
    assert len(media.read_video(repeat)) == 40  # each as often as it is stored
    for path in (repeat, film(tmp_path / "even.avi", 60, **options)):
        data = path.read_bytes()
        half = len(data) // 2
        for end in (half, data.index(b"00dc", half)):  # in a frame; between two
            (tmp_path / "cut.avi").write_bytes(data[:end])
            with pytest.raises(media.BadVideo, match="frames can be decoded"):
                media.read_video(tmp_path / "cut.avi")
    (tmp_path / "cut.avi").write_bytes(bytes([0, 0, 0, 200]) + b"no container" * 16 + b"data")
    assert not media.is_whole(tmp_path / "cut.avi")  # though its only part is as long as the file


@pytest.mark.parametrize("ending, codec, sound", [("mkv", "libx264", "aac"), ("webm", "libvpx", "libopus")])
def test_sound_longer_than_the_picture(tmp_path, ending, codec, sound):
    """Matroska states how long a file is, not its frames; one that is cut is refused all the same."""
    path, cut = tmp_path / f"a.{ending}", tmp_path / f"cut.{ending}"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream(codec, rate=25), container.add_stream(sound, rate=48000)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(noise(i, 96, 64), format="rgb24") for i in range(50)]
        for frame in (*frames, None):
            container.mux(video.encode(frame))
        for i in range(250):  # 5 s beside 2
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 48000, 960 * i
            container.mux(audio.encode(silence))
        container.mux(audio.encode(None))
    assert media.check_colours(path) > 100 and media.read_frames(path, media.uniform_frames)[1] == 50
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(media.BadVideo, match="frames can be decoded"):
        media.read_video(cut)


def test_a_codec_that_opencv_lacks(tmp_path):
    path = film(tmp_path / "av1.mp4", codec="libsvtav1")
    expected = np.stack([wall(i, 96, 64) for i in range(16)]).astype(float)
    assert np.abs(media.read_video(path) - expected).mean() < 15


def test_chosen_frames_are_those_of_the_whole(tmp_path):
    """Also where the header does not state a number (.webm), and of a repeating index."""
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")):
        path = film(tmp_path / name, 50, codec=codec, make=noise)
        whole = media.read_video(path)
        for choose in (media.uniform_frames, lambda n: [7, 3, 7, n - 1]):
            frames, count = media.read_frames(path, choose)
            assert count == 50 and (frames == whole[choose(50)]).all(), name


def test_memory_does_not_grow_with_the_length(tmp_path):
    code = (
        "import contract, media, resource, sys; media.read_frames(sys.argv[1], media.uniform_frames); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    still, peaks = wall(0, 640, 360), []
    for count in (50, 400):
        options = {"options": {"preset": "ultrafast"}, "make": lambda *_: still}
        path = film(tmp_path / f"{count}.mp4", count, (640, 360), **options)
        line = [sys.executable, "-c", code, str(path)]
        peaks.append(int(subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 50_000  # kB; all frames would be 240,000 more


def test_no_ffmpeg_back_end_is_one_message(latents, monkeypatch):
    import cv2

    monkeypatch.setattr(cv2.videoio_registry, "getBackends", lambda: [cv2.CAP_IMAGES])
    before = latents.files()
    code, text = latents.run("01", "--redo")
    assert code == 3 and "OPENCV_VIDEOIO_PRIORITY_FFMPEG" in text and latents.files() == before, text


def test_a_prompt_that_is_too_long_is_refused(latents, tmp_path):
    """Otherwise both would have one embedding."""
    same = " ".join(["slowly"] * 29)
    contract.save(tmp_path / "p.json", {"Walk": f"{same} walks", "Wave": f"{same} waves"})
    code, text = latents.run(
        "03", "--sampler", "naive", "--name", "long", "--prompt-file", tmp_path / "p.json"
    )
    assert code == 3 and "the prompt of Walk is too long" in text and "slowly walks" in text, text


def test_mjpeg_that_changes_its_sampling(tmp_path):
    parts = [
        film(tmp_path / f"{p}.avi", codec="mjpeg", pix_fmt=p, color_range=2) for p in ("yuvj420p", "yuvj422p")
    ]
    with av.open(str(tmp_path / "both.avi"), "w") as both:
        for i, path in enumerate(parts):
            with av.open(str(path)) as part:
                stream = both.streams.video[0] if i else both.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(video=0):
                    if packet.dts is not None:
                        packet.pts = packet.dts = packet.dts + 16 * i
                        packet.stream = stream
                        both.mux(packet)
    video = media.read_video(tmp_path / "both.avi").astype(float)
    expected = np.stack([wall(i % 16, 96, 64) for i in range(32)])
    assert len(video) == 32 and np.abs(video - expected).mean((1, 2, 3)).max() < 5
