"""Accuracy against n: equal to brute force where all subsets count, never above the oracle; intervals that cover."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.csrc.random import keys, uniform
from evovlm.data.selection import CRITICS, MAX_SUBSETS, sizes
from evovlm.data.selection_table import ORACLE, PASS, Judged, choose, intervals, row, table


@st.composite
def questions(draw: st.DrawFn, most: int = 9) -> Judged:
    num = draw(st.integers(1, most))
    answers = draw(st.lists(st.integers(-1, 3), min_size=num, max_size=num))
    right = draw(st.integers(0, 3))
    rewards = st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, float("nan")]), min_size=num, max_size=num)
    correct = np.array([answer == right for answer in answers])
    by_critic = {critic: np.array(draw(rewards)) for critic in ("prm", "orm")}
    return Judged(f"q/{draw(st.integers(1, 9))}", correct, np.array(answers), by_critic)


def drawn(num: int) -> Judged:
    """A question of many candidates, 40 % of them right, with rewards that know a little."""
    noise = uniform(keys("drawn", np.arange(num), np.arange(3)[:, None]))
    correct = noise[0] < 0.4
    answers = np.where(correct, 0, 1 + (noise[1] * 3).astype(np.int64))
    return Judged("many/1", correct, answers, {"prm": noise[2] + 0.3 * correct})


@given(questions(), st.integers(0, 3))
@settings(derandomize=True, max_examples=60)
def test_rows_against_every_subset(judged: Judged, seed: int) -> None:
    num = len(judged.correct)
    found = row(judged, sizes(num), CRITICS, seed=seed)
    for place, size in enumerate(sizes(num)):
        every = [np.array([subset]) for subset in combinations(range(num), size)]
        for column, critic in enumerate(CRITICS, start=1):
            right = [judged.correct[choose(critic, judged, subset, seed=seed)[0]] for subset in every]
            assert found[place, column] == pytest.approx(np.mean(right))
        assert found[place, 0] == pytest.approx(judged.correct.mean())
        assert found[place, -1] == pytest.approx(np.mean([judged.correct[subset].any() for subset in every]))


@given(questions(most=40), st.integers(0, 3))
@settings(derandomize=True, max_examples=60)
def test_the_oracle_is_above_all_and_one_candidate_is_one(judged: Judged, seed: int) -> None:
    num = len(judged.correct)
    found = row(judged, sizes(num), CRITICS, seed=seed)
    assert (found[:, 1:] <= found[:, -1:]).all()
    assert found[0] == pytest.approx(np.full(len(CRITICS) + 2, judged.correct.mean()))
    if all(comb(num, size) <= MAX_SUBSETS for size in sizes(num)):
        assert (np.diff(found[:, -1]) >= -1e-12).all()
    assert set(found[-1, 1:]) <= {0.0, 1.0}


def test_drawn_subsets_give_the_accuracy_of_all() -> None:
    judged = drawn(24)
    (found,) = row(judged, [4], ["prm", "majority"], seed=0)
    every = np.array(list(combinations(range(24), 4)))
    for place, critic in ((1, "prm"), (2, "majority")):
        chosen = choose("prm" if critic == "prm" else "majority", judged, every, seed=0)
        exact = judged.correct[chosen].mean()
        assert 0.3 < exact < 0.9
        assert found[place] == pytest.approx(exact, abs=5 * (0.25 / 512) ** 0.5)


def test_a_question_with_fewer_candidates_gives_all_of_them() -> None:
    judged = Judged("q/1", np.array([False, True]), np.array([0, 1]), {"prm": np.array([0.1, 0.2])})
    found = row(judged, [1, 2, 4], ["prm", "majority"], seed=0)
    assert found.tolist() == [[0.5, 0.5, 0.5, 0.5], [0.5, 1, 0, 1], [0.5, 1, 0, 1]]


def test_rewards_that_are_not_there() -> None:
    judged = Judged("q/1", np.array([True]), np.array([0]), {})
    with pytest.raises(KeyError, match="orm"):
        row(judged, [1], ["orm"], seed=0)


def test_the_table() -> None:
    rows = np.array([[[0.5, 1.0, 0.5, 1.0]], [[0.5, 1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]])
    found = table(rows, [8], ["prm", "random"], seed=3)
    assert list(found) == ["8"]
    assert list(found["8"]) == [PASS, "prm", "random", ORACLE]
    assert found["8"]["prm"]["mean"] == 0.75
    assert found["8"]["prm"]["gain"]["mean"] == 0.25
    assert found["8"]["random"]["gain"]["mean"] == -0.125
    for cell in found["8"].values():
        assert 0 <= cell["low"] <= cell["mean"] <= cell["high"] <= 1
    assert found == table(rows, [8], ["prm", "random"], seed=3)


def test_intervals_of_many_questions_are_those_of_the_normal_law() -> None:
    right = (uniform(keys("right", np.arange(900))) < 0.7).astype(np.float64)
    untied = right[:, None] + 1e-3 * uniform(keys("left", np.arange(900)))[:, None]
    ((low, high),) = np.stack(intervals(right[:, None], seed=0), axis=-1)
    half = 1.96 * right.std() / 30
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.1 * half)
    assert intervals(untied, seed=0)[0] != intervals(untied, seed=1)[0]


def test_intervals_draw_the_same_questions_for_every_column() -> None:
    values = uniform(keys("values", np.arange(50)))
    low, high = intervals(np.stack([values, values, 1 - values, values * 0 + 0.25], axis=1), seed=1)
    assert low[0] == low[1]
    assert low[2] == pytest.approx(1 - high[0])
    assert (low[3], high[3]) == (0.25, 0.25)


def test_intervals_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = uniform(keys("values", np.arange(50), np.arange(2)[:, None])).T
    whole = intervals(values, seed=1)
    monkeypatch.setattr("evovlm.data.selection_table._DRAWN_AT_ONCE", 170)
    assert np.allclose(intervals(values, seed=1), whole, rtol=0, atol=1e-15)
