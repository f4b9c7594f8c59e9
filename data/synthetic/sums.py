"""Task `sums`: add two to four digits, one step a line, blank lines between them.

    ┌───┬───┐      "Add the digits step by step."    7 and 0 is 7
    │ 7 │ 0 │
    ├───┼───┤                                        7 and 3 is 10
    │ 3 │ 4 │
    └───┴───┘                                        10 and 4 is 14

                                                     Answer: 14

A solution is wrong from the first line in which a digit is misread or a sum is false: what a process reward model has
to see. Images are made as those of the task `digits`.
"""

from collections.abc import Sequence

from evovlm.data.solution_steps import SEPARATOR
from evovlm.data.synthetic import sources
from evovlm.data.synthetic.digits import draw_grid
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Split

# (columns, rows, pixels of a cell), as in `digits`.
_LAYOUTS = ((2, 1, 56), (1, 2, 56), (3, 1, 56), (2, 2, 56), (2, 2, 28))
_QUESTION = "Add the digits step by step."


def solve(digits: Sequence[int]) -> str:
    """Write the solution for at least two digits."""
    lines = []
    total = digits[0]
    for digit in digits[1:]:
        lines.append(f"{total} and {digit} is {total + digit}")
        total += digit
    return SEPARATOR.join([*lines, f"Answer: {total}"])


def make(seed: int, split: Split, number: int) -> Sample:
    """Make one sample of the split."""
    draws = Draws("sums", seed, split, number)
    pool = sources.digits(seed)[split]
    image, shown = draw_grid(draws, "0", draws.choice("layout", _LAYOUTS), pool, jitter=split == "train")
    labels = [digit.label for digit in shown]
    return Sample(
        images=(image,),
        transcripts=("".join(map(str, labels)),),
        questions=((f"<image>\n{_QUESTION}", solve(labels)),),
        sources=tuple(digit.source for digit in shown),
    )
