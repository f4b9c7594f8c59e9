"""Preference pairs: one line with a chosen and a rejected answer to one sample that stores what both share once.

    {"image": "a.png", "question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
        │ parse_pair; each answer rendered as a conversation of its own, with its masks
        ▼
    <|im_start|>system … <|im_start|>assistant \\n A  cat . <|im_end|> \\n
    <|im_start|>system … <|im_start|>assistant \\n A  dog . <|im_end|> \\n
        │ share_prefix
        ▼                        chosen_at           rejected_at
    <|im_start|>system … \\n │ A cat . <|im_end|> \\n │ A dog . <|im_end|> \\n
       prefix: seen by both   chosen branch: its own   rejected branch: its own, continuing the prefix, too

The prefix is what both renderings begin with, less its last token; each branch starts with that last common token, so
that its own row predicts the branch's first token. A common beginning of the answers is thus in the prefix and its
targets count for both. All images stand in the prefix. Source: spec §4.1.
"""

from dataclasses import dataclass

import numpy as np

from evovlm.data.annotation import Sample, check_text, make_sample, read_object
from evovlm.data.chat import ChatTokens, Turn
from evovlm.data.errors import Reason, SampleError

_KEYS = ("question", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """One line of a .jsonl of preferences.

    Attributes:
        sample: the question with its images or video; its turns are a human one alone.
        chosen: the better answer.
        rejected: the worse one.
    """

    sample: Sample
    chosen: str
    rejected: str


@dataclass(frozen=True)
class SharedPair:
    """A rendered pair, image runs collapsed.

    Attributes:
        tokens: prefix, chosen branch and rejected branch in a row; the first token of the rejected branch is not
            supervised, so that no row of the chosen branch has it as its target.
        chosen_at: first token of the chosen branch.
        rejected_at: first token of the rejected branch.
        num_chosen: targets of the chosen answer, shared ones included.
    """

    tokens: ChatTokens
    chosen_at: int
    rejected_at: int
    num_chosen: int


def parse_pair(raw: bytes | str, dataset: str, line: int) -> Pair:
    """Turn one line into a ``Pair``; other keys than ours are passed over.

    ``<image>`` and a newline are prepended to the question of a lone image that has no placeholder; several images need
    one each, as in conversations.

    Args:
        raw: the line.
        dataset: name of its dataset.
        line: its number, counted from 1.

    Raises:
        SampleError: the line cannot be used; reason ``BROKEN_JSON``, ``OTHER_KIND``, ``MISSING_KEYS``,
            ``CONVERSATION`` (not a text), ``EMPTY_SIDE``, ``SAME_ANSWERS``, ``IMAGE_COUNT`` or ``MISSING_IMAGE``.
    """
    name = f"{dataset}/{line}"
    content = read_object(raw, name)
    missing = [key for key in _KEYS if content.get(key) is None]
    if "conversations" in content and "chosen" in missing:
        detail = "the line is a conversation, not a preference pair: build its index without `--kind preference`"
        raise SampleError(Reason.OTHER_KIND, detail, name)
    if missing:
        found = ", ".join(f"'{key}'" for key in _KEYS if key not in missing) or "none of them"
        detail = f"a preference pair needs 'question', 'chosen' and 'rejected', but the line has {found}"
        raise SampleError(Reason.MISSING_KEYS, detail, name)
    for key in _KEYS:
        if not isinstance(content[key], str):
            raise SampleError(Reason.CONVERSATION, f"'{key}' is a {type(content[key]).__name__}, not a text", name)
        check_text(name, content[key], f"'{key}'")
    question, chosen, rejected = (content[key] for key in _KEYS)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise SampleError(Reason.EMPTY_SIDE, f"the answer '{side}' is empty: there is nothing to compare", name)
    if chosen == rejected:
        raise _same_answers("texts", name)
    return Pair(make_sample(content, [{"from": "human", "value": question}], dataset, line), chosen, rejected)


def with_answer(turns: tuple[Turn, ...], answer: str) -> tuple[Turn, ...]:
    """A question's turns and an answer to it."""
    return *turns, {"from": "gpt", "value": answer}


def share_prefix(chosen: ChatTokens, rejected: ChatTokens, *, name: str | None = None) -> SharedPair:
    """Store the common beginning of two renderings once.

    Args:
        chosen: conversation that ends with the chosen answer.
        rejected: the same question with the rejected answer.
        name: the sample's name for error messages.

    Raises:
        SampleError: both are the same tokens (``SAME_ANSWERS``).
        ValueError: they begin differently before all images of theirs: not the same question.
    """
    common = _common(chosen, rejected)
    if common == len(chosen.ids) == len(rejected.ids):
        raise _same_answers("tokens", name)
    at = common - 1
    if chosen.insert_at != rejected.insert_at or max(chosen.insert_at, default=0) >= at:
        raise ValueError(
            f"sample '{name}': both renderings begin with the same {common} tokens, but have images before tokens "
            f"{chosen.insert_at} and {rejected.insert_at}: these are answers to different questions"
        )
    branch = rejected.supervised[at:].copy()
    branch[0] = False
    tokens = ChatTokens(
        np.concatenate([chosen.ids, rejected.ids[at:]]),
        np.concatenate([chosen.supervised, branch]),
        chosen.insert_at,
    )
    return SharedPair(tokens, at, len(chosen.ids), int(chosen.supervised[1:].sum()))


def _common(a: ChatTokens, b: ChatTokens) -> int:
    """Tokens that both begin with, supervised alike."""
    n = min(len(a.ids), len(b.ids))
    differ = (a.ids[:n] != b.ids[:n]) | (a.supervised[:n] != b.supervised[:n])
    return int(differ.argmax()) if differ.any() else n


def _same_answers(what: str, name: str | None) -> SampleError:
    return SampleError(Reason.SAME_ANSWERS, f"chosen and rejected are the same {what}: nothing is preferred", name)
