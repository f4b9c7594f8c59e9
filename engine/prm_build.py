"""Builds process reward data from a model's own solutions (spec §5.1); ranks share the questions out.

    meta.json ─► questions ─► solutions ─► OUT/samples ─► prefixes ─► rollouts ─► OUT/rollouts
                 rank::size  └─ or a candidate file's                                 │ all ranks done: rank 0
    OUT/steps/{dataset}.jsonl, OUT/{dataset}.jsonl, OUT/meta.json, OUT/summary.json ◄─┘ prm_merge

A build that is started again goes on where it ended, with any number of ranks. Solutions and the answers of rollouts
stay: other rules, thresholds and kinds of conversation need nothing new from the model.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evovlm.data.answers.rules import open_scorers
from evovlm.data.meta import load_meta
from evovlm.engine.answer_sampler import AnswerSampler, OpenGenerator
from evovlm.engine.answer_store import AnswerStore
from evovlm.engine.best_of_n_candidates import CandidateFile
from evovlm.engine.build_folder import claim, stored_settings
from evovlm.engine.prm_merge import merge
from evovlm.engine.prm_rollouts import RolloutSampler
from evovlm.engine.prm_settings import PrmSettings
from evovlm.parallel.world import World

_READING = ("method", "meta", "prompt", "max_steps")  # what samples and rollouts are read by; the rest only made them

PhaseReport = Callable[[str, int, int], None]
"""Called as ("solutions" or "rollouts", questions done, questions in all), both of this rank's share."""


def build_prm(
    meta: Path,
    out: Path,
    settings: PrmSettings,
    world: World,
    open_generator: OpenGenerator | None,
    *,
    model: str = "",
    report: PhaseReport | None = None,
) -> dict[str, Any]:
    """Sample solutions, roll their steps out, and label these; every rank calls this.

    Args:
        meta: InternVL's meta JSON of the questions, conversations or preference pairs.
        out: Folder to write; it is made, or holds an earlier start of the same build.
        settings: What to do.
        world: The ranks; they need a process group.
        open_generator: What answers; None: judge and label the solutions and rollouts that are there.
        model: Name of what answers: a folder takes samples of one model only.
        report: Told how far this rank is.

    Returns:
        The summary, which is also written to ``OUT/summary.json``; empty on ranks other than 0.

    Raises:
        FileNotFoundError: No such meta JSON or candidate file, or no samples to be judged again.
        FileExistsError: ``out`` holds something else.
        MetaError: The meta JSON, or a dataset of it, cannot be used.
        ValueError: ``out`` holds samples of other settings or other questions, the candidate file is one of other
            questions, or no step could be labelled.
        GenerationError: The model or server cannot answer.
    """
    datasets = load_meta(meta).datasets
    settings.rules.check_datasets(dataset.name for dataset in datasets)
    reuse = open_generator is None
    asking = settings.asking
    share = asking.share(datasets, world.rank, world.size)
    candidates = None
    if settings.solutions is not None and not reuse:
        candidates = CandidateFile(settings.solutions, datasets, asking)
    if world.is_main:
        claim(out, settings.identity(meta, model), kind="process reward data", reading=_READING if reuse else None)
    world.barrier()
    if reuse:
        settings = replace(settings, num_rollouts=stored_settings(out)["num_rollouts"])
    report = report or (lambda *_: None)
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers({settings.rules.of(dataset.name) for dataset in datasets}))
        samples = stack.enter_context(AnswerStore(out / "samples", world.rank))
        rollouts = stack.enter_context(AnswerStore(out / "rollouts", world.rank))
        world.barrier()  # a rank cuts a torn line off its file: not while others read it
        ask_model = None if settings.solutions is not None else open_generator
        sampler = AnswerSampler(asking, samples, scorers, ask_model, partial(report, "solutions"), share)
        roller = RolloutSampler(
            settings, samples, rollouts, scorers, open_generator, partial(report, "rollouts"), share
        )
        # One tile cap after the other: each may need a generator of its own.
        for dataset in sorted(datasets, key=lambda dataset: dataset.max_tiles or 0):
            if candidates is not None:
                candidates.copy(dataset, asking, samples, world.rank, world.size)
            sampler.sample(dataset, world.rank, world.size)
            if not settings.outcome:
                roller.roll_out(dataset, world.rank, world.size)
        world.barrier()
        if world.is_main:
            samples.refresh()
            rollouts.refresh()
            unusable = candidates.errors if candidates is not None else ()
            summary = merge(datasets, out, samples, rollouts, settings, unusable)
    world.barrier()
    return summary
