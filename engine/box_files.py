"""Named tensors on disk, each cut into the boxes that the ranks held; read back under any other cut.

    tensors.json             {name: {"shape", "dtype", "boxes": [[rank, offset, size], …]}, …}
    rank-00000.safetensors   the boxes that rank 0 wrote, by name
    rank-00001.safetensors   …

Every box is stored once, whoever holds copies. A reader takes from each file only what overlaps its own box. Nothing
is executed on reading: safetensors and JSON, no pickle (which the metadata of ``torch.distributed.checkpoint`` is).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evovlm.parallel.pieces import Box, Piece, Spread

INDEX_FILE = "tensors.json"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor's boxes lie.

    Attributes:
        shape: Shape of the whole.
        dtype: Its dtype.
        boxes: (rank that wrote it, box) of each stored box; together they are the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[int, Box], ...]


def box_file(rank: int) -> str:
    """Name the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def share_out(spreads: Mapping[str, Spread]) -> dict[str, Stored]:
    """Decide which rank writes each box: of those that hold it, the one with least to write so far.

    Every rank decides the same from the same spreads.

    Raises:
        ValueError: A tensor has a dtype that is not stored.
    """
    load: dict[int, int] = {}
    table: dict[str, Stored] = {}
    for name, spread in spreads.items():
        if spread.dtype not in _DTYPES.values():
            raise ValueError(f"{name} is {spread.dtype}; a checkpoint stores {', '.join(_DTYPES)}")
        boxes = []
        for box, holders in spread.holders.items():
            writer = min(holders, key=lambda rank: load.get(rank, 0))
            load[writer] = load.get(writer, 0) + box.numel * spread.dtype.itemsize
            boxes.append((writer, box))
        table[name] = Stored(spread.shape, spread.dtype, tuple(boxes))
    return table


def snapshot(pieces: Mapping[str, Piece], table: Mapping[str, Stored], rank: int) -> dict[str, Tensor]:
    """Copy the boxes that a rank has to write to the CPU; training may go on while they are written."""
    return {
        name: pieces[name].local.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, stored in table.items()
        if any(writer == rank for writer, _ in stored.boxes)
    }


def write_boxes(folder: Path, rank: int, boxes: Mapping[str, Tensor]) -> None:
    """Write a rank's file; a rank without boxes has none."""
    if boxes:
        save_file(dict(boxes), folder / box_file(rank))


def write_index(folder: Path, table: Mapping[str, Stored]) -> None:
    """Write the table of all boxes, one tensor per line."""
    lines = (
        f"{json.dumps(name)}: "
        + json.dumps(
            {
                "shape": stored.shape,
                "dtype": str(stored.dtype).removeprefix("torch."),
                "boxes": [(rank, box.offset, box.size) for rank, box in stored.boxes],
            },
            separators=(",", ":"),
        )
        for name, stored in table.items()
    )
    (folder / INDEX_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


class BoxFiles:
    """A directory of boxes, open for reading.

    Attributes:
        folder: The directory.
        tensors: Name → where its boxes lie.

    Raises:
        FileNotFoundError: The index or a file that it names is missing.
        ValueError: The index is not one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Open files are memory-mapped and hold no descriptor, so there may be as many as ranks.
        self._open: dict[int, Any] = {}
        index = folder / INDEX_FILE
        if not index.is_file():
            raise FileNotFoundError(f"checkpoint {folder} is damaged: its index {INDEX_FILE} is missing")
        try:
            self.tensors = {name: _parse(entry) for name, entry in json.loads(index.read_text()).items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"checkpoint {folder} is damaged: {INDEX_FILE} is not an index ({error!r})") from error
        for rank in sorted({rank for stored in self.tensors.values() for rank, _ in stored.boxes}):
            if not (folder / box_file(rank)).is_file():
                raise FileNotFoundError(f"checkpoint {folder} is damaged: its shard {box_file(rank)} is missing")

    def fill(self, name: str, piece: Piece) -> None:
        """Fill a piece's local tensor in place, casting to its dtype; the caller has compared the shapes.

        Raises:
            ValueError: A file is cut short, lacks the box that the index places there, or the boxes leave a gap.
        """
        stored, filled = self.tensors[name], 0
        for rank, box in stored.boxes:
            shared = box.overlap(piece.box)
            if shared is not None:
                part = self._read(rank, name, box, shared.within(box))
                piece.local[shared.within(piece.box).slices].copy_(part)
                filled += shared.numel
        if filled < piece.box.numel:
            raise ValueError(
                f"checkpoint {self.folder} is damaged: its boxes of {name} hold {filled} of the {piece.box.numel} "
                f"elements at {list(piece.offset)}"
            )

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, on the CPU, in the dtype that was stored. Errors as :meth:`fill`."""
        stored = self.tensors[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self.fill(name, Piece(stored.shape, (0,) * len(stored.shape), whole))
        return whole

    def _read(self, rank: int, name: str, box: Box, part: Box) -> Tensor:
        file = box_file(rank)
        try:
            if rank not in self._open:
                self._open[rank] = safe_open(self.folder / file, framework="pt")
            stored = self._open[rank].get_slice(name)
            shape = tuple(stored.get_shape())
            tensor: Tensor = stored[part.slices] if shape == box.size else torch.empty(0)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {self.folder} is damaged: {file}, {name}: {error}") from error
        if shape != box.size:
            raise ValueError(
                f"checkpoint {self.folder} is damaged: {name} in {file} has shape {list(shape)}, "
                f"{INDEX_FILE} says {list(box.size)}"
            )
        return tensor


def _parse(entry: Mapping[str, Any]) -> Stored:
    boxes = tuple((int(rank), Box(tuple(offset), tuple(size))) for rank, offset, size in entry["boxes"])
    return Stored(tuple(entry["shape"]), _DTYPES[entry["dtype"]], boxes)


def read_tensors(path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Stream a checkpoint's tensors whole, one at a time, on the CPU; needs no process group.

    Args:
        path: A checkpoint's directory.
        prefix: Only tensors whose names begin so (``"model."``) are read; it is taken off their names.

    Raises:
        FileNotFoundError: The index or a file that it names is missing.
        ValueError: A file is damaged.
    """
    files = BoxFiles(path)
    for name in files.tensors:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), files.read(name)
