import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from evovlm.data.errors import Reason, SampleError
from evovlm.data.images import (
    MEAN_STD,
    Normalization,
    cut_tiles,
    degrade_jpeg,
    jpeg_qualities,
    load_rgb,
    load_tiles,
    normalize,
    read_size,
)
from evovlm.data.index_format import ImageRef
from evovlm.data.tiling import choose_grid, num_tiles


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: unlike noise, JPEG and resizing treat it as they treat a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def reference(path: Path, tile_size: int, max_tiles: int = 12, thumbnail: bool = True, frame: int = -1) -> ImageRef:
    grid = choose_grid(*read_size(path), 1, max_tiles, tile_size)
    count = num_tiles(grid, thumbnail)
    has_thumbnail = count > grid.cols * grid.rows
    return ImageRef(path, frame, grid.cols, grid.rows, has_thumbnail, count, 0)


def published_tiles(image: Image.Image, ref: ImageRef, size: int) -> list[Image.Image]:
    """Tiling written as the spec words it (§1.7): resize, crop box by box, thumbnail last."""
    resized = image.resize((size * ref.cols, size * ref.rows))
    tiles = []
    for number in range(ref.cols * ref.rows):
        left, top = number % ref.cols * size, number // ref.cols * size
        tiles.append(resized.crop((left, top, left + size, top + size)))
    if ref.thumbnail:
        tiles.append(image.resize((size, size)))
    return tiles


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from([14, 28, 56]), st.integers(1, 12), st.booleans())
def test_tiles_are_those_of_the_specification(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, size: int, max_tiles: int, thumbnail: bool
) -> None:
    path = tmp_path_factory.mktemp("images") / "a.png"
    image = picture(width, height)
    image.save(path)
    ref = reference(path, size, max_tiles, thumbnail)
    tiles = load_tiles(ref, size)
    assert tiles.dtype == np.float32
    assert tiles.shape == (ref.num_tiles, 3, size, size)
    mean, std = (np.array(values, dtype=np.float32) for values in MEAN_STD["imagenet"])
    for tile, expected in zip(tiles, published_tiles(image, ref, size), strict=True):
        pixels = np.asarray(expected).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(tile, ((pixels - mean) / std).transpose(2, 0, 1))


def normalized(pixels: NDArray[np.uint8], name: Normalization = "imagenet") -> NDArray[np.float32]:
    out = np.full((3, *pixels.shape[:2]), np.nan, np.float32)
    normalize(Image.fromarray(pixels), name, out)
    return out


@pytest.mark.parametrize("name", ["imagenet", "clip", "siglip"])
def test_every_value_is_normalised_in_float32(name: Normalization) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mean, std = (np.array(numbers)[:, None, None] for numbers in MEAN_STD[name])
    got = normalized(np.stack([values] * 3, axis=2), name)
    wide = (values / 255 - mean) / std
    np.testing.assert_allclose(got, wide, rtol=1e-6, atol=1e-6)
    single = (values.astype(np.float32) / np.float32(255) - mean.astype(np.float32)) / std.astype(np.float32)
    assert single.dtype == np.float32
    np.testing.assert_array_equal(got, single)


def test_unknown_normalisation() -> None:
    with pytest.raises(ValueError, match="'image' is not one of imagenet, clip, siglip"):
        normalized(np.zeros((2, 2, 3), np.uint8), "image")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(8, 200), st.integers(8, 200), st.integers(1, 9), st.booleans(), st.booleans())
def test_some_tiles_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    width: int,
    height: int,
    max_tiles: int,
    thumbnail: bool,
    degrade: bool,
) -> None:
    path = tmp_path_factory.mktemp("images") / "a.jpg"
    picture(width, height).save(path)
    ref = reference(path, 28, max_tiles, thumbnail)
    begin = data.draw(st.integers(0, ref.num_tiles))
    end = data.draw(st.integers(begin, ref.num_tiles))
    qualities = list(range(75, 75 + ref.num_tiles)) if degrade else None
    some = qualities[begin:end] if qualities else None
    whole = load_tiles(ref, 28, jpeg_quality=qualities)
    np.testing.assert_array_equal(load_tiles(ref, 28, jpeg_quality=some, tiles=range(begin, end)), whole[begin:end])
    room = np.full((ref.num_tiles + 2, 3, 28, 28), np.nan, np.float32)
    place = room[1 : 1 + end - begin]
    assert load_tiles(ref, 28, jpeg_quality=some, tiles=range(begin, end), out=place) is place
    np.testing.assert_array_equal(place, whole[begin:end])
    assert np.isnan(room[0]).all()
    assert np.isnan(room[1 + end - begin :]).all()


