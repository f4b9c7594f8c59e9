"""OCRBench: the truth stands somewhere in the answer; formulas are compared without spaces, in their own case."""

import pytest

from evovlm.data.answers.contains import contains, contains_formula


@pytest.mark.parametrize(
    ("prediction", "truths", "score"),
    [
        ("The sign says STOP.", ["stop"], 1),
        ("stop", ["STOP"], 1),
        ("OPEN\nNOW", ["open now"], 1),  # a line break counts as a space
        ("open now", ["OPEN\nNOW"], 1),
        ("open  now", ["open now"], 0),  # two spaces are not one
        ("  centre ", ["centre"], 1),
        ("cent", ["centre"], 0),
        ("twenty", ["20", "twenty"], 1),
        ("", ["a"], 0),
        ("anything", [""], 0),  # an empty truth is in every text, and proves nothing
        ("anything", [" \n "], 0),
    ],
)
def test_contains(prediction: str, truths: list[str], score: float) -> None:
    assert contains(prediction, truths) == score


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("x ^ { 2 } = 4", "x^{2}=4", 1),
        ("$x^{2}\n= 4$", "x ^ { 2 } = 4", 1),
        ("X = 4", "x = 4", 0),  # case is kept: another variable
        (r"\delta t", r"\Delta t", 0),
        ("x = 4", " ", 0),
    ],
)
def test_formulas(prediction: str, truth: str, score: float) -> None:
    assert contains_formula(prediction, [truth]) == score
