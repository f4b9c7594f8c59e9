"""Files of labelled solutions: both layouts, and what is wrong with a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.errors import SampleError
from evovlm.data.prm_rows import raw_row
from evovlm.data.step_labels import LabelledSolution, read_step_labels
from evovlm.data.step_rollouts import StepValue

PEOPLE = {
    "image": ["images/a.png"],
    "question": "How many?",
    "answer": "3",
    "response": {"steps": ["One.", "Two.", "So 3."], "process_correctness": [1, 0, -1]},
    "policy_model": "x",
    "data_source": "MathVision",
}
ROLLOUTS = {
    "image": "a.png",
    "question": "<image>\nHow many?",
    "response": "One.\n\nTwo.",
    "steps_with_score": [{"step": "One.", "score": 0.5}, {"step": "Two.", "score": 0.0}],
}


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def read(file: Path, **options: Any) -> list[LabelledSolution | SampleError]:
    return list(read_step_labels(file, **options))


def test_labels_of_people(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path / "test.jsonl", PEOPLE))
    assert found == LabelledSolution(
        name="test.jsonl/1",
        source="MathVision",
        question="<image>\nHow many?",
        images=(tmp_path / "images/a.png",),
        steps=("One.", "Two.", "So 3."),
        labels=(True, None, False),
    )
    as_text = PEOPLE | {"response": json.dumps(PEOPLE["response"])}
    assert read(write(tmp_path / "test.jsonl", as_text)) == [found]


def test_labels_of_rollouts(tmp_path: Path) -> None:
    file = write(tmp_path / "charts.jsonl", ROLLOUTS, "", ROLLOUTS)
    first, second = read(file, image_root=tmp_path / "pictures")
    assert isinstance(first, LabelledSolution)
    assert isinstance(second, LabelledSolution)
    assert (first.name, second.name, first.source) == ("charts.jsonl/1", "charts.jsonl/3", "charts")
    assert first.question == "<image>\nHow many?"
    assert first.images == (tmp_path / "pictures/a.png",)
    assert first.labels == (True, False)
    (stricter,) = read(write(file, ROLLOUTS), mc_threshold=0.5)
    assert isinstance(stricter, LabelledSolution)
    assert stricter.labels == (False, False)


def test_what_prm_build_writes_is_read(tmp_path: Path) -> None:
    values = [StepValue("One.", 3, 4), StepValue("Two.", 0, 4)]
    row = raw_row(
        values, images=["/a.png"], question="Q", question_orig="Q", answer="2", num_rollouts=4, source="charts/1#0"
    )
    (found,) = read(write(tmp_path / "charts.jsonl", row))
    assert isinstance(found, LabelledSolution)
    assert (found.steps, found.labels) == (("One.", "Two."), (True, False))
    assert (found.images, found.question) == ((Path("/a.png"),), "<image>\nQ")


def test_images_get_their_placeholders(tmp_path: Path) -> None:
    two = PEOPLE | {"image": ["a.png", "b.png"]}
    none = {name: value for name, value in PEOPLE.items() if name != "image"}
    placed = two | {"question": "<image> or <image>?"}
    questions = [found.question for found in read(write(tmp_path / "x.jsonl", two, none, placed))]  # type: ignore[union-attr]
    assert questions == ["<image>\n<image>\nHow many?", "How many?", "<image> or <image>?"]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("{", "broken JSON", "not valid JSON"),
        ("[1]", "broken JSON", "JSON list"),
        (PEOPLE | {"question": None}, "missing keys", "no 'question'"),
        (PEOPLE | {"image": [3]}, "conversation", "'image' must be"),
        (PEOPLE | {"response": "So 3."}, "missing keys", "neither 'steps_with_score' nor a 'response' with 'steps'"),
        (
            PEOPLE | {"response": {"steps": ["a"], "process_correctness": [1, 1]}},
            "conversation",
            "1 steps but 2 labels",
        ),
        (PEOPLE | {"response": {"steps": ["a"], "process_correctness": [2]}}, "conversation", "1, 0 or -1, not 2"),
        (PEOPLE | {"response": {"steps": ["a"], "process_correctness": [True]}}, "conversation", "-1, not True"),
        (PEOPLE | {"response": {"steps": [7], "process_correctness": [1]}}, "conversation", "must be a text, not 7"),
        (PEOPLE | {"response": {"steps": [], "process_correctness": []}}, "no steps", "has no steps"),
        (ROLLOUTS | {"steps_with_score": []}, "no steps", "has no steps"),
        (ROLLOUTS | {"steps_with_score": [{"step": "a"}]}, "missing keys", "entry 1 of 'steps_with_score'"),
        (ROLLOUTS | {"steps_with_score": [{"step": "a", "score": "1"}]}, "missing keys", "entry 1"),
        (ROLLOUTS | {"steps_with_score": 3}, "missing keys", "entry 1"),
        (ROLLOUTS | {"question": "\ud800"}, "broken JSON", "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(tmp_path: Path, line: Any, reason: str, message: str) -> None:
    found = read(write(tmp_path / "x.jsonl", line, PEOPLE))
    error, good = found
    assert isinstance(error, SampleError)
    assert (error.reason, error.name) == (reason, "x.jsonl/1")
    assert message in error.detail
    assert isinstance(good, LabelledSolution)
