"""Models that are not ours, under the engine: transformers' Llama and Qwen3 as they are, and one with images around it.

The reference never touches the engine: transformers' own forward, segment by segment, and PyTorch's AdamW. Norms and
attention weights are float32 inside transformers whatever the model's dtype, so all is compared in float32.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evovlm.engine import Engine, EngineOptions, Layout, ParallelPlan, World, newest_checkpoint, share_out
from evovlm.engine.checkpoint import list_checkpoints
from evovlm.engine.equality import OPTIM, Difference, Trained, compare, denominator
from evovlm.models.hf.causal import named_weights, save_causal_lm
from evovlm.parallel.fork import run_ranks

from .hf_engine_support import (
    TOKENS_PER_TILE,
    ConvQwen,
    Steps,
    embed,
    make_lm,
    make_steps,
    maker,
    segment_losses,
    tables_of,
    train_plainly,
    vision_language_tables,
)

TEXT, IMAGES = make_steps(), make_steps(images=True)
FULL = EngineOptions(recompute={"llm": "full"})
Case = tuple[str, bool, Layout, EngineOptions]
CASES: dict[str, Case] = {
    "Llama": ("Llama", False, Layout(), EngineOptions()),
    "Qwen3": ("Qwen3", False, Layout(), FULL),
    "Llama dp2 zero3": ("Llama", False, Layout(dp=2, zero=3), FULL),
    "Llama tp2": ("Llama", False, Layout(tp=2), EngineOptions()),
    "Llama cp2": ("Llama", False, Layout(cp=2), EngineOptions()),
    "Llama pp2": ("Llama", False, Layout(pp=2), EngineOptions()),
    "Qwen3 tied tp2": ("Qwen3", True, Layout(tp=2), FULL),
    "Qwen3 tied pp2": ("Qwen3", True, Layout(pp=2), EngineOptions()),
    "Llama tp2 hp2 zero3": ("Llama", False, Layout(tp=2, hp=2, zero=3), EngineOptions()),
    "Qwen3 tp2 hp2 zero3": ("Qwen3", False, Layout(tp=2, hp=2, zero=3), EngineOptions()),
}


def build_text(case: Case, world: World, weights: Iterable[tuple[str, Tensor]] | None = None) -> Engine:
    kind, tied, layout, options = case
    return Engine.build(
        maker(kind, tied=tied),
        ParallelPlan.for_llm(layout),
        world,
        optim=OPTIM,
        weights=weights or named_weights(make_lm(kind, tied=tied)),
        options=options,
        tables=tables_of(kind),
    )


def build_with_images(plan: ParallelPlan, world: World) -> Engine:
    return Engine.build(
        lambda: ConvQwen(maker("Qwen3")()),
        plan,
        world,
        optim=OPTIM,
        weights=named_weights(conv_qwen()),
        tables=vision_language_tables(),
    )


def conv_qwen() -> ConvQwen:
    """The same model around transformers' own: random weights, the same every time."""
    return ConvQwen(make_lm("Qwen3"))


