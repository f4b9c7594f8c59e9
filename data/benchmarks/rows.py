"""Rows of answer files: JSON lists, JSON objects by question, or JSON lines.

[{"question_id": 7, "answer": "4", "annotation": ["4", "four"]}, …]    VQA, ChartQA, DocVQA as InternVL writes them
{"validation_Art_1": "B", …}      {"17": {"pid": "17", "response": …}, …}   MMMU; MathVista
{"data": [{…}, …]}                {"annotations": [{…}, …]}                 annotation files of DocVQA; of VQA
        │ read_rows
        ▼
Row: what the model said, the truths, and whatever else the benchmark asks for, under any of their usual keys
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_KEYS: tuple[str, ...] = ("prediction", "pred_answer", "answer", "predict", "response", "given", "pred", "text")
"""Where a row says what the model answered; the first that it has counts."""

TRUTH_KEYS: tuple[str, ...] = (
    *("annotation", "annotations", "gt_answers", "gt_answer", "ground_truth", "answers", "label", "truth"),
    *("expected", "answer_gt", "gt", "answer"),
)
"""Where a row says what is right; the first that it has counts. "answer" does so only where no other does."""

ID_KEYS = ("question_id", "questionId", "data_id", "pid", "index", "id")
_LISTS = ("data", "annotations", "questions", "results", "answers", "predictions")
_TIME = re.compile(r"_\d{12}$")


class RowError(ValueError):
    """A row that cannot be scored.

    Attributes:
        where: File and row.
        detail: What is wrong with it, and what would help.
    """

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.where = where
        self.detail = detail


@dataclass(frozen=True)
class Row:
    """One question of an answer file.

    Attributes:
        where: File and row, such as ``answers.json, row 3``.
        content: What the file says.
        split: The file's name, where several files are scored together; else None.
        answer_key: Key of the model's answer; by default the first of ``ANSWER_KEYS``.
        truth_key: Key of the truth; by default the first of ``TRUTH_KEYS``.
        annotation: What annotation files say about the question; None if there are none.
        extracted: The answer inside what the model said, where it has been looked for; else None.
    """

    where: str
    content: Mapping[str, Any]
    split: str | None = None
    answer_key: str | None = None
    truth_key: str | None = None
    annotation: Mapping[str, Any] | None = None
    extracted: str | None = None

    def answer(self) -> str:
        """Return what the model said; a number is written as text.

        Raises:
            RowError: The row does not say it, or it is no text.
        """
        if self.extracted is not None:
            return self.extracted
        keys = (self.answer_key,) if self.answer_key else self._answer_keys()
        key = next((key for key in keys if self.content.get(key) is not None), None)
        if key is None:
            raise RowError(self.where, f"no answer of the model: none of the keys {_quoted(keys)}")
        value = self.content[key]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(self.where, f"key '{key}' holds {_kind(value)} instead of the model's answer as text")
        return str(value)

    def truth(self) -> Any:
        """Return what is right, as written: from the annotations if there are any, else from the row.

        Raises:
            RowError: It is not said.
        """
        content = self.content if self.annotation is None else self.annotation
        keys = TRUTH_KEYS if self.annotation is not None or self._answer_is_truth() else TRUTH_KEYS[:-1]
        if self.truth_key is not None:
            keys = (self.truth_key,)
        for key in keys:
            if content.get(key) is not None:
                return content[key]
        raise RowError(
            self.where,
            f"no truth: none of the keys {_quoted(keys)}; give a file of truths with --annotations, or --truth-key",
        )

    def truths(self) -> list[str]:
        """Return all texts that are right: of a text or number, itself; of a list, its texts or their "answer".

        Raises:
            RowError: There is none, or something else than texts.
        """
        value = self.truth()
        values = value if isinstance(value, list) else [value]
        texts = [item.get("answer") if isinstance(item, dict) else item for item in values]
        wrong = [item for item in texts if isinstance(item, bool) or not isinstance(item, str | int | float)]
        if wrong or not any(str(text).strip() for text in texts):
            found = f"holds {_kind(wrong[0])}" if wrong else "is empty"
            raise RowError(self.where, f"the truth {found}; it must be a text, a number or a list of them")
        return [str(text) for text in texts]

    def get(self, *keys: str) -> Any:
        """Return the value of the first key that the row, or else its annotation, has; None if there is none.

        NaN, which pandas writes where a table has nothing, is no value.
        """
        for content in (self.content, self.annotation or {}):
            for key in keys:
                if not is_missing(content.get(key)):
                    return content[key]
        return None

    def text(self, *keys: str) -> str | None:
        """Return ``get`` as text without space around it; None if there is none, or it is empty."""
        value = self.get(*keys)
        return None if value is None or isinstance(value, dict | list) else str(value).strip() or None

    @property
    def id(self) -> str | None:
        """The question's id, as text."""
        value = next((self.content[key] for key in ID_KEYS if self.content.get(key) is not None), None)
        return None if value is None or isinstance(value, dict | list) else str(value)

    def _answer_is_truth(self) -> bool:
        """Whether "answer" is what is right: beside another answer and no other truth, as in MathVista and MMBench."""
        if self.annotation is not None or self.truth_key is not None:
            return self.truth_key == "answer" and self.annotation is None
        keys = (self.answer_key,) if self.answer_key else ANSWER_KEYS
        said = any(self.content.get(key) is not None for key in keys if key != "answer")
        return said and all(self.content.get(key) is None for key in TRUTH_KEYS[:-1])

    def _answer_keys(self) -> tuple[str, ...]:
        return tuple(key for key in ANSWER_KEYS if key != "answer") if self._answer_is_truth() else ANSWER_KEYS


