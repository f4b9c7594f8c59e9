"""Does a layout train the same model on preference pairs? As ``equality.py``, for the loss of ``preference.py``.

make_pair_steps ─┬─► train_pairs_alone   one process: every answer a sequence of its own with its own images, all
                 │                       logits at once, the loss as spec §4.2 writes it, autograd through it all
                 └─► train_pairs_under   the engine, under a plan: prompts and images shared, packed, sharded
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.data.branches import Span, borders, pair_targets, prefixes, restart
from evovlm.data.share_out import WholePack, share_out
from evovlm.engine.engine import Engine
from evovlm.engine.equality import OPTIM, SMALL, Trained, make_weights, run_engine, train_plainly
from evovlm.engine.options import EngineOptions
from evovlm.engine.preference import PreferenceTraining
from evovlm.engine.preference_loss import PreferenceLossSettings
from evovlm.engine.settings import OptimSettings, Precision
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.world import World


class PairShape(NamedTuple):
    """Rows of a pair's prefix, chosen and rejected branch; tiles of its images; last rows of the prefix with a target
    that both answers share."""

    prefix: int
    chosen: int
    rejected: int
    tiles: tuple[int, ...] = ()
    shared: int = 1


@dataclass(frozen=True)
class PairStep:
    """A step of preference pairs.

    Attributes:
        packs: The packs, numbered through.
        reference: Float64 ``[N, 2]``.
    """

    packs: list[WholePack]
    reference: Tensor

    @property
    def num_chosen(self) -> int:
        """Tokens of all chosen answers."""
        return sum(int((pack.pairs.chosen >= 0).sum()) for pack in self.packs if pack.pairs is not None)


def make_pair_pack(
    config: InternVLConfig, shapes: Sequence[PairShape], num_rows: int, seed: int, first_number: int
) -> WholePack:
    """Make one pack of random pairs and padding; fractional positions at visual rows, which begin at row 2 of a pair.

    Args:
        config: Shape of the model.
        shapes: The pairs; none: nothing but padding.
        num_rows: T.
        seed: Of everything random.
        first_number: Pairs of the step before this pack.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, tile, per_tile = config.decoder.vocab_size, config.vision.tile_size, config.tokens_per_tile
    tokens = torch.randint(0, vocab, (num_rows,), generator=generator)
    labels, positions = torch.full((num_rows,), -100), torch.zeros(num_rows)
    spans, rows, images, row = [], [torch.empty(0, dtype=torch.int64)], list[int](), 0
    for shape in shapes:
        span = Span(row, row + shape.prefix, row + shape.prefix + shape.chosen, row + sum(shape[:3]))
        spans.append(span)
        tokens[span.rejected] = tokens[span.chosen]
        seen = torch.arange(row + 2, row + 2 + per_tile * sum(shape.tiles))
        rows.append(seen)
        images += shape.tiles
        positions[row : span.end] = torch.arange(span.end - row, dtype=torch.float32)
        positions[seen] = 1 + 0.25 * torch.arange(1, len(seen) + 1)
        for first, end in ((span.chosen - shape.shared, span.rejected - 1), (span.rejected, span.end - 1)):
            labels[first:end] = tokens[first + 1 : end + 1]
        row = span.end
    restart(positions, spans)
    ends = [0, *(span.end for span in spans)]
    samples = np.arange(first_number, first_number + len(spans))
    num_tiles = sum(images)
    return WholePack(
        tokens=tokens,
        labels=labels,
        weights=(labels != -100).float(),
        positions=positions,
        cu_seqlens=borders(ends, spans, num_rows),
        visual_rows=torch.cat(rows),
        prefixes=prefixes(spans),
        pairs=pair_targets(spans, samples, first_number, (labels != -100).numpy()),
        tiles=torch.randn(num_tiles, 3, tile, tile, generator=generator),
        tile_keys=torch.randint(-(1 << 62), 1 << 62, (num_tiles,), generator=generator),
        image_tiles=images,
    )


SHAPES = (
    (PairShape(17, 6, 9, (1,)), PairShape(5, 4, 3, (), 2), PairShape(3, 2, 7)),
    (PairShape(30, 12, 5, (2, 1), 4),),
    (),
    (PairShape(9, 3, 2), PairShape(14, 8, 8, (2,)), PairShape(8, 4, 5)),
)


