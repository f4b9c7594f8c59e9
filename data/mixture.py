"""Which samples an epoch holds, and in which order: a pure function of (index, settings, seed, epoch).

    dataset a   pass 0 │ pass 1 │ …        each pass: every sample once, in a keyed order
    dataset b   pass 0                     │ pass 1 …
                 ▼ rate_a draws per epoch   ▼ rate_b
    epoch 0     b a b b a b a b …          slots of the epoch in a keyed order, filled from each dataset's stream

Every dataset is an endless stream of draws, and an epoch takes the next ``rate`` draws of each. Rates follow from
``repeat_time``, the weights and the language : multimodal ratio (spec §6.1: 1:3, by tokens), scaled so that an epoch
has as many draws as all ``repeat_time`` together ask for. Without weights and ratio that is every sample exactly
``repeat_time`` times; with them, scarce datasets are passed more often and the others less, evenly: no sample is
drawn again before its whole dataset was. Rates are exact fractions and streams run on from epoch to epoch, so
nothing is lost: what one epoch does not reach (``repeat_time`` 2.5, a share of 1/3) the next continues with. With
``replacement`` the draws of a dataset are independent instead.

A sample's *visit* counts its earlier draws in the whole run, over all epochs. All other randomness of the data is
keyed by it, so a second look at an image gets another JPEG quality, whatever the layout.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from evovlm.csrc import random
from evovlm.data.index import DatasetInfo
from evovlm.data.order import PlanIndex


class MixtureSettings(BaseModel):
    """How datasets are mixed.

    Attributes:
        weights: relative number of draws of each dataset, by name; overrides the weights in the index. Either every
            dataset of a kind has one or none has (without ``language_ratio``: every dataset or none). 0 switches a
            dataset off. Without weights draws are in proportion to ``repeat_time`` times the number of samples.
        language_ratio: ``"1:3"``: tokens of language datasets to tokens of multimodal ones; None: as they come. Has
            no effect where only one kind has samples (``Mixture.shares`` shows what came out).
        replacement: draw independently instead of pass by pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    language_ratio: str | None = "1:3"
    replacement: bool = False

    @field_validator("language_ratio")
    @classmethod
    def _check_ratio(cls, value: str | None) -> str | None:
        if value is not None:
            parse_ratio(value)
        return value


@dataclass(frozen=True)
class Share:
    """What a dataset contributes to an epoch, on average over epochs.

    Attributes:
        name: of the dataset.
        kind: "language" or "multimodal".
        draws: samples drawn per epoch.
        passes: draws per sample and epoch.
        token_share: its part of all tokens drawn, 0 to 1.
    """

    name: str
    kind: str
    draws: float
    passes: float
    token_share: float


