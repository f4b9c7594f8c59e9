"""MathVista: extracted answers in the form of the truth, by rules instead of a judge model.

row (response, question_type, answer_type, precision, choices, answer) ─► Problem ─► is_right ─► mean; by task, skill, …
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from evovlm.data.answers.mathvista import AnswerType, Problem, extract_answer, is_right, normalize_answer, problem_of
from evovlm.data.benchmarks.report import Judged, Table, means
from evovlm.data.benchmarks.rows import Row, RowError

_KEYS = ("question_type", "answer_type", "category", "task", "context", "grade", "source", "language", "skills")


def judge_mathvista(row: Row) -> Judged:
    """Judge a row of MathVista; see ``extract_answer`` and ``normalize_answer`` for the definition.

    ``extraction``, which a judge model has left in a row, is used as the extracted answer; otherwise rules find it. The
    form of the answer is ``question_type``, ``answer_type``, ``precision`` and ``choices``; without them it is inferred
    from the truth. Groups: the fields of ``metadata`` by which MathVista is broken down.

    Raises:
        RowError: Unknown type of answer, a precision that is no number, or a multiple choice without choices.
    """
    truth = row.truths()[0].strip()
    problem = _problem(row, truth)
    extracted = row.text("extraction")
    reply = "" if extracted else row.answer()
    answer = extracted or extract_answer(reply, problem)
    given = normalize_answer(answer, problem) if answer else None
    return Judged(row.where, given or "", truth, float(is_right(reply, truth, problem, answer)), tuple(_groups(row)))


def table_mathvista(judged: Sequence[Judged]) -> Table:
    """Return accuracy overall and by the fields of ``metadata``."""
    return means(judged, "accuracy")


def _problem(row: Row, truth: str) -> Problem:
    kind, question = row.text("answer_type"), row.text("question_type")
    choices = row.get("choices")
    texts = tuple(str(choice).strip() for choice in choices) if isinstance(choices, list) else ()
    if question == "multi_choice" and not texts:
        raise RowError(row.where, "question_type is 'multi_choice', but 'choices' holds no list of options")
    if kind is None:
        inferred = problem_of(truth)
        return Problem(question == "multi_choice" or bool(texts), inferred.answer_type, texts, inferred.precision)
    for answer_type in get_args(AnswerType):
        if kind == answer_type:
            return Problem(question == "multi_choice", answer_type, texts, _precision(row))
    raise RowError(row.where, f"answer_type '{kind}' is none of {', '.join(get_args(AnswerType))}")


def _precision(row: Row) -> int:
    value = row.get("precision")
    if value in (None, ""):
        return 0
    try:
        return int(float(value))
    except (TypeError, ValueError) as error:
        raise RowError(row.where, f"precision {value!r} is no number of digits") from error


def _groups(row: Row) -> Iterator[str]:
    metadata: Any = row.get("metadata")
    for key in _KEYS:
        value = row.get(key) if not isinstance(metadata, dict) or key not in metadata else metadata[key]
        for item in value if isinstance(value, list) else [value]:
            if item not in (None, ""):
                yield f"{key}: {item}"
