"""Task `steps`: read two to four digits, a line each, blank lines between them.

    ┌───┬───┐      "Read the digits one at a time."    7
    │ 7 │ 0 │
    ├───┼───┤                                          0
    │ 3 │ 4 │
    └───┴───┘                                          3   …

A solution is wrong from the first line that misreads a digit: what a process reward model has to see. Its answer is all
of it. Images are made as those of the task `digits`.

`checks` are solutions with mistakes, each line answered by "+", or by the digit that belongs there: what a reward model
of this size practises before it learns from signs alone, which tell it less.
"""

from collections.abc import Sequence

from evovlm.data.chat import Turn
from evovlm.data.solution_steps import GOOD, SEPARATOR, judged_turns
from evovlm.data.synthetic import sources
from evovlm.data.synthetic.digits import draw_grid
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Split

# (columns, rows, pixels of a cell), as in `digits`.
_LAYOUTS = ((2, 1, 56), (1, 2, 56), (3, 1, 56), (2, 2, 56), (2, 2, 28))
_QUESTION = "Read the digits one at a time."
PRM_SYSTEM_PROMPT = "Judge."
"""The usual one has more tokens than a tiny model's whole solution."""
_CHECKS = 3  # of each sample
_RIGHT = 0.6  # of their lines


def solve(digits: Sequence[int]) -> str:
    """Write the solution."""
    return SEPARATOR.join(map(str, digits))


def make(seed: int, split: Split, number: int) -> Sample:
    """Make one sample of the split."""
    draws = Draws("steps", seed, split, number)
    pool = sources.digits(seed)[split]
    image, shown = draw_grid(draws, "0", draws.choice("layout", _LAYOUTS), pool, jitter=split == "train")
    digits = [digit.label for digit in shown]
    return Sample(
        images=(image,),
        transcripts=("".join(map(str, digits)),),
        questions=((f"<image>\n{_QUESTION}", solve(digits)),),
        sources=tuple(digit.source for digit in shown),
    )


def make_checks(seed: int, split: Split, number: int, digits: Sequence[int]) -> list[tuple[Turn, ...]]:
    """Make conversations in which lines of solutions of one sample are judged.

    Args:
        seed: As for :func:`make`.
        split: Likewise.
        number: Likewise.
        digits: What the sample shows.
    """
    made = []
    for trial in range(_CHECKS):
        draws = Draws("checks", seed, split, number, trial)
        lines, answers = [], []
        for i, digit in enumerate(digits):
            right = draws.uniform(f"{i}/right") < _RIGHT
            said = digit if right else draws.choice(f"{i}/read", [other for other in range(10) if other != digit])
            lines.append(str(said))
            answers.append(GOOD if right else str(digit))
        made.append(judged_turns(f"<image>\n{_QUESTION}", lines, answers, num_images=1, system=PRM_SYSTEM_PROMPT))
    return made
