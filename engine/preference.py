"""One step of mixed preference optimisation: the loss of preference pairs under any layout (spec §4.2).

    reference log π_ref [N, 2] ─────────────────────────────────────┐
    pairs of my packs ─► LLM ─► log π of each pair ─► ∂L/∂log π ◄────┴── δ, N, chosen tokens: of the whole step
                                  │                      └─► gradients of rows, head, and all below
                                  └─ summed over ranks: every rank knows [N, 2] and reports the same loss

What a pair's answers weigh in the gradient depends on the other pairs only by δ. If δ is to take in the step's own
pairs, all of them must be scored first: by another forward pass where a rank sees its pairs one microbatch after
another, otherwise (one microbatch, no pipeline) in the loss itself, at no cost.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine, StepResult
from evovlm.engine.pair_log_probs import PairTargets, pair_log_probs
from evovlm.engine.preference_loss import (
    PreferenceLossSettings,
    PreferenceTerms,
    RewardShift,
    log_prob_gradients,
    preference_terms,
    rewards,
)
from evovlm.engine.sharded_model import ShardedModel
from evovlm.engine.vision import VisualTokens
from evovlm.parallel.mesh import ModuleMesh

PairGradients = Callable[[Tensor, Tensor], Tensor]
"""``(numbers int64 [m], log π of these pairs of the step, float64 [m, 2]) -> ∂L/∂log π, float64 [m, 2]``."""


@dataclass(frozen=True)
class _PackTargets:
    """A microbatch's rows with a target, and the numbers of its pairs in the step, int64 ``[pairs]``."""

    rows: PairTargets
    numbers: Tensor


class PairObjective:
    """Log-probabilities of a step's pairs and, with ``gradients``, a loss of them.

    Args:
        num_pairs: N, pairs of the step.
        device: Where the loss is computed.
        gradients: Of the loss; None: only log-probabilities are wanted.

    Attributes:
        log_probs: Float64 ``[N, 2]``: of the pairs so far, such that a sum over all ranks of the run counts each once.
    """

    def __init__(self, num_pairs: int, device: torch.device, gradients: PairGradients | None = None) -> None:
        self.log_probs = torch.zeros(num_pairs, 2, dtype=torch.float64, device=device)
        self._gradients = gradients

    def targets(self, pack: MicroBatch, mine: Tensor | None, device: torch.device) -> _PackTargets:
        """Pick the rows that have a target.

        Raises:
            ValueError: The microbatch is not made of preference pairs.
        """
        if pack.pairs is None:
            raise ValueError("this pack holds conversations, not preference pairs: index them with --kind preference")
        labels = pack.labels if mine is None else pack.labels[mine]
        return _PackTargets(PairTargets.of(labels, pack.pairs, mine, device), pack.pairs.numbers.to(device))

    def loss(self, hidden: Tensor, head: Tensor, targets: _PackTargets, mesh: ModuleMesh) -> Tensor:
        """Return 0 with the gradient of the loss."""
        counts = mesh.place.tp == mesh.place.cp == mesh.place.hp == 0

        def note(log_probs: Tensor) -> None:
            if counts:
                self.log_probs[targets.numbers] = log_probs

        def gradients(log_probs: Tensor) -> Tensor:
            assert self._gradients is not None  # no gradient is wanted of a scoring pass
            note(log_probs)
            return self._gradients(targets.numbers, log_probs)

        value, log_probs = pair_log_probs(
            hidden,
            head,
            targets.rows,
            gradients,
            group=mesh.groups.get("tp"),
            sequence_groups=[mesh.groups[axis] for axis in ("hp", "cp") if axis in mesh.groups],
        )
        note(log_probs)
        return value


def score_pairs(model: ShardedModel, batch: StepBatch, num_pairs: int, *, drop_path: bool = False) -> Tensor:
    """Sum the log-probabilities of a step's answers. Collective.

    Args:
        model: The model.
        batch: This rank's part of the step.
        num_pairs: N, pairs of the step.
        drop_path: Drop the paths that training on the same batch drops.

    Returns:
        Float64 ``[N, 2]``, of chosen and rejected, on every rank.
    """
    objective = PairObjective(num_pairs, model.world.device)
    model.forward(batch, objective, drop_path=drop_path)
    dist.all_reduce(objective.log_probs)
    return objective.log_probs


@dataclass(frozen=True)
class PreferenceResult:
    """What one step did.

    Attributes:
        step: Loss, gradient norm, and whether it was clipped.
        metrics: Losses, rewards and log-probabilities, means over all pairs of the step.
    """

    step: StepResult
    metrics: dict[str, float]