def test_only_what_is_wanted_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    picture(120, 60).save(path)
    ref = reference(path, 28, 8)
    assert (ref.cols, ref.rows, ref.thumbnail) == (4, 2, True)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def record(self: Image.Image, size: tuple[int, int], *args: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", record)
    for tiles, expected in ((range(3, 8), [(112, 56)]), (range(8, 9), [(28, 28)]), (range(4, 4), [])):
        sizes.clear()
        load_tiles(ref, 28, tiles=tiles)
        assert sizes == expected


@pytest.mark.parametrize("tiles", [range(-1, 2), range(4, 6), range(0, 5, 2)], ids=str)
def test_tiles_that_the_grid_does_not_have(tmp_path: Path, tiles: range) -> None:
    path = tmp_path / "a.jpg"
    picture(60, 60).save(path)
    with pytest.raises(ValueError, match=f"tiles {tiles.start} to {tiles.stop - 1} of an image of 5 tiles"):
        load_tiles(ImageRef(path, -1, 2, 2, True, 5, 0), 28, tiles=tiles)


def test_room_for_other_tiles_is_an_error(tmp_path: Path) -> None:
    room = np.empty((1, 3, 28, 28), np.float32)  # NumPy would spread one tile over many places, or leave some empty
    with pytest.raises(ValueError, match=r"5 tiles of 28 pixels do not fit an array of shape \[1, 3, 28, 28\]"):
        load_tiles(ImageRef(tmp_path / "a.jpg", -1, 2, 2, True, 5, 0), 28, out=room)


def test_jpeg_degrades_each_tile_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(120, 60).save(path)
    ref = reference(path, 28, 8)
    assert ref.num_tiles == 9
    qualities = list(range(75, 93, 2))
    got = load_tiles(ref, 28, jpeg_quality=qualities)
    for tile, expected, quality in zip(got, published_tiles(picture(120, 60), ref, 28), qualities, strict=True):
        buffer = io.BytesIO()
        expected.save(buffer, format="JPEG", quality=quality)
        np.testing.assert_array_equal(tile, normalized(np.asarray(Image.open(buffer))))
    same = load_tiles(ref, 28, jpeg_quality=75)
    np.testing.assert_array_equal(same[0], got[0])
    assert not np.array_equal(same[1], got[1])
    with pytest.raises(ValueError, match="2 JPEG qualities for 9 tiles"):
        load_tiles(ref, 28, jpeg_quality=[75, 80])


def test_jpeg_quality_matters() -> None:
    image = picture(64, 64)
    pixels = np.asarray(image).astype(int)
    errors = [np.abs(np.asarray(degrade_jpeg(image, quality)) - pixels).mean() for quality in (20, 75, 100)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_jpeg_qualities_are_keyed_and_uniform() -> None:
    drawn = jpeg_qualities(0, 5, 0, 1, 26_000)
    counts = np.bincount(drawn, minlength=101)
    assert counts[:75].sum() == 0
    assert counts[75:].size == 26
    assert ((counts[75:] > 800) & (counts[75:] < 1200)).all()
    assert drawn[:100] == jpeg_qualities(0, 5, 0, 1, 100)
    others = [jpeg_qualities(*where, 100) for where in ((1, 5, 0, 1), (0, 6, 0, 1), (0, 5, 1, 1), (0, 5, 0, 2))]
    assert all(other != drawn[:100] for other in others)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    image = Image.new("I;16", (20, 10), 200) if mode == "I;16" else picture(20, 10).convert(mode)
    image.save(path)
    assert read_size(path) == (20, 10)
    loaded = load_rgb(path)
    assert (loaded.mode, loaded.size) == ("RGB", (20, 10))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_frame_of_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for number, colour in enumerate(colours):
        assert load_rgb(path, number).getpixel((3, 3)) == colour
    with pytest.raises(SampleError, match="no more images"):
        load_rgb(path, 3)


def fails(path: Path, message: str, reason: Reason = Reason.BAD_IMAGE, **options: int) -> None:
    ref = ImageRef(path, -1, 1, 1, False, 1, 0)
    actions: list[Callable[[], object]] = [
        lambda: load_tiles(ref, 28, name="chart/17", **options),
        lambda: read_size(path, decode=True, name="chart/17", **options),
    ]
    for action in actions:
        with pytest.raises(SampleError, match=message) as caught:
            action()
        assert caught.value.reason == reason
        assert str(caught.value).startswith("sample 'chart/17': ")
        assert path.name in str(caught.value)


def test_missing_image(tmp_path: Path) -> None:
    fails(tmp_path / "nothing.png", "does not exist", Reason.MISSING_IMAGE)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_truncated_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    fails(path, r"truncated|not an image")


def test_truncated_jpeg_has_a_readable_header(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture(300, 200).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert read_size(path) == (300, 200)
    fails(path, "is truncated or damaged: .*truncated")


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    fails(path, rf"\({len(content)} bytes\) is not an image")


def test_folder_instead_of_an_image(tmp_path: Path) -> None:
    fails(tmp_path, "is truncated or damaged: .*[Dd]irectory")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width × height pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    body = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(9000, 9000))

    def never(self: Image.Image) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    fails(path, "9000 x 9000 = 81000000 pixels, more than the limit of 80000000: shrink it or raise max_pixels")


def test_the_limit_is_ours_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture(100, 50).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    fails(path, "100 x 50 = 5000 pixels, more than the limit of 4999", max_pixels=4999)
    assert read_size(path, max_pixels=5000) == (100, 50)


def test_pillows_limit_gives_the_same_kind_of_error(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(30_000, 30_000))
    fails(path, "is too large", max_pixels=10**12)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["jpg", "png", "gif", "webp", "bmp", "tiff"]), st.integers(0, 2**32), st.integers(1, 12))
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, seed: int, damages: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"a.{suffix}"
    picture(40, 30).save(path)
    content, dice = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(damages):
        content[dice.randrange(min(len(content), 400))] = dice.randrange(256)
    path.write_bytes(content)
    try:
        width, height = read_size(path, max_pixels=1_000_000)
        assert width * height <= 1_000_000
        assert load_rgb(path, max_pixels=1_000_000).size == (width, height)
    except SampleError as error:
        assert error.reason == Reason.BAD_IMAGE


def test_cut_tiles_keeps_rows_and_columns_apart() -> None:
    pixels: NDArray[np.uint8] = np.zeros((20, 30, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            pixels[row * 10 : row * 10 + 10, col * 10 : col * 10 + 10] = 10 * (3 * row + col)
    tiles = cut_tiles(Image.fromarray(pixels), 3, 2, False, 10, range(6))
    assert [tile.getpixel((5, 5))[0] for tile in tiles] == [0, 10, 20, 30, 40, 50]  # type: ignore[index]
