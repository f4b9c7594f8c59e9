"""Scorers that look for the truth inside the answer: OCRBench, and its formulas.

"The text says\nOPEN NOW." , ["open now"]      ─ lower case, line breaks as spaces ─► 1
"x ^ { 2 } = 4",            ["x^{2}=4"]        ─ without any space ────────────────► 1   (HME100k)
"""

from collections.abc import Sequence


def contains(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if one of the truths stands somewhere in the prediction, else 0.

    Official definition (OCRBench): both in lower case, without space at the ends, each line break as one space; right
    iff a truth is part of the prediction. A truth that is empty matches nothing.
    """
    given = _in_one_line(prediction.lower())
    return float(any(wanted in given for truth in truths if (wanted := _in_one_line(truth.lower()))))


def contains_formula(prediction: str, truths: Sequence[str]) -> float:
    r"""Score 1 if one of the truths stands in the prediction once all spaces are left out, else 0.

    Official definition (OCRBench's rows of HME100k, handwritten formulas): line breaks and spaces are taken out of
    both; case stays, since ``X`` and ``x`` are two variables and ``\Delta`` and ``\delta`` two commands.
    """
    given = _in_one_line(prediction).replace(" ", "")
    return float(any(wanted in given for truth in truths if (wanted := _in_one_line(truth).replace(" ", ""))))


def _in_one_line(text: str) -> str:
    return text.strip().replace("\n", " ")
