"""Recipes, bases and overrides give the right settings; every mistake is named with its source and remedy."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from evovlm.launch.settings import SettingsError, load_settings, parse_overrides, save_settings


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Part):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05


class Pretrain(Part):
    kind: Literal["pretrain"] = "pretrain"
    weighting: Literal["token", "sample", "square"] = "square"


class Sft(Part):
    kind: Literal["sft"]
    freeze: tuple[str, ...] = ()
    packed: bool = True


class Run(Part):
    name: str = "run"
    steps: int
    optimizer: Optimizer = Optimizer()
    stage: Annotated[Pretrain | Sft, Field(discriminator="kind")] = Pretrain()
    mixture: dict[str, float] = {}
    limit: int | None = None


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('steps = 10\n[optimizer]\nlr = 1e-4\n[stage]\nkind = "sft"\n[mixture]\na = 1\n')
    return path


def errors(path: Path | None, *words: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load_settings(Run, path, words)
    assert all(line in str(caught.value) for line in caught.value.errors)
    return caught.value.errors


def test_overrides_of_every_form(recipe: Path) -> None:
    words = "--steps 20 --optimizer.lr=1e-5 --optimizer.betas [0.8,0.9] --stage.packed false --mixture.b 2.5 --limit=-3"
    run = load_settings(Run, recipe, words.split())
    assert run.steps == 20
    assert run.optimizer == Optimizer(lr=1e-5, betas=(0.8, 0.9))
    assert isinstance(run.stage, Sft)
    assert run.stage.packed is False
    assert run.mixture == {"a": 1, "b": 2.5}
    assert run.limit == -3


def test_bare_option_is_true_and_strings_need_no_quotes(recipe: Path) -> None:
    run = load_settings(Run, recipe, ["--stage.packed", "--name", "my run/7"])
    assert run.name == "my run/7"
    assert run.stage == Sft(kind="sft", packed=True)


@pytest.mark.parametrize("word", ["7", "1e-4", "true", "2026-01-01", "[1]"])
def test_a_word_for_a_string_stays_as_it_was_typed(recipe: Path, word: str) -> None:
    assert load_settings(Run, recipe, ["--name", word]).name == word


def test_later_overrides_win(recipe: Path) -> None:
    assert load_settings(Run, recipe, ["--steps", "2", "--steps", "3"]).steps == 3


def test_base_is_merged_key_by_key(recipe: Path) -> None:
    (recipe.parent / "more").mkdir()
    child = recipe.parent / "more" / "child.toml"
    child.write_text('base = "../recipe.toml"\n[optimizer]\nweight_decay = 0.0\n[mixture]\nb = 2\n[stage]\n')
    run = load_settings(Run, child)
    assert run.optimizer == Optimizer(lr=1e-4, weight_decay=0.0)
    assert run.mixture == {"a": 1, "b": 2}
    assert isinstance(run.stage, Sft)


def test_error_in_the_base_names_the_base(recipe: Path) -> None:
    child = recipe.parent / "child.toml"
    child.write_text('base = "recipe.toml"\nnam = "x"\n')
    recipe.write_text('steps = "many"\n')
    first, second = sorted(errors(child))
    assert first.startswith(f"{child}: unknown key 'nam'")
    assert first.endswith("the nearest valid key is 'name'")
    assert second.startswith(f"{recipe}: 'steps' = \"many\": should be a valid integer")


def test_circle_of_bases(recipe: Path) -> None:
    other = recipe.parent / "other.toml"
    other.write_text('base = "recipe.toml"\n')
    recipe.write_text('base = "other.toml"\n')
    assert "leads back" in errors(recipe)[0]


def test_missing_base_names_who_wants_it(recipe: Path) -> None:
    recipe.write_text('base = "nowhere.toml"\n')
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml, which .*recipe\.toml names"):
        load_settings(Run, recipe)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--optimizer.lrr", "optimizer.lr"),
        ("--optimzer.lr", "optimizer"),
        ("--lr", "optimizer.lr"),
        ("--optimizer.weight-decay", "optimizer.weight_decay"),
        ("--stage.freze", "stage.freeze"),
        ("--step", "steps"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(recipe: Path, word: str, nearest: str) -> None:
    (line,) = errors(recipe, word, "1")
    assert line.startswith("command line: unknown key '")
    assert line.endswith(f"the nearest valid key is '{nearest}'")


def test_key_of_another_stage_is_not_suggested(recipe: Path) -> None:
    (line,) = errors(recipe, "--stage.weighting", "token")
    assert "unknown key 'stage.weighting'" in line
    assert "nearest valid key is 'stage.weighting'" not in line


def test_type_errors_name_key_value_and_type(recipe: Path) -> None:
    lines = errors(recipe, "--optimizer.lr", "fast", "--steps", "1.5", "--limit", "x", "--wrong", "1")
    text = "\n".join(lines)
    assert len(lines) == 4, text
    assert "'optimizer.lr' = \"fast\": should be a valid number" in text
    assert "(type: float)" in text
    assert "'steps' = 1.5: should be a valid integer" in text
    assert "'limit' = \"x\"" in text
    assert "(type: int | None)" in text
    assert "unknown key 'wrong'" in text


def test_value_out_of_range_and_wrong_choice(recipe: Path) -> None:
    lines = errors(recipe, "--optimizer.lr", "-1", "--stage.kind", "pretrain", "--stage.weighting", "cube")
    assert any("'optimizer.lr' = -1: should be greater than 0" in line for line in lines)
    assert any("'stage.weighting' = \"cube\": should be 'token', 'sample' or 'square'" in line for line in lines)


def test_missing_key() -> None:
    (line,) = errors(None)
    assert line == "command line: key 'steps' is missing (type: int)"


def test_a_value_cannot_bring_a_second_key() -> None:
    (override,) = parse_overrides(["--a=1\nb = 2"])
    assert override.value == "1\nb = 2"


@pytest.mark.parametrize("words", [["steps=3"], ["--steps", "3", "4"], ["--"], ["--a b", "3"], ["--.x", "1"]])
def test_words_that_are_no_override(words: list[str]) -> None:
    with pytest.raises(SettingsError, match="command line: "):
        parse_overrides(words)


def test_broken_toml_names_file_and_line(recipe: Path) -> None:
    recipe.write_text("steps = \n")
    assert errors(recipe)[0].startswith(f"{recipe}: not valid TOML: ")
    assert "line 1" in errors(recipe)[0]


def test_saved_settings_load_back(recipe: Path, tmp_path: Path) -> None:
    run = load_settings(Run, recipe, ["--name", "kept"])
    save_settings(run, tmp_path / "settings.json")
    assert load_settings(Run, tmp_path / "settings.json") == run


toml_values = st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


@given(st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3), toml_values)
def test_overrides_read_values_as_toml_does(parts: list[str], value: Any) -> None:
    text = str(value).lower()
    (override,) = parse_overrides([f"--{'.'.join(parts)}={text}"])
    assert override.path == tuple(parts)
    assert override.value == tomllib.loads(f"v = {text}")["v"]


@given(st.text())
def test_any_text_is_a_value(text: str) -> None:
    (override,) = parse_overrides(["--name=" + text])
    assert override.path == ("name",)
    assert override.raw == text
