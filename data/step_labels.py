"""Solutions whose steps are labelled right or wrong: what a process reward model is measured against. JSONL, pure.

    {"question", "image", "steps_with_score": [{"step", "score"}, …]}                    rows of evovlm prm build:
                                             right iff score > threshold                 share of right rollouts
    {"question", "image", "response": {"steps": […], "process_correctness": [1, 0, -1]}}   VisualProcessBench:
                                             right, neutral (left out), wrong             people's labels

Each line is a solution. Image paths are relative to the file's folder unless told otherwise (spec §5.1, §5.2). Where a
question has images but no ``<image>``, one for each is put before it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evovlm.data.annotation import check_text, read_object
from evovlm.data.chat import IMAGE_PLACEHOLDER
from evovlm.data.errors import Reason, SampleError

Label = bool | None
"""Whether a step is right; None: neutral, shown to the model but not counted."""

_CORRECTNESS: Mapping[Any, Label] = {1: True, 0: None, -1: False}


@dataclass(frozen=True)
class LabelledSolution:
    """A question and one solution of it.

    Attributes:
        name: Its file and line, such as ``test.jsonl/17``.
        source: What it is counted under: the line's ``data_source``, or else the file's name.
        question: As a policy was asked, with an ``<image>`` for each image.
        images: Files of its images, in order.
        steps: At least one.
        labels: Of each step.
    """

    name: str
    source: str
    question: str
    images: tuple[Path, ...]
    steps: tuple[str, ...]
    labels: tuple[Label, ...]


def read_step_labels(
    path: Path, *, mc_threshold: float = 0.0, image_root: Path | None = None
) -> Iterator[LabelledSolution | SampleError]:
    """Read a file of labelled solutions; a line that cannot be used comes as its error.

    Args:
        path: The file; lines of both kinds may be mixed.
        mc_threshold: A step with a share of right rollouts is right iff that is above this.
        image_root: Where relative image paths begin; None: the file's folder.

    Yields:
        What each line that is not blank holds.

    Raises:
        FileNotFoundError: No such file.
    """
    root = path.absolute().parent if image_root is None else image_root.absolute()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            try:
                yield _read(raw, f"{path.name}/{number}", path.stem, root, mc_threshold)
            except SampleError as error:
                yield error


def _read(raw: bytes, where: str, stem: str, root: Path, mc_threshold: float) -> LabelledSolution:
    content = read_object(raw, where)
    question = content.get("question")
    if not isinstance(question, str):
        raise SampleError(Reason.MISSING_KEYS, "the line has no 'question' that is a text", where)
    images = content.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise SampleError(Reason.CONVERSATION, "'image' must be a path or a list of paths", where)
    if IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
    if "steps_with_score" in content:
        steps, labels = _from_rollouts(content["steps_with_score"], where, mc_threshold)
    else:
        steps, labels = _from_people(content.get("response"), where)
    if not steps:
        raise SampleError("no steps", "the solution has no steps", where)
    for text in (question, *images, *steps):
        check_text(where, text, "a text")
    source = content.get("data_source")
    return LabelledSolution(
        name=where,
        source=source if isinstance(source, str) and source else stem,
        question=question,
        images=tuple(root / image for image in images),
        steps=tuple(steps),
        labels=tuple(labels),
    )


def _from_rollouts(rows: Any, where: str, threshold: float) -> tuple[list[str], list[Label]]:
    """Read ``steps_with_score``."""
    steps: list[str] = []
    labels: list[Label] = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        step, score = (row.get("step"), row.get("score")) if isinstance(row, dict) else (None, None)
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not isinstance(step, str) or score is None or not is_number:
            detail = f"entry {number} of 'steps_with_score' must have a 'step' that is a text and a 'score', a number"
            raise SampleError(Reason.MISSING_KEYS, detail, where)
        steps.append(step)
        labels.append(score > threshold)
    return steps, labels


def _from_people(response: Any, where: str) -> tuple[list[str], list[Label]]:
    """Read a ``response`` with ``steps`` and ``process_correctness``; some copies hold it as JSON inside a text."""
    if isinstance(response, str):
        try:
            response = json.loads(response)
        except ValueError:
            response = None
    steps = response.get("steps") if isinstance(response, dict) else None
    correct = response.get("process_correctness") if isinstance(response, dict) else None
    if not isinstance(steps, list) or not isinstance(correct, list):
        detail = "the line has neither 'steps_with_score' nor a 'response' with 'steps' and 'process_correctness'"
        raise SampleError(Reason.MISSING_KEYS, detail, where)
    if len(steps) != len(correct):
        raise SampleError(Reason.CONVERSATION, f"{len(steps)} steps but {len(correct)} labels", where)
    for step, label in zip(steps, correct, strict=True):
        if not isinstance(step, str):
            raise SampleError(Reason.CONVERSATION, f"a step must be a text, not {step!r:.60}", where)
        if isinstance(label, bool) or not isinstance(label, int) or label not in _CORRECTNESS:
            raise SampleError(Reason.CONVERSATION, f"'process_correctness' is 1, 0 or -1, not {label!r:.60}", where)
    return steps, [_CORRECTNESS[label] for label in correct]