def make_pair_steps(config: InternVLConfig = SMALL, *, num_packs: int = 4, num_rows: int = 64) -> list[PairStep]:
    """Three steps: long and short pairs, with and without images, shared beginnings, and packs of nothing at all."""
    steps = []
    for number in range(3):
        packs: list[WholePack] = []
        count = 0
        for i in range(num_packs):
            shapes = SHAPES[(i + number) % len(SHAPES)]
            packs.append(make_pair_pack(config, shapes, num_rows, 100 * number + i, count))
            count += len(shapes)
        generator = torch.Generator().manual_seed(number)
        steps.append(PairStep(packs, -30 - 10 * torch.rand(count, 2, generator=generator, dtype=torch.float64)))
    return steps


def plain_log_probs(model: InternVL, pack: WholePack) -> list[list[Tensor]]:
    """log π of both answers of each pair, each answer run by itself with the whole prompt before it."""
    dtype = next(model.parameters()).dtype
    per_tile = model.config.tokens_per_tile
    scores = []
    for query_start, query_end, key_start, key_end in pack.prefixes.tolist():
        inner = [end for end in pack.cu_seqlens.tolist() if query_start < end < query_end]
        seen = (pack.visual_rows >= key_start) & (pack.visual_rows < key_end)
        tiles = seen.view(-1, per_tile).all(1)
        both = []
        for start, end in ((query_start, inner[0]), (inner[0], query_end)):
            rows = torch.cat((torch.arange(key_start, key_end), torch.arange(start, end)))
            logits = model(
                pack.tokens[rows],
                pack.positions[rows],
                torch.tensor([0, len(rows)], dtype=torch.int32),
                pack.tiles[tiles].to(dtype),
                pack.visual_rows[seen] - key_start,
                pack.tile_keys[tiles],
            )
            losses = F.cross_entropy(logits, pack.labels[rows], ignore_index=-100, reduction="none")
            both.append(-losses.double().sum())
        scores.append(both)
    return scores


def plain_preference_loss(
    log_probs: Tensor, reference: Tensor, shift: float, num_chosen: int, settings: PreferenceLossSettings
) -> Tensor:
    """The loss of a step, with its graph, as spec §4.2 writes it."""
    chosen, rejected = (settings.beta * (log_probs - reference)).unbind(1)
    dpo = -torch.log(1 / (1 + torch.exp(rejected - chosen)))
    bco = -torch.log(1 / (1 + torch.exp(shift - chosen))) - torch.log(1 / (1 + torch.exp(rejected - shift)))
    nll = -log_probs[:, 0].sum() / num_chosen
    return settings.dpo_weight * dpo.mean() + settings.bco_weight * bco.mean() + settings.nll_weight * nll


def train_pairs_alone(
    settings: PreferenceLossSettings,
    config: InternVLConfig = SMALL,
    steps: Sequence[PairStep] | None = None,
    *,
    freeze: Sequence[str] = (),
    optim: OptimSettings = OPTIM,
    precision: Precision = "float64",
) -> tuple[Trained, list[float]]:
    """Train in one process, without the engine; also returns δ of each step."""
    shifts, seen = list[float](), list[float]()

    def loss(model: InternVL, step: PairStep) -> Tensor:
        scores = torch.stack([torch.stack(pair) for pack in step.packs for pair in plain_log_probs(model, pack)])
        before = sum(seen) / len(seen) if seen else 0.0
        seen.extend((settings.beta * (scores.detach() - step.reference)).flatten().tolist())
        after = sum(seen) / len(seen)
        shifts.append({"current": after, "previous": before, "none": 0.0}[settings.shift])
        return plain_preference_loss(scores, step.reference, shifts[-1], step.num_chosen, settings)

    steps = steps or make_pair_steps(config)
    return train_plainly(config, steps, loss, freeze=freeze, optim=optim, precision=precision), shifts


def train_pairs_under(
    settings: PreferenceLossSettings,
    plan: ParallelPlan,
    world: World,
    options: EngineOptions,
    config: InternVLConfig = SMALL,
    steps: Sequence[PairStep] | None = None,
    *,
    optim: OptimSettings = OPTIM,
) -> tuple[Trained, list[float]]:
    """Train with the engine under a plan; tensors come out on rank 0, δ of each step everywhere. Collective."""
    engine = Engine.build(
        lambda: InternVL(config), plan, world, optim=optim, weights=make_weights(config), options=options
    )
    training = PreferenceTraining(engine, settings)
    shifts = list[float]()

    def backward(step: PairStep) -> float:
        batch = share_out(step.packs, plan, world.rank, config.tokens_per_tile)
        terms, metrics = training.backward(batch, step.reference, step.num_chosen)
        shifts.append(metrics.get("reward_shift", 0.0))
        return terms.loss

    return run_engine(engine, steps or make_pair_steps(config), backward), shifts
