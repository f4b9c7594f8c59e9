"""Scorer for MathVista: answers are extracted by rules, brought into the form of the truth, and compared.

reply ──extract_answer──► "1.449" ──normalize_answer (float, 2 digits)──► "1.45" == truth?
                          "(B) 5 cm" ── (multi_choice) ──► text of option B, else the most similar option
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evovlm.data.answers.choice import choice_letter
from evovlm.data.answers.numeric import parse_number
from evovlm.data.answers.prompts import boxed
from evovlm.data.answers.text import edit_distance

AnswerType = Literal["text", "integer", "float", "list"]
_MARK = re.compile(r"(?:final\s+)?answer\**\s*(?:is\s*)?[:：]\s*(.*)", re.IGNORECASE)
_STATED = re.compile(r"\banswer\s+is\s*[:：]?\s*(.*)", re.IGNORECASE)
_LETTER = re.compile(r"\(([a-zA-Z])\)")
_NUMBER = re.compile(r"(?<![\d.])[-−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_LIST = re.compile(r"\[[^\[\]]*\]")
_AROUND = "*_\"'`$ \t\r\n"


@dataclass(frozen=True)
class Problem:
    """What MathVista says about the form of a problem's answer.

    Attributes:
        multiple_choice: Whether one of ``choices`` is asked for.
        answer_type: Form of the truth.
        choices: Texts of the options.
        precision: Digits behind the point of a ``float``.
    """

    multiple_choice: bool = False
    answer_type: AnswerType = "text"
    choices: tuple[str, ...] = ()
    precision: int = 0


def problem_of(truth: str) -> Problem:
    """Infer the form of an answer from the way in which a truth is written: "5", "1.45" (2 digits), "[1, 2]", "yes"."""
    if re.fullmatch(r"-?\d+", truth):
        return Problem(answer_type="integer")
    if found := re.fullmatch(r"-?\d*\.(\d+)", truth):
        return Problem(answer_type="float", precision=len(found[1]))
    return Problem(answer_type="list") if _LIST.fullmatch(truth) else Problem()


def extract_answer(reply: str, problem: Problem) -> str:
    r"""Find the answer in a reply without a judge model.

    In this order: a reply that is one of the choices, or a number where one is asked for, is the answer (as in the
    official quick extraction); what is in the last ``\boxed{…}``; what stands behind the first "Answer:" or
    "Final answer:" (official, too), else behind "the answer is". Of what was found, or else of the whole reply, a
    choice is the letter that it names, a number the last one, a list the last one in brackets.
    """
    reply = reply.strip()
    if reply in problem.choices or (problem.answer_type in ("integer", "float") and _is_number(reply)):
        return reply
    found = _MARK.search(reply) or _STATED.search(reply)
    stated = boxed(reply) or (found[1].strip(_AROUND).rstrip(".").strip(_AROUND) if found else "") or reply
    if problem.multiple_choice:
        letter = None if stated in problem.choices else choice_letter(stated)
        inside = letter is not None and ord(letter) - ord("A") < len(problem.choices)
        return f"({letter})" if inside else stated
    if problem.answer_type == "list":
        lists = _LIST.findall(stated) or _LIST.findall(reply)
        return lists[-1] if lists else stated
    if problem.answer_type in ("integer", "float"):
        return _last_number(stated) or _last_number(reply) or stated
    return stated


def normalize_answer(extracted: str, problem: Problem) -> str | None:
    """Bring an extracted answer into the form of the truth; None if it has none.

    Official definition: of a choice, the text of the letter in brackets or of the letter alone, otherwise the choice
    with the smallest edit distance; an integer is cut to its whole part; a float is rounded to ``precision`` digits.
    """
    if problem.multiple_choice and problem.choices:
        text = found[1].upper() if (found := _LETTER.search(extracted)) else extracted.strip()
        index = ord(text) - ord("A") if len(text) == 1 else -1
        if 0 <= index < len(problem.choices):
            return problem.choices[index]
        return min(problem.choices, key=lambda choice: edit_distance(text, choice))
    try:
        if problem.answer_type == "integer":
            return str(int(float(extracted)))
        if problem.answer_type == "float":
            return str(round(float(extracted), problem.precision))
    except (ValueError, OverflowError):
        return None
    return extracted


def mathvista(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the answer in a reply, in the form of a truth, is that truth, else 0.

    Official definition (MathVista): extraction, normalisation to the type of the answer, then the same text. The
    official extraction asks a judge model where its rules find nothing; here rules do it all (``extract_answer``). The
    form is inferred from the truth (``problem_of``), which is normalised, too.
    """
    for truth in truths:
        problem = problem_of(truth.strip())
        if is_right(prediction, normalize_answer(truth.strip(), problem) or truth, problem):
            return 1.0
    return 0.0


def is_right(reply: str, truth: str, problem: Problem, extracted: str | None = None) -> bool:
    """Whether a reply, or the answer that somebody has ``extracted`` from it, is the truth of a problem."""
    answer = extract_answer(reply, problem) if extracted is None else extracted
    return bool(answer) and normalize_answer(answer, problem) == truth


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _last_number(text: str) -> str | None:
    whole = parse_number(text)
    if whole is not None:
        return repr(whole.value)
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]).replace("−", "-").replace(",", "") if numbers else None
