"""What each axis sends in a step: the calls and bytes of every collective, from layout and shapes alone.

    axis       between                       collectives                                     formulas
    shard      ranks of one copy of weights  all_gather weights, reduce_scatter gradients    data_calls
    replicate  copies (hybrid ZeRO)          all_reduce gradients                            data_calls
    tp         parts of a layer              by style of each module; the loss               tensor_calls, loss_calls
    hp, cp     rows of a pack                all_to_all, send around attention               head_calls, context_calls
    pp         stages                        send of hidden states and their gradients       pipeline_calls
    all        all ranks of the run          all_to_all of visual tokens, two all_reduce     exchange_, scalar_calls

Counts are of one rank and one optimizer step. The bytes of a call are those of the whole tensor that it works on: what
an all-gather makes on each rank, what a reduce-scatter or all-reduce takes, what an all-to-all or a send sends (own
part included). Of B such bytes a ring of R ranks puts on the wire, from each rank, B·(R − 1)/R in an all-gather, a
reduce-scatter and an even all-to-all, twice that in an all-reduce, B in a send.

Dtypes are told by b, bytes of an element in forward and backward; sums of gradients and partial sums travel as
W = max(b, 4). Nothing is recomputed here. Recomputing a block, fully or in part, calls its forward's collectives over
tp, hp and cp once more, except the last (of the MLP's output, which nothing needs again); weights are still there, so
``shard`` gathers no more. Recomputing the encoder chunk by chunk repeats all of its forward, gathers included. A
pipeline's first step also opens its connections, with sends of 4 bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch.distributed.tensor import Shard

from evovlm.parallel.collectives import part_bounds
from evovlm.parallel.layout import Layout
from evovlm.parallel.routes import Chunk
from evovlm.parallel.sharded_data import matches
from evovlm.parallel.tensor_styles import STYLES

Axis = Literal["shard", "replicate", "tp", "hp", "cp", "pp", "all"]
Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "receive"]
Shape = Sequence[int]


@dataclass(frozen=True)
class Calls:
    """Some calls alike.

    Attributes:
        axis: Between which ranks.
        collective: Which.
        count: Calls of one rank in one step.
        num_bytes: Of each, as the module's docstring says.
    """

    axis: Axis
    collective: Collective
    count: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """A module as one rank holds it: the ViT, the projector, or a pipeline stage of the LLM.

    Attributes:
        layout: Its layout.
        tp_rank: Which of its tp ranks holds it.
        shapes: Whole shape (before any split) of every parameter held, by its name within the module; one that two
            names share once.
        styles: Path pattern → tensor-parallel style.
        blocks: Path pattern of what ``fully_shard`` gathers one by one; None for nothing.
        min_unit: Blocks of fewer parameters are gathered with the rest.
        trained: Whether it has gradients of its own.
        passes: Whether gradients pass through it, to it or to what is before it. A module that is neither runs without
            a backward.
    """

    layout: Layout
    tp_rank: int
    shapes: Mapping[str, Shape]
    styles: Mapping[str, str]
    blocks: str | None
    min_unit: int = 0
    trained: bool = True
    passes: bool = True

    def style(self, path: str) -> str:
        """Style of the module at a path."""
        return next((style for pattern, style in self.styles.items() if matches(path, pattern)), "replicate")

    def part(self, name: str) -> list[int]:
        """Shape of this tp rank's part of a parameter."""
        shape = list(self.shapes[name])
        path, _, leaf = name.rpartition(".")
        placement = STYLES[self.style(path)].placements(leaf)
        if isinstance(placement, Shard):
            bounds = part_bounds(shape[placement.dim], self.layout.tp)
            shape[placement.dim] = bounds[self.tp_rank + 1] - bounds[self.tp_rank]
        return shape

    def units(self) -> list[list[list[int]]]:
        """Parts of parameters that are gathered together: each block, then the rest."""
        rest: list[list[int]] = []
        blocks: dict[str, list[list[int]]] = {}
        depth = len(self.blocks.split(".")) if self.blocks else 0
        for name in self.shapes:
            path = ".".join(name.split(".")[:depth])
            inside = self.blocks is not None and matches(path, self.blocks)
            (blocks.setdefault(path, []) if inside else rest).append(self.part(name))
        units = []
        for parts in blocks.values():
            if sum(map(prod, parts)) * self.layout.tp >= self.min_unit:
                units.append(parts)
            else:
                rest.extend(parts)
        return [*units, rest] if rest else units


