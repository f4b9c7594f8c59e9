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


@pytest.mark.parametrize("name", ["imagenet", "clip", "siglip"])
def test_normalisation(name: Normalization) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    mean, std = (np.array(values) for values in MEAN_STD[name])
    expected = ((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(normalize(tiles, name), expected, rtol=1e-6, atol=1e-6)


def test_unknown_normalisation() -> None:
    with pytest.raises(ValueError, match="'image' is not one of imagenet, clip, siglip"):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), "image")  # type: ignore[arg-type]


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
        np.testing.assert_array_equal(tile, normalize(np.asarray(Image.open(buffer))[None])[0])
    same = load_tiles(ref, 28, jpeg_quality=75)
    np.testing.assert_array_equal(same[0], got[0])
    assert not np.array_equal(same[1], got[1])
    with pytest.raises(ValueError, match="2 JPEG qualities for 9 tiles"):
        load_tiles(ref, 28, jpeg_quality=[75, 80])


def test_jpeg_quality_matters() -> None:
    pixels = np.asarray(picture(64, 64))
    errors = [np.abs(degrade_jpeg(pixels, quality).astype(int) - pixels).mean() for quality in (20, 75, 100)]
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
    tiles = cut_tiles(Image.fromarray(pixels), 3, 2, False, 10)
    assert [int(tile[5, 5, 0]) for tile in tiles] == [0, 10, 20, 30, 40, 50]
