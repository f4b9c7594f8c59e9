"""An image file to the normalised tiles that the vision model reads (spec §1.7, §3.4).

    file ──header──► size checked ──decode──► RGB ──bicubic──► cols·S × rows·S ──cut──► tiles, row by row
                                               └────bicubic──► S × S ─────────────────► thumbnail, last
    tiles ──(JPEG at a given quality, each tile by itself)──► (x / 255 − mean) / std ──► float32 [N, 3, S, S]

Pixels are what InternVL's own code gives, bit for bit: PIL decodes and resizes (no ``draft`` shortcuts), and EXIF
orientation and transparency are ignored. Unlike there, a truncated file is an error and not a half grey image.

Some tiles of an image can be made alone, with the same pixels: the grid is resized whole, since a part by itself
would be rounded differently. This file imports neither torch nor pydantic: a process that decodes starts in no time.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from evovlm.csrc.random import choice_index, keys
from evovlm.data.errors import Reason, SampleError

if TYPE_CHECKING:
    from evovlm.data.index_format import ImageRef

Normalization = Literal["imagenet", "clip", "siglip"]
"""Whose mean and standard deviation normalise the pixels."""

MEAN_STD: dict[Normalization, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

JPEG_QUALITIES = range(75, 101)
"""Qualities that the JPEG degradation draws from, each as likely."""

MAX_PIXELS = 80_000_000
"""Default limit for width × height; larger images are taken for decompression bombs."""

# Raster formats that PIL decodes in this process. Others, such as EPS, would start outside programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")

# What PIL raises for damaged files, depending on the format.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, struct.error)


def read_size(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, decode: bool = False, name: str | None = None
) -> tuple[int, int]:
    """Read an image's width and height in pixels, by default from the header alone.

    Args:
        path: the file.
        max_pixels: limit for width × height.
        decode: also decode the pixels, so that a truncated file is found now (about 10 ms per megapixel).
        name: the sample's name for error messages.

    Raises:
        SampleError: as ``load_tiles``; truncated data only with ``decode``.
    """
    with open_image(Path(path), max_pixels, name) as image:
        if decode:
            image.load()
        return image.size


def load_rgb(
    path: str | Path, frame: int = -1, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Decode one image (``frame`` -1) or one frame of an animated file to RGB.

    Raises:
        SampleError: as ``load_tiles``.
    """
    with open_image(Path(path), max_pixels, name) as image:
        if frame >= 0:
            image.seek(frame)
        image.load()
        # `convert` would copy. The class of other formats may decode once more when it is next used.
        return image if image.mode == "RGB" and image.format == "JPEG" else image.convert("RGB")


