"""Steps that balance has something to do on: the quickstart's data, more skewed, and the ways to share them out.

    quickstart's pages, captions, conversations, text ─► long packs, as much text as images ─► packs of a step
                                                          text alone │ full of tiles │ some of both    │
      off           packs in the order of the stream, images encoded beside their pack             ◄───┤
      vision_only   the same packs on every rank, images as balanced over them                     ◄───┤
      llm_only      packs as balanced, images beside their pack                                    ◄───┤
      on            the plan of a run                                                              ◄───┘

All ways train on the same samples in the same packs, so their loss is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evovlm.data.build_index import build_index
from evovlm.data.index import Index
from evovlm.data.index_settings import IndexSettings
from evovlm.data.loader import Loader
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import PlanIndex
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout, Pieces, StepPlan
from evovlm.data.synthetic import build_quickstart_data
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.cost_shape import shape_costs
from evovlm.launch.quickstart import SYSTEM_PROMPT
from evovlm.models.config import InternVLConfig
from evovlm.models.table import TINY
from evovlm.parallel.balance import balance_images

HALF_TINY = replace(TINY, vision=replace(TINY.vision, num_layers=2), decoder=replace(TINY.decoder, num_layers=2))
"""The quickstart's model with half of its layers; as in the 1B, a tile costs the ViT more than the LLM."""
WAYS = ("off", "vision_only", "llm_only", "on")


@dataclass(frozen=True)
class Mix:
    """The data and the steps that are made of it.

    Attributes:
        scale: Share of the quickstart's samples that is made.
        model: Shape of the model; its vocabulary is that of the tokenizer.
        pack_tokens: Rows of a pack; texts are cut to it. The longer, the more packs differ in attention.
        pack_tiles: Most tiles of a pack; the default never binds, so that some packs are full of them.
        packs_per_step: Packs of a step, over all ranks.
        language_ratio: Tokens of text to tokens of samples with images; the quickstart has 1:6.
        seed: Of the data, their order, and the weights.
    """

    scale: float = 0.01
    model: InternVLConfig = HALF_TINY
    pack_tokens: int = 2048
    pack_tiles: int = 4096
    packs_per_step: int = 8
    language_ratio: str = "1:1"
    seed: int = 0


def write_data(folder: Path, mix: Mix, num_workers: int) -> tuple[Index, Tokenizer]:
    """Make the quickstart's data, its documents whole, and index the part that it pre-trains on."""
    whole = 10**9
    made = build_quickstart_data(
        folder / "data", seed=mix.seed, scale=mix.scale, num_workers=num_workers, passage=whole
    ).directory
    settings = IndexSettings(
        meta=made / "pretrain.json",
        tokenizer=made / "tokenizer",
        out=folder / "index",
        tile_size=mix.model.vision.tile_size,
        tokens_per_tile=mix.model.tokens_per_tile,
        max_tiles=mix.model.max_tiles,
        system_prompt=SYSTEM_PROMPT,
        num_workers=num_workers,
    )
    return Index.open(build_index(settings).path), Tokenizer.load(settings.tokenizer)


def share_out(plan: StepPlan, layout: DataLayout, way: str) -> StepPlan:
    """Share the packs of a plan out in one of ``WAYS``.

    Args:
        plan: As a run has it.
        layout: What it was made for.
        way: One of ``WAYS``.
    """
    R, M = layout.num_ranks, layout.num_microbatches
    stream = np.arange(R * M, dtype=np.int32).reshape(M, R).T  # successive packs to successive ranks
    assignment = plan.assignment if way in ("llm_only", "on") else stream
    if way == "on":
        return plan
    rank_of = np.empty(R * M, np.int64)
    rank_of[assignment] = np.arange(R)[:, None]
    first_tiles = np.cumsum(plan.image_tiles) - plan.image_tiles
    pack_of = np.searchsorted(np.cumsum(plan.packs.num_tiles), first_tiles, side="right")
    home = layout.home(rank_of[pack_of])
    return replace(plan, assignment=assignment, pieces=_pieces(plan.image_tiles, home, layout.encoders, way))


def _pieces(image_tiles: NDArray[np.int32], home: NDArray[np.int32], encoders: int, way: str) -> Pieces:
    """Who encodes which image: balanced, or whole at home."""
    if way == "vision_only":
        made = balance_images(image_tiles, encoders, home)
        return Pieces(made.image, made.first, made.tiles, made.encoder)
    return Pieces(np.arange(len(home), dtype=np.int32), np.zeros_like(home), image_tiles, home)


class WayPlanner(Planner):
    """Plans steps as a run does, shared out in one of ``WAYS``."""

    def __init__(self, index: PlanIndex, mix: Mix, way: str) -> None:
        settings = PlanSettings(
            seed=mix.seed,
            pack_tokens=mix.pack_tokens,
            pack_tiles=mix.pack_tiles,
            packs_per_step=mix.packs_per_step,
            long_samples="split",
        )
        mixture = Mixture(index, MixtureSettings(language_ratio=mix.language_ratio), mix.seed)
        costs = shape_costs(mix.model).integers(mix.pack_tokens, mix.pack_tiles)
        super().__init__(index, mixture, settings, costs)
        self.way = way

    def plan_step(self, step: int, layout: DataLayout) -> StepPlan:
        """Plan a step; see :meth:`Planner.plan_step`."""
        return share_out(super().plan_step(step, layout), layout, self.way)


def load(
    data: tuple[Index, Tokenizer], mix: Mix, way: str, rank: int, ranks: int, steps: int
) -> Iterator[tuple[StepPlan, StepBatch]]:
    """Load a rank's part of the first steps, images decoded; every rank is a data-parallel rank and an encoder."""
    index, tokenizer = data
    layout = DataLayout(ranks, mix.packs_per_step // ranks)
    loader = Loader(
        index,
        WayPlanner(index, mix, way),
        layout,
        rank,
        rank,
        image_context=tokenizer.image_context,
        padding=tokenizer.end_of_text,
    )
    return loader.steps(0, steps)
