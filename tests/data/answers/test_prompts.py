"""The answer is found where each style asks for it, and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.answers.prompts import PromptStyle, ask, boxed, extract, true_answer

DIRECT, MARKED, EN_V2, EN, R1 = PromptStyle


@pytest.mark.parametrize(
    ("style", "reply", "answer"),
    [
        (DIRECT, " orange\n", "orange"),
        (DIRECT, "**7**", "7"),
        (DIRECT, "", None),
        (DIRECT, " \n", None),
        (MARKED, "2 + 2 = 4.\n\nAnswer: 4", "4"),
        (MARKED, "Answer: 3\n**Final answer:** 4.5\n", "4.5"),
        (MARKED, "The answer: 4", None),
        (MARKED, "4", None),
        (EN_V2, "2 + 2 = 4.\nAnswer: \\boxed{4}", "4"),
        (EN_V2, "Answer: \\boxed{4}.\n", "4"),
        (EN_V2, "**Answer:** $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        (EN_V2, "**Answer**: \\boxed{\\text{red}}", "red"),
        (EN_V2, "Answer: \\boxed{3}\nNo: Answer: \\boxed{4}", "4"),
        (EN_V2, "Answer: \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        (EN_V2, "Answer: 4", None),
        (EN_V2, "\\boxed{4}", None),
        (EN_V2, "Answer: \\boxed{4", None),
        (EN_V2, "Answer: \\boxed{}", None),
        (EN_V2, "Answer: \\boxed{4} and so on", None),
        (EN_V2, "Answer: \\boxed{4}\nAnswer: five", None),
        (EN, "So it is 4.\nFinal answer: 4", "4"),
        (EN, "**Final Answer:** red", "red"),
        (EN, "Final answer: 3\nfinal answer: 4\n", "4"),
        (EN, "Answer: 4", None),
        (EN, "Final answer:", None),
        (EN, "4", None),
        (R1, "<think>2 + 2</think>\nIt is 4.\nAnswer: \\boxed{4}", "4"),
        (R1, "<think>2 + 2</think>4", "4"),
        (R1, "<think>\\boxed{3}</think>\nAnswer: 4", "4"),
        (R1, "<think>2 + 2</think>", None),
        (R1, "<think>2 + 2", None),
        (R1, "2 + 2</think>4", None),
        (R1, "4", None),
        (R1, "<think>a</think>b</think>4", None),
    ],
)
def test_extract(style: PromptStyle, reply: str, answer: str | None) -> None:
    assert extract(reply, style) == answer


@pytest.mark.parametrize("style", [EN_V2, EN, R1])
def test_instructions_show_the_form_that_is_read(style: PromptStyle) -> None:
    asked = ask("<image>\nHow many?", style)
    assert asked.startswith("<image>\nHow many?\n\n")
    form = asked.rsplit("\n", 1)[-1].replace("$FINAL_ANSWER", "7")
    reply = f"<think>Seven.</think>\n{form}" if style is R1 else f"Seven.\n{form}"
    assert extract(reply, style) == "7"
    assert ("<think>" in asked) == (style is R1)


def test_a_direct_question_is_asked_as_written() -> None:
    assert ask("How many?", DIRECT) == "How many?"


@st.composite
def nested(draw: st.DrawFn, depth: int = 3) -> str:
    """Texts with balanced braces and escaped ones."""
    parts = [st.sampled_from(["a", "1", "\\{", "\\}", "\\frac", " + ", "\\\\"])]
    if depth:
        parts.append(nested(depth - 1).map(lambda inner: f"{{{inner}}}"))
    return "x" + "".join(draw(st.lists(st.one_of(*parts), max_size=4))) + "y"


@given(nested(), st.text("ab \n", max_size=5), st.text("ab \n", max_size=5))
def test_boxes_are_read_to_their_own_brace(content: str, before: str, after: str) -> None:
    assert boxed(f"{before}\\boxed{{{content}}}{after}") == content
    assert boxed(f"\\boxed{{no}} {before}\\boxed{{{content}}}{after}") == content
    assert boxed(f"\\boxed{{{content}") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("orange", "orange"),
        (" 4 ", "4"),
        ("Steps.\nAnswer: \\boxed{4}", "4"),
        ("Steps.\nFinal answer: red", "red"),
        ("The answer: a riddle", "The answer: a riddle"),  # not at the beginning of a line
        ("", ""),
    ],
)
def test_true_answer(text: str, answer: str) -> None:
    assert true_answer(text) == answer
