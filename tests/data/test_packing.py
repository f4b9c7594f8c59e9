"""Packing: budgets kept, nothing lost, the C++ equal to a plain reference, ties by order, good fill, equal costs."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.data.packing import pack, pack_windows
from evovlm.data.synthetic.lengths import length_mix

INT32_MAX = 2**31 - 1


@dataclass
class Reference:
    """The packing that data/packing.py describes, one sample after another over lists of all packs."""

    tokens: list[int]
    tiles: list[int]
    max_tokens: int
    max_tiles: int
    free: list[list[int]] = field(default_factory=list)  # tokens, tiles of each pack
    pack_of: dict[int, int] = field(default_factory=dict)

    @property
    def tile_size(self) -> int:
        return 3 * self.max_tokens // (4 * self.max_tiles) if self.max_tiles else 0

    def put(self, i: int, p: int) -> None:
        self.free[p][0] -= self.tokens[i]
        self.free[p][1] -= self.tiles[i]
        self.pack_of[i] = p

    def room(self, i: int, packs: Iterable[int]) -> list[int]:
        return [p for p in packs if self.free[p][0] >= self.tokens[i] and self.free[p][1] >= self.tiles[i]]

    def largest_first(self, samples: Iterable[int]) -> list[int]:
        return sorted(samples, key=lambda i: -(self.tokens[i] + self.tile_size * self.tiles[i]))

    def best_fit(self, samples: Iterable[int]) -> None:
        for i in self.largest_first(samples):
            room: dict[int, int] = {}  # the pack with most free tiles for each number of free tokens
            for p in sorted(self.room(i, range(len(self.free))), key=lambda p: (-self.free[p][1], p)):
                room.setdefault(self.free[p][0], p)
            two = [room[tokens] for tokens in sorted(room)[:2]]
            if not two:
                two = [len(self.free)]
                self.free.append([self.max_tokens, self.max_tiles])
            self.put(i, min(two, key=lambda p: self.free[p][0] + self.tile_size * self.free[p][1]))

    def by_cost(self, costs: list[int], fewest: int, small_tokens: int) -> None:
        ratio = sum(self.tokens) // sum(self.tiles) if sum(self.tiles) else 0
        self.free = [[self.max_tokens, self.max_tiles] for _ in range(fewest)]
        largest = self.largest_first(range(len(self.tokens)))
        num_large = len(largest)
        while num_large and small_tokens > 0:
            num_large -= 1
            small_tokens -= self.tokens[largest[num_large]]
        cost_of = [0] * fewest
        rest = []
        for i in largest[:num_large]:
            cheapest = sorted(range(fewest), key=lambda p: (cost_of[p], p))[:8]

            def skew(p: int, i: int = i) -> tuple[int, int, int]:
                tokens = self.max_tokens - self.free[p][0] + self.tokens[i]
                tiles = self.max_tiles - self.free[p][1] + self.tiles[i]
                return abs(ratio * tiles - tokens), cost_of[p], p

            p = min(self.room(i, cheapest), key=skew, default=None)
            if p is None:
                rest.append(i)
            else:
                self.put(i, p)
                cost_of[p] += costs[i]
        self.best_fit(rest + largest[num_large:])

    def result(self) -> tuple[list[int], int]:
        return [self.pack_of[i] for i in range(len(self.tokens))], len(self.free)


def reference(
    tokens: NDArray[np.int32],
    tiles: NDArray[np.int32],
    max_tokens: int,
    max_tiles: int,
    costs: NDArray[np.int64] | None = None,
) -> tuple[list[int], int]:
    """Packs of each sample, and their number."""
    given = (tokens.tolist(), tiles.tolist(), max_tokens, max_tiles)
    plain = Reference(*given)
    plain.best_fit(range(len(tokens)))
    if costs is None:
        return plain.result()
    fewest = max(-(-sum(given[0]) // max_tokens), -(-sum(given[1]) // max_tiles) if max_tiles else 0)
    for tenths in (2, 5):
        alike = Reference(*given)
        alike.by_cost(costs.tolist(), fewest, tenths * fewest * max_tokens // 10)
        if len(alike.free) <= most_packs(len(plain.free)):
            return alike.result()
    return plain.result()


def most_packs(plain: int) -> int:
    return plain + (plain + 500) // 1000


Problem = tuple[NDArray[np.int32], NDArray[np.int32], int, int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    max_tokens = draw(st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 4095, 4096, 5000, 70_000])))
    max_tiles = draw(st.one_of(st.integers(0, 12), st.sampled_from([48, 32767, 32768, INT32_MAX])))
    size = draw(st.integers(0, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    longest = draw(st.integers(1, max_tokens))
    tokens = rng.integers(1, longest + 1, size).astype(np.int32)
    tiles = rng.integers(0, draw(st.integers(0, max_tiles)) + 1, size).astype(np.int32)
    if draw(st.booleans()):  # few different samples: ties everywhere
        tokens, tiles = (values[rng.integers(0, 3, size)] if size > 2 else values for values in (tokens, tiles))
    return tokens, tiles, max_tokens, max_tiles


def costs_of(problem: Problem, kind: int) -> NDArray[np.int64] | None:
    """None; the square of tokens; or numbers that have nothing to do with tokens."""
    squares = problem[0].astype(np.int64) ** 2
    return [None, squares, squares * 7919 % 1009][kind]


@given(problems(), st.integers(0, 2))
@settings(max_examples=400, deadline=None, derandomize=True)
@example((np.full(50, 7, np.int32), np.arange(50, dtype=np.int32) % 5, 16, 4), 0)
@example((np.full(50, 7, np.int32), np.arange(50, dtype=np.int32) % 5, 16, 4), 1)
def test_pack_equals_reference(problem: Problem, kind: int) -> None:
    costs = costs_of(problem, kind)
    pack_of, num_packs = pack(*problem, costs)
    expected, expected_packs = reference(*problem, costs)
    assert num_packs == expected_packs
    assert pack_of.tolist() == expected


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("max_tokens", "max_tiles"), [(16384, 48), (32768, 96), (32768, 32)])
def test_pack_equals_reference_on_a_mix(max_tokens: int, max_tiles: int, kind: int) -> None:
    mix = length_mix(1500, 3)
    problem = (mix.tokens, mix.tiles, max_tokens, max_tiles)
    pack_of, num_packs = pack(*problem, costs_of(problem, kind))
    assert (pack_of.tolist(), num_packs) == reference(*problem, costs_of(problem, kind))


@given(problems(), st.integers(0, 2))
@settings(deadline=None, derandomize=True)
def test_budgets_are_kept_and_nothing_is_lost(problem: Problem, kind: int) -> None:
    tokens, tiles, max_tokens, max_tiles = problem
    pack_of, num_packs = pack(*problem, costs_of(problem, kind))
    assert pack_of.shape == tokens.shape
    assert sorted(set(pack_of.tolist())) == list(range(num_packs))  # every sample in a pack, no empty pack
    assert (np.bincount(pack_of, weights=tokens, minlength=num_packs) <= max_tokens).all()
    assert (np.bincount(pack_of, weights=tiles, minlength=num_packs) <= max_tiles).all()


@given(problems(), st.integers(0, 2), st.integers(1, 100))
@settings(deadline=None, derandomize=True)
def test_windows_are_independent(problem: Problem, kind: int, window: int) -> None:
    tokens, tiles, max_tokens, max_tiles = problem
    costs = costs_of(problem, kind)
    pack_of, counts = pack_windows(tokens, tiles, window, max_tokens, max_tiles, costs)
    assert len(counts) == -(-len(tokens) // window)
    for w, count in enumerate(counts):
        part = slice(w * window, (w + 1) * window)
        alone, packs = pack(tokens[part], tiles[part], max_tokens, max_tiles, None if costs is None else costs[part])
        assert packs == count
        assert alone.tolist() == pack_of[part].tolist()


@pytest.mark.parametrize("kind", [0, 1])
def test_the_order_given_decides_between_equal_samples(kind: int) -> None:
    rng = np.random.default_rng(1)
    names = rng.permutation(90)  # a shuffle; samples with equal name % 3 are equal
    tokens, tiles = np.array([7, 5, 3], np.int32)[names % 3], np.array([0, 2, 1], np.int32)[names % 3]
    problem = (tokens, tiles, 64, 20)
    pack_of, _ = pack(*problem, costs_of(problem, kind))
    sorted_names = np.concatenate([names[names % 3 == r] for r in range(3)])
    grouped = (*(np.repeat(np.array(v, np.int32), 30) for v in ([7, 5, 3], [0, 2, 1])), 64, 20)
    of_sorted, _ = pack(*grouped, costs_of(grouped, kind))
    # The i-th of the equal samples has the same pack wherever the others stand between them.
    assert dict(zip(names, pack_of, strict=True)) == dict(zip(sorted_names, of_sorted, strict=True))
    again = names.copy()
    again[names % 3 == 0] = np.roll(names[names % 3 == 0], 1)
    moved = dict(zip(again, pack(*problem, costs_of(problem, kind))[0], strict=True))
    before = dict(zip(names, pack_of, strict=True))
    for r in range(3):
        members = [n for n in names if n % 3 == r]
        expected = np.roll([before[n] for n in members], -1) if r == 0 else [before[n] for n in members]
        assert [moved[n] for n in members] == list(expected)


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


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([1, -1], "item 1: a cost of -1; costs must be >= 0 and their sum below"),
        ([2**62, 2**62], "item 1: a cost of 4611686018427387904"),
        ([1], "as long as tokens"),
        ([1.5, 1.0], "costs must be integers"),
        ([2**63, 1], "int64"),
    ],
)
def test_bad_costs_are_errors(costs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(
            [5, 5],
            [0, 0],
            10,
            2,
            np.array(costs, None if isinstance(costs[0], float) else np.uint64 if costs[0] >= 2**63 else np.int64),
        )


@pytest.mark.parametrize(("max_tokens", "max_tiles", "window"), [(0, 1, 1), (2**31 - 1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_bad_budgets_are_errors(max_tokens: int, max_tiles: int, window: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        pack_windows([1], [0], window, max_tokens, max_tiles)


@pytest.mark.parametrize(("max_tokens", "max_tiles"), [(16384, 48), (16384, 64), (32768, 96)])
def test_packs_are_full_when_tokens_bind(max_tokens: int, max_tiles: int) -> None:
    mix = length_mix(8 * 65536, 0)
    assert mix.tiles.sum() / max_tiles < mix.tokens.sum() / max_tokens
    _, counts = pack_windows(mix.tokens, mix.tiles, 65536, max_tokens, max_tiles)
    assert mix.tokens.sum() / (max_tokens * counts.sum()) > 0.999


@pytest.mark.parametrize(
    ("name", "max_tokens", "max_tiles", "less"),
    [("internvl", 16384, 64, 0.9), ("internvl", 32768, 96, 0.5), ("short", 16384, 48, 0.2)],
)
def test_costs_are_evened_out_without_more_packs(name: str, max_tokens: int, max_tiles: int, less: float) -> None:
    mix = length_mix(65536, 0, name)
    squares = mix.tokens.astype(np.int64) ** 2
    plain_of, plain = pack(mix.tokens, mix.tiles, max_tokens, max_tiles)
    alike_of, alike = pack(mix.tokens, mix.tiles, max_tokens, max_tiles, squares)
    assert alike <= most_packs(plain)
    before, after = (np.bincount(of, weights=squares) for of in (plain_of, alike_of))
    assert after.std() / after.mean() < less * before.std() / before.mean()
    # Only packs with a sample that alone costs more than the target are far above it.
    target = squares.sum() / alike
    longest = np.zeros(alike)
    np.maximum.at(longest, alike_of, squares)
    assert (after[longest < target] < 1.5 * target).all()
    assert (after[longest >= target] - longest[longest >= target] < target).all()


def test_costs_never_open_many_packs() -> None:
    # Halves and thirds, tile-rich and tile-poor: what is evened out by cost alone does not fit together.
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.choice([51, 49, 34, 33, 26, 24], 4000).astype(np.int32)
        tiles = rng.choice([0, 5, 9], 4000).astype(np.int32)
        _, plain = pack(tokens, tiles, 100, 18)
        _, alike = pack(tokens, tiles, 100, 18, tokens.astype(np.int64) ** 2)
        assert alike <= most_packs(plain)
