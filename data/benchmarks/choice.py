"""MMMU, AI2D and MMBench: one of several options, by its letter.

row ─► letter that the answer picks ─► equal to the truth's letter? ─► mean
                                             MMMU: open questions, too; means by subject and discipline
                                             MMBench: a question asked with its options in turn counts once
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from evovlm.data.answers.choice import choice_letter, multiple_choice
from evovlm.data.answers.open_ended import open_match
from evovlm.data.answers.options import listed_options, mmbench_letter, mmmu_letter, truth_list
from evovlm.data.answers.text import exact_match
from evovlm.data.benchmarks.report import NUM, OVERALL, Judged, Table, means
from evovlm.data.benchmarks.rows import Row, RowError, is_missing

ACCURACY = "accuracy"
CIRCULAR_STEP = 1_000_000
"""MMBench adds this to a question's index for each turn of its options."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\(?([A-Z])\)?")
_MMMU_ID = re.compile(r"^(?:dev|validation|test)_(.+)_\d+$")
_DISCIPLINES = {
    "Art and Design": "Art, Art_Theory, Design, Music",
    "Business": "Accounting, Economics, Finance, Manage, Marketing",
    "Science": "Biology, Chemistry, Geography, Math, Physics",
    "Health and Medicine": (
        "Basic_Medical_Science, Clinical_Medicine, Diagnostics_and_Laboratory_Medicine, Pharmacy, Public_Health"
    ),
    "Humanities and Social Science": "History, Literature, Sociology, Psychology",
    "Tech and Engineering": (
        "Agriculture, Architecture_and_Engineering, Computer_Science, Electronics, Energy_and_Power, Materials, "
        "Mechanical_Engineering"
    ),
}
_DISCIPLINE_OF = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split(", ")}


def options_of(row: Row) -> dict[str, str]:
    """Find a row's options: ``options`` or ``choices`` (list or object), keys A, B, …, or lines of its question.

    Options that are null or NaN, as tables fill rows that have fewer than others, are none.
    """
    options = row.get("options", "choices", "index2ans", "option")
    if isinstance(options, str):
        options = truth_list(options)
    if isinstance(options, dict):
        return {str(letter): str(text) for letter, text in options.items() if not is_missing(text)}
    if isinstance(options, list):
        listed = [(letter, text) for letter, text in zip(_LETTERS, options, strict=False) if not is_missing(text)]
        return {letter: re.sub(rf"^{letter}[.):]\s*", "", str(text)) for letter, text in listed}
    columns = {letter: text for letter in _LETTERS if (text := row.text(letter)) is not None}
    return columns or listed_options(row.text("question") or "")


def judge_mmmu(row: Row) -> Judged:
    """Judge a row of MMMU: the letter of a multiple choice (``mmmu_letter``), or an open question (``open_match``).

    Which of both it is, ``question_type`` says; without it, a truth of one letter is a multiple choice. Groups: subject
    and discipline, from an id such as ``validation_Art_3``.
    """
    answer = row.answer()
    truths = [text.strip() for truth in row.truths() for text in truth_list(truth)]
    kind = row.text("question_type")
    is_choice = kind == "multiple-choice" if kind else len(truths) == 1 and _LETTER.fullmatch(truths[0]) is not None
    if is_choice:
        truths = [found[1] if (found := _LETTER.fullmatch(truth)) else truth for truth in truths]
        given = mmmu_letter(answer, options_of(row)) or ""
        score = float(given in truths)
    else:
        given, score = answer, open_match(answer, truths)
    named = _MMMU_ID.match(row.id or "")
    subject = named[1] if named else row.text("subject", "category")
    groups = (f"subject: {subject}",) if subject else ()
    if subject in _DISCIPLINE_OF:
        groups = (f"discipline: {_DISCIPLINE_OF[subject]}", *groups)
    return Judged(row.where, given, " / ".join(truths), score, groups)


def judge_ai2d(row: Row) -> Judged:
    """Judge a row of AI2D: 1 if the answer names the right letter, or is the right option's text."""
    answer, truths = row.answer(), row.truths()
    options = options_of(row)
    full = [f"{truth}. {options[truth]}" if truth in options else truth for truth in truths]
    given = answer if exact_match(answer, list(options.values())) else choice_letter(answer) or answer
    return Judged(row.where, given, " / ".join(truths), multiple_choice(answer, full), _split(row))


def judge_mmbench(row: Row) -> Judged:
    """Judge a row of MMBench by ``mmbench_letter``; its key is the question that its index belongs to.

    Groups: the split, ``l2-category`` and ``category``, where the row has them.
    """
    answer = row.answer()
    truths = [text.strip().upper() for text in row.truths()]
    given = mmbench_letter(answer, options_of(row)) or ""
    categories = ((name, row.text(name)) for name in ("l2-category", "category"))
    groups = (*_split(row), *(f"{name}: {value}" for name, value in categories if value))
    return Judged(row.where, given, " / ".join(truths), float(given in truths), groups, _circle(row))


def table_mmmu(judged: Sequence[Judged]) -> Table:
    """Return accuracy by discipline and subject; overall it is the mean over questions."""
    table = means(judged, ACCURACY)
    return {name: table[name] for name in sorted(table, key=lambda name: (name == OVERALL, name))}


def table_ai2d(judged: Sequence[Judged]) -> Table:
    """Return accuracy."""
    return means(judged, ACCURACY)


def table_mmbench(judged: Sequence[Judged]) -> Table:
    """Return accuracy by category and overall.

    Official definition (circular evaluation): a question is asked once for each of its options, which move on by one
    each time; it is right iff all answers are. Where rows are asked once only, both metrics are the same.

    Returns:
        ``accuracy``: circular; ``vanilla``: the mean over all rows, each by itself; ``num`` counts questions.
    """
    questions: dict[str, Judged] = {}
    for number, one in enumerate(judged):
        key = one.key or f"row {number}"
        first = questions.setdefault(key, one)
        questions[key] = replace(first, score=min(first.score, one.score))
    table = means(list(questions.values()), ACCURACY)
    single = means(judged, "vanilla")
    for name, values in table.items():
        values["vanilla"] = single[name]["vanilla"]
        values[NUM] = values.pop(NUM)
    return table


def leave_out_broken_circles(judged: Sequence[Judged], bad: Sequence[Row]) -> tuple[list[Judged], list[RowError]]:
    """Leave out questions of MMBench that were asked several times, but of which one answer could not be judged.

    Returns:
        The rows that stay, and an error for each that does not.
    """
    broken = {key for row in bad if (key := _key_or_none(row))}
    left_out = [
        RowError(one.where, "left out: another answer to the same question cannot be scored")
        for one in judged
        if one.key in broken
    ]
    return [one for one in judged if one.key not in broken], left_out


def _circle(row: Row) -> str:
    index = row.text("g_index") or row.text("index")
    if index is None:
        return ""
    try:
        return f"{row.split or ''}/{int(float(index)) % CIRCULAR_STEP}"
    except ValueError as error:
        raise RowError(row.where, f"index {index!r} is no number") from error


def _key_or_none(row: Row) -> str | None:
    try:
        return _circle(row)
    except RowError:
        return None


def _split(row: Row) -> tuple[str, ...]:
    return () if row.split is None else (row.split,)
