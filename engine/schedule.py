"""What a run draws from at which step: recorded with every checkpoint, so that a change is an explicit event.

    saved   0 ──── text, charts ─────────────────────────►      resumed at step 5000 with
    now     0 ──── text, charts ──── 5000 ─ text, charts, maps ►   equal before 5000: allowed, and logged

A run that is resumed may draw from other datasets, or by other weights, from that step on, and never before it: its
steps so far are a phase of the new settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evovlm.data.index import DatasetInfo
from evovlm.data.mixture import MixtureSettings

Span = dict[str, Any]
"""``from``: first step; ``draws``: weight of each dataset that is on, None: as the index has it; ratio, replacement."""


def dataset_entries(datasets: Sequence[DatasetInfo]) -> dict[str, list[int]]:
    """What is in each dataset, not where it lies: first sample, samples, tokens, targets, tiles."""
    return {d.name: [d.first, d.count, d.num_tokens, d.num_supervised, d.num_tiles] for d in datasets}


def changes_of_data(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Compare the data of a checkpoint with that of the run that resumes it.

    Args:
        saved: Meta of the checkpoint: ``step``, ``index`` and ``schedule``.
        wanted: ``index`` and ``schedule`` of the run.

    Returns:
        One line for each change.

    Raises:
        ValueError: Not only data from that step on has changed; see ``changed`` and ``new_datasets``.
    """
    added = [f"dataset {name!r} is new in the index" for name in new_datasets(saved["index"], wanted["index"])]
    return added + changed(saved["schedule"], wanted["schedule"], saved["step"])


def make_schedule(
    phases: Sequence[tuple[int, MixtureSettings]], last: MixtureSettings, datasets: Sequence[DatasetInfo]
) -> list[Span]:
    """Say what is drawn from which step on.

    Args:
        phases: (steps, mixture) of each phase, in order.
        last: Mixture of every step after them.
        datasets: Of the index.

    Returns:
        Spans of steps, as JSON.
    """
    spans: list[Span] = []
    first = 0
    for steps, mixture in (*phases, (0, last)):
        on = [info for info in datasets if mixture.datasets is None or info.name in mixture.datasets]
        weights = {info.name: mixture.weights.get(info.name, info.weight) for info in on}
        span = {
            "from": first,
            "draws": {name: weight for name, weight in weights.items() if weight != 0},
            "language_ratio": mixture.language_ratio,
            "replacement": mixture.replacement,
        }
        spans.append(span)
        first += steps
    return spans


def changed(saved: Sequence[Span], wanted: Sequence[Span], step: int) -> list[str]:
    """Compare the schedule of a checkpoint with that of the run that resumes it.

    Args:
        saved: Of the checkpoint.
        wanted: Of the run.
        step: Where the run resumes.

    Returns:
        One line for each change from ``step`` on; none if the schedules are equal.

    Raises:
        ValueError: They differ before ``step``: the run would claim data that it was not trained on.
    """
    before, now = (_until(spans, step) for spans in (saved, wanted))
    if before != now:
        raise ValueError(
            f"up to step {step} the checkpoint drew {_text(before)}, but these settings draw {_text(now)}: put the "
            f"steps so far into [[data.phases]], with steps that add up to {step}, and change what comes after them"
        )
    after, later = (_from(spans, step) for spans in (saved, wanted))
    return [] if after == later else [f"from step {step} on: {_text(later)}; it was to be {_text(after)}"]


def new_datasets(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of datasets that the index of a checkpoint did not have.

    Raises:
        ValueError: One that it had is gone, has changed or lies elsewhere in the index.
    """
    for name, entry in saved.items():
        if wanted.get(name) != entry:
            raise ValueError(
                f"dataset {name!r} of the checkpoint's index is {wanted.get(name, 'not there')} here, {entry} there "
                "(first sample, samples, tokens, targets, tiles): add datasets at the end of the meta file, and leave "
                "those before them as they are"
            )
    return [name for name in wanted if name not in saved]


def _until(spans: Sequence[Span], step: int) -> list[Span]:
    return _merged([span for span in spans if span["from"] < step])


def _from(spans: Sequence[Span], step: int) -> list[Span]:
    here = [span for span in spans if span["from"] <= step][-1:]
    return _merged([{**span, "from": step} for span in here] + [span for span in spans if span["from"] > step])


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Leave out spans that go on as before."""
    kept: list[Span] = []
    for span in spans:
        if not kept or {**span, "from": 0} != {**kept[-1], "from": 0}:
            kept.append(span)
    return kept


def _text(spans: Sequence[Span]) -> str:
    return ", then ".join(
        f"from step {span['from']} "
        + (" + ".join(name if w is None else f"{name} × {w:g}" for name, w in span["draws"].items()) or "nothing")
        + ("" if span["language_ratio"] is None else f" at {span['language_ratio']}")
        + (" with replacement" if span["replacement"] else "")
        for span in spans
    )
