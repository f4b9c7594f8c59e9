"""The training loop of every stage: plan, load, step, record, validate, save, export.

    RunSettings ─► index, mixture, planner ─► loader ─► the stage's steps ─► RunLog
                                                           │ every n steps: validation loss, checkpoint
                                                           ▼ at the end
                                                       export/  (Hugging Face)

``evovlm train`` calls :func:`train`; a run that is interrupted and resumed writes the numbers of one that was not.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evovlm.data.step_plan import StepPlan, describe_outliers, imbalance
from evovlm.engine.build import build_engine
from evovlm.engine.checkpoint import drop_later, list_checkpoints, load_checkpoint, read_meta, save_checkpoint
from evovlm.engine.engine import Engine
from evovlm.engine.flops import forward_flops, peak_flops, training_flops
from evovlm.engine.model_source import ModelSource, open_source
from evovlm.engine.optimizer import lr_factor
from evovlm.engine.preference_run import PreferenceRun
from evovlm.engine.prm_steps import PRMSteps
from evovlm.engine.run_data import RunData, open_data
from evovlm.engine.runlog import RunLog, peak_memory_gib
from evovlm.engine.runs import start_run
from evovlm.engine.schedule import changes_of_data, dataset_entries
from evovlm.engine.score_prompts import sign_ids
from evovlm.engine.settings import DTYPES, RunSettings
from evovlm.engine.steps import Steps, SupervisedSteps
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.names import Format
from evovlm.models.hf.save import save_pretrained
from evovlm.parallel.describe import describe_plan
from evovlm.parallel.world import World

_TOLD_OUTLIERS = 5


def train(settings: RunSettings, world: World, resume: str = "none") -> Path:
    """Train a run to its end.

    Args:
        settings: The run.
        world: The ranks; every rank calls this.
        resume: ``none``: start anew, in a directory without checkpoints; ``auto``: continue from the newest complete
            checkpoint, or start; otherwise the directory of a checkpoint.

    Returns:
        The run directory.

    Raises:
        FileExistsError: The directory holds checkpoints and ``resume`` is ``none``.
        ValueError: The checkpoint is of another run, or drew other data up to its step.
        FloatingPointError: Loss or gradient is not finite; no weight was changed by that step.
    """
    source = open_source(settings.model, settings.seed)
    data = open_data(settings, source, world)
    checkpoint = _resume_point(settings.out, resume)
    preference = PreferenceRun(settings, data, world) if settings.stage.name == "mpo" else None
    if preference is not None:
        source = preference.watch(source)
    engine = build_engine(settings, source, world)
    # Before a checkpoint is loaded: the weights that the run starts from may be the reference.
    steps: Steps = _supervised_steps(settings, source, engine) if preference is None else preference.steps(engine)
    identity = _identity(settings, source, data)
    if preference is not None:
        identity["reference"] = preference.identity
    start, changes = 0, []
    if checkpoint is not None:
        saved = read_meta(checkpoint)
        changes = changes_of_data(saved, identity)
        start = load_checkpoint(checkpoint, engine.pieces(), expected=_fixed(identity))
        steps.restore(saved)
    if world.is_main:
        start_run(settings, source, data.system_prompt)
        data.cost_model.save(settings.out / "cost_model.json")
    world.barrier()
    with (
        RunLog(
            settings.out,
            total_steps=data.total_steps,
            start_step=start,
            enabled=world.is_main,
            tensorboard=settings.log.tensorboard,
        ) as log,
        _stop_signal() as stop,
    ):
        for line in (*data.describe(), *describe_plan(data.plan).splitlines()):
            log.message(line)
        if checkpoint is not None:
            log.message(f"resumed from {checkpoint} at step {start}")
            for change in changes:
                log.event(start, change)
            for path in drop_later(settings.out, start) if world.is_main else ():
                log.message(f"deleted {path}, which this run has left behind")
        finished = _Loop(settings, world, source, data, engine, steps, identity, log, stop).run(start)
        if finished and settings.export != "none":
            export(engine, source.config, settings.out, settings.export, settings.data.normalize)
            log.message(f"exported to {settings.out / 'export'} ({settings.export} format)")
    return settings.out


def _supervised_steps(settings: RunSettings, source: ModelSource, engine: Engine) -> SupervisedSteps:
    if settings.stage.name == "prm":
        return PRMSteps(engine, sign_ids(source.tokenizer))
    return SupervisedSteps(engine)


def export(engine: Engine, config: InternVLConfig, run: Path, format: Format, normalize: str) -> None:
    """Write a run's Hugging Face directory; every rank takes part in gathering, the main one writes."""
    tensors = engine.named_full_tensors()
    if engine.world.is_main:
        save_pretrained(
            config,
            tensors,
            run / "export",
            format=format,
            tokenizer_dir=run / "tokenizer",
            normalize=normalize,
            overwrite=True,
        )
    else:
        for _ in tensors:
            pass
    engine.world.barrier()


