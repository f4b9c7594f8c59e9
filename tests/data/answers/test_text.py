"""Exact match, ANLS and VQA accuracy, on cases worked out by hand and against slow restatements."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.answers.text import anls, edit_distance, exact_match, normalize, normalize_vqa, vqa_accuracy

SHORT = st.text("abcA .é", max_size=7)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("Orange", "orange", 1),
        ("  two \n words ", "Two words", 1),
        ("orange.", "orange", 1),
        ('"orange"', "orange", 1),
        ("**orange**", "orange", 1),
        ("ＡＢＣ", "abc", 1),  # full width
        ("Straße", "STRASSE", 1),
        ("an orange", "orange", 0),
        ("orange", "orang", 0),
        ("3.5", "35", 0),
        ("-3", "3", 0),
        ("", "", 0),
        (".", "", 0),
        ("", "orange", 0),
    ],
)
def test_exact_match(prediction: str, truth: str, expected: float) -> None:
    assert exact_match(prediction, [truth]) == expected
    assert exact_match(truth, [prediction]) == expected


def test_any_truth_will_do() -> None:
    assert exact_match("b", ["a", "B"]) == 1
    assert anls("b", ["a", "B"]) == 1
    assert exact_match("c", ["a", "b"]) == anls("c", ["a", "b"]) == 0


@given(st.text(max_size=20))
def test_normalize_changes_nothing_twice(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


@settings(max_examples=60, deadline=None)
@given(SHORT, SHORT)
def test_edit_distance_by_its_recurrence(a: str, b: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == distance(len(a), len(b)) == edit_distance(b, a)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("Hello  World", "hello world", 1.0),
        ("hello wurld", "hello world", 10 / 11),
        ("abcd", "ab", 0.5),  # the threshold itself counts
        ("abcde", "ab", 0.0),  # 0.4 is below it
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls(prediction: str, truth: str, expected: float) -> None:
    assert anls(prediction, [truth]) == pytest.approx(expected)


def test_anls_takes_the_best_truth() -> None:
    assert anls("12/05", ["May 12", "12/06", "12-05-"]) == pytest.approx(4 / 5)


def test_vqa_accuracy_leaves_each_human_out() -> None:
    humans = ["red"] * 2 + ["dark red"] * 8
    # Leaving out one of the two: 1 match of 9, 1/3; leaving out another: 2 matches, 2/3.
    assert vqa_accuracy("red", humans) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert vqa_accuracy("dark red", humans) == 1.0
    assert vqa_accuracy("blue", humans) == vqa_accuracy("", humans) == 0.0
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == pytest.approx(1.0)
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * (2 / 3) + 7) / 10)


def test_vqa_with_a_single_truth_is_an_exact_match() -> None:
    assert vqa_accuracy("The two dogs.", ["2 dogs"]) == 1.0
    assert vqa_accuracy("three dogs", ["2 dogs"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Dog", "dog"),
        ("don't", "dont"),
        ("None", "0"),
        ("ten, or so", "10 or so"),
        ("1,000 people", "1000 people"),
        ("left-hand", "left hand"),
        ("left - hand", "left hand"),
        ("3.5 m.", "3.5 m"),
        ("(yes)", "yes"),
    ],
)
def test_normalize_vqa(text: str, expected: str) -> None:
    assert normalize_vqa(text) == expected


def test_vqa_looks_for_spaces_in_the_text_as_it_was_given() -> None:
    """A mark that has become a space is none for the marks after it: "-" has no space beside it in either of these."""
    assert normalize_vqa("(555)-123-4567") == normalize_vqa("(555) 123-4567") == "555 123 4567"
    assert vqa_accuracy("(555) 123-4567", ["(555)-123-4567"] * 10) == 1
