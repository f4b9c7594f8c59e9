"""The split of a pack's rows: whole, without overlap, balanced for causal attention, and found again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.parallel.layout import Coordinates, Layout
from evovlm.parallel.sequence import SequenceShards


@st.composite
def shards(draw: st.DrawFn) -> SequenceShards:
    cp, hp, tp = (draw(st.sampled_from((1, 2, 3, 4))) for _ in range(3))
    unit = (2 * cp if cp > 1 else 1) * hp * tp
    return SequenceShards(unit * draw(st.integers(0, 5)), cp, hp, tp)


def places(split: SequenceShards) -> list[Coordinates]:
    return [Coordinates(0, 0, cp, hp, tp) for cp in range(split.cp) for hp in range(split.hp) for tp in range(split.tp)]


def test_zigzag_of_the_picture() -> None:
    split = SequenceShards(16, cp=2, hp=2, tp=2)
    assert split.chunk == 4
    assert split.ring_rows(0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert split.ring_rows(1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert split.block_rows(0, 1).tolist() == [12, 13, 14, 15]
    assert split.rows(Coordinates(0, 0, 0, 1, 0)).tolist() == [12, 13]
    assert split.rows(Coordinates(1, 3, 1, 0, 1)).tolist() == [6, 7]  # neither stage nor dp plays a part


@given(shards())
def test_rows_are_a_partition_in_equal_parts(split: SequenceShards) -> None:
    parts = [split.rows(place) for place in places(split)]
    assert {len(part) for part in parts} == {split.num_rows // (split.cp * split.hp * split.tp)}
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(split.num_rows))


@given(shards())
def test_owners_are_the_inverse_of_rows(split: SequenceShards) -> None:
    for place in places(split):
        rows = split.rows(place)
        holder, local = split.owners(rows)
        assert np.array_equal(holder, np.tile([[place.cp], [place.hp], [place.tp]], len(rows)))
        assert np.array_equal(local, np.arange(len(rows)))


@given(shards(), st.data())
def test_owners_of_any_rows_in_any_order(split: SequenceShards, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, split.num_rows - 1))) if split.num_rows else [], dtype=np.int64)
    holder, local = split.owners(rows)
    assert holder.shape == (3, len(rows))
    for row, (cp, hp, tp), number in zip(rows, holder.T, local, strict=True):
        assert split.rows(Coordinates(0, 0, int(cp), int(hp), int(tp)))[number] == row


@given(shards())
def test_gathering_tp_then_hp_gives_the_ring_part(split: SequenceShards) -> None:
    for cp in range(split.cp):
        blocks = []
        for hp in range(split.hp):
            own = [split.rows(Coordinates(0, 0, cp, hp, tp)) for tp in range(split.tp)]
            blocks.append(np.concatenate(own))
            assert np.array_equal(blocks[-1], split.block_rows(cp, hp))
        assert np.array_equal(np.concatenate(blocks), split.ring_rows(cp))


@given(shards())
def test_causal_attention_costs_every_ring_rank_the_same(split: SequenceShards) -> None:
    assert len({int((split.ring_rows(cp) + 1).sum()) for cp in range(split.cp)}) == 1


@pytest.mark.parametrize(
    ("num_rows", "axes", "message"),
    [
        (30, {"cp": 2, "hp": 2}, "T = 30 .* cp = 2, hp = 2, tp = 1: .* 2·cp·hp·tp = 8; take 24 or 32"),
        (9, {"hp": 2, "tp": 2}, r"must be a multiple of hp·tp = 4; take 8 or 12"),
        (3, {"tp": 4}, "take 4 or 4"),
    ],
)
def test_rows_that_cannot_be_split(num_rows: int, axes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceShards.of(Layout(**axes), num_rows)  # type: ignore[arg-type]
