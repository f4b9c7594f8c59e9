"""Pairs of a better and a worse answer, made of a model's own answers (spec §4.4). Pure functions.

(A) correctness   answers to a question, judged ──random correct × random wrong──► pairs
                                                └─random correct × unreadable────► pairs of the set "format rules"
(B) DropoutNTP    chosen ──first half of its words──► continued without the image ──► rejected
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import permutation
from evovlm.data.chat import IMAGE_PLACEHOLDER

_OWN_LINE = re.compile(rf"^{IMAGE_PLACEHOLDER}[ \t]*\n", re.MULTILINE)


@dataclass(frozen=True)
class JudgedAnswer:
    """One of a model's replies to a question.

    Attributes:
        text: The whole reply.
        answer: The answer that was found in it; None: the reply is not in the form that was asked for, or was cut off.
        correct: Whether that answer is right.
    """

    text: str
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class QuestionPairs:
    """Pairs of one question, and what became of the other combinations of a correct and another reply.

    Attributes:
        pairs: (chosen, rejected), as numbers of the replies: correct and wrong.
        format_pairs: The same: correct and unreadable.
        contained: Left out because the right answer stands inside the wrong one ("2" in "12").
        duplicates: Left out because another pair has the same two texts.
        over_limit: Left out because there were enough.
    """

    pairs: list[tuple[int, int]]
    format_pairs: list[tuple[int, int]]
    contained: int = 0
    duplicates: int = 0
    over_limit: int = 0


def correctness_pairs(replies: Sequence[JudgedAnswer], *, name: str, seed: int, max_pairs: int = 15) -> QuestionPairs:
    """Pair correct replies with wrong ones, and with unreadable ones, at random.

    Combinations are taken in an order that is keyed by (seed, name) until there are enough; a reply that was sampled
    often comes early more often. Empty replies are not used.

    Args:
        replies: All replies to the question.
        name: The question.
        seed: Of the order.
        max_pairs: Most pairs of each of the two sets.
    """
    correct = [i for i, reply in enumerate(replies) if reply.correct and reply.text.strip()]
    wrong = [i for i, r in enumerate(replies) if not r.correct and r.answer is not None and r.text.strip()]
    unreadable = [i for i, reply in enumerate(replies) if reply.answer is None and reply.text.strip()]
    counts = {"contained": 0, "duplicates": 0, "over_limit": 0}
    made: list[list[tuple[int, int]]] = []
    for which, losers in (("wrong", wrong), ("format", unreadable)):
        kept: list[tuple[int, int]] = []
        seen: set[tuple[str, str]] = set()
        for place in permutation(len(correct) * len(losers), "pairs", which, seed, name).tolist():
            chosen, rejected = correct[place // len(losers)], losers[place % len(losers)]
            texts = replies[chosen].text.strip(), replies[rejected].text.strip()
            if texts in seen:
                counts["duplicates"] += 1
                continue
            seen.add(texts)
            if _contains(replies[rejected].answer, replies[chosen].answer):
                counts["contained"] += 1
            elif len(kept) == max_pairs:
                counts["over_limit"] += 1
            else:
                kept.append((chosen, rejected))
        made.append(kept)
    return QuestionPairs(made[0], made[1], **counts)


def pairs_per_question(
    num_replies: int, max_pairs: int = 15, *, many_replies: int = 500_000, max_pairs_of_many: int = 3
) -> int:
    """Return the most pairs of a question of a dataset: fewer where very many replies were sampled."""
    return min(max_pairs, max_pairs_of_many) if num_replies > many_replies else max_pairs


def thin_out(num_lines: int, max_lines: int, seed: int) -> NDArray[np.int64]:
    """Choose at most ``max_lines`` of ``num_lines`` lines at random, keyed by the seed; ascending, int64 [n]."""
    return np.sort(permutation(num_lines, "thin out", seed, end=min(num_lines, max_lines)))


def keep_beginning(text: str, ratio: float = 0.5) -> str:
    """Return the first ``floor(ratio · words)`` words of a text, with the white space between and before them.

    Raises:
        ValueError: ``ratio`` is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio = {ratio} is not in [0, 1)")
    words = list(re.finditer(r"\S+", text))
    kept = int(len(words) * ratio)
    return text[: words[kept - 1].end()] if kept else ""


def without_images(question: str) -> str:
    """Take the image placeholders out of a question; one that has a line of its own goes with its line."""
    return _OWN_LINE.sub("", question).replace(IMAGE_PLACEHOLDER, "")


def _contains(wrong: str | None, right: str | None) -> bool:
    return wrong is not None and right is not None and right.strip().casefold() in wrong.casefold()
