"""Pairs in packs are what both renderings are alone: tokens, labels, positions, visible keys; and are planned so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evovlm.data import loader
from evovlm.data.batch import BatchSettings, MicroBatch, Pairs, V2PESettings, build_microbatch, run_deltas
from evovlm.data.branches import squared_lengths
from evovlm.data.index import Index
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.packing import pack as pack_samples
from evovlm.data.packs import Pack
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout
from evovlm.data.tokenizer import Tokenizer
from evovlm.data.tokenizer_training import build_tokenizer
from evovlm.models.v2pe import segment_positions

from .batch_support import equal_steps, load_ranks, load_step
from .preference_support import PICTURES, Side, build, pair_line, render_sides, visible

SEED, T, G = 11, 512, 4


@pytest.fixture(scope="module")
def newline_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer in which newlines merge, also those of a header and of the answer after it."""
    texts = ["assistant\n\nthe dog\n\n\nand the cat\n\n", "user\n", "Prefer.", "the other\n\n"] * 4
    return build_tokenizer(texts, tmp_path_factory.mktemp("newline_tokenizer"), vocab_size=320)


WORDS = st.lists(st.sampled_from(["the dog", " ", "\n", "\n\n", "cat", "and", "é", "7 "]), max_size=6).map("".join)


@st.composite
def pair_lines(draw: st.DrawFn) -> dict[str, Any]:
    """A pair with 0 to 2 images; its answers share a beginning, are each other's, begin with newlines, or nothing."""
    images = draw(st.lists(st.sampled_from([*PICTURES]), max_size=2))
    shared, chosen, rejected = draw(WORDS), draw(WORDS), draw(WORDS)
    chosen, rejected = shared + chosen, shared + rejected
    chosen = chosen if chosen.strip() else f"{chosen}a"
    rejected = rejected if rejected.strip() else f"{rejected}b"
    keys: dict[str, Any] = {}
    if images:
        keys["image"] = images[0] if len(images) == 1 else images
    question = draw(WORDS) + "".join(f"<image>{draw(WORDS)}" for _ in images)
    return pair_line(question, chosen, f"{rejected}!" if chosen == rejected else rejected, **keys)


def batch_settings(tokenizer: Tokenizer, mode: str) -> BatchSettings:
    v2pe = V2PESettings(mode=mode, delta=0.3)  # type: ignore[arg-type]
    return BatchSettings(SEED, T, "square", tokenizer.image_context, tokenizer.end_of_text, v2pe, True)


def pack_of(index: Index, samples: list[int]) -> Pack:
    lengths = index.samples["num_tokens"][samples].astype(np.int64)
    zeros = np.zeros(len(samples), np.int64)
    return Pack(np.array(samples), zeros + 3, zeros, lengths, int(lengths.sum()), 0)


