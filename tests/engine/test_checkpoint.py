"""Checkpoints: complete or absent, of the right model, loaded by any number of ranks."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.engine import checkpoint as checkpoint_module
from evovlm.engine.checkpoint import (
    META_FILE,
    checkpoint_dir,
    drop_later,
    list_checkpoints,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from evovlm.engine.engine import Engine
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

from .support import OPTIM, SMALL, STEPS, Trained, assert_same_training, build, run_steps, train_plainly

META = {"model": asdict(SMALL), "seed": 5}
TIED = replace(SMALL, decoder=replace(SMALL.decoder, tie_embeddings=True))


def save(engine: Engine, run: Path, step: int, keep: int = 5) -> Path:
    return save_checkpoint(run, step, engine.model, engine.optimizer, engine.world, META, keep)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved after its first step; hybrid layouts and a tied model beside it."""
    folder = tmp_path_factory.mktemp("run")

    def job(world: World) -> None:
        engine = build(world)
        run_steps(engine, STEPS[:1])
        save(engine, folder, 1)
        tied = build(world, TIED)
        run_steps(tied, STEPS[:1])
        save(tied, folder / "tied", 1)

    run_ranks(2, job)
    return folder


def resume(world: World, path: Path, config: Any = SMALL, **options: Any) -> tuple[int, Trained]:
    engine = build(world, config, **options)
    return load_checkpoint(path, engine.model, engine.optimizer, expected=META), run_steps(engine, STEPS[1:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_goes_on_under_any_layout(run: Path, size: int) -> None:
    def job(world: World) -> list[tuple[int, Trained]]:
        layout = Layout(dp=size, zero=1, shard=2 if size == 4 else 0)
        plan = ParallelPlan(vit=Layout(dp=size), projector=layout, llm=layout)
        found = [resume(world, checkpoint_dir(run, 1), plan=plan)]
        if size != 2:
            found.append(resume(world, checkpoint_dir(run / "tied", 1), TIED))
        return found

    for (step, ours), config in zip(run_ranks(size, job)[0], (SMALL, TIED), strict=False):
        assert step == 1
        whole = train_plainly(config)
        assert_same_training(ours, Trained(whole.losses[1:], whole.norms[1:], whole.clipped[1:], whole.weights))


def test_what_a_checkpoint_says_of_itself(run: Path) -> None:
    assert [step for step, _ in list_checkpoints(run)] == [1]
    assert list_checkpoints(run)[0][1] == checkpoint_dir(run, 1) == run / "checkpoints" / "step-00000001"
    assert read_meta(checkpoint_dir(run, 1)) == {**META, "step": 1}
    assert list_checkpoints(run / "nowhere") == []


def test_settings_of_the_run_win_over_those_saved(run: Path) -> None:
    # A run that goes on with another learning rate must use it: its log says so.
    other = OPTIM.model_copy(update={"lr": 0.003, "weight_decay": 0.0, "betas": (0.5, 0.6)})

    def job(world: World) -> tuple[list[dict[str, Any]], bool]:
        engine = build(world, optim=other)
        load_checkpoint(checkpoint_dir(run, 1), engine.model, engine.optimizer, expected=META)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        return groups, all("exp_avg" in state for state in engine.optimizer.state.values())

    groups, has_moments = run_ranks(1, job)[0]
    assert has_moments
    base = {"vit": 0.0015, "projector": 0.006, "llm": 0.003}
    for group in groups:
        assert group["base_lr"] == pytest.approx(base[group["name"].split("/")[0]])
        assert (group["weight_decay"], group["betas"]) == (0.0, (0.5, 0.6))


def test_weights_can_be_loaded_alone(run: Path) -> None:
    def job(world: World) -> dict[str, torch.Tensor]:
        engine = build(world)
        assert load_checkpoint(checkpoint_dir(run, 1), engine.model, None, expected={}) == 1
        assert not engine.optimizer.state
        return dict(engine.named_full_tensors())

    loaded = run_ranks(1, job)[0]
    for name, weight in train_plainly(steps=STEPS[:1]).weights.items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-9, atol=1e-12)


def error_of_loading(path: Path, expected: dict[str, Any]) -> str:
    def job(world: World) -> str:
        engine = build(world)
        try:
            load_checkpoint(path, engine.model, engine.optimizer, expected=expected)
        except (ValueError, FileNotFoundError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    return run_ranks(1, job)[0]


def test_a_missing_shard_is_named(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000001"
    shutil.copytree(checkpoint_dir(run, 1), damaged)
    shards = sorted(damaged.glob("*.distcp"))
    assert len(shards) == 2  # one file per rank
    shards[1].unlink()
    assert error_of_loading(damaged, META) == (
        f"FileNotFoundError: checkpoint {damaged} is damaged: its shard {shards[1].name} is missing"
    )


def test_a_directory_that_is_not_complete_is_refused(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoint_dir(run, 1), half)
    (half / META_FILE).unlink()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        read_meta(half)


def test_a_checkpoint_of_another_model_names_what_differs(run: Path) -> None:
    other = replace(SMALL, decoder=replace(SMALL.decoder, ffn_size=25, rope_theta=1e4))
    path = checkpoint_dir(run, 1)
    assert error_of_loading(path, {"model": asdict(other), "seed": 6, "stage": "sft"}) == (
        f"ValueError: checkpoint {path} does not belong to this run: "
        "model.decoder.ffn_size is 24 there, 25 here; model.decoder.rope_theta is 1000000.0 there, 10000.0 here; "
        "seed is 5 there, 6 here; stage is None there, 'sft' here"
    )


def test_old_checkpoints_go_once_a_new_one_is_complete(tmp_path: Path) -> None:
    def job(world: World) -> list[list[int]]:
        engine = build(world)
        kept = []
        for step in (2, 4, 6, 8):
            save(engine, tmp_path, step, keep=2)
            kept.append([n for n, _ in list_checkpoints(tmp_path)])
        return kept

    assert run_ranks(1, job)[0] == [[2], [2, 4], [4, 6], [6, 8]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_an_interrupted_save_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def job(world: World) -> list[list[int]]:
        engine = build(world)
        save(engine, tmp_path, 1, keep=1)
        write = checkpoint_module.save

        def broken(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            raise KeyboardInterrupt  # everything is written but the last word

        seen = []
        checkpoint_module.save = broken
        try:
            save(engine, tmp_path, 2, keep=1)
        except KeyboardInterrupt:
            seen.append([n for n, _ in list_checkpoints(tmp_path)])
        finally:
            checkpoint_module.save = write
        assert (tmp_path / "checkpoints" / "step-00000002.partial").is_dir()
        save(engine, tmp_path, 2, keep=1)  # the rest of the first attempt is no hindrance
        seen.append([n for n, _ in list_checkpoints(tmp_path)])
        return seen

    assert run_ranks(1, job)[0] == [[1], [2]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]


def test_a_run_that_goes_back_drops_what_it_leaves_behind(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint_dir(tmp_path, step).mkdir(parents=True)
        (checkpoint_dir(tmp_path, step) / META_FILE).write_text("{}")
    assert drop_later(tmp_path, 4) == [checkpoint_dir(tmp_path, 6)]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]
