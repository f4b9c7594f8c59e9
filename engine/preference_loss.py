"""The loss of MPO, mixed preference optimisation, as a pure function of summed log-probabilities (spec §4.2).

    log π of chosen and rejected [n, 2] ─┐
    log π_ref                   [n, 2] ──┴─► rewards r = β·(log π − log π_ref)
                                               ├─► DPO   −log σ(r_c − r_r)                       which one is better
                                               ├─► BCO   −log σ(r_c − δ) − log σ(−(r_r − δ))     how good each is
                                               └─► NLL   −Σ log π of chosen / its tokens         how to write it
    L = w_p · mean DPO + w_q · mean BCO + w_g · NLL, means over all pairs (tokens) of the step

δ is the mean reward of every pair that the run has seen. All of it is float64 on the host's or a device's few numbers,
and computed alike on every rank.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


class PreferenceLossSettings(BaseModel):
    """Weights of the terms; 0 switches a term off. DPO alone: ``bco_weight = nll_weight = 0``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: float = Field(0.1, gt=0, allow_inf_nan=False)
    """β, scale of the rewards."""
    dpo_weight: float = Field(0.8, ge=0, allow_inf_nan=False)
    """w_p, of the preference term."""
    bco_weight: float = Field(0.2, ge=0, allow_inf_nan=False)
    """w_q, of the quality term."""
    nll_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """w_g, of the generation term: cross-entropy of the chosen answers, a mean over their tokens."""
    shift: Literal["current", "previous", "none"] = "current"
    """δ of a step: mean reward up to and with its own pairs, as published; up to the step before, which needs no second
    forward pass where a rank has several microbatches or a pipeline; or always 0."""

    @model_validator(mode="after")
    def _some_term(self) -> "PreferenceLossSettings":
        if self.dpo_weight == self.bco_weight == self.nll_weight == 0:
            raise ValueError("dpo_weight, bco_weight and nll_weight are all 0: there is nothing to train on")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares with the reference model."""
        return self.dpo_weight > 0 or self.bco_weight > 0


class RewardShift:
    """δ: the mean reward of all pairs that were seen, a plain cumulative average.

    Upstream pools one mean per rank and micro-step as if all had as many pairs; here every pair counts once, so δ does
    not depend on the layout.
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count

    @property
    def value(self) -> float:
        """δ; 0 before the first pair."""
        return self.total / self.count if self.count else 0.0

    def update(self, rewards: Tensor) -> float:
        """Take in the rewards ``[n, 2]`` of a step's pairs, all of them on every rank; returns δ."""
        # fsum rounds once: the order of the pairs in the step is of no matter.
        self.total += math.fsum(rewards.mean(1).tolist())
        self.count += len(rewards)
        return self.value

    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps, exactly."""
        return {"total": self.total, "count": self.count}


@dataclass(frozen=True)
class PreferenceTerms:
    """Loss terms of a step; its gradient by each log-probability; what is reported.

    Attributes:
        loss: The weighted sum.
        dpo: Mean preference term over the pairs.
        bco: Mean quality term over the pairs.
        nll: Cross-entropy of the chosen answers over their tokens.
        rewards: Float64 ``[n, 2]``, of chosen and rejected.
    """

    loss: float
    dpo: float
    bco: float
    nll: float
    rewards: Tensor

    def metrics(self, log_probs: Tensor, shift: float, *, compared: bool = True) -> dict[str, float]:
        """Name what a run reports, means over the pairs of the step.

        Args:
            log_probs: Float64 ``[n, 2]``, of the policy.
            shift: δ that the step used.
            compared: Whether there is a reference model; without one there are no rewards.
        """
        log_prob = {
            "nll_loss": self.nll,
            "logps/chosen": log_probs[:, 0].mean().item(),
            "logps/rejected": log_probs[:, 1].mean().item(),
        }
        if not compared:
            return log_prob
        chosen, rejected = self.rewards.mean(0).tolist()
        margins = self.rewards[:, 0] - self.rewards[:, 1]
        return log_prob | {
            "dpo_loss": self.dpo,
            "bco_loss": self.bco,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "reward_shift": shift,
        }


def rewards(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """β·(log π − log π_ref), float64 ``[n, 2]``."""
    return beta * (log_probs - reference)


def preference_terms(
    log_probs: Tensor, reference: Tensor, shift: float, num_chosen: int, settings: PreferenceLossSettings
) -> PreferenceTerms:
    """Compute the loss of a step from all of its pairs.

    Args:
        log_probs: Float64 ``[n, 2]``, log π of the chosen and the rejected answer, summed over their tokens.
        reference: Float64 ``[n, 2]``, log π_ref alike.
        shift: δ.
        num_chosen: Tokens of all chosen answers.
        settings: Weights and β.

    Raises:
        ValueError: There are no pairs, or no tokens.
    """
    _check(len(log_probs), num_chosen)
    r = rewards(log_probs, reference, settings.beta)
    dpo = -F.logsigmoid(r[:, 0] - r[:, 1]).mean().item()
    bco = -(F.logsigmoid(r[:, 0] - shift) + F.logsigmoid(shift - r[:, 1])).mean().item()
    nll = -log_probs[:, 0].sum().item() / num_chosen
    loss = settings.dpo_weight * dpo + settings.bco_weight * bco + settings.nll_weight * nll
    return PreferenceTerms(loss, dpo, bco, nll, r)


def log_prob_gradients(
    log_probs: Tensor,
    reference: Tensor,
    shift: float,
    num_pairs: int,
    num_chosen: int,
    settings: PreferenceLossSettings,
) -> Tensor:
    """Gradient of a step's loss by the log-probabilities of some of its pairs.

    δ is a number here, as upstream: no gradient passes through it.

    Args:
        log_probs: Float64 ``[m, 2]``, of some pairs.
        reference: Float64 ``[m, 2]``.
        shift: δ.
        num_pairs: Pairs of the whole step.
        num_chosen: Tokens of all chosen answers of the step.
        settings: Weights and β.

    Returns:
        Float64 ``[m, 2]``.

    Raises:
        ValueError: There are no pairs, or no tokens.
    """
    _check(num_pairs, num_chosen)
    r = rewards(log_probs, reference, settings.beta)
    preferred = torch.sigmoid(r[:, 1] - r[:, 0]) * (settings.dpo_weight * settings.beta / num_pairs)
    quality = settings.bco_weight * settings.beta / num_pairs
    chosen = -preferred - quality * torch.sigmoid(shift - r[:, 0]) - settings.nll_weight / num_chosen
    rejected = preferred + quality * torch.sigmoid(r[:, 1] - shift)
    return torch.stack((chosen, rejected), dim=1)


def _check(num_pairs: int, num_chosen: int) -> None:
    if num_pairs < 1 or num_chosen < 1:
        raise ValueError(f"a step of {num_pairs} preference pairs and {num_chosen} chosen tokens has no loss")
