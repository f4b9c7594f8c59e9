"""Truths from files of their own: joined by id, and for POPE by image and question, since its files' ids collide."""

from pathlib import Path

import pytest

from evovlm.data.benchmarks.annotations import Annotations
from evovlm.data.benchmarks.rows import Row, RowError

from .answer_files import score, write


def test_by_id(tmp_path: Path) -> None:
    file = write(
        tmp_path / "val.json", {"annotations": [{"question_id": 7, "answers": [{"answer": "4"}, {"answer": "four"}]}]}
    )
    joined = Annotations([file]).join(Row("a, row 1", {"questionId": "7", "answer": "4"}))
    assert joined.truths() == ["4", "four"]
    assert joined.answer() == "4"


def test_without_files_a_row_stays_as_it_is() -> None:
    row = Row("a, row 1", {"answer": "4", "annotation": "4"})
    assert Annotations([]).join(row) is row


def test_a_question_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "val.json", [{"question_id": 7, "answers": ["4"]}])
    with pytest.raises(RowError, match=r"a, row 1: question 8 is not in .*val\.json"):
        Annotations([file]).join(Row("a, row 1", {"question_id": 8, "answer": "4"}))
    with pytest.raises(RowError, match=r"question \(without an id\) is not in"):
        Annotations([file]).join(Row("a, row 1", {"answer": "4"}))


def test_a_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_text("{\n")
    with pytest.raises(ValueError, match="line 1: broken JSON"):
        Annotations([file])


def test_pope_as_published(tmp_path: Path) -> None:
    """Answers by question_id; LLaVA's questions say image and category; three files with labels, ids from 1 in each."""
    instruction = "\nAnswer the question using a single word or phrase."
    questions = [
        {"question_id": 1, "image": "a.jpg", "text": f"Is there a dog?{instruction}", "category": "random"},
        {"question_id": 2, "image": "a.jpg", "text": f"Is there a cat?{instruction}", "category": "random"},
        {"question_id": 3, "image": "a.jpg", "text": f"Is there a car?{instruction}", "category": "popular"},
    ]
    labels = {
        "random": [("Is there a dog?", "yes"), ("Is there a cat?", "no")],
        "popular": [("Is there a car?", "no")],
    }
    files = [write(tmp_path / "llava_pope_test.jsonl", questions)]
    for category, pairs in labels.items():
        rows = [
            {"question_id": i, "image": "a.jpg", "text": text, "label": label}
            for i, (text, label) in enumerate(pairs, start=1)
        ]
        files.append(write(tmp_path / f"coco_pope_{category}.jsonl", rows))
    answers = [{"question_id": i, "text": text} for i, text in ((1, "Yes"), (2, "Yes"), (3, "No"))]
    report = score(tmp_path, "pope", answers, annotations=files)
    assert [(one.given, one.truth, one.groups) for one in report.judged] == [
        ("yes", "yes", ("random",)),
        ("yes", "no", ("random",)),
        ("no", "no", ("popular",)),
    ]


def test_mmmu_as_internvl_writes_it(tmp_path: Path) -> None:
    """An object of letters by id, and the answers in a file of their own."""
    answers = {"validation_Art_1": "B", "validation_Math_2": "x = 7"}
    truths = {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Math_2": {"question_type": "short-answer", "ground_truth": ["7", "seven"]},
    }
    report = score(tmp_path, "mmmu", answers, annotations=[write(tmp_path / "answer_dict_val.json", truths)])
    assert report.score == 1
    assert not report.bad


def asked(number: int, options: str, answer: str) -> dict[str, object]:
    return {"question_id": number, "image": "x.png", "question": f"Which is it?\n{options}", "answer": answer}


def test_questions_with_one_first_line_are_told_apart(tmp_path: Path) -> None:
    rows = [asked(1, "A. a cat\nB. a dog", "A"), asked(2, "A. a car\nB. a bus", "B")]
    truths = [{**row, "annotation": row["answer"]} for row in rows]
    for row in rows:
        row["question"] = "Which is it?"  # an answer file may leave the options out: then the id counts
    for given in (rows, [{**row, "question": truth["question"]} for row, truth in zip(rows, truths, strict=True)]):
        file = write(tmp_path / "val.json", truths)
        assert score(tmp_path, "ai2d", given, annotations=[file]).table["overall"]["accuracy"] == 1
    alone = {"image": "x.png", "question": "Which is it?", "answer": "A"}
    with pytest.raises(RowError, match="has no id of the 2 entries with its image and question"):
        Annotations([file]).join(Row("a, row 1", alone))


def test_no_entry_of_another_question_by_its_id(tmp_path: Path) -> None:
    """The id 3 is there, but of another image; it is none of those that look alike."""
    rows = [asked(1, "A. egg", "A"), asked(2, "A. moth", "A"), {**asked(3, "A. bus", "A"), "image": "y.png"}]
    annotations = Annotations([write(tmp_path / "val.json", rows)])
    with pytest.raises(RowError, match="question 3 has no id of the 2 entries"):
        annotations.join(Row("a, row 1", {"question_id": 3, "image": "x.png", "question": "Which is it?"}))


def test_the_whole_question_counts_before_the_id(tmp_path: Path) -> None:
    rows = [asked(1, "A. egg", "A"), asked(2, "A. moth", "B")]
    row = Row("a, row 1", {"question_id": 1, "image": "x.png", "question": "Which is it?\nA. moth\n"})
    assert Annotations([write(tmp_path / "val.json", rows)]).join(row).truths() == ["B"]


def test_entries_that_only_differ_in_their_id_are_one(tmp_path: Path) -> None:
    rows = [{"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"} for i in (1, 2)]
    row = Row("a, row 1", {"image": "a.jpg", "question": "Is there a dog?", "answer": "Yes"})
    assert Annotations([write(tmp_path / "val.jsonl", rows)]).join(row).truths() == ["yes"]


def test_a_question_of_pope_that_is_asked_in_several_categories(tmp_path: Path) -> None:
    """LLaVA's file has it once for each, under different ids."""
    questions = [
        {"question_id": i, "image": "a.jpg", "text": "Is there a dog?\nAnswer with one word.", "category": category}
        for i, category in ((1, "random"), (3001, "popular"))
    ]
    label = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
    files = [write(tmp_path / "llava_pope_test.jsonl", questions), write(tmp_path / "coco_pope.jsonl", [label])]
    answers = [{"question_id": i, "image": "a.jpg", "question": "Is there a dog?", "text": "Yes"} for i in (1, 3001)]
    report = score(tmp_path, "pope", answers, annotations=files)
    assert [(one.truth, one.groups) for one in report.judged] == [("yes", ("random",)), ("yes", ("popular",))]