def data_calls(held: Held, uses: int, b: int) -> list[Calls]:
    """ZeRO: weights gathered, gradients reduced (``parallel/sharded_data.py``).

    A unit of parameters ``[d, …]`` is padded to U = Σ ceil(d / shard)·shard·… elements; gathering moves U·b bytes,
    reducing U·W, adding copies up U·W / shard. Calls of each, where M uses have a forward and a backward each:

        zero   all_gather   reduce_scatter   all_reduce (several copies)
        1      1            1                1
        2      1            M                1, under a pipeline M
        3      2·M          M                1, under a pipeline M

    Prefetching changes when, not how often. Frozen weights are gathered alike and never reduced; without a backward
    ZeRO 3 gathers M times.

    Args:
        held: The module.
        uses: M: microbatches of the LLM, chunks of tiles of the encoder.
        b: Bytes of an element of weights in forward and backward.
    """
    layout, shard = held.layout, held.layout.shard_size
    gathers = 1 if layout.zero < 3 else uses * (2 if held.passes else 1)
    reductions = uses if layout.zero > 1 else 1
    sums = reductions if layout.pp > 1 else 1
    calls: list[Calls] = []
    for parts in held.units():
        size = sum(-(-first // shard) * shard * prod(rest) for first, *rest in parts)
        if shard > 1:
            calls.append(Calls("shard", "all_gather", gathers, size * b))
        if held.trained and shard > 1:
            calls.append(Calls("shard", "reduce_scatter", reductions, size * max(b, 4)))
        if held.trained and layout.data_ranks > shard:
            calls.append(Calls("replicate", "all_reduce", sums, size * max(b, 4) // shard))
    return calls


def tensor_calls(held: Held, rows: Sequence[int], b: int) -> list[Calls]:
    """Tensor parallelism, by the style of each module (``parallel/tensor_styles.py``). For r rows of a use:

        style            parameters    forward                      backward
        colwise_copy     [o, i]                                     all_reduce r·i·W
        rowwise_scatter  [o, i]        reduce_scatter r·o·W         all_gather r·o·b, all_reduce of a bias o·W
        rowwise_reduce   [o, i]        all_reduce r·o·W
        norm, local      [w]                                        all_reduce of each parameter w·W
        norm_gather      [w]           all_gather r·w·b             reduce_scatter r·w·W, all_reduce of each w·W
        width_norm       [w]           all_reduce r·W               all_reduce r·W
        embedding        [V, H]        reduce_scatter r·H·W         all_gather r·H·b

    ``colwise``, ``replicate`` and ``head`` send nothing. Without rows nothing is sent.

    Args:
        held: The module.
        rows: Rows of each use: of the LLM the t = T/(cp·hp) of every microbatch, of the ViT tiles · (1 + P) of every
            chunk, of the projector its visual tokens.
        b: Bytes of an element in forward and backward.
    """
    if held.layout.tp == 1:
        return []
    wide, calls = max(b, 4), []
    parameters: dict[str, dict[str, Shape]] = {}
    for name, shape in held.shapes.items():
        path, _, leaf = name.rpartition(".")
        parameters.setdefault(path, {})[leaf] = shape
    for path, shapes in parameters.items():
        style = held.style(path)
        weight = shapes.get("weight", ())
        forward: list[tuple[Collective, int]] = []
        backward: list[tuple[Collective, int]] = []
        if style == "colwise_copy":
            backward = [("all_reduce", weight[1] * wide)]
        elif style in ("rowwise_scatter", "embedding"):
            width = weight[0] if style == "rowwise_scatter" else weight[1]
            forward = [("reduce_scatter", width * wide)]
            if style == "rowwise_scatter" or held.trained:
                backward = [("all_gather", width * b)]
        elif style == "rowwise_reduce":
            forward = [("all_reduce", weight[0] * wide)]
        elif style == "norm_gather":
            forward, backward = [("all_gather", weight[0] * b)], [("reduce_scatter", weight[0] * wide)]
        elif style == "width_norm":
            forward = backward = [("all_reduce", wide)]
        for collective, row_bytes in forward + (backward if held.passes else []):
            calls += [Calls("tp", collective, 1, count * row_bytes) for count in rows if count]
        if held.trained and STYLES[style].add_gradients:
            whole = [shape for leaf, shape in shapes.items() if not isinstance(STYLES[style].placements(leaf), Shard)]
            calls += [Calls("tp", "all_reduce", len(rows), prod(shape) * wide) for shape in whole]
    return calls


def loss_calls(
    layout: Layout, num_rows: int, hidden: int, targets: Sequence[int], chunk_rows: int, b: int
) -> list[Calls]:
    """Vocabulary-parallel cross-entropy of the last stage (``engine/losses.py``), t = T/(cp·hp):

        tp  all_gather t·H·b of hidden states, backward reduce_scatter t·H·W
        tp  for each chunk of n supervised rows  all_reduce n·W (largest logit) and 2·n·W (Σ exp, target logit)

    Args:
        layout: The LLM's.
        num_rows: T.
        hidden: H.
        targets: Supervised rows of each microbatch, among this rank's t.
        chunk_rows: Rows whose logits exist at a time.
        b: Bytes of an element in forward and backward.
    """
    if layout.tp == 1:
        return []
    wide, block = max(b, 4), num_rows // (layout.cp * layout.hp)
    calls = [
        Calls("tp", "all_gather", len(targets), block * hidden * b),
        Calls("tp", "reduce_scatter", len(targets), block * hidden * wide),
    ]
    for count in targets:
        for start in range(0, count, chunk_rows):
            chunk = min(chunk_rows, count - start)
            calls += [Calls("tp", "all_reduce", 1, chunk * wide), Calls("tp", "all_reduce", 1, 2 * chunk * wide)]
    return calls


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: A, K and D."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def kv_heads(self, layout: Layout) -> int:
        """κ, KV heads that one rank attends with: one is copied where there are fewer than ranks."""
        return max(self.num_kv_heads // layout.tp // layout.hp, 1)


def head_calls(layout: Layout, num_rows: int, heads: Heads, layers: int, b: int) -> list[Calls]:
    """Head parallelism in M·layers attentions (``parallel/attention/heads.py``), t = T/(cp·hp), A heads of a tp rank:

        hp  all_to_all t·hp·(A/hp + 2κ)·D·b before attention, t·A·D·b after it; backward the same two

    Args:
        layout: The LLM's.
        num_rows: T.
        heads: A, K, D of the whole model.
        layers: Layers that this rank holds, times microbatches.
        b: Bytes of an element in forward and backward.
    """
    if layout.hp == 1:
        return []
    block, own = num_rows // (layout.cp * layout.hp), heads.num_heads // layout.tp
    joined = own + 2 * heads.kv_heads(layout) * layout.hp
    return [Calls("hp", "all_to_all", 2 * layers, block * width * heads.head_dim * b) for width in (joined, own)]


def context_calls(layout: Layout, num_rows: int, heads: Heads, layers: int, b: int) -> list[Calls]:
    """Context parallelism in M·layers attentions (``parallel/attention/ring.py``): O rings of w ranks, cp = O·w.

        cp  send 2·(T/cp)·κ·D·b   O·(w − 1) + (O − 1) times, backward again          keys and values
        cp  send 2·(T/cp)·κ·D·W   backward O·w times (none if w = 1) + O (none if O = 1)   their gradients

    As much is received. Arguments as of :func:`head_calls`.
    """
    if layout.cp == 1:
        return []
    window = layout.window or layout.cp
    rings = layout.cp // window
    block = 2 * (num_rows // layout.cp) * heads.kv_heads(layout) * heads.head_dim
    blocks = 2 * layers * (rings * (window - 1) + rings - 1)
    gradients = layers * (rings * window * (window > 1) + rings * (rings > 1))
    pairs = [(blocks, block * b), (gradients, block * max(b, 4))]
    return [Calls("cp", way, count, size) for count, size in pairs for way in ("send", "receive")]


def pipeline_calls(
    layout: Layout, num_rows: int, hidden: int, stage: int, num_stages: int, uses: int, b: int
) -> list[Calls]:
    """One stage of a pipeline, under every schedule (``parallel/pipeline.py``):

        pp  send T/(cp·hp·tp)·H·b   M times forward except on the last stage, M times backward except on the first

    As much is received.

    Args:
        layout: The LLM's.
        num_rows: T.
        hidden: H.
        stage: Number of the stage.
        num_stages: pp times the stages of a rank.
        uses: M.
        b: Bytes of an element in forward and backward.
    """
    if layout.pp == 1:
        return []
    neighbours = (stage > 0) + (stage < num_stages - 1)
    size = num_rows // layout.sequence_ranks * hidden * b
    return [Calls("pp", way, neighbours * uses, size) for way in ("send", "receive")]


def tied_calls(held: Held, name: str, shard_rank: int, b: int) -> list[Calls]:
    """A head tied to the embedding of another stage (``engine/tied.py``), on the first and on the last stage:

        pp  send W for every element of the matrix that this rank holds

    As much is received.

    Args:
        held: The stage.
        name: The matrix, by its name there.
        shard_rank: Which of the ranks of its copy this is.
        b: Bytes of an element in forward and backward.
    """
    first, *rest = held.part(name)
    bounds = part_bounds(first, held.layout.shard_size)
    size = (bounds[shard_rank + 1] - bounds[shard_rank]) * prod(rest) * max(b, 4)
    return [Calls("pp", way, 1, size) for way in ("send", "receive")]


def share_calls(tiles: Sequence[int], tokens_per_tile: int, width: int, tp: int, b: int) -> list[Calls]:
    """Tiles of a chunk shared out among the ViT's tp ranks (``engine/vision.py``), in backward only:

        tp  all_gather tp·ceil(n/tp)·tokens_per_tile·width·b   for each chunk of n tiles

    Args:
        tiles: n of every chunk.
        tokens_per_tile: Visual tokens of a tile.
        width: Of what is shared: C·downsample² features, or H if the projector is tensor parallel too.
        tp: The ViT's tp ranks.
        b: Bytes of an element in forward and backward.
    """
    if tp == 1:
        return []
    return [Calls("tp", "all_gather", 1, tp * -(-n // tp) * tokens_per_tile * width * b) for n in tiles if n]


def exchange_calls(chunks: Iterable[Chunk], hidden: int, b: int, *, passes: bool = True) -> list[Calls]:
    """The vision exchange (``parallel/exchange.py``), over all ranks, whatever the layouts:

        all  all_to_all  for each chunk  H·b for every row sent; backward H·b for every row received

    Args:
        chunks: This rank's part in each exchange.
        hidden: H.
        b: Bytes of an element in forward and backward.
        passes: Whether gradients go back.
    """
    calls = []
    for chunk in chunks:
        calls.append(Calls("all", "all_to_all", 1, len(chunk.send_rows) * hidden * b))
        if passes:
            calls.append(Calls("all", "all_to_all", 1, chunk.num_received * hidden * b))
    return calls


def scalar_calls() -> list[Calls]:
    """Loss and squared gradient norm, a float64 each: ``all  all_reduce 8`` twice."""
    return [Calls("all", "all_reduce", 2, 8)]


def count_calls(calls: Iterable[Calls]) -> Counter[tuple[Axis, Collective, int]]:
    """Add up: (axis, collective, bytes of a call) → calls; for comparison with what was seen."""
    total: Counter[tuple[Axis, Collective, int]] = Counter()
    for call in calls:
        if call.count:
            total[call.axis, call.collective, call.num_bytes] += call.count
    return total


def sum_by_axis(calls: Iterable[Calls]) -> dict[tuple[Axis, Collective], tuple[int, int]]:
    """Add up: (axis, collective) → (calls, bytes)."""
    total: dict[tuple[Axis, Collective], tuple[int, int]] = {}
    for call in calls:
        count, num_bytes = total.get((call.axis, call.collective), (0, 0))
        total[call.axis, call.collective] = (count + call.count, num_bytes + call.count * call.num_bytes)
    return total