class _Loop:
    """Steps from ``start`` to the end of a run."""

    def __init__(
        self,
        settings: RunSettings,
        world: World,
        source: ModelSource,
        data: RunData,
        engine: Engine,
        steps: Steps,
        identity: dict[str, Any],
        log: RunLog,
        stop: threading.Event,
    ) -> None:
        self.settings, self.world, self.source, self.data = settings, world, source, data
        self.engine, self.steps, self.identity, self.log, self.stop = engine, steps, identity, log, stop
        self.told = 0  # steps whose outliers were told
        self.saved = -1  # step of the last checkpoint of this process
        if settings.log.peak_tflops is not None:
            self.peak = settings.log.peak_tflops * 1e12
        else:
            self.peak, where = peak_flops(world.device, DTYPES[settings.precision].compute)
            log.message(f"peak of a rank for MFU: {self.peak / 1e12:.3f} TFLOP/s ({where})")

    def run(self, start: int) -> bool:
        """Train; returns whether the run reached its end (a stop signal ends it early, with a checkpoint)."""
        settings, total = self.settings, self.data.total_steps
        loader = self.data.train_loader()
        began = time.perf_counter()
        for step, (plan, batch) in enumerate(loader.steps(start, total), start=start + 1):
            if plan.step % settings.log.plan_hash_every == 0:
                digest = plan.digest()
                self.world.agree(f"the plan of step {plan.step}", digest)
                self.log.message(f"step {plan.step + 1:>6} | plan {digest} on all ranks")
            self._tell_outliers(plan)
            factor = lr_factor(plan.step, total, settings.optim)
            result = self.steps.train_step(plan, batch, factor)
            seconds = time.perf_counter() - began
            stopping = self._record(step, plan, result, factor, seconds, loader.wait_seconds)
            if step < total:
                if settings.validate_every and step % settings.validate_every == 0:
                    self._validate(step)
                if stopping or (settings.checkpoint.every and step % settings.checkpoint.every == 0):
                    self._save(step)
                if stopping:
                    self.log.message(f"stopped by a signal after step {step}; continue with --resume auto")
                    return False
            began = time.perf_counter()
        if settings.data.val_index is not None and start < total:  # a finished run has this number already
            self._validate(total)
        self._save(total)
        return True

    def _record(
        self, step: int, plan: StepPlan, result: dict[str, Any], factor: float, seconds: float, waited: float
    ) -> bool:
        """Write the step's line; returns whether any rank was told to stop."""
        memory = peak_memory_gib(self.world.device)
        slowest, wait, memory, stopping = self.world.max([seconds, waited / seconds, memory, float(self.stop.is_set())])
        packs = plan.packs
        forward = forward_flops(self.source.config, plan.num_tiles, packs.lengths, plan.num_supervised, packs.squares)
        flops = training_flops(forward, self.settings.model.freeze)
        metrics = {
            "step": step,
            **result,
            "lr": self.settings.optim.lr * factor,
            "epoch": plan.epoch,
            "samples": plan.num_samples,
            "tokens": plan.num_tokens,
            "visual_tokens": plan.num_visual_tokens,
            "supervised_tokens": plan.num_supervised,
            "seconds": slowest,
            "tokens_per_second": plan.num_tokens / slowest,
            "visual_tokens_per_second": plan.num_visual_tokens / slowest,
            "mfu": flops.total / (slowest * self.peak * self.world.size),
            "vit_flops_share": flops.vit / flops.total,
            "pack_fill": plan.num_tokens / (len(plan.packs) * self.settings.data.pack_tokens),
            "llm_imbalance": imbalance(plan.llm_load),
            "vit_imbalance": imbalance(plan.vit_load),
            "outliers": len(plan.outliers),
            "data_wait": wait,
            "peak_memory_gib_per_rank": memory,
        }
        every = self.settings.log.every
        self.log.step(metrics, show=step % every == 0 or step == 1 or step == self.data.total_steps)
        return stopping > 0

    def _tell_outliers(self, plan: StepPlan) -> None:
        """Say which samples cost more than a rank's share of their step; no balance can make up for them."""
        if not len(plan.outliers) or self.told >= _TOLD_OUTLIERS:
            return
        self.told += 1
        last = "; not told again" if self.told == _TOLD_OUTLIERS else ""
        outliers = describe_outliers(plan, self.data.index, self.data.plan.llm.cp)
        self.log.message(f"step {plan.step + 1:>6} | {outliers}{last}")

    def _validate(self, step: int) -> None:
        found = self.steps.validate(self.data.validation_loader())
        self.log.validation(step, found.loss, found.tokens, found.metrics)

    def _save(self, step: int) -> None:
        if step == self.saved:
            return
        self.saved = step
        began = time.perf_counter()
        path = save_checkpoint(
            self.settings.out,
            step,
            self.engine.pieces(),
            self.world,
            {**self.identity, **self.steps.state()},
            self.settings.checkpoint.keep,
        )
        self.log.message(f"saved {path} in {time.perf_counter() - began:.1f} s")


def _identity(settings: RunSettings, source: ModelSource, data: RunData) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, or the data would silently be others."""
    return {
        "model": asdict(source.config),
        "tokenizer": source.tokenizer.fingerprint,
        "index": dataset_entries(data.index.datasets),
        "schedule": data.schedule,
        "normalize": settings.data.normalize,
        "seed": settings.seed,
        "stage": settings.stage.model_dump(mode="json"),
        "packing": settings.data.model_dump(
            mode="json",
            include={
                "pack_tokens",
                "pack_tiles",
                "packs_per_step",
                "window",
                "even_packs",
                "balance_steps",
                "long_samples",
            },
        ),
    }


def _fixed(identity: dict[str, Any]) -> dict[str, Any]:
    """What no resumed run may change; the others are compared by ``changes_of_data``."""
    return {name: value for name, value in identity.items() if name not in ("index", "schedule")}


def _resume_point(run: Path, resume: str) -> Path | None:
    found = list_checkpoints(run)
    if resume == "none":
        if found:
            raise FileExistsError(
                f"{run} already holds checkpoints up to step {found[-1][0]}: continue with --resume auto, "
                "or choose another run directory"
            )
        return None
    if resume == "auto":
        return found[-1][1] if found else None
    return Path(resume)


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set an event on SIGTERM or SIGINT, so that the run can save first; a second signal ends it at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in watched}

    def handle(number: int, _frame: Any) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in watched:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in watched:
            signal.signal(number, before[number])
