"""Lengths of made-up samples, without the samples: tokens, tiles and images, spread as in real mixtures.

    kind of sample ─► images ─► tiles of each image ─┐
                                                     ├─► tokens = text + 256 a tile + 2 an image, at most 16,384
                   └► text tokens, log-normal ───────┘

Benchmarks and tests of planning draw from it. Every number is keyed by the sample (or image) that it is for.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import choice_index, keys, uniform

MAX_TOKENS = 16_384
TOKENS_PER_TILE = 256
MARKS_PER_IMAGE = 2  # <img> and </img>
MAX_GRID = 12

# How often dynamic tiling answers with a grid of 1 … 12 tiles (a thumbnail comes on top where there is more than one):
# it takes the grid with the closest aspect ratio, so 4:3 photographs give 12, 3:2 give 6, squares 1, 4 or 9.
_GRIDS = np.cumsum([0.14, 0.09, 0.05, 0.10, 0.02, 0.16, 0.01, 0.07, 0.07, 0.02, 0.01, 0.26])


@dataclass(frozen=True)
class LengthMix:
    """Lengths of n samples.

    Attributes:
        tokens: int32 [n], expanded length of each sample, 1 to ``MAX_TOKENS``.
        tiles: int32 [n], tiles of each sample, all images together.
        images: int32 [n], images of each sample.
        image_tiles: int32 [images.sum()], tiles of each image, sample after sample.
    """

    tokens: NDArray[np.int32]
    tiles: NDArray[np.int32]
    images: NDArray[np.int32]
    image_tiles: NDArray[np.int32]


@dataclass(frozen=True)
class _Kind:
    """Samples of one kind: their share of all samples, their text and their images."""

    share: float
    median: float
    sigma: float
    """The text's tokens are log-normal: ``median · exp(sigma · z)``."""
    images: tuple[int, int] = (0, 0)
    """Least and most images, each number as likely."""
    frames: bool = False
    """Images of one tile each, as the frames of a video; otherwise ``MAX_GRID`` is shared out over the images."""


MIXES: dict[str, tuple[_Kind, ...]] = {
    # A quarter of the tokens is pure text, as in InternVL3's pre-training; a heavy tail reaches the longest sample.
    "internvl": (
        _Kind(0.28, 1000.0, 1.3),
        _Kind(0.60, 180.0, 1.0, (1, 1)),
        _Kind(0.08, 260.0, 1.0, (2, 6)),
        _Kind(0.04, 220.0, 0.9, (8, 32), frames=True),
    ),
    "short": (_Kind(0.6, 220.0, 0.6), _Kind(0.4, 80.0, 0.5, (1, 1), frames=True)),
    "bimodal": (_Kind(0.96, 260.0, 0.5), _Kind(0.04, 11_000.0, 0.25)),
}


def length_mix(n: int, key: int, name: str = "internvl") -> LengthMix:
    """Draw the lengths of n samples.

    Args:
        n: samples.
        key: another key draws other lengths.
        name: ``internvl`` (text, images of 1 to 13 tiles, several images, videos), ``short`` (text and one-tile images
            of some hundred tokens) or ``bimodal`` (short texts and few of about 11,000 tokens).

    Raises:
        KeyError: there is no mix of this name.
    """
    kinds = MIXES[name]

    def draw(what: str, count: int = n) -> NDArray[np.uint64]:
        return keys("lengths", what, key, np.arange(count))

    shares = np.cumsum([kind.share for kind in kinds])
    kind = np.searchsorted(shares[:-1], uniform(draw("kind")), side="right")
    least, most = np.array([k.images for k in kinds], np.int64).T
    images = least[kind] + (choice_index(draw("images"), 1 << 20) * (most - least + 1)[kind] >> 20)

    owner = np.repeat(np.arange(n), images)
    frames = np.array([k.frames for k in kinds])
    limit = np.where(frames[kind], 1, np.maximum(1, MAX_GRID // np.maximum(images, 1)))[owner]
    grid = np.minimum(1 + np.searchsorted(_GRIDS[:-1], uniform(draw("grid", len(owner))), side="right"), limit)
    image_tiles = grid + (grid > 1)
    tiles = np.bincount(owner, weights=image_tiles, minlength=n).astype(np.int64)

    # Box and Muller's normal numbers from two uniform ones.
    normal = np.sqrt(-2 * np.log1p(-uniform(draw("radius")))) * np.cos(2 * np.pi * uniform(draw("angle")))
    median, sigma = (np.array([getattr(k, part) for k in kinds]) for part in ("median", "sigma"))
    text = 1 + (median[kind] * np.exp(sigma[kind] * normal)).astype(np.int64)
    tokens = np.minimum(text + TOKENS_PER_TILE * tiles + MARKS_PER_IMAGE * images, MAX_TOKENS)
    return LengthMix(
        tokens.astype(np.int32), tiles.astype(np.int32), images.astype(np.int32), image_tiles.astype(np.int32)
    )
