"""One pass over an index with the reference model: the log-probabilities of both answers of every pair, kept in a file.

    weights, index, strides, … ─ hashed ─► identity
    INDEX/reference/ID.safetensors, [samples, 2], NaN where nothing is known
          │ what is missing and fits into a pack
          ▼
    packs in index order ─► ShardedModel ─► log π_ref ─► the file, every minute and at the end

An interrupted pass goes on where its file ends. Pixels are not part of the identity: images that are changed in place,
under the same names and tilings, are not noticed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evovlm.data.index import Index
from evovlm.data.loader import Loader
from evovlm.engine.model_source import NamedTensors
from evovlm.engine.preference import score_pairs
from evovlm.engine.sharded_model import ShardedModel
from evovlm.parallel.world import World

_SAVE_SECONDS = 60.0
_TENSOR = "log_probs"
_BLOCK = 1 << 24

MakeLoader = Callable[[NDArray[np.int64]], Loader | None]
"""A loader over the samples of the index that are not among these; None where no other fits into a pack."""


class WeightsDigest:
    """A hash of all weights that pass by, whatever their order.

    Args:
        enabled: Whether this rank hashes.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled, self._sum = enabled, 0

    def watch(self, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """Hand on a stream of weights."""
        for name, value in weights:
            if self._enabled:
                state = hashlib.blake2b(f"{name} {value.dtype} {list(value.shape)}".encode(), digest_size=16)
                state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                self._sum ^= int.from_bytes(state.digest(), "big")
            yield name, value

    def share(self, world: World) -> str:
        """32 hex digits of the rank that hashed, on all ranks. Collective."""
        return _of_main(f"{self._sum:032x}", world)


def index_digest(index: Index, world: World) -> str:
    """Hash what an index holds: tokens, sizes, tilings and image names. Collective."""
    state = hashlib.blake2b(digest_size=16)
    if world.is_main:
        meta = index.meta
        state.update(f"{meta.tokenizer_fingerprint} {meta.tile_size} {meta.tokens_per_tile}".encode())
        for file in sorted(index.path.rglob("*.bin")):
            state.update(file.relative_to(index.path).as_posix().encode())
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    state.update(block)
    return _of_main(state.hexdigest(), world)


def default_cache(index: Index, identity: dict[str, Any]) -> Path:
    """The file beside an index for scores of this identity."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    return index.path / "reference" / f"{digest}.safetensors"


def read_scores(file: Path, identity: dict[str, Any], num_samples: int) -> NDArray[np.float64]:
    """Read scores, or nothing but NaN where there is no file.

    Args:
        file: What :func:`score_index` wrote.
        identity: Of model and data.
        num_samples: Of the index.

    Returns:
        Float64 ``[num_samples, 2]``.

    Raises:
        ValueError: The file is damaged, or belongs to another model or other data; the message says what differs.
    """
    if not file.is_file():
        return np.full((num_samples, 2), np.nan)
    try:
        with safe_open(file, framework="pt") as opened:
            saved = json.loads((opened.metadata() or {}).get("identity", "{}"))
            differing = [
                f"{name} is {saved.get(name)!r} there, {identity.get(name)!r} here"
                for name in sorted({*saved, *identity})
                if saved.get(name) != identity.get(name)
            ]
            if differing:
                raise ValueError(
                    f"the scores in '{file}' are of another reference model or other data: {'; '.join(differing)}; "
                    "name another file as [reference] cache, or delete it"
                )
            table: NDArray[np.float64] = opened.get_tensor(_TENSOR).numpy()
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"the scores in '{file}' cannot be read ({error}): delete the file") from None
    if table.shape != (num_samples, 2):
        raise ValueError(f"'{file}' holds scores of shape {list(table.shape)}, not [{num_samples}, 2]: delete the file")
    return table


def score_index(
    make_model: Callable[[], ShardedModel],
    index: Index,
    file: Path | None,
    identity: dict[str, Any],
    make_loader: MakeLoader,
    world: World,
    say: Callable[[str], None],
) -> NDArray[np.float64]:
    """Score every pair of an index that its file does not hold yet. Collective.

    Args:
        make_model: Gives the reference model; called if anything is missing. Collective.
        index: The index.
        file: Where scores are kept; None: nowhere.
        identity: Of model and data, as JSON; the file is refused if it has another.
        make_loader: Loads what is missing.
        world: The ranks.
        say: Shows a line; called on every rank.

    Returns:
        Float64 ``[samples, 2]``; NaN for pairs that no pack can hold.

    Raises:
        ValueError: See :func:`read_scores`; or the file cannot be written.
    """
    count = len(index)
    world.barrier()  # what another pass of this run has written is there
    table = np.full((count, 2), np.nan) if file is None else read_scores(file, identity, count)
    world.barrier()  # nobody writes before all have read
    loader = make_loader(np.flatnonzero(~np.isnan(table).any(1)))
    if loader is None:
        say(f"reference model: all of {count:,} pairs were scored before, in {file}")
        return table
    model = make_model()
    known, done, began = int((~np.isnan(table).any(1)).sum()), 0, time.monotonic()
    say(f"reference model: scoring {count - known:,} of {count:,} pairs{f' into {file}' if file else ''}")
    if file is not None:
        _claim(file, table, identity, world)
    saved = told = began
    for plan, batch in loader:
        table[plan.packs.samples] = score_pairs(model, batch, plan.num_samples).cpu().numpy()
        done += plan.num_samples
        now = time.monotonic()
        if now - told > _SAVE_SECONDS / 4:
            told = now
            say(f"reference model: {known + done:,} of {count:,} pairs, {done / (now - began):,.1f} a second")
        if file is not None and world.is_main and now - saved > _SAVE_SECONDS:
            saved = now
            _write(file, table, identity)
    if file is not None and world.is_main:
        _write(file, table, identity)
    world.barrier()
    seconds = time.monotonic() - began
    say(f"reference model: scored {done:,} pairs in {seconds:,.1f} s, {done / max(seconds, 1e-9):,.1f} a second")
    return table


def _claim(file: Path, table: NDArray[np.float64], identity: dict[str, Any], world: World) -> None:
    """Write the file once before the pass: one that cannot be written shows now, and on every rank. Collective."""
    reason = ""
    if world.is_main:
        try:
            _write(file, table, identity)
        except (OSError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
    if reason := _of_main(reason, world):
        raise ValueError(f"scores cannot be kept in '{file}' ({reason}): name another file as [reference] cache")


def _write(file: Path, table: NDArray[np.float64], identity: dict[str, Any]) -> None:
    """Replace the file by one that is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file({_TENSOR: torch.from_numpy(table)}, partial, {"identity": json.dumps(identity)})
    partial.replace(file)


def _of_main(text: str, world: World) -> str:
    texts: list[str | None] = [None] * world.size
    dist.all_gather_object(texts, text)
    return texts[0] or ""
