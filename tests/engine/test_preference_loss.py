"""The MPO loss against hand-computed numbers, autograd, and a re-statement of δ over many steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.data.branches import Pairs
from evovlm.engine.equality_pairs import plain_preference_loss
from evovlm.engine.losses import Targets
from evovlm.engine.pair_log_probs import PairTargets, pair_log_probs
from evovlm.engine.preference_loss import (
    PreferenceLossSettings,
    RewardShift,
    log_prob_gradients,
    preference_terms,
    rewards,
)

MPO = PreferenceLossSettings()
numbers = st.floats(-80, 0, allow_nan=False)


def pairs_of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_computed() -> None:
    policy, reference = pairs_of([[-10, -30], [-20, -15]]), pairs_of([[-12, -25], [-20, -20]])
    terms = preference_terms(policy, reference, 0.05, 10, MPO)
    # Rewards 0.1 · ((2, −5), (0, 5)).
    torch.testing.assert_close(terms.rewards, pairs_of([[0.2, -0.5], [0.0, 0.5]]))

    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x))

    dpo = (minus_log_sigmoid(0.7) + minus_log_sigmoid(-0.5)) / 2
    bco = sum(map(minus_log_sigmoid, (0.2 - 0.05, 0.05 + 0.5, 0.0 - 0.05, 0.05 - 0.5))) / 2
    assert terms.dpo == pytest.approx(dpo, rel=1e-14)
    assert terms.bco == pytest.approx(bco, rel=1e-14)
    assert terms.nll == pytest.approx(3.0)
    assert terms.loss == pytest.approx(0.8 * dpo + 0.2 * bco + 3.0)
    metrics = terms.metrics(policy, 0.05)
    assert metrics == pytest.approx(
        {
            "dpo_loss": dpo,
            "bco_loss": bco,
            "nll_loss": 3.0,
            "rewards/chosen": 0.1,
            "rewards/rejected": 0.0,
            "rewards/margins": 0.1,
            "rewards/accuracies": 0.5,
            "logps/chosen": -15.0,
            "logps/rejected": -22.5,
            "reward_shift": 0.05,
        }
    )


def test_first_step() -> None:
    same = pairs_of([[-10, -30], [-20, -15], [-3, -7]])
    terms = preference_terms(same, same, 0.0, 11, MPO)
    assert (round(terms.dpo, 4), round(terms.bco, 4)) == (0.6931, 1.3863)
    assert terms.loss - terms.nll == pytest.approx(0.8318, abs=5e-5)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(-3, 3),
    st.integers(1, 99),
    st.tuples(st.floats(0.01, 2), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 2)),
)
def test_gradients_and_value_equal_autograd(
    values: list[list[float]], shift: float, num_chosen: int, weights: tuple[float, float, float, float]
) -> None:
    beta, dpo, bco, nll = weights
    chosen = PreferenceLossSettings(beta=beta, dpo_weight=dpo, bco_weight=bco, nll_weight=nll)
    policy, reference = pairs_of(values)[:, :2].requires_grad_(), pairs_of(values)[:, 2:]
    loss = plain_preference_loss(policy, reference, shift, num_chosen, chosen)
    torch.autograd.backward(loss)
    ours = preference_terms(policy.detach(), reference, shift, num_chosen, chosen)
    if math.isfinite(loss.item()):  # the plain form overflows where rewards are some hundreds
        assert ours.loss == pytest.approx(loss.item(), rel=1e-10)
    gradients = log_prob_gradients(policy.detach(), reference, shift, len(values), num_chosen, chosen)
    assert gradients.isfinite().all()
    if policy.grad is not None and policy.grad.isfinite().all():
        torch.testing.assert_close(gradients, policy.grad, rtol=1e-9, atol=1e-12)


def test_extreme_rewards_stay_finite() -> None:
    policy, reference = pairs_of([[0, -1e6], [-1e6, 0]]), pairs_of([[-1e6, 0], [0, -1e6]])
    terms = preference_terms(policy, reference, 0.0, 5, MPO)
    assert math.isfinite(terms.loss)
    assert log_prob_gradients(policy, reference, 0.0, 2, 5, MPO).isfinite().all()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), min_size=1, max_size=8))
def test_delta_is_the_mean_of_all_rewards_so_far(steps: list[list[tuple[float, float]]]) -> None:
    shift, seen = RewardShift(), list[float]()
    assert shift.value == 0.0
    for step in steps:
        seen += [reward for pair in step for reward in pair]
        assert shift.update(torch.tensor(step, dtype=torch.float64)) == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    state = shift.state()
    assert RewardShift(**state).value == shift.value  # type: ignore[arg-type]
    assert state["count"] == sum(map(len, steps))


def test_delta_counts_every_pair_once_however_they_are_shared_out() -> None:
    """Means of ranks, equally weighted as upstream pools them, would differ where ranks have unequal numbers."""
    values = pairs_of([[0.3, -0.2], [1.5, 0.7], [-0.4, 0.1]])
    together, apart = RewardShift(), RewardShift()
    together.update(values)
    apart.update(values[[2, 0, 1]])
    assert together.value == apart.value == pytest.approx(values.mean().item())
    by_ranks = (values[:1].mean() + values[1:].mean()) / 2
    assert abs(by_ranks.item() - together.value) > 0.05


@pytest.mark.parametrize(("pairs", "tokens"), [(0, 3), (2, 0)])
def test_nothing_to_learn_is_an_error(pairs: int, tokens: int) -> None:
    policy = torch.zeros(pairs, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{pairs} preference pairs and {tokens} chosen tokens"):
        preference_terms(policy, policy, 0.0, tokens, MPO)


H, V, T = 8, 23, 19


def small_pack() -> tuple[Tensor, Pairs]:
    """Labels and pairs of 19 rows: two pairs, the first with two shared targets."""
    chosen, rejected = torch.full((2, T), -1)
    chosen[2:7], chosen[11:13] = 0, 1
    rejected[2:4], rejected[7:9], rejected[13:18] = 0, 0, 1
    labels = torch.where((chosen >= 0) | (rejected >= 0), torch.arange(T) % V, -100)
    return labels, Pairs(torch.tensor([5, 9]), torch.tensor([0, 1]), chosen, rejected)


@pytest.mark.parametrize("held_bytes", [0, 8 * V * 6, 2**20])
@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probs_and_gradients_of_a_pack(held_bytes: int, chunk_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
    labels, pairs = small_pack()
    targets = PairTargets.of(labels, pairs, None, torch.device("cpu"))
    reference = torch.randn(2, 2, generator=generator, dtype=torch.float64) - 20

    def gradients(log_probs: Tensor) -> Tensor:
        return log_prob_gradients(log_probs, reference, 0.1, 5, 40, MPO)

    value, log_probs = pair_log_probs(hidden, head, targets, gradients, chunk_rows=chunk_rows, held_bytes=held_bytes)
    assert value.item() == 0
    torch.autograd.backward(value)
    ours = hidden.grad, head.grad
    hidden.grad = head.grad = None

    rows = (hidden.double() @ head.double().T).log_softmax(-1)[torch.arange(T), labels.clamp(min=0)]
    sums = torch.stack([torch.stack([rows[of == n].sum() for of in (pairs.chosen, pairs.rejected)]) for n in range(2)])
    bound = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(log_probs, sums.detach(), rtol=bound["rtol"], atol=1e-5 if dtype != torch.float64 else 0)
    # Means over 5 pairs and 40 tokens of a step of which this pack has 2 and 7.
    r = MPO.beta * (sums - reference)
    dpo = -torch.nn.functional.logsigmoid(r[:, 0] - r[:, 1]).sum() / 5
    bco = -(torch.nn.functional.logsigmoid(r[:, 0] - 0.1) + torch.nn.functional.logsigmoid(0.1 - r[:, 1])).sum() / 5
    torch.autograd.backward(0.8 * dpo + 0.2 * bco - sums[:, 0].sum() / 40)
    for mine, theirs in zip(ours, (hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(mine, theirs, **bound)


def test_a_pack_without_pairs() -> None:
    nowhere = torch.full((T,), -1)
    none = torch.empty(0, dtype=torch.int64)
    targets = PairTargets.of(torch.full((T,), -100), Pairs(none, none, nowhere, nowhere), None, torch.device("cpu"))
    hidden = torch.ones(T, H, requires_grad=True)
    head = torch.ones(V, H, requires_grad=True)
    value, log_probs = pair_log_probs(hidden, head, targets, lambda x: x)
    assert log_probs.shape == (0, 2)
    torch.autograd.backward(value)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_scoring_makes_no_gradient() -> None:
    labels, pairs = small_pack()
    targets = PairTargets.of(labels, pairs, None, torch.device("cpu"))
    assert isinstance(targets.targets, Targets)

    def gradients(_: Tensor) -> Tensor:
        raise AssertionError("nobody asked")

    with torch.no_grad():
        hidden, head = torch.ones(T, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
        value, log_probs = pair_log_probs(hidden, head, targets, gradients)
    assert not value.requires_grad
    torch.testing.assert_close(log_probs[1], torch.tensor([2.0, 5.0], dtype=torch.float64) * -math.log(V))


def test_the_gradient_is_asked_for_even_where_nothing_needs_it() -> None:
    """It may be a collective, which no rank may leave out because its own pack has nothing to train."""
    labels, pairs = small_pack()
    targets, asked = PairTargets.of(labels, pairs, None, torch.device("cpu")), list[Tensor]()

    def gradients(log_probs: Tensor) -> Tensor:
        asked.append(log_probs)
        return torch.zeros_like(log_probs)

    value, log_probs = pair_log_probs(torch.ones(T, H), torch.ones(V, H), targets, gradients)
    assert not value.requires_grad
    assert len(asked) == 1
    assert torch.equal(asked[0], log_probs)


def test_rewards() -> None:
    policy = pairs_of([[-1, -2]])
    assert rewards(policy, policy - 3, 0.5).tolist() == [[1.5, 1.5]]
