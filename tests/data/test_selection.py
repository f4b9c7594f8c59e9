"""How critics choose: hand-made cases, and what holds for any rewards, answers and subsets."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.data.answers.rules import open_scorers
from evovlm.data.selection import (
    MAX_SUBSETS,
    critics_named,
    equality,
    highest,
    most_frequent,
    random_rewards,
    same_answers,
    sizes,
    subsets,
)

ANSWERS = st.lists(st.one_of(st.none(), st.sampled_from(["1", "2", "3", "cat", "Cat."])), min_size=1, max_size=9)
REWARDS = st.lists(st.one_of(st.just(float("nan")), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=9)


def everything(num: int) -> NDArray[np.int64]:
    return np.arange(num)[None]


def numbered(answers: list[str | None], rule: str = "exact") -> list[int]:
    with open_scorers([rule]) as scorers:
        return list(same_answers(answers, equality(rule, scorers[rule])))


@pytest.mark.parametrize(
    ("num", "wanted"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_sizes_of_the_table(num: int, wanted: list[int]) -> None:
    assert sizes(num) == wanted


def test_names_and_sizes_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="best of 0"):
        sizes(0)
    with pytest.raises(ValueError, match="no subset of 3 of 2 candidates"):
        subsets("q", 2, 3, seed=0)
    assert critics_named(["prm", "random"]) == ("prm", "random")
    for names in (["prm", "oracle"], ["prm", "prm"]):
        with pytest.raises(ValueError, match="name each of prm, orm, majority, prm-majority, random once at most"):
            critics_named(names)


@settings(derandomize=True)
@given(st.integers(1, 40), st.data())
def test_subsets(num: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num))
    found = subsets("q/1", num, size, seed=7)
    assert found.shape == (min(comb(num, size), MAX_SUBSETS), size)
    assert (np.diff(found, axis=1) > 0).all()
    assert found.min() >= 0
    assert found.max() < num
    if comb(num, size) <= MAX_SUBSETS:
        assert {tuple(row) for row in found.tolist()} == set(combinations(range(num), size))


def test_drawn_subsets_are_keyed_and_take_every_candidate_alike() -> None:
    found = subsets("q/1", 32, 8, seed=7)
    assert np.array_equal(found, subsets("q/1", 32, 8, seed=7))
    assert not np.array_equal(found, subsets("q/2", 32, 8, seed=7))
    assert not np.array_equal(found, subsets("q/1", 32, 8, seed=8))
    within = subsets("q/1", 32, 16, seed=7)
    assert all(set(small) < set(large) for small, large in zip(found.tolist(), within.tolist(), strict=True))
    share = np.bincount(found.ravel(), minlength=32) / MAX_SUBSETS
    assert abs(share - 8 / 32).max() < 5 * (0.25 * 0.75 / MAX_SUBSETS) ** 0.5


def test_the_highest_reward_wins_and_the_first_of_equal_ones() -> None:
    rewards = np.array([0.2, np.nan, 0.9, 0.9, 0.0])
    among = np.array([[0, 1, 2, 3, 4], [0, 1, 3, 4, 4], [1, 1, 1, 1, 4], [1, 1, 1, 1, 1]])
    assert highest(rewards, among).tolist() == [2, 3, 4, 1]
    assert highest(np.full(3, np.nan), everything(3)).tolist() == [0]


def test_the_most_frequent_answer_wins_and_the_first_of_equal_ones() -> None:
    answers = np.array([-1, 0, 1, 1, -1, 0])
    among = np.array([[0, 1, 2, 3], [0, 1, 2, 4], [1, 2, 3, 5], [2, 3, 4, 5]])
    # In the third subset 0 and 1 have two votes each: 0 came first.
    assert most_frequent(answers, among).tolist() == [2, 1, 1, 2]
    assert most_frequent(np.array([-1, -1]), everything(2)).tolist() == [0]


def test_votes_that_are_weighted_by_rewards() -> None:
    answers, rewards = np.array([0, 0, 1, -1, 2]), np.array([0.3, 0.3, 0.5, 1.0, np.nan])
    assert most_frequent(answers, everything(5), rewards).tolist() == [0]
    assert most_frequent(answers, np.array([[1, 2, 3, 4], [0, 3, 4, 4]]), rewards).tolist() == [2, 0]
    # Without any weight an answer is still better than none.
    assert most_frequent(answers, np.array([[3, 4]]), rewards).tolist() == [4]


@settings(derandomize=True)
@given(ANSWERS, st.data())
def test_majority_against_counting(answers: list[str | None], data: st.DataObject) -> None:
    numbers = numbered(answers)
    size = data.draw(st.integers(1, len(answers)))
    among = subsets("q", len(answers), size, seed=0)
    for chosen, subset in zip(most_frequent(np.array(numbers), among), among.tolist(), strict=True):
        votes = [numbers[candidate] for candidate in subset if numbers[candidate] >= 0]
        if not votes:
            assert chosen == subset[0]
            continue
        most = max(votes.count(answer) for answer in votes)
        winner = next(answer for answer in votes if votes.count(answer) == most)
        assert chosen == next(candidate for candidate in subset if numbers[candidate] == winner)


@settings(derandomize=True)
@given(REWARDS, st.data())
def test_highest_against_sorting(rewards: list[float], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(rewards)))
    among = subsets("q", len(rewards), size, seed=0)
    for chosen, subset in zip(highest(np.array(rewards), among), among.tolist(), strict=True):
        scored = [candidate for candidate in subset if rewards[candidate] == rewards[candidate]]
        assert chosen == (min(scored, key=lambda candidate: (-rewards[candidate], candidate)) if scored else subset[0])


@settings(derandomize=True)
@given(REWARDS)
def test_what_all_critics_agree_on(rewards: list[float]) -> None:
    num = len(rewards)
    one = subsets("q", num, 1, seed=0)
    answers = np.arange(num)[::-1] % 3 - 1
    weights = np.array(rewards)
    for chosen in (highest(weights, one), most_frequent(answers, one), most_frequent(answers, one, weights)):
        assert chosen.tolist() == list(range(num))
    # A vote of each candidate for an answer of its own, weighted by reward, is the highest reward.
    known = ~np.isnan(weights)
    all_of_them = everything(num)
    own = most_frequent(np.arange(num), all_of_them, weights)
    if known.any() and np.nanmax(weights) > 0:
        assert own.tolist() == highest(weights, all_of_them).tolist()


@pytest.mark.parametrize(
    ("rule", "answers", "wanted"),
    [
        ("exact", ["Cat", "cat.", None, "dog", "CAT"], [0, 0, -1, 1, 0]),
        ("numeric", ["1,000", "1000", "1000.5", "1002"], [0, 0, 0, 1]),
        ("numeric:0.02", ["100", "101.5", "103"], [0, 0, 1]),
        ("relaxed", ["100", "104", "107"], [0, 0, 1]),
        ("choice", ["B", "(b)", "B. dog", "A"], [0, 0, 0, 1]),
        ("math", ["\\frac{1}{2}", "0.5", "x+1", "1+x"], [0, 0, 1, 2]),
        ("anls", ["international", "internationa1", "International"], [0, 1, 0]),
        ("yes_no", ["Yes", "No, it is not.", "Yes, there is", "no"], [0, 1, 0, 1]),
        ("contains", ["open", "open now"], [0, 1]),
        ("vqa", ["the dog", "dog", "2", "two"], [0, 0, 1, 1]),
    ],
)
def test_answers_that_count_as_one_vote(rule: str, answers: list[str | None], wanted: list[int]) -> None:
    assert numbered(answers, rule) == wanted


def test_blind_choice_is_keyed_and_even() -> None:
    assert np.array_equal(random_rewards("q/1", 8, seed=1), random_rewards("q/1", 8, seed=1))
    chosen = [int(highest(random_rewards(f"q/{i}", 4, seed=1), everything(4))[0]) for i in range(2000)]
    share = np.bincount(chosen, minlength=4) / len(chosen)
    assert abs(share - 0.25).max() < 5 * (0.25 * 0.75 / len(chosen)) ** 0.5
