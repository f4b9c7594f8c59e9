"""What a rank trains and saves: its local pieces of parameters, their gradients and the optimizer's moments.

    sharded parameter (DTensor) ── shares memory with ──► local parameter ─► AdamW ─► moments
      └─ piece: the box of the whole tensor that this is       └─ named pieces ─► checkpoint, export

The optimizer sees plain local tensors, so it neither knows of meshes nor pays for them. Names and boxes make the state
independent of the layout that it was made under.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from evovlm.engine.optimizer import build_optimizer
from evovlm.engine.parts import Parts
from evovlm.engine.settings import OptimSettings
from evovlm.parallel.pieces import Piece, piece_of

_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class LocalParameter:
    """One parameter as a rank holds it.

    Attributes:
        name: In the whole model.
        sharded: The parameter that ``fully_shard`` manages.
        local: Its local elements, as the optimizer's parameter.
        is_copy: Whether it is another pipeline stage's parameter, held here a second time.
        num_copies: Ranks that hold the same elements, copies of other stages not counted.
    """

    name: str
    sharded: nn.Parameter
    local: nn.Parameter
    is_copy: bool
    num_copies: int

    @property
    def gradient(self) -> Tensor | None:
        """Local elements of the gradient."""
        gradient = self.sharded.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


class LocalState:
    """Local parameters and optimizer of one rank.

    Args:
        parts: The sharded model, allocated and filled.
        optim: Optimizer settings.

    Attributes:
        parameters: Everything held here, frozen or not.
        optimizer: Over the local elements of what is trained.
        shared_names: Parameters that another pipeline stage holds, too.

    Raises:
        ValueError: Every parameter is frozen.
    """

    def __init__(self, parts: Parts, optim: OptimSettings) -> None:
        self.parameters = [_local(name, parameter, copy) for name, parameter, copy in parts.named_parameters()]
        trained = [p for p in self.parameters if p.sharded.requires_grad]
        modules = {p.name: parts.tables.module_of(p.name) for p in trained}
        adam = parts.kernels.settings.adam
        self.optimizer = build_optimizer({p.name: p.local for p in trained}, optim, modules, adam=adam)
        self.shared_names = {name for part in parts for name in part.shared}
        for p in trained:  # made now, so that a checkpoint can be loaded before the first step
            self.optimizer.state[p.local] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.local.device),
                "exp_avg": torch.zeros_like(p.local),
                "exp_avg_sq": torch.zeros_like(p.local),
            }

    def pull_gradients(self) -> list[Tensor]:
        """Hand every local parameter its gradient; returns the gradients."""
        gradients = []
        for p in self.parameters:
            p.local.grad = p.gradient
            if p.local.grad is not None:
                gradients.append(p.local.grad)
        return gradients

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.local.grad = p.sharded.grad = None

    @torch.no_grad()
    def gradient_norm(self, device: torch.device) -> float:
        """Compute the 2-norm of the gradient over all modules, whatever mesh each is on. Collective.

        Squares count by one over the number of ranks that hold the same elements.
        """
        total = torch.zeros((), dtype=torch.float64, device=device)
        for p in self.parameters:
            gradient = p.gradient
            if gradient is not None and not p.is_copy:
                total += sum_squares(gradient) / p.num_copies
        dist.all_reduce(total)
        return math.sqrt(total.item())

    def pieces(self) -> dict[str, Piece]:
        """All state by name: ``model.<name>`` and, where trained, ``optimizer.<name>.<moment>``; shares memory."""
        state: dict[str, Piece] = {}
        for p in self.parameters:
            piece = piece_of(p.sharded)
            state[f"model.{p.name}"] = piece
            for moment, value in self.optimizer.state.get(p.local, {}).items():
                scalar = Piece((), (), value)
                whole = Piece(piece.shape, piece.offset, value.view(piece.local.shape)) if value.ndim else scalar
                state[f"optimizer.{p.name}.{moment}"] = whole
        return state


def sum_squares(x: Tensor) -> Tensor:
    """Σ x² of a float32 or float64 tensor as a float64 scalar, without a copy in float64.

    Norms of 4,096 elements each are taken in the dtype of ``x``, and their squares are added in float64.
    """
    flat = x.reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    total: Tensor = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()
    if whole:
        total = total + torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1).double().square().sum()
    return total


def _local(name: str, parameter: nn.Parameter, is_copy: bool) -> LocalParameter:
    copies = 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            copies *= mesh.size(dim) if placement.is_replicate() else 1
    local = nn.Parameter(piece_of(parameter).local, requires_grad=parameter.requires_grad)
    return LocalParameter(name, parameter, local, is_copy, copies)
