"""Scorer for yes-or-no questions, as POPE reads answers.

"No, there is no dog. Yes" ─► first sentence ─► "No there is no dog" ─► a word No, no or not ─► no; otherwise yes
"""

from collections.abc import Sequence

_NEGATIONS = frozenset(("No", "no", "not"))


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes.

    Official definition (POPE): only what stands before the first full stop counts; commas are left out; the answer is
    no iff one of the words "No", "no" and "not" is in it, and yes otherwise, so also if it says neither.
    """
    sentence = text.partition(".")[0].replace(",", "")
    return not _NEGATIONS & set(sentence.split())


def yes_no(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the prediction says yes or no as one of the truths does, else 0; see ``says_yes``.

    An empty prediction is wrong.
    """
    return float(bool(prediction.strip()) and says_yes(prediction) in {says_yes(truth.lower()) for truth in truths})
