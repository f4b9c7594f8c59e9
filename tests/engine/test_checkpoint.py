"""Checkpoints: complete or absent, of the right model, loaded by any number of ranks."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.engine import checkpoint as checkpoint_module
from evovlm.engine.box_files import box_file, read_tensors
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
from evovlm.parallel.pieces import Piece, gather_pieces
from evovlm.parallel.world import World

from .support import OPTIM, SMALL, STEPS, VOCAB, Trained, assert_same_training, build, run_steps, train_plainly

META = {"model": asdict(SMALL), "seed": 5}
TIED = replace(SMALL, decoder=replace(SMALL.decoder, tie_embeddings=True))


def save(engine: Engine, run: Path, step: int, keep: int = 5) -> Path:
    return save_checkpoint(run, step, engine.pieces(), engine.world, META, keep)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved after its first step; a tied model and one with a frozen ViT beside it."""
    folder = tmp_path_factory.mktemp("run")

    def job(world: World) -> None:
        engine = build(world)
        run_steps(engine, steps=STEPS[:1])
        save(engine, folder, 1)
        tied = build(world, TIED)
        run_steps(tied, steps=STEPS[:1])
        save(tied, folder / "tied", 1)
        frozen = build(world, freeze=["vit"])
        run_steps(frozen, steps=STEPS[:1])
        save(frozen, folder / "frozen", 1)

    run_ranks(2, job)
    return folder


def resume(world: World, path: Path, config: Any = SMALL, plan: ParallelPlan | None = None) -> tuple[int, Trained]:
    engine = build(world, config, plan=plan)
    return load_checkpoint(path, engine.pieces(), expected=META), run_steps(engine, plan, STEPS[1:])


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


PLANS = [
    ("", ParallelPlan.for_llm(Layout(dp=4), Layout(dp=2, tp=2))),
    ("", ParallelPlan.for_llm(Layout(dp=2, tp=2, zero=2))),
    ("", ParallelPlan.for_llm(Layout(cp=2, hp=2, shard=2))),
    ("", ParallelPlan.for_llm(Layout(pp=2, tp=2, zero=1), Layout(dp=4, zero=1, shard=2))),
    ("tied", ParallelPlan.for_llm(Layout(pp=2, dp=2))),
]


def test_every_plan_gets_and_gives_the_same_state(run: Path, tmp_path: Path) -> None:
    def job(world: World) -> list[list[str]]:
        wrong = []
        for number, (which, plan) in enumerate(PLANS):
            engine = build(world, TIED if which else SMALL, plan=plan)
            assert load_checkpoint(checkpoint_dir(run / which, 1), engine.pieces(), expected={}) == 1
            saved = dict(read_tensors(checkpoint_dir(run / which, 1)))
            found = dict(gather_pieces(engine.pieces(), world, everywhere=True))
            wrong.append([name for name in saved if name not in found or not torch.equal(found[name], saved[name])])
            wrong.append([name for name in found if name not in saved])
            save(engine, tmp_path / str(number), 1)
        return wrong

    assert run_ranks(4, job) == [[[]] * (2 * len(PLANS))] * 4
    for number, (which, _) in enumerate(PLANS):
        saved = dict(read_tensors(checkpoint_dir(run / which, 1)))
        again = dict(read_tensors(checkpoint_dir(tmp_path / str(number), 1)))
        assert again.keys() == saved.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_what_a_checkpoint_says_of_itself(run: Path) -> None:
    assert [step for step, _ in list_checkpoints(run)] == [1]
    assert list_checkpoints(run)[0][1] == checkpoint_dir(run, 1) == run / "checkpoints" / "step-00000001"
    assert read_meta(checkpoint_dir(run, 1)) == {**META, "step": 1}
    assert list_checkpoints(run / "nowhere") == []


def steps_done(engine: Engine) -> set[float]:
    """How often the optimizer has stepped each parameter."""
    return {piece.local.item() for name, piece in engine.pieces().items() if name.endswith(".step")}


