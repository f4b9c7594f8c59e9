"""Pairs of a model's own answers: what is paired, what is left out, and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.preference_pairs import (
    JudgedAnswer,
    correctness_pairs,
    keep_beginning,
    pairs_per_question,
    thin_out,
    without_images,
)

REPLIES = st.lists(
    st.builds(
        lambda answer, right, readable: JudgedAnswer(
            f"so {answer}" if readable else answer, answer if readable else None, right and readable
        ),
        st.text("ab12", max_size=2),
        st.booleans(),
        st.booleans(),
    ),
    max_size=12,
)


def right(text: str) -> JudgedAnswer:
    return JudgedAnswer(text, text, True)


def wrong(text: str) -> JudgedAnswer:
    return JudgedAnswer(text, text, False)


def test_every_combination_while_there_is_room() -> None:
    replies = [right("4"), wrong("5"), right("four"), wrong("6")]
    found = correctness_pairs(replies, name="q", seed=0)
    assert sorted(found.pairs) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert (found.format_pairs, found.contained, found.duplicates, found.over_limit) == ([], 0, 0, 0)


@given(REPLIES, st.integers(0, 99), st.integers(1, 6))
def test_what_is_paired_and_what_is_counted(replies: list[JudgedAnswer], seed: int, max_pairs: int) -> None:
    found = correctness_pairs(replies, name="q", seed=seed, max_pairs=max_pairs)
    for pairs, readable in ((found.pairs, True), (found.format_pairs, False)):
        assert len(pairs) <= max_pairs
        assert len({(replies[c].text.strip(), replies[r].text.strip()) for c, r in pairs}) == len(pairs)
        for chosen, rejected in pairs:
            assert replies[chosen].correct
            assert not replies[rejected].correct
            assert (replies[rejected].answer is not None) == readable
            assert replies[rejected].text.strip()
            if readable:
                assert str(replies[chosen].answer) not in str(replies[rejected].answer)
    used = [reply for reply in replies if reply.text.strip()]
    num_correct = sum(reply.correct for reply in used)
    combinations = num_correct * (len(used) - num_correct)
    counted = found.contained + found.duplicates + found.over_limit
    assert len(found.pairs) + len(found.format_pairs) + counted == combinations
    assert found == correctness_pairs(replies, name="q", seed=seed, max_pairs=max_pairs)


def test_a_wrong_answer_that_holds_the_right_one_is_left_out() -> None:
    replies = [right("2"), wrong("12"), wrong("3"), right("Red"), wrong("dark red")]
    found = correctness_pairs(replies, name="q", seed=0)
    assert sorted(found.pairs) == [(0, 2), (0, 4), (3, 1), (3, 2)]
    assert found.contained == 2


def test_the_same_texts_are_paired_once() -> None:
    replies = [right("4"), right("4 "), wrong("5"), wrong("5")]
    found = correctness_pairs(replies, name="q", seed=0)
    assert len(found.pairs) == 1
    assert found.duplicates == 3


def test_unreadable_replies_are_a_set_of_their_own() -> None:
    cut = JudgedAnswer("Let me think", None, False)
    found = correctness_pairs([right("4"), wrong("5"), cut, JudgedAnswer(" ", None, False)], name="q", seed=0)
    assert (found.pairs, found.format_pairs) == ([(0, 1)], [(0, 2)])


def test_the_order_is_keyed_by_seed_and_question() -> None:
    replies = [right(f"r{i}") for i in range(8)] + [wrong(f"w{i}") for i in range(8)]
    chosen = {
        (seed, name): tuple(correctness_pairs(replies, name=name, seed=seed, max_pairs=5).pairs)
        for seed in (0, 1)
        for name in ("a/1", "a/2")
    }
    assert len(set(chosen.values())) == 4
    assert all(len(pairs) == 5 for pairs in chosen.values())
    assert correctness_pairs(replies, name="a/1", seed=0, max_pairs=5).over_limit == 64 - 5


def test_frequent_replies_are_paired_more_often() -> None:
    replies = [right("r")] + [wrong("often")] * 30 + [wrong("rarely")]
    first = [correctness_pairs(replies, name=str(i), seed=0, max_pairs=1).pairs[0][1] for i in range(200)]
    assert sum(rejected <= 30 for rejected in first) > 170


def test_fewer_pairs_where_there_are_very_many_replies() -> None:
    assert pairs_per_question(500_000) == 15
    assert pairs_per_question(500_001) == 3
    assert pairs_per_question(500_001, 2) == 2
    assert pairs_per_question(10, 7, many_replies=9, max_pairs_of_many=4) == 4


@given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 9))
def test_thinning_out(num_lines: int, max_lines: int, seed: int) -> None:
    kept = thin_out(num_lines, max_lines, seed).tolist()
    assert len(kept) == min(num_lines, max_lines)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(num_lines))


def test_thinning_out_takes_from_everywhere() -> None:
    kept = thin_out(10_000, 1000, 0)
    assert 400 < (kept < 5000).sum() < 600
    assert not (kept == thin_out(10_000, 1000, 1)).all()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one two three four", "one two"),
        ("one two three", "one"),
        ("one", ""),
        ("", ""),
        ("  one\n\n two  three\tfour five ", "  one\n\n two"),
    ],
)
def test_keeps_half_of_the_words(text: str, kept: str) -> None:
    assert keep_beginning(text) == kept


@given(st.text(" \n\tab", max_size=40), st.floats(0, 0.999))
def test_keeps_a_beginning_as_it_stands(text: str, ratio: float) -> None:
    kept = keep_beginning(text, ratio)
    assert text.startswith(kept)
    assert kept == kept.rstrip()
    assert len(kept.split()) == int(len(text.split()) * ratio)
    assert text.split()[: len(kept.split())] == kept.split()


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        keep_beginning("a b", ratio)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nWhat is this?", "What is this?"),
        ("<image> \nWhat?", "What?"),
        ("Is <image> like <image>?", "Is  like ?"),
        ("Image-1: <image>\nImage-2: <image>\nWhich?", "Image-1: \nImage-2: \nWhich?"),
        ("What is this?\n<image>", "What is this?\n"),
        ("No image", "No image"),
    ],
)
def test_without_images(question: str, expected: str) -> None:
    assert without_images(question) == expected
