"""What a run writes while it trains: a line per step for people, JSONL and TensorBoard for programs.

    RUN/metrics.jsonl    one object per step, exact numbers (a resumed run drops the steps that it does again)
    RUN/events.jsonl     what changed the run: datasets or weights from a step on
    RUN/log.txt          the lines that a terminal shows
    RUN/tensorboard/     the same numbers as curves

All numbers are over all ranks, except where their name says ``per_rank``.
"""

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


def step_line(metrics: Mapping[str, Any]) -> str:
    """Format one step in the field's usual form."""
    return (
        f"step {metrics['step']:>6} | loss {metrics['loss']:.4f}{stage_line(metrics)}"
        f" | grad norm {metrics['grad_norm']:.3f} | lr {metrics['lr']:.2e} | {metrics['tokens_per_second']:,.0f} tok/s"
        f" | {metrics['visual_tokens_per_second']:,.0f} visual tok/s | MFU {metrics['mfu']:.1%}"
        f" | load LLM {metrics['llm_imbalance']:.3f} ViT {metrics['vit_imbalance']:.3f}"
        f" | mem {metrics['peak_memory_gib_per_rank']:.2f} GiB | fill {metrics['pack_fill']:.1%}"
        f" | wait {metrics['data_wait']:.1%}"
    )


def stage_line(metrics: Mapping[str, Any]) -> str:
    """What a step or a validation pass says of preference pairs, or of judged steps, if there were any."""
    if "step_accuracy" in metrics:
        return f" | {metrics['step_accuracy']:.1%} of steps judged right, macro-F1 {metrics['macro_f1']:.3f}"
    if "rewards/margins" not in metrics:
        return ""
    return (
        f" (DPO {metrics['dpo_loss']:.4f}, BCO {metrics['bco_loss']:.4f}, NLL {metrics['nll_loss']:.4f})"
        f" | margin {metrics['rewards/margins']:+.3f}, {metrics['rewards/accuracies']:.0%} right"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated device memory on CUDA, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Writer of a run's numbers; on ranks other than the main one it writes nothing.

    Args:
        run: Run directory.
        total_steps: Steps of the whole run, for the progress bar.
        start_step: First step of this process; later lines of an earlier attempt are dropped.
        enabled: Whether this rank writes.
        tensorboard: Whether to write TensorBoard events too.
    """

    def __init__(
        self, run: Path, *, total_steps: int, start_step: int, enabled: bool, tensorboard: bool = True
    ) -> None:
        self.enabled = enabled
        self._progress: Progress | None = None
        if not enabled:
            return
        self._run = run
        self._console = Console()
        metrics = run / "metrics.jsonl"
        _drop_steps_from(metrics, start_step)
        self._metrics = metrics.open("a")
        self._text = (run / "log.txt").open("a")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=start_step) if tensorboard else None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("training", total=total_steps, completed=start_step)
            self._progress.start()

    def message(self, text: str) -> None:
        """Show a line and keep it in ``log.txt``."""
        if self.enabled:
            (self._progress.console if self._progress else self._console).print(
                text, markup=False, highlight=False, soft_wrap=True
            )
            self._text.write(text + "\n")
            self._text.flush()

    def event(self, step: int, text: str) -> None:
        """Record something that changed the run, in ``events.jsonl``, and show it."""
        if self.enabled:
            with (self._run / "events.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "event": text}) + "\n")
            self.message(f"at step {step}: {text}")

    def step(self, metrics: Mapping[str, Any], *, show: bool) -> None:
        """Record one step; ``show`` says whether people see it too."""
        if not self.enabled:
            return
        self._record("train", metrics)
        if show:
            self.message(step_line(metrics))
        if self._progress:
            self._progress.update(self._task, completed=metrics["step"])

    def validation(self, step: int, loss: float, tokens: int, metrics: Mapping[str, float] | None = None) -> None:
        """Record a validation pass after ``step`` steps, with the stage's own metrics."""
        if self.enabled:
            own = dict(metrics or {})
            self._record("val", {"step": step, "val_loss": loss, **{f"val_{name}": own[name] for name in own}})
            said = stage_line(own)
            self.message(f"step {step:>6} | validation loss {loss:.4f}{said} over {tokens:,} supervised tokens")

    def _record(self, group: str, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(dict(metrics)) + "\n")
        self._metrics.flush()
        if self._events:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "step":
                    self._events.add_scalar(f"{group}/{name}", value, metrics["step"])

    def close(self) -> None:
        """Flush and close everything."""
        if not self.enabled:
            return
        if self._progress:
            self._progress.stop()
        for file in (self._metrics, self._text, self._events):
            if file is not None:
                file.close()
        self.enabled = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_steps_from(metrics: Path, start_step: int) -> None:
    """Keep only the lines of steps that a resumed run does not do again; ``step`` counts from 1."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run was interrupted
        if step <= start_step:
            kept.append(line + "\n")
    metrics.write_text("".join(kept))
