"""From files to a report: bad rows are counted and listed, questions that come twice count once, splits are groups."""

from pathlib import Path
from typing import Any

import pytest

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.benchmarks.registry import BENCHMARKS, find_benchmark, score_files

from .answer_files import score, write

# Of each row the first key is what the model said, the second the truth.
SMALLEST: dict[str, dict[str, Any]] = {
    "mmmu": {"answer": "B", "gt_answers": "B"},
    "ai2d": {"answer": "B", "annotation": "B"},
    "mmbench": {"answer": "B", "gt_answers": "B"},
    "chartqa": {"answer": "101", "annotation": "100"},
    "docvqa": {"answer": "hello", "annotation": ["Hello"]},
    "infovqa": {"answer": "hello", "annotation": ["Hello"]},
    "textvqa": {"answer": "stop", "gt_answers": ["stop"] * 10},
    "vqa": {"answer": "stop", "annotation": ["stop"] * 10},
    "ocrbench": {"predict": "It says STOP", "answers": ["stop"]},
    "pope": {"text": "Yes", "label": "yes"},
    "refcoco": {"answer": "<box>[[0, 0, 500, 500]]</box>", "gt_bbox": [0, 0, 50, 100], "hw": [200, 100]},
    "screenspot": {"answer": "[[50, 50]]", "bbox": [0, 0, 20, 20], "hw": [100, 100]},
    "vsibench": {"prediction": "10", "ground_truth": "10"},
    "mathvista": {"response": "Answer: 7", "answer": "7"},
}


SAID_AND_TRUE = {name: tuple(row)[:2] for name, row in SMALLEST.items()}


def test_every_benchmark_has_its_smallest_row() -> None:
    assert set(SMALLEST) == set(BENCHMARKS)


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_row(name: str, tmp_path: Path) -> None:
    """The least that a row must have; as JSON and as JSON lines; the quoted metric is in the table."""
    for file in ("answers.json", "answers.jsonl"):
        report = score_files([write(tmp_path / file, [SMALLEST[name]])], name)
        assert report.score == 1
        assert report.table["overall"]["num"] == 1
        assert report.metric in report.table["overall"]


@pytest.mark.parametrize("name", SMALLEST)
def test_a_wrong_answer_scores_nothing(name: str, tmp_path: Path) -> None:
    said, _ = SAID_AND_TRUE[name]
    assert score(tmp_path, name, [SMALLEST[name] | {said: "No such thing"}]).score == 0


@pytest.mark.parametrize("name", SMALLEST)
def test_bad_rows_are_counted_and_listed(name: str, tmp_path: Path) -> None:
    """No answer, and no truth; what remains is scored."""
    good = SMALLEST[name]
    said, truth = SAID_AND_TRUE[name]
    rows = [good, *({key: value for key, value in good.items() if key != missing} for missing in (said, truth))]
    report = score(tmp_path, name, rows)
    assert (report.score, len(report.judged), len(report.bad)) == (1, 1, 2)
    assert [error.where.rpartition(", ")[2] for error in report.bad] == ["row 2", "row 3"]
    assert report.to_json()["num_bad"] == 2


def test_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 2 rows can be scored as DocVQA; the first: .*row 1: no truth"):
        score(tmp_path, "docvqa", [{"answer": "a"}, {"answer": "b"}])


def test_a_question_that_comes_twice_counts_once(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "question": "q", "answer": "a", "annotation": "a"},
        {"question_id": 2, "question": "r", "answer": "x", "annotation": "a"},
        {"question_id": 1, "question": "q", "answer": "a", "annotation": "a"},  # padding of the last batch
        {"question_id": 1, "question": "another", "answer": "a", "annotation": "a"},  # the id of an image, say
    ]
    report = score(tmp_path, "docvqa", rows)
    assert len(report.judged) == 3
    assert str(report.bad[0]).endswith("row 3: the question of " + report.judged[0].where + " again (id 1)")


def test_splits_are_groups(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "answer": "a", "annotation": "a"}]
    wrong = [{"question_id": 1, "answer": "b", "annotation": "a"}] * 1
    files = [write(tmp_path / "docvqa_val_240501123059.json", rows), write(tmp_path / "docvqa_more.json", wrong)]
    report = score_files(files, "docvqa")
    assert report.table == {
        "docvqa_val": {"ANLS": 1, "num": 1},
        "docvqa_more": {"ANLS": 0, "num": 1},
        "overall": {"ANLS": 0.5, "num": 2},
    }


def test_answers_inside_replies(tmp_path: Path) -> None:
    rows = [
        {"answer": "First …\nFinal answer: 7", "annotation": "7"},
        {"answer": "7", "annotation": "7"},  # not in the form that was asked for
    ]
    report = score(tmp_path, "chartqa", rows, style=PromptStyle.EN)
    assert [one.score for one in report.judged] == [1, 0]
    assert [one.given for one in report.judged] == ["7", ""]


def test_an_extracted_answer_does_not_turn_the_reply_into_the_truth(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no truth"):
        score(tmp_path, "chartqa", [{"answer": "Final answer: 7"}], style=PromptStyle.EN)


def test_unknown_benchmarks() -> None:
    with pytest.raises(ValueError, match="'chart-qa' is no benchmark: did you mean 'chartqa'"):
        find_benchmark("chart-qa")
    with pytest.raises(ValueError, match="'zzz' is no benchmark: there are mmmu, ai2d"):
        find_benchmark("zzz")


def test_a_question_that_failed_and_came_again_counts_once(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "annotation": "4"}, *[{"question_id": 1, "answer": "4", "annotation": "4"}] * 2]
    report = score(tmp_path, "chartqa", rows)
    assert (len(report.judged), report.score) == (1, 1)
    assert "row 1" in str(report.bad[0])
    assert "answers.json, row 2 again (id 1)" in str(report.bad[1])
