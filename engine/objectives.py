"""What a step minimises: an objective turns the last hidden states of each microbatch into a loss with a gradient.

    Language ─ microbatch by microbatch, on ranks of the last stage ─► objective.loss(hidden, head) ─► backward
                                                                         └─ counts what the engine reports

One object serves one step. ``CrossEntropy`` is here, the loss of preference pairs in ``preference.py``.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.engine.losses import Targets, weighted_cross_entropy
from evovlm.parallel.mesh import ModuleMesh


class Objective(Protocol):
    """A loss of a step."""

    def targets(self, pack: MicroBatch, mine: Tensor | None, device: torch.device) -> Any:
        """Make on the host, and move, what :meth:`loss` needs of a pack.

        Args:
            pack: A microbatch, whole.
            mine: int64 ``[t]``, this rank's rows of it; None: all.
            device: Where the loss is computed.
        """
        ...

    def loss(self, hidden: Tensor, head: Tensor, targets: Any, mesh: ModuleMesh) -> Tensor:
        """Return a scalar whose gradient is that of the step's loss. Collective over the ranks of the last stage.

        Args:
            hidden: ``[t/tp, H]``, last hidden states of this rank's rows.
            head: ``[V, H]``, weight of the output head; under tp a DTensor split by rows.
            targets: What :meth:`targets` made of the microbatch.
            mesh: The LLM's mesh.
        """
        ...


class CrossEntropy:
    """Σ w·CE / W over all rows that have a target.

    Args:
        denominator: W, of the whole step.
        device: Where the loss is computed.

    Attributes:
        sums: Float64 ``[2]``: Σ w·CE and Σ w over this rank's rows so far, such that a sum over all ranks of the run
            counts each row once.
    """

    def __init__(self, denominator: float, device: torch.device) -> None:
        self._scale = 1.0 / denominator
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def targets(self, pack: MicroBatch, mine: Tensor | None, device: torch.device) -> Targets:
        """Pick the rows that have a target."""
        labels, weights = (part if mine is None else part[mine] for part in (pack.labels, pack.weights))
        return Targets.of(labels, weights, device)

    def loss(self, hidden: Tensor, head: Tensor, targets: Targets, mesh: ModuleMesh) -> Tensor:
        """Return Σ w·CE / W of a microbatch; every tp rank has the same."""
        total = weighted_cross_entropy(hidden, head, targets, group=mesh.groups.get("tp"))
        if mesh.place.tp == 0:
            self.sums += torch.stack((total.detach().double(), targets.weights.double().sum()))
        return total * self._scale
