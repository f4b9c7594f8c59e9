"""Runs of preference optimisation, small: precomputed and resident references, layouts, an interruption, bad input."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from evovlm.engine.checkpoint import list_checkpoints, read_meta
from evovlm.engine.engine import Engine
from evovlm.engine.open_model import open_dir, open_run
from evovlm.engine.runs import export_run
from evovlm.engine.settings import RunSettings
from evovlm.engine.trainer import train
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .small_data import draw_shapes, small_index

MakeSettings = Callable[..., RunSettings]
MakeRun = Callable[..., RunSettings]
TIMES = {"seconds", "tokens_per_second", "visual_tokens_per_second", "mfu", "data_wait", "peak_memory_gib_per_rank"}
LOADS = {"llm_imbalance", "vit_imbalance", "outliers"}
STEPS = 5


def numbers(run: Path) -> list[dict[str, Any]]:
    """What depends on the training alone, whatever the layout."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES | LOADS} for line in lines]


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float) -> bool:
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for first in (ours[0], theirs[0]):
        del first["rewards/accuracies"]  # both rewards are 0 but for rounding
    return all(ours[i] == pytest.approx(theirs[i], rel=rel, abs=rel) for i in range(len(theirs)))


@pytest.fixture(scope="module")
def pair_indexes(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``train`` and ``val``: pairs about shapes in one to five tiles, about two images, and about none."""
    built = {}
    for split, count in (("train", 14), ("val", 4)):
        folder = tmp_path_factory.mktemp(f"pairs_{split}")
        shapes = draw_shapes(folder, count)
        lines: list[dict[str, Any]] = [
            {
                "image": file,
                "question": "Which shape?",
                "chosen": f"It is a {shape}.",
                "rejected": f"It is a {'disc' if shape == 'box' else 'box and more'}.",
            }
            for file, shape in shapes
        ]
        lines.append(
            {
                "image": [shapes[0][0], shapes[1][0]],
                "question": "<image> or <image>?",
                "chosen": f"{shapes[0][1]} first",
                "rejected": "neither",
            }
        )
        lines.append({"question": "1 + 1?", "chosen": "2", "rejected": "3, I think"})
        (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        entry = {"root": str(folder), "annotation": str(folder / "pairs.jsonl")}
        (folder / "meta.json").write_text(json.dumps({"pairs": entry}))
        report = small_index(
            folder / "meta.json", tiny_tokenizer_dir, folder / "index", kind="preference", system_prompt="Read."
        )
        built[split] = report.path
    return built


@pytest.fixture(scope="module")
def make_run(make_settings: MakeSettings, pair_indexes: dict[str, Path]) -> MakeRun:
    """Factory of settings of a short run on pairs, in float64."""

    def make(out: Path, **changes: Any) -> RunSettings:
        data = {"index": pair_indexes["train"], "val_index": pair_indexes["val"], "packs_per_step": 4}
        sections: dict[str, Any] = {
            "stage": {"name": "mpo"},
            "model": {"drop_path": 0.0},
            "precision": "float64",
            "steps": STEPS,
            "validate_every": 0,
            "checkpoint": {"every": 2, "keep": 9},
            **changes,
        }
        sections["data"] = data | sections.get("data", {})
        return make_settings(out, **sections)

    return make


class PowerCutError(Exception):
    """Ends a process between two steps."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mpo")


