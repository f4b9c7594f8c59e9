"""Checkpoints: complete or absent, resharded on load, and found again by ``--resume auto``.

    RUN/checkpoints/step-00000200.partial/   written by all ranks (torch.distributed.checkpoint)
                    └─ renamed to step-00000200/ by rank 0 once every rank has finished and checkpoint.json is there

A checkpoint holds model, optimizer and the number of the next step. That one integer is the whole state of the data:
plans, positions and augmentation are functions of (seed, step).
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from evovlm.parallel.world import World

_NAME = re.compile(r"step-(\d{8,})")
META_FILE = "checkpoint.json"


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint; every rank calls this. An interrupted write leaves only a ``.partial`` directory.

    Args:
        run: Run directory.
        step: Optimizer steps done; the step to resume at.
        model: Sharded model.
        optimizer: Its optimizer.
        world: The ranks.
        meta: What :func:`load_checkpoint` compares before loading, as JSON.
        keep: Newest checkpoints that stay; older ones are deleted once this one is complete.

    Returns:
        The directory of the complete checkpoint.
    """
    final = checkpoint_dir(run, step)
    partial = final.with_name(final.name + ".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    weights, optimizer_state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": optimizer_state}, storage_writer=FileSystemWriter(partial))
    world.barrier()
    if world.is_main:
        (partial / META_FILE).write_text(json.dumps({**meta, "step": step}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


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


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, *, expected: dict[str, Any]
) -> int:
    """Load a checkpoint into a model of any layout; every rank calls this.

    Args:
        path: A complete checkpoint.
        model: Sharded model of the same shape.
        optimizer: Its optimizer, or None to load weights only. Its moments are loaded; learning rates, decay and betas
            stay those of this run's settings.
        expected: Entries of the checkpoint's meta that must be equal, such as the model's shape.

    Returns:
        The step to resume at.

    Raises:
        FileNotFoundError: Incomplete, or a shard file is missing.
        ValueError: The checkpoint is of another model; the message names the entry and both values.
    """
    meta = read_meta(path)
    differing = [line for name, value in expected.items() for line in _differences(name, meta.get(name), value)]
    if differing:
        raise ValueError(f"checkpoint {path} does not belong to this run: {'; '.join(differing)}")
    reader = FileSystemReader(path)
    storage = reader.read_metadata().storage_data
    for file in sorted({entry.relative_path for entry in storage.values()}):
        if not (path / file).is_file():
            raise FileNotFoundError(f"checkpoint {path} is damaged: its shard {file} is missing")
    optimizers = [optimizer] if optimizer is not None else []
    settings = [{k: v for k, v in group.items() if k != "params"} for o in optimizers for group in o.param_groups]
    weights, optimizer_state = get_state_dict(model, optimizers)
    state = {"model": weights, **({"optimizer": optimizer_state} if optimizer is not None else {})}
    load(state, storage_reader=reader)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optimizer_state)
    for group, own in zip((group for o in optimizers for group in o.param_groups), settings, strict=True):
        group.update(own)
    step: int = meta["step"]
    return step
