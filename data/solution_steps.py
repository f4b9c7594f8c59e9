"""Solutions as steps, and the conversation in which a process reward model judges them (spec §5). Pure functions.

"So a = 2.\\n\\nThen b = 3.\\n\\nAnswer: 5"  ──split_steps──►  3 steps  ──judged_turns──►

    system   you supervise a process …
    human    ### Question:\\n<image>\\nHow many …?\\n\\n### Solution Process:\\nSo a = 2.      gpt  +
    human    Then b = 3.                                                                gpt  +
    human    Answer: 5                                                                  gpt  -
                                                    decision: P("+") against "-" ────────────┘
"""

import math
from collections.abc import Sequence

from evovlm.data.chat import IMAGE_PLACEHOLDER, Turn

SEPARATOR = "\n\n"
MAX_STEPS = 16
"""Most steps of a solution in training data (spec §5.1); selection among candidates takes ``MAX_SCORED_STEPS``."""
MAX_SCORED_STEPS = 12
GOOD, BAD = "+", "-"
"""The answers of a process reward model: the solution is right so far, or it is not."""

PRM_SYSTEM_PROMPT = (
    "You supervise the process of solving a problem. The first turn gives you the problem and the first step of a "
    "solution; every later turn gives you the next step. Answer each turn with "
    f'"{GOOD}" if the solution is right up to and including that step, and with '
    f'"{BAD}" if there is an error in it. Answer with nothing else.'
)
"""System turn of training data. Published reward models are asked with the chat template's own instead (spec §5.2)."""


def split_steps(solution: str, max_steps: int | None = None) -> list[str]:
    """Split a solution at blank lines; where there are too many pieces, join neighbours.

    With n > ``max_steps`` pieces, k = ⌈n / max_steps⌉ consecutive ones make a step (spec §5.1). Pieces of white space
    alone are no steps.

    Args:
        solution: A model's whole reply.
        max_steps: Most steps; None: as many as there are.

    Returns:
        The steps, in order; none if the solution is blank.

    Raises:
        ValueError: ``max_steps`` is below 1.
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps = {max_steps} is below 1")
    pieces = [piece for piece in solution.split(SEPARATOR) if piece.strip()]
    size = 1 if max_steps is None else max(1, math.ceil(len(pieces) / max_steps))
    return [SEPARATOR.join(pieces[start : start + size]) for start in range(0, len(pieces), size)]


def judged_turns(
    question: str, steps: Sequence[str], labels: Sequence[str], *, num_images: int, system: str | None
) -> tuple[Turn, ...]:
    """Write the conversation in which a solution is judged step by step.

    Args:
        question: The problem; ``<image>`` is put on a line before it where a single image has no placeholder.
        steps: At least one; a single one that is the whole solution makes it an outcome reward model's.
        labels: ``GOOD`` or ``BAD`` for each step.
        num_images: Images of the question.
        system: System turn; None: none, which leaves it to the chat template.

    Raises:
        ValueError: No step, or another number of labels.
    """
    if not steps:
        raise ValueError("a solution without steps cannot be judged")
    if num_images == 1 and IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n{question}"
    asked = [f"### Question:\n{question}\n\n### Solution Process:\n{steps[0]}", *steps[1:]]
    turns: list[Turn] = [] if system is None else [{"from": "system", "value": system}]
    for step, label in zip(asked, labels, strict=True):
        turns += [{"from": "human", "value": step}, {"from": "gpt", "value": label}]
    return tuple(turns)
