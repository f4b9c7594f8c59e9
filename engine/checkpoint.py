"""Checkpoints: complete or absent, resharded on load, and found again by ``--resume auto``.

    RUN/checkpoints/step-00000200.partial/   written by all ranks, each its own boxes (box_files.py)
                    └─ renamed to step-00000200/ by rank 0 once every rank has finished and checkpoint.json is there

A checkpoint holds model, optimizer and the number of the next step, under names that say nothing of a layout:
``model.<parameter>``, ``optimizer.<parameter>.exp_avg`` and so on. That one integer is the whole state of the data:
plans, positions and augmentation are functions of (seed, step).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from evovlm.engine.box_files import BoxFiles, share_out, snapshot, write_boxes, write_index
from evovlm.parallel.pieces import Piece, exchange_spreads
from evovlm.parallel.world import World

_NAME = re.compile(r"step-(\d{8,})")
META_FILE = "checkpoint.json"
_SHOWN = 3
"""Tensors that an error names one by one."""


def checkpoint_dir(run: Path, step: int) -> Path:
    """Name the directory of the checkpoint after ``step`` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """List complete checkpoints of a run as (step, directory), oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / META_FILE).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def save_checkpoint(
    run: Path,
    step: int,
    state: Mapping[str, Piece],
    world: World,
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint; every rank calls this. An interrupted write leaves only a ``.partial`` directory.

    Args:
        run: Run directory, on a file system that all ranks share.
        step: Optimizer steps done; the step to resume at.
        state: This rank's pieces of model and optimizer. Copies are written once. Needs memory on the CPU for what
            this rank writes.
        world: The ranks.
        meta: What :func:`load_checkpoint` compares before loading, as JSON.
        keep: Newest checkpoints that stay; older ones are deleted once this one is complete.

    Returns:
        The directory of the complete checkpoint.

    Raises:
        ValueError: The ranks' pieces do not make up whole tensors.
        OSError: A rank could not write; every rank raises, with that rank's reason.
    """
    final = checkpoint_dir(run, step)
    partial = final.with_name(final.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        write_index(partial, table)
        (partial / META_FILE).write_text(json.dumps({**meta, "step": step}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    table = share_out(exchange_spreads(state, world))
    _together(world, final, begin if world.is_main else None)
    boxes = snapshot(state, table, world.rank)
    _together(world, final, lambda: write_boxes(partial, world.rank, boxes))
    _together(world, final, finish if world.is_main else None)
    return final


def _together(world: World, path: Path, action: Callable[[], None] | None) -> None:
    """Do this rank's part and wait for all. If one fails, all raise: none waits for a rank that is gone."""
    failure: Exception | None = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError) as error:
        failure = error
    reasons: list[str | None] = [None] * world.size
    dist.all_gather_object(reasons, None if failure is None else f"{type(failure).__name__}: {failure}")
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise OSError(f"checkpoint {path} was not written: rank {rank} failed with {reason}") from failure


def drop_later(run: Path, step: int) -> list[Path]:
    """Delete a run's checkpoints after ``step``: a run that goes on from an earlier one has left them behind.

    Otherwise ``--resume auto`` would later pick up the abandoned branch. The main rank calls this.
    """
    later = [path for number, path in list_checkpoints(run) if number > step]
    for path in later:
        shutil.rmtree(path)
    return later


def read_meta(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself.

    Raises:
        FileNotFoundError: The directory is not a complete checkpoint.
    """
    file = path / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {META_FILE}")
    meta: dict[str, Any] = json.loads(file.read_text())
    return meta


def _differences(name: str, saved: Any, wanted: Any) -> Iterator[str]:
    """List the entries that differ, by their path in nested objects."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted({*saved, *wanted}):
            yield from _differences(f"{name}.{key}", saved.get(key), wanted.get(key))
    elif saved != wanted:
        yield f"{name} is {saved!r} there, {wanted!r} here"


def load_checkpoint(path: Path, state: Mapping[str, Piece], *, expected: dict[str, Any]) -> int:
    """Load a checkpoint that any layout saved into the pieces of another; each rank reads its own boxes.

    Nothing is sent, and everything is compared before the first piece is filled.

    Args:
        path: A complete checkpoint.
        state: This rank's pieces, filled in place; those of ``model.`` alone to load weights only. The checkpoint may
            hold more.
        expected: Entries of the checkpoint's meta that must be equal, such as the model's shape.

    Returns:
        The step to resume at.

    Raises:
        FileNotFoundError: Incomplete, or a shard file is missing.
        ValueError: The checkpoint is of another model, lacks a tensor, holds it in another shape or in a wider dtype,
            or is damaged; the message names the entry and both values.
    """
    meta = read_meta(path)
    differing = [line for name, value in expected.items() for line in _differences(name, meta.get(name), value)]
    if differing:
        raise ValueError(f"checkpoint {path} does not belong to this run: {'; '.join(differing)}")
    files = BoxFiles(path)
    problems = [line for name, piece in state.items() for line in _misfits(files, name, piece)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"checkpoint {path} does not fit this run: {'; '.join(problems[:_SHOWN])}{more}")
    for name, piece in state.items():
        files.fill(name, piece)
    step: int = meta["step"]
    return step


def _misfits(files: BoxFiles, name: str, piece: Piece) -> Iterator[str]:
    """Say why a piece cannot be filled, if it cannot."""
    stored = files.tensors.get(name)
    if stored is None:
        parameter = name.removeprefix("optimizer.").rpartition(".")[0]
        if name.startswith("optimizer.") and f"model.{parameter}" in files.tensors:
            yield (
                f"it has no {name}: {parameter} was frozen when it was saved and is trained here; freeze the same "
                "modules, or export it and start a new run from its weights"
            )
        else:
            yield f"it has no {name}, which has shape {list(piece.shape)} here"
    elif stored.shape != piece.shape:
        if stored.shape[1:] == piece.shape[1:] and stored.shape and piece.shape:
            yield f"{name} has {stored.shape[0]} rows there, {piece.shape[0]} here"
        else:
            yield f"{name} has shape {list(stored.shape)} there, {list(piece.shape)} here"
    elif torch.promote_types(stored.dtype, piece.local.dtype) != piece.local.dtype:
        yield f"{name} is {stored.dtype} there, {piece.local.dtype} here, which would lose digits"
