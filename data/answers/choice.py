"""Scorer for multiple choice: finds the letter that an answer names.

"(B)", "b.", "B: a dog", "The answer is B."  ─► "B"          "A dog barks", "because"  ─► None
"""

import re
from collections.abc import Sequence

from evovlm.data.answers.text import exact_match

_LEAD = r"(?:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:：]?\s*)"
_WHOLE = re.compile(rf"^\W*{_LEAD}?(?:option|choice)?\W*([a-z])\W*$", re.IGNORECASE)
_HEAD = re.compile(r"^[*_\s]*([A-Za-z])\s*[).:）：．]\**\s*\S")
_OPTION = re.compile(r"^\W*[A-Za-z]\s*[)\].:）】：．]\s*(\S.*)$", re.DOTALL)
_BRACKETS = re.compile(r"[(\[（【]\s*([A-Z])\s*[)\]）】]")
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+(?:is|would\s+be|must\s+be))?)\s*[:：]?\s*(?i:option\s+|choice\s+)?[*_\"'`]*"
    r"([A-Z])(?![\w'’])(?!\s+[a-z])"
)
_ALONE = re.compile(r"(?<![\w'’.])([B-HJ-Z])(?![\w'’])")


def choice_letter(text: str) -> str | None:
    """Find the letter that an answer names, in upper case; None if it names none, or several without saying which.

    In this order: nothing but a letter (brackets, stars, "answer is" aside); a letter at the beginning with ")", "." or
    ":" behind it; the last "answer is X", then the last "(X)"; a capital that stands alone, if there is one such letter
    (A and I are also words, so they do not count here).
    """
    letters = sorted(set(_ALONE.findall(text)))
    return stated_letter(text) or (str(letters[0]) if len(letters) == 1 else None)


def stated_letter(text: str) -> str | None:
    """Find the letter that an answer gives as such: as ``choice_letter``, without the last rule of letters alone."""
    for pattern in (_WHOLE, _HEAD):
        if found := pattern.match(text.strip()):
            return found[1].upper()
    for pattern in (_STATED, _BRACKETS):
        if letters := pattern.findall(text):
            return str(letters[-1])
    return None


def multiple_choice(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the prediction names the letter of one of the truths ("B", "(B)" or "B. a dog"), else 0.

    Official definition (MMMU, AI2D, MMBench without a judge): the letter is found in the answer by rules, and compared.
    A prediction that is the text behind the letter is right, also if a capital stands alone in it ("vitamin D"), but
    not if that text is nothing but a letter. A truth without a letter is compared as text.
    """
    given = choice_letter(prediction)
    for truth in truths:
        wanted = choice_letter(truth)
        option = _OPTION.match(truth.strip())
        if option and not _WHOLE.match(option[1].strip()) and exact_match(prediction, [option[1]]):
            return 1.0
        if given is not None and wanted is not None:
            if given == wanted:
                return 1.0
        elif exact_match(prediction, [option[1] if option else truth]):
            return 1.0
    return 0.0
