"""The letter of a multiple choice is found where there is one, and not made of words."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.answers.choice import choice_letter, multiple_choice

LETTERS = st.sampled_from(string.ascii_uppercase)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (c) ", "C"),
        ("**D**", "D"),
        ("[A].", "A"),
        ("Ｂ", None),  # full width is no letter here
        ("B.", "B"),
        ("B: a dog", "B"),
        ("B) a dog", "B"),
        ("B: option A is wrong", "B"),
        ("(B) a dog", "B"),
        ("b. a dog", "B"),
        ("Answer: B", "B"),
        ("The correct answer is (B).", "B"),
        ("The answer is **C**, since A and B are wrong.", "C"),
        ("Option B is wrong, so the answer is D", "D"),
        ("(A) is too small; I take (C)", "C"),
        ("I think it must be B", "B"),
        ("Either B or C", None),
        ("A dog barks", None),
        ("I do not know", None),
        ("because", None),
        ("The answer is A dog", None),
        ("It's Bob's", None),
        ("vitamin-C-like B12", "C"),
        ("answer", None),
        ("", None),
        ("12", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


FORMS = ["{}", "({})", "{}.", "**{}**", "Answer: {}", "The answer is {}.", "Option {}", "{}) x"]


@given(LETTERS, st.sampled_from(FORMS))
def test_every_letter_in_every_form(letter: str, form: str) -> None:
    assert choice_letter(form.format(letter)) == letter
    assert choice_letter(form.format(f"({letter})")) == letter


@given(st.lists(st.text(string.ascii_lowercase, min_size=2, max_size=8), min_size=1, max_size=5))
def test_words_in_lower_case_name_no_letter(words: list[str]) -> None:
    assert choice_letter(" ".join(words)) is None


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("B", "B", 1),
        ("(b)", "B. a dog", 1),
        ("a dog", "B. a dog", 1),
        ("A cat", "B. a dog", 0),
        ("A", "B", 0),
        ("", "B", 0),
        ("a dog", "a dog", 1),  # no letters at all
        ("a cat", "a dog", 0),
        ("C", "(B) a dog", 0),
    ],
)
def test_multiple_choice(prediction: str, truth: str, expected: float) -> None:
    assert multiple_choice(prediction, [truth]) == expected


def test_one_of_several_right_letters() -> None:
    assert multiple_choice("C", ["A", "C"]) == 1
    assert multiple_choice("B", ["A", "C"]) == 0


@pytest.mark.parametrize("text", ["vitamin D", "Zone B", "Type O", "Vitamin C."])
def test_a_capital_inside_an_options_text_is_no_letter(text: str) -> None:
    assert multiple_choice(text, [f"A. {text}"]) == 1
    assert multiple_choice("A", [f"A. {text}"]) == 1


def test_an_option_that_is_a_letter_is_named_by_its_own() -> None:
    assert multiple_choice("D", ["A. D"]) == 0
    assert multiple_choice("A", ["A. D"]) == 1
