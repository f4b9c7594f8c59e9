"""Candidate files: what is written is read again, every bad line is told, and another question set is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.candidates import (
    Candidate,
    CandidateSet,
    StepScore,
    check_same_questions,
    from_json,
    read_candidates,
    to_json,
    write_candidates,
)
from evovlm.data.errors import SampleError

numbers = st.floats(-5, 5)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
steps = st.lists(st.builds(StepScore, texts, numbers), max_size=3).map(tuple)
judged = st.builds(lambda score, answer: {"score": score, "answer": answer}, numbers, st.none() | texts)
candidates = st.builds(
    lambda verdict, **others: Candidate(**others, **verdict),
    st.just({}) | judged,
    text=texts,
    finished=st.booleans(),
    num_tokens=st.none() | st.integers(0, 99),
    steps=st.none() | steps,
    reward=st.none() | numbers,
    unscored=st.none() | texts,
)
sets = st.builds(
    CandidateSet,
    name=texts,
    question=texts,
    images=st.lists(st.sampled_from([Path("/a/b.png"), Path("/c d.jpg")]), max_size=3).map(tuple),
    candidates=st.lists(candidates, min_size=1, max_size=3).map(tuple),
    truth=st.none() | texts,
    system=st.none() | texts,
)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(**changes: Any) -> dict[str, Any]:
    return {"name": "a/1", "question": "What?", "candidates": [{"text": "This."}], **changes}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sets)
def test_a_line_is_read_as_it_was_written(made: CandidateSet) -> None:
    assert from_json(to_json(made), "here", Path("/elsewhere")) == made


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = [
        CandidateSet("a/1", "What is it?\u2028Say.", (tmp_path / "a.png",), (Candidate("This."), Candidate(""))),
        CandidateSet("a/2", "Why?", (), (Candidate("So.", score=0.0, answer=None),), truth="x"),
    ]
    assert write_candidates(tmp_path / "new" / "file.jsonl", iter(made)) == 2
    assert list(read_candidates(tmp_path / "new" / "file.jsonl")) == made


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    made = CandidateSet("a/1", "What?", (), (Candidate("This."),))
    write_candidates(tmp_path / "file.jsonl", [made])

    def broken() -> Any:
        yield replace(made, question="Other?")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(tmp_path / "file.jsonl", broken())
    assert list(read_candidates(tmp_path / "file.jsonl")) == [made]
    assert [path.name for path in tmp_path.iterdir()] == ["file.jsonl"]


def test_short_forms_and_strange_keys_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", "  ", line(image="a.png", candidates=["one", {"text": "two", "id": 3}], id=7))
    (made,) = read_candidates(path)
    assert made == CandidateSet("a/1", "What?", (tmp_path / "a.png",), (Candidate("one"), Candidate("two")))
    (made,) = read_candidates(path, image_root=tmp_path / "images")
    assert isinstance(made, CandidateSet)
    assert made.images == (tmp_path / "images" / "a.png",)


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        ("{", "broken JSON", "not valid JSON"),
        ("[]", "broken JSON", "a JSON list, not an object"),
        ('{"name": "\\ud800", "question": "", "candidates": ["a"]}', "broken JSON", "half a surrogate"),
        ({"question": "What?"}, "missing keys", "no 'name' and no 'candidates'"),
        (line(candidates=[]), "no candidates", "at least one solution"),
        (line(candidates={"text": "This."}), "no candidates", "must be a list"),
        (line(candidates=[{}]), "missing keys", "a candidate has no 'text'"),
        (line(candidates=[3]), "conversation", "a candidate must be an object, not 3"),
        (line(candidates=[{"text": 3}]), "conversation", "'text' must be a text, not 3"),
        (line(candidates=[{"text": "\ud800"}]), "broken JSON", "a candidate holds half a surrogate"),
        (line(candidates=[{"text": "a", "finished": 1}]), "conversation", "'finished' must be true or false"),
        (line(candidates=[{"text": "a", "num_tokens": True}]), "conversation", "'num_tokens' must be a whole number"),
        (line(candidates=[{"text": "a", "reward": "high"}]), "conversation", "'reward' must be a number"),
        (line(candidates=[{"text": "a", "score": float("nan")}]), "conversation", "'score' must be a number"),
        (line(candidates=[{"text": "a", "steps": [{"step": "a"}]}]), "missing keys", "a step has no 'score'"),
        (line(candidates=[{"text": "a", "steps": ["a"]}]), "conversation", "a step must be an object"),
        (line(question=3), "conversation", "'question' must be a text"),
        (line(image=[3]), "conversation", "'image' must be a path or a list of paths"),
        (line(answer_gt=12), "conversation", "'answer_gt' must be a text, not 12"),
        (line(name="a/0"), "duplicate name", "'a/0' stands in line 1 already"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path: Path, bad: Any, reason: str, message: str) -> None:
    path = write(tmp_path / "file.jsonl", line(name="a/0"), bad, line(name="a/2"))
    first, error, last = read_candidates(path)
    assert [made.name for made in (first, last)] == ["a/0", "a/2"]
    assert isinstance(error, SampleError)
    assert (error.reason, error.name) == (reason, "file.jsonl/2")
    assert message in str(error)


def test_the_same_questions_pass_whatever_their_order_and_placeholders() -> None:
    there = [
        CandidateSet("a/2", "<image>\nWhat  is it?", (), (Candidate("This."),)),
        CandidateSet("a/1", "Why?", (), (Candidate("So."),)),
    ]
    check_same_questions(there, {"a/1": "Why?\n", "a/2": "What is it?"})


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ({"a/1": "Why?"}, r"1 of its 2 names are no questions \(first: 'a/2'\)\. Use"),
        ({"a/1": "Why?", "a/2": "What?", "b/1": "x", "b/2": "y"}, r"2 of 4 questions have no line \(first: 'b/1'\)"),
        ({"a/1": "Why not?", "a/2": "What?"}, r"1 questions have another text \(first: 'a/1': 'Why\?' against 'Why n"),
        ({"c/1": "x"}, r"2 of its 2 names are no questions .*; 1 of 1 questions have no line \(first: 'c/1'\)"),
    ],
)
def test_another_question_set_is_refused(questions: dict[str, str], message: str) -> None:
    there = [CandidateSet(name, text, (), (Candidate("So."),)) for name, text in (("a/1", "Why?"), ("a/2", "What?"))]
    with pytest.raises(ValueError, match="candidate file of another question set") as raised:
        check_same_questions(there, questions)
    assert raised.match(message)
