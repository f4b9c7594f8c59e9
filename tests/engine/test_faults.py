"""Bad input and dying ranks at the engine's level, on sharded ranks: each error names the thing and the numbers."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from evovlm.data.share_out import share_out
from evovlm.engine.checkpoint import load_checkpoint, save_checkpoint
from evovlm.engine.engine import Engine
from evovlm.engine.equality import OPTIM, SMALL, denominator, make_steps, make_weights
from evovlm.engine.options import EngineOptions
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL
from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

NamedTensors = Iterator[tuple[str, Tensor]]
VOCAB, WIDTH, LAYERS = SMALL.decoder.vocab_size, SMALL.decoder.hidden_size, SMALL.decoder.num_layers
PP = ParallelPlan.for_llm(Layout(pp=2))
TP = ParallelPlan.for_llm(Layout(tp=2), vit=Layout(tp=2))
PP_TP = ParallelPlan.for_llm(Layout(pp=2, tp=2), vit=Layout(dp=2, tp=2))
EMBED = "language_model.model.embed_tokens.weight"
LAST_NORM = "language_model.model.norm.weight"


def other(**changes: Any) -> InternVLConfig:
    """The small model with another decoder."""
    return replace(SMALL, decoder=replace(SMALL.decoder, **changes))


def build(
    world: World,
    plan: ParallelPlan,
    config: InternVLConfig = SMALL,
    weights: NamedTensors | None = None,
    **options: Any,
) -> Engine:
    return Engine.build(
        lambda: InternVL(config),
        plan,
        world,
        optim=OPTIM,
        weights=make_weights(config) if weights is None else weights,
        options=EngineOptions(precision="float64", **options),
    )


def without(name: str) -> NamedTensors:
    return ((key, value) for key, value in make_weights(SMALL) if key != name)


def cases(world: World, path: Path) -> dict[str, Callable[[], object]]:
    """What must fail, by name; ``path`` is a checkpoint of the small model, saved by a pipeline."""

    def load(config: InternVLConfig) -> None:
        load_checkpoint(path, build(world, TP, config).pieces(), expected={})

    return {
        "number of ranks": lambda: build(world, ParallelPlan.for_llm(Layout(dp=2, tp=2))),
        "more stages than layers": lambda: build(
            world, ParallelPlan.for_llm(Layout(pp=2, zero=1)), schedule="zero_bubble", virtual_stages=3
        ),
        "virtual stages": lambda: build(world, PP, virtual_stages=2),
        "zero bubble, ZeRO 3": lambda: build(world, PP, schedule="zero_bubble"),
        "vocabulary below tp": lambda: build(world, TP, other(vocab_size=1)),
        "no embedding": lambda: build(world, PP, weights=without(EMBED)),
        "no last norm": lambda: build(world, PP, weights=without(LAST_NORM)),
        "weights of another vocabulary": lambda: build(world, TP, weights=make_weights(other(vocab_size=48))),
        "weights of a wider model": lambda: build(world, PP, weights=make_weights(other(ffn_size=56))),
        "weights of a deeper model": lambda: build(world, PP, weights=make_weights(other(num_layers=5))),
        "checkpoint of another vocabulary": lambda: load(other(vocab_size=48)),
        "checkpoint of a narrower model": lambda: load(other(ffn_size=56)),
        "checkpoint of a shallower model": lambda: load(other(num_layers=5)),
    }


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of 2 ranks is told, by case."""
    run = tmp_path_factory.mktemp("run")

    def job(world: World) -> dict[str, str]:
        saved = build(world, PP)
        path = save_checkpoint(run, 1, saved.pieces(), world, {}, keep=1)
        seen = {}
        for name, attempt in cases(world, path).items():
            try:
                attempt()
            except Exception as error:  # noqa: BLE001 - what a user would see
                seen[name] = f"{type(error).__name__}: {error}"
        seen["fits"] = str(load_checkpoint(path, build(world, TP).pieces(), expected={}))
        return seen

    return run_ranks(2, job)


SAID = {
    "number of ranks": [f"the plan ({ParallelPlan.for_llm(Layout(dp=2, tp=2))}) is for 4 ranks, but 2 were started"],
    "more stages than layers": [f"{LAYERS} layers cannot be cut into 6 pipeline stages; use at most {LAYERS}"],
    "virtual stages": ["virtual_stages = 2 with pp = 2 and schedule '1f1b'"],
    "zero bubble, ZeRO 3": ["needs zero = 1 in the LLM's layout, which has zero = 3"],
    "vocabulary below tp": [f"embed_tokens.weight of shape [1, {WIDTH}] has 1 rows", "tp = 2 ranks split 1 each: 1 of"],
    "no embedding": [f"1 weights are missing, such as {EMBED}"],
    "no last norm": [f"1 weights are missing, such as {LAST_NORM}"],
    "weights of another vocabulary": [EMBED, f"has shape [48, {WIDTH}], the model [{VOCAB}, {WIDTH}]"],
    "weights of a wider model": ["mlp.gate_proj.weight' has shape [56, 32], the model [48, 32]"],
    "weights of a deeper model": [
        f"weights hold 'language_model.model.layers.{LAYERS}.",
        "which the model does not have",
    ],
    "checkpoint of another vocabulary": [f"{EMBED} has {VOCAB} rows there, 48 here"],
    "checkpoint of a narrower model": ["mlp.gate_proj.weight has 48 rows there, 56 here", "and 33 more"],
    "checkpoint of a shallower model": [
        f"it has no model.language_model.model.layers.{LAYERS}.",
        "which has shape [32] here",
    ],
}


@pytest.mark.parametrize("case", SAID)
def test_every_rank_names_what_does_not_fit(errors: list[dict[str, str]], case: str) -> None:
    for seen in errors:  # also ranks that do not hold the tensor: none goes on alone
        assert seen[case].startswith("ValueError: ")
        for part in SAID[case]:
            assert part in seen[case]


def test_what_fits_is_loaded_after_all_that(errors: list[dict[str, str]]) -> None:
    assert [seen["fits"] for seen in errors] == ["1"] * 2


def test_a_rank_that_is_killed_in_a_step_is_named(tmp_path: Path) -> None:
    steps = make_steps()

    def job(world: World) -> None:
        engine = build(world, PP_TP)
        batch = share_out(steps[0], PP_TP, world.rank, SMALL.tokens_per_tile)
        engine.train_step(batch, denominator(steps[0]))
        if world.rank == 3:
            layer = engine.language.stages[0].root.get_submodule(f"model.layers.{LAYERS - 1}")
            layer.register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            (tmp_path / "time").write_text(str(time.time()))
        engine.train_step(batch, denominator(steps[0]))

    with pytest.raises(RankFailedError, match=r"^rank 3 was killed by SIGKILL$"):
        run_ranks(4, job, timeout=300)
    assert time.time() - float((tmp_path / "time").read_text()) < 60  # far below the timeout of collectives
