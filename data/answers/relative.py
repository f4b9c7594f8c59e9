"""Scorer for estimates: the Mean Relative Accuracy of VSI-Bench.

prediction 9, truth 10: relative error 0.1      θ    0.50 0.55 … 0.85 0.90 0.95
                                         error ≤ 1−θ    1    1   …    1    ?    0     ─► mean over the ten θ
"""

import math
from collections.abc import Sequence

import numpy as np

_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def relative_accuracy(prediction: float, truth: float) -> float:
    """Return the Mean Relative Accuracy of one estimate, 0 to 1.

    Official definition (VSI-Bench): the mean over θ in {0.50, 0.55, …, 0.95} of [|p − t| / t ≤ 1 − θ], in the official
    code's own float arithmetic, so that an error on a threshold falls on the side where it falls there. A truth of 0
    must be met exactly.
    """
    if truth == 0:
        return float(prediction == 0)
    return float(np.mean(abs(prediction - truth) / truth <= 1 - _THRESHOLDS))


def first_word(text: str) -> str:
    """Return what VSI-Bench takes for the answer: what stands before the first space, without full stops at its end."""
    return text.split(" ")[0].rstrip(".").strip()


def mean_relative_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """Score by the Mean Relative Accuracy, for one question; the best over the truths.

    The number is the prediction's first word (see ``first_word``); if it is none, the score is 0.
    """
    given = _number(first_word(prediction.strip()))
    if given is None:
        return 0.0
    wanted = (_number(truth.strip()) for truth in truths)
    return max((relative_accuracy(given, truth) for truth in wanted if truth is not None), default=0.0)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
