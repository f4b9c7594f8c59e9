"""The loss of preference pairs equals TRL's DPO terms on the same log-probabilities: TRL's own code computes them.

    log π of each token (drawn) ─┬─ summed over answers ─► preference_terms, log_prob_gradients
                                 └─ as what a model gives ─► DPOTrainer._compute_loss ─► loss, metrics, gradients

TRL's ``bco_pair`` has no running shift, so δ is 0 here. Its ``sft`` term is a mean over the tokens of one forward pass,
as our NLL is over those of a step.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.engine.preference_loss import PreferenceLossSettings, log_prob_gradients, preference_terms

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL, the oracle, is not installed")

TERMS = {"sigmoid": "dpo_weight", "bco_pair": "bco_weight", "sft": "nll_weight"}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of n pairs: of each token, float64 ``[2n, L]``, chosen first, and where there is a token."""

    tokens: Tensor
    mask: Tensor
    reference: Tensor  # float64 [n, 2]

    @property
    def log_probs(self) -> Tensor:
        """Float64 ``[n, 2]``."""
        return (self.tokens * self.mask).sum(1).view(2, -1).T

    @property
    def num_chosen(self) -> int:
        return int(self.mask[: len(self.reference)].sum())


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    n = draw(st.integers(1, 5))
    lengths = torch.tensor(draw(st.lists(st.integers(1, 12), min_size=2 * n, max_size=2 * n)))
    seed, scale, distance = draw(st.integers(0, 2**31)), draw(st.floats(0.01, 8)), draw(st.floats(0.1, 30))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * scale * mask
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * distance
    return Answers(tokens, mask, tokens.sum(1).view(2, -1).T + shifts)


def trl_loss(pairs: Answers, weights: dict[str, float], beta: float) -> tuple[float, Tensor, dict[str, float]]:
    """Run TRL's loss on a model that answers with given log-probabilities.

    Returns:
        Loss, its gradient by each token's log-probability, and TRL's metrics.
    """
    prompt = 2
    tokens = torch.nn.functional.pad(pairs.tokens, (prompt - 1, 0)).requires_grad_()  # TRL's are already shifted
    completion = torch.nn.functional.pad(pairs.mask.long(), (prompt, 0))
    nothing = torch.zeros_like(tokens)

    def model(**_inputs: Any) -> SimpleNamespace:  # tokens without a label have log-probability 0
        return SimpleNamespace(
            log_probs=tokens * completion[:, 1:], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    trainer: Any = object.__new__(dpo_trainer.DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.loss_types, trainer.loss_weights, trainer.beta = list(weights), list(weights.values()), beta
    trainer.precompute_ref_logps, trainer.f_divergence_type = True, "reverse_kl"
    trainer.ld_alpha, trainer.label_smoothing, trainer.use_weighting, trainer.aux_loss_enabled = None, 0.0, False, False
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": pairs.reference[:, 0],
        "ref_rejected_logps": pairs.reference[:, 1],
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, tokens)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradient[:, prompt - 1 :], metrics


@given(answers(), st.floats(0.01, 2), *(st.floats(0, 2) for _ in TERMS))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_loss_metrics_and_gradients_are_those_of_trl(
    pairs: Answers, beta: float, dpo_weight: float, bco_weight: float, nll_weight: float
) -> None:
    weights = dict(zip(TERMS, (dpo_weight, bco_weight, nll_weight + 0.1), strict=True))
    wanted, gradient, reported = trl_loss(pairs, weights, beta)
    chosen = PreferenceLossSettings(beta=beta, **{TERMS[name]: weight for name, weight in weights.items()})
    terms = preference_terms(pairs.log_probs, pairs.reference, 0.0, pairs.num_chosen, chosen)
    assert terms.loss == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    metrics = terms.metrics(pairs.log_probs, 0.0)
    # TRL averages accuracies in float32.
    assert metrics["rewards/accuracies"] == pytest.approx(reported["rewards/accuracies"], rel=1e-6)
    for name in METRICS:
        assert metrics[name] == pytest.approx(reported[name], rel=1e-10, abs=1e-12)
    ours = log_prob_gradients(
        pairs.log_probs, pairs.reference, 0.0, len(pairs.reference), pairs.num_chosen, chosen
    ).T.flatten()
    torch.testing.assert_close(ours[:, None] * pairs.mask, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", TERMS)
@given(pairs=answers())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_each_term_alone_is_that_of_trl(name: str, pairs: Answers) -> None:
    wanted, _, _ = trl_loss(pairs, {name: 1.0}, 0.1)
    alone = PreferenceLossSettings(**{weight: float(weight == TERMS[name]) for weight in TERMS.values()})
    terms = preference_terms(pairs.log_probs, pairs.reference, 0.0, pairs.num_chosen, alone)
    assert terms.loss == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert {"sigmoid": terms.dpo, "bco_pair": terms.bco, "sft": terms.nll}[name] == terms.loss


def test_the_first_step_of_mpo_is_the_published_constant() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tokens = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, 0.0]], dtype=torch.float64)
    pairs = Answers(tokens, mask, torch.tensor([[-3.5, -1.0]], dtype=torch.float64))
    wanted, _, _ = trl_loss(pairs, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.1)
    assert wanted == pytest.approx(0.8 * 0.693147 + 0.2 * 1.386294 + 3.5 / 3, rel=1e-6)
    assert preference_terms(pairs.log_probs, pairs.reference, 0.0, 3, PreferenceLossSettings()).loss == pytest.approx(
        wanted, rel=1e-12
    )
