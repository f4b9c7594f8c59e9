"""Sharded safetensors, streamed: never more than one shard open for reading or held for writing.

read    index ─► headers of all shards (names, shapes: everything is checked here) ─► shard after shard, tensor
        after tensor ─► (name, tensor)
write   (name, tensor) … ─► buffer of one shard ─► model-00001-of-0000N.safetensors … ─► index
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evovlm.models.hf.names import LM_HEAD, Shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Buffers that older checkpoints store although they follow from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".position_ids")


class CheckpointError(ValueError):
    """A checkpoint directory is incomplete, damaged or not that of the configured model."""


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open one safetensors file, memory-mapped.

    Raises:
        CheckpointError: The file is cut short or not in the safetensors format.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    with file as shard:
        yield shard


@dataclass(frozen=True)
class Shards:
    """The tensors of a directory: where each lies and how it is shaped.

    Attributes:
        directory: The checkpoint.
        files: File of each tensor, by the name it has there, in the order of reading.
        shapes: Shape of each tensor, by the name it has there.
    """

    directory: Path
    files: dict[str, Path]
    shapes: Shapes

    @classmethod
    def open(cls, directory: str | Path) -> "Shards":
        """Read the index and every shard's header, but no tensor.

        Raises:
            CheckpointError: No safetensors there, a shard of the index is missing or damaged, or a shard lacks a
                tensor that the index promises.
        """
        directory = Path(directory)
        index = directory / INDEX
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            paths = [directory / name for name in sorted(set(weight_map.values()))]
            if missing := [path.name for path in paths if not path.exists()]:
                raise CheckpointError(
                    f"{directory}: {len(missing)} of {len(paths)} shards that {INDEX} names are missing: "
                    f"{_some(missing)}; copy them or fetch the checkpoint again"
                )
        elif (directory / SINGLE).exists():
            weight_map, paths = {}, [directory / SINGLE]
        else:
            found = sorted(path.name for path in directory.glob("*.bin"))
            hint = f"; convert {found[0]} first" if found else ""
            raise CheckpointError(f"{directory}: no weights: neither {INDEX} nor {SINGLE}{hint}")
        files: dict[str, Path] = {}
        shapes: Shapes = {}
        for path in paths:
            with open_shard(path) as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    files[name] = path
                    shapes[name] = tuple(shard.get_slice(name).get_shape())
        if absent := [name for name in weight_map if name not in files]:
            raise CheckpointError(
                f"{directory}: {weight_map[absent[0]]} lacks tensors that {INDEX} places there: {_some(absent)}"
            )
        return cls(directory, files, shapes)

    def load(self, name: str) -> Tensor:
        """Read one tensor by its name in the files."""
        with open_shard(self.files[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nearest(name: str, among: list[str]) -> str:
    close = difflib.get_close_matches(name, among, n=1, cutoff=0.5)
    return f" (nearest there: {close[0]})" if close else ""


def read_shards(
    shards: Shards,
    expected: Shapes,
    published: Callable[[str], tuple[str, ...]],
    canonical: Callable[[str], str],
) -> Iterator[tuple[str, Tensor]]:
    """Stream a checkpoint's tensors under the names that evovlm gives them.

    Everything is checked against ``expected`` before the first tensor is read.

    Args:
        shards: The checkpoint.
        expected: Every tensor that the model has, by its name inside evovlm.
        published: Name inside → names in the files; several are parts of one tensor, stacked along dim 0.
        canonical: Spelling in the files → the spelling that ``published`` gives.

    Returns:
        Pairs ``(name inside evovlm, tensor)`` in the order of the files, in the dtype of the files, on the CPU.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape; the message names the nearest names.
    """
    stored = {canonical(name): name for name in shards.files}
    parts = {part: name for name in expected for part in published(name)}
    tied_copy = stored.get(published(LM_HEAD)[0]) if LM_HEAD not in expected else None
    _check(shards, expected, published, parts, stored)
    return _stream(shards, published, parts, stored, tied_copy)


def _check(
    shards: Shards,
    expected: Shapes,
    published: Callable[[str], tuple[str, ...]],
    parts: Mapping[str, str],
    stored: Mapping[str, str],
) -> None:
    where = shards.directory
    missing = [part for part in parts if part not in stored]
    surplus = [
        name for name in stored if name not in parts and not name.endswith(_DERIVED) and name not in published(LM_HEAD)
    ]
    if missing:
        hints = [f"{name}{_nearest(name, surplus)}" for name in missing]
        raise CheckpointError(f"{where}: {len(missing)} tensors of the model are missing: {_some(hints)}")
    if surplus:
        hints = [f"{stored[name]}{_nearest(name, list(parts))}" for name in surplus]
        raise CheckpointError(f"{where}: {len(surplus)} tensors do not belong to the model: {_some(hints)}")
    wrong = []
    for name, shape in expected.items():
        names = published(name)
        part_shape = (shape[0] // len(names), *shape[1:])
        wrong += [
            f"{stored[part]} is {list(shards.shapes[stored[part]])}, the configuration says {list(part_shape)}"
            for part in names
            if shards.shapes[stored[part]] != part_shape
        ]
    if wrong:
        raise CheckpointError(f"{where}: {len(wrong)} tensors have another shape: {_some(wrong)}")


def _stream(
    shards: Shards,
    published: Callable[[str], tuple[str, ...]],
    parts: Mapping[str, str],
    stored: Mapping[str, str],
    tied_copy: str | None,
) -> Iterator[tuple[str, Tensor]]:
    if tied_copy is not None:
        _check_tied(shards, stored, published, tied_copy)
    by_file: dict[Path, list[str]] = {}
    for part in parts:
        by_file.setdefault(shards.files[stored[part]], []).append(part)
    waiting: dict[str, dict[str, Tensor]] = {}  # thirds of q, k, v whose others lie in a later shard
    for path, members in by_file.items():
        with open_shard(path) as shard:
            for part in members:
                name = parts[part]
                names = published(name)
                tensor: Tensor = shard.get_tensor(stored[part])
                if len(names) > 1:
                    pieces = waiting.setdefault(name, {})
                    pieces[part] = tensor
                    if len(pieces) < len(names):
                        continue
                    tensor = torch.cat([pieces[piece] for piece in names])
                    del waiting[name]
                yield name, tensor


def _check_tied(
    shards: Shards, stored: Mapping[str, str], published: Callable[[str], tuple[str, ...]], tied_copy: str
) -> None:
    """A tied checkpoint may store its head all the same, but not another one."""
    embedding = stored[published("language_model.model.embed_tokens.weight")[0]]
    if shards.shapes[tied_copy] != shards.shapes[embedding] or not torch.equal(
        shards.load(tied_copy), shards.load(embedding)
    ):
        raise CheckpointError(
            f"{shards.directory}: config.json ties {tied_copy} to {embedding}, but the stored tensors differ; "
            "set tie_word_embeddings to false in config.json"
        )


class ShardWriter:
    """Writes tensors to shards of at most ``max_bytes`` and, at the end, their index.

    Args:
        directory: Where; must exist.
        max_bytes: Size of a shard. A larger tensor gets a shard of its own.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_shard_bytes must be positive, got {max_bytes}")
        self.directory, self.max_bytes = directory, max_bytes
        self.buffer: dict[str, Tensor] = {}
        self.buffered = 0
        self.total_bytes = 0
        self.weight_map: dict[str, int] = {}
        self.num_shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor (any device); it is copied only where it must be to be written."""
        size = tensor.numel() * tensor.element_size()
        if self.buffer and self.buffered + size > self.max_bytes:
            self._flush()
        tensor = tensor.detach().to("cpu")
        if tensor.untyped_storage().nbytes() != size or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # a view: the format stores no aliases
        self.buffer[name] = tensor
        self.buffered += size
        self.total_bytes += size

    def _part(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.part"

    def _flush(self) -> None:
        save_file(self.buffer, self._part(self.num_shards), metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self.buffer, self.num_shards)
        self.num_shards += 1
        self.buffer, self.buffered = {}, 0

    def finish(self) -> None:
        """Write the last shard, give the files their final names, and write the index if there are several."""
        if self.buffer or not self.num_shards:
            self._flush()
        if self.num_shards == 1:
            self._part(0).rename(self.directory / SINGLE)
            return
        names = [f"model-{i + 1:05d}-of-{self.num_shards:05d}.safetensors" for i in range(self.num_shards)]
        for number, name in enumerate(names):
            self._part(number).rename(self.directory / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[number] for name, number in self.weight_map.items()},
        }
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
