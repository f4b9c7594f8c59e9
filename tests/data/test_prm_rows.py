"""Lines of process reward data: keys, labels at the threshold, and the end at the first error."""

import json

from evovlm.data.annotation import parse_sample
from evovlm.data.prm_rows import conversation, labels, raw_row, until_first_error
from evovlm.data.step_rollouts import StepValue

VALUES = [StepValue("a = 1", 4, 4), StepValue("b = 2", 1, 4), StepValue("c = 3", 0, 4), StepValue("Answer: 6", 1, 1)]


def test_a_step_is_good_above_the_threshold() -> None:
    assert labels(VALUES, 0.0) == ["+", "+", "-", "+"]
    assert labels(VALUES, 0.25) == ["+", "-", "-", "+"]
    assert labels(VALUES, 0.2499) == ["+", "+", "-", "+"]


def test_the_first_error_ends_a_conversation() -> None:
    assert until_first_error(VALUES, 0.0) == VALUES[:3]
    assert until_first_error(VALUES, 0.5) == VALUES[:2]
    assert until_first_error(VALUES[:2], 0.0) == VALUES[:2]


def test_a_raw_row_has_the_published_keys() -> None:
    row = raw_row(VALUES[1:3], images=["/x/a.png"], question="Q?\n\nBox it.", question_orig="Q?", answer="6",
                  num_rollouts=4, source="d/1#0")  # fmt: skip
    assert row == {
        "image": "/x/a.png",
        "question": "Q?\n\nBox it.",
        "question_orig": "Q?",
        "answer": "6",
        "response": "b = 2\n\nc = 3",
        "steps_with_score": [
            {"step": "b = 2", "score": 0.25, "num_mc_correct": 1, "num_mc_total": 4},
            {"step": "c = 3", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 4},
        ],
        "num_mc_sequences": 4,
        "source": "d/1#0",
    }


def test_a_conversation_is_a_line_of_training_data() -> None:
    line = conversation(VALUES[2:], images=["a.png"], question="Q?", threshold=0.0, system="Judge.", source="d/1#0")
    assert line == {
        "id": "d/1#0",
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": "Judge."},
            {"from": "human", "value": "### Question:\n<image>\nQ?\n\n### Solution Process:\nc = 3"},
            {"from": "gpt", "value": "-"},
            {"from": "human", "value": "Answer: 6"},
            {"from": "gpt", "value": "+"},
        ],
    }
    sample = parse_sample(json.dumps(line), "d", 1)
    assert sample.images == ("a.png",)
    text = conversation(VALUES[:1], images=[], question="Q?", threshold=0.0, system=None, source="d/2#0")
    assert "image" not in text
    assert [turn["from"] for turn in text["conversations"]] == ["human", "gpt"]
    both = conversation(
        VALUES[:1], images=["a.png", "b.png"], question="<image><image>", threshold=0.0, system=None, source="d/3#0"
    )
    assert both["image"] == ["a.png", "b.png"]