class PreferenceTraining:
    """Trains an engine on preference pairs.

    Args:
        engine: The policy.
        settings: The loss.

    Attributes:
        shift: δ over all pairs so far; part of a checkpoint.
    """

    def __init__(self, engine: Engine, settings: PreferenceLossSettings) -> None:
        self.engine, self.settings, self.shift = engine, settings, RewardShift()

    def train_step(
        self, batch: StepBatch, reference: Tensor, num_chosen: int, lr_factor: float = 1.0
    ) -> PreferenceResult:
        """Run one optimizer step. Collective.

        Args:
            batch: This rank's part of the step.
            reference: Float64 ``[N, 2]``, log-probabilities of all pairs of the step under the reference model, in the
                order of their numbers; the same on every rank.
            num_chosen: Tokens of all chosen answers of the step.
            lr_factor: Factor on every group's base learning rate.

        Raises:
            ValueError: The step has no pairs.
            FloatingPointError: Loss or gradient norm is not finite; the weights are untouched.
        """
        terms, metrics = self.backward(batch, reference, num_chosen)
        return PreferenceResult(self.engine.apply(terms.loss, lr_factor), metrics)

    def backward(
        self, batch: StepBatch, reference: Tensor, num_chosen: int
    ) -> tuple[PreferenceTerms, dict[str, float]]:
        """Compute loss and gradients of a step, and take its rewards into δ. Collective.

        Returns:
            The loss terms, and the metrics of :class:`PreferenceResult`.
        """
        device = self.engine.world.device
        step = _Step(self, reference.to(device), num_chosen, len(batch.packs))
        objective = step.objective
        self.engine.accumulate(batch, objective, step.score_first(batch))
        dist.all_reduce(objective.log_probs)
        log_probs = objective.log_probs
        shift = step.finish(log_probs)
        terms = preference_terms(log_probs, step.reference, shift, num_chosen, self.settings)
        return terms, terms.metrics(log_probs, shift, compared=self.settings.needs_reference)

    def evaluate(
        self, log_probs: Tensor, reference: Tensor, num_chosen: int
    ) -> tuple[PreferenceTerms, dict[str, float]]:
        """Loss terms and metrics of pairs that were scored, under the present δ; arguments as in the loss."""
        reference = reference.to(log_probs.device)
        terms = preference_terms(log_probs, reference, self.shift.value, num_chosen, self.settings)
        return terms, terms.metrics(log_probs, self.shift.value, compared=self.settings.needs_reference)


class _Step:
    """δ of one step: when it is known, and by whom.

    Args:
        training: Whose step it is.
        reference: Float64 ``[N, 2]``.
        num_chosen: Tokens of all chosen answers.
        num_microbatches: Packs of each data-parallel rank.
    """

    def __init__(self, training: PreferenceTraining, reference: Tensor, num_chosen: int, num_microbatches: int) -> None:
        self._training, self.reference, self._num_chosen = training, reference, num_chosen
        settings = training.settings
        self._moves = settings.bco_weight > 0 and settings.shift != "none"
        self._waits = self._moves and settings.shift == "current"
        # A rank that sees one microbatch knows all of its pairs in its loss.
        self._at_once = num_microbatches == 1 and "pp" not in training.engine.language.mesh.groups
        self._shift: float | None = None if self._waits else training.shift.value
        self.objective = PairObjective(len(reference), training.engine.world.device, self._gradients)

    def score_first(self, batch: StepBatch) -> Callable[[VisualTokens | None], None] | None:
        """What must run before the LLM trains, if anything."""
        if not self._waits or self._at_once:
            return None

        def score(visual: VisualTokens | None) -> None:
            scores = PairObjective(len(self.reference), self.reference.device)
            self._training.engine.language.evaluate(batch.packs, visual, scores)
            dist.all_reduce(scores.log_probs)
            self._update(scores.log_probs)

        return score

    def _gradients(self, numbers: Tensor, log_probs: Tensor) -> Tensor:
        if self._shift is None:
            everything = self.objective.log_probs.clone()
            dist.all_reduce(everything)
            self._update(everything)
        assert self._shift is not None
        return log_prob_gradients(
            log_probs,
            self.reference[numbers],
            self._shift,
            len(self.reference),
            self._num_chosen,
            self._training.settings,
        )

    def finish(self, log_probs: Tensor) -> float:
        """Take the step's rewards into δ if they are not yet; returns the δ that the step used."""
        used = self._shift
        if self._moves and not self._waits:
            self._update(log_probs)
        assert used is not None
        return used

    def _update(self, log_probs: Tensor) -> None:
        self._shift = self._training.shift.update(rewards(log_probs, self.reference, self._training.settings.beta))
