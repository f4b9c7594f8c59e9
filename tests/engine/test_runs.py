"""A run's directory: what it says of itself, and the models read back from it."""

import json
from pathlib import Path

import pytest
import torch

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.checkpoint import checkpoint_dir
from evovlm.engine.model_source import open_source
from evovlm.engine.runs import (
    environment,
    export_run,
    load_model,
    newest_checkpoint,
    read_model_config,
    read_settings,
)
from evovlm.engine.score_run import INITIAL, score_run
from evovlm.models.hf.load import load_config, read_state
from evovlm.parallel.fork import run_ranks


def test_a_run_says_what_it_was(finished_run: Path) -> None:
    settings = read_settings(finished_run)
    assert settings.out == finished_run
    assert (settings.steps, settings.stage.name, settings.model.drop_path) == (2, "sft", 0.3)
    assert settings.optim.betas == (0.9, 0.999)  # defaults are written too
    assert read_model_config(finished_run) == open_source(settings.model, settings.seed).config
    found = json.loads((finished_run / "environment.json").read_text())
    assert found == environment()
    assert found["torch"] == torch.__version__
    assert {"python", "platform", "numpy", "transformers", "git"} <= found.keys()
    assert settings.model.from_dir is not None
    original = Tokenizer.load(settings.model.from_dir)
    assert Tokenizer.load(finished_run / "tokenizer").fingerprint == original.fingerprint


def test_checkpoints_are_found_and_loaded_whole(finished_run: Path) -> None:
    assert newest_checkpoint(finished_run) == checkpoint_dir(finished_run, 2)
    newest, first = load_model(finished_run), load_model(finished_run, checkpoint_dir(finished_run, 1))
    assert not newest.training
    assert newest.config == read_model_config(finished_run)
    exported = dict(read_state(finished_run / "export"))
    for name, parameter in newest.named_parameters():
        assert torch.equal(parameter, exported[name])  # the last checkpoint is what was exported
    assert any(not torch.equal(a, b) for a, b in zip(newest.parameters(), first.parameters(), strict=True))


@pytest.mark.parametrize("format", ["internvl", "transformers"])
def test_any_checkpoint_can_be_exported(finished_run: Path, format: str, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export_run(finished_run, out, format, checkpoint_dir(finished_run, 1))  # type: ignore[arg-type]
    config = load_config(out)
    assert config.decoder == read_model_config(finished_run).decoder
    weights = dict(read_state(out))
    for name, parameter in load_model(finished_run, checkpoint_dir(finished_run, 1)).named_parameters():
        assert torch.equal(parameter, weights[name])
    with pytest.raises(FileExistsError, match=str(out)):
        export_run(finished_run, out, format)  # type: ignore[arg-type]


def test_directories_that_are_no_runs_are_named(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a run directory: it has no settings.json"):
        read_settings(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no complete checkpoint; train it first"):
        load_model(tmp_path)


def test_a_run_is_scored_before_and_after(finished_run: Path) -> None:
    scores = {
        which: run_ranks(
            2, lambda world, which=which: score_run(finished_run, world, checkpoint=which, max_new_tokens=3)
        )
        for which in ("newest", INITIAL)
    }
    for which, name in (("newest", "step-00000002"), (INITIAL, "initial")):
        first, second = scores[which]
        assert first == second
        assert first["checkpoint"] == name
        assert first["tasks"].keys() == {"shapes", "text"}
        assert first["tasks"]["shapes"]["num_test"] == 7
        assert json.loads((finished_run / "evaluations" / f"{name}.json").read_text()) == first
        lines = (finished_run / "evaluations" / f"{name}.answers.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["name"] for answer in answers][:2] == ["shapes/1", "shapes/2"]
        assert all(answer["correct"] == (answer["given"].strip() == answer["expected"].strip()) for answer in answers)


def test_the_initial_model_is_the_one_that_the_run_started_from(finished_run: Path) -> None:
    from evovlm.engine.score_run import _model

    settings = read_settings(finished_run)
    model, name = _model(finished_run, INITIAL, torch.device("cpu"))
    assert (name, model.training) == ("initial", False)
    start = dict(open_source(settings.model, settings.seed).weights)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def test_scoring_needs_a_test_index(finished_run: Path, tmp_path: Path) -> None:
    content = json.loads((finished_run / "settings.json").read_text())
    content["data"]["test_index"] = None
    (tmp_path / "settings.json").write_text(json.dumps(content))

    def message(world):  # type: ignore[no-untyped-def]
        try:
            score_run(tmp_path, world)
        except ValueError as error:
            return str(error)
        return "no error"

    assert "names no test index: give one with --test-index" in run_ranks(1, message)[0]
