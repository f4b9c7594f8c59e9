"""Sampled answers on disk, one question a line: what a build that is started again does not sample again.

OUT/samples/rank-00000.jsonl   {"name": "charts/17", "revision": 0, …}   appended by rank 0 alone, flushed line by line
OUT/samples/rank-00001.jsonl   …                                         read by every rank

Of several lines with one name, in whichever files, that of the highest revision counts. A line that a killed rank left
torn ends without a newline: readers pass over it, its rank cuts it off before it writes. The number of ranks may differ
from start to start.
"""

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]
_BEGINNING = re.compile(rb'\{"name": ("(?:[^"\\]|\\.)*"), "revision": (\d+)[,}]')


class AnswerStore:
    """The lines of a folder of samples; use it in a ``with``, or call ``close``.

    Args:
        folder: It is made.
        rank: Whose file ``append`` writes.

    Raises:
        ValueError: A complete line does not begin with a name and a revision.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / f"rank-{rank:05d}.jsonl"
        self._out: BinaryIO | None = None
        self._files: dict[Path, BinaryIO] = {}
        self._places: dict[str, tuple[int, Path, int]] = {}  # revision, file, offset
        self.refresh()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._close_readers()
        if self._out is not None:
            self._out.close()
            self._out = None

    def refresh(self) -> None:
        """Find what all ranks have written by now."""
        self._close_readers()
        self._places.clear()
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.endswith(b"\n"):
                        name, revision = _name_and_revision(line, path, number)
                        if name not in self._places or revision >= self._places[name][0]:
                            self._places[name] = revision, path, offset
                    offset += len(line)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def get(self, name: str) -> Record | None:
        """Return the content of a question's line; None if there is none."""
        if name not in self._places:
            return None
        _, path, offset = self._places[name]
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = path.open("rb")
        file.seek(offset)
        record: Record = json.loads(file.readline())
        del record["name"], record["revision"]
        return record

    def append(self, name: str, content: Record) -> None:
        """Write a question's line; it replaces an earlier one."""
        if self._out is None:
            self._close_readers()
            _cut_torn_line(self._path)
            self._out = self._path.open("ab")
        offset = self._out.tell()
        revision = self._places[name][0] + 1 if name in self._places else 0
        line = json.dumps({"name": name, "revision": revision, **content}, ensure_ascii=False)
        self._out.write(line.encode() + b"\n")
        self._out.flush()
        self._places[name] = revision, self._path, offset

    def _close_readers(self) -> None:
        """Forget what is buffered: bytes of a torn line have been replaced, or will be."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _name_and_revision(line: bytes, path: Path, number: int) -> tuple[str, int]:
    found = _BEGINNING.match(line)
    if found is None:
        raise ValueError(f"{path}, line {number} is not a line of samples; remove it, or the file")
    name: str = json.loads(found[1])
    return name, int(found[2])


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = 0
        for line in file:
            content += len(line) if line.endswith(b"\n") else 0
        file.truncate(content)