def weights_in(state: dict[str, Piece]) -> dict[str, Piece]:
    return {name: piece for name, piece in state.items() if name.startswith("model.")}


def test_settings_of_the_run_win_over_those_saved(run: Path) -> None:
    # A run that goes on with another learning rate must use it: its log says so.
    other = OPTIM.model_copy(update={"lr": 0.003, "weight_decay": 0.0, "betas": (0.5, 0.6)})

    def job(world: World) -> tuple[list[dict[str, Any]], set[float]]:
        engine = build(world, optim=other)
        load_checkpoint(checkpoint_dir(run, 1), engine.pieces(), expected=META)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.state.optimizer.param_groups]
        return groups, steps_done(engine)

    groups, steps = run_ranks(1, job)[0]
    assert steps == {1.0}
    base = {"vit": 0.0015, "projector": 0.006, "llm": 0.003}
    for group in groups:
        assert group["base_lr"] == pytest.approx(base[group["name"].split("/")[0]])
        assert (group["weight_decay"], group["betas"]) == (0.0, (0.5, 0.6))


def test_weights_can_be_loaded_alone(run: Path) -> None:
    def job(world: World) -> dict[str, torch.Tensor]:
        engine = build(world)
        assert load_checkpoint(checkpoint_dir(run, 1), weights_in(engine.pieces()), expected={}) == 1
        assert steps_done(engine) == {0.0}
        return dict(engine.named_full_tensors(everywhere=True))

    loaded = run_ranks(1, job)[0]
    for name, weight in train_plainly(steps=STEPS[:1]).weights.items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-9, atol=1e-12)


def error_of_loading(path: Path, expected: dict[str, Any], config: Any = SMALL) -> str:
    def job(world: World) -> str:
        engine = build(world, config)
        try:
            load_checkpoint(path, engine.pieces(), expected=expected)
        except (ValueError, FileNotFoundError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    return run_ranks(1, job)[0]


def test_a_missing_shard_is_named(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000001"
    shutil.copytree(checkpoint_dir(run, 1), damaged)
    assert len(list(damaged.glob("*.safetensors"))) == 2  # one file per rank
    (damaged / box_file(1)).unlink()
    assert error_of_loading(damaged, META) == (
        f"FileNotFoundError: checkpoint {damaged} is damaged: its shard rank-00001.safetensors is missing"
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


def test_a_checkpoint_of_another_vocabulary_names_the_rows(run: Path) -> None:
    larger = replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=VOCAB + 4))
    message = error_of_loading(checkpoint_dir(run, 1), {}, larger)
    assert message.startswith(f"ValueError: checkpoint {checkpoint_dir(run, 1)} does not fit this run: ")
    assert f"language_model.model.embed_tokens.weight has {VOCAB} rows there, {VOCAB + 4} here" in message


def test_a_module_that_was_frozen_has_no_optimizer_state(run: Path) -> None:
    path = checkpoint_dir(run / "frozen", 1)
    message = error_of_loading(path, META)
    assert message.startswith(f"ValueError: checkpoint {path} does not fit this run: it has no optimizer.vision_model.")
    assert "was frozen when it was saved and is trained here; freeze the same modules" in message

    def job(world: World) -> tuple[int, int]:
        # The other way round, state of what is now frozen stays unread.
        frozen = build(world, freeze=["vit"])
        thawed = build(world)
        weights = weights_in(thawed.pieces())
        return load_checkpoint(checkpoint_dir(run, 1), frozen.pieces(), expected=META), load_checkpoint(
            path, weights, expected=META
        )

    assert run_ranks(1, job)[0] == (1, 1)


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
        write = checkpoint_module.write_boxes

        def broken(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            raise KeyboardInterrupt  # everything is written but the last word

        seen = []
        checkpoint_module.write_boxes = broken
        try:
            save(engine, tmp_path, 2, keep=1)
        except KeyboardInterrupt:
            seen.append([n for n, _ in list_checkpoints(tmp_path)])
        finally:
            checkpoint_module.write_boxes = write
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
