"""Tables by columns: an array for each name, mapped from files of which only what is looked at takes memory.

    samples/num_tokens.bin   ▇▇▇▇▇▇▇▇▇▇▇▇     one column: planning walks through it and leaves the other files alone
    samples/num_tiles.bin    ▇▇▇▇▇▇
    samples/details.bin      ▇▁▃▇▁▃▇▁▃▇▁▃     several, packed row by row: what is wanted of one sample lies together

A row file gives columns too (``table["line"]`` steps over the rest of each row), but touching them at random would make
the whole file resident: the index reads its rows one by one (``evovlm.data.file_reader``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evovlm.data.index_format import REBUILD, IndexMismatchError


class Columns:
    """A table of named arrays of equal length.

    Args:
        columns: the arrays by name; they are not copied.
        label: name of the table in error messages.

    Raises:
        ValueError: no column, or columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]], label: str = "table") -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of a {label} need one length, got {lengths}")
        self._columns = dict(columns)
        self._label = label
        self._num_rows = next(iter(lengths.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def __getitem__(self, name: str, /) -> NDArray[Any]:
        """Return a column [rows], as it is stored; widen it after picking rows, before reckoning with them.

        Raises:
            KeyError: there is no such column.
        """
        try:
            return self._columns[name]
        except (KeyError, TypeError):
            raise KeyError(
                f"{self._label} has no column {name!r:.80}: columns are {', '.join(self.names)}; "
                "rows are picked from a column, as in table['num_tokens'][rows]"
            ) from None

    def __len__(self) -> int:
        return self._num_rows


def map_table(folder: Path, files: Mapping[str, np.dtype[Any]], num_rows: int) -> Columns:
    """Map a table that lies in ``folder``, a file ``NAME.bin`` for each entry of ``files``.

    Args:
        folder: of the table; its name is the table's in messages.
        files: dtype of each file's rows; a structured one gives a column for each of its fields.
        num_rows: rows of every file.

    Raises:
        IndexMismatchError: a file has another size.
    """
    columns: dict[str, NDArray[Any]] = {}
    for name, dtype in files.items():
        rows = map_file(folder / f"{name}.bin", dtype, num_rows)
        columns |= {name: rows} if dtype.names is None else {field: rows[field] for field in dtype.names}
    return Columns(columns, folder.name)


def map_file(file: Path, dtype: DTypeLike, count: int) -> NDArray[Any]:
    """Map ``count`` elements of a file, read-only.

    Raises:
        IndexMismatchError: the file does not hold exactly that many.
    """
    check_size(file, count * np.dtype(dtype).itemsize)
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)


def check_size(file: Path, expected: int) -> None:
    """Raise ``IndexMismatchError`` unless a file is there and has ``expected`` bytes."""
    size = file.stat().st_size if file.exists() else -1
    if size != expected:
        found = f"{size} bytes" if size >= 0 else "nothing"
        raise IndexMismatchError(f"'{file}' should hold {expected} bytes, found {found}: {REBUILD}")
