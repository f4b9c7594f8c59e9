"""The steps of a run of a process reward model: cross-entropy, and how well held-out steps are judged.

hidden of rows whose target is "+" or "-" ─► log p("+"), log p("-") ─► which is larger ─► 2 × 2 counts, over all ranks
                                                                        └─► step_accuracy, macro_f1
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.data.step_metrics import f1, macro_f1
from evovlm.engine.engine import Engine
from evovlm.engine.losses import IGNORE, Logits, Targets, chunk_rows_of, chunks_of
from evovlm.engine.objectives import CrossEntropy
from evovlm.engine.steps import Planned, SupervisedSteps, Validation
from evovlm.parallel.mesh import ModuleMesh


class StepJudgements:
    """Cross-entropy of all targets, and how the two signs are told apart; an objective of validation.

    Args:
        signs: Ids of "+" and "-".
        device: Where the loss is computed.

    Attributes:
        cross_entropy: Of all targets.
        counts: Float64 ``[2, 2]``, target by what is likelier, "+" first, over this rank's rows so far, such that a sum
            over all ranks of the run counts each row once.
    """

    def __init__(self, signs: tuple[int, int], device: torch.device) -> None:
        self.cross_entropy = CrossEntropy(1.0, device)
        self.counts = torch.zeros(2, 2, dtype=torch.float64, device=device)
        self._signs = signs

    def targets(self, pack: MicroBatch, mine: Tensor | None, device: torch.device) -> tuple[Targets, Targets]:
        """Pick the rows that have a target, and those whose target is a sign."""
        labels = pack.labels if mine is None else pack.labels[mine]
        decided = torch.isin(labels, torch.tensor(self._signs))
        signs = Targets.of(torch.where(decided, labels, IGNORE), torch.ones(len(labels)), device)
        return self.cross_entropy.targets(pack, mine, device), signs

    def loss(self, hidden: Tensor, head: Tensor, targets: tuple[Targets, Targets], mesh: ModuleMesh) -> Tensor:
        """Return the cross-entropy of a microbatch, and count its judgements."""
        every, signs = targets
        value = self.cross_entropy.loss(hidden, head, every, mesh)
        good, bad = (self._log_probs(hidden, head, signs, sign, mesh) for sign in self._signs)
        if mesh.place.tp == 0:
            cells = 2 * (signs.labels == self._signs[1]) + (good <= bad)
            self.counts += torch.bincount(cells, minlength=4).view(2, 2)
        return value

    def _log_probs(self, hidden: Tensor, head: Tensor, rows: Targets, sign: int, mesh: ModuleMesh) -> Tensor:
        """Return the log-probability of a sign at each row, ``[n]``."""
        asked = Targets(rows.rows, torch.full_like(rows.labels, sign), rows.weights)
        logits = Logits.of(hidden, head, asked, mesh.groups.get("tp"))
        chunks = chunks_of(len(asked.labels), chunk_rows_of(hidden.device))
        losses = [logits.compute(chunk, False)[0] for chunk in chunks]
        return torch.cat([logits.weights.new_empty(0), *losses]).neg_()


class PRMSteps(SupervisedSteps):
    """Training of a process reward model.

    Args:
        engine: What is trained.
        signs: Ids of "+" and "-".
    """

    def __init__(self, engine: Engine, signs: tuple[int, int]) -> None:
        super().__init__(engine)
        self._signs = signs

    def validate(self, steps: Planned) -> Validation:
        """Run over held-out steps. Collective.

        Returns:
            The loss; ``step_accuracy``, the share of signs that are likelier than the other sign where they stand; and
            ``macro_f1``, the mean F1 of those signs that occur or are given. Both are NaN without any sign.
        """
        objective = StepJudgements(self._signs, self._engine.world.device)
        tokens = 0
        for plan, batch in steps:
            tokens += plan.num_supervised
            self._engine.forward(batch, objective)
        sums = torch.cat((objective.cross_entropy.sums, objective.counts.flatten()))
        dist.all_reduce(sums)
        loss, weight, *counts = sums.tolist()
        return Validation(loss / weight if weight else math.nan, tokens, judgement_metrics(counts))


def judgement_metrics(counts: list[float]) -> dict[str, float]:
    """Turn counts (+ taken for +, + for -, - for +, - for -) into ``step_accuracy`` and ``macro_f1``."""
    good, missed, passed, bad = counts
    total, wrong = sum(counts), missed + passed
    return {
        "step_accuracy": (good + bad) / total if total else math.nan,
        "macro_f1": macro_f1(f1(good, wrong), f1(bad, wrong)),
    }
