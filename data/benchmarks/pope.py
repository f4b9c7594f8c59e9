"""POPE: is there such an object in the image? Yes or no, in three categories of absent objects.

row ─► says_yes(answer), label yes? ─► right and wrong yes, right and wrong no ─► accuracy, precision, recall, F1
                                            random, popular, adversarial ─► overall: the mean of the three
"""

from collections.abc import Sequence

from evovlm.data.answers.yes_no import says_yes
from evovlm.data.benchmarks.report import NUM, OVERALL, Judged, Table, by_group, mean
from evovlm.data.benchmarks.rows import Row, RowError

F1 = "F1"


def judge_pope(row: Row) -> Judged:
    """Judge a row of POPE; its group is ``category``, else the file's name where several are scored.

    A reply in which the answer that was looked for is missing says neither: it is wrong, and no "yes". A direct reply
    always counts as one of the two (``says_yes``).

    Raises:
        RowError: The label is neither yes nor no.
    """
    answer = row.answer()
    truth = row.truths()[0].strip().lower()
    if truth not in ("yes", "no"):
        raise RowError(row.where, f"the truth is {truth!r}, neither yes nor no")
    said = "yes" if says_yes(answer) else "no"
    given = "" if row.extracted == "" else said
    category = row.text("category", "split") or row.split
    return Judged(row.where, given, truth, float(given == truth), (category,) if category else ())


def table_pope(judged: Sequence[Judged]) -> Table:
    """Return accuracy, precision, recall and F1 of "yes", and the share of "yes", by category.

    Official definition: precision and recall are those of the answer "yes"; F1 = 2 · P · R / (P + R); what has a
    denominator of 0 is 0. The overall values are the means of the categories' values, as InternVL quotes them; without
    categories, those of all rows.
    """
    groups = {name: _numbers(rows) for name, rows in by_group(judged).items()}
    overall = _numbers(judged)
    if groups:
        overall = {metric: mean(values[metric] for values in groups.values()) for metric in overall}
        overall[NUM] = float(len(judged))
    return groups | {OVERALL: overall}


def _numbers(judged: Sequence[Judged]) -> dict[str, float]:
    yes = [one for one in judged if one.given == "yes"]
    right = sum(one.truth == "yes" for one in yes)
    precision = _ratio(right, len(yes))
    recall = _ratio(right, sum(one.truth == "yes" for one in judged))
    return {
        F1: _ratio(2 * precision * recall, precision + recall),
        "accuracy": mean(one.score for one in judged),
        "precision": precision,
        "recall": recall,
        "yes ratio": _ratio(len(yes), len(judged)),
        NUM: float(len(judged)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
