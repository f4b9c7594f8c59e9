"""A real run, small: two ranks train on drawn shapes and text, are interrupted and resumed, validate and export."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.checkpoint import checkpoint_dir, list_checkpoints
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import open_source
from evovlm.engine.optimizer import lr_factor
from evovlm.engine.run_data import open_data
from evovlm.engine.runs import load_model
from evovlm.engine.settings import RunSettings
from evovlm.engine.trainer import train
from evovlm.models.internvl import InternVL
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .support import plain_loss, whole_packs

MakeSettings = Callable[..., RunSettings]
STEPS = 6
TIMES = {"seconds", "tokens_per_second", "visual_tokens_per_second", "mfu", "data_wait", "peak_memory_gib_per_rank"}
"""What differs between two runs of the same thing."""

ALONE = World(0, 1, torch.device("cpu"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, Any]]:
    """All of a run's numbers that depend on the training alone."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(run)]


def of_any_layout(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that every number of ranks has in common."""
    loads = {"llm_imbalance", "vit_imbalance", "outliers"}
    return [{name: value for name, value in line.items() if name not in loads} for line in lines]


class PowerCutError(Exception):
    """Ends a process in the middle of a step."""


@contextmanager
def before_step(number: int, happens: Callable[[], None]) -> Iterator[None]:
    """Let something happen when the n-th step of this process begins, counted from 1."""
    original, calls = Engine.train_step, 0

    def step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            happens()
        return original(self, *args, **kwargs)

    Engine.train_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.train_step = original  # type: ignore[method-assign]


def cut() -> None:
    raise PowerCutError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def story(runs: Path, make_settings: MakeSettings, indexes: dict[str, Path]) -> dict[str, Any]:
    """Every run of this file on two ranks, and what was seen on the way."""

    def job(world: World) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def error(settings: RunSettings, resume: str) -> str:
            try:
                train(settings, world, resume)
            except (FileExistsError, FileNotFoundError, ValueError) as problem:
                return f"{type(problem).__name__}: {problem}"
            return "no error"

        train(make_settings(runs / "whole"), world)

        # Power fails in step 6: step 5 is in the metrics, but the last checkpoint is that of step 4.
        settings = make_settings(runs / "cut")
        try:
            with before_step(6, cut):
                train(settings, world)
        except PowerCutError:
            seen["before the cut"] = [line["step"] for line in metrics(runs / "cut")]
        world.barrier()
        seen["used"] = error(settings, "none")
        seen["seed"] = error(make_settings(runs / "cut", seed=1), "auto")
        seen["stage"] = error(make_settings(runs / "cut", stage={"name": "pretrain", "weighting": "token"}), "auto")
        seen["data"] = error(make_settings(runs / "cut", data={"index": indexes["val"]}), "auto")
        seen["pixels"] = error(make_settings(runs / "cut", data={"normalize": "clip"}), "auto")
        seen["nowhere"] = error(settings, str(runs / "cut" / "checkpoints" / "step-00000003"))
        world.barrier()
        if world.is_main:  # none of these is a checkpoint
            (runs / "cut" / "checkpoints" / "step-00000005.partial").mkdir()
            (runs / "cut" / "checkpoints" / "step-00000099").mkdir()
        world.barrier()
        train(settings, world, "auto")

        # The scheduler asks one rank to stop.
        settings = make_settings(runs / "stopped")

        def ask() -> None:
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        handler = signal.getsignal(signal.SIGTERM)
        with before_step(3, ask):
            train(settings, world, "auto")  # auto in an empty directory starts
        seen["handler is back"] = signal.getsignal(signal.SIGTERM) is handler
        seen["stopped"] = (
            [n for n, _ in list_checkpoints(runs / "stopped")],
            [line["step"] for line in metrics(runs / "stopped")],
        )
        seen["exported"] = (runs / "stopped" / "export").exists()
        world.barrier()
        train(settings, world, "auto")

        # A finished run has nothing left to do.
        before = metrics(runs / "stopped")
        world.barrier()
        train(settings, world, "auto")
        seen["again"] = metrics(runs / "stopped") == before

        # From a checkpoint in the middle, and with all data left as it is.
        if world.is_main:
            shutil.copytree(checkpoint_dir(runs / "whole", 2), runs / "elsewhere")
        world.barrier()
        train(make_settings(runs / "middle"), world, str(runs / "elsewhere"))

        # From step 4 on the mixture is another one: it has to be said, and is recorded.
        other = {"weights": {"shapes": 1.0, "text": 0.0}}
        if world.is_main:
            shutil.copytree(checkpoint_dir(runs / "whole", 4), runs / "fourth")
        world.barrier()
        seen["changed unsaid"] = error(make_settings(runs / "changed", data=other), str(runs / "fourth"))
        other["phases"] = [{"steps": 4, "datasets": ["shapes", "text"]}]
        train(make_settings(runs / "changed", data=other), world, str(runs / "fourth"))

        train(make_settings(runs / "float64", precision="float64", steps=3, validate_every=0, export="none"), world)
        return seen

    return run_ranks(2, job, timeout=300)[0]


def test_a_run_records_every_step_and_its_validation(story: dict[str, Any], runs: Path) -> None:
    lines = numbers(runs / "whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [4, STEPS]
    for line in lines:
        assert 0 < line.get("loss", line.get("val_loss")) < 20
    steps = [line for line in metrics(runs / "whole") if "loss" in line]
    for line in steps:
        assert line.keys() >= TIMES
        assert 0 < line["pack_fill"] <= 1
        assert 0 <= line["data_wait"] <= 1
        assert 0 < line["vit_flops_share"] < 1
        assert line["tokens"] > line["visual_tokens"] >= 0
    assert steps[0]["lr"] == pytest.approx(3e-3 / 3)
    text = (runs / "whole" / "log.txt").read_text()
    for part in (
        "shapes (multimodal)",
        "text (language)",
        "6 steps of 4 packs = 2 data-parallel ranks × 2",
        "exported to",
    ):
        assert part in text


@pytest.mark.parametrize("run", ["cut", "stopped"])
def test_an_interrupted_run_writes_bitwise_the_same_numbers(story: dict[str, Any], runs: Path, run: str) -> None:
    assert numbers(runs / run) == numbers(runs / "whole")
    ours, whole = (dict(load_model(runs / name).named_parameters()) for name in (run, "whole"))
    assert all(torch.equal(ours[name], parameter) for name, parameter in whole.items())


def test_a_power_cut_is_resumed_at_the_newest_complete_checkpoint(story: dict[str, Any], runs: Path) -> None:
    assert story["before the cut"] == [1, 2, 3, 4, 4, 5]  # 4 twice: validation
    assert "at step 4" in (runs / "cut" / "log.txt").read_text()


def test_a_signal_to_one_rank_saves_and_stops_all(story: dict[str, Any], runs: Path) -> None:
    assert story["stopped"] == ([2, 3], [1, 2, 3])
    assert not story["exported"]
    assert story["handler is back"]
    assert "stopped by a signal after step 3; continue with --resume auto" in (runs / "stopped" / "log.txt").read_text()


def test_a_finished_run_stays_as_it_is(story: dict[str, Any]) -> None:
    assert story["again"]


def test_a_checkpoint_can_be_named(story: dict[str, Any], runs: Path) -> None:
    after = [line for line in numbers(runs / "whole") if line["step"] > 2]
    assert numbers(runs / "middle") == after


def test_a_used_directory_is_not_overwritten(story: dict[str, Any], runs: Path) -> None:
    assert story["used"].startswith(f"FileExistsError: {runs / 'cut'} already holds checkpoints up to step 4")
    assert "--resume auto" in story["used"]


def test_a_run_resumes_as_itself_only(story: dict[str, Any]) -> None:
    assert "seed is 0 there, 1 here" in story["seed"]
    assert "stage.weighting is 'square' there, 'token' here" in story["stage"]
    assert "normalize is 'imagenet' there, 'clip' here" in story["pixels"]
    assert "dataset 'shapes' of the checkpoint's index is [0, 7, 400, 34, 20] here, [0, 27, " in story["data"]
    assert "is not a complete checkpoint" in story["nowhere"]


def test_a_change_of_the_mixture_is_said_and_recorded(
    story: dict[str, Any], runs: Path, make_settings: MakeSettings
) -> None:
    assert "put the steps so far into [[data.phases]], with steps that add up to 4" in story["changed unsaid"]
    (event,) = [json.loads(line) for line in (runs / "changed" / "events.jsonl").read_text().splitlines()]
    assert event["step"] == 4
    assert event["event"].startswith("from step 4 on: from step 4 shapes × 1 at 1:3; it was to be from step 4 shapes +")
    assert event["event"] in (runs / "changed" / "log.txt").read_text()
    lines = [line for line in metrics(runs / "changed") if "loss" in line]
    assert [line["step"] for line in lines] == [5, 6]
    assert all(line["samples"] and line["visual_tokens"] for line in lines)


def test_another_number_of_ranks_goes_on_with_the_same_run(
    story: dict[str, Any], runs: Path, make_settings: MakeSettings
) -> None:
    shutil.copytree(checkpoint_dir(runs / "whole", 2), checkpoint_dir(runs / "alone", 2))
    settings = make_settings(runs / "alone", export="none")
    run_ranks(1, lambda world: train(settings, world, "auto"))
    after = [line for line in numbers(runs / "whole") if line["step"] > 2]
    for ours, theirs in zip(of_any_layout(numbers(runs / "alone")), of_any_layout(after), strict=True):
        assert ours == {
            name: pytest.approx(value, rel=1e-4 if name == "grad_norm" else 2e-5) for name, value in theirs.items()
        }


def test_epochs_may_change_their_ranks_on_the_way(runs: Path, make_settings: MakeSettings) -> None:
    """One rank, then four, then two: every global step trains on what it would have, none lost, none repeated."""
    changes: dict[str, Any] = {"steps": None, "epochs": 3.0, "checkpoint": {"every": 1}, "validate_every": 0}
    changes["stage"] = {"name": "pretrain", "language_ratio": "natural"}  # every sample once in an epoch
    settings = make_settings(runs / "epoch", export="none", **changes)
    data = open_data(settings, open_source(settings.model, settings.seed), ALONE)
    drawn: list[tuple[int, int]] = []

    def part(ranks: int, stop: int | None) -> None:
        def job(world: World) -> None:
            try:
                with before_step(stop or 99, cut):
                    train(settings, world, "auto")
            except PowerCutError:
                assert stop

        run_ranks(ranks, job, timeout=300)

    for ranks, stop in ((1, 3), (4, 4), (2, None)):  # the step of this process that fails
        part(ranks, stop)
    whole = make_settings(runs / "epoch whole", export="none", **changes)
    run_ranks(2, lambda world: train(whole, world), timeout=300)
    ours, theirs = (of_any_layout(numbers(runs / name)) for name in ("epoch", "epoch whole"))
    assert [line["step"] for line in ours if "loss" in line] == list(range(1, data.total_steps + 1))
    assert data.total_steps > 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == {name: pytest.approx(v, rel=1e-4 if name == "grad_norm" else 2e-5) for name, v in b.items()}
        if "loss" in a:
            plan = data.curriculum.plan_step(a["step"] - 1, data.layout)
            assert (a["samples"], a["tokens"], a["visual_tokens"]) == (
                plan.num_samples, plan.num_tokens, plan.num_visual_tokens
            )  # fmt: skip
            drawn += zip(plan.packs.samples.tolist(), plan.packs.visits.tolist(), strict=True)
    assert len(set(drawn)) == len(drawn)
    left = data.curriculum.last.stream.unused(data.total_steps)[2]
    drawn += zip(left.samples.tolist(), left.visits.tolist(), strict=True)
    assert {(sample, visit) for sample, visit in drawn if visit < 3} == {
        (sample, visit) for sample in range(len(data.index.samples)) for visit in range(3)
    }


def test_a_run_may_change_its_layout(story: dict[str, Any], runs: Path, make_settings: MakeSettings) -> None:
    """Resumed on four ranks, the LLM in a pipeline of tensor-parallel stages, the ViT tensor parallel: the same run."""
    shutil.copytree(checkpoint_dir(runs / "float64", 2), checkpoint_dir(runs / "reshaped", 2))
    parallel = {"llm": {"pp": 2, "tp": 2, "zero": 1}, "vit": {"tp": 2}, "encode_tiles": 3}
    settings = make_settings(runs / "reshaped", steps=3, precision="float64", validate_every=0, parallel=parallel)
    run_ranks(4, lambda world: train(settings, world, "auto"), timeout=300)
    after = [line for line in numbers(runs / "float64") if line["step"] > 2]
    for ours, theirs in zip(of_any_layout(numbers(runs / "reshaped")), of_any_layout(after), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-10) for name, value in theirs.items()}
    ours, whole = (dict(load_model(runs / name).named_parameters()) for name in ("reshaped", "float64"))
    for name, parameter in whole.items():
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-9 * float(parameter.detach().abs().max()))
    exported, reference = (load_file(runs / name / "export" / "model.safetensors") for name in ("reshaped", "whole"))
    assert set(exported) == set(reference)
    assert "llm tp: 2 groups of 2" in (runs / "reshaped" / "log.txt").read_text()


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_built(
    make_settings: MakeSettings, runs: Path
) -> None:
    settings = make_settings(runs / "unfit", parallel={"llm": {"tp": 4}})
    with pytest.raises(ValueError, match=r"K = 2 KV heads .* tp = 4"):
        train(settings, World(0, 4, torch.device("cpu")))
    settings = make_settings(runs / "unfit", parallel={"llm": {"pp": 3}})
    with pytest.raises(ValueError, match=r"pp 3 = 3 does not divide the run's 4 ranks"):
        train(settings, World(0, 4, torch.device("cpu")))
    assert not (runs / "unfit").exists()


def test_a_run_is_a_plain_loop_over_its_plan(story: dict[str, Any], runs: Path, make_settings: MakeSettings) -> None:
    settings = make_settings(runs / "float64", steps=3, precision="float64", validate_every=0)
    source = open_source(settings.model, settings.seed)
    model = InternVL(source.config).double().train()
    model.load_state_dict(dict(source.weights))
    decaying = [
        p
        for n, p in model.named_parameters()
        if p.ndim > 1 and "embeddings.position" not in n and "class_embedding" not in n
    ]
    others = [p for p in model.parameters() if not any(p is q for q in decaying)]
    groups = [{"params": decaying, "weight_decay": settings.optim.weight_decay}, {"params": others, "weight_decay": 0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=settings.optim.betas, eps=settings.optim.eps, foreach=False)
    lines = [line for line in numbers(runs / "float64") if "loss" in line]
    for (plan, step), line in zip(open_data(settings, source, ALONE).train_loader().steps(0, 3), lines, strict=True):
        batches = whole_packs(step)
        total = sum((plain_loss(model, batch) for batch in batches), torch.zeros((), dtype=torch.float64))
        weight = sum(float(batch.weights.double().sum()) for batch in batches)
        assert plan.loss_denominator == pytest.approx(weight, rel=1e-6)
        (total / plan.loss_denominator).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_norm))
        assert line["loss"] == pytest.approx(float(total.detach()) / plan.loss_denominator, rel=1e-10)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert line["tokens"] == plan.num_tokens
        for group in adam.param_groups:
            group["lr"] = settings.optim.lr * lr_factor(plan.step, 3, settings.optim)
        adam.step()
        adam.zero_grad()


def test_the_validation_loss_is_the_mean_over_the_held_out_index(
    story: dict[str, Any], runs: Path, make_settings: MakeSettings
) -> None:
    settings = make_settings(runs / "whole")
    data = open_data(settings, open_source(settings.model, settings.seed), ALONE)
    model, loss, weight, samples = load_model(runs / "whole"), 0.0, 0.0, 0
    with torch.no_grad():
        for plan, step in data.validation_loader():
            (batch,) = whole_packs(step)
            loss += float(plain_loss(model, batch))
            weight += float(batch.weights.sum())
            samples += plan.num_samples
    assert data.val_index is not None
    assert samples == len(data.val_index.samples)
    assert numbers(runs / "whole")[-1] == {"step": STEPS, "val_loss": pytest.approx(loss / weight, rel=1e-5)}


def test_the_export_loads_in_transformers(story: dict[str, Any], runs: Path, tiny_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    exported = InternVLForConditionalGeneration.from_pretrained(runs / "whole" / "export").eval()
    model = load_model(runs / "whole")
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(1, 3, 8, 8, generator=generator)
    tokens = torch.randint(0, 300, (12,), generator=generator)
    tokens[3:7] = exported.config.image_token_id
    with torch.no_grad():
        ours = model(tokens, torch.arange(12.0), torch.tensor([0, 12], dtype=torch.int32), tile, torch.arange(3, 7))
        theirs = exported(input_ids=tokens[None], pixel_values=tile).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(runs / "whole" / "export")
    text = "Which shape? <box> naïve"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(tiny_tokenizer_dir).encode(text)


def test_an_index_of_another_vocabulary_is_an_error(
    runs: Path, make_settings: MakeSettings, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    from evovlm.data.tokenizer_training import build_tokenizer

    other = build_tokenizer(["some other text"], tmp_path / "tok", 290)
    settings = make_settings(tmp_path / "run", model={"from_dir": None, "size": "tiny", "tokenizer": other})
    source = open_source(settings.model, 0)
    with pytest.raises(ValueError, match=r"tokenizer of 384 ids, this one has 2\d\d"):
        open_data(settings, source, ALONE)
    # The same tokenizer, but a model of another tile.
    settings = make_settings(
        tmp_path / "run", model={"from_dir": None, "size": "tiny", "tokenizer": tiny_tokenizer_dir}
    )
    with pytest.raises(ValueError, match=r"the model has tile_size = 56, index .* was built for 8"):
        open_data(settings, open_source(settings.model, 0), ALONE)


def test_packs_that_ranks_cannot_share_are_an_error(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    source = open_source(settings.model, 0)
    with pytest.raises(ValueError, match=r"packs_per_step = 4 cannot be dealt to dp = 3 ranks alike"):
        open_data(settings, source, World(0, 3, torch.device("cpu")))


def test_epochs_are_counted_in_packs(make_settings: MakeSettings, tmp_path: Path) -> None:
    def total_steps(epochs: float) -> int:
        settings = make_settings(tmp_path, steps=None, epochs=epochs)
        return open_data(settings, open_source(settings.model, 0), ALONE).total_steps

    settings = make_settings(tmp_path)
    data = open_data(settings, open_source(settings.model, 0), ALONE)
    assert data.total_steps == 6
    assert total_steps(1.0) == round(data.curriculum.last.num_packs(1) / 4)
    assert total_steps(3.0) == round(data.curriculum.last.num_packs(3) / 4)
    assert total_steps(0.5) == round(data.curriculum.last.num_packs(1) / 8)
    assert total_steps(1e-6) == 1
