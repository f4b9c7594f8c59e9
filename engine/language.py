"""The LLM's part of a step: each microbatch through this rank's pipeline stages, forward and backward.

pack, whole, from the plan ─► this rank's rows: tokens, positions, targets; how queries meet keys
                                 │
one stage:   F0 B0 F1 B1 …       ▼                 several: a schedule of torch.distributed.pipelining
the last stage's loss is the objective's (objectives.py); gradients of visual tokens stay on their leaves
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.engine.objectives import Objective
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
        targets: What the objective made of the microbatch; None on ranks without the last stage.
        visual: Rows and values of visual tokens, on the first stage of a model that has an encoder.
    """

    tokens: Tensor
    positions: Tensor
    attend: ShardedAttend
    targets: Any
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
        self._objective: Objective | None = None

    def shards(self, pack_tokens: int) -> SequenceShards:
        """How the rows of a pack are split under the LLM's layout."""
        return SequenceShards.of(self.mesh.layout, pack_tokens)

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, where the loss is."""
        return self.stages[-1].is_last

    def train(self, packs: Sequence[MicroBatch], visual: VisualTokens | None, objective: Objective) -> None:
        """Run forward and backward of all microbatches. Collective.

        Args:
            packs: The data-parallel rank's microbatches.
            visual: Their visual tokens; gradients are left on the values.
            objective: The loss of the step.
        """
        self._prepare(packs, visual, objective)
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
        self._rows = []

    @torch.no_grad()
    def evaluate(self, packs: Sequence[MicroBatch], visual: VisualTokens | None, objective: Objective) -> None:
        """Run forward of all microbatches, for what the objective counts. Collective."""
        self._prepare(packs, visual, objective)
        if "pp" not in self.mesh.groups:
            for number in range(len(packs)):
                self._run(0, number, None)
        else:
            hidden = self._hidden(len(packs[0].tokens))
            relay(self._run, len(self.stages), self.mesh.groups["pp"], len(packs), hidden, self._device)
        for stage in self.stages:
            free(stage.root)
        self._rows = []

    def _prepare(self, packs: Sequence[MicroBatch], visual: VisualTokens | None, objective: Objective) -> None:
        shards, place = self.shards(len(packs[0].tokens)), self.mesh.place
        whole = shards.cp == shards.hp == 1
        mine = None if whole else torch.from_numpy(shards.block_rows(place.cp, place.hp))
        self._objective = objective
        self._rows = []
        for number, pack in enumerate(packs):
            tokens, positions = (part if mine is None else part[mine] for part in (pack.tokens, pack.positions))
            values = None
            if visual is not None and self.stages[0].is_first:
                values = (visual.rows[number], visual.values[number])
            attend = ShardedAttend(
                pack.cu_seqlens.tolist(),
                shards,
                place,
                self.mesh.groups,
                window=self.mesh.layout.window,
                prefixes=pack.prefixes,
            )
            self._rows.append(
                Rows(
                    tokens.to(self._device, non_blocking=True),
                    positions.to(self._device, non_blocking=True),
                    attend,
                    objective.targets(pack, mine, self._device) if self.has_last else None,
                    values,
                )
            )

    def _run(self, local: int, number: int, hidden: Tensor | None) -> Tensor:
        """Run one stage on one microbatch: hidden states ``[t/tp, H]``, or the last stage's loss ``[1]``."""
        stage, rows, objective = self.stages[local], self._rows[number], self._objective
        assert objective is not None  # set before any stage runs

        def loss(last: Tensor, head: Tensor) -> Tensor:
            # Not a view: hooks of fully_shard sit on it.
            return torch.stack([objective.loss(last, head, rows.targets, self.mesh)])

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