def run(engine: Engine, plan: ParallelPlan, steps: Steps) -> Trained:
    parts = [share_out(packs, plan, engine.world.rank, TOKENS_PER_TILE) for packs in steps]
    engine.backward(parts[0], denominator(steps[0]))
    gradients = dict(engine.named_full_gradients())
    engine.state.zero_gradients()
    results = [engine.train_step(part, denominator(packs)) for part, packs in zip(parts, steps, strict=True)]
    return Trained(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.clipped for result in results],
        dict(engine.named_full_tensors()),
        gradients,
    )


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Train under one plan, save, go on; load under another plan, go on alike; export."""
    first = CASES["Qwen3 tp2 hp2 zero3"]
    second: Case = ("Qwen3", False, Layout(pp=2, tp=2, zero=1), EngineOptions())
    weights: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for case in (first, second):
        zeros = ((name, torch.zeros_like(value)) for name, value in named_weights(make_lm("Qwen3")))
        engine = build_text(case, world, None if case is first else zeros)
        plan = ParallelPlan.for_llm(case[2])
        parts = [share_out(packs, plan, world.rank, TOKENS_PER_TILE) for packs in TEXT]
        if case is first:
            engine.train_step(parts[0], denominator(TEXT[0]))
            engine.save(folder, 1, meta={"model": {"kind": "Qwen3"}})
        else:
            errors = load_errors(engine, world, folder)
            assert engine.load(newest_checkpoint(folder), expected={"model": {"kind": "Qwen3"}}) == 1
        losses.append([engine.train_step(parts[n], denominator(TEXT[n])).loss for n in (1, 2)])
        weights.append(dict(engine.named_full_tensors()))
    total, weight = engine.evaluate(parts[:1])
    tensors = engine.named_full_tensors()
    if world.is_main:
        save_causal_lm(maker("Qwen3")(), tensors, folder / "export", max_shard_bytes=10_000)
    else:
        assert not list(tensors)
    return {"losses": losses, "weights": weights, "evaluated": total / weight, "errors": errors}


def load_errors(engine: Engine, world: World, folder: Path) -> list[str]:
    checkpoint = newest_checkpoint(folder)
    llama = build_text(("Llama", False, Layout(dp=world.size), EngineOptions()), world)
    qwen = build_text(("Qwen3", True, Layout(dp=world.size), EngineOptions()), world)
    attempts: list[Callable[[], object]] = [
        lambda: engine.load(checkpoint, expected={"model": {"kind": "Llama"}}),
        lambda: engine.load(folder / "checkpoints" / "step-00000009"),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            attempt()
        messages.append(str(caught.value))
    # A checkpoint may hold more than a model needs: of Qwen3, all that a Llama, or a tied head, has.
    assert llama.load(checkpoint) == qwen.load(checkpoint) == 1
    return messages


def unfilled_buffer(world: World) -> str:
    def make() -> ConvQwen:
        model = ConvQwen(maker("Qwen3")())
        model.bridge.register_buffer("scale", torch.ones(()))
        return model

    plan, weights = ParallelPlan.for_llm(Layout()), named_weights(conv_qwen())
    with pytest.raises(ValueError, match="buffer") as caught:
        Engine.build(make, plan, world, optim=OPTIM, weights=weights, tables=vision_language_tables())
    return str(caught.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that needs ranks: one world of each size."""
    folder = tmp_path_factory.mktemp("hf_engine")

    def job(world: World) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, case in CASES.items():
            plan = ParallelPlan.for_llm(case[2])
            if plan.size == world.size:
                found[name] = run(build_text(case, world), plan, TEXT)
        if world.size == 1:
            found["unfilled"] = unfilled_buffer(world)
        if world.size == 2:
            bf16: Case = ("Llama", False, Layout(tp=2), EngineOptions(precision="bfloat16"))
            found["bfloat16"] = run(build_text(bf16, world), ParallelPlan.for_llm(bf16[2]), TEXT)
        if world.size == 4:
            plan = ParallelPlan.for_llm(Layout(tp=2, dp=2))
            found["images"] = run(build_with_images(plan, world), plan, IMAGES)
            found["resumed"] = resume(world, folder)
            found["folder"] = folder
        return found

    return {name: found for size in (1, 2, 4) for name, found in run_ranks(size, job, timeout=300)[0].items()}


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, bool], Trained]:
    kinds = sorted({(kind, tied) for kind, tied, _, _ in CASES.values()})
    return {(kind, tied): train_plainly(make_lm(kind, tied=tied), TEXT) for kind, tied in kinds}


def check(difference: Difference) -> None:
    assert difference.largest < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_in_one_process(
    case: str, results: dict[str, Any], references: dict[tuple[str, bool], Trained]
) -> None:
    reference = references[CASES[case][:2]]
    assert any(reference.clipped)
    check(compare(results[case], reference))


def test_bfloat16(results: dict[str, Any], references: dict[tuple[str, bool], Trained]) -> None:
    difference = compare(results["bfloat16"], references["Llama", False])
    assert 1e-6 < difference.loss < 0.03
    assert next(iter(results["bfloat16"].weights.values())).dtype == torch.float32


def test_a_vision_language_model_that_is_not_ours(results: dict[str, Any]) -> None:
    reference = train_plainly(conv_qwen(), IMAGES)
    assert {name.split(".")[0] for name in reference.gradients} == {"encoder", "bridge", "language"}
    assert all(gradient.abs().max() > 0 for gradient in reference.gradients.values())
    check(compare(results["images"], reference))


def test_buffers_must_be_filled_by_the_model(results: dict[str, Any]) -> None:
    assert "Linear has a buffer 'scale', which a model built on the meta device must fill itself" in results["unfilled"]


def test_a_checkpoint_goes_on_under_another_plan(
    results: dict[str, Any], references: dict[tuple[str, bool], Trained]
) -> None:
    resumed = results["resumed"]
    for losses, weights in zip(resumed["losses"], resumed["weights"], strict=True):
        reference = references["Qwen3", False]
        again = Trained(losses, reference.norms[1:], [], weights)
        check(compare(again, Trained(reference.losses[1:], reference.norms[1:], [], reference.weights)))
    assert "model.kind is 'Qwen3' there, 'Llama' here" in resumed["errors"][0]
    assert "step-00000009 is not a complete checkpoint" in resumed["errors"][1]


def test_transformers_loads_the_export(results: dict[str, Any]) -> None:
    lm: Any = AutoModelForCausalLM.from_pretrained(results["folder"] / "export", attn_implementation="eager")
    assert type(lm).__name__ == "Qwen3ForCausalLM"
    weights = results["resumed"]["weights"][1]
    loaded = dict(lm.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    total = sum(sum(segment_losses(lm, pack, embed(lm, pack))) for pack in TEXT[0])
    assert float(total.detach()) / denominator(TEXT[0]) == pytest.approx(results["resumed"]["evaluated"], rel=1e-5)


def test_the_example(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "docs" / "examples" / "train_hf_decoder.py"
    assert len(example.read_text().splitlines()) <= 60
    done = subprocess.run([sys.executable, example, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+ +loss (\S+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[0] > 5.5
    assert max(losses[-3:]) < 4.2
    assert list_checkpoints(tmp_path) == [(10, newest_checkpoint(tmp_path))]
