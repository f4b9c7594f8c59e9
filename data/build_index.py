"""Builds an index: scans every dataset of a meta JSON in parallel, validates each line, caches its token ids.

    meta.json ─► datasets ─► tasks (stretches of lines or documents)        this process
                               │ spawned workers: parse, read image sizes, tile, tokenise (``index_work.py``)
                               ▼
                             chunks, in order ─► ``IndexWriter`` ─► OUT/    this process, one chunk at a time

The result does not depend on the number of workers. Lines that cannot be used are counted by reason and listed in
``skipped.jsonl``; a dataset that loses more than half of its lines is an error.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from evovlm.data.errors import MetaError, Reason, SampleError
from evovlm.data.index_current import is_current, settings_hash, source_files
from evovlm.data.index_format import FORMAT_VERSION, MAX_GRID_TILES, DatasetInfo, IndexMeta, TokenSource
from evovlm.data.index_settings import IndexSettings
from evovlm.data.index_tasks import Task, plan_corpus, plan_lines
from evovlm.data.index_work import work
from evovlm.data.index_writer import Chunk, IndexWriter, Skip, Totals
from evovlm.data.meta import DatasetMeta, load_meta
from evovlm.data.tokenizer import Tokenizer

__all__ = ["IndexReport", "IndexSettings", "Progress", "build_index", "is_current"]

Progress = Callable[[str, int, int], None]
"""Called as (dataset, lines done, lines in all) while an index is built; both counts run over all datasets."""

_log = logging.getLogger(__name__)
_MIN_LINES_TO_JUDGE = 20


@dataclass(frozen=True)
class IndexReport:
    """What a build did.

    Attributes:
        path: folder of the index.
        meta: its ``index.json``: totals, skips by reason, warnings.
        seconds: time that it took.
    """

    path: Path
    meta: IndexMeta
    seconds: float

    @property
    def num_skipped(self) -> int:
        """Lines left out, over all datasets and reasons."""
        return sum(self.meta.skipped.values())


def build_index(settings: IndexSettings, progress: Progress | None = None) -> IndexReport:
    """Build an index in ``settings.out``, replacing an older one; the folder is complete or absent.

    Raises:
        FileNotFoundError: the meta JSON does not exist.
        FileExistsError: ``settings.out`` holds something else than an index.
        MetaError: a dataset cannot be used: a bad entry, a missing file, a corpus of another tokenizer, more than
            ``settings.max_skipped`` of its lines unusable; or nothing at all is left.
        SampleError: the first unusable line, with ``strict``, or the first over-long one, with ``overlong="error"``.
        TokenizerError: the tokenizer cannot be used.
    """
    started = time.monotonic()
    meta_file = load_meta(settings.meta)
    for warning in meta_file.warnings:
        _log.warning("meta JSON '%s': %s", settings.meta, warning)
    tokenizer = Tokenizer.load(settings.tokenizer)
    files = source_files(settings, meta_file)  # before reading: a later change shows

    sources = [TokenSource(path="tokens.bin", dtype="int32", num_bytes=0, own=True)]
    datasets: list[DatasetInfo] = []
    skipped: Counter[str] = Counter()
    first_skips: dict[str, str] = {}  # of each reason
    warnings = list(meta_file.warnings)
    plans = [_plan(dataset, settings, tokenizer.vocab_size, sources) for dataset in meta_file.datasets]
    num_lines = sum(plan.num_lines for plan in plans)

    with IndexWriter(settings.out, settings.kind) as writer, ExitStack() as stack:
        pool = _pool(settings, sum(len(plan.tasks) for plan in plans), stack)
        done = 0
        for number, plan in enumerate(plans):
            totals, first = Totals(), writer.num_samples
            reasons: Counter[str] = Counter()
            examples: dict[str, Skip] = {}
            for chunk in _run(plan.tasks, pool, settings.num_processes):
                for skip in chunk.skips:
                    _raise_if_fatal(settings, plan.dataset, skip)
                    reasons[skip.reason] += 1
                    examples.setdefault(skip.reason, skip)
                    first_skips.setdefault(skip.reason, f"{plan.dataset.name}/{skip.line}: {skip.detail}")
                writer.append(chunk, dataset=number, dataset_name=plan.dataset.name, source=plan.source)
                totals.add(chunk)
                done += chunk.num_lines
                if progress is not None:
                    progress(plan.dataset.name, done, num_lines)
            _judge(settings, plan.dataset, totals, reasons, examples)
            if not totals.num_samples:
                warnings.append(f"dataset '{plan.dataset.name}': none of {totals.num_lines} lines is a usable sample")
                _log.warning("%s", warnings[-1])
            skipped += reasons
            datasets.append(_info(settings, plan, first, totals))
        if not writer.num_samples:
            shown = "".join(f"; {first_skips[reason]}" for reason, _ in skipped.most_common(3))
            raise MetaError(f"meta JSON '{settings.meta}': no usable sample; skipped by reason: {dict(skipped)}{shown}")
        sources[0] = sources[0].model_copy(update={"num_bytes": 4 * writer.num_tokens})
        meta = IndexMeta(
            format_version=FORMAT_VERSION,
            kind=settings.kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            tile_size=settings.tile_size,
            tokens_per_tile=settings.tokens_per_tile,
            min_tiles=settings.min_tiles,
            max_tiles=settings.max_tiles,
            thumbnail=settings.thumbnail,
            datasets=tuple(datasets),
            sources=tuple(sources),
            num_samples=writer.num_samples,
            num_images=writer.num_images,
            num_tokens=sum(info.num_tokens for info in datasets),
            num_supervised=sum(info.num_supervised for info in datasets),
            num_tiles=sum(info.num_tiles for info in datasets),
            path_bytes=writer.path_bytes,
            skipped=dict(skipped.most_common()),
            warnings=tuple(warnings),
            files=files,
            settings=settings.model_dump(mode="json"),
            settings_hash=settings_hash(settings),
        )
        writer.finish(meta)
    return IndexReport(settings.out, meta, time.monotonic() - started)


@dataclass(frozen=True)
class _Plan:
    """The tasks of one dataset."""

    dataset: DatasetMeta
    tasks: list[Task]
    num_lines: int
    cut_to: int | None
    source: int


def _plan(dataset: DatasetMeta, settings: IndexSettings, vocab_size: int, sources: list[TokenSource]) -> _Plan:
    """Cut a dataset into tasks; a corpus becomes one more token source."""
    if dataset.max_tiles is not None and dataset.max_tiles < settings.min_tiles:
        raise MetaError(
            f"dataset '{dataset.name}': max_dynamic_patch = {dataset.max_tiles} is below "
            f"min_tiles = {settings.min_tiles}: raise it or lower min_tiles"
        )
    if dataset.max_tiles is not None and dataset.max_tiles > MAX_GRID_TILES:
        raise MetaError(
            f"dataset '{dataset.name}': max_dynamic_patch = {dataset.max_tiles} is above {MAX_GRID_TILES}, the most "
            "tiles of an image that an index can hold: lower it"
        )
    if dataset.format == "megatron" and settings.kind == "preference":
        raise MetaError(
            f"dataset '{dataset.name}' is a corpus of documents, which are no preference pairs: leave it out, or "
            "build its index without `--kind preference`"
        )
    if dataset.format == "megatron":
        tasks, num_lines, cut_to, source = plan_corpus(dataset, settings, vocab_size)
        sources.append(source)
        return _Plan(dataset, tasks, num_lines, cut_to, len(sources) - 1)
    tasks, num_lines, cut_to = plan_lines(dataset, settings)
    return _Plan(dataset, tasks, num_lines, cut_to, 0)


def _pool(settings: IndexSettings, num_tasks: int, stack: ExitStack) -> ProcessPoolExecutor | None:
    """Start workers if they are wanted and worth it; spawned, since this process may have threads and big libraries."""
    num_processes = min(settings.num_processes, num_tasks // 2)  # starting one takes as long as a few tasks
    if num_processes <= 1:
        return None
    pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _run(tasks: Iterable[Task], pool: ProcessPoolExecutor | None, num_processes: int) -> Iterator[Chunk]:
    """Yield the chunks of tasks in order, with a bounded number of them under way."""
    if pool is None:
        yield from map(work, tasks)
        return
    ahead: deque[Future[Chunk]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(work, task))
            if len(ahead) >= 4 * num_processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process of the index died (out of memory?): use fewer num_workers") from error


def _raise_if_fatal(settings: IndexSettings, dataset: DatasetMeta, skip: Skip) -> None:
    if settings.strict or (settings.overlong == "error" and skip.reason == Reason.TOO_LONG):
        raise SampleError(skip.reason, skip.detail, f"{dataset.name}/{skip.line}")


def _judge(
    settings: IndexSettings, dataset: DatasetMeta, totals: Totals, reasons: Counter[str], examples: dict[str, Skip]
) -> None:
    """Raise if so many lines are unusable that the dataset, not single lines, must be at fault."""
    if totals.num_lines < _MIN_LINES_TO_JUDGE or totals.num_skipped <= settings.max_skipped * totals.num_lines:
        return
    shown = "; ".join(
        f"{count} × {reason} (line {examples[reason].line}: {examples[reason].detail})"
        for reason, count in reasons.most_common(3)
    )
    raise MetaError(
        f"dataset '{dataset.name}' ('{dataset.annotation}'): {totals.num_skipped} of {totals.num_lines} lines are "
        f"unusable, more than {settings.max_skipped:.0%}. Most common: {shown}"
    )


def _info(settings: IndexSettings, plan: _Plan, first: int, totals: Totals) -> DatasetInfo:
    return DatasetInfo(
        name=plan.dataset.name,
        kind="multimodal" if totals.num_images else "language",
        first=first,
        count=totals.num_samples,
        repeat_time=max(1.0, plan.dataset.repeat_time),
        cut_to=plan.cut_to,
        augment=plan.dataset.augment,
        weight=plan.dataset.weight,
        root=str(plan.dataset.root),
        annotation=str(plan.dataset.annotation),
        max_tiles=plan.dataset.max_tiles or settings.max_tiles,
        num_lines=totals.num_lines,
        num_skipped=totals.num_skipped,
        num_tokens=totals.num_tokens,
        num_supervised=totals.num_supervised,
        num_tiles=totals.num_tiles,
        num_images=totals.num_images,
    )
