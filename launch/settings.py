"""Reads a run's settings: a TOML recipe, the recipe it is based on, and ``--dotted.key value`` words.

    base.toml ──► recipe.toml ──► --optimizer.lr 1e-4      later ones win, key by key
        └─────────────┴──────────────────┴──► one tree, each leaf with its source ──► pydantic model

A recipe may start with ``base = "other.toml"`` (relative to its own folder). Tables are merged key by key; any
other value, lists included, replaces the one before. All mistakes are reported at once, each with the file
(or "command line") it comes from, the dotted key, and what would have been right.
"""

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from evovlm.launch.settings_errors import describe_errors

COMMAND_LINE = "command line"
Model = TypeVar("Model", bound=BaseModel)
KeyPath = tuple[str, ...]


class SettingsError(ValueError):
    """Settings that cannot be used; ``errors`` holds one line for each mistake, the message all of them."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(errors)
        super().__init__(
            errors[0] if len(errors) == 1 else "\n  ".join([f"{len(errors)} errors in settings:", *errors])
        )


@dataclass
class SettingsTree:
    """Merged settings before they are validated, and where each leaf comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, str] = field(default_factory=dict)

    def merge(self, values: dict[str, Any], source: str) -> None:
        """Lay ``values`` over this tree."""
        _merge(self.values, values, (), source, self.sources)

    def source(self, path: KeyPath, default: str) -> str:
        """Name the file that set the key at ``path``, or the first key below it."""
        for length in range(len(path), 0, -1):
            if (found := self.sources.get(path[:length])) is not None:
                return found
        return next((name for key, name in self.sources.items() if key[: len(path)] == path), default)


@dataclass(frozen=True)
class Override:
    """One ``--dotted.key value`` of a command line; ``raw`` is the value as it was typed."""

    path: KeyPath
    value: Any
    raw: str


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Parse ``--dotted.key value``, ``--dotted.key=value`` and a bare ``--dotted.key`` (true).

    A value is read as TOML (``3``, ``1e-4``, ``true``, ``[1, 2]``, ``{a = 1}``); what is not TOML is a plain string.
    A value that itself starts with ``--`` needs the ``=`` form.

    Raises:
        SettingsError: A word is not part of any override, or a key is not a dotted TOML key.
    """
    found: list[Override] = []
    errors: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            errors.append(f"{COMMAND_LINE}: '{word}' is neither an option nor the value of one (--dotted.key value)")
            continue
        name, equals, raw = word[2:].partition("=")
        if not equals:
            raw = "true"
            if position < len(words) and not words[position].startswith("--"):
                raw = words[position]
                position += 1
        path = _parse_key(name)
        if path is None:
            errors.append(f"{COMMAND_LINE}: '--{name}' is not a dotted key such as --optimizer.lr")
        else:
            found.append(Override(path, _parse_value(raw), raw))
    if errors:
        raise SettingsError(errors)
    return found


def read_recipe(recipe: Path) -> SettingsTree:
    """Read a recipe (``.toml``, or the ``.json`` that `save_settings` wrote) with the recipes it is based on.

    Raises:
        FileNotFoundError: The recipe or a base is not there.
        SettingsError: A file is not valid TOML or JSON, or bases form a circle.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    path: Path | None = recipe
    while path is not None:
        if any(path.resolve() == seen.resolve() for seen, _ in chain):
            raise SettingsError([f"{chain[-1][0]}: base = '{path}' leads back to a recipe that is based on this one"])
        values = _read_table(path, wanted_by=chain[-1][0] if chain else None)
        chain.append((path, values))
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise SettingsError([f"{path}: base = {base!r}: expected the file name of one recipe"])
        path = None if base is None else path.parent / base
    tree = SettingsTree()
    for path, values in reversed(chain):
        tree.merge(values, str(path))
    return tree


def load_settings(model: type[Model], recipe: Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read ``recipe``, lay ``overrides`` over it and validate the result as ``model``.

    Args:
        model: The pydantic model of the settings; give it and its parts ``extra="forbid"``.
        recipe: The recipe's file, or None for defaults and overrides alone.
        overrides: Words of a command line, see `parse_overrides`.

    Raises:
        FileNotFoundError: The recipe or a base is not there.
        SettingsError: Any other mistake; the message lists all of them.
    """
    parsed = parse_overrides(overrides)
    tree = SettingsTree() if recipe is None else read_recipe(recipe)
    for override in parsed:
        tree.merge(_nested(override.path, override.value), COMMAND_LINE)
    try:
        return model.model_validate(tree.values)
    except ValidationError as error:
        problem = error
    # `--run.name 7` is the integer 7 in TOML. Where the field wants a string, take the word as it was typed.
    failed = {tuple(map(str, item["loc"])) for item in problem.errors()}
    for override in parsed:
        if not isinstance(override.value, str) and any(loc[: len(override.path)] == override.path for loc in failed):
            tree.merge(_nested(override.path, override.raw), COMMAND_LINE)
            try:
                return model.model_validate(tree.values)
            except ValidationError as error:
                if _count_below(error, override.path) < _count_below(problem, override.path):
                    problem = error
                else:
                    tree.merge(_nested(override.path, override.value), COMMAND_LINE)
    default = COMMAND_LINE if recipe is None else str(recipe)
    raise SettingsError(describe_errors(model, problem, tree.values, lambda path: tree.source(path, default)))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe that is given by path, or by the name of one that evovlm brings along.

    Raises:
        FileNotFoundError: Neither; the message lists the recipes that evovlm brings.
    """
    if (path := Path(name)).is_file():
        return path
    folder = Path(__file__).parent / "recipes"
    shipped = {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.toml"))}
    if name.removesuffix(".toml") in shipped:
        return shipped[name.removesuffix(".toml")]
    known = f"; evovlm brings along: {', '.join(shipped)}" if shipped else ""
    raise FileNotFoundError(f"no recipe at {name}{known}")


def save_settings(settings: BaseModel, path: Path) -> None:
    """Write resolved settings as JSON, every default included; `load_settings` reads them back."""
    path.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _read_table(path: Path, wanted_by: Path | None) -> dict[str, Any]:
    if not path.is_file():
        because = "" if wanted_by is None else f", which {wanted_by} names as its base"
        raise FileNotFoundError(f"no recipe at {path}{because}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"]) from error
    if not isinstance(values, dict):
        raise SettingsError([f"{path}: expected a table of settings, got a JSON {type(values).__name__}"])
    return values


def _merge(
    into: dict[str, Any], values: dict[str, Any], path: KeyPath, source: str, sources: dict[KeyPath, str]
) -> None:
    for name, value in values.items():
        here = (*path, name)
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value, here, source, sources)
            continue
        for stale in [key for key in sources if key[: len(here)] == here]:
            del sources[stale]
        if isinstance(value, dict) and value:
            into[name] = {}
            _merge(into[name], value, here, source, sources)
        else:
            into[name] = value
            sources[here] = source


def _parse_key(name: str) -> KeyPath | None:
    try:
        table: Any = tomllib.loads(f"{name} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        (part, table) = next(iter(table.items()))
        path.append(part)
    return tuple(path) if table == 0 else None


def _parse_value(raw: str) -> Any:
    try:
        table = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return table["value"] if len(table) == 1 else raw


def _nested(path: KeyPath, value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _count_below(error: ValidationError, path: Iterable[str]) -> int:
    prefix = tuple(path)
    return sum(tuple(map(str, item["loc"]))[: len(prefix)] == prefix for item in error.errors())
