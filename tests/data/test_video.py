import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evovlm.data.errors import Reason, SampleError
from evovlm.data.images import load_rgb
from evovlm.data.video import Video, frame_indices, open_video, select_frames

VECTORS = json.loads((Path(__file__).parent / "vectors" / "frames.json").read_text())


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_published_frames(number: int) -> None:
    vector = VECTORS[number]
    indices = frame_indices(
        vector["video_frames"],
        vector["num_frames"],
        vector["sampling"],
        input_fps=vector["input_fps"],
        max_frames=vector["max_num_frames"],
    )
    assert indices == vector["indices"]


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**64 - 1))
def test_random_frames_lie_one_in_each_interval(video_frames: int, wanted: int, random_key: int) -> None:
    indices = frame_indices(video_frames, wanted, "rand", random_key=random_key)
    assert indices == frame_indices(video_frames, wanted, "rand", random_key=random_key)
    count = min(wanted, video_frames)
    borders = np.linspace(0, video_frames, count + 1).astype(int)
    assert all(borders[i] <= indices[i] < borders[i + 1] for i in range(count))
    assert indices[count:] == [indices[count - 1]] * (wanted - count)


def test_random_frames_depend_on_the_key_and_reach_every_frame() -> None:
    draws = [frame_indices(20, 4, "rand", random_key=random_key) for random_key in range(200)]
    for interval in range(4):
        assert {draw[interval] for draw in draws} == set(range(5 * interval, 5 * interval + 5))
    assert len({tuple(draw) for draw in draws}) > 100


def test_short_videos_repeat_their_last_frame() -> None:
    assert frame_indices(3, 5, "middle") == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("sampling", ["first", "fps", "fps0", "fps-1", "fpsx", "midddle"])
def test_unknown_sampling(sampling: str) -> None:
    with pytest.raises(ValueError, match=f"'{sampling}' is not 'middle', 'rand' or 'fpsX'"):
        frame_indices(10, 5, sampling)


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0)])
def test_nothing_to_choose(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        frame_indices(*arguments)


def colour(number: int) -> tuple[int, int, int]:
    return (20 * number, 255 - 20 * number, 128)


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), colour(number)).save(folder / f"clip2_frame{number}.png")
    (folder / "notes.txt").write_text("not a frame")
    return folder


def write_gif(path: Path, count: int, milliseconds: int = 100) -> Path:
    frames = [Image.new("RGB", (8, 8), colour(number)) for number in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds)
    return path


def test_folder_is_ordered_by_number(tmp_path: Path) -> None:
    video = open_video(write_folder(tmp_path / "v", 12))
    assert video.num_frames == 12
    assert [file.name for file in video.files] == [f"clip2_frame{i}.png" for i in range(12)]
    path, frame = video.frame(11)
    assert frame == -1
    assert load_rgb(path).getpixel((0, 0)) == colour(11)


def test_gif_frames(tmp_path: Path) -> None:
    video = open_video(write_gif(tmp_path / "a.gif", 10))
    assert (video.num_frames, video.fps, video.files) == (10, 10.0, ())
    for number in range(10):
        red, _, _ = load_rgb(*video.frame(number)).getpixel((0, 0))  # type: ignore[misc]
        assert abs(red - 20 * number) <= 8  # the palette is coarse


def test_every_frame_of_a_short_video_once(tmp_path: Path) -> None:
    video = open_video(write_gif(tmp_path / "a.gif", 5))
    assert select_frames(video, min_frames=8, max_frames=32) == [(video.path, i) for i in range(5)]


def test_number_of_frames_is_drawn_by_the_key() -> None:
    video = Video(Path("v.gif"), 1000, 10.0)
    counts = [len(select_frames(video, random_key=random_key)) for random_key in range(2000)]
    assert set(counts) == set(range(8, 33))
    assert counts[:5] == [len(select_frames(video, random_key=random_key)) for random_key in range(5)]
    assert len(select_frames(video, min_frames=7, max_frames=7)) == 7


def test_clip_keeps_its_seconds() -> None:
    video = Video(Path("v.gif"), 100, 10.0)
    frames = [frame for _, frame in select_frames(video, min_frames=4, max_frames=4, clip=(2.0, 6.0))]
    assert frames == [20 + i for i in frame_indices(40, 4, "middle")]
    frames = [frame for _, frame in select_frames(video, sampling="fps2", clip=(2.0, 6.0))]
    assert frames == [20 + i for i in frame_indices(40, 4, "fps2", input_fps=10)]
    assert max(frame for _, frame in select_frames(video, clip=(9.0, 99.0))) < 100
    for clip, sampling in (((20.0, 30.0), "middle"), ((2.0, 2.1), "fps1")):
        with pytest.raises(SampleError, match="100 frames at 10 per second give none") as caught:
            select_frames(video, clip=clip, sampling=sampling, name="v/1")
        assert str(caught.value).startswith("sample 'v/1': ")


def test_bad_videos(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="does not exist") as caught:
        open_video(tmp_path / "nothing.gif", name="v/3")
    assert caught.value.reason == Reason.MISSING_IMAGE
    assert str(caught.value).startswith("sample 'v/3': ")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match="holds no frames"):
        open_video(tmp_path / "empty")
    (tmp_path / "a.mp4").write_bytes(b"film")
    with pytest.raises(SampleError, match=r"only folders of frames and .* extract"):
        open_video(tmp_path / "a.mp4")
    with pytest.raises(SampleError, match="does not exist"):
        open_video(tmp_path / "b.mp4")
    (tmp_path / "a.gif").write_bytes(b"film")
    with pytest.raises(SampleError, match="not an image"):
        open_video(tmp_path / "a.gif")
    folder = write_folder(tmp_path / "v", 2)
    (folder / "other_01.jpg").write_bytes(b"")
    with pytest.raises(SampleError, match="both have the number 1"):
        open_video(folder)
    (folder / "cover.jpg").write_bytes(b"")
    with pytest.raises(SampleError, match="has no number in its name"):
        open_video(folder)
    with pytest.raises(ValueError, match="1 <= 9 <= 8"):
        select_frames(Video(Path("v.gif"), 9, 1.0), min_frames=9, max_frames=8)
