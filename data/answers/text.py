"""Scorers that compare texts: exact match, ANLS, VQA accuracy."""

import re
import unicodedata
from collections.abc import Sequence

_ANLS_THRESHOLD = 0.5
_VQA_HUMANS = 10
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize(text: str) -> str:
    """Return a text as ``exact_match`` compares it.

    Compatibility characters are unified (NFKC), case is folded, white space is collapsed; quotation marks around the
    text and full stops at its end are left out.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`“”‘’«»* ").rstrip(".。").rstrip("\"'`“”‘’«»* ")


def exact_match(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the prediction equals one of the truths after ``normalize``, else 0; an empty one never does."""
    given = normalize(prediction)
    return float(bool(given) and any(given == normalize(truth) for truth in truths))


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, truths: Sequence[str]) -> float:
    """Score by the average normalised Levenshtein similarity of DocVQA, for one question.

    Official definition: s = max over truths of 1 − NLD, NLD = edit distance / length of the longer text, both in lower
    case with white space collapsed; s below the threshold 0.5 counts 0. A benchmark's ANLS is the mean over questions.
    """
    given = " ".join(prediction.lower().split())
    best = 0.0
    for truth in truths:
        wanted = " ".join(truth.lower().split())
        longest = max(len(given), len(wanted))
        best = max(best, 1 - edit_distance(given, wanted) / longest if longest else 1.0)
    return best if best >= _ANLS_THRESHOLD else 0.0


def vqa_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """Score by the VQA accuracy, for one question.

    Official definition: over all ways to leave one of the ten human answers out, the mean of
    min(1, matching answers among the other nine / 3), after both texts are normalised (``normalize_vqa``). A data set
    with a single answer stands for ten humans who agree.
    """
    humans = [normalize_vqa(truth) for truth in truths]
    if len(humans) == 1:
        humans *= _VQA_HUMANS
    given = normalize_vqa(prediction)
    if not given or not humans:
        return 0.0
    matching = sum(given == human for human in humans)
    return sum(min(1.0, (matching - (given == human)) / 3) for human in humans) / len(humans)


def normalize_vqa(text: str) -> str:
    """Return a text as VQA's evaluation compares it.

    Lower case; a mark of punctuation is left out if it stands beside a space somewhere in the text as given (any mark,
    if a comma stands between digits), else becomes a space; full stops stay only before a digit; number words up to ten
    become digits; articles are left out. Apostrophes are left out of both sides, which replaces VQA's table of
    contractions ("dont" for "don't").
    """
    text = " ".join(text.lower().split())
    original = text
    comma_in_number = re.search(r"\d,\d", text) is not None
    for mark in _VQA_PUNCTUATION:
        if comma_in_number or f"{mark} " in original or f" {mark}" in original:
            text = text.replace(mark, "")
        else:
            text = text.replace(mark, " ")
    text = re.sub(r"\.(?!\d)|['’]", "", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)
