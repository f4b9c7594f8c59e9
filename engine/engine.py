"""The engine: a model sharded by a plan, its optimizer, and one training step.

    build   model on meta ─ recompute ─ shard ─ allocate ─ weights (named stream) ─ optimizer
    step    microbatches ─► Σ w·CE / W ─► backward ─► one global gradient norm ─► clip ─► AdamW

The loss and its gradients are those of one process on the same samples: W comes from the plan, and the sum over
ranks and microbatches is the only reduction.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from evovlm.data.batch import MicroBatch
from evovlm.engine.losses import Targets, weighted_cross_entropy
from evovlm.engine.optimizer import build_optimizer, clip_factor, scale_gradients, set_lr
from evovlm.engine.recompute import Recompute, apply_recompute
from evovlm.engine.settings import DTYPES, OptimSettings, Precision
from evovlm.models.sharding import CHECKPOINTED_BLOCKS, SHARDING_UNITS, module_of
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.sharded_data import accumulate, shard_model
from evovlm.parallel.world import World

NamedTensors = Iterable[tuple[str, Tensor]]


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


class Engine:
    """A sharded model with its optimizer. Use :meth:`build`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: ParallelPlan, world: World) -> None:
        self.model = model
        self.optimizer = optimizer
        self.plan = plan
        self.world = world
        self.layouts = {"vit": plan.vit, "projector": plan.projector, "llm": plan.llm}
        self.max_norm = 0.0

    @classmethod
    def build(
        cls,
        make_model: Callable[[], nn.Module],
        plan: ParallelPlan,
        world: World,
        *,
        optim: OptimSettings,
        weights: NamedTensors,
        precision: Precision = "float32",
        recompute: Mapping[str, Recompute] | None = None,
        freeze: Sequence[str] = (),
        min_unit: int = 0,
    ) -> "Engine":
        """Build a model straight into its sharded form: no rank ever holds it whole.

        Args:
            make_model: Constructor, called on the meta device.
            plan: Layouts of the modules.
            world: The ranks of the run.
            optim: Optimizer settings.
            weights: Every parameter, by name, in any order; consumed as a stream, the same on each rank.
            precision: ``float32``, ``bfloat16`` (float32 master weights) or ``float64``.
            recompute: Module → activation checkpointing.
            freeze: Modules that are not trained.
            min_unit: Sharding units of fewer parameters join the one around them (see ``shard_model``).

        Raises:
            ValueError: A weight is missing, unknown or of another shape; a frozen module does not exist.
        """
        dtypes = DTYPES[precision]
        with torch.device("meta"):
            model = make_model().to(dtypes.master)
        for module in freeze:
            named = [p for name, p in model.named_parameters() if module_of(name) == module]
            if not named:
                raise ValueError(f"[model] freeze: there is no module {module!r}; there are vit, projector and llm")
            for parameter in named:
                parameter.requires_grad_(False)
        apply_recompute(model, CHECKPOINTED_BLOCKS, recompute or {})
        layouts = {"vit": plan.vit, "projector": plan.projector, "llm": plan.llm}
        compute = None if dtypes.compute == dtypes.master else dtypes.compute
        shard_model(
            model, SHARDING_UNITS, layouts, device_type=world.device.type, compute_dtype=compute, min_unit=min_unit
        )
        model.to_empty(device=world.device)
        tie_weights(model)
        load_weights(model, weights)
        engine = cls(model, build_optimizer(dict(model.named_parameters()), optim), plan, world)
        engine.max_norm = optim.clip_norm
        return engine

    def train_step(self, batches: Sequence[MicroBatch], loss_denominator: float, lr_factor: float = 1.0) -> StepResult:
        """Run one optimizer step over this rank's microbatches.

        Args:
            batches: This rank's microbatches; every rank has the same number.
            loss_denominator: W, from the step plan.
            lr_factor: Factor on every group's base learning rate.

        Raises:
            ValueError: W is not positive: no sample of the step has a target.
            FloatingPointError: Loss or gradient norm is not finite; the weights are untouched.
        """
        if loss_denominator <= 0:
            raise ValueError(f"the step's loss weights add up to {loss_denominator}: none of its samples has a target")
        if loss_denominator <= 0:
            raise ValueError("the step has no supervised token: its loss is 0 / 0; give it samples with answers")
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            accumulate(self.model, SHARDING_UNITS, self.layouts, last=number == len(batches) - 1)
            loss = self._weighted_loss(batch)
            # fully_shard averages gradients over the ranks; the loss is a sum over them.
            torch.autograd.backward(loss * (self.world.size / loss_denominator))
            total += loss.detach().double()
        dist.all_reduce(total)
        norm = self.gradient_norm()
        loss_value = total.item() / loss_denominator
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"loss {loss_value}, gradient norm {norm}: not finite; the step was not applied. "
                "Lower the learning rate, or look for a damaged sample in this step's plan"
            )
        factor = clip_factor(norm, self.max_norm)
        scale_gradients([local(p.grad) for p in self.model.parameters() if p.grad is not None], factor)
        set_lr(self.optimizer, lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss=loss_value, grad_norm=norm, clipped=factor < 1.0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> tuple[float, float]:
        """Sum weighted loss and weights over batches and ranks; their quotient is the validation loss."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        weight = torch.zeros_like(loss)
        for step in batches:
            for batch in step:
                loss += self._weighted_loss(batch).double()
                weight += batch.weights.double().sum()
        # Without a backward, units under ZeRO 1 and 2 would keep showing gathered weights in the compute dtype.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        both = torch.stack((loss, weight))
        dist.all_reduce(both)
        return float(both[0]), float(both[1])

    def _weighted_loss(self, batch: MicroBatch) -> Tensor:
        targets = Targets.of(batch.labels, batch.weights, self.world.device)
        batch = batch.to(self.world.device)
        result: Tensor = self.model(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            batch.tiles,
            batch.visual_rows,
            batch.tile_keys,
            head=lambda hidden, weight: weighted_cross_entropy(hidden, weight, targets),
        )
        return result

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Compute the 2-norm of the gradient over all parameters, whatever mesh each is sharded on.

        Squares are added in float64: per mesh over its shards, then over meshes. Copies on replicas count once.
        """
        squares: dict[Any, Tensor] = {}
        for parameter in self.model.parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            square = local(gradient).double().square().sum()
            squares[mesh] = squares[mesh] + square if mesh in squares else square
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for mesh, square in squares.items():
            if mesh is not None:
                dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
            total += square
        return math.sqrt(total.item())

    def named_full_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yield every parameter whole, one at a time, on the CPU. Every rank must consume the stream."""
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach()
            yield name, (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()


def tie_weights(model: nn.Module) -> None:
    """Share parameters again that ``to_empty`` has parted: every submodule that can tie its weights does."""
    for module in model.modules():
        tie = getattr(module, "tie_weights", None)
        if callable(tie):
            tie()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_weights(model: nn.Module, weights: NamedTensors) -> None:
    """Fill a sharded model from a stream of whole tensors; each rank keeps its shards.

    Raises:
        ValueError: A tensor is unknown to the model, has another shape, or is missing.
    """
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, value in weights:
        if name not in parameters:
            raise ValueError(f"weights hold {name!r}, which the model does not have")
        parameter = parameters[name]
        if parameter.shape != value.shape:
            raise ValueError(f"weight {name!r} has shape {list(value.shape)}, the model {list(parameter.shape)}")
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            # Every rank read the same tensor, so nothing is sent: each keeps its slice.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
        missing.discard(name)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{len(missing)} weights are missing, such as {some}")