class Mixture:
    """The endless shuffled order of training; see the head of this file.

    Args:
        index: the index to draw from.
        settings: weights, ratio, replacement.
        seed: seed of the run.
        excluded: samples never drawn, such as those over a pack's budget.

    Raises:
        ValueError: a weight for an unknown dataset, weights for some datasets only, or nothing to draw.
    """

    num_epochs: int | None = None
    shuffled: bool = True

    def __init__(
        self, index: PlanIndex, settings: MixtureSettings, seed: int, excluded: NDArray[np.int64] | None = None
    ) -> None:
        self._index = index
        self._settings = settings
        self._seed = seed
        self._excluded = np.unique(np.empty(0, np.int64) if excluded is None else excluded)
        self._streams = [
            _Stream(info, _inside(self._excluded, info.first, info.count), seed) for info in index.datasets
        ]
        self._rates = _rates(self._streams, settings, index.samples["num_tokens"])
        # Draws with replacement must be counted to know visits; counts per epoch start are kept once made.
        self._counted: tuple[int, list[NDArray[np.int64]]] = (0, [np.zeros(s.count, np.int64) for s in self._streams])

    def without(self, samples: NDArray[np.int64]) -> "Mixture":
        """Return the mixture of the same index less these samples; rates follow what is left."""
        return Mixture(self._index, self._settings, self._seed, np.concatenate([self._excluded, samples]))

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each dataset contributes to an epoch; for the run's summary."""
        tokens = self._index.samples["num_tokens"]
        drawn = [rate * s.mean_tokens(tokens) for rate, s in zip(self._rates, self._streams, strict=True)]
        total = sum(drawn, Fraction(0))
        return tuple(
            Share(s.info.name, s.info.kind, float(rate), float(rate / s.count) if s.count else 0.0, float(part / total))
            for s, rate, part in zip(self._streams, self._rates, drawn, strict=True)
        )

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the samples int64 [n] of an epoch, in order, and the visit int64 [n] that each draw is.

        Pure; the first call with replacement walks through all earlier epochs to count visits.
        """
        begins, quotas = self._span(epoch, epoch + 1)
        if self._settings.replacement:
            counts = self._counts_before(epoch)
            drawn = [
                _with_visits(s.independent(begin, quota), seen)
                for s, begin, quota, seen in zip(self._streams, begins, quotas, counts, strict=True)
            ]
        else:
            drawn = [s.passes(begin, quota) for s, begin, quota in zip(self._streams, begins, quotas, strict=True)]

        # Slots are shuffled, then filled in stream order: visits of a sample rise in the order in which it is seen.
        owner = np.repeat(np.arange(len(quotas)), quotas)
        owner = owner[random.permutation(len(owner), "order", self._seed, "slots", epoch)]
        slots = np.argsort(owner, kind="stable")
        samples, visits = np.empty(len(owner), np.int64), np.empty(len(owner), np.int64)
        samples[slots] = np.concatenate(
            [s.members[positions] for s, (positions, _) in zip(self._streams, drawn, strict=True)]
        )
        visits[slots] = np.concatenate([visit for _, visit in drawn])
        return samples, visits

    def _counts_before(self, epoch: int) -> list[NDArray[np.int64]]:
        """How often each member of each dataset was drawn with replacement before an epoch."""
        done, counts = self._counted
        if done > epoch:
            done, counts = 0, [np.zeros(s.count, np.int64) for s in self._streams]
        if done < epoch:
            counts = [
                seen + np.bincount(s.independent(begin, quota), minlength=s.count)
                for s, begin, quota, seen in zip(self._streams, *self._span(done, epoch), counts, strict=True)
            ]
        self._counted = (epoch, counts)
        return counts

    def _span(self, first: int, end: int) -> tuple[list[int], list[int]]:
        """Of each dataset: its first draw in epochs ``first`` to ``end - 1``, and the number of draws there."""
        begins = [int(rate * first) for rate in self._rates]
        return begins, [int(rate * end) - begin for rate, begin in zip(self._rates, begins, strict=True)]


def parse_ratio(ratio: str) -> tuple[Fraction, Fraction]:
    """Parse ``"1:3"`` or ``"1:2.5"`` exactly.

    Raises:
        ValueError: not two non-negative numbers, or both 0.
    """
    try:
        language, multimodal = (Fraction(part.strip()) for part in ratio.split(":"))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"language_ratio {ratio!r} is not of the form '1:3' (language:multimodal)") from None
    if min(language, multimodal) < 0 or language == multimodal == 0:
        raise ValueError(f"language_ratio {ratio!r}: parts must not be negative, nor both 0")
    return language, multimodal


class _Stream:
    """One dataset as an endless sequence of draws; draw j has the same sample in every run with this seed."""

    def __init__(self, info: DatasetInfo, excluded: NDArray[np.int64], seed: int) -> None:
        self.info = info
        self.count = info.count - len(excluded)
        self._excluded = excluded
        self._seed = seed

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Samples that may be drawn, ascending."""
        first = self.info.first
        return np.delete(np.arange(first, first + self.info.count, dtype=np.int64), self._excluded - first)

    def mean_tokens(self, num_tokens: NDArray[Any]) -> Fraction:
        """Mean expanded length of the members."""
        if self.count == 0:
            return Fraction(0)
        first = self.info.first
        total = int(num_tokens[first : first + self.info.count].sum(dtype=np.int64))
        return Fraction(total - int(num_tokens[self._excluded].sum(dtype=np.int64)), self.count)

    def passes(self, begin: int, quota: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Members (as positions) and visits of draws ``begin`` to ``begin + quota - 1``, pass by pass."""
        parts = [np.empty(0, np.int64)]
        lengths, end = [], begin + quota
        numbers = range(begin // self.count, -(-end // self.count)) if quota else range(0)
        for number in numbers:
            order = random.permutation(self.count, "order", self._seed, self.info.name, number)
            parts.append(order[max(begin - number * self.count, 0) : end - number * self.count])
            lengths.append(len(parts[-1]))
        return np.concatenate(parts), np.repeat(np.asarray(numbers, dtype=np.int64), lengths)

    def independent(self, begin: int, quota: int) -> NDArray[np.int64]:
        """Members (as positions) of draws ``begin`` to ``begin + quota - 1``, each drawn from all of them."""
        if quota == 0:
            return np.empty(0, np.int64)
        draws = np.arange(begin, begin + quota)
        return random.choice_index(random.keys("draw", self._seed, self.info.name, draws), self.count)


def _inside(sorted_samples: NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """The part of a sorted array that lies in ``[first, first + count)``."""
    begin, end = np.searchsorted(sorted_samples, [first, first + count])
    return sorted_samples[begin:end]


def _with_visits(positions: NDArray[np.int64], seen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count, for each draw, the earlier draws of the same member: ``seen`` before, and those in ``positions``."""
    by_member = np.argsort(positions, kind="stable")
    grouped = positions[by_member]
    first = np.flatnonzero(np.diff(grouped, prepend=-1))
    rank = np.arange(len(grouped)) - np.repeat(first, np.diff(first, append=len(grouped)))
    visits = np.empty(len(positions), np.int64)
    visits[by_member] = seen[grouped] + rank
    return positions, visits


def _rates(streams: list[_Stream], settings: MixtureSettings, num_tokens: NDArray[Any]) -> list[Fraction]:
    """Draws per epoch of each dataset, exactly."""
    full = [_exact(max(s.info.repeat_time, 1.0)) * s.count for s in streams]  # each sample repeat_time times
    weights = _weights(streams, settings)
    kinds: dict[str, list[int]] = {"language": [], "multimodal": []}
    for i, s in enumerate(streams):
        if s.count > 0 and weights.get(s.info.name, Fraction(1)) > 0:
            kinds[s.info.kind].append(i)
    used = [i for members in kinds.values() for i in members]
    if not used:
        raise ValueError("the mixture has nothing to draw: every dataset is empty or has weight 0")
    groups: Iterable[list[int]] = kinds.values()
    ratio = settings.language_ratio
    if ratio is None or not all(kinds.values()):
        groups, ratio = [used], None

    # Relative draws inside each group, then tokens of the groups in the given ratio.
    rates = [Fraction(0)] * len(streams)
    for group, share in zip(groups, parse_ratio(ratio) if ratio else [Fraction(1)], strict=True):
        draws = {i: weights.get(streams[i].info.name, full[i]) for i in group}
        tokens = sum((draws[i] * streams[i].mean_tokens(num_tokens) for i in group), Fraction(0))
        for i in group:
            rates[i] = draws[i] * share / tokens

    scale = sum((full[i] for i in used), Fraction(0)) / sum(rates, Fraction(0))
    return [rate * scale for rate in rates]


def _weights(streams: list[_Stream], settings: MixtureSettings) -> dict[str, Fraction]:
    """Weights by dataset name, from the settings or else the index; checked for being complete."""
    names = [s.info.name for s in streams]
    for name in settings.weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the index has {', '.join(names)}"
            raise ValueError(f"weight for dataset {name!r}, which the index does not have: {hint}")
    given = {s.info.name: settings.weights.get(s.info.name, s.info.weight) for s in streams}
    groups = [names]
    if settings.language_ratio is not None:
        groups = [[s.info.name for s in streams if s.info.kind == kind] for kind in ("language", "multimodal")]
    for members in groups:
        missing = [name for name in members if given[name] is None]
        if 0 < len(missing) < len(members):
            raise ValueError(
                f"dataset {missing[0]!r} has no weight, but others that it is mixed with ({', '.join(members)}) have: "
                "give one to each or to none"
            )
    return {name: _exact(weight) for name, weight in given.items() if weight is not None}


def _exact(value: float) -> Fraction:
    """The decimal number that the user wrote: 0.1 is 1/10, not its nearest binary fraction."""
    return Fraction(repr(float(value)))
