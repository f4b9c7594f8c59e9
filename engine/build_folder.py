"""The folder of a build: what its samples depend on, and the meta JSON of the data that come out of it.

OUT/settings.json   what the samples depend on: written by the first start, checked by later ones
OUT/{dataset}.jsonl, OUT/meta.json, OUT/summary.json
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from evovlm.data.meta import DatasetMeta

SETTINGS_FILE = "settings.json"


def claim(out: Path, identity: Mapping[str, Any], *, kind: str, reading: Iterable[str] | None = None) -> None:
    """Write down what the samples of a folder depend on, or check that it is the same.

    Args:
        out: The folder; it is made.
        identity: Name → JSON value.
        kind: What the folder holds, such as "preference data", for error messages.
        reading: Nothing is sampled, so only these names are compared, and the samples must be there; None: all.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError: There are no samples although ``reading`` needs some.
        ValueError: Samples of other settings.
    """
    file = out / SETTINGS_FILE
    if file.is_file():
        there = stored_settings(out)
        for name in identity if reading is None else reading:
            if there.get(name) != identity[name]:
                raise ValueError(
                    f"{out} holds samples made with {name} = {there.get(name)!r}, not {identity[name]!r}: "
                    "use another folder"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is no folder of {kind}: use another")
    if reading is not None:
        raise FileNotFoundError(f"{out} holds no samples that could be judged again")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, identity)


def stored_settings(out: Path) -> dict[str, Any]:
    """Return what the samples of a folder depend on."""
    content: dict[str, Any] = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    return content


def meta_entry(dataset: DatasetMeta, name: str, length: int) -> dict[str, Any]:
    """Return the entry of a meta JSON for ``{name}.jsonl``, made of a dataset's questions."""
    entry: dict[str, Any] = {"root": str(dataset.root), "annotation": f"{name}.jsonl", "data_augment": False}
    entry |= {"repeat_time": 1, "length": length}
    return entry if dataset.max_tiles is None else {**entry, "max_dynamic_patch": dataset.max_tiles}


def free_name(name: str, taken: Collection[str]) -> str:
    """Make a dataset's name one of a file that no other dataset has."""
    name = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "dataset"
    while name in taken:
        name += "_"
    return name


def write_json(file: Path, content: Any) -> None:
    """Write JSON for people to read."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
