"""The option that an answer picks, by MMMU's and by MMBench's rules."""

import pytest

from evovlm.data.answers.options import listed_options, mmbench_letter, mmmu_letter, truth_list

ANIMALS = {"A": "a cat", "B": "a dog", "C": "an owl"}


def test_listed_options() -> None:
    assert listed_options("What is it?\nA. a cat\nB. a dog\nAnswer with the letter.") == {"A": "a cat", "B": "a dog"}
    assert listed_options("(A) one\n(B) two\n(C) three") == {"A": "one", "B": "two", "C": "three"}
    assert listed_options("What is it?") == {}
    assert listed_options("B. a dog\nC. an owl") == {}  # does not begin with A


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),  # punctuation at the end
        ("(B)", "B"),
        ("(A) or (C)? I say (B)", "B"),  # the last in brackets
        ("(A), so not C B", "A"),  # brackets count before letters that stand alone
        ("First A then C", "C"),  # the last that stands alone
        ("There is certainly a dog in this picture", "B"),  # more than five words: the option's text
        ("It could be a cat or a dog or so", "B"),  # the last text
        ("a dog", None),  # too short for that
        ("B. a dog", "B"),  # instead of the official draw at random
        ("The answer is: B", "B"),
        ("Z", None),  # no option
        ("none", None),
        ("", None),
    ],
)
def test_mmmu(response: str, letter: str | None) -> None:
    assert mmmu_letter(response, ANIMALS) == letter


def test_mmmu_without_options() -> None:
    assert mmmu_letter("I think it is B", {}) == "B"  # "I" is a word, no letter
    assert mmmu_letter("(D)", {}) == "D"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("(B)", "B"),
        ("the option is B, of course", "B"),
        ("The answer is B, since A has no tail", "B"),  # two letters: the one that is stated
        ("A dog", "A"),  # up to three words A is a letter
        ("A dog sits in the grass", "B"),  # more: an article; then the option's text
        ("it is an owl", "C"),
        ("a cat and a dog", None),  # two options
        ("A or B", None),
        ("a dog " + "and nothing else at all " * 5, None),  # much longer than all options
        ("D", None),  # no option of this question
        ("", None),
    ],
)
def test_mmbench(response: str, letter: str | None) -> None:
    assert mmbench_letter(response, ANIMALS) == letter


def test_truths_that_are_lists_in_a_text() -> None:
    assert truth_list("['24/7', '3.429']") == ["24/7", "3.429"]
    assert truth_list("[1, 2]") == ["1", "2"]
    assert truth_list("B") == ["B"]
    assert truth_list("[open") == ["[open"]
    assert truth_list("[f(x)]") == ["[f(x)]"]  # no list of values, and nothing is run
    assert truth_list("[]") == ["[]"]