@pytest.fixture(scope="module")
def story(runs: Path, make_run: MakeRun, pair_indexes: dict[str, Path], indexes: dict[str, Path]) -> dict[str, Any]:
    """Every run of this file on two ranks, and what was seen on the way."""

    def job(world: World) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def error(settings: RunSettings, resume: str = "none") -> str:
            try:
                train(settings, world, resume)
            except (FileExistsError, FileNotFoundError, ValueError) as problem:
                return f"{type(problem).__name__}: {problem}"
            finally:
                world.barrier()
            return "no error"

        train(make_run(runs / "whole"), world)
        (scores,) = (pair_indexes["train"] / "reference").glob("*.safetensors")
        seen["scores"] = str(scores)
        seen["written"] = scores.stat().st_mtime_ns

        # Power fails in step 4; the last checkpoint is that of step 2.
        original, calls = Engine.apply, 0

        def apply(self: Engine, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise PowerCutError
            return original(self, *args, **kwargs)

        Engine.apply = apply  # type: ignore[method-assign]
        try:
            train(make_run(runs / "cut"), world)
        except PowerCutError:
            seen["cut"] = len(numbers(runs / "cut"))
        finally:
            Engine.apply = original  # type: ignore[method-assign]
        world.barrier()
        train(make_run(runs / "cut"), world, "auto")
        seen["read"] = scores.stat().st_mtime_ns

        one = {"llm": {"tp": 2}, "vit": {"tp": 2}}
        train(make_run(runs / "tp2", parallel=one), world)
        train(make_run(runs / "pp2", parallel={"llm": {"pp": 2}}), world)
        train(make_run(runs / "previous", stage={"name": "mpo", "loss": {"shift": "previous"}}), world)
        train(make_run(runs / "resident", reference={"mode": "resident"}), world)
        train(make_run(runs / "own plan", reference={"mode": "resident", "parallel": one}), world)
        train(make_run(runs / "dropping", reference={"mode": "resident"}, model={"drop_path": 0.4}), world)
        sft = {"name": "mpo", "loss": {"dpo_weight": 0, "bco_weight": 0}}
        train(make_run(runs / "sft", stage=sft), world)

        # The pass is interrupted: half of its scores are not there.
        if world.is_main:
            half = runs / "half.safetensors"
            with safe_open(scores, framework="pt") as file:
                table, identity = file.get_tensor("log_probs"), file.metadata()
            table[::2] = math.nan
            save_file({"log_probs": table}, half, identity)
            shutil.copy(scores, runs / "copy.safetensors")
        world.barrier()
        train(make_run(runs / "continued", reference={"cache": runs / "half.safetensors"}), world)

        # The first run's result is another model: its scores have another name, or are refused under this one.
        other = {"from_dir": runs / "whole" / "export"}
        train(make_run(runs / "from_dir", reference=other), world)
        copy = {"cache": runs / "copy.safetensors"}
        seen["other model"] = error(make_run(runs / "bad", reference=other | copy))
        seen["other strides"] = error(
            make_run(runs / "bad", stage={"name": "mpo", "v2pe": {"mode": "off"}}, reference=copy)
        )
        if world.is_main:
            (runs / "torn.safetensors").write_bytes(b"\x10")
        world.barrier()
        seen["torn"] = error(make_run(runs / "bad", reference={"cache": runs / "torn.safetensors"}))
        seen["no folder"] = error(make_run(runs / "bad", reference={"cache": runs / "torn.safetensors" / "scores"}))
        seen["other reference"] = error(make_run(runs / "cut", reference=other), "auto")
        seen["other loss"] = error(make_run(runs / "cut", stage={"name": "mpo", "loss": {"beta": 0.2}}), "auto")
        seen["conversations"] = error(make_run(runs / "bad", data={"index": indexes["train"]}))
        seen["sft on pairs"] = error(make_run(runs / "bad", stage={"name": "sft"}))
        return seen

    return run_ranks(2, job, timeout=300)[0]


def test_first_step_is_as_published(story: dict[str, Any], runs: Path) -> None:
    first = numbers(runs / "whole")[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert first["bco_loss"] == pytest.approx(2 * math.log(2), abs=1e-12)
    assert first["loss"] == pytest.approx(0.8 * math.log(2) + 0.4 * math.log(2) + first["nll_loss"], abs=1e-12)
    assert first["reward_shift"] == pytest.approx(0, abs=1e-12)
    assert first["logps/chosen"] < 0


def test_training_prefers_the_chosen(story: dict[str, Any], runs: Path) -> None:
    lines = [line for line in numbers(runs / "whole") if "loss" in line]
    assert len(lines) == STEPS
    assert lines[-1]["rewards/margins"] > 0.05
    assert lines[-1]["rewards/chosen"] > 0
    assert lines[-1]["rewards/accuracies"] >= 0.7
    assert lines[-1]["reward_shift"] != 0
    (val,) = [line for line in numbers(runs / "whole") if "val_loss" in line]
    assert 0 <= val["val_rewards/accuracies"] <= 1
    assert val["val_dpo_loss"] != pytest.approx(math.log(2), abs=1e-6)


def test_resumed_equals_uninterrupted(story: dict[str, Any], runs: Path) -> None:
    assert story["cut"] == 3
    assert numbers(runs / "cut") == numbers(runs / "whole")
    states = []
    for run in ("whole", "cut"):
        newest = list_checkpoints(runs / run)[-1][1]
        states.append(read_meta(newest)["reward_shift"])
    assert states[0] == states[1]
    assert states[0]["count"] == sum(line.get("pairs", 0) for line in numbers(runs / "whole"))


@pytest.mark.parametrize("run", ["tp2", "pp2", "resident", "own plan", "continued"])
def test_the_same_numbers(story: dict[str, Any], runs: Path, run: str) -> None:
    assert close(numbers(runs / run), numbers(runs / "whole"), 1e-9)


def test_shift_of_the_step_before(story: dict[str, Any], runs: Path) -> None:
    whole, previous = ([x for x in numbers(runs / run) if "loss" in x] for run in ("whole", "previous"))
    assert [line["reward_shift"] for line in previous[:2]] == pytest.approx([0, 0], abs=1e-12)
    assert previous[1]["loss"] != whole[1]["loss"]
    assert previous[2]["reward_shift"] == pytest.approx(whole[1]["reward_shift"], rel=0.01)


def test_a_resident_reference_drops_the_same_paths(story: dict[str, Any], runs: Path) -> None:
    dropping, whole = numbers(runs / "dropping")[0], numbers(runs / "whole")[0]
    assert dropping["dpo_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert dropping["nll_loss"] != pytest.approx(whole["nll_loss"], rel=1e-6)


def test_without_a_reference(story: dict[str, Any], runs: Path) -> None:
    line = numbers(runs / "sft")[0]
    assert line["loss"] == line["nll_loss"]
    assert "rewards/chosen" not in line


def test_scores_are_made_once_and_kept(story: dict[str, Any], runs: Path) -> None:
    assert story["read"] == story["written"]
    with safe_open(story["scores"], framework="pt") as file:
        table = file.get_tensor("log_probs").numpy()
    assert table.shape == (16, 2)
    assert np.isfinite(table).all()


def test_another_reference_model(story: dict[str, Any], runs: Path) -> None:
    first = next(line for line in numbers(runs / "from_dir") if "loss" in line)
    assert first["dpo_loss"] > math.log(2)  # it prefers the chosen answers, the policy does not yet
    assert "are of another reference model or other data: weights is" in story["other model"]
    assert "v2pe is" in story["other strides"]
    assert "cannot be read" in story["torn"]
    assert "scores cannot be kept in" in story["no folder"]
    assert "reference.weights is" in story["other reference"]
    assert "stage.loss.beta is 0.1 there, 0.2 here" in story["other loss"]


@pytest.mark.usefixtures("story")
def test_exports_ask_as_training_did(runs: Path, tmp_path: Path) -> None:
    """The index gave every pair a system turn: whoever serves the model learns it from the chat template."""
    from transformers import AutoTokenizer

    own = runs / "whole" / "export"
    text = AutoTokenizer.from_pretrained(own).apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert text == "<|im_start|>system\nRead.<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
    assert open_run(runs / "whole").prompts.system_prompt == "Read."
    assert open_dir(own).prompts.system_prompt == "Read."
    assert open_dir(own, system_prompt="Look.").prompts.system_prompt == "Look."
    export_run(runs / "whole", tmp_path / "later", "transformers")
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        assert (own / name).read_bytes() == (tmp_path / "later" / name).read_bytes(), name


def test_the_index_must_be_of_the_stage(story: dict[str, Any]) -> None:
    assert "--kind preference" in story["conversations"]
    assert "--kind conversations" in story["sft on pairs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"drop_path": 0.1}}, r"drop_path = 0.1.*resident"),
        ({"stage": {"name": "mpo", "v2pe": {"mode": "random"}}}, "draws strides anew"),
        ({"data": {"long_samples": "split"}}, "never split"),
        ({"stage": {"name": "sft"}, "reference": {"mode": "resident"}}, "belongs to stage"),
        ({"reference": {"parallel": {"llm": {"tp": 2}}}}, "lays out a resident model"),
        ({"reference": {"mode": "resident", "cache": "scores"}}, "keeps no scores"),
        ({"stage": {"name": "mpo", "loss": {"dpo_weight": 0, "bco_weight": 0, "nll_weight": 0}}}, "nothing to train"),
        ({"stage": {"name": "mpo", "loss": {"beta": 0}}}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(make_run: MakeRun, runs: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_run(runs / "bad", **changes)
