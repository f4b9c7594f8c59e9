"""Best-of-N: how a critic chooses one of several candidates. Pure functions.

    candidates of a question   0    1    2    3           subset {1, 2, 3}
    answers ──same_answers──► "5"  "7"  "5"   –
    majority: votes                 1    1   none  ─┐
    prm: rewards                   0.9  0.2  0.4   ─┼─ the highest, of equal ones the first ──► chosen candidate [S]
    random: keyed numbers          0.3  0.8  0.1   ─┘

Accuracy at n of N candidates is the mean over subsets of n: all of them while there are few, else some drawn by key.
Every critic sees the same subsets, so none is ever above the oracle, and all agree at n = 1.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import keys, uniform
from evovlm.data.answers.numeric import numeric
from evovlm.data.answers.rules import CORRECT_ABOVE, Scorer
from evovlm.data.answers.text import exact_match, normalize

Critic = Literal["prm", "orm", "majority", "prm-majority", "random"]
"""Process or outcome reward model, most frequent answer, the same weighted by reward, blind choice."""

CRITICS: tuple[Critic, ...] = ("prm", "orm", "majority", "prm-majority", "random")
MAX_SUBSETS = 512
"""Most subsets of a question and size: all pairs of 32 candidates are fewer."""
_VOTING_RULES = ("exact", "choice", "numeric", "relaxed", "vqa", "yes_no")


def critics_named(names: Sequence[str]) -> tuple[Critic, ...]:
    """Read critics' names.

    Raises:
        ValueError: There is no such critic, or one is named twice.
    """
    found = tuple(critic for name in names for critic in CRITICS if critic == name)
    if len(found) < len(names) or len(set(found)) < len(found):
        raise ValueError(f"critics {', '.join(names)}: name each of {', '.join(CRITICS)} once at most")
    return found


def sizes(num: int) -> list[int]:
    """Return the n of a table up to ``num`` candidates: powers of two, and ``num``.

    Raises:
        ValueError: ``num`` is below 1.
    """
    if num < 1:
        raise ValueError(f"best of {num}: ask for at least one candidate")
    return [2**power for power in range(num.bit_length()) if 2**power < num] + [num]


def subsets(name: str, num: int, size: int, *, seed: int) -> NDArray[np.int64]:
    """Return subsets of a question's candidates, int64 ``[S, size]``, each in ascending order.

    All of them if they are at most ``MAX_SUBSETS``; else so many, drawn by (seed, name), the same one perhaps twice.
    A drawn subset of one size lies in that of the next.

    Raises:
        ValueError: ``size`` is not in [1, num].
    """
    if not 1 <= size <= num:
        raise ValueError(f"question '{name}': no subset of {size} of {num} candidates")
    if math.comb(num, size) <= MAX_SUBSETS:
        return np.array(list(combinations(range(num), size)), np.int64)
    drawn = keys("subset", seed, name, np.arange(MAX_SUBSETS)[:, None], np.arange(num))
    return np.sort(np.argsort(drawn, axis=1)[:, :size], axis=1)


def equality(rule: str, scorer: Scorer) -> Callable[[str, str], bool]:
    """Return when two answers count as one vote.

    They do if the rule would take one for the other. Rules that cost much, or that a longer answer passes by what it
    contains, are replaced: ``math`` by equal numbers, or else equal texts; the others by equal texts.

    Args:
        rule: That checks the question's answers.
        scorer: Of that rule.
    """
    name = rule.partition(":")[0]
    if name == "math":
        return lambda a, b: numeric(a, [b], tolerance=0) > CORRECT_ABOVE
    chosen = scorer if name in _VOTING_RULES else exact_match
    return lambda a, b: chosen(a, [b]) > CORRECT_ABOVE


def same_answers(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> NDArray[np.int64]:
    """Number the different answers of a question, int64 ``[N]``, from 0 in order of appearance; −1: no answer.

    An answer is compared with the first one of each number: tolerances do not add up along a chain of answers.
    """
    first: list[str] = []
    by_text: dict[str, int] = {}
    numbers = []
    for answer in answers:
        if answer is None:
            numbers.append(-1)
            continue
        text = normalize(answer)
        if text not in by_text:
            known = (number for number, other in enumerate(first) if equal(answer, other))
            by_text[text] = next(known, len(first))
            if by_text[text] == len(first):
                first.append(answer)
        numbers.append(by_text[text])
    return np.array(numbers, np.int64)


def random_rewards(name: str, num: int, *, seed: int) -> NDArray[np.float64]:
    """Return rewards that know nothing, float64 ``[N]`` in [0, 1): the highest of a subset is any of it alike."""
    return uniform(keys("random critic", seed, name, np.arange(num)))


def highest(rewards: NDArray[np.float64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose the candidate of the highest reward from each subset; of equal ones the first.

    Args:
        rewards: float64 ``[N]``; NaN: not scored, chosen only where no candidate of the subset is.
        among: int64 ``[S, n]``, subsets in ascending order.

    Returns:
        int64 ``[S]``, candidates.
    """
    return _first_highest(np.where(np.isnan(rewards), -np.inf, rewards)[among], among)


def most_frequent(
    answers: NDArray[np.int64], among: NDArray[np.int64], rewards: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Choose the most frequent answer of each subset; of equally frequent ones that which came first.

    Args:
        answers: int64 ``[N]`` from ``same_answers``; −1 has no vote, and is chosen only where nothing has one.
        among: int64 ``[S, n]``, subsets in ascending order.
        rewards: float64 ``[N]``, weights of the votes, at least 0; NaN counts 0. None: every vote counts 1.

    Returns:
        int64 ``[S]``, the first candidates with the chosen answers.
    """
    weights = np.ones(len(answers)) if rewards is None else np.nan_to_num(rewards, nan=0.0)
    there = np.zeros((len(among), len(answers)))
    np.put_along_axis(there, among, weights[among], axis=1)
    same = (answers[:, None] == answers) & (answers >= 0)
    votes = np.where(answers >= 0, there @ same, -1.0)
    return _first_highest(np.take_along_axis(votes, among, axis=1), among)


def _first_highest(values: NDArray[np.float64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.take_along_axis(among, values.argmax(axis=1)[:, None], axis=1)[:, 0]
