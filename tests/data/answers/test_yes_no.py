"""POPE: no iff the first sentence has a word No, no or not; yes in every other case."""

import pytest

from evovlm.data.answers.yes_no import says_yes, yes_no


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is no dog", False),
        ("Yes, there is. No cat, though.", True),  # only the first sentence counts
        ("There is not a dog. Yes.", False),
        ("No,", False),
        ("There is nothing", True),  # no word of the three
        ("NO", True),  # as the official code has it
        ("A knot", True),
        ("I cannot say", True),
        ("", True),
    ],
)
def test_says_yes(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def test_as_a_rule() -> None:
    assert yes_no("Yes, it is", ["yes"]) == 1
    assert yes_no("Yes, it is", ["No"]) == 0
    assert yes_no("It is not", ["NO"]) == 1
    assert yes_no(" ", ["yes"]) == 0  # an empty reply is no yes
