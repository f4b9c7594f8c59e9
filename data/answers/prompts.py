"""How a question asks for a checkable answer, and where that answer then stands (spec §4.4).

style    asked for                                          answer
direct   the question as written                            the whole text
marked   the question as written                            behind the last "Answer:" or "Final answer:"
en_v2    steps, last line "Answer: \\boxed{…}"                inside the box
en       steps, last line "Final answer: …"                 behind the colon
r1       <think>…</think>, then the answer                  behind </think> (inside its box, if there is one)
"""

import re
from enum import StrEnum


class PromptStyle(StrEnum):
    """How an answer is asked for."""

    DIRECT = "direct"
    MARKED = "marked"
    EN_V2 = "en_v2"
    EN = "en"
    R1 = "r1"


_INSTRUCTIONS = {
    PromptStyle.DIRECT: "",
    PromptStyle.MARKED: "",
    PromptStyle.EN_V2: (
        "Solve this step by step: write down your reasoning first. The last line of your reply must give the answer "
        "in exactly this form, with the answer in place of $FINAL_ANSWER and nothing behind it:\n"
        "Answer: \\boxed{$FINAL_ANSWER}"
    ),
    PromptStyle.EN: (
        "Solve this step by step: write down your reasoning first. The last line of your reply must give the answer "
        "in exactly this form, with nothing behind it:\n"
        "Final answer: $FINAL_ANSWER"
    ),
    PromptStyle.R1: (
        "Think before you reply. Put all your thoughts between <think> and </think> at the beginning of the reply, "
        "then write a short explanation and, on the last line, the answer in this form:\n"
        "Answer: \\boxed{$FINAL_ANSWER}"
    ),
}
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_MARK = re.compile(r"(?<![^\W_])answer\**\s*[:：]", re.IGNORECASE)
_FINAL_MARK = re.compile(r"(?<![^\W_])final\s+answer\**\s*[:：]([^\n]*)", re.IGNORECASE)
_TRUTH_MARK = re.compile(r"^\W*(?:final\s+)?answer\**\s*[:：](.*)", re.IGNORECASE | re.MULTILINE)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{")
_AROUND = "*_ \t\r\n"


def ask(question: str, style: PromptStyle) -> str:
    """Put a style's instruction behind a question."""
    instruction = _INSTRUCTIONS[style]
    return f"{question}\n\n{instruction}" if instruction else question


def extract(text: str, style: PromptStyle) -> str | None:
    """Find the answer in a reply.

    Returns:
        The answer without markup around it, or None if the reply does not keep to the form that was asked for.
    """
    if style is PromptStyle.DIRECT:
        return _bare(text)
    if style is PromptStyle.MARKED:
        return _marked(text)
    if style is PromptStyle.EN:
        found = _FINAL_MARK.findall(text)
        return _bare(found[-1]) if found else None
    if style is PromptStyle.R1:
        thoughts, mark, reply = text.partition("</think>")
        if not mark or not thoughts.lstrip().startswith("<think>") or "</think>" in reply or "<think>" in reply:
            return None
        return boxed(reply) if _BOX.search(reply) else _marked(reply) or _bare(reply)
    marks = [found.end() for found in _ANSWER_MARK.finditer(text)]
    return boxed(text[marks[-1] :], at_end=True) if marks else None


def boxed(text: str, *, at_end: bool = False) -> str | None:
    """Return what the last ``\\boxed{…}`` holds; braces may be nested.

    Args:
        text: Any text.
        at_end: Nothing but full stops and markup may follow the box.

    Returns:
        None without a box, and if the last one is empty or not closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    end = _closing_brace(text, boxes[-1].end())
    if end is None or (at_end and text[end + 1 :].strip("$*_.。 \t\r\n\\)]")):
        return None
    return _bare(text[boxes[-1].end() : end])


def true_answer(text: str) -> str:
    """Find the answer in a reference reply: its box, what stands behind "Answer:", or else all of it."""
    return boxed(text) or _marked(text) or text.strip()


def _marked(text: str) -> str | None:
    found = _TRUTH_MARK.findall(text)
    return _bare(found[-1]) if found else None


def _bare(text: str) -> str | None:
    """Take markup from around an answer: stars, ``$…$``, ``\\text{…}`` around all of it; None if nothing is left."""
    text = text.strip(_AROUND)
    if text.startswith("$") and text.endswith("$") and len(text) > 1:
        text = text.strip("$").strip(_AROUND)
    command = _TEXT_COMMAND.match(text)
    if command is not None and _closing_brace(text, command.end()) == len(text) - 1:
        return _bare(text[command.end() : -1])
    return text or None


def _closing_brace(text: str, start: int) -> int | None:
    """Find the brace that closes one opened before ``start``; ``\\{`` and ``\\}`` are no braces."""
    depth = 1
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return None