def read_rows(
    file: Path, *, split: str | None = None, answer_key: str | None = None, truth_key: str | None = None
) -> Iterator[Row | RowError]:
    """Read an answer file; a row that is no JSON object comes as its error.

    Args:
        file: ``.jsonl``, or ``.json`` with a list or an object of rows (of objects, or of the answers alone).
        split: See ``Row``.
        answer_key: See ``Row``.
        truth_key: See ``Row``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file as a whole is no such JSON, or is empty.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no answer file at {file}")
    empty = True
    for where, content in _contents(file):
        empty = False
        if isinstance(content, RowError):
            yield content
        elif not isinstance(content, dict):
            yield RowError(where, f"{_kind(content)} instead of an object")
        else:
            yield Row(where, content, split, answer_key, truth_key)
    if empty:
        raise ValueError(f"{file} holds no rows")


def is_missing(value: Any) -> bool:
    """Whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def split_name(file: Path) -> str:
    """Return a file's name without its ending and the time that InternVL's scripts put behind it."""
    return _TIME.sub("", file.stem)


def _contents(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".jsonl":
        yield from _lines(file)
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if all(isinstance(item, dict) for _, item in _lines(file)):  # JSON lines under another name, as POPE's labels
            yield from _lines(file)
            return
        hint = "; if it is JSON lines, its name must end in .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{file} is not JSON ({error}){hint}") from error
    if isinstance(content, dict):
        listed = next((content[key] for key in _LISTS if isinstance(content.get(key), list)), None)
        if listed is None:
            for key, value in content.items():
                row = {**value, "id": value.get("id", key)} if isinstance(value, dict) else {"id": key, "answer": value}
                yield f"{file}, row '{key}'", row
            return
        content = listed
    if not isinstance(content, list):
        raise ValueError(f"{file} holds {_kind(content)}, not a list or object of rows")
    for number, item in enumerate(content, start=1):
        yield f"{file}, row {number}", item


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield where, json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    yield where, RowError(where, f"broken JSON ({error})")


def _quoted(keys: tuple[str, ...]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
