"""Lines of process reward data: raw rows with the share of right rollouts, and conversations with labels (spec §5.1).

values of the steps ──raw_row──────► {"image", "question", "question_orig", "answer", "response",
                                      "steps_with_score": [{"step", "score", "num_mc_correct", "num_mc_total"}], …}
                    ──conversation─► {"image", "conversations": [system, human, "+", human, "-", …]}
"""

from collections.abc import Sequence
from typing import Any

from evovlm.data.annotation import image_value
from evovlm.data.chat import Turn
from evovlm.data.solution_steps import BAD, GOOD, SEPARATOR, judged_turns
from evovlm.data.step_rollouts import StepValue


def labels(values: Sequence[StepValue], threshold: float) -> list[str]:
    """Label each step: ``GOOD`` iff its share of right rollouts is above ``threshold``."""
    return [GOOD if value.score > threshold else BAD for value in values]


def until_first_error(values: Sequence[StepValue], threshold: float) -> list[StepValue]:
    """Cut a solution behind its first step that is labelled ``BAD``."""
    said = labels(values, threshold)
    return list(values[: said.index(BAD) + 1 if BAD in said else None])


def raw_row(
    values: Sequence[StepValue],
    *,
    images: Sequence[str],
    question: str,
    question_orig: str,
    answer: str,
    num_rollouts: int,
    source: str,
) -> dict[str, Any]:
    """Write a raw row, whose keys are those of the published data.

    Args:
        values: Of a solution's steps.
        images: Paths.
        question: As the policy was asked.
        question_orig: As the data have it.
        answer: The reference answer.
        num_rollouts: Of each prefix that was rolled out.
        source: The solution's question and number, such as ``charts/17#2``.
    """
    steps = [
        {
            "step": value.step,
            "score": value.score,
            "num_mc_correct": value.num_correct,
            "num_mc_total": value.num_total,
        }
        for value in values
    ]
    return {
        "image": image_value(images),
        "question": question,
        "question_orig": question_orig,
        "answer": answer,
        "response": SEPARATOR.join(value.step for value in values),
        "steps_with_score": steps,
        "num_mc_sequences": num_rollouts,
        "source": source,
    }


def conversation(
    values: Sequence[StepValue],
    *,
    images: Sequence[str],
    question: str,
    threshold: float,
    system: str | None,
    source: str,
) -> dict[str, Any]:
    """Write a line of training data, in InternVL's format.

    Args:
        values: Of the steps that are shown, at least one.
        images: Paths, relative to the dataset's root.
        question: As the policy was asked.
        threshold: Labels are ``GOOD`` above it.
        system: System turn; None: none.
        source: Becomes the line's ``id``.
    """
    steps = [value.step for value in values]
    turns: tuple[Turn, ...] = judged_turns(
        question, steps, labels(values, threshold), num_images=len(images), system=system
    )
    line: dict[str, Any] = {"id": source}
    if images:
        line["image"] = image_value(images)
    return {**line, "conversations": [dict(turn) for turn in turns]}
