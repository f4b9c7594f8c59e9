"""Truths from files of their own, for answer files that do not hold them (TextVQA, POPE, MMMU's objects).

answer row {"question_id": 7, "answer": "4"}
    │ by its id
    ▼
VQA's annotations {"question_id": 7, "answers": [{"answer": "4"}, …]}            ─► truths
POPE: LLaVA's questions {"question_id": 7, "image": "a.jpg", "text": "Is …?"}    ─► image and question
    │ by image and question: the ids of the three files below start at 1 in each
    ▼
coco_pope_random.json {"question_id": 1, "image": "a.jpg", "text": "Is …?", "label": "no"}   ─► truth
    │ where several of one file look the same: that with the row's id
    ▼
one entry, or none: a truth that may be another question's is worse than a row that is not scored
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evovlm.data.benchmarks.rows import ID_KEYS, Row, RowError, read_rows

_Shown = tuple[str, str]


@dataclass(frozen=True)
class _Table:
    """One file: its entries by id, by image and whole question, and by image and first line of the question."""

    file: Path
    by_id: dict[str, Row]
    by_question: dict[_Shown, list[Row]]
    by_line: dict[_Shown, list[Row]]


class Annotations:
    """What annotation files say, found by question.

    Args:
        files: Read as answer files are. A row is looked up in one after the other: by image and question where both
            sides have them, else by id; what was found in one file helps to find it in the next. The whole question
            counts first, then its first line; of several entries that differ, the one with the row's id.

    Raises:
        FileNotFoundError: One of the files is not there.
        ValueError: One of them cannot be read, or a row of it is no object.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._tables = [_read(file) for file in files]

    def join(self, row: Row) -> Row:
        """Return a row with what the annotations say about its question; the row itself if there are no files.

        Raises:
            RowError: No file knows the question, or only several entries that the row's id does not tell apart.
        """
        if not self._tables:
            return row
        found: dict[str, Any] = {}
        alike = 0
        for table in self._tables:
            image, question = row.get("image"), row.get("question")
            shown = _shown(image or found.get("image"), question or found.get("question") or found.get("text"))
            if shown is not None and table.by_question:
                entries = table.by_question.get(shown) or table.by_line.get(_first_line(shown), [])
                entry = _same_or_by_id(entries, row.id)
                alike += len(entries) if entry is None else 0
            else:
                entry = table.by_id.get(row.id) if row.id is not None else None
            found = {**(entry.content if entry is not None else {}), **found}
        if not found:
            files = ", ".join(str(table.file) for table in self._tables)
            asked = f"question {row.id or '(without an id)'}"
            detail = f"has no id of the {alike} entries with its image and question in" if alike else "is not in"
            raise RowError(row.where, f"{asked} {detail} {files}")
        return replace(row, annotation=found)


def _read(file: Path) -> _Table:
    table = _Table(file, {}, {}, {})
    for row in read_rows(file):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        if row.id is not None:
            table.by_id.setdefault(row.id, row)
        if (shown := _shown(row.get("image"), row.get("question") or row.get("text"))) is not None:
            table.by_question.setdefault(shown, []).append(row)
            table.by_line.setdefault(_first_line(shown), []).append(row)
    return table


def _shown(image: Any, question: Any) -> _Shown | None:
    """Return image and question; None without both."""
    if not isinstance(image, str) or not isinstance(question, str):
        return None
    return image, question.strip()


def _first_line(shown: _Shown) -> _Shown:
    """Return image and first line of the question, behind which files put different instructions or its options."""
    image, question = shown
    return image, question.partition("\n")[0].strip()


def _same_or_by_id(entries: Sequence[Row], row_id: str | None) -> Row | None:
    """Return the entry with an id; any of them if nothing but the id tells them apart; else None."""
    for entry in entries:
        if entry.id is not None and entry.id == row_id:
            return entry
    said = [{key: value for key, value in entry.content.items() if key not in ID_KEYS} for entry in entries]
    return entries[0] if said and all(one == said[0] for one in said) else None
