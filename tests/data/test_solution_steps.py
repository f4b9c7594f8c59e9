"""Solutions fall into the steps that the published pipeline makes, and the conversation has its published form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.solution_steps import MAX_STEPS, PRM_SYSTEM_PROMPT, SEPARATOR, judged_turns, split_steps


@pytest.mark.parametrize(
    ("solution", "max_steps", "steps"),
    [
        ("a\n\nb\n\nc", None, ["a", "b", "c"]),
        ("a\nb", None, ["a\nb"]),
        ("a\n\nb\n\nc", 2, ["a\n\nb", "c"]),
        ("a\n\nb\n\nc\n\nd\n\ne", 4, ["a\n\nb", "c\n\nd", "e"]),
        ("a\n\nb", 1, ["a\n\nb"]),
        ("a\n\n\n\nb\n\n \n\n", None, ["a", "b"]),
        (" \n\n", 3, []),
        ("", None, []),
    ],
)
def test_split_steps(solution: str, max_steps: int | None, steps: list[str]) -> None:
    assert split_steps(solution, max_steps) == steps


@given(st.lists(st.text("xy \n", min_size=1).filter(str.strip), max_size=60), st.integers(1, 20))
def test_steps_keep_the_text_and_the_limit(pieces: list[str], max_steps: int) -> None:
    whole = split_steps(SEPARATOR.join(pieces))
    merged = split_steps(SEPARATOR.join(pieces), max_steps)
    assert len(merged) <= max_steps
    assert SEPARATOR.join(merged) == SEPARATOR.join(whole)
    if whole:
        size = math.ceil(len(whole) / max_steps)
        assert [len(split_steps(step)) for step in merged[:-1]] == [size] * (len(merged) - 1)


def test_no_step_is_not_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match="max_steps = 0"):
        split_steps("a", 0)


def test_conversation() -> None:
    turns = judged_turns("How many?", ["One.", "Two."], ["+", "-"], num_images=1, system=PRM_SYSTEM_PROMPT)
    first = "### Question:\n<image>\nHow many?\n\n### Solution Process:\nOne."
    roles = ["system", "human", "gpt", "human", "gpt"]
    values = [PRM_SYSTEM_PROMPT, first, "+", "Two.", "-"]
    assert turns == tuple({"from": role, "value": value} for role, value in zip(roles, values, strict=True))
    assert judged_turns("<image> x", ["y"], ["+"], num_images=1, system=None)[0]["value"].count("<image>") == 1
    assert "<image>" not in judged_turns("x", ["y"], ["+"], num_images=0, system=None)[0]["value"]


def test_bad_conversations() -> None:
    with pytest.raises(ValueError, match="without steps"):
        judged_turns("x", [], [], num_images=0, system=None)
    with pytest.raises(ValueError, match="shorter"):
        judged_turns("x", ["y"], [], num_images=0, system=None)
    assert MAX_STEPS == 16
