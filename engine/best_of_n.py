"""Best-of-N: several candidates to each question, critics that choose, accuracy against N (spec §5.2).

    meta.json ─► questions ─► AnswerSampler ───────┐            rank::size of the questions
    candidate file, of the same questions ─────────┴─► OUT/samples ─► OUT/candidates.jsonl
                                                          │
                              reward models ◄─────────────┤     rank::size
                              OUT/scores ─────────────────┴─► OUT/summary.json, OUT/selected.jsonl   rank 0

A measurement that is started again goes on where it ended: candidates and scores stay. Other rules, critics and
reductions need nothing new from a model.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evovlm.data.answers.rules import open_scorers
from evovlm.data.candidates import CandidateSet, write_candidates
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta, load_meta
from evovlm.engine.answer_sampler import AnswerSampler, Asking, OpenGenerator, Report
from evovlm.engine.answer_store import AnswerStore
from evovlm.engine.best_of_n_candidates import CandidateFile, stored
from evovlm.engine.best_of_n_report import Merger
from evovlm.engine.best_of_n_settings import BestOfNSettings
from evovlm.engine.build_folder import claim
from evovlm.engine.score_store import RewardModel, ScoreShare, ScoreStore, score_shares
from evovlm.parallel.world import World

CANDIDATES = "candidates.jsonl"

OpenCritic = Callable[[str, int | None], RewardModel]
"""Called as (``prm`` or ``orm``, a dataset's tile cap) when there is something to score for it."""
ReportPhase = Callable[[str, int, int], None]
"""Called as (what is done, questions done, questions in all), both of this rank's share."""


def best_of_n(
    meta: Path,
    out: Path,
    settings: BestOfNSettings,
    world: World,
    *,
    open_generator: OpenGenerator | None = None,
    candidates: Path | None = None,
    model: str = "",
    open_critic: OpenCritic | None = None,
    reward_models: Mapping[str, Mapping[str, Any]] | None = None,
    report: ReportPhase | None = None,
) -> dict[str, Any]:
    """Make candidates, have critics choose, and measure; every rank calls this.

    Args:
        meta: InternVL's meta JSON of the questions.
        out: Folder to write; it is made, or holds an earlier start of the same measurement.
        settings: What to do.
        world: The ranks; they need a process group.
        open_generator: What makes candidates; None: they come from a file.
        candidates: The file.
        model: Name of what makes candidates: a folder takes those of one model only.
        open_critic: Opens a reward model.
        reward_models: ``prm`` or ``orm`` → all that its scores depend on. The rewards of one that is not here are
            those of the candidate file.
        report: Told how far this rank is.

    Returns:
        The summary, which is also written to ``OUT/summary.json``; empty on ranks other than 0.

    Raises:
        FileNotFoundError: No such meta JSON or candidate file.
        FileExistsError: ``out`` holds something else.
        MetaError: The meta JSON, or a dataset of it, cannot be used.
        ValueError: ``out`` holds candidates of other settings or other questions, the candidate file is of other
            questions, a critic has no rewards, or no question has candidates.
        GenerationError: The model or server cannot answer.
    """
    datasets = load_meta(meta).datasets
    settings.rules.check_datasets(dataset.name for dataset in datasets)
    reward_models = reward_models or {}
    file = None if candidates is None else CandidateFile(candidates, datasets, settings.asking)
    if file is not None:
        settings = replace(settings, num=min(settings.num, file.most))
    check_rewards(settings, reward_models, file)
    if world.is_main:
        claim(out, settings.identity(meta, model, candidates), kind="Best-of-N candidates")
    world.barrier()
    # One tile cap after the other: each may need a model of its own.
    in_order = sorted(datasets, key=lambda dataset: dataset.max_tiles or 0)
    asking, share = settings.asking, settings.asking.share(datasets, world.rank, world.size)
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers({settings.rules.of(dataset.name) for dataset in datasets}))
        samples = stack.enter_context(AnswerStore(out / "samples", world.rank))
        stores = {name: stack.enter_context(AnswerStore(out / "scores" / name, world.rank)) for name in reward_models}
        scores = {name: ScoreStore(store, reward_models[name]) for name, store in stores.items()}
        world.barrier()  # a rank cuts a torn line off its file: not while others read it
        report_share = _phase(report, "candidates")
        sampler = AnswerSampler(asking, samples, scorers, open_generator, report_share, share)
        for dataset in in_order:
            if file is not None:
                file.copy(dataset, asking, samples, world.rank, world.size)
            sampler.sample(dataset, world.rank, world.size)
        world.barrier()
        samples.refresh()
        merged = Merger(samples, scores, scorers, settings)
        if world.is_main:
            write_candidates(out / CANDIDATES, merged.sets(datasets))
        for name, store in scores.items():
            assert open_critic is not None
            shares = [
                (
                    ScoreShare(partial(_with_candidates, dataset, asking, samples), store, world.rank, world.size),
                    partial(open_critic, name, dataset.max_tiles),
                )
                for dataset in in_order
            ]
            score_shares(shares, _phase(report, name))
        world.barrier()
        summary: dict[str, Any] = {}
        if world.is_main:
            for name, lines in stores.items():
                lines.refresh()
                write_candidates(out / "scores" / f"{name}.jsonl", merged.sets(datasets, name))
            summary = merged.write(datasets, out, file.errors if file is not None else [])
    world.barrier()
    return summary


def check_rewards(settings: BestOfNSettings, with_model: Collection[str], file: CandidateFile | None) -> None:
    """Check that every critic has rewards to go by.

    Args:
        settings: Name the critics.
        with_model: Those whose rewards a model computes.
        file: The candidate file, whose rewards stand for those of one other critic.

    Raises:
        ValueError: One has none, or two would share those of the file.
    """
    without = [critic for critic in settings.reward_models if critic not in with_model]
    if not without:
        return
    if file is None:
        raise ValueError(f"critic {without[0]} needs a reward model: name its folder with --critic-model")
    if not file.has_rewards():
        raise ValueError(
            f"{file.path} has no rewards for critic {without[0]}: score it first (evovlm score), or name a reward "
            "model with --critic-model"
        )
    if len(without) > 1:
        raise ValueError(f"the rewards in {file.path} are of one critic, not of {' and '.join(without)}")


def _with_candidates(dataset: DatasetMeta, asking: Asking, samples: AnswerStore) -> Iterator[CandidateSet]:
    return (found[1] for found in stored(dataset, asking, samples) if not isinstance(found, SampleError))


def _phase(report: ReportPhase | None, name: str) -> Report:
    return (lambda *_: None) if report is None else lambda done, total: report(name, done, total)
