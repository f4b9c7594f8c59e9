"""The engine: a model sharded by a plan, its optimizer, and one training step.

    build   model on meta ─ shard each module by its own layout ─ allocate ─ weights (named stream) ─ optimizer
    step    tiles ─► encode, exchange ─► LLM, microbatch by microbatch ─► gradients back to the encoders
            └─► one gradient norm over all modules ─► clip ─► AdamW

The loss and its gradients are those of one process on the same samples: the loss denominator W comes from the plan,
and sums over ranks and microbatches are the only reductions.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from evovlm.data.step_batch import StepBatch
from evovlm.engine.checkpoint import load_checkpoint, save_checkpoint
from evovlm.engine.local_state import LocalState
from evovlm.engine.objectives import CrossEntropy, Objective
from evovlm.engine.optimizer import clip_factor, scale_gradients, set_lr
from evovlm.engine.options import EngineOptions
from evovlm.engine.parts import NamedTensors
from evovlm.engine.settings import OptimSettings
from evovlm.engine.sharded_model import ShardedModel
from evovlm.engine.tied import add_tied_gradients
from evovlm.engine.vision import VisualTokens
from evovlm.models.sharding import INTERNVL, ModelTables
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.pieces import Piece, gather_pieces, piece_of
from evovlm.parallel.sharded_data import free
from evovlm.parallel.world import World


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: Σ w·CE / W over all ranks and microbatches.
        grad_norm: Norm of the gradient over all modules, before clipping.
        clipped: Whether the gradient was scaled down.
    """

    loss: float
    grad_norm: float
    clipped: bool


