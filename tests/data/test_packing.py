"""Packing: budgets kept, nothing lost, the C++ equal to a plain reference, good fill, speed."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.data.packing import pack, pack_windows


def pack_reference(
    tokens: NDArray[np.int32], tiles: NDArray[np.int32], max_tokens: int, max_tiles: int
) -> tuple[NDArray[np.int32], int]:
    """Best fit decreasing, one sample after another over arrays of all open packs.

    Among packs with room: the least free tokens, then the most free tiles, then the one changed last.
    """
    free_tokens, free_tiles, changed = (np.empty(0, np.int64) for _ in range(3))
    pack_of = np.empty(len(tokens), np.int32)
    for now, i in enumerate(np.argsort(-tokens.astype(np.int64), kind="stable")):
        fits = np.flatnonzero((free_tokens >= tokens[i]) & (free_tiles >= tiles[i]))
        if len(fits):
            best = fits[np.lexsort((-changed[fits], -free_tiles[fits], free_tokens[fits]))[0]]
        else:
            best = len(free_tokens)
            free_tokens, free_tiles = np.append(free_tokens, max_tokens), np.append(free_tiles, max_tiles)
            changed = np.append(changed, now)
        free_tokens[best] -= tokens[i]
        free_tiles[best] -= tiles[i]
        changed[best] = now
        pack_of[i] = best
    return pack_of, len(free_tokens)


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.int32], NDArray[np.int32], int, int]:
    max_tokens = draw(st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 4095, 4096, 5000, 70_000])))
    max_tiles = draw(st.integers(0, 12))
    size = draw(st.integers(0, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    longest = draw(st.integers(1, max_tokens))
    tokens = rng.integers(1, longest + 1, size).astype(np.int32)
    tiles = rng.integers(0, draw(st.integers(0, max_tiles)) + 1, size).astype(np.int32)
    return tokens, tiles, max_tokens, max_tiles


@given(problems())
@settings(max_examples=300, deadline=None)
@example((np.full(50, 7, np.int32), np.arange(50, dtype=np.int32) % 5, 16, 4))  # ties everywhere
def test_pack_equals_reference(problem: tuple[NDArray[np.int32], NDArray[np.int32], int, int]) -> None:
    pack_of, num_packs = pack(*problem)
    expected, expected_packs = pack_reference(*problem)
    assert num_packs == expected_packs
    assert pack_of.tolist() == expected.tolist()


@given(problems())
@settings(deadline=None)
def test_budgets_are_kept_and_nothing_is_lost(problem: tuple[NDArray[np.int32], NDArray[np.int32], int, int]) -> None:
    tokens, tiles, max_tokens, max_tiles = problem
    pack_of, num_packs = pack(*problem)
    assert pack_of.shape == tokens.shape
    assert sorted(set(pack_of.tolist())) == list(range(num_packs))  # every sample in a pack, no empty pack
    assert (np.bincount(pack_of, weights=tokens, minlength=num_packs) <= max_tokens).all()
    assert (np.bincount(pack_of, weights=tiles, minlength=num_packs) <= max_tiles).all()


@given(problems(), st.integers(1, 100))
@settings(deadline=None)
def test_windows_are_independent(problem: tuple[NDArray[np.int32], NDArray[np.int32], int, int], window: int) -> None:
    tokens, tiles, max_tokens, max_tiles = problem
    pack_of, counts = pack_windows(tokens, tiles, window, max_tokens, max_tiles)
    assert len(counts) == -(-len(tokens) // window)
    for w, count in enumerate(counts):
        part = slice(w * window, (w + 1) * window)
        alone, packs = pack(tokens[part], tiles[part], max_tokens, max_tiles)
        assert packs == count
        assert alone.tolist() == pack_of[part].tolist()


@pytest.mark.parametrize(
    ("tokens", "tiles", "message"),
    [
        ([5, 11], [0, 0], "item 1: 11 tokens and 0 tiles; a pack holds 1 to 10 tokens and 0 to 2 tiles"),
        ([5, 5], [0, 3], "item 1: 5 tokens and 3 tiles"),
        ([0], [0], "item 0: 0 tokens"),
        ([1], [-1], "item 0: 1 tokens and -1 tiles"),
        ([1, 2], [0], "one length"),
        ([1.5], [0], "integers"),
        ([2**40], [0], "int32"),
    ],
)
def test_samples_over_a_budget_are_errors(tokens: list[int], tiles: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(tokens, tiles, 10, 2)


@pytest.mark.parametrize(("max_tokens", "max_tiles", "window"), [(0, 1, 1), (2**31 - 1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_bad_budgets_are_errors(max_tokens: int, max_tiles: int, window: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        pack_windows([1], [0], window, max_tokens, max_tiles)


def internvl_mix(size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lengths with a heavy tail to 16k, 0 to 13 tiles of 256 tokens."""
    rng = np.random.default_rng(0)
    tiles = np.where(rng.random(size) < 0.3, 0, rng.integers(1, 14, size))
    text = np.minimum(rng.lognormal(5.5, 1.1, size), 12_000) + 10
    return np.minimum(text + 256 * tiles, 16384).astype(np.int32), tiles.astype(np.int32)


def test_packs_are_full() -> None:
    tokens, tiles = internvl_mix(1_000_000)
    _, counts = pack_windows(tokens, tiles, 16384, 16384, 64)
    assert tokens.sum() / (16384 * counts.sum()) > 0.999
