"""InternVL's own data files, unchanged: the meta JSON as typed objects (its .jsonl lines: ``annotation.py``).

    meta.json   {"chart": {"root": …, "annotation": "chart.jsonl", "data_augment": true, "repeat_time": 1, …}, …}
                    │ load_meta
                    ▼
    DatasetMeta ── chart.jsonl, one line each ──parse_sample──► Sample(turns, images, video)

Formats: spec §3.1 and §3.2. Two keys are ours: ``"format": "megatron"`` makes ``annotation`` the prefix of a
Megatron ``.bin``/``.idx`` text corpus, ``"weight"`` sets a sampling weight.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evovlm.data.annotation import Sample, parse_sample
from evovlm.data.errors import MetaError

__all__ = ["DatasetMeta", "MetaFile", "Sample", "load_meta", "parse_sample"]


@dataclass(frozen=True)
class DatasetMeta:
    """One entry of a meta JSON, with its paths resolved.

    Attributes:
        name: its key.
        format: "internvl" (.jsonl) or "megatron" (``annotation`` is the prefix of ``.bin`` and ``.idx``).
        root: folder of the images.
        annotation: the .jsonl file, or the prefix of a corpus.
        repeat_time: below 1: keep only the first ``floor(lines * repeat_time)`` lines; above: repetitions per epoch.
        augment: JPEG degradation wanted (``data_augment``).
        max_tiles: tile cap of this dataset (``max_dynamic_patch``), or None.
        weight: sampling weight, or None.
    """

    name: str
    format: Literal["internvl", "megatron"]
    root: Path
    annotation: Path
    repeat_time: float
    augment: bool
    max_tiles: int | None
    weight: float | None


@dataclass(frozen=True)
class MetaFile:
    """A meta JSON: its datasets in file order, and remarks on it (unknown keys), which are not errors."""

    path: Path
    datasets: tuple[DatasetMeta, ...]
    warnings: tuple[str, ...]


class _Entry(BaseModel):
    """The keys of a dataset in a meta JSON; others are allowed and reported."""

    model_config = ConfigDict(extra="allow", strict=True)

    annotation: Annotated[str, Field(min_length=1)]
    root: str = ""
    data_augment: bool = False
    repeat_time: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_dynamic_patch: Annotated[int, Field(ge=1)] | None = None
    length: int | None = None  # informative
    format: Literal["internvl", "megatron"] = "internvl"
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def load_meta(path: str | Path) -> MetaFile:
    """Read a meta JSON.

    Relative paths in it are looked for in the folder of the meta JSON first, then in the working directory (as
    InternVL's scripts expect).

    Raises:
        FileNotFoundError: there is no such file.
        MetaError: it is not a meta JSON; the message names dataset, key and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"meta JSON '{path}' does not exist") from None
    except UnicodeDecodeError as error:
        raise MetaError(f"meta JSON '{path}' is not UTF-8 text ({error})") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:  # json would keep the last and drop the others without a word
                raise MetaError(f"meta JSON '{path}': the key '{key}' stands there {keys.count(key)} times: rename it")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise MetaError(f"meta JSON '{path}' is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise MetaError(f"meta JSON '{path}' must be an object of at least one dataset: {{name: settings}}")

    datasets: list[DatasetMeta] = []
    warnings: list[str] = []
    for name, entry in content.items():
        datasets.append(_dataset(path, name, entry, warnings))
    return MetaFile(path, tuple(datasets), tuple(warnings))


def _dataset(meta: Path, name: str, entry: Any, warnings: list[str]) -> DatasetMeta:
    where = f"meta JSON '{meta}', dataset '{name}'"
    if not isinstance(entry, dict):
        raise MetaError(f"{where}: must be an object with at least 'annotation', not {type(entry).__name__}")
    try:
        settings = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        hint = _did_you_mean(key, [k for k in entry if k not in _Entry.model_fields])
        raise MetaError(f"{where}: '{key}' = {entry.get(key)!r}: {first['msg']}{hint}") from None
    for key in settings.model_extra or {}:
        hint = _did_you_mean(key, list(_Entry.model_fields))
        warnings.append(f"dataset '{name}': unknown key '{key}' is ignored{hint}")
    for key in ("root", "annotation"):
        if "://" in getattr(settings, key):
            raise MetaError(
                f"{where}: '{key}' = '{getattr(settings, key)}' is a remote address, only file systems are read: "
                "mount or copy it"
            )
    annotation = _resolve(meta, settings.annotation, suffix=".idx" if settings.format == "megatron" else "")
    if settings.format == "internvl":
        if annotation.suffix != ".jsonl":
            raise MetaError(
                f"{where}: annotation '{annotation}' must be a .jsonl file (one JSON object per line); for a Megatron "
                'corpus set "format": "megatron"'
            )
        if not annotation.is_file():
            raise MetaError(f"{where}: annotation '{annotation}' does not exist")
    return DatasetMeta(
        name=name,
        format=settings.format,
        root=_resolve(meta, settings.root),
        annotation=annotation,
        repeat_time=settings.repeat_time,
        augment=settings.data_augment,
        max_tiles=settings.max_dynamic_patch,
        weight=settings.weight,
    )


def _resolve(meta: Path, name: str, suffix: str = "") -> Path:
    """Make a path absolute: relative to the meta JSON's folder if it exists there, else to the working directory."""
    here = (meta.parent / name).absolute()
    there = Path(name).absolute()
    exists = [path for path in (here, there) if Path(f"{path}{suffix}").exists()]
    return exists[0] if exists else here


def _did_you_mean(key: str, candidates: list[str]) -> str:
    nearest = difflib.get_close_matches(key, candidates, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
