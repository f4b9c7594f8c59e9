"""MathVista by rules: what is extracted, how it is brought into the form of the truth, what is right then."""

import pytest

from evovlm.data.answers.mathvista import (
    Problem,
    extract_answer,
    is_right,
    mathvista,
    normalize_answer,
    problem_of,
)

CHOICE = Problem(multiple_choice=True, choices=("5 cm", "10 cm", "Yes"))
INTEGER = Problem(answer_type="integer")
FLOAT = Problem(answer_type="float", precision=2)
LIST = Problem(answer_type="list")


@pytest.mark.parametrize(
    ("reply", "problem", "answer"),
    [
        ("10 cm", CHOICE, "10 cm"),  # a choice as it is
        ("The answer is (B).", CHOICE, "(B)"),
        ("First, 5 < 10.\nAnswer: B", CHOICE, "(B)"),
        ("It must be ten", CHOICE, "It must be ten"),  # left to the edit distance
        ("E", CHOICE, "E"),  # no such option
        ("7", INTEGER, "7"),
        ("There are 3 red and 4 blue ones, 7 in all.", INTEGER, "7"),
        ("Final answer: 1,024 apples.\nCheck: 2", INTEGER, "1024.0"),
        ("So \\boxed{12} it is, not 13", INTEGER, "12.0"),
        ("between 3-5", INTEGER, "5"),  # a range, no minus
        ("**Answer:** -3", INTEGER, "-3.0"),
        ("1.449", FLOAT, "1.449"),
        ("The answer is 1.449 cm", FLOAT, "1.449"),
        ("none", FLOAT, "none"),
        ("The list is [1, 2], then [3, 4].", LIST, "[3, 4]"),
        ("The answer is blue.", Problem(), "blue"),
        ("", INTEGER, ""),
    ],
)
def test_extraction(reply: str, problem: Problem, answer: str) -> None:
    assert extract_answer(reply, problem) == answer


@pytest.mark.parametrize(
    ("extracted", "problem", "answer"),
    [
        ("(B)", CHOICE, "10 cm"),
        ("(b) 10", CHOICE, "10 cm"),
        ("B", CHOICE, "10 cm"),
        ("b", CHOICE, "Yes"),  # a small letter alone is a text: edit distance, of which the first smallest counts
        ("10cm", CHOICE, "10 cm"),
        ("yes", CHOICE, "Yes"),
        ("7.0", INTEGER, "7"),
        ("7.9", INTEGER, "7"),  # cut, not rounded
        ("seven", INTEGER, None),
        ("inf", INTEGER, None),
        ("1.449", FLOAT, "1.45"),
        ("2", FLOAT, "2.0"),
        ("x", FLOAT, None),
        ("[1, 2]", LIST, "[1, 2]"),
    ],
)
def test_normalisation(extracted: str, problem: Problem, answer: str | None) -> None:
    assert normalize_answer(extracted, problem) == answer


def test_what_is_right() -> None:
    assert is_right("Answer: B", "10 cm", CHOICE)
    assert not is_right("Answer: A", "10 cm", CHOICE)
    assert not is_right("", "5 cm", CHOICE)  # no answer is not the nearest choice
    assert is_right("It says 3, no, 4.", "4", INTEGER)
    assert is_right("nonsense", "1.45", FLOAT, extracted="1.449")  # what a judge model has found counts


def test_form_from_the_truth() -> None:
    assert problem_of("12") == INTEGER
    assert problem_of("-1.25") == FLOAT
    assert problem_of("[1, 2]") == LIST
    assert problem_of("blue") == Problem()
    assert mathvista("I get 1.2503 m", ["1.250"]) == 1
    assert mathvista("I get 1.26 m", ["1.25"]) == 0
    assert mathvista("It is .5", [".5"]) == 1
    assert mathvista("The answer is blue.", ["red", "blue"]) == 1
