"""A step given whole, such as by a user's own data or a test: what each rank takes of it.

    packs 0 1 2 3, their tiles        pack i ─► data-parallel rank i mod dp, microbatch i div dp
      └─ every rank has all of them   images ─► encoders, equally loaded

A training run plans from an index instead and reads only its own part (``step_batch.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout
from evovlm.parallel.balance import balance_images
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.routes import Routes, TileReceives, TileSends


@dataclass
class WholePack(MicroBatch):
    """A pack with its own tiles.

    Attributes:
        tiles: float32 ``[N, 3, P, P]``; N may be 0.
        tile_keys: int64 ``[N]``, keys of drop path.
        image_tiles: Tiles of each image; an image is encoded whole on one rank where that is balanced.
    """

    tiles: Tensor
    tile_keys: Tensor
    image_tiles: list[int]


def share_out(packs: Sequence[WholePack], plan: ParallelPlan, rank: int, tokens_per_tile: int) -> StepBatch:
    """Take a rank's part of a step.

    Args:
        packs: All packs of the step, in the same order on every rank; as many on every data-parallel rank.
        plan: Layouts of the run.
        rank: This rank.
        tokens_per_tile: Visual tokens of one tile.

    Raises:
        ValueError: The packs cannot be shared out evenly, a pack's tiles and visual rows do not match, or preference
            pairs are not numbered from 0, once each.
    """
    dp, num_encoders = plan.llm.dp, plan.vit.dp
    if not packs or len(packs) % dp:
        raise ValueError(f"{len(packs)} packs cannot be shared out over {dp} data-parallel ranks: give a multiple")
    for i, pack in enumerate(packs):
        _check(i, pack, tokens_per_tile)
    _check_pairs(packs)
    of_image = np.array([count for pack in packs for count in pack.image_tiles], np.int32)
    pack_of_image = np.repeat(np.arange(len(packs)), [len(pack.image_tiles) for pack in packs])
    home = DataLayout(dp, len(packs) // dp, num_encoders, plan.llm.pp).home(pack_of_image % dp)
    pieces = balance_images(of_image, num_encoders, home)
    encoder = np.repeat(pieces.encoder, pieces.tiles).astype(np.int64)
    pack_of_tile = np.repeat(pack_of_image, of_image)
    first_row = np.concatenate([np.empty(0, np.int64), *(p.visual_rows.numpy()[::tokens_per_tile] for p in packs)])
    slot = np.empty_like(encoder)
    for e in range(num_encoders):
        slot[encoder == e] = np.arange(int((encoder == e).sum()))
    number = np.arange(len(encoder))
    data_rank, me = plan.llm.coordinates(rank).dp, plan.vit.coordinates(rank).dp
    sent, received = np.flatnonzero(encoder == me), np.flatnonzero(pack_of_tile % dp == data_rank)
    # Receives are listed by microbatch, which is the order of the packs.
    routes = Routes(
        TileSends(slot[sent], number[sent], pack_of_tile[sent] % dp, pack_of_tile[sent] // dp, first_row[sent]),
        TileReceives(
            encoder[received], slot[received], number[received], pack_of_tile[received] // dp, first_row[received]
        ),
        np.bincount(encoder, minlength=num_encoders),
    )
    tiles, keys = (torch.cat([getattr(pack, name) for pack in packs]) for name in ("tiles", "tile_keys"))
    mine = torch.from_numpy(sent)
    return StepBatch(list(packs[data_rank::dp]), tiles[mine], keys[mine], routes, tokens_per_tile)


def _check(number: int, pack: WholePack, tokens_per_tile: int) -> None:
    """Raise ``ValueError`` unless a pack's tiles, their keys and their rows fit together."""
    if len(pack.visual_rows) != len(pack.tiles) * tokens_per_tile or sum(pack.image_tiles) != len(pack.tiles):
        raise ValueError(
            f"pack {number}: {len(pack.tiles)} tiles in images of {pack.image_tiles}, and {len(pack.visual_rows)} "
            f"visual rows; a tile takes {tokens_per_tile}"
        )
    if len(pack.tile_keys) != len(pack.tiles):
        raise ValueError(f"pack {number}: {len(pack.tiles)} tiles and {len(pack.tile_keys)} keys of drop path")
    rows = pack.visual_rows.view(-1, tokens_per_tile)
    for tile in (rows.diff() != 1).any(1).nonzero().flatten().tolist():  # routes carry a tile's first row only
        raise ValueError(f"pack {number}: visual rows of tile {tile} are {rows[tile].tolist()}, not consecutive")


def _check_pairs(packs: Sequence[WholePack]) -> None:
    """Raise ``ValueError`` unless all packs are of pairs, numbered from 0 in any order, or none is."""
    with_pairs = [pack.pairs for pack in packs if pack.pairs is not None]
    if with_pairs and len(with_pairs) < len(packs):
        raise ValueError(
            f"{len(with_pairs)} of {len(packs)} packs are of preference pairs: one step trains on one kind"
        )
    numbers = sorted(number for pairs in with_pairs for number in pairs.numbers.tolist())
    if numbers != [*range(len(numbers))]:
        raise ValueError(
            f"{len(numbers)} preference pairs have {len(set(numbers))} different numbers from {numbers[0]} to "
            f"{numbers[-1]}: number those of a step from 0, each once"
        )
