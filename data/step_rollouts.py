"""What rollouts say about each step of a solution (Monte Carlo, spec §5.1). Pure functions.

    solution              rolled out from               mc of the step
    "a = 2.\\n\\n          "a = 2.\\n\\n"                    12 of 16 end in the right answer
     b = 3.\\n\\n          "a = 2.\\n\\nb = 3.\\n\\n"          16 of 16
     Answer: 5"           nothing: the end is reached   its own answer, 1 of 1 or 0 of 1

A solution that was cut off has no answer of its own: it ends with its last whole step, and that step, too, is rolled
out. Solutions of one question often begin alike: what they share is rolled out once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evovlm.data.solution_steps import SEPARATOR, split_steps


@dataclass(frozen=True)
class Solution:
    """A solution in steps.

    Attributes:
        steps: At least one.
        correct: Whether its own answer is right; None: it was cut off before there was one.
    """

    steps: tuple[str, ...]
    correct: bool | None

    @property
    def num_rolled_out(self) -> int:
        """How many of its prefixes are rolled out: those of 1, 2, … steps."""
        return len(self.steps) - (self.correct is not None)

    def prefix(self, num_steps: int) -> str:
        """Return what rollouts from ``num_steps`` whole steps continue."""
        return SEPARATOR.join(self.steps[:num_steps]) + SEPARATOR


@dataclass(frozen=True)
class StepValue:
    """A step, and what became of the continuations after it.

    Attributes:
        step: Its text.
        num_correct: Those that ended in the right answer.
        num_total: All of them; 0 if an earlier step was known to lead nowhere.
    """

    step: str
    num_correct: int
    num_total: int

    @property
    def score(self) -> float:
        """The share that was right, in [0, 1]."""
        return self.num_correct / self.num_total if self.num_total else 0.0


@dataclass(frozen=True)
class Tally:
    """The rollouts of a prefix, counted: those that were right, and all."""

    num_correct: int
    num_total: int


Tallies = Mapping[str, Tally]
"""Of a question, by the text of the prefix."""


def read_solution(text: str, *, finished: bool, correct: bool, max_steps: int) -> Solution | None:
    """Split a reply into steps.

    Args:
        text: The whole reply.
        finished: Whether the model ended it; if not, what stands after the last blank line is no whole step.
        correct: Verdict of a finished reply's answer.
        max_steps: Most steps; neighbours are joined where there are more.

    Returns:
        None if there is no whole step.
    """
    steps = split_steps(text if finished else text.rpartition(SEPARATOR)[0], max_steps)
    return Solution(tuple(steps), correct if finished else None) if steps else None


def whole_solution(text: str, *, correct: bool) -> Solution | None:
    """Take a reply as one step, as an outcome reward model does; one that was cut off is not correct.

    Returns:
        None if it is blank.
    """
    return Solution((text,), correct) if text.strip() else None


def lacking(solutions: Sequence[Solution | None], tallies: Tallies, *, early_stop: bool) -> list[tuple[int, int]]:
    """Find the prefixes that must be rolled out next.

    Args:
        solutions: Of one question.
        tallies: Of the prefixes that have been.
        early_stop: Nothing after a prefix without a right rollout counts: of each solution, only the first prefix
            that is not known is wanted.

    Returns:
        (solution, number of steps), each text once; those of a solution follow one another, the shortest first.
    """
    wanted: dict[str, tuple[int, int]] = {}
    for number, solution in enumerate(solutions):
        if solution is None:
            continue
        for num_steps in range(1, solution.num_rolled_out + 1):
            prefix = solution.prefix(num_steps)
            tally = tallies.get(prefix)
            if tally is None:
                wanted.setdefault(prefix, (number, num_steps))
            if early_stop and (tally is None or not tally.num_correct):
                break
    return list(wanted.values())


def step_values(solution: Solution, tallies: Tallies, *, early_stop: bool) -> list[StepValue] | None:
    """Value each step of a solution.

    Args:
        solution: The solution.
        tallies: Of its question.
        early_stop: After a step without a right rollout, all others are worth 0, the last one included.

    Returns:
        One value a step; None if a prefix has not been rolled out.
    """
    values: list[StepValue] = []
    for number, step in enumerate(solution.steps, start=1):
        tally: Tally | None
        if early_stop and values and not values[-1].num_correct:
            tally = Tally(0, 0)
        elif number > solution.num_rolled_out:
            tally = Tally(int(bool(solution.correct)), 1)
        else:
            tally = tallies.get(solution.prefix(number))
        if tally is None:
            return None
        values.append(StepValue(step, tally.num_correct, tally.num_total))
    return values
