"""Positions with fractional visual strides: recorded vectors, the algorithm in exact fractions, and δ = 1."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.models.v2pe import DELTAS, next_position, segment_positions

ANY_TIME = settings(deadline=None)
VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "vectors" / "v2pe.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_positions_of_the_original_implementation(vector: dict[str, Any]) -> None:
    runs, done = [], 0
    for text, tiles in vector["text_before_and_tiles"]:
        start, length = done + text + 1, tiles * vector["tokens_per_tile"]  # 1 for <img>
        runs.append((start, length))
        done = start + length + 1  # 1 for </img>
    assert done + vector["text_after"] == vector["length"]
    positions = segment_positions(vector["length"], runs, [vector["delta"]] * len(runs))
    assert positions.dtype == np.float32
    for place, expected in vector["positions"]:
        assert positions[place] == expected, f"position {place}"


def test_there_are_vectors() -> None:
    assert len(VECTORS) >= 10
    assert {v["delta"] for v in VECTORS} >= {1.0, 0.25, 1 / 64}
    assert max(len(v["text_before_and_tiles"]) for v in VECTORS) > 1


PUBLISHED = st.sampled_from(DELTAS)


@st.composite
def segments(draw: st.DrawFn, deltas: Any = PUBLISHED) -> tuple[int, list[tuple[int, int]], list[float]]:
    images = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 700)), max_size=5))
    runs, done = [], 0
    for text, length in images:
        runs.append((done + text, length))
        done += text + length
    return done + draw(st.integers(0, 20)), runs, [draw(deltas) for _ in runs]


def stated(length: int, runs: list[tuple[int, int]], deltas: list[float]) -> list[Fraction]:
    """Spec §2, token by token, in exact arithmetic."""
    stride = {start + k: Fraction(d) for (start, n), d in zip(runs, deltas, strict=True) for k in range(n)}
    ends = {start + n for start, n in runs}
    positions: list[Fraction] = []
    last = Fraction(-1)
    for token in range(length):
        if token in ends:  # a run has ended: text goes on at the next integer
            last = Fraction(math.ceil(last))
        last += stride.get(token, 1)
        positions.append(last)
    return positions


@ANY_TIME
@given(segments())
def test_positions_are_those_of_the_algorithm(segment: tuple[int, list[tuple[int, int]], list[float]]) -> None:
    positions = segment_positions(*segment)
    assert positions.dtype == np.float32
    # Exact, not close: these fractions have a float32.
    assert [Fraction(float(p)) for p in positions] == stated(*segment)


@ANY_TIME
@given(segments(deltas=st.just(1.0)))
def test_stride_one_is_ordinary_positions(segment: tuple[int, list[tuple[int, int]], list[float]]) -> None:
    np.testing.assert_array_equal(segment_positions(*segment), np.arange(segment[0], dtype=np.float32))


def test_example_of_the_spec() -> None:
    # δ = 1/4, three text tokens <img>: "text 0,1,2; <img> 3; image 3.25 … 67.0; </img> 68".
    positions = segment_positions(4 + 256 + 2, [(4, 256)], [0.25])
    assert positions[:4].tolist() == [0, 1, 2, 3]
    assert positions[4] == 3.25
    assert positions[259] == 67.0
    assert positions[260:].tolist() == [68, 69]
    # "With 3 tiles: image ends at 195, </img> 196"
    assert segment_positions(4 + 768 + 1, [(4, 768)], [0.25])[-2:].tolist() == [195, 196]


@pytest.mark.parametrize("delta", DELTAS)
def test_positions_are_exact_below_65536(delta: float) -> None:
    start = 60_000
    positions = segment_positions(start + 256, [(start, 256)], [delta])
    assert [Fraction(float(p)) for p in positions[start:]] == [start - 1 + Fraction(delta) * k for k in range(1, 257)]


def test_strides_are_the_published_nine() -> None:
    assert [int(256 * d) for d in DELTAS] == [256, 128, 64, 32, 16, 8, 4, 2, 1]


@ANY_TIME
@given(segments())
def test_next_position_continues_the_prompt(segment: tuple[int, list[tuple[int, int]], list[float]]) -> None:
    length, runs, deltas = segment
    expected = float(segment_positions(length, runs, deltas)[-1]) + 1 if length else 0.0
    assert next_position(length, runs, deltas) == expected


@pytest.mark.parametrize(
    ("length", "runs", "deltas", "message"),
    [
        (10, [(2, 4)], [], "1 visual runs but 0 deltas"),
        (10, [(2, 4), (5, 2)], [1.0, 1.0], "run at 5, length 2, does not fit 10 tokens in order"),
        (10, [(6, 2), (1, 2)], [1.0, 1.0], "run at 1, length 2"),
        (10, [(7, 4)], [1.0], "run at 7, length 4, does not fit 10"),
        (10, [(2, 4)], [0.0], r"delta 0.0 is not in \(0, 1\]"),
        (10, [(2, 4)], [1.5], "delta 1.5"),
    ],
)
def test_errors_name_the_numbers(length: int, runs: list[tuple[int, int]], deltas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_positions(length, runs, deltas)
