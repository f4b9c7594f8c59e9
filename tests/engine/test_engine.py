"""Training does not depend on the layout: every one equals a plain loop in one process, in float64.

The four packs of a step go to 1 × 4, 2 × 2 and 4 × 1 ranks × microbatches; some ranks have no image, one step has
none at all, drop path is on, gradients are clipped.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from evovlm.data.share_out import WholePack, share_out
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine
from evovlm.engine.optimizer import lr_factor
from evovlm.models import decoder as decoder_module
from evovlm.models.hf.names import EMBEDDING, LM_HEAD
from evovlm.models.sharding import module_of
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

from .support import (
    OPTIM,
    SMALL,
    STEPS,
    TOKENS_PER_TILE,
    Trained,
    assert_same_training,
    build,
    data_plan,
    denominator,
    microbatch,
    plain_loss,
    plain_model,
    run_steps,
    train_plainly,
    weights_of,
)

TIED = replace(SMALL, decoder=replace(SMALL.decoder, tie_embeddings=True))


def alike(dp: int, zero: Literal[1, 2, 3], shard: int = 0) -> ParallelPlan:
    return data_plan(dp, zero=zero, shard=shard)


MIXED = ParallelPlan(vit=Layout(dp=4, zero=3, shard=2), projector=Layout(dp=4, zero=2), llm=Layout(dp=4, zero=1))
"""Every module its own layout: what the ViT does says nothing of the LLM."""

Options = dict[str, Any]
CASES: dict[tuple[int, str], Options] = {
    (2, "one unit for all"): {"min_unit": 10**9},
    (2, "one unit for all, zero 1"): {"min_unit": 10**9, "plan": alike(2, 1)},
    (4, "small units join the root where layouts agree"): {"min_unit": 10**9, "plan": MIXED},
    (1, "zero 3"): {},
    (2, "zero 1"): {"plan": alike(2, 1)},
    (2, "zero 2"): {"plan": alike(2, 2)},
    (2, "zero 3"): {"plan": alike(2, 3)},
    (2, "copies"): {"plan": alike(2, 1, shard=1)},
    (2, "recompute all"): {"recompute": {"vit": "full", "llm": "full"}},
    (2, "recompute some"): {"recompute": {"vit": "selective", "llm": "selective"}, "plan": alike(2, 1)},
    (4, "zero 1"): {"plan": alike(4, 1)},
    (4, "zero 3"): {"plan": alike(4, 3)},
    (4, "hybrid, zero 1"): {"plan": alike(4, 1, shard=2)},
    (4, "hybrid, zero 2"): {"plan": alike(4, 2, shard=2)},
    (4, "hybrid, zero 3"): {"plan": alike(4, 3, shard=2)},
    (4, "mixed"): {"plan": MIXED},
}
FROZEN: tuple[tuple[str, ...], ...] = (("vit",), ("llm",), ("vit", "projector"), ("projector", "llm"))


def in_world(size: int, job: Callable[[World], dict[Any, Any]]) -> dict[Any, Any]:
    """Results of rank 0; those of other ranks must be the same numbers."""
    results = run_ranks(size, job, timeout=300)
    for other in results[1:]:
        for case, trained in other.items():
            if isinstance(trained, Trained):
                assert (trained.losses, trained.norms) == (results[0][case].losses, results[0][case].norms)
    return results[0]


@pytest.fixture(scope="module")
def reference() -> Trained:
    return train_plainly()


@pytest.fixture(scope="module")
def trained() -> dict[tuple[int, str], Trained]:
    """Every case, one world for each number of ranks."""

    def job(world: World) -> dict[tuple[int, str], Trained]:
        mine = {case: options for case, options in CASES.items() if case[0] == world.size}
        return {case: run_steps(build(world, **options), options.get("plan")) for case, options in mine.items()}

    return {case: result for size in (1, 2, 4) for case, result in in_world(size, job).items()}


def test_the_cases_are_what_they_should_be(reference: Trained) -> None:
    for size in (2, 4):
        tiles = [sum(len(batch.tiles) for batch in STEPS[0][rank::size]) for rank in range(size)]
        assert min(tiles) == 0 < max(tiles)  # a rank whose packs are text beside a rank with images
    assert sum(len(batch.tiles) for batch in STEPS[1]) == 0
    assert any(not batch.weights.any() for batch in STEPS[2])
    assert any(reference.clipped)
    assert len(reference.weights) == len(list(weights_of(SMALL)))


def test_drop_path_is_on(reference: Trained) -> None:
    without = replace(SMALL, vision=replace(SMALL.vision, drop_path_rate=0.0))
    assert abs(train_plainly(without).losses[0] - reference.losses[0]) > 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} ranks, {case[1]}")
def test_every_layout_trains_like_one_process(
    case: tuple[int, str], trained: dict[tuple[int, str], Trained], reference: Trained
) -> None:
    assert_same_training(trained[case], reference)


@pytest.fixture(scope="module", params=[0, 10**9], ids=["a unit per block", "one unit for all"])
def variants(request: pytest.FixtureRequest) -> dict[Any, Any]:
    """Other models and settings, on two ranks that have both text and images, and text alone."""

    def job(world: World) -> dict[Any, Any]:
        make = partial(build, min_unit=request.param)
        results: dict[Any, Any] = {
            "tied": run_steps(make(world, TIED)),
            "float32": run_steps(make(world, precision="float32")),
        }
        engine = make(world, TIED)
        decoder = engine.parts.stages[0].root
        results["still tied"] = decoder.lm_head.weight is decoder.model.embed_tokens.weight  # type: ignore[union-attr]
        for freeze in FROZEN:
            engine = make(world, freeze=freeze)
            results[freeze] = run_steps(engine)
            frozen = [p for p in engine.state.parameters if module_of(p.name) in freeze]
            optimised = {id(p) for group in engine.state.optimizer.param_groups for p in group["params"]}
            results["gradients", freeze] = sum(p.gradient is not None or id(p.local) in optimised for p in frozen)
        return results

    return in_world(2, job)


def test_a_tied_head_stays_tied_under_sharding(variants: dict[Any, Any]) -> None:
    assert variants["still tied"]
    assert LM_HEAD not in variants["tied"].weights
    assert_same_training(variants["tied"], train_plainly(TIED))


def test_float32_follows_float64(variants: dict[Any, Any], reference: Trained) -> None:
    ours = variants["float32"]
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(reference.losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(ours.norms), torch.tensor(reference.norms), rtol=1e-4, atol=0)
    assert {w.dtype for w in ours.weights.values()} == {torch.float32}


@pytest.mark.parametrize("freeze", FROZEN, ids=" and ".join)
def test_frozen_modules_do_not_change(freeze: tuple[str, ...], variants: dict[Any, Any]) -> None:
    ours = variants[freeze]
    assert variants["gradients", freeze] == 0
    assert_same_training(ours, train_plainly(freeze=freeze))
    for name, start in weights_of(SMALL):
        assert torch.equal(ours.weights[name], start) == (module_of(name) in freeze), name


def gradients(engine: Engine) -> list[Tensor | None]:
    return [p.gradient for p in engine.state.parameters]


@pytest.fixture(scope="module")
def events() -> dict[str, Any]:
    """Things that happen to an engine, each seen from both ranks."""

    def job(world: World) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def share(packs: list[WholePack]) -> StepBatch:
            return share_out(packs, data_plan(2), world.rank, TOKENS_PER_TILE)

        # A damaged sample of one rank.
        damaged = microbatch(5, 1)
        damaged.tiles[0, 0, 0, 0] = math.inf
        engine = build(world)
        run_steps(engine, steps=STEPS[:1])
        before = dict(engine.named_full_tensors(everywhere=True))
        try:
            engine.train_step(share([microbatch(4, 0), damaged]), 3.0)
        except FloatingPointError as error:
            seen["damaged"] = str(error)
        seen["untouched"] = all(torch.equal(w, before[name]) for name, w in engine.named_full_tensors(everywhere=True))
        seen["dropped"] = all(g is None for g in gradients(engine))
        seen["afterwards"] = run_steps(engine, steps=STEPS[1:])

        # Evaluation in between changes nothing and counts what is there.
        for zero in (1, 3):
            engine = build(world, plan=alike(2, zero))  # type: ignore[arg-type]
            run_steps(engine, steps=STEPS[:1])
            seen[f"evaluated {zero}"] = engine.evaluate(
                share(packs) for packs in [*STEPS, [microbatch(9, 0, supervised=0.0), microbatch(8, 0, supervised=0.0)]]
            )
            seen[f"resumed {zero}"] = run_steps(engine, steps=STEPS[1:])

        # bfloat16: what the rotary angles are made of, and what stays wide.
        rotate, received = decoder_module.rotary_qk_, []

        def watched(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
            received.append((positions.dtype, bool((positions % 1 != 0).any())))
            return rotate(q, k, positions, inv_freq)

        decoder_module.rotary_qk_ = watched
        try:
            for zero in (1, 3):
                engine = build(world, plan=alike(2, zero), precision="bfloat16")  # type: ignore[arg-type]
                seen[f"bfloat16 {zero}"] = run_steps(engine)
                engine.evaluate([share(STEPS[0])])
                seen[f"masters {zero}"] = {w.dtype for _, w in engine.named_full_tensors(everywhere=True)}
        finally:
            decoder_module.rotary_qk_ = rotate
        seen["positions"] = set(received)

        # Nothing to learn at all.
        try:
            engine.train_step(share([microbatch(1, 1, supervised=0.0), microbatch(2, 0, supervised=0.0)]), 0.0)
        except ValueError as error:
            seen["no target"] = str(error)
        return seen

    return run_ranks(2, job, timeout=300)[0]


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(events: dict[str, Any], reference: Trained) -> None:
    assert "not finite; the step was not applied" in events["damaged"]
    assert events["untouched"]
    assert events["dropped"]
    # Nor does the optimizer remember: training goes on as if that step had never been.
    after = events["afterwards"]
    assert_same_training(after, Trained(reference.losses[1:], reference.norms[1:], after.clipped, reference.weights))


@pytest.mark.parametrize("zero", [1, 3])
def test_evaluation_is_the_mean_over_all_and_changes_nothing(
    zero: int, events: dict[str, Any], reference: Trained
) -> None:
    model = plain_model()
    one_step = train_plainly(steps=STEPS[:1]).weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(one_step[name])
        batches = [batch for step in STEPS for batch in step]
        expected = sum(float(plain_loss(model.eval(), batch)) for batch in batches)  # drop path off
    loss, weight = events[f"evaluated {zero}"]
    assert loss == pytest.approx(expected, rel=1e-10)
    assert weight == pytest.approx(denominator(batches), rel=1e-12)
    after = events[f"resumed {zero}"]
    assert_same_training(after, Trained(reference.losses[1:], reference.norms[1:], after.clipped, reference.weights))


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_computes_narrow_and_keeps_positions_and_masters_wide(
    zero: int, events: dict[str, Any], reference: Trained
) -> None:
    # True and False: packs with and without fractional positions.
    assert events["positions"] == {(torch.float32, True), (torch.float32, False)}
    assert events[f"masters {zero}"] == {torch.float32}  # also right after an evaluation
    narrow = events[f"bfloat16 {zero}"]
    torch.testing.assert_close(torch.tensor(narrow.losses), torch.tensor(reference.losses), rtol=0.02, atol=0)
    assert narrow.losses[0] != pytest.approx(reference.losses[0], rel=1e-6)  # it did compute in bfloat16


def test_a_step_without_a_target_is_an_error(events: dict[str, Any]) -> None:
    assert "none of its samples has a target" in events["no target"]


def test_a_frozen_vit_can_see_the_next_step_ahead() -> None:
    def job(world: World) -> tuple[Trained, str]:
        plan = data_plan(2)
        engine = build(world, freeze=("vit",))
        parts = [share_out(packs, plan, world.rank, TOKENS_PER_TILE) for packs in STEPS]
        results = []
        for part, packs in zip(parts, STEPS, strict=True):
            engine.prefetch(part)
            with monkeypatched_eyes(engine):  # the step itself must not look at tiles again
                results.append(engine.train_step(part, denominator(packs)))
        weights = dict(engine.named_full_tensors(everywhere=True))
        trained = Trained(
            [r.loss for r in results], [r.grad_norm for r in results], [r.clipped for r in results], weights
        )
        try:
            build(world).prefetch(parts[0])
        except ValueError as error:
            return trained, str(error)
        return trained, "no error"

    trained, error = run_ranks(2, job)[0]
    assert_same_training(trained, train_plainly(freeze=("vit",)))
    assert "only from a frozen ViT" in error


@contextmanager
def monkeypatched_eyes(engine: Engine) -> Iterator[None]:
    """Make the ViT fail if it is run."""
    model = engine.parts.model

    def see(*_: Any) -> Tensor:
        raise AssertionError("the ViT ran")

    model.see = see  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.see


def test_settings_and_weights_that_do_not_fit_are_errors() -> None:
    def job(world: World) -> list[str]:
        def message(**options: Any) -> str:
            try:
                build(world, **options)
            except ValueError as error:
                return str(error)
            return "no error"

        weights = dict(weights_of(SMALL))
        short = {name: w for name, w in weights.items() if name != EMBEDDING}
        return [
            message(freeze=("vit", "projector", "llm")),
            message(freeze=("vision",)),
            message(weights=iter(short.items())),
            message(weights=iter([*weights.items(), ("extra.weight", torch.zeros(1))])),
            message(weights=iter([(EMBEDDING, torch.zeros(3, 16))])),
        ]

    everything, module, missing, unknown, shape = run_ranks(1, job)[0]
    assert "every parameter is frozen" in everything
    assert "no module 'vision'; there are: vit, projector, llm" in module
    assert f"1 weights are missing, such as {EMBEDDING}" in missing
    assert "weights hold 'extra.weight', which the model does not have" in unknown
    assert f"weight {EMBEDDING!r} has shape [3, 16], the model [37, 16]" in shape


def test_the_schedule_scales_every_group() -> None:
    def job(world: World) -> list[dict[str, float]]:
        engine = build(world)
        rates = []
        for step in range(3):
            batch = share_out(STEPS[0], data_plan(1), 0, TOKENS_PER_TILE)
            engine.train_step(batch, denominator(STEPS[0]), lr_factor(step, 3, OPTIM))
            rates.append({group["name"]: group["lr"] for group in engine.state.optimizer.param_groups})
        return rates

    for step, rates in enumerate(run_ranks(1, job)[0]):
        factor = lr_factor(step, 3, OPTIM)
        base = {"vit": 0.005, "projector": 0.02, "llm": 0.01}
        assert rates == {name: pytest.approx(base[name.split("/")[0]] * factor) for name in rates}
