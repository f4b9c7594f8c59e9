"""Accuracy against the number of candidates, with intervals. Pure functions.

    question ─► Judged(correct [N], answers [N], rewards by critic) ─► row: accuracy at each n, by column
    rows of a dataset [Q, n, column] ──mean──► accuracy
                                     └─questions drawn anew, 2000 times, by key─► its interval, and that of the gain

Columns: pass@1 (mean over all candidates), each critic, oracle (whether any candidate is right: pass@n).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import choice_index, key, keys
from evovlm.data.selection import Critic, highest, most_frequent, random_rewards, subsets

PASS, ORACLE = "pass@1", "oracle"
NUM_RESAMPLES = 2000
_CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Judged:
    """A question's candidates, as critics and rules see them.

    Attributes:
        name: Of the question; keys its random draws.
        correct: bool ``[N]``, the rule's verdicts, N at least 1.
        answers: int64 ``[N]`` from ``same_answers``.
        rewards: float64 ``[N]`` of ``prm`` and ``orm``, where there are any; NaN: not scored.
    """

    name: str
    correct: NDArray[np.bool_]
    answers: NDArray[np.int64]
    rewards: Mapping[str, NDArray[np.float64]]


def choose(critic: Critic, judged: Judged, among: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Have a critic choose from each subset.

    Args:
        critic: Who chooses.
        judged: The question.
        among: int64 ``[S, n]`` from ``subsets``.
        seed: Of the blind critic's draws.

    Returns:
        int64 ``[S]``, candidates.

    Raises:
        KeyError: There are no rewards of that critic.
    """
    if critic == "majority":
        return most_frequent(judged.answers, among)
    if critic == "prm-majority":
        return most_frequent(judged.answers, among, judged.rewards["prm"])
    if critic == "random":
        return highest(random_rewards(judged.name, len(judged.correct), seed=seed), among)
    return highest(judged.rewards[critic], among)


def row(judged: Judged, sizes: Sequence[int], critics: Sequence[Critic], *, seed: int) -> NDArray[np.float64]:
    """Return a question's accuracy, float64 ``[n, column]``: pass@1, each critic, oracle.

    A question with fewer candidates than ``n`` gives all of them.
    """
    num = len(judged.correct)
    cells = np.empty((len(sizes), len(critics) + 2))
    for place, size in enumerate(sizes):
        among = subsets(judged.name, num, min(size, num), seed=seed)
        chosen = [choose(critic, judged, among, seed=seed) for critic in critics]
        cells[place, 0] = judged.correct.mean()
        cells[place, 1:-1] = [judged.correct[candidates].mean() for candidates in chosen]
        cells[place, -1] = judged.correct[among].any(axis=1).mean()
    return cells


def table(
    rows: NDArray[np.float64], sizes: Sequence[int], critics: Sequence[Critic], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Average rows over questions.

    Args:
        rows: float64 ``[Q, n, column]``, Q at least 1.
        sizes: The n.
        critics: The columns between pass@1 and the oracle.
        seed: Of the questions that are drawn for the intervals.

    Returns:
        n (as text) → column → ``mean``, ``low`` and ``high``, the 95 % interval (percentiles of means over questions
        drawn with replacement), and for each critic ``gain``: the same of its difference from pass@1.
    """
    num = len(rows)
    gains = rows[:, :, 1:-1] - rows[:, :, :1]
    values = np.concatenate([rows, gains], axis=2)
    low, high = intervals(values.reshape(num, -1), seed=seed)
    ends = np.stack([values.mean(axis=0).ravel(), low, high], axis=-1).reshape(*values.shape[1:], 3)
    columns = [PASS, *critics, ORACLE]
    result: dict[str, dict[str, Any]] = {}
    for size, cells in zip(sizes, ends, strict=True):
        at_size = {column: _interval(cell) for column, cell in zip(columns, cells, strict=False)}
        for critic, cell in zip(critics, cells[len(columns) :], strict=True):
            at_size[critic]["gain"] = _interval(cell)
        result[str(size)] = at_size
    return result


def intervals(
    values: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of 95 % bootstrap intervals of means over questions.

    Args:
        values: float64 ``[Q, columns]``; every column is averaged over the same drawn questions.
        seed: Of the draws.
        num_resamples: How often Q questions are drawn.

    Returns:
        Lower and upper ends, float64 ``[columns]``.
    """
    num = len(values)
    means = np.empty((num_resamples, values.shape[1]))
    step = max(1, _DRAWN_AT_ONCE // num)
    stream = key("bootstrap", seed)
    for begin in range(0, num_resamples, step):
        resamples = np.arange(begin, min(begin + step, num_resamples))
        drawn = choice_index(keys(stream, resamples[:, None], np.arange(num)), num)
        counts = np.zeros((len(resamples), num))
        np.add.at(counts, (np.arange(len(resamples))[:, None], drawn), 1.0)
        means[resamples] = counts @ values / num
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2], axis=0)
    return low, high


def _interval(cell: NDArray[np.float64]) -> dict[str, Any]:
    return dict(zip(("mean", "low", "high"), cell.tolist(), strict=True))
