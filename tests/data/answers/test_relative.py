"""Mean Relative Accuracy: the ten thresholds, ties as the official arithmetic has them, the first word."""

import pytest

from evovlm.data.answers.relative import first_word, mean_relative_accuracy, relative_accuracy


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        (10, 10, 1.0),
        (10.4, 10, 1.0),  # 4 %: within all ten
        (9.3, 10, 0.9),  # 7 %: all but 5 %
        (13, 10, 0.4 + 0.1),  # 30 %: within 50, 45, 40, 35 and (a tie) 30 %
        (14.9, 10, 0.1),
        (15, 10, 0.1),  # a tie at 50 %
        (15.1, 10, 0.0),
        (0, 10, 0.0),
        (0, 0, 1.0),
        (0.1, 0, 0.0),
        (-10, 10, 0.0),
    ],
)
def test_relative_accuracy(prediction: float, truth: float, score: float) -> None:
    assert relative_accuracy(prediction, truth) == pytest.approx(score)


def test_first_word() -> None:
    assert [first_word(text) for text in ("B. chair", "B.", "4.5 metres", "12...", "")] == ["B", "B", "4.5", "12", ""]


def test_of_texts() -> None:
    assert mean_relative_accuracy("4 chairs", ["4"]) == 1
    assert mean_relative_accuracy("4.", ["4"]) == 1
    assert mean_relative_accuracy("four", ["4"]) == 0  # no number: the worst score
    assert mean_relative_accuracy("about 4", ["4"]) == 0  # the first word is none
    assert mean_relative_accuracy("nan", ["4"]) == 0
    assert mean_relative_accuracy("", ["4"]) == 0
    assert mean_relative_accuracy("4", ["many"]) == 0
    assert mean_relative_accuracy("4", ["8", "4"]) == 1
