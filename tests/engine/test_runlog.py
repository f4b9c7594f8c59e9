"""What a run writes: exact numbers in JSONL, a line for people, curves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.engine.runlog import RunLog, peak_memory_gib, step_line


def numbers(step: int, loss: float = 1.25) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "tokens_per_second": 12345.6,
        "visual_tokens_per_second": 2345.0,
        "mfu": 0.314,
        "peak_memory_gib_per_rank": 1.5,
        "pack_fill": 0.987,
        "llm_imbalance": 1.0042,
        "vit_imbalance": 1.0,
        "data_wait": 0.02,
    }


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run: Path, start: int, steps: range, **options: Any) -> None:
    with RunLog(run, total_steps=10, start_step=start, enabled=True, **({"tensorboard": False} | options)) as log:
        for step in steps:
            log.step(numbers(step, loss=1 / step + start), show=step % 2 == 0)


def test_the_line_has_the_fields_form() -> None:
    assert step_line(numbers(7)) == (
        "step      7 | loss 1.2500 | grad norm 0.500 | lr 1.00e-04 | 12,346 tok/s | 2,345 visual tok/s | MFU 31.4%"
        " | load LLM 1.004 ViT 1.000 | mem 1.50 GiB | fill 98.7% | wait 2.0%"
    )


def test_every_step_is_recorded_exactly_and_some_are_shown(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(n, 1 / n) for n in range(1, 6)]
    shown = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("|")[0].split()[1] for line in shown] == ["2", "4"]


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the line that was being written when the power went
    write(tmp_path, 3, range(4, 7))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines(tmp_path)[3:]] == [1 / n + 3 for n in range(4, 7)]


def test_a_new_start_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 0, range(1, 2))
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_validation_is_recorded_beside_the_steps(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=4, start_step=0, enabled=True, tensorboard=False) as log:
        log.step(numbers(2), show=False)
        log.validation(2, 0.75, 1234)
        log.message("a [bold]line[/bold] as it is")
    assert lines(tmp_path)[1] == {"step": 2, "val_loss": 0.75}
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "step      2 | validation loss 0.7500 over 1,234 supervised tokens",
        "a [bold]line[/bold] as it is",
    ]


def test_curves_hold_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(1, 4), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (n, pytest.approx(1 / n, rel=1e-6)) for n in range(1, 4)
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", total_steps=4, start_step=0, enabled=False) as log:
        log.step(numbers(1), show=True)
        log.validation(1, 0.5, 2)
        log.message("unheard")
    assert not (tmp_path / "run").exists()


def test_files_are_closed_after_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        RunLog(tmp_path, total_steps=4, start_step=0, enabled=True, tensorboard=False) as log,
    ):
        log.step(numbers(1), show=False)
        raise RuntimeError("stop")
    assert not log.enabled
    assert lines(tmp_path)[0]["step"] == 1


def test_memory_of_a_cpu_rank_is_its_resident_set() -> None:
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64


def test_events_are_recorded_and_shown(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=9, start_step=4, enabled=True, tensorboard=False) as log:
        log.event(4, "dataset 'maps' is new in the index")
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event == {"step": 4, "event": "dataset 'maps' is new in the index"}
    assert "at step 4: dataset 'maps' is new" in (tmp_path / "log.txt").read_text()
