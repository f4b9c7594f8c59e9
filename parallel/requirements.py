"""What the axes of a layout must divide, module by module: the numbers of a model, of a step and of a pipeline.

tp   heads, KV heads, feed-forward channels, rows of a pack      dp   packs of a step
hp   the heads that a tp rank has, rows of a pack                pp   layers, microbatches
cp   rows of a pack (two chunks a rank)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from evovlm.parallel.layout import Layout
from evovlm.parallel.pipeline import Schedule
from evovlm.parallel.sequence import SequenceShards


@dataclass(frozen=True, kw_only=True)
class LLMShape:
    """What of the LLM and of a step must be divided.

    Attributes:
        num_layers: Decoder blocks.
        num_heads: A, query heads.
        num_kv_heads: K, key and value heads.
        hidden_size: H.
        ffn_size: F.
        vocab_size: V; its rows may be split unevenly.
        pack_tokens: T, rows of every pack.
        packs_per_step: Packs of one optimizer step, over all ranks.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    pack_tokens: int
    packs_per_step: int


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """What of the ViT must be divided.

    Attributes:
        num_layers: Blocks.
        num_heads: A, attention heads.
        hidden_size: C.
        ffn_size: F.
        width_norm: Whether q and k are normed over their full width (InternViT-6B).
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    ffn_size: int
    width_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """What of the projector must be divided.

    Attributes:
        hidden_size: H, outputs of its first linear and inputs of its second.
    """

    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """Shapes of the modules; a model without images has the LLM alone."""

    llm: LLMShape
    vit: ViTShape | None = None
    projector: ProjectorShape | None = None


class Pipeline(NamedTuple):
    """How stages run: the schedule, stages of each pipeline rank, and whether the LLM is frozen."""

    schedule: Schedule
    virtual_stages: int
    frozen: bool


class Problem(NamedTuple):
    """Something that does not fit: the number that stands in the way, and all of it in a sentence."""

    number: str
    text: str


@cache
def sorted_divisors(number: int) -> list[int]:
    """The numbers that divide ``number``, ascending; asked thousands of times for the same few numbers."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def problems(name: str, layout: Layout, shapes: ModelShapes, pipeline: Pipeline) -> Iterator[Problem]:
    """Find what does not fit in the layout of one module, one problem at a time."""
    if name == "llm":
        yield from _of_llm(layout, shapes.llm)
        yield from _of_pipeline(layout, shapes.llm, pipeline)
    elif name == "vit" and shapes.vit is not None:
        yield from _of_vit(layout.tp, shapes.vit)
    elif name == "projector" and shapes.projector is not None:
        yield from _split("hidden_size", "H", shapes.projector.hidden_size, "hidden channels", layout.tp)


def _split(number: str, symbol: str, value: int, what: str, tp: int, because: str = "") -> Iterator[Problem]:
    if value % tp:
        fits = f"tp can be one of {[n for n in sorted_divisors(value) if n <= 4 * tp]}"
        yield Problem(
            f"{number} = {value}", f"{symbol} = {value} {what} cannot be split over tp = {tp}{because}; {fits}"
        )


def _of_vit(tp: int, shape: ViTShape) -> Iterator[Problem]:
    yield from _split("num_heads", "A", shape.num_heads, "attention heads", tp)
    yield from _split("ffn_size", "F", shape.ffn_size, "feed-forward channels", tp)
    if shape.width_norm:
        yield from _split("hidden_size", "C", shape.hidden_size, "channels of the query and key norms", tp)


def _of_llm(layout: Layout, shape: LLMShape) -> Iterator[Problem]:
    tp, hp, heads, kv_heads = layout.tp, layout.hp, shape.num_heads, shape.num_kv_heads
    yield from _split("num_heads", "A", heads, "attention heads", tp)
    yield from _split("num_kv_heads", "K", kv_heads, "KV heads", tp, " (they are not copied over tp ranks)")
    if heads % tp == 0 and heads // tp % hp:
        text = f"A/tp = {heads // tp} attention heads of each tp rank cannot be split over hp = {hp}"
        yield Problem(f"num_heads = {heads}", f"{text}; hp can be one of {sorted_divisors(heads // tp)}")
    if kv_heads % tp == 0 and kv_heads // tp % hp and hp % (kv_heads // tp):
        text = f"K/tp = {kv_heads // tp} KV heads of each tp rank cannot be shared by hp = {hp} ranks alike"
        yield Problem(f"num_kv_heads = {kv_heads}", f"{text}: one number must divide the other")
    yield from _split("ffn_size", "F", shape.ffn_size, "feed-forward channels", tp)
    if shape.vocab_size < tp:
        text = f"V = {shape.vocab_size} tokens of the vocabulary leave some of tp = {tp} ranks without a row"
        yield Problem(f"vocab_size = {shape.vocab_size}", text)
    try:
        SequenceShards.of(layout, shape.pack_tokens)
    except ValueError as error:
        yield Problem(f"pack_tokens = {shape.pack_tokens}", str(error))
    if shape.packs_per_step % layout.dp:
        text = f"packs_per_step = {shape.packs_per_step} cannot be dealt to dp = {layout.dp} ranks alike"
        fits = f"take a multiple of {layout.dp}, or dp from {sorted_divisors(shape.packs_per_step)}"
        yield Problem(f"packs_per_step = {shape.packs_per_step}", f"{text}; {fits}")


def _of_pipeline(layout: Layout, shape: LLMShape, pipeline: Pipeline) -> Iterator[Problem]:
    pp, virtual, schedule = layout.pp, pipeline.virtual_stages, pipeline.schedule
    if pp == 1:
        return
    if virtual > 1 and schedule == "1f1b":
        text = f"schedule '1f1b' has one stage on each rank, virtual_stages = {virtual} needs 'interleaved'"
        yield Problem(f"virtual_stages = {virtual}", f"{text} or 'zero_bubble'")
    if pp * virtual > shape.num_layers:
        stages = f"pp = {pp}" if virtual == 1 else f"pp · virtual_stages = {pp} · {virtual} = {pp * virtual}"
        text = f"{shape.num_layers} layers cannot be cut into {stages} stages"
        yield Problem(f"num_layers = {shape.num_layers}", f"{text}; lower pp to at most {shape.num_layers // virtual}")
    if schedule == "zero_bubble" and pipeline.frozen:
        text = "a zero-bubble schedule with a frozen first stage gives later weights no gradient, and the LLM is frozen"
        yield Problem("schedule = zero_bubble", f"{text}; take schedule '1f1b' or 'interleaved', or pp = 1")
    if shape.packs_per_step % layout.dp:
        return
    microbatches = shape.packs_per_step // layout.dp
    share = f"packs_per_step/dp = {shape.packs_per_step}/{layout.dp} = {microbatches} microbatches"
    if microbatches < pp:
        text = f"{share} cannot fill pp = {pp} stages; raise packs_per_step to a multiple of {layout.dp} from"
        yield Problem(f"packs_per_step = {shape.packs_per_step}", f"{text} {layout.dp * pp} on, or lower pp or dp")
    elif schedule != "1f1b" and microbatches % pp:
        text = f"{share} are not a multiple of pp = {pp}, as schedule '{schedule}' needs"
        fits = f"take packs_per_step = {microbatches // pp * pp * layout.dp}, or schedule '1f1b'"
        yield Problem(f"packs_per_step = {shape.packs_per_step}", f"{text}; {fits}")
