"""Columns of a table, mapped files and single reads: content, and errors that name the file and the numbers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from evovlm.data.columns import Columns, map_file, map_table
from evovlm.data.file_reader import FileReader
from evovlm.data.index_format import IndexMismatchError

PAIR = np.dtype([("left", "<i8"), ("right", "u1")])


def test_a_table_of_single_and_packed_columns(tmp_path: Path) -> None:
    folder = tmp_path / "things"
    folder.mkdir()
    counts = np.arange(7, dtype="<i2")
    pairs = np.zeros(7, PAIR)
    pairs["left"], pairs["right"] = counts.astype(np.int64) << 40, 255 - counts
    counts.tofile(folder / "count.bin")
    pairs.tofile(folder / "pairs.bin")
    table = map_table(folder, {"count": counts.dtype, "pairs": PAIR}, 7)
    assert (table.names, len(table)) == (("count", "left", "right"), 7)
    for name, wanted in (("count", counts), ("left", pairs["left"]), ("right", pairs["right"])):
        assert table[name].dtype == wanted.dtype
        np.testing.assert_array_equal(table[name], wanted)
        with pytest.raises(ValueError, match="read-only"):
            table[name][0] = 1


def test_an_unknown_column_names_those_there_are() -> None:
    table = Columns({"a": np.zeros(2), "b": np.zeros(2)}, "samples")
    with pytest.raises(KeyError, match="samples has no column 'c': columns are a, b; rows are picked from a column"):
        table["c"]
    for rows in (0, np.arange(2), slice(0, 1)):
        with pytest.raises(KeyError, match=r"samples has no column .*: columns are a, b"):
            table[rows]  # type: ignore[index]


def test_columns_need_one_length() -> None:
    with pytest.raises(ValueError, match=r"columns of a pair need one length, got \{'a': 2, 'b': 3\}"):
        Columns({"a": np.zeros(2), "b": np.zeros(3)}, "pair")
    with pytest.raises(ValueError, match="need one length"):
        Columns({})


def test_a_file_of_another_size_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    with pytest.raises(IndexMismatchError, match=r"x\.bin' should hold 12 bytes, found nothing: rebuild it"):
        map_file(file, "<i4", 3)
    file.write_bytes(bytes(11))
    with pytest.raises(IndexMismatchError, match=r"x\.bin' should hold 12 bytes, found 11 bytes: rebuild it"):
        map_file(file, "<i4", 3)
    file.write_bytes(b"")
    empty = map_file(file, "<i4", 0)
    assert (empty.dtype, empty.shape) == (np.dtype("<i4"), (0,))


def test_single_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    content = np.random.default_rng(0).bytes(5000)
    file.write_bytes(content)
    reader = FileReader(file)
    places = [(begin, size) for begin in (0, 17, 4990) for size in (0, 1, 10)]
    with ThreadPoolExecutor(4) as threads:  # one reader for all: no position to fight over
        found = list(threads.map(lambda place: reader.read(*place), places * 20))
    assert found == [content[begin : begin + size] for begin, size in places] * 20
    with pytest.raises(IndexMismatchError, match=r"x\.bin' was cut off: 11 bytes wanted from byte 4990 on, found 10"):
        reader.read(4990, 11)
    with pytest.raises(FileNotFoundError):
        FileReader(tmp_path / "y.bin")


def test_a_reader_closes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(b"abc")
    before = _open_files(file)
    reader = FileReader(file)
    assert _open_files(file) == before + 1
    del reader
    assert _open_files(file) == before


def _open_files(file: Path) -> int:
    """How often this process has a file open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.readlink() == file for link in links if link.is_symlink())  # that of the listing is gone