@pytest.mark.parametrize("mode", ["off", "fixed", "random"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(lines=st.lists(pair_lines(), min_size=1, max_size=3))
@example(lines=[pair_line("Q", "\nA", "\n\nB"), pair_line("", "A", "A\n\n\n"), pair_line("Q", "\n\nA", "A")])
def test_a_pack_of_pairs_is_both_renderings_of_each(
    tmp_path_factory: pytest.TempPathFactory, newline_tokenizer_dir: Path, mode: str, lines: list[dict[str, Any]]
) -> None:
    tokenizer = Tokenizer.load(newline_tokenizer_dir)
    report = build(tmp_path_factory.getbasetemp() / "pairs", newline_tokenizer_dir, lines)
    assert report.num_skipped == 0
    index, s = Index.open(report.path), batch_settings(tokenizer, mode)
    order = [*reversed(range(len(lines)))]
    pack = pack_of(index, order)
    batch = build_microbatch(index, pack, s, first_segment=40)
    pairs = batch.pairs
    assert pairs is not None
    assert (pairs.samples.tolist(), pairs.numbers.tolist()) == (order, [40 + i for i in range(len(order))])

    expected = torch.zeros(T, T, dtype=torch.bool)
    begin, first_visual = 0, 0
    for i, sample in enumerate(order):
        end = begin + int(pack.lengths[i])
        sides = render_sides(lines[sample], index, sample, tokenizer)
        rejected_at = begin + len(sides[0].tokens)
        chosen_at = rejected_at + len(sides[1].tokens) - (end - begin)
        rows_of = [*range(begin, rejected_at)], [*range(begin, chosen_at), *range(rejected_at, end)]
        deltas = run_deltas(s.v2pe, SEED, sample, 3, len(sides[0].runs))
        for side, rows, owner in zip(sides, rows_of, (pairs.chosen, pairs.rejected), strict=True):
            check_side(batch, side, rows, owner == i, deltas)
            expected[np.ix_(rows, rows)] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        assert chosen_at > begin + max((start + length for start, length in sides[0].runs), default=0)
        visual = [begin + start + k for start, length in sides[0].runs for k in range(length)]
        assert batch.visual_rows[first_visual : first_visual + len(visual)].tolist() == visual
        begin, first_visual = end, first_visual + len(visual)
    padding = T - begin
    expected[begin:, begin:] = torch.ones(padding, padding, dtype=torch.bool).tril()
    assert torch.equal(visible(batch), expected)
    assert ((pairs.chosen >= 0) | (pairs.rejected >= 0)).tolist() == (batch.labels != -100).tolist()
    assert batch.weights.tolist() == (batch.labels != -100).float().tolist()
    assert batch.positions[begin:].tolist() == list(range(padding))
    assert first_visual == len(batch.visual_rows)


def check_side(batch: MicroBatch, side: Side, rows: list[int], owned: torch.Tensor, deltas: list[float]) -> None:
    """Rows of one answer and its prompt are those of its own rendering."""
    assert batch.tokens[rows].tolist() == side.tokens.tolist()
    labels = torch.where(owned, batch.labels, -100)
    assert labels[rows].tolist() == batch.labels[rows].tolist() == side.labels.tolist()
    assert int(owned.sum()) == (side.labels != -100).sum()
    positions = segment_positions(len(side.tokens), side.runs, deltas)
    assert batch.positions.dtype == torch.float32
    assert batch.positions[rows].tolist() == positions.tolist()


# --- plans -----------------------------------------------------------------------------------------------------------


def some_lines(count: int) -> list[dict[str, Any]]:
    """Pairs of many lengths; every third has a picture, every fourth a common beginning of its answers."""
    lines = []
    for i in range(count):
        shared = "the dog and " * (i % 4)
        answers = f"{shared}{'cat ' * (1 + i % 7)}", f"{shared}{'7 ' * (1 + i * 5 % 11)}"
        keys = {"image": [*PICTURES][i // 3 % 3]} if i % 3 == 0 else {}
        lines.append(pair_line(f"Which? {i}", *answers, **keys))
    return lines


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Index:
    return Index.open(build(tmp_path_factory.mktemp("some"), tiny_tokenizer_dir, some_lines(60)).path)


def make_planner(index: Index, *, sequential: bool = False, **changes: Any) -> Planner:
    plain = {"seed": SEED, "pack_tokens": T, "pack_tiles": 12, "packs_per_step": G, "window": 64}
    order = Sequential(index) if sequential else Mixture(index, MixtureSettings(language_ratio=None), SEED)
    return Planner(index, order, PlanSettings(**(plain | changes)))


def test_a_step_of_pairs(index: Index, tokenizer: Tokenizer) -> None:
    planner = make_planner(index, loss_weighting="sample")
    for layout in (DataLayout(2, 2), DataLayout(1, 4), DataLayout(4, 1)):
        plan, batches = load_step(index, tokenizer, layout, 1, planner)
        pairs = [batch.pairs or no_pairs() for batch in batches]
        assert torch.cat([p.numbers for p in pairs]).tolist() == list(range(plan.num_samples))
        assert torch.cat([p.samples for p in pairs]).tolist() == plan.packs.samples.tolist()
        assert plan.num_chosen == sum(int((p.chosen >= 0).sum()) for p in pairs) > 0
        assert plan.num_supervised == sum(int((b.labels != -100).sum()) for b in batches)
        # Of l rows that see themselves and all before, (l² + l) / 2 keys are seen.
        squares = [2 * int(visible(batch).sum()) - T for batch in batches]
        assert plan.packs.sum_squares(T).tolist() == squares
        assert plan.pack_costs.tolist() == squares
        assert (np.array(squares) < [(p.lengths**2).sum() + (T - p.num_tokens) ** 2 for p in plan.packs]).all()


def no_pairs() -> Pairs:
    raise AssertionError("a pack without pairs")


def test_an_empty_pack_has_no_pairs(index: Index, tokenizer: Tokenizer) -> None:
    planner = make_planner(index, sequential=True, packs_per_step=64)
    plan, batches = load_step(index, tokenizer, DataLayout(1, 64), 0, planner)
    assert plan.num_samples == 60
    empty = batches[-1]
    assert len(plan.packs[-1].samples) == 0
    assert empty.pairs is not None
    assert (len(empty.pairs.samples), empty.prefixes.shape, empty.cu_seqlens.tolist()) == (0, (0, 4), [0, T])
    assert (empty.pairs.chosen == -1).all()


def test_the_rows_of_a_pair_do_not_depend_on_the_layout(index: Index, tokenizer: Tokenizer) -> None:
    planner = make_planner(index)
    v2pe = V2PESettings(mode="random")
    one = load_step(index, tokenizer, DataLayout(1, 4), 2, planner, v2pe=v2pe)[1]
    four = load_step(index, tokenizer, DataLayout(4, 1, 2), 2, planner, v2pe=v2pe)[1]
    for a, b in zip(one, four, strict=True):
        for x, y in ((a.positions, b.positions), (a.tokens, b.tokens), (a.prefixes, b.prefixes)):
            assert torch.equal(x, y)
        assert a.pairs is not None
        assert b.pairs is not None
        assert all(torch.equal(x, y) for x, y in zip(vars(a.pairs).values(), vars(b.pairs).values(), strict=True))
    again = load_ranks(index, tokenizer, DataLayout(4, 1, 2), 2, planner, v2pe=v2pe)[1]
    assert all(map(equal_steps, again, load_ranks(index, tokenizer, DataLayout(4, 1, 2), 2, planner, v2pe=v2pe)[1]))


def test_what_is_read_on_the_host_is_not_pinned(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (batch, *_) = load_ranks(index, tokenizer, DataLayout(2, 2), 0, make_planner(index))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    before = [dict(vars(pack)) for pack in batch.packs]
    loader._pin(batch)
    for pack, old in zip(batch.packs, before, strict=True):
        kept = {name for name, value in vars(pack).items() if value is old[name]}
        assert kept == {"cu_seqlens", "prefixes", "pairs"}


def test_even_packs_and_outliers_go_by_what_is_seen(index: Index) -> None:
    of_wish = {wish: make_planner(index, even_packs=wish) for wish in ("always", "never")}
    for step in range(2):
        plans = {wish: planner.plan_step(step, DataLayout(2, 2)) for wish, planner in of_wish.items()}
        spread = {wish: np.ptp(plan.packs.sum_squares(T)) for wish, plan in plans.items()}
        assert spread["always"] < spread["never"]
    budget = int(index.samples["num_tokens"].max()) * 5 // 4
    count = make_planner(index, sequential=True, pack_tokens=budget).num_packs(1)
    planner = make_planner(index, sequential=True, pack_tokens=budget, packs_per_step=count)
    plan = planner.plan_step(0, DataLayout(count, 1))
    columns = [index.samples[name][plan.packs.samples] for name in ("chosen_at", "rejected_at")]
    squares, mean = squared_lengths(plan.packs.lengths, *columns), plan.pack_costs.sum() // count
    assert plan.outliers.tolist() == plan.packs.samples[squares > mean].tolist()
    assert 0 < len(plan.outliers) < (plan.packs.lengths**2 > mean).sum()


def test_packs_are_made_even_by_what_is_seen(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Of pairs of one length those with long answers cost least, since these do not see each other."""
    sizes = np.random.default_rng(0).integers(1, 40, (60, 3)).tolist()
    lines = [pair_line("7 " * q, "a " + "7 " * c, "b " + "7 " * r) for q, c, r in sizes]
    mixed = Index.open(build(tmp_path, tiny_tokenizer_dir, lines).path)
    planner = make_planner(mixed, sequential=True, even_packs="always", packs_per_step=64, pack_tokens=2 * T)
    packs = planner.plan_step(0, DataLayout(1, 64)).packs
    tokens, tiles, chosen_at, rejected_at = (
        mixed.samples[name].astype(np.int64) for name in ("num_tokens", "num_tiles", "chosen_at", "rejected_at")
    )
    by_squares = pack_samples(tokens, tiles, 2 * T, 12, squared_lengths(tokens, chosen_at, rejected_at))[0]
    by_lengths = pack_samples(tokens, tiles, 2 * T, 12, tokens**2)[0]
    assert packs.pack_of[np.argsort(packs.samples)].tolist() == by_squares.tolist()
    assert by_squares.tolist() != by_lengths.tolist()


def test_the_digest_tells_pairs_apart(index: Index) -> None:
    planner = make_planner(index)
    plan = planner.plan_step(0, DataLayout(2, 2))
    before = plan.digest()
    assert (
        planner.plan_step(0, DataLayout(2, 2)).digest() == make_planner(index).plan_step(0, DataLayout(2, 2)).digest()
    )
    plan.packs.squares[0] += 1
    assert plan.digest() != before


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_squared_lengths_count_what_is_seen(data: st.DataObject) -> None:
    parts = np.array(data.draw(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1)))
    prefix, chosen, rejected = parts.T
    seen = prefix * (prefix + 1) // 2
    for branch in (chosen, rejected):
        seen = seen + branch * prefix + branch * (branch + 1) // 2
    lengths = parts.sum(1)
    squares = squared_lengths(lengths, prefix.astype(np.int32), (prefix + chosen).astype(np.int32))
    assert squares.dtype == np.int64
    assert squares.tolist() == (2 * seen - lengths).tolist()


# --- pairs that no pack can hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("long_samples", ["skip", "split"])
def test_a_pair_longer_than_a_pack_is_left_out_whole(index: Index, long_samples: str) -> None:
    longest = int(np.argmax(np.where(index.samples["num_tiles"] == 0, index.samples["num_tokens"], 0)))
    budget = int(index.samples["num_tokens"][longest]) - 1
    planner = make_planner(index, sequential=True, pack_tokens=budget, long_samples=long_samples, packs_per_step=64)
    assert longest in planner.dropped
    plan = planner.plan_step(0, DataLayout(64, 1))
    assert sorted([*plan.packs.samples, *planner.dropped]) == list(range(60))
    assert not plan.packs.begins.any()
    at, middle, length = (int(index.samples[name][longest]) for name in ("chosen_at", "rejected_at", "num_tokens"))
    described = planner.describe_dropped()[planner.dropped.tolist().index(longest)]
    assert described == (
        f"pair 'p/{longest + 1}': {length} tokens (prompt {at}, chosen {middle - at}, rejected {length - middle}) and "
        f"{index.samples['num_tiles'][longest]} tiles; a pack holds {budget} tokens and 12 tiles"
    )


def test_a_long_pair_may_be_an_error(index: Index) -> None:
    budget = int(index.samples["num_tokens"].max()) - 1
    with pytest.raises(ValueError, match=r"pair 'p/\d+': .*\) and \d tiles; .* choose long_samples = 'skip'$"):
        make_planner(index, pack_tokens=budget, long_samples="error")
    with pytest.raises(
        ValueError, match=r"none of 60 samples fits into a pack of 20 tokens .*; pair 'p/1': \d+ tokens"
    ):
        make_planner(index, pack_tokens=20)
