"""Turns pydantic's errors into lines that a person can act on: source, dotted key, value, what was expected.

recipe.toml: unknown key 'optimizer.lrr'; the nearest valid key is 'optimizer.lr'
command line: 'train.steps' = "many": should be a valid integer (type: int)
"""

import difflib
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

KeyPath = tuple[str, ...]


def describe_errors(
    model: type[BaseModel], error: ValidationError, values: dict[str, Any], source: Callable[[KeyPath], str]
) -> list[str]:
    """Return one line for each key that is wrong.

    Args:
        model: The model that ``values`` were validated as.
        error: What validation said.
        values: The nested settings that were validated.
        source: Tells where the key at a path was set.
    """
    messages: dict[KeyPath, list[str]] = {}
    for item in error.errors():
        path = _data_path(item["loc"], values, missing=item["type"] == "missing")
        if item["type"] == "extra_forbidden":
            text = f"unknown key '{dotted(path)}'; {_suggest(model, values, path)}"
        elif item["type"] == "missing":
            text = f"key '{dotted(path)}' is missing{_expected(model, values, path)}"
        else:
            text = re.sub(r"^(Value error, |Assertion failed, |Input )", "", item["msg"])
        seen = messages.setdefault(path, [])
        if text not in seen:
            seen.append(text)
    lines = []
    for path, texts in messages.items():
        text = " or ".join(texts)
        if not path or text.startswith(("unknown key", "key '")):
            lines.append(f"{source(path)}: {text}")
        else:
            value = _look_up(values, path)
            shown = "" if isinstance(value, dict) else f" = {_short(value)}"
            lines.append(f"{source(path)}: '{dotted(path)}'{shown}: {text}{_expected(model, values, path)}")
    return lines


def dotted(path: KeyPath) -> str:
    """Join a path to a TOML key, with quotes around parts that are not bare words."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part) for part in path)


def nearest_key(wrong: KeyPath, valid: list[KeyPath]) -> KeyPath | None:
    """Return the valid key most like ``wrong``: alike as a whole, by last name, and a little for the same table."""

    def likeness(key: KeyPath) -> float:
        whole = difflib.SequenceMatcher(None, dotted(wrong), dotted(key)).ratio()
        name = difflib.SequenceMatcher(None, wrong[-1], key[-1]).ratio()
        return whole + name + (0.5 if key[:-1] == wrong[:-1] else 0.0)

    return max(valid, key=likeness, default=None)


def valid_keys(model: type[BaseModel], values: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key and table of ``model``; of a tagged union, the member that ``values`` names."""
    for name, info in model.model_fields.items():
        key = info.alias or name
        below = values.get(key) if isinstance(values, dict) else None
        yield (*prefix, key)
        for part in _models_in(info.annotation, below):
            if part is not model:
                yield from valid_keys(part, below, (*prefix, key))
        if isinstance(below, dict) and get_origin(info.annotation) is dict:
            for entry, inner in below.items():
                for part in _models_in(get_args(info.annotation)[1], inner):
                    yield from valid_keys(part, inner, (*prefix, key, entry))


def _suggest(model: type[BaseModel], values: Any, path: KeyPath) -> str:
    found = nearest_key(path, list(dict.fromkeys(valid_keys(model, values))))
    return "no key is valid here" if found is None else f"the nearest valid key is '{dotted(found)}'"


def _models_in(annotation: Any, values: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) not in (Union, types.UnionType):
        # Annotated[Union[...], Field(discriminator=...)] and Optional of it
        inner = get_args(annotation)[:1] if hasattr(annotation, "__metadata__") else ()
        return [model for part in inner for model in _models_in(part, values)]
    members = [model for part in get_args(annotation) for model in _models_in(part, values)]
    named = [member for member in members if _tag_matches(member, values)]
    return named or members


def _tag_matches(model: type[BaseModel], values: Any) -> bool:
    tags = {name: info for name, info in model.model_fields.items() if get_origin(info.annotation) is Literal}
    given = values if isinstance(values, dict) else {}
    return all(given[name] in get_args(info.annotation) for name, info in tags.items() if name in given)


def _field_at(model: type[BaseModel], values: Any, path: KeyPath) -> FieldInfo | None:
    models = [model]
    info: FieldInfo | None = None
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if not fields:
            return None
        info = fields[0]
        values = values.get(part) if isinstance(values, dict) else None
        models = _models_in(info.annotation, values)
    return info


def _expected(model: type[BaseModel], values: Any, path: KeyPath) -> str:
    info = _field_at(model, values, path)
    if info is None or info.annotation is None or _models_in(info.annotation, None):
        return ""
    annotation = info.annotation
    name = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return f" (type: {re.sub(r'[A-Za-z_]+[.](?=[A-Za-z_])', '', name)})"


def _data_path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> KeyPath:
    """Drop the parts of pydantic's location that are names of union members, not keys of the data."""
    path: list[str] = []
    for number, part in enumerate(loc):
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_list or (isinstance(values, dict) and part in values):
            values = values[part]
        elif not (missing and number == len(loc) - 1):
            continue
        path.append(str(part))
    return tuple(path)


def _look_up(values: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
    return values


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
