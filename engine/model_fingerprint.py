"""Names a model by its weights: what was computed with one is not taken for the work of another at the same path.

    RUN/checkpoints/step-…/rank-*.safetensors   newest checkpoint ─┐  begin, middle and end
    DIR/*.safetensors, DIR/config.json ────────────────────────────┴─ of every tensor ─► 16 hexadecimal digits

A copy of a model keeps its name; times of files do not count. Training changes all tensors that it trains, so some of
the bytes that are read have changed; the whole of a large model is never read.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from evovlm.engine.checkpoint import META_FILE
from evovlm.engine.open_model import is_run
from evovlm.engine.runs import newest_checkpoint

_BYTES = 1024  # read in each place
_MOST_TENSORS = 8192
"""Beyond, evenly spread ones: a checkpoint of many ranks has a piece of each tensor for each of them."""
_OPTIMIZER = "optimizer."


def model_fingerprint(folder: str | Path) -> str:
    """Name the model of a run, or of a directory of either published format.

    Raises:
        FileNotFoundError: The run has no checkpoint.
        ValueError: A weight file is damaged.
    """
    folder = Path(folder)
    place, described = folder, folder / "config.json"
    if is_run(folder):
        place = newest_checkpoint(folder)
        described = place / META_FILE
    digest = hashlib.blake2b(described.read_bytes() if described.is_file() else b"", digest_size=8)
    tensors = [found for file in sorted(place.glob("*.safetensors")) for found in _tensors(file)]
    step = max(1, -(-len(tensors) // _MOST_TENSORS))
    for file, name, begin, end in tensors[::step]:
        digest.update(f"{file.name} {name} {begin} {end}".encode())
        with file.open("rb") as opened:
            for at in (begin, (begin + end) // 2, max(begin, end - _BYTES)):
                opened.seek(at)
                digest.update(opened.read(min(_BYTES, end - at)))
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[Path, str, int, int]]:
    """Yield (file, name, first byte, byte behind the last) of a file's weights, by name."""
    with file.open("rb") as opened:
        head = opened.read(8)
        try:
            (length,) = struct.unpack("<Q", head)
            entries = json.loads(opened.read(length))
        except (struct.error, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{file} is damaged: it has no header of safetensors") from error
    for name in sorted(entries):
        if name != "__metadata__" and not name.startswith(_OPTIMIZER):
            begin, end = entries[name]["data_offsets"]
            yield file, name, 8 + length + begin, 8 + length + end
