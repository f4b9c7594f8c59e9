"""Truths from files of their own, for answer files that do not hold them (TextVQA, POPE, MMMU's objects).

answer row {"question_id": 7, "answer": "4"}
    │ by its id
    ▼
VQA's annotations {"question_id": 7, "answers": [{"answer": "4"}, …]}            ─► truths
POPE: LLaVA's questions {"question_id": 7, "image": "a.jpg", "text": "Is …?"}    ─► image and question
    │ by image and question: the ids of the three files below start at 1 in each
    ▼
coco_pope_random.json {"question_id": 1, "image": "a.jpg", "text": "Is …?", "label": "no"}   ─► truth
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evovlm.data.benchmarks.rows import Row, RowError, read_rows

_Shown = tuple[str, str]


@dataclass(frozen=True)
class _Table:
    file: Path
    by_id: dict[str, dict[str, Any]]
    by_question: dict[_Shown, dict[str, Any]]


class Annotations:
    """What annotation files say, found by question.

    Args:
        files: Read as answer files are. A row is looked up in one after the other: by image and question where both
            sides have them, else by id; what was found in one file helps to find it in the next.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: One of them cannot be read, or a row of it is no object.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._tables = [_read(file) for file in files]

    def join(self, row: Row) -> Row:
        """Return a row with what the annotations say about its question; the row itself if there are no files.

        Raises:
            RowError: No file knows the question.
        """
        if not self._tables:
            return row
        found: dict[str, Any] = {}
        for table in self._tables:
            image, question = row.content.get("image"), row.content.get("question")
            shown = _shown(image or found.get("image"), question or found.get("question") or found.get("text"))
            if shown is not None and table.by_question:
                entry = table.by_question.get(shown)
            else:
                entry = table.by_id.get(row.id) if row.id is not None else None
            found = {**(entry or {}), **found}
        if not found:
            files = ", ".join(str(table.file) for table in self._tables)
            raise RowError(row.where, f"question {row.id or '(without an id)'} is not in {files}")
        return replace(row, annotation=found)


def _read(file: Path) -> _Table:
    table = _Table(file, {}, {})
    for row in read_rows(file):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        content = dict(row.content)
        if row.id is not None:
            table.by_id.setdefault(row.id, content)
        if (shown := _shown(content.get("image"), content.get("question") or content.get("text"))) is not None:
            table.by_question.setdefault(shown, content)
    return table


def _shown(image: Any, question: Any) -> _Shown | None:
    """Return image and first line of the question, behind which files put different instructions; None without both."""
    if not isinstance(image, str) or not isinstance(question, str):
        return None
    return image, question.strip().partition("\n")[0].strip()
