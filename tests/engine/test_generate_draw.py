"""Tokens are drawn with the probabilities that transformers' filters leave, by keys alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.engine.generate_draw import candidates, draw
from evovlm.engine.generation import Sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 4, 30, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
)


def random_logits(seed: int, rows: int, size: int = 40) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SAMPLINGS, st.integers(0, 10_000))
def test_probabilities_are_those_of_transformers(sampling: Sampling, seed: int) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(seed, 3)
    theirs = TemperatureLogitsWarper(sampling.temperature)(None, logits.clone())
    if sampling.top_k:
        theirs = TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = TopPLogitsWarper(sampling.top_p)(None, theirs)
    ids, kept = candidates(logits, sampling)
    ours = kept if ids is None else torch.zeros_like(logits).scatter(1, ids, kept)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), theirs.softmax(1), rtol=1e-9, atol=1e-12)
    assert ids is None or bool((ids.diff(dim=1) > 0).all())


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0), Sampling(0.7, 5), Sampling(1.5, 0, 0.8)])
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    count = 20_000
    logits = random_logits(1, 1, 12).float()
    tokens = draw(logits.expand(count, -1), sampling, [77] * count, range(count))
    ids, kept = candidates(logits, sampling)
    expected = kept if ids is None else torch.zeros(1, 12, dtype=torch.float64).scatter(1, ids, kept)
    expected = (expected / expected.sum())[0].numpy()
    found = np.bincount(tokens, minlength=12) / count
    assert found[expected == 0].sum() == 0
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / count)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SAMPLINGS, st.integers(0, 10_000), st.permutations(range(6)))
def test_a_row_is_drawn_by_its_key_wherever_it_stands(sampling: Sampling, seed: int, order: list[int]) -> None:
    logits, keys, positions = random_logits(seed, 6), [2**64 - 1 - i for i in range(6)], [0, 1, 2, 0, 1, 2]
    tokens = draw(logits, sampling, keys, positions)
    moved = draw(logits[order], sampling, [keys[i] for i in order], [positions[i] for i in order])
    assert moved == [tokens[i] for i in order]
    assert draw(logits[:1], sampling, keys[:1], positions[:1]) == tokens[:1]


def test_greedy_and_one_candidate_take_the_largest() -> None:
    logits = random_logits(0, 50)
    best = logits.argmax(1).tolist()
    assert draw(logits, Sampling(temperature=0), range(50), [0] * 50) == best
    assert draw(logits, Sampling(5.0, 1), range(50), [0] * 50) == best
    assert draw(logits, Sampling(5.0, 0, 1e-9), range(50), [0] * 50) == best
    assert draw(logits, Sampling(5.0, 0), range(50), [0] * 50) != best


def test_draws_differ_by_key_and_position() -> None:
    logits = torch.zeros(64, 1000)
    assert len(set(draw(logits, Sampling(1.0, 0), range(64), [0] * 64))) > 55
    assert len(set(draw(logits, Sampling(1.0, 0), [5] * 64, range(64)))) > 55


def test_the_largest_number_still_draws_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from evovlm.engine import generate_draw

    monkeypatch.setattr(generate_draw, "uniform", lambda keys: np.full(len(keys), 1.0))
    logits = torch.tensor([[0.1, 0.3, 0.2, -800.0], [-800.0, 0.0, -800.0, -800.0]])
    assert draw(logits, Sampling(1.0, 0), [0, 1], [0, 0]) == [2, 1]
    monkeypatch.setattr(generate_draw, "uniform", lambda keys: np.zeros(len(keys)))
    assert draw(logits, Sampling(1.0, 0), [0, 1], [0, 0]) == [0, 1]
