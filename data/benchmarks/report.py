"""What came out of an answer file: every row's score, and means by group.

Judged(given "B", truth "B", score 1.0, groups ("subject: Art", …)) …
    ──means──► {"subject: Art": {"accuracy": 0.62, "num": 30}, …, "overall": {"accuracy": 0.58, "num": 900}}
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evovlm.data.benchmarks.rows import RowError

OVERALL = "overall"
NUM = "num"
NUM_RIGHT = "num_right"
COUNTS = (NUM, NUM_RIGHT)
"""Metrics that count questions; all others are shares, 0 to 1."""

Table = dict[str, dict[str, float]]
"""Group → metric → value; ``num`` counts questions. The last group is ``OVERALL``."""


@dataclass(frozen=True)
class Judged:
    """One row's outcome.

    Attributes:
        where: File and row.
        given: What was understood of the model's answer: a letter, "yes", a box; empty if nothing was.
        truth: What was expected.
        score: In [0, 1].
        groups: Names of all groups to which it counts, besides all rows together.
        key: Rows with the same key are one question, asked in several ways; empty if it stands alone.
    """

    where: str
    given: str
    truth: str
    score: float
    groups: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class Report:
    """The result of scoring answer files.

    Attributes:
        benchmark: Name.
        metric: The metric that is quoted; its value over all is ``score``.
        table: All groups and metrics.
        judged: Every row that was scored.
        bad: Rows that could not be scored.
    """

    benchmark: str
    metric: str
    table: Table
    judged: Sequence[Judged] = field(repr=False)
    bad: Sequence[RowError]

    @property
    def score(self) -> float:
        """The number that is quoted."""
        return self.table[OVERALL][self.metric]

    def to_json(self) -> dict[str, Any]:
        """Return all but the single rows, as JSON."""
        groups = {
            name: {metric: int(value) if metric in COUNTS else value for metric, value in values.items()}
            for name, values in self.table.items()
        }
        return {
            "benchmark": self.benchmark,
            "metric": self.metric,
            "score": self.score,
            "num_scored": len(self.judged),
            "num_bad": len(self.bad),
            "bad": [str(error) for error in self.bad],
            "groups": groups,
        }


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def by_group(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Sort rows into their groups, in the order in which groups first appear."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        for name in one.groups:
            groups.setdefault(name, []).append(one)
    return groups


def means(judged: Sequence[Judged], metric: str, *, over_groups: bool = False) -> Table:
    """Return the mean score of each group and of all.

    Args:
        judged: Scored rows.
        metric: How to call it.
        over_groups: The overall value is the mean of the groups' values (every group counts the same) instead of the
            mean over rows; without groups it is the latter.
    """
    groups = {name: {metric: _score(rows), NUM: float(len(rows))} for name, rows in by_group(judged).items()}
    overall = mean(values[metric] for values in groups.values()) if groups and over_groups else _score(judged)
    return groups | {OVERALL: {metric: overall, NUM: float(len(judged))}}


def _score(judged: Sequence[Judged]) -> float:
    return mean(one.score for one in judged)
