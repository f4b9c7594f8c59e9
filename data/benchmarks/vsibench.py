"""VSI-Bench: questions about rooms seen in a video, answered by a letter or a number.

row ─► first word ─┬─ letter ─► equal?                     ─┐
                   └─ number ─► mean relative accuracy     ─┴─► mean of each type ─► mean of eight tasks
                                 (three types of direction are one task)
"""

from collections.abc import Sequence

from evovlm.data.answers.relative import first_word, mean_relative_accuracy
from evovlm.data.benchmarks.report import NUM, OVERALL, Judged, Table, mean, means
from evovlm.data.benchmarks.rows import Row, RowError

SCORE = "score"
CHOICES = frozenset(
    (
        *("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard"),
        *("object_rel_distance", "route_planning", "obj_appearance_order"),
    )
)
NUMBERS = frozenset(("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation"))
_DIRECTION = "object_rel_direction"


def judge_vsibench(row: Row) -> Judged:
    """Judge a row of VSI-Bench; its group is ``question_type``.

    Official definition: the answer is its first word without full stops at the end. Six types of question are multiple
    choices: right iff it is the true letter, in any case. Four ask for a number: Mean Relative Accuracy, 0 for what is
    no number. Without a type, the truth says which of both it is.

    Raises:
        RowError: The type is none of VSI-Bench's.
    """
    kind = row.text("question_type")
    if kind is not None and kind not in CHOICES | NUMBERS:
        known = ", ".join(sorted(CHOICES | NUMBERS))
        raise RowError(row.where, f"question_type '{kind}' is none of VSI-Bench's: {known}")
    answer, truth = row.answer(), row.truths()[0].strip()
    given = first_word(answer.strip())
    is_number = kind in NUMBERS if kind else truth.replace(".", "", 1).isdigit()
    score = mean_relative_accuracy(answer, [truth]) if is_number else float(given.lower() == truth.lower())
    return Judged(row.where, given, truth, score, (kind,) if kind else ())


def table_vsibench(judged: Sequence[Judged]) -> Table:
    """Return the score of each type of question and their mean.

    Official definition: the three types of relative direction count as one task, whose score is their mean; overall it
    is the mean over tasks (eight if all types are there), not over questions.
    """
    table = means(judged, SCORE)
    overall = table.pop(OVERALL)
    directions = [values for name, values in table.items() if name.startswith(_DIRECTION)]
    tasks = [values[SCORE] for name, values in table.items() if not name.startswith(_DIRECTION)]
    if directions:
        direction = mean(values[SCORE] for values in directions)
        table[_DIRECTION] = {SCORE: direction, NUM: sum(values[NUM] for values in directions)}
        tasks.append(direction)
    return table | {OVERALL: {**overall, SCORE: mean(tasks) if tasks else overall[SCORE]}}
