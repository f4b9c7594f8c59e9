"""A made-up step to balance, and the ways to share it out that are compared.

windows of samples ─► packs of each, shuffled ─► the first G packs: a step
  unpacked    samples to ranks as they come, equally many    ─┐
  random      packs to ranks at random                        │  each image is encoded
  pack_only   packs, equally many tokens on every rank        │  beside the rank of its pack
  llm_only    packs, equal LLM cost on every rank            ─┘
  balanced    packs by LLM cost, images by tiles: the plan of a run
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import permutation
from evovlm.data.packing import pack
from evovlm.data.synthetic.lengths import LengthMix, length_mix
from evovlm.engine.cost_shape import shape_costs
from evovlm.models.table import size
from evovlm.parallel.balance import ImageBalance, PackBalance, balance_images, balance_packs

Longs = NDArray[np.int64]
WAYS = ("unpacked", "random", "pack_only", "llm_only", "balanced")
GPUS_OF_NODE = 8
_WINDOW = 16_384  # samples packed together, as in a run


@dataclass(frozen=True, eq=False)
class Step:
    """G packs and what they cost.

    Attributes:
        samples: Samples in them.
        costs: int64 ``[G]``, LLM cost, that of padding included.
        tokens: int64 ``[G]``, tokens without padding.
        sample_costs: int64 ``[samples]``, LLM cost of each sample by itself, in the order in which they are drawn.
        sample_tiles: int64 ``[samples]``.
        image_tiles: int32 ``[I]``.
        image_pack: int64 ``[I]``, the pack of each image, 0 to G - 1.
    """

    samples: int
    costs: Longs
    tokens: Longs
    sample_costs: Longs
    sample_tiles: Longs
    image_tiles: NDArray[np.int32]
    image_pack: Longs


def draw_step(
    num_packs: int, pack_tokens: int, pack_tiles: int, key: int, even_packs: bool = False, model: str = "8B"
) -> Step:
    """Draw samples of an InternVL-like mix and take the packs of one step.

    A pack costs what the layers of the decoder compute for its rows and for causal attention in its segments; the
    output head is left out, which depends on how many targets a sample has and would make packs more alike.

    Args:
        num_packs: Packs of the step, G.
        pack_tokens: Rows of each.
        pack_tiles: Most tiles of each.
        key: Another key draws another step.
        even_packs: Whether packing, too, makes packs cost alike.
        model: The decoder's size, one of ``evovlm.models.table``.
    """
    costs = shape_costs(size(model)).integers(max_tokens=pack_tokens)
    parts: list[tuple[LengthMix, Longs, Longs]] = []
    packs = 0
    while packs < num_packs:
        mix = length_mix(_WINDOW, key * 1_000_003 + len(parts))
        squares = mix.tokens.astype(np.int64) ** 2 if even_packs else None
        pack_of, count = pack(mix.tokens, mix.tiles, pack_tokens, pack_tiles, squares)
        place = np.empty(count, np.int64)
        place[permutation(count, "bench-balance", key, len(parts))] = packs + np.arange(count)
        parts.append((mix, place[pack_of], np.repeat(place[pack_of], mix.images)))
        packs += count
    tokens, tiles = (np.concatenate([getattr(mix, name) for mix, _, _ in parts]) for name in ("tokens", "tiles"))
    pack_of = np.concatenate([of_sample for _, of_sample, _ in parts])
    image_pack = np.concatenate([of_image for _, _, of_image in parts])
    image_tiles = np.concatenate([mix.image_tiles for mix, _, _ in parts])
    mine, shown = pack_of < num_packs, image_pack < num_packs
    lengths = tokens[mine].astype(np.int64)
    filled, squared = np.zeros(num_packs, np.int64), np.zeros(num_packs, np.int64)
    np.add.at(filled, pack_of[mine], lengths)
    np.add.at(squared, pack_of[mine], lengths**2)
    return Step(
        samples=len(lengths),
        costs=costs.pack_costs(squared + (pack_tokens - filled) ** 2, np.zeros_like(filled), pack_tokens),
        tokens=filled,
        sample_costs=costs.sample_costs(lengths, np.zeros_like(lengths)),
        sample_tiles=tiles[mine].astype(np.int64),
        image_tiles=image_tiles[shown],
        image_pack=image_pack[shown],
    )


def solve(step: Step, ranks: int) -> tuple[PackBalance, ImageBalance]:
    """Balance a step over R data-parallel ranks and as many encoders, one beside each."""
    microbatches = len(step.costs) // ranks
    packs = balance_packs(step.costs, ranks, microbatches, step.tokens)
    rank_of = np.empty(len(step.costs), np.int32)
    rank_of[packs.assignment] = np.arange(ranks, dtype=np.int32)[:, None]
    return packs, balance_images(step.image_tiles, ranks, rank_of[step.image_pack], GPUS_OF_NODE)


def share_out(step: Step, ranks: int, way: str, solved: tuple[PackBalance, ImageBalance]) -> dict[str, float]:
    """Share a step out in one of ``WAYS``.

    Args:
        step: The step.
        ranks: Data-parallel ranks R, and encoders.
        way: One of ``WAYS``.
        solved: What ``solve`` says of the step.

    Returns:
        Largest over mean of the ranks' LLM cost and tiles, ``llm`` and ``vit``; ``lockstep``: the sum over microbatches
        of the dearest pack of each, over the mean cost of a rank, which is what the LLM costs if ranks meet in each.
    """
    packs, images = solved
    G = len(step.costs)
    if way == "unpacked":
        rank_of = np.arange(step.samples) % ranks  # samples come in random order
        llm = np.bincount(rank_of, step.sample_costs, minlength=ranks)
        return {"llm": _over_mean(llm), "vit": _over_mean(np.bincount(rank_of, step.sample_tiles, minlength=ranks))}
    assignment: NDArray[np.integer]
    if way == "random":
        assignment = permutation(G, "bench-balance", "random").reshape(ranks, -1)
    elif way == "pack_only":
        assignment = balance_packs(step.tokens, ranks, G // ranks).assignment
    else:
        assignment = packs.assignment
    costs = step.costs[assignment]
    if way == "balanced":
        tiles = np.bincount(images.encoder, images.tiles, minlength=ranks)
    else:
        rank_of = np.empty(G, np.int64)
        rank_of[assignment] = np.arange(ranks)[:, None]
        tiles = np.bincount(rank_of[step.image_pack], step.image_tiles, minlength=ranks)
    return {
        "llm": _over_mean(costs.sum(1)),
        "vit": _over_mean(tiles),
        "lockstep": float(costs.max(0).sum() / (costs.sum() / ranks)),
    }


def _over_mean(loads: NDArray[np.int64] | NDArray[np.float64]) -> float:
    return float(loads.max() / loads.mean())