def load_tiles(
    ref: "ImageRef",
    tile_size: int,
    normalization: Normalization = "imagenet",
    jpeg_quality: int | Sequence[int] | None = None,
    *,
    tiles: range | None = None,
    out: NDArray[np.float32] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> NDArray[np.float32]:
    """Decode an image and cut it into normalised tiles.

    Args:
        ref: file, frame and the grid that the index chose.
        tile_size: side S of a tile in pixels.
        normalization: mean and standard deviation to use.
        jpeg_quality: degrade each tile by JPEG, at one quality for all or one for each tile; ``None``: not at all.
        tiles: which tiles to make; ``None``: all.
        out: where to write them, float32 [N, 3, S, S]; ``None``: a new array.
        max_pixels: limit for the image's width × height, checked on the header before anything is decoded.
        name: the sample's name for error messages.

    Returns:
        float32 [N, 3, S, S], N = cols·rows (+ 1 with a thumbnail), or as many as asked for: tiles row by row,
        thumbnail last.

    Raises:
        SampleError: the file is missing, not an image, too large, truncated or otherwise damaged.
        ValueError: not as many qualities as tiles, no such tiles, or ``out`` has no room for just them.
    """
    tiles = range(ref.num_tiles) if tiles is None else tiles
    out = np.empty((len(tiles), 3, tile_size, tile_size), dtype=np.float32) if out is None else out
    if out.shape != (len(tiles), 3, tile_size, tile_size):
        raise ValueError(f"{len(tiles)} tiles of {tile_size} pixels do not fit an array of shape {list(out.shape)}")
    qualities = [jpeg_quality] * len(tiles) if isinstance(jpeg_quality, int) else jpeg_quality
    image = load_rgb(ref.path, ref.frame, max_pixels=max_pixels, name=name)
    write_tiles(image, ref.cols, ref.rows, ref.thumbnail, tiles, normalization, qualities, out)
    return out


def write_tiles(
    image: Image.Image,
    cols: int,
    rows: int,
    thumbnail: bool,
    tiles: range,
    normalization: Normalization,
    jpeg_qualities: Sequence[int] | None,
    out: NDArray[np.float32],
) -> None:
    """Resize an RGB image to a grid and write some of its tiles, normalised, to ``out``, float32 [N, 3, S, S].

    Raises:
        ValueError: not as many JPEG qualities as tiles, or the grid has no such tiles.
    """
    if jpeg_qualities is not None and len(jpeg_qualities) != len(tiles):
        raise ValueError(f"{len(jpeg_qualities)} JPEG qualities for {len(tiles)} tiles")
    for place, tile in enumerate(cut_tiles(image, cols, rows, thumbnail, out.shape[-1], tiles)):
        degraded = tile if jpeg_qualities is None else degrade_jpeg(tile, int(jpeg_qualities[place]))
        normalize(degraded, normalization, out[place])


def cut_tiles(
    image: Image.Image, cols: int, rows: int, thumbnail: bool, tile_size: int, tiles: range
) -> Iterator[Image.Image]:
    """Resize an RGB image to a grid and yield some of its tiles, S × S: they count row by row, the thumbnail is last.

    Raises:
        ValueError: the grid has no such tiles.
    """
    in_grid, size = cols * rows, tile_size
    if not tiles:
        return
    if not (tiles.step == 1 and tiles.start >= 0 and tiles.stop <= in_grid + thumbnail):
        raise ValueError(f"tiles {tiles.start} to {tiles.stop - 1} of an image of {in_grid + thumbnail} tiles")
    if tiles.start < in_grid:
        grid = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
        for number in range(tiles.start, min(tiles.stop, in_grid)):
            left, top = number % cols * size, number // cols * size
            yield grid.crop((left, top, left + size, top + size))
    if tiles.stop > in_grid:
        yield image.resize((size, size), Image.Resampling.BICUBIC)


def degrade_jpeg(tile: Image.Image, quality: int) -> Image.Image:
    """Encode an RGB image as JPEG at a quality and decode it again."""
    with io.BytesIO() as buffer:
        tile.save(buffer, format="JPEG", quality=quality)
        degraded = Image.open(buffer, formats=("JPEG",))
        degraded.load()
        return degraded


def jpeg_qualities(seed: int, sample: int, visit: int, image: int, num_tiles: int) -> list[int]:
    """Draw a quality for each tile of an image, as InternVL does: independently, uniform over 75 … 100."""
    drawn = choice_index(keys("jpeg", seed, sample, visit, image, np.arange(num_tiles)), len(JPEG_QUALITIES))
    return [JPEG_QUALITIES[i] for i in drawn.tolist()]


def normalize(tile: Image.Image, normalization: Normalization, out: NDArray[np.float32]) -> None:
    """Write an RGB image of S × S pixels as model input, ``(x / 255 − mean) / std``, to ``out``, float32 [3, S, S].

    Raises:
        ValueError: unknown normalization.
    """
    if normalization not in MEAN_STD:
        raise ValueError(f"normalization {normalization!r} is not one of {', '.join(MEAN_STD)}")
    # Plane by plane, so that a plane stays in the cache: faster than a table of the 256 values that a pixel can have.
    for band, plane, mean, std in zip(tile.split(), out, *MEAN_STD[normalization], strict=True):
        np.divide(np.asarray(band), np.float32(255), out=plane)
        plane -= np.float32(mean)
        plane /= np.float32(std)


@contextmanager
def open_image(path: Path, max_pixels: int, name: str | None) -> Iterator[Image.Image]:
    """Open a file and check its size; every way in which PIL can fail inside the ``with`` becomes a ``SampleError``."""
    try:
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise SampleError(
                    Reason.BAD_IMAGE,
                    f"image '{path}' has {width} x {height} = {width * height} pixels, more than the limit of "
                    f"{max_pixels}: shrink it or raise max_pixels",
                    name,
                )
            yield image
    except SampleError:
        raise
    except FileNotFoundError as error:
        raise SampleError(Reason.MISSING_IMAGE, f"image '{path}' does not exist", name) from error
    except Image.DecompressionBombError as error:  # PIL's own, higher limit
        raise SampleError(Reason.BAD_IMAGE, f"image '{path}' is too large: {error}", name) from error
    except UnidentifiedImageError as error:
        raise SampleError(
            Reason.BAD_IMAGE, f"'{path}' ({path.stat().st_size} bytes) is not an image of a known format", name
        ) from error
    except _DAMAGED as error:
        raise SampleError(Reason.BAD_IMAGE, f"image '{path}' is truncated or damaged: {error}", name) from error
