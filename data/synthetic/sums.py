"""Task `sums`: add two to four digits, one step a line, blank lines between them.

    ┌───┬───┐      "Add the digits step by step."    7 and 0 is 7
    │ 7 │ 0 │
    ├───┼───┤                                        7 and 3 is 10
    │ 3 │ 4 │
    └───┴───┘                                        10 and 4 is 14

                                                     Answer: 14

A solution is wrong from the first line in which a digit is misread or a sum is false: what a process reward model has
to see. Images are made as those of the task `digits`.

`checks` are solutions up to their first wrong line, each line answered by "+", the wrong one by the numbers that belong
there: what a reward model of this size practises before it learns from signs alone.
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
_QUESTION = "Add the digits step by step."
PRM_SYSTEM_PROMPT = "Judge."
"""The usual one has more tokens than a tiny model's whole solution."""
_CHECKS = 5  # of each sample
_RIGHT = 0.6  # of their lines


def solve(digits: Sequence[int]) -> str:
    """Write the solution for at least two digits."""
    lines = []
    total = digits[0]
    for digit in digits[1:]:
        lines.append(_line(total, digit, total + digit))
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


def make_checks(seed: int, split: Split, number: int, digits: Sequence[int]) -> list[tuple[Turn, ...]]:
    """Make conversations in which solutions of one sample are judged line by line, up to the first wrong one.

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
        total = digits[0]
        for i, digit in enumerate(digits[1:]):
            right = (total, digit, total + digit)
            said = right if draws.uniform(f"{i}/right") < _RIGHT else _mistake(draws, str(i), right, first=i == 0)
            lines.append(_line(*said))
            # Digits that a line repeats from the one before are not asked for again.
            answers.append(GOOD if said == right else " ".join(map(str, right[i > 0 :])))
            if said != right:
                break
            total += digit
        made.append(judged_turns(f"<image>\n{_QUESTION}", lines, answers, num_images=1, system=PRM_SYSTEM_PROMPT))
    return made


def _line(one: int, other: int, total: int) -> str:
    return f"{one} and {other} is {total}"


def _mistake(draws: Draws, name: str, right: tuple[int, int, int], *, first: bool) -> tuple[int, int, int]:
    """Misread a digit, the first one only in a first line, and add rightly; or add falsely."""
    one, other, total = right
    mistake = draws.choice(f"{name}/mistake", ("sum", "other", "one") if first else ("sum", "other"))
    if mistake == "sum":
        offsets = (-2, -1, 1, 2) if total > 1 else (1, 2)
        return one, other, total + draws.choice(f"{name}/off", offsets)
    digit = one if mistake == "one" else other
    read = draws.choice(f"{name}/read", [d for d in range(10) if d != digit])
    return (read, other, read + other) if mistake == "one" else (one, read, one + read)
