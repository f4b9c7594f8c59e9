"""The LLM's part of a step: each microbatch through this rank's pipeline stages, forward and backward.

pack, whole, from the plan ─► this rank's rows: tokens, positions, targets; how queries meet keys
                                 │
one stage:   F0 B0 F1 B1 …       ▼                 several: a schedule of torch.distributed.pipelining
loss = Σ w·CE of this rank's rows, added up over microbatches; gradients of visual tokens stay on their leaves
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.engine.losses import Targets, weighted_cross_entropy
from evovlm.engine.parts import Part
from evovlm.engine.vision import VisualTokens
from evovlm.parallel.attention import ShardedAttend
from evovlm.parallel.pipeline import Pipeline, Schedule, relay
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.sharded_data import accumulate, accumulate_unordered, finish, free


@dataclass(frozen=True, eq=False)
class Rows:
    """This rank's rows of one microbatch, on its device.

    Attributes:
        tokens: int64 ``[t]``, t = T/(cp·hp).
        positions: float32 ``[t]``.
        attend: How queries meet keys.
        targets: Supervised rows among the t.
        visual: Rows and values of visual tokens, on the first stage of a model that has an encoder.
    """

    tokens: Tensor
    positions: Tensor
    attend: ShardedAttend
    targets: Targets
    visual: tuple[Tensor, Tensor] | None


class Language:
    """This rank's pipeline stages of the LLM.

    Args:
        stages: The stages, sharded.
        hidden_size: H.
        dtype: Dtype of forward and backward.
        schedule: Pipeline schedule.
        device: Where this rank computes.
    """

    def __init__(
        self, stages: Sequence[Part], hidden_size: int, dtype: torch.dtype, schedule: Schedule, device: torch.device
    ) -> None:
        self.stages, self.mesh = list(stages), stages[0].mesh
        self._hidden_size, self._dtype, self._schedule, self._device = hidden_size, dtype, schedule, device
        self._pipelines: dict[tuple[int, int], Pipeline] = {}
        self._rows: list[Rows] = []
        self._scale = 1.0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def shards(self, pack_tokens: int) -> SequenceShards:
        """How the rows of a pack are split under the LLM's layout."""
        return SequenceShards.of(self.mesh.layout, pack_tokens)

    def train(self, packs: Sequence[MicroBatch], visual: VisualTokens | None, scale: float) -> Tensor:
        """Run forward and backward of all microbatches. Collective.

        Args:
            packs: The data-parallel rank's microbatches.
            visual: Their visual tokens; gradients are left on the values.
            scale: Factor on the loss before backward, 1 / W.

        Returns:
            Σ w·CE over this rank's rows and all microbatches, float64; on all but one tensor-parallel rank of the
            last stage it is 0, so that a sum over all ranks counts each row once.
        """
        self._prepare(packs, visual, scale)
        if "pp" not in self.mesh.groups:
            (stage,) = self.stages
            for number in range(len(packs)):
                accumulate(stage.root, stage.mesh, last=number == len(packs) - 1)
                torch.autograd.backward(self._run(0, number, None))
        else:
            for stage in self.stages:
                accumulate_unordered(stage.root, stage.mesh)
            self._pipeline(len(packs), len(packs[0].tokens)).train()
            for stage in self.stages:
                finish(stage.root)
        return self._take_loss()

    @torch.no_grad()
    def evaluate(self, packs: Sequence[MicroBatch], visual: VisualTokens | None) -> tuple[Tensor, Tensor]:
        """Run forward of all microbatches; returns Σ w·CE as :meth:`train` does, and Σ w alike. Collective."""
        self._prepare(packs, visual, 1.0)
        if "pp" not in self.mesh.groups:
            for number in range(len(packs)):
                self._run(0, number, None)
        else:
            hidden = self._hidden(len(packs[0].tokens))
            relay(self._run, len(self.stages), self.mesh.groups["pp"], len(packs), hidden, self._device)
        weight = torch.zeros_like(self._loss)
        if self._counts:
            weight += sum(float(rows.targets.weights.double().sum()) for rows in self._rows)
        for stage in self.stages:
            free(stage.root)
        return self._take_loss(), weight

    @property
    def _counts(self) -> bool:
        """Whether this rank's loss is counted: it has the last stage, and is the first of its tp ranks."""
        return self.stages[-1].is_last and self.mesh.place.tp == 0

    def _take_loss(self) -> Tensor:
        loss = self._loss if self._counts else torch.zeros_like(self._loss)
        self._rows, self._loss = [], torch.zeros_like(self._loss)
        return loss

    def _prepare(self, packs: Sequence[MicroBatch], visual: VisualTokens | None, scale: float) -> None:
        shards, place = self.shards(len(packs[0].tokens)), self.mesh.place
        mine = torch.from_numpy(shards.block_rows(place.cp, place.hp))
        whole = shards.cp == shards.hp == 1
        self._scale = scale
        self._rows = []
        for number, pack in enumerate(packs):
            tokens, positions, labels, weights = (
                part if whole else part[mine] for part in (pack.tokens, pack.positions, pack.labels, pack.weights)
            )
            values = None
            if visual is not None and self.stages[0].is_first:
                values = (visual.rows[number], visual.values[number])
            attend = ShardedAttend(
                pack.cu_seqlens.tolist(), shards, place, self.mesh.groups, window=self.mesh.layout.window
            )
            self._rows.append(
                Rows(
                    tokens.to(self._device, non_blocking=True),
                    positions.to(self._device, non_blocking=True),
                    attend,
                    Targets.of(labels, weights, self._device),
                    values,
                )
            )

    def _run(self, local: int, number: int, hidden: Tensor | None) -> Tensor:
        """Run one stage on one microbatch: hidden states ``[t/tp, H]``, or the last stage's scaled loss ``[1]``."""
        stage, rows = self.stages[local], self._rows[number]

        def loss(last: Tensor, head: Tensor) -> Tensor:
            total = weighted_cross_entropy(last, head, rows.targets, group=self.mesh.groups.get("tp"))
            self._loss += total.detach().double()
            return torch.stack([total * self._scale])  # not a view: hooks of fully_shard sit on it

        out: Tensor = stage.root(
            rows.tokens if hidden is None else hidden,
            rows.positions,
            rows.attend,
            visual=rows.visual if stage.is_first else None,
            head=loss if stage.is_last else None,
        )
        return out

    def _hidden(self, pack_tokens: int) -> Tensor:
        rows = pack_tokens // self.mesh.layout.sequence_ranks
        return torch.empty(rows, self._hidden_size, dtype=self._dtype, device="meta")

    def _pipeline(self, num_microbatches: int, pack_tokens: int) -> Pipeline:
        key = (num_microbatches, pack_tokens)
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline(
                [stage.root for stage in self.stages],
                self._run,
                self.mesh.groups["pp"],
                self._schedule,
                num_microbatches,
                self._hidden(pack_tokens),
                self._device,
            )
        return self._pipelines[key]
