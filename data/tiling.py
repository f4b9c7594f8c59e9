"""Which grid of square tiles an image is cut into: InternVL's dynamic tiling (spec §1.7).

1600 × 800 image, at most 12 tiles of 448      candidates: every cols × rows with min ≤ cols·rows ≤ max
  ┌────┬────┬────┬────┐                        taken: the one whose cols/rows is nearest to the image's
  │  0 │  1 │  2 │  3 │   + thumbnail ┌────┐   width/height (here 4 × 2); among equals the largest that the
  ├────┼────┼────┼────┤               │  8 │   image half fills
  │  4 │  5 │  6 │  7 │               └────┘
  └────┴────┴────┴────┘   tiles row by row, the whole image as a thumbnail last if there is more than one tile
"""

from functools import lru_cache
from typing import NamedTuple


class Grid(NamedTuple):
    """Tiles across and down."""

    cols: int
    rows: int


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """List every grid with ``min_tiles ≤ cols·rows ≤ max_tiles``, fewest tiles first (within a number: few cols first).

    Raises:
        ValueError: not ``1 ≤ min_tiles ≤ max_tiles``.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"tiles of an image: 1 <= min_tiles <= max_tiles does not hold for {min_tiles} and {max_tiles}"
        )
    return tuple(
        Grid(cols, count // cols)
        for count in range(min_tiles, max_tiles + 1)
        for cols in range(1, count + 1)
        if count % cols == 0
    )


def choose_grid(width: int, height: int, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448) -> Grid:
    """Choose the grid for an image of ``width`` × ``height`` pixels.

    The nearest ratio wins; on an exact tie a later (larger) candidate replaces an earlier one if the image has more
    than half of the pixels of the candidate's tiles.

    Args:
        width: pixels, at least 1.
        height: pixels, at least 1.
        min_tiles: fewest tiles, thumbnail not counted.
        max_tiles: most tiles, thumbnail not counted.
        tile_size: side of a tile in pixels.

    Raises:
        ValueError: a size below 1, or not ``1 ≤ min_tiles ≤ max_tiles``.
    """
    if width < 1 or height < 1 or tile_size < 1:
        raise ValueError(f"cannot tile an image of {width} x {height} pixels into tiles of {tile_size}")
    ratio, area = width / height, width * height
    best, best_difference = Grid(1, 1), float("inf")
    for grid in candidate_grids(min_tiles, max_tiles):
        difference = abs(ratio - grid.cols / grid.rows)
        # Equality of the two floats is meant: 1×1 and 2×2 tie exactly, near misses do not (as upstream).
        if difference < best_difference or (
            difference == best_difference and area > 0.5 * tile_size * tile_size * grid.cols * grid.rows
        ):
            best, best_difference = grid, difference
    return best


def num_tiles(grid: Grid, thumbnail: bool) -> int:
    """Count a grid's tiles, with the thumbnail where it gets one (only beside more than one tile)."""
    tiles = grid.cols * grid.rows
    return tiles + (thumbnail and tiles > 1)


def max_tiles_per_image(max_tiles: int, num_images: int) -> int:
    """Share a sample's tile limit among its images: ``max(1, max_tiles // num_images)``."""
    return max(1, max_tiles // max(1, num_images))
