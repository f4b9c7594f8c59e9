"""MMMU's open questions: key phrases, numbers rounded to two digits, texts as parts of phrases."""

import pytest

from evovlm.data.answers.open_ended import open_match


@pytest.mark.parametrize(
    ("reply", "truths", "score"),
    [
        ("5", ["5"], 1),
        ("5.0", ["5"], 1),
        ("1,234.5", ["1234.50"], 1),
        ("1e3", ["1000"], 1),
        ("3.14159", ["3.14"], 1),  # both are rounded to two digits
        ("3.149", ["3.14"], 0),
        ("The answer is 7.", ["7"], 1),
        ("x = 7", ["7"], 1),  # "=" in the last sentence
        ("There are 3 of them. So the total is 7.", ["7"], 1),
        ("There are 3 of them. So the total is 7.", ["3"], 0),  # not in a key phrase
        ("Photosynthesis", ["photosynthesis"], 1),
        ("The process is photosynthesis", ["Photosynthesis"], 1),
        ("The process is photosynthesis in plants", ["Photosynthesis"], 0),  # "is " ends a word there, officially, too
        ("respiration", ["photosynthesis"], 0),
        ("the result is option b here", ["b"], 1),  # one letter: with a space beside it
        ("bulb", ["b"], 0),
        ("24/7", ["24/7", "3.429"], 1),
        ("5 =", ["5"], 1),  # nothing behind the sign: the whole reply is the phrase
        ("", ["5"], 0),
        ("-2", ["2"], 0),
    ],
)
def test_open_match(reply: str, truths: list[str], score: float) -> None:
    assert open_match(reply, truths) == score
