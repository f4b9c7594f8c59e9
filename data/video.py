"""Which frames of a video a sample shows, and where they lie (spec §3.4).

    0        interval 1       interval 2       interval 3      number of frames
    ├────────────┬────────────────┬────────────────┤
          ▲              ▲                ▲                    "middle": the midpoint of each interval
       ▲                    ▲            ▲                     "rand": a keyed random frame of each interval
    "fps2": one frame every 1/2 s, the first after half of that

A video is a folder of numbered images or an animated file (.gif); each chosen frame becomes one tile.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from evovlm.csrc.random import choice_index, keys
from evovlm.data.errors import Reason, SampleError
from evovlm.data.images import MAX_PIXELS, open_image

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ANIMATED_SUFFIXES = (".gif", ".webp", ".png", ".apng")


@dataclass(frozen=True)
class Video:
    """A video as a list of frames.

    Attributes:
        path: the folder or the animated file.
        num_frames: frames in it.
        fps: frames per second, to turn seconds into frames.
        files: the frames' files in order, if it is a folder; empty for an animated file.
    """

    path: Path
    num_frames: int
    fps: float
    files: tuple[Path, ...] = ()

    def frame(self, index: int) -> tuple[Path, int]:
        """Return where a frame lies: file, and frame number inside it (-1: the file is a still image)."""
        return (self.files[index], -1) if self.files else (self.path, index)


def frame_indices(
    num_video_frames: int,
    num_frames: int,
    sampling: str = "middle",
    *,
    input_fps: float = 1.0,
    max_frames: int = -1,
    random_key: int = 0,
) -> list[int]:
    """Choose frames, ascending, numbered from 0.

    Args:
        num_video_frames: frames that the video has, at least 1.
        num_frames: frames wanted by "middle" and "rand"; a shorter video's last frame is repeated.
        sampling: "middle", "rand", or "fpsX" with X frames per second.
        input_fps: frames per second of the video, for "fpsX".
        max_frames: "fpsX" keeps the first so many; -1: all.
        random_key: key of "rand" (``evovlm.csrc.random.key``).

    Returns:
        Frame numbers; empty if "fpsX" finds none, the video being shorter than half of its interval.

    Raises:
        ValueError: unknown sampling, or a number below 1.
    """
    if num_video_frames < 1 or num_frames < 1 or input_fps <= 0:
        raise ValueError(f"cannot take {num_frames} frames of {num_video_frames} at {input_fps} frames per second")
    if sampling in ("middle", "rand"):
        count = min(num_frames, num_video_frames)
        borders = np.linspace(0, num_video_frames, count + 1).astype(np.int64)
        first, last = borders[:-1], borders[1:] - 1
        if sampling == "middle":
            chosen = (first + last) // 2
        else:
            draws = keys("frame", random_key, np.arange(count))
            widths = last - first + 1
            chosen = first + np.array([choice_index(k, int(w)) for k, w in zip(draws, widths, strict=True)], np.int64)
        return [*chosen.tolist(), *[int(chosen[-1])] * (num_frames - count)]
    match = re.fullmatch(r"fps(\d+(?:\.\d*)?|\.\d+)", sampling)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"frame sampling {sampling!r} is not 'middle', 'rand' or 'fpsX' such as 'fps0.5'")
    interval = 1 / float(match[1])
    seconds = np.arange(interval / 2, num_video_frames / input_fps + interval / 2, interval)
    found = np.around(seconds * input_fps).astype(np.int64)
    found = found[found < num_video_frames]
    return [int(index) for index in (found[:max_frames] if max_frames > 0 else found)]


def open_video(
    path: str | Path, *, folder_fps: float = 1.0, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Video:
    """List a video's frames without decoding them.

    Args:
        path: a folder of images, whose order is that of the last number in their names, or an animated file.
        folder_fps: frames per second at which a folder's frames were taken.
        max_pixels: limit for width × height of an animated file.
        name: the sample's name for error messages.

    Raises:
        SampleError: missing, an empty folder, a frame without a number or two with the same, or a kind of file
            that is not read (mp4 and the like).
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
        if not files:
            raise SampleError(Reason.MISSING_IMAGE, f"video folder '{path}' holds no frames ({FRAME_SUFFIXES})", name)
        numbered = sorted((_frame_number(file, name), file) for file in files)
        for (number, file), (next_number, next_file) in pairwise(numbered):
            if number == next_number:
                raise SampleError(
                    Reason.BAD_IMAGE, f"frames '{file}' and '{next_file.name}' both have the number {number}", name
                )
        return Video(path, len(files), folder_fps, tuple(file for _, file in numbered))
    if path.suffix.lower() not in ANIMATED_SUFFIXES and path.exists():
        raise SampleError(
            Reason.BAD_IMAGE,
            f"video '{path}': only folders of frames and {ANIMATED_SUFFIXES} are read; extract its frames to a folder",
            name,
        )
    with open_image(path, max_pixels, name) as image:
        num_frames = int(getattr(image, "n_frames", 1))
        milliseconds = float(image.info.get("duration", 0))
    return Video(path, num_frames, 1000 / milliseconds if milliseconds > 0 else folder_fps)


def select_frames(
    video: Video,
    *,
    sampling: str = "middle",
    min_frames: int = 8,
    max_frames: int = 32,
    clip: tuple[float, float] | None = None,
    random_key: int = 0,
    name: str | None = None,
) -> list[tuple[Path, int]]:
    """Choose the frames that a sample shows.

    The number of frames is drawn uniformly from ``min_frames`` … ``max_frames`` by the key; a shorter video shows
    each frame once (repeats would cost tokens and say nothing). "fpsX" takes what its rate gives, at most
    ``max_frames``.

    Args:
        video: from ``open_video``.
        sampling: as ``frame_indices``.
        min_frames: fewest frames to draw.
        max_frames: most frames.
        clip: start and end in seconds; frames outside are left out.
        random_key: key of this sample (``evovlm.csrc.random.key``).
        name: the sample's name for error messages.

    Returns:
        For each frame its file and its number inside the file (-1: a still image).

    Raises:
        SampleError: no frame lies in the clip, or "fpsX" gives none.
        ValueError: not ``1 ≤ min_frames ≤ max_frames``.
    """
    if not 1 <= min_frames <= max_frames:
        raise ValueError(f"frames of a video: 1 <= {min_frames} <= {max_frames} does not hold")
    start, stop = 0, video.num_frames
    if clip is not None:
        start = max(0, int(clip[0] * video.fps))
        stop = min(stop, start + int((clip[1] - clip[0]) * video.fps))
    drawn = min_frames + int(choice_index(keys("num_frames", random_key), max_frames - min_frames + 1))
    chosen: list[int] = []
    if stop > start:
        chosen = frame_indices(
            stop - start,
            min(drawn, stop - start),
            sampling,
            input_fps=video.fps,
            max_frames=max_frames,
            random_key=random_key,
        )
    if not chosen:
        raise SampleError(
            Reason.MISSING_IMAGE,
            f"video '{video.path}': {video.num_frames} frames at {video.fps:g} per second give none "
            f"for clip {clip} and sampling '{sampling}'",
            name,
        )
    return [video.frame(start + index) for index in chosen]


def _frame_number(file: Path, name: str | None) -> int:
    numbers = re.findall(r"\d+", file.stem)
    if not numbers:
        raise SampleError(Reason.BAD_IMAGE, f"frame '{file}' has no number in its name, so no place in the video", name)
    return int(numbers[-1])
