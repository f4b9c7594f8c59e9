"""How well scores of steps tell right steps from wrong ones: accuracy, macro-F1, ranking. Pure functions.

    scores [n]  > threshold ─► said "+" or "-" ─┐
    labels [n]  ────────────────────────────────┴─► 2 x 2 counts ─► accuracy, precision, recall, F1 ─► macro-F1

Steps of all solutions are pooled (spec §5.2). A measure whose denominator is 0 is None, never 0 or 1.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from evovlm.data.solution_steps import BAD, GOOD


@dataclass(frozen=True)
class ClassQuality:
    """How one of the two answers was given.

    Attributes:
        count: Steps whose label it is.
        said: Steps of which it was said.
        precision: Share of ``said`` that is right; None if it was never said.
        recall: Share of ``count`` that was found; None if no step has the label.
        f1: 2·hits / (count + said); None if both are 0.
    """

    count: int
    said: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class StepQuality:
    """How well steps were told apart.

    Attributes:
        steps: Steps that were counted.
        accuracy: Share of them that was judged right.
        macro_f1: Mean of the F1 of "+" and of "-", of those that are defined.
        auc: Probability that a right step scores above a wrong one, ties half: needs no threshold; None if all labels
            are the same.
        good: Of "+".
        bad: Of "-".
    """

    steps: int
    accuracy: float
    macro_f1: float
    auc: float | None
    good: ClassQuality
    bad: ClassQuality

    def to_json(self) -> dict[str, object]:
        """Return it as JSON; the classes stand under their signs."""
        content = asdict(self)
        return content | {"classes": {GOOD: content.pop("good"), BAD: content.pop("bad")}}


def step_quality(scores: Sequence[float], labels: Sequence[bool], threshold: float) -> StepQuality:
    """Measure scores against labels.

    Args:
        scores: P("+") of each step, at least one.
        labels: Whether each is right.
        threshold: A step is said to be right iff its score is above this.

    Raises:
        ValueError: There is no step, or another number of labels.
    """
    if not scores:
        raise ValueError("there are no steps to measure")
    said = [score > threshold for score in scores]
    right = sum(a == b for a, b in zip(said, labels, strict=True))
    good, bad = (_class_quality(said, labels, sign) for sign in (True, False))
    return StepQuality(
        steps=len(scores),
        accuracy=right / len(scores),
        macro_f1=macro_f1(good.f1, bad.f1),
        auc=_auc(scores, labels),
        good=good,
        bad=bad,
    )


def best_constant(labels: Sequence[bool]) -> tuple[str, StepQuality]:
    """Return the sign that, said of every step, is right most often, and how well that does: what to beat.

    Raises:
        ValueError: There is no step.
    """
    sign = sum(labels) * 2 >= len(labels)
    return (GOOD if sign else BAD), step_quality([float(sign)] * len(labels), labels, 0.5)


def f1(hits: float, wrong: float) -> float | None:
    """Return the F1 of a sign: ``hits`` were found, ``wrong`` missed or said in vain; None if there is neither."""
    return 2 * hits / (2 * hits + wrong) if hits + wrong else None


def macro_f1(*of_signs: float | None) -> float:
    """Return the mean of those that are defined; NaN if none is."""
    defined = [value for value in of_signs if value is not None]
    return sum(defined) / len(defined) if defined else math.nan


def _class_quality(said: Sequence[bool], labels: Sequence[bool], sign: bool) -> ClassQuality:
    count, claimed = sum(label is sign for label in labels), sum(answer is sign for answer in said)
    hits = sum(a is sign and b is sign for a, b in zip(said, labels, strict=True))
    return ClassQuality(
        count=count,
        said=claimed,
        precision=hits / claimed if claimed else None,
        recall=hits / count if count else None,
        f1=f1(hits, count + claimed - 2 * hits),
    )


def _auc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    good = [score for score, label in zip(scores, labels, strict=True) if label]
    bad = sorted(score for score, label in zip(scores, labels, strict=True) if not label)
    if not good or not bad:
        return None
    below = sum(bisect_left(bad, score) + bisect_right(bad, score) for score in good) / 2
    return below / (len(good) * len(bad))
