"""Steps, the prefixes that are rolled out, and what the counts of rollouts make of the steps."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.step_rollouts import (
    Solution,
    StepValue,
    Tally,
    lacking,
    read_solution,
    step_values,
    whole_solution,
)

ABC = Solution(("a", "b", "c"), correct=True)
CUT = Solution(("a", "d"), correct=None)


def read(text: str, *, finished: bool = True, correct: bool = True, max_steps: int = 16) -> Solution | None:
    return read_solution(text, finished=finished, correct=correct, max_steps=max_steps)


def test_a_finished_solution_is_rolled_out_up_to_its_last_step() -> None:
    solution = read("a\n\nb\n\nAnswer: 5", correct=False)
    assert solution == Solution(("a", "b", "Answer: 5"), correct=False)
    assert [solution.prefix(i + 1) for i in range(solution.num_rolled_out)] == ["a\n\n", "a\n\nb\n\n"]
    assert read("Answer: 5") == Solution(("Answer: 5",), correct=True)
    assert read("a\n\nb\n\nc\n\nd", max_steps=2) == Solution(("a\n\nb", "c\n\nd"), correct=True)


def test_a_solution_that_was_cut_off_ends_with_its_last_whole_step() -> None:
    solution = read("a\n\nb\n\nand then", finished=False, correct=True)
    assert solution == Solution(("a", "b"), correct=None)
    assert [solution.prefix(i + 1) for i in range(solution.num_rolled_out)] == ["a\n\n", "a\n\nb\n\n"]
    assert read("a\n\nb\n\n", finished=False) == Solution(("a", "b"), correct=None)


@pytest.mark.parametrize(("text", "finished"), [("", True), (" \n\n\n ", True), ("and then", False), ("\n\nx", False)])
def test_no_whole_step(text: str, finished: bool) -> None:
    assert read(text, finished=finished) is None


def test_an_outcome_is_one_step() -> None:
    assert whole_solution("a\n\nb", correct=False) == Solution(("a\n\nb",), correct=False)
    assert whole_solution(" \n", correct=True) is None


def test_each_prefix_is_wanted_once() -> None:
    assert lacking([ABC, None, ABC, CUT], {}, early_stop=False) == [(0, 1), (0, 2), (3, 2)]
    assert lacking([ABC, CUT], {"a\n\n": Tally(0, 4)}, early_stop=False) == [(0, 2), (1, 2)]
    whole = {"a\n\n": Tally(1, 4), "a\n\nb\n\n": Tally(0, 4), "a\n\nd\n\n": Tally(4, 4)}
    assert lacking([ABC, CUT], whole, early_stop=False) == []


def test_early_stop_wants_step_after_step() -> None:
    assert lacking([ABC, CUT], {}, early_stop=True) == [(0, 1)]
    assert lacking([ABC, CUT], {"a\n\n": Tally(1, 4)}, early_stop=True) == [(0, 2), (1, 2)]
    assert lacking([ABC, CUT], {"a\n\n": Tally(0, 4)}, early_stop=True) == []


def test_the_last_step_has_the_solutions_own_verdict() -> None:
    tallies = {"a\n\n": Tally(3, 4), "a\n\nb\n\n": Tally(0, 4), "a\n\nd\n\n": Tally(2, 4)}
    values = step_values(ABC, tallies, early_stop=False)
    assert values == [StepValue("a", 3, 4), StepValue("b", 0, 4), StepValue("c", 1, 1)]
    assert [value.score for value in values] == [0.75, 0.0, 1.0]
    assert step_values(CUT, tallies, early_stop=False) == [StepValue("a", 3, 4), StepValue("d", 2, 4)]
    wrong = Solution(("x",), correct=False)
    assert step_values(wrong, {}, early_stop=False) == [StepValue("x", 0, 1)]


def test_after_a_hopeless_step_all_is_worth_nothing() -> None:
    tallies = {"a\n\n": Tally(3, 4), "a\n\nb\n\n": Tally(0, 4)}
    assert step_values(ABC, tallies, early_stop=True) == [
        StepValue("a", 3, 4),
        StepValue("b", 0, 4),
        StepValue("c", 0, 0),
    ]
    assert step_values(ABC, {"a\n\n": Tally(0, 4)}, early_stop=True) is not None
    assert step_values(ABC, {"a\n\n": Tally(0, 4)}, early_stop=False) is None
    assert StepValue("c", 0, 0).score == 0.0


SOLUTIONS = st.lists(
    st.none()
    | st.builds(
        Solution,
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple),
        st.sampled_from([True, False, None]),
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SOLUTIONS, st.booleans(), st.randoms(use_true_random=False))
def test_what_is_lacking_and_no_more_values_every_step(
    solutions: list[Solution | None], early_stop: bool, random: Random
) -> None:
    tallies: dict[str, Tally] = {}
    rounds = 0
    while wanted := lacking(solutions, tallies, early_stop=early_stop):
        rounds += 1
        for number, num_steps in wanted:
            solution = solutions[number]
            assert solution is not None
            prefix = solution.prefix(num_steps)
            assert prefix not in tallies
            tallies[prefix] = Tally(random.choice([0, 0, 1, 4]), 4)
    assert rounds <= (4 if early_stop else 1)
    used = set()
    for solution in solutions:
        if solution is None:
            continue
        values = step_values(solution, tallies, early_stop=early_stop)
        assert values is not None
        assert [value.step for value in values] == list(solution.steps)
        used |= {solution.prefix(i + 1) for i, value in enumerate(values) if value.num_total == 4}
        scores = [value.score for value in values]
        if early_stop and 0.0 in scores:
            assert set(scores[scores.index(0.0) :]) == {0.0}
    assert used == set(tallies)
