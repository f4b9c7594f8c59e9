"""Steps of preference pairs as they would be without one of our ideas, for ``evovlm bench mpo``.

as planned       │ prefix a │ chosen a │ rejected a │ prefix b │ chosen b │ rejected b │      tiles of a, b
prefix twice     │ prefix a │ chosen a │ prefix a │ rejected a │ prefix b │ …              ordinary segments
tiles twice                                                                                 tiles of a, b, a, b
not packed       │ prefix a │ chosen a │ rejected a │   then   │ prefix b │ chosen b │ …    a pack for each pair

Losses and gradients stay what they are: visual tokens that are needed twice are sent twice, and tiles that are encoded
twice for a prefix that is not are encoded for nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.data.branches import Pairs, Span, borders, prefixes
from evovlm.data.step_batch import StepBatch
from evovlm.parallel.routes import Routes, TileReceives, TileSends


@dataclass(frozen=True)
class Switches:
    """Which ideas are on.

    Attributes:
        tiles_once: A pair's tiles are encoded once, not once for each answer.
        prefix_once: A pair's prefix passes the LLM once, not once for each answer.
        packed: Pairs share packs; otherwise each is a step of its own, without padding.
    """

    tiles_once: bool = True
    prefix_once: bool = True
    packed: bool = True


@dataclass(frozen=True)
class _Part:
    """Rows of a pack that become a segment, and which of a pair's answers are counted there."""

    rows: Tensor
    chosen: bool
    rejected: bool


def rearrange(batch: StepBatch, switches: Switches) -> list[StepBatch]:
    """Arrange a step differently.

    Args:
        batch: One pack of preference pairs on one rank, with all of its tiles.
        switches: What is to be as planned.

    Returns:
        One step, or one for each pair.

    Raises:
        ValueError: The step has several packs, or a pack without pairs.
    """
    if len(batch.packs) != 1 or batch.packs[0].pairs is None:
        raise ValueError(f"only a step of one pack of preference pairs is rearranged, not one of {len(batch.packs)}")
    numbers = list(range(len(batch.packs[0].pairs.samples)))
    groups = [numbers] if switches.packed else [[number] for number in numbers]
    return [_step(batch, group, switches) for group in groups]


def _step(batch: StepBatch, group: list[int], switches: Switches) -> StepBatch:
    """A step of some of the pairs."""
    spans = _spans(batch.packs[0])
    parts = [_parts(spans[number], prefix_once=switches.prefix_once) for number in group]
    pack = _pack(batch.packs[0], group, parts)
    rows = torch.cat([part.rows for of_pair in parts for part in of_pair])
    of_tile = [
        (int(slot), (rows == int(row)).nonzero().flatten().tolist())
        for slot, row in zip(batch.routes.receives.slot, batch.routes.receives.row, strict=True)
    ]
    of_tile = [(slot, places) for slot, places in of_tile if places]  # the others belong to other pairs
    slots = [slot for slot, _ in of_tile]
    uses = [
        (tile if switches.tiles_once else copy * len(slots) + tile, row)
        for tile, (_, places) in enumerate(of_tile)
        for copy, row in enumerate(places)
    ]
    encoded = slots if switches.tiles_once else 2 * slots
    return StepBatch(
        [pack], batch.tiles[encoded], batch.tile_keys[encoded], _routes(uses, len(encoded)), batch.tokens_per_tile
    )


def _routes(uses: list[tuple[int, int]], num_tiles: int) -> Routes:
    """Routes of (slot, first row) on one rank, numbered in the order of their rows."""
    slot, row = np.array(sorted(uses, key=lambda use: use[1]), np.int64).reshape(-1, 2).T
    number, zero = np.arange(len(slot)), np.zeros(len(slot), np.int64)
    sends, receives = TileSends(slot, number, zero, zero, row), TileReceives(zero, slot, number, zero, row)
    return Routes(sends, receives, np.array([num_tiles]))


def _spans(pack: MicroBatch) -> list[Span]:
    """Where the pairs of a pack lie."""
    found = []
    for first, end, begin, _ in pack.prefixes.tolist():
        (rejected,) = (row for row in pack.cu_seqlens.tolist() if first < row < end)
        found.append(Span(begin, first, rejected, end))
    return found


def _parts(span: Span, *, prefix_once: bool) -> list[_Part]:
    """The segments of a pair."""
    if prefix_once:
        return [_Part(torch.arange(span.begin, span.end), chosen=True, rejected=True)]
    prefix, rejected = torch.arange(span.begin, span.chosen), torch.arange(span.rejected, span.end)
    return [
        _Part(torch.arange(span.begin, span.rejected), chosen=True, rejected=False),
        _Part(torch.cat((prefix, rejected)), chosen=False, rejected=True),
    ]


def _pack(pack: MicroBatch, group: list[int], of_pair: list[list[_Part]]) -> MicroBatch:
    """Put the parts of some pairs behind one another, without padding."""
    assert pack.pairs is not None
    owners: list[list[Tensor]] = [[], []]
    ends, spans = [0], []
    for i, (number, parts) in enumerate(zip(group, of_pair, strict=True)):
        for part in parts:
            for made, owner, counts in zip(
                owners, (pack.pairs.chosen, pack.pairs.rejected), (part.chosen, part.rejected), strict=True
            ):
                mine = (owner[part.rows] == number) & counts
                made.append(torch.where(mine, i, -1))
            ends.append(ends[-1] + len(part.rows))
        if len(parts) == 1:
            span = _spans(pack)[number]
            spans.append(Span(*(row - span.begin + ends[-2] for row in span)))
    rows = torch.cat([part.rows for parts in of_pair for part in parts])
    visual = torch.isin(rows, pack.visual_rows).nonzero().flatten()
    chosen, rejected = (torch.cat(made) for made in owners)
    return MicroBatch(
        tokens=pack.tokens[rows],
        labels=pack.labels[rows],
        weights=pack.weights[rows],
        positions=pack.positions[rows],
        cu_seqlens=borders(ends, spans, len(rows)),
        visual_rows=visual,
        prefixes=prefixes(spans),
        pairs=Pairs(pack.pairs.samples[group], torch.arange(len(group)), chosen, rejected),
    )
