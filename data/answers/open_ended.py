"""Scorer for MMMU's open questions: the truth is looked for in the key phrases of a reply.

"Adding up. So the total is 1,234.5 kg"
   ─ sentences ─► tail behind "is ", "so ", "= " … ─► "1,234.5 kg" and its numbers ─► {"1,234.5 kg", 1234.5}
truth "1234.50" ─► 1234.5 ─► equal: 1            truth "kg" ─► part of a phrase: 1
"""

import re
from collections.abc import Sequence

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_PUNCTUATION = frozenset(":,.!?;'")
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_match(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if a reply to an open question holds one of the truths, else 0.

    Official definition (MMMU): the reply, in lower case, is cut into sentences; of each that has one of the indicators
    ("is", "so", "answer", …; "=" in the last) the shortest tail behind one is a key phrase; without any the whole reply
    is one. Phrases and the numbers in them are compared: a truth that is a number must equal one of the numbers, both
    rounded to two digits; any other must be part of a phrase, a single letter with a space beside it.
    """
    given: set[str | float] = set()
    for phrase in _key_phrases(prediction):
        parts = [phrase, *(number for pattern in _NUMBERS for number in pattern.findall(phrase))]
        given.update(value for part in parts for value in _normalize(part))
    wanted = {value for truth in truths for value in _normalize(truth)}
    numbers = {value for value in wanted if isinstance(value, float)}
    texts = {value for value in wanted if isinstance(value, str)}
    phrases = [value for value in given if isinstance(value, str)]
    return float(bool(numbers & given) or any(text in phrase for text in texts if text for phrase in phrases))


def _key_phrases(reply: str) -> list[str]:
    reply = reply.strip().strip(".").lower()
    sentences = _SENTENCES.split(reply)
    phrases = []
    for number, sentence in enumerate(sentences, start=1):
        indicators = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        shortest = ""
        for tail in (sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence):
            if not shortest or len(tail) < len(shortest):  # an empty tail drops what came before, as officially
                shortest = tail
        if shortest and shortest not in _PUNCTUATION:
            phrases.append(shortest)
    return phrases or [reply]


def _normalize(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
