import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.tiling import Grid, candidate_grids, choose_grid, max_tiles_per_image, num_tiles

VECTORS = json.loads((Path(__file__).parent / "vectors" / "tiling.json").read_text())


def test_published_grids() -> None:
    wrong = []
    for vector in VECTORS:
        grid = choose_grid(vector["width"], vector["height"], 1, vector["max_num"], vector["tile_size"])
        expected = Grid(vector["grid_cols"], vector["grid_rows"])
        if grid != expected or num_tiles(grid, True) != vector["num_tiles_with_thumbnail"]:
            wrong.append((vector, grid))
    assert len(VECTORS) == 300
    assert wrong == []


@pytest.mark.parametrize(
    ("size", "at_12", "at_6"),
    [
        ((448, 448), (1, 1), (1, 1)),
        ((600, 600), (1, 1), (1, 1)),
        ((640, 640), (2, 2), (2, 2)),
        ((1000, 1000), (3, 3), (2, 2)),
        ((800, 600), (4, 3), (3, 2)),
        ((320, 240), (4, 3), (3, 2)),
        ((1920, 1080), (4, 2), (2, 1)),
        ((1080, 1920), (2, 4), (1, 2)),
        ((3000, 500), (6, 1), (6, 1)),
        ((560, 280), (2, 1), (2, 1)),
        ((1600, 400), (4, 1), (4, 1)),
    ],
)
def test_grids_of_the_specification(size: tuple[int, int], at_12: tuple[int, int], at_6: tuple[int, int]) -> None:
    assert choose_grid(*size, max_tiles=12) == at_12
    assert choose_grid(*size, max_tiles=6) == at_6


@pytest.mark.parametrize(("max_tiles", "count"), [(6, 14), (12, 35), (24, 84), (40, 158)])
def test_number_of_candidates(max_tiles: int, count: int) -> None:
    assert len(candidate_grids(1, max_tiles)) == count


def test_thumbnail_only_beside_several_tiles() -> None:
    assert num_tiles(Grid(1, 1), True) == 1
    assert num_tiles(Grid(3, 2), True) == 7
    assert num_tiles(Grid(3, 2), False) == 6


@pytest.mark.parametrize(("cap", "images", "expected"), [(12, 1, 12), (12, 5, 2), (12, 13, 1), (6, 0, 6)])
def test_images_share_the_cap(cap: int, images: int, expected: int) -> None:
    assert max_tiles_per_image(cap, images) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 8), st.integers(0, 20), st.integers(1, 500))
def test_no_candidate_is_nearer(width: int, height: int, low: int, more: int, tile_size: int) -> None:
    grid = choose_grid(width, height, low, low + more, tile_size)
    assert low <= grid.cols * grid.rows <= low + more
    ratio = width / height
    nearest = min(abs(ratio - g.cols / g.rows) for g in candidate_grids(low, low + more))
    assert abs(ratio - grid.cols / grid.rows) == nearest


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0), (5, 5, 0, 3), (5, 5, 4, 3), (5, 5, 1, 3, 0)])
def test_impossible_sizes(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tile"):
        choose_grid(*arguments)
