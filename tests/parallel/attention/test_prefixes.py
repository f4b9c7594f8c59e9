"""Shared prefixes over cp × hp ranks: output, gradients and work are those of one process, every row by itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.parallel.attention import ShardedAttend
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Coordinates, Layout
from evovlm.parallel.mesh import build_mesh
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.world import World

from ...csrc.prefix_support import PrefixPack, prefix_packs
from .attend_support import Case, check_cases

T = 48
LAYOUTS = [
    Layout(cp=2, dp=2),
    Layout(cp=4),
    Layout(cp=4, window=2),
    Layout(hp=2, dp=2),
    Layout(hp=4),
    *(Layout(cp=2, hp=2, placement=placement) for placement in ("head_first", "context_first")),
]
"""Each fills four ranks."""

PACKS = [
    # A long prefix over most chunks, branches of a row; chosen and rejected in several chunks each.
    PrefixPack(((46, 1, 1),)),
    PrefixPack(((16, 13, 19),)),
    # Several small groups in a chunk, and groups that end where chunks do.
    PrefixPack((*[(2, 1, 1)] * 3, (6, 3, 3), (5,), (2, 1, 4), *[(1, 1, 1)] * 4)),
    # More branches than two, one of them long; ordinary segments between.
    PrefixPack(((3,), (7, 2, 15, 1, 6), (8,), (4, 2))),
]


def case(layout: Layout, pack: PrefixPack, **options: object) -> Case:
    return Case(layout, tuple(pack.borders), prefixes=tuple(pack.prefixes), **options)  # type: ignore[arg-type]


def test_every_layout_and_pack() -> None:
    cases = [
        case(layout, pack, num_kv_heads=(1, 2, 4)[(number + index) % 3])
        for number, layout in enumerate(LAYOUTS)
        for index, pack in enumerate(PACKS)
    ]
    others = [
        replace(each, dtype=dtype, recompute=recompute, strided=strided)
        for each in cases[1::6]
        for dtype, recompute, strided in (
            (torch.float64, "full", False),
            (torch.float32, "selective", False),
            (torch.bfloat16, "none", True),
        )
    ]
    tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
    check_cases(4, cases + others, lambda case: tolerances[case.dtype])


@settings(max_examples=3)
@given(
    st.lists(
        st.builds(case, st.sampled_from(LAYOUTS), prefix_packs(T, longest=24), num_kv_heads=st.sampled_from([1, 2, 4])),
        min_size=6,
        max_size=15,
    )
)
def test_random_packs(cases: list[Case]) -> None:
    check_cases(4, cases)


def test_work_of_all_ranks_is_the_pairs_that_are_seen() -> None:
    layouts = LAYOUTS[:3]

    def job(world: World) -> list[int]:
        found = []
        for layout in layouts:
            mesh = build_mesh(layout, world.rank, "cpu")
            for pack in PACKS:
                attend = ShardedAttend(
                    pack.borders,
                    SequenceShards.of(layout, T),
                    mesh.place,
                    mesh.groups,
                    window=layout.window,
                    prefixes=torch.tensor(pack.prefixes),
                )
                found.append(attend.num_pairs)
        return found

    ranks = zip(*run_ranks(4, job), strict=True)
    for (layout, pack), counts in zip(((layout, pack) for layout in layouts for pack in PACKS), ranks, strict=True):
        assert sum(counts) == pack.num_pairs * layout.dp
    alone = [
        ShardedAttend(p.borders, SequenceShards(T), Coordinates(0, 0, 0, 0, 0), {}, prefixes=p.prefixes) for p in PACKS
    ]
    assert [attend.num_pairs for attend in alone] == [pack.num_pairs for pack in PACKS]


def test_prefixes_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"prefix 0 \(queries 4 … 13, keys 0 … 4\) .* leaves the pack of T = 12"):
        ShardedAttend([0, 4, 12], SequenceShards(12), Coordinates(0, 0, 0, 0, 0), {}, prefixes=[(4, 13, 0, 4)])
