"""``evovlm evaluate ANSWERS --benchmark``: the table, the list of bad rows, and the files that --out writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.launch import cli


def write(file: Path, rows: Any) -> Path:
    file.write_text(json.dumps(rows))
    return file


def evaluate(*words: str | Path) -> int:
    return cli.main(["evaluate", *map(str, words)])


def cells(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first)]
    return line.split()


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"split": "human", "answer": "104", "annotation": "100"},
        {"split": "human", "answer": "no", "annotation": "yes"},
        {"split": "augmented", "answer": "yes", "annotation": "Yes"},
        {"split": "augmented", "annotation": "Yes"},
    ]
    file, out = write(tmp_path / "a.json", rows), tmp_path / "scores" / "chartqa.json"
    assert evaluate(file, "--benchmark", "chartqa", "--out", out) == 0
    said = capsys.readouterr().out
    assert "ChartQA" in said
    assert cells(said, "human") == ["human", "50.0%", "2"]
    assert cells(said, "augmented") == ["augmented", "100.0%", "1"]
    assert cells(said, "overall") == ["overall", "75.0%", "3"]
    assert "1 of 4 rows cannot be scored and do not count:" in said
    assert f"{file}, row 4: no answer of the model" in said
    content = json.loads(out.read_text())
    assert (content["score"], content["metric"], content["num_scored"], content["num_bad"]) == (
        0.75,
        "relaxed accuracy",
        3,
        1,
    )
    assert content["files"] == [str(file)]
    assert content["groups"]["human"] == {"relaxed accuracy": 0.5, "num": 2}
    lines = [json.loads(line) for line in (tmp_path / "scores" / "chartqa.rows.jsonl").read_text().splitlines()]
    assert [(line["given"], line["truth"], line["score"]) for line in lines] == [
        ("104", "100", 1),
        ("no", "yes", 0),
        ("yes", "Yes", 1),
    ]


def test_splits_annotations_prompt_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        write(tmp_path / f"{name}.json", [{"question_id": 1, "said": f"Step.\nFinal answer: {answer}"}])
        for name, answer in (("val", "hello"), ("more", "bye"))
    ]
    truths = write(tmp_path / "truths.json", [{"question_id": 1, "right": ["Hello"]}])
    more = ["--annotations", truths, "--prompt", "en", "--answer-key", "said", "--truth-key", "right"]
    assert evaluate(*files, "--benchmark", "docvqa", *more) == 0
    said = capsys.readouterr().out
    assert cells(said, "val") == ["val", "100.0%", "1"]
    assert cells(said, "more") == ["more", "0.0%", "1"]
    assert cells(said, "overall") == ["overall", "50.0%", "2"]


def test_counts_are_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OCRBench is quoted as a number of right answers, also where that is 0 or 1."""
    for right in (0, 1, 2):
        rows = [{"predict": "stop" if i < right else "", "answers": ["stop"]} for i in range(4)]
        assert evaluate(write(tmp_path / "a.json", rows), "--benchmark", "ocrbench") == 0
        assert cells(capsys.readouterr().out, "overall") == ["overall", str(right), f"{right / 4:.1%}", "4"]


def test_many_bad_rows_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"answer": "a", "annotation": "a"}, *({"answer": "a"} for _ in range(8))]
    assert evaluate(write(tmp_path / "a.json", rows), "--benchmark", "docvqa") == 0
    said = capsys.readouterr().out
    assert "8 of 9 rows" in said
    assert said.count("no truth") == 5
    assert "… and 3 more: --out FILE.json lists all" in said


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.json", [{"answer": "a"}])
    cases: list[tuple[list[str | Path], str]] = [
        ([file, "--benchmark", "docvq"], "'docvq' is no benchmark: did you mean 'docvqa'"),
        ([file, "--benchmark", "docvqa"], "none of 1 rows can be scored as DocVQA"),
        ([tmp_path / "b.json", "--benchmark", "docvqa"], "no answer file at"),
        ([file, "--benchmark", "docvqa", "--annotations", tmp_path / "b.json"], "no answer file at"),
    ]
    for words, message in cases:
        assert evaluate(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
