"""Candidate files: several solutions to each question, with what rules and critics made of them. JSONL, pure.

    {"name": "charts/17", "question": "<image>\\nHow many …?", "image": ["a.png"], "answer_gt": "5",
     "candidates": [{"text": "So a = 2.\\n\\nAnswer: 5", "finished": true, "num_tokens": 11}, …]}     as generated
                     + "answer": "5", "score": 1.0                                                  judged by a rule
                     + "steps": [{"step": "So a = 2.", "score": 0.98}, …], "reward": 0.97           scored by a critic
                     + "unscored": "why a critic could not"                                         or not

Only ``name``, ``question``, ``candidates`` and their ``text`` must be there. Image paths are written absolute;
relative ones stand in the file's folder. Keys other than these are passed over, and not written again.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evovlm.data.annotation import check_text, read_object
from evovlm.data.chat import IMAGE_PLACEHOLDER
from evovlm.data.errors import Reason, SampleError


@dataclass(frozen=True)
class StepScore:
    """A step of a solution and P("+"), in [0, 1], of the solution up to and including it."""

    step: str
    score: float


@dataclass(frozen=True)
class Candidate:
    """One solution.

    Attributes:
        text: The whole reply.
        finished: Whether the model ended it by itself.
        num_tokens: Tokens that the model made; None: not known.
        answer: What a rule read as its answer; None: not judged, or not readable.
        score: The rule's verdict; None: not judged.
        steps: What a critic made of each step; None: not scored.
        reward: The steps' scores reduced to one; None: not scored.
        unscored: Why a critic could not score it.
    """

    text: str
    finished: bool = True
    num_tokens: int | None = None
    answer: str | None = None
    score: float | None = None
    steps: tuple[StepScore, ...] | None = None
    reward: float | None = None
    unscored: str | None = None


@dataclass(frozen=True)
class CandidateSet:
    """A question and its candidates: a line of a candidate file.

    Attributes:
        name: Of the question, such as ``charts/17``; differs from line to line.
        question: Its text, as a policy was asked, with an ``<image>`` for each image.
        images: Files of its images, in order.
        candidates: At least one.
        truth: The reference answer; None: not known.
        system: System turn that the question brings itself; None: none.
    """

    name: str
    question: str
    images: tuple[Path, ...]
    candidates: tuple[Candidate, ...]
    truth: str | None = None
    system: str | None = None


def read_candidates(path: Path, image_root: Path | None = None) -> Iterator[CandidateSet | SampleError]:
    """Read a candidate file; a line that cannot be used comes as its error.

    Args:
        path: The file.
        image_root: Where relative image paths begin; None: the file's folder.

    Yields:
        What each line that is not blank holds. Errors bear the name ``FILE/LINE``; their reasons are ``BROKEN_JSON``,
        ``MISSING_KEYS``, ``CONVERSATION`` (a key of another kind), "no candidates" and "duplicate name".

    Raises:
        FileNotFoundError: No such file.
    """
    root = path.absolute().parent if image_root is None else image_root.absolute()
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            where = f"{path.name}/{number}"
            try:
                made = from_json(raw, where, root)
            except SampleError as error:
                yield error
                continue
            first = lines.setdefault(made.name, number)
            if first != number:
                detail = f"the question '{made.name}' stands in line {first} already: give each line a name of its own"
                yield SampleError("duplicate name", detail, where)
                continue
            yield made


def write_candidates(path: Path, sets: Iterable[CandidateSet]) -> int:
    """Write a candidate file, all of it or none.

    Returns:
        Its lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for made in sets:
                file.write(to_json(made) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def to_json(made: CandidateSet) -> str:
    """Write a line, without its newline; what is not known is left out."""
    content: dict[str, Any] = {"name": made.name, "question": made.question}
    content["image"] = [str(image.absolute()) for image in made.images]
    content |= _known(system=made.system, answer_gt=made.truth)
    content["candidates"] = [candidate_json(candidate) for candidate in made.candidates]
    return json.dumps(content, ensure_ascii=False)


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as it stands in its line."""
    content: dict[str, Any] = {"text": candidate.text, "finished": candidate.finished}
    content |= _known(num_tokens=candidate.num_tokens)
    if candidate.score is not None:
        content |= {"answer": candidate.answer, "score": candidate.score}
    if candidate.steps is not None:
        content["steps"] = [{"step": step.step, "score": step.score} for step in candidate.steps]
    return content | _known(reward=candidate.reward, unscored=candidate.unscored)


def from_json(raw: bytes | str, where: str, root: Path) -> CandidateSet:
    """Read a line.

    Args:
        raw: The line.
        where: What error messages call it.
        root: Where relative image paths begin.

    Raises:
        SampleError: The line cannot be used.
    """
    content = read_object(raw, where)
    _need(content, ("name", "question", "candidates"), where, "the line")
    name, question = (_get(content, key, str, where) for key in ("name", "question"))
    images = content.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise SampleError(Reason.CONVERSATION, "'image' must be a path or a list of paths", where)
    for text in (name, question, *images):
        check_text(where, text, "a text")
    if not isinstance(content["candidates"], list) or not content["candidates"]:
        raise SampleError("no candidates", "'candidates' must be a list of at least one solution", where)
    return CandidateSet(
        name=name,
        question=question,
        images=tuple(root / image for image in images),
        candidates=tuple(candidate_from_json(candidate, where) for candidate in content["candidates"]),
        truth=_get(content, "answer_gt", str, where),
        system=_get(content, "system", str, where),
    )


def candidate_from_json(content: Any, where: str) -> Candidate:
    """Read a candidate: an object, or its text alone.

    Raises:
        SampleError: It cannot be used.
    """
    content = {"text": content} if isinstance(content, str) else content
    if not isinstance(content, dict):
        raise SampleError(Reason.CONVERSATION, f"a candidate must be an object, not {content!r:.60}", where)
    _need(content, ("text",), where, "a candidate")
    text = _get(content, "text", str, where)
    check_text(where, text, "a candidate")
    steps = _get(content, "steps", list, where)
    finished = _get(content, "finished", bool, where)
    return Candidate(
        text=text,
        finished=finished is not False,
        num_tokens=_get(content, "num_tokens", int, where),
        answer=_get(content, "answer", str, where),
        score=_number(content, "score", where),
        steps=None if steps is None else tuple(_step(step, where) for step in steps),
        reward=_number(content, "reward", where),
        unscored=_get(content, "unscored", str, where),
    )


def check_same_questions(sets: Iterable[CandidateSet], questions: Mapping[str, str]) -> None:
    """Check that a candidate file is of the very questions that it is used for.

    Args:
        sets: The file's lines.
        questions: Text of each question by its name. ``<image>`` and white space are not compared: a single image's
            placeholder may be left out.

    Raises:
        ValueError: Names or texts differ; the message says how many do, and shows the first.
    """
    there = {made.name: made.question for made in sets}
    strange = [name for name in there if name not in questions]
    lacking = [name for name in questions if name not in there]
    changed = [name for name, text in there.items() if name in questions and _bare(text) != _bare(questions[name])]
    faults = []
    if strange:
        faults.append(f"{len(strange)} of its {len(there)} names are no questions (first: '{strange[0]}')")
    if lacking:
        faults.append(f"{len(lacking)} of {len(questions)} questions have no line (first: '{lacking[0]}')")
    if changed:
        name = changed[0]
        shown = f"'{name}': {there[name][:60]!r} against {questions[name][:60]!r}"
        faults.append(f"{len(changed)} questions have another text (first: {shown})")
    if faults:
        raise ValueError(
            f"candidate file of another question set: {'; '.join(faults)}. "
            "Use the questions, the limit and the prompt style that the candidates were made with"
        )


def _bare(question: str) -> list[str]:
    return question.replace(IMAGE_PLACEHOLDER, " ").split()


def _known(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _need(content: dict[str, Any], keys: tuple[str, ...], where: str, what: str) -> None:
    lacking = [key for key in keys if content.get(key) is None]
    if lacking:
        raise SampleError(Reason.MISSING_KEYS, f"{what} has no {' and no '.join(map(repr, lacking))}", where)


def _get(content: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """Return a value of the kind, or None."""
    value = content.get(key)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise SampleError(Reason.CONVERSATION, f"'{key}' must be {_KINDS[kind]}, not {value!r:.60}", where)
    return value


_KINDS = {str: "a text", list: "a list", bool: "true or false", int: "a whole number"}


def _number(content: dict[str, Any], key: str, where: str) -> float | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SampleError(Reason.CONVERSATION, f"'{key}' must be a number, not {value!r:.60}", where)
    return float(value)


def _step(content: Any, where: str) -> StepScore:
    if not isinstance(content, dict):
        raise SampleError(Reason.CONVERSATION, f"a step must be an object, not {content!r:.60}", where)
    _need(content, ("step", "score"), where, "a step")
    step, score = _get(content, "step", str, where), _number(content, "score", where)
    assert score is not None  # as `_need` says
    return StepScore(step, score)