class Engine(ShardedModel):
    """A sharded model with its optimizer. Use :meth:`build`."""

    def __init__(self, model: ShardedModel, optim: OptimSettings) -> None:
        super().__init__(model.parts, model.language, model.vision, model.world)
        self.state, self.max_norm = LocalState(model.parts, optim), optim.clip_norm

    @classmethod
    def build(
        cls,
        make_model: Callable[[], nn.Module],
        plan: ParallelPlan,
        world: World,
        *,
        optim: OptimSettings,
        weights: NamedTensors,
        options: EngineOptions | None = None,
        tables: ModelTables = INTERNVL,
    ) -> "Engine":
        """Build a model straight into its sharded form: no rank ever holds it whole. Collective.

        Args:
            make_model: Constructor, called on the meta device.
            plan: Layouts of the modules.
            world: The ranks of the run.
            optim: Optimizer settings.
            weights: Every parameter, by name, in any order; consumed as a stream, the same on each rank.
            options: How to run.
            tables: How the model is sharded.

        Raises:
            ValueError: The plan is for another number of ranks; a weight is missing, unknown or of another shape; a
                frozen module does not exist; options do not go together.
        """
        model = cls.build_model(make_model, plan, world, weights=weights, options=options, tables=tables)
        return cls(model, optim)

    def train_step(self, batch: StepBatch, loss_denominator: float, lr_factor: float = 1.0) -> StepResult:
        """Run one optimizer step. Collective.

        Args:
            batch: This rank's part of the step; every rank has the same number of microbatches.
            loss_denominator: W, from the step plan.
            lr_factor: Factor on every group's base learning rate.

        Raises:
            ValueError: W is not positive: no sample of the step has a target.
            FloatingPointError: Loss or gradient norm is not finite; the weights are untouched.
        """
        return self.apply(self.backward(batch, loss_denominator), lr_factor)

    def apply(self, loss: float, lr_factor: float = 1.0) -> StepResult:
        """Clip the gradients that :meth:`backward` has left, and take the optimizer step. Collective.

        Args:
            loss: What :meth:`backward` returned.
            lr_factor: Factor on every group's base learning rate.

        Raises:
            FloatingPointError: Loss or gradient norm is not finite; the weights are untouched.
        """
        norm = self.state.gradient_norm(self.world.device)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.state.zero_gradients()
            raise FloatingPointError(
                f"loss {loss}, gradient norm {norm}: not finite; the step was not applied. "
                "Lower the learning rate, or look for a damaged sample in this step's plan"
            )
        factor = clip_factor(norm, self.max_norm)
        scale_gradients(self.state.pull_gradients(), factor)
        set_lr(self.state.optimizer, lr_factor)
        self.state.optimizer.step()
        self.state.zero_gradients()
        return StepResult(loss=loss, grad_norm=norm, clipped=factor < 1.0)

    def backward(self, batch: StepBatch, loss_denominator: float) -> float:
        """Compute loss and gradients of a step, and change nothing else; returns Σ w·CE / W. Collective.

        Raises:
            ValueError: W is not positive: no sample of the step has a target.
        """
        if loss_denominator <= 0:
            raise ValueError(f"the step's loss weights add up to {loss_denominator}: none of its samples has a target")
        objective = CrossEntropy(loss_denominator, self.world.device)
        self.accumulate(batch, objective)
        loss = objective.sums[:1]
        dist.all_reduce(loss)
        return loss.item() / loss_denominator

    def accumulate(
        self, batch: StepBatch, objective: Objective, before: Callable[[VisualTokens | None], None] | None = None
    ) -> None:
        """Leave the gradients of a step's objective on the parameters. Collective.

        Args:
            batch: This rank's part of the step.
            objective: The loss.
            before: Called with the visual tokens of the step before the LLM runs.
        """
        for part in self.parts:
            part.root.train()
        visual = self._encode(batch)
        if before is not None:
            before(visual)
        self.language.train(batch.packs, visual, objective)
        if self.vision is not None and visual is not None:
            self.vision.backward(batch, visual)
        add_tied_gradients(self.state, self.language.mesh)
        for part in self.parts:
            free(part.root)

    def prefetch(self, batch: StepBatch) -> None:
        """Run a frozen ViT on a coming step's tiles now. Collective; :meth:`train_step` must get the same object.

        Raises:
            ValueError: The ViT is trained, or there is none.
        """
        if self.vision is None:
            raise ValueError("this model has no encoder: there are no features to prefetch")
        self.vision.prefetch(batch, self.language.shards(len(batch.packs[0].tokens)))

    def pieces(self) -> dict[str, Piece]:
        """Model and optimizer state that this rank holds, for checkpoints: name → piece, sharing memory."""
        return self.state.pieces()

    def named_full_tensors(self, *, everywhere: bool = False) -> Iterable[tuple[str, Tensor]]:
        """Yield every parameter whole, one at a time, on the CPU; on rank 0, or ``everywhere``.

        Every rank must consume the stream, also where it yields nothing.
        """
        weights = {p.name: piece_of(p.sharded) for p in self.state.parameters}
        return gather_pieces(weights, self.world, everywhere=everywhere)

    def named_full_gradients(self, *, everywhere: bool = False) -> Iterable[tuple[str, Tensor]]:
        """As :meth:`named_full_tensors`, of the gradients that :meth:`backward` has left."""
        found = {}
        for p in self.state.parameters:
            if p.gradient is not None:
                piece = piece_of(p.sharded)
                found[p.name] = Piece(piece.shape, piece.offset, p.gradient.view(piece.local.shape))
        return gather_pieces(found, self.world, everywhere=everywhere)

    def save(self, run: str | Path, step: int, *, meta: Mapping[str, Any] | None = None, keep: int = 2) -> Path:
        """Write model and optimizer to ``run/checkpoints/step-…``, complete or absent. Collective.

        Args:
            run: Directory on a file system that all ranks share; made if it is not there.
            step: Optimizer steps done.
            meta: What :meth:`load` can compare, as JSON.
            keep: Newest checkpoints that stay.

        Returns:
            The directory of the checkpoint.

        Raises:
            OSError: A rank could not write; every rank raises.
        """
        return save_checkpoint(Path(run), step, self.pieces(), self.world, dict(meta or {}), keep)

    def load(self, checkpoint: str | Path, *, expected: Mapping[str, Any] | None = None) -> int:
        """Fill model and optimizer from a checkpoint that any plan has saved; returns its step. Collective.

        Args:
            checkpoint: Directory that :meth:`save` returned; :func:`newest_checkpoint` finds a run's last.
            expected: Entries of the checkpoint's meta that must be equal.

        Raises:
            FileNotFoundError: The checkpoint is not complete.
            ValueError: It is of another model, or damaged; nothing was changed, and the message names the difference.
        """
        return load_checkpoint(Path(checkpoint), self.pieces(), expected=dict(expected or {}))
