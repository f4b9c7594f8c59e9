"""Visual tokens of a step: encoded wherever the plan says, sent to where the LLM needs them, and their gradients back.

    tiles of this rank ─ chunk by chunk ─► ViT ─► projector ─► exchange ─► rows of each microbatch [n, H]
                                            ▲         │ while the next chunk is encoded    │ LLM, all microbatches
                                            └─────────┴──── exchange ◄── gradients ◄───────┘

All microbatches are encoded before the LLM runs and their backward runs after it, so the encoder's work is balanced
over all ranks however the LLM is laid out. The LLM sees leaves: its graph ends at the visual tokens.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evovlm.csrc.ops import gather_rows, scatter_rows_
from evovlm.data.step_batch import StepBatch
from evovlm.engine.parts import Parts
from evovlm.engine.recompute import SavedBytes
from evovlm.parallel.collectives import slice_rows
from evovlm.parallel.exchange import Pending, start_exchange, start_return
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.routes import Chunk, ExchangePlan, plan_exchange
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.sharded_data import accumulate, free
from evovlm.parallel.world import World

Activations = Literal["auto", "keep", "recompute"]


class VisionModel(Protocol):
    """What the engine asks of a model with images, besides its parts."""

    def see(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Tiles ``[N, 3, S, S]`` to features ``[N, tokens_per_tile, C]``; N may be 0. Runs the ViT alone."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """Features ``[n, C]`` to visual tokens ``[n, H]``. Runs the projector alone."""
        ...


@dataclass(eq=False)
class VisualTokens:
    """The visual tokens that this rank's rows of a step need.

    Attributes:
        rows: For each microbatch, int64 ``[n]``: local rows that visual tokens fill.
        values: For each microbatch, ``[n, H]``: leaves whose gradients go back to the encoders.
        plan: The exchange that brought them.
        sent: What each chunk handed over, with its graph if it was kept.
        kept: Whether the encoder's activations were kept.
    """

    rows: list[Tensor]
    values: list[Tensor]
    plan: ExchangePlan
    sent: list[Tensor]
    kept: bool


class Vision:
    """Encoder and exchange of one rank.

    Args:
        parts: The sharded model.
        plan: Layouts of the modules.
        world: The ranks of the run.
        encode_tiles: Tiles of one chunk.
        activations: ``keep`` them until the backward, ``recompute`` chunk by chunk, or ``auto``: keep them in steps
            whose busiest encoder stays within ``memory``.
        memory: Bytes of activations that a rank may keep in ``auto``.
    """

    def __init__(
        self,
        parts: Parts,
        plan: ParallelPlan,
        world: World,
        *,
        encode_tiles: int,
        activations: Activations,
        memory: float,
    ) -> None:
        self._model = cast(VisionModel, parts.model)
        self._vit, self._projector = parts.encoder["vit"], parts.encoder["projector"]
        self._plan, self._world = plan, world
        self._encode_tiles, self._activations, self._memory = encode_tiles, activations, memory
        self._bytes_per_tile: float | None = None
        self._trains_vit, self._trains_projector = _trains(self._vit.root), _trains(self._projector.root)
        self._features: tuple[StepBatch, list[Tensor]] | None = None

    @property
    def trains(self) -> bool:
        """Whether gradients are needed behind the visual tokens."""
        return self._trains_vit or self._trains_projector

    def encode(self, batch: StepBatch, shards: SequenceShards) -> VisualTokens:
        """Encode this rank's tiles and exchange them. Collective.

        Args:
            batch: This rank's part of the step.
            shards: How a pack's rows are split over sequence ranks.
        """
        exchange = self._exchange_plan(batch, shards)
        keep = self.trains and torch.is_grad_enabled() and self._keeps(batch)
        sent: list[Tensor] = []
        pending: list[Pending] = []
        saved = SavedBytes()
        for number, chunk in enumerate(exchange.chunks):
            with torch.set_grad_enabled(keep), saved if self._measures(keep) else nullcontext():
                rows = self._encode(chunk, self._seen(batch, exchange, number))
            if number == 0:
                received = rows.new_empty(sum(part.num_received for part in exchange.chunks), rows.shape[1])
                parts = torch.split(received, [part.num_received for part in exchange.chunks])
            pending.append(start_exchange(rows, chunk, out=parts[number]))
            sent.append(rows if keep else rows.detach())
        for part in pending:
            part.wait()
        device = self._world.device
        places, values = [], []
        for microbatch in range(len(batch.packs)):
            local, sources = (torch.from_numpy(part).to(device) for part in exchange.of_microbatch(microbatch))
            places.append(local)
            values.append(gather_rows(received, sources).requires_grad_(self.trains and torch.is_grad_enabled()))
        if self._measures(keep):
            self._measured(saved.count / max(1, len(batch.tiles)))
        if not keep:
            # No backward will free what was gathered.
            free(self._vit.root)
            free(self._projector.root)
        return VisualTokens(places, values, exchange, sent, keep)

    def backward(self, batch: StepBatch, tokens: VisualTokens) -> None:
        """Send the gradients of the visual tokens back and run the encoder's backward. Collective."""
        if self.trains:
            self._backward(batch, tokens)
        self._features = None

    def _backward(self, batch: StepBatch, tokens: VisualTokens) -> None:
        chunks = tokens.plan.chunks
        size = sum(chunk.num_received for chunk in chunks)
        gradient = tokens.sent[0].new_zeros(size, tokens.sent[0].shape[1])
        for microbatch, values in enumerate(tokens.values):
            if values.grad is not None:
                sources = torch.from_numpy(tokens.plan.of_microbatch(microbatch)[1]).to(gradient.device)
                scatter_rows_(gradient, sources, values.grad)
        parts = torch.split(gradient, [chunk.num_received for chunk in chunks])
        pending = [start_return(part, chunk) for part, chunk in zip(parts, chunks, strict=True)]
        for number, chunk in enumerate(chunks):
            for part, trained in ((self._vit, self._trains_vit), (self._projector, self._trains_projector)):
                if trained:
                    accumulate(part.root, part.mesh, last=number == len(chunks) - 1)
            rows = tokens.sent[number]
            if not tokens.kept:
                rows = self._encode(chunk, self._seen(batch, tokens.plan, number))
            torch.autograd.backward(rows, pending[number].wait())

    @torch.no_grad()
    def prefetch(self, batch: StepBatch, shards: SequenceShards) -> None:
        """Run a frozen ViT on a coming step's tiles now, such as while other ranks drain their pipeline. Collective.

        Raises:
            ValueError: The ViT is trained: its weights will have changed by then.
        """
        if self._trains_vit:
            raise ValueError("features can be prefetched only from a frozen ViT; freeze it, or do not prefetch")
        exchange = self._exchange_plan(batch, shards)
        self._features = (batch, [self._see(batch, chunk) for chunk in exchange.chunks])

    def _keeps(self, batch: StepBatch) -> bool:
        """Whether a step's activations are kept: the same answer on every rank."""
        if self._activations != "auto" or self._bytes_per_tile is None:
            return self._activations != "recompute"
        return int(batch.routes.num_tiles.max()) * self._bytes_per_tile <= self._memory

    def _measures(self, keep: bool) -> bool:
        return keep and self._activations == "auto" and self._bytes_per_tile is None

    def _measured(self, per_tile: float) -> None:
        """Agree on the bytes of a tile's activations; a step without tiles tells nothing."""
        (largest,) = self._world.max([per_tile])
        self._bytes_per_tile = largest or None

    def _exchange_plan(self, batch: StepBatch, shards: SequenceShards) -> ExchangePlan:
        rank, per_tile = self._world.rank, batch.tokens_per_tile
        return plan_exchange(batch.routes, self._plan, rank, shards, per_tile, self._encode_tiles)

    def _seen(self, batch: StepBatch, exchange: ExchangePlan, number: int) -> Tensor:
        """Features of a chunk, perhaps from a prefetch."""
        if self._features is not None and self._features[0] is batch:
            return self._features[1][number]
        return self._see(batch, exchange.chunks[number])

    def _see(self, batch: StepBatch, chunk: Chunk) -> Tensor:
        slots = slice(chunk.slots.start, chunk.slots.stop)
        device = self._world.device
        tiles, keys = (part[slots].to(device, non_blocking=True) for part in (batch.tiles, batch.tile_keys))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_vit):
            return self._model.see(tiles, keys)

    def _encode(self, chunk: Chunk, features: Tensor) -> Tensor:
        """Visual tokens that this rank hands over: its share among the ViT's tensor-parallel ranks."""
        group = self._vit.mesh.groups.get("tp")
        shared = self._plan.projector.tp == 1
        if group is not None and shared:
            features = _share(features, len(chunk.slots), group)
        tokens = self._model.project(features.flatten(0, 1))
        if group is not None and not shared:
            tokens = _share(tokens.view(*features.shape[:2], tokens.shape[-1]), len(chunk.slots), group).flatten(0, 1)
        return tokens


def _share(tiles: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """Keep this rank's tiles of a chunk that all ranks of the group hold."""
    size = dist.get_world_size(group)
    return slice_rows(tiles, group, [count * rank // size for rank in range(size + 1)])


def _trains(root: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in root.parameters())
