"""Which samples each window of a run holds: a pure function of (index, settings, seed, window).

    dataset a   pass 0 │ pass 1 │ …        each pass: every sample once, in a keyed order
    dataset b   pass 0                     │ pass 1 …
                 ▼ rate_a draws per epoch   ▼ rate_b
    epoch 0     │ a b b a b │ b b a b a │ …          windows: each takes its part of every dataset's rate, then shuffles

Every dataset is an endless stream of draws, and an epoch takes the next ``rate`` draws of each. Rates follow from
``repeat_time``, the weights and the language : multimodal ratio (spec §6.1: 1:3, by tokens), scaled so that an epoch
has as many draws as all ``repeat_time`` together ask for. Without weights and ratio that is every sample exactly
``repeat_time`` times; with them, scarce datasets are passed more often and the others less, evenly: no sample is
drawn again before its whole dataset was. Rates are exact fractions and streams run on from epoch to epoch, so
nothing is lost: what one epoch does not reach (``repeat_time`` 2.5, a share of 1/3) the next continues with. With
``replacement`` the draws of a dataset are independent instead.

Every window of an epoch takes an equal part of each rate, so the mixture is the same everywhere in an epoch, and any
window is made by itself. A mixture can begin where another one ended (``Start``): that is how weights change, or a
dataset is added, at a step.

A *visit* tells the draws of a sample apart in the whole run: the number of the pass, or of the draw with
``replacement``. All other randomness of the data is keyed by it, so a second look at an image gets another JPEG
quality, whatever the layout.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from evovlm.csrc import random
from evovlm.data.index import DatasetInfo
from evovlm.data.order import Draws, Members, PlanIndex, Table


class MixtureSettings(BaseModel):
    """How datasets are mixed.

    Attributes:
        weights: relative number of draws of each dataset, by name; overrides the weights in the index. Either every
            dataset of a kind has one or none has (without ``language_ratio``: every dataset or none). 0 switches a
            dataset off. Without weights draws are in proportion to ``repeat_time`` times the number of samples.
        datasets: names of the datasets to draw from, the others are off; None: all.
        language_ratio: ``"1:3"``: tokens of language datasets to tokens of multimodal ones; None: as they come. Has
            no effect where only one kind has samples (``Mixture.shares`` shows what came out).
        replacement: draw independently instead of pass by pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    datasets: tuple[str, ...] | None = None
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


@dataclass(frozen=True)
class Start:
    """Where the streams of a mixture begin.

    Attributes:
        drawn: draws of each dataset made before, by name; others begin at 0.
        carried: draws of each dataset, by name, that were made before but not trained on: they come first.
    """

    drawn: Mapping[str, int] = field(default_factory=dict)
    carried: Mapping[str, Draws] = field(default_factory=dict)


class Mixture:
    """The endless shuffled order of training; see the head of this file.

    Args:
        index: the index to draw from.
        settings: weights, ratio, replacement.
        seed: seed of the run.
        excluded: samples never drawn, such as those over a pack's budget.
        start: where the streams begin.

    Raises:
        ValueError: a weight for an unknown dataset, weights for some datasets only, or nothing to draw.
    """

    num_epochs: int | None = None
    shuffled: bool = True

    def __init__(
        self,
        index: PlanIndex,
        settings: MixtureSettings,
        seed: int,
        excluded: NDArray[np.int64] | None = None,
        start: Start | None = None,
    ) -> None:
        self._index = index
        self._settings = settings
        self._seed = seed
        self._excluded = np.unique(np.empty(0, np.int64) if excluded is None else excluded)
        self._start = start or Start()
        self._streams = [
            _Stream(info, Members(info.first, info.count, self._excluded), seed, settings.replacement, self._start)
            for info in index.datasets
        ]
        self._rates = _rates(self._streams, settings, index.samples)

    def without(self, samples: NDArray[np.int64]) -> "Mixture":
        """Return the mixture of the same index less these samples; rates follow what is left."""
        excluded = np.concatenate([self._excluded, samples])
        return Mixture(self._index, self._settings, self._seed, excluded, self._start)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each dataset contributes to an epoch; for the run's summary."""
        table = self._index.samples
        drawn = [rate * s.mean_tokens(table) for rate, s in zip(self._rates, self._streams, strict=True)]
        total = sum(drawn, Fraction(0))
        return tuple(
            Share(s.info.name, s.info.kind, float(rate), float(rate / s.count) if s.count else 0.0, float(part / total))
            for s, rate, part in zip(self._streams, self._rates, drawn, strict=True)
        )

    def num_windows(self, size: int) -> int:
        """Windows of an epoch: as many as keep each to ``size`` draws on average."""
        return max(1, -(-sum(self._rates, Fraction(0)) // size))

    def window(self, epoch: int, number: int, size: int) -> Draws:
        """Return the draws of a window, shuffled; pure."""
        begins, ends = (self._drawn(epoch, number + i, size) for i in (0, 1))
        drawn = Draws.concatenate(
            [s.draws(begin, end) for s, begin, end in zip(self._streams, begins, ends, strict=True)]
        )
        return drawn[random.permutation(len(drawn), "order", self._seed, "slots", epoch, number)]

    def after(self, epoch: int, number: int, size: int, unused: Draws) -> Start:
        """Return where a mixture begins that takes over after a window.

        Args:
            epoch: of the window.
            number: of the window in its epoch.
            size: of windows.
            unused: draws of these windows that were not trained on.
        """
        carried, made = {}, {}
        for stream, end in zip(self._streams, self._drawn(epoch, number + 1, size), strict=True):
            inside = (unused.samples >= stream.info.first) & (unused.samples < stream.info.first + stream.info.count)
            carried[stream.info.name] = Draws.concatenate([unused[inside], stream.carried[end:]])
            made[stream.info.name] = stream.made + max(0, end - len(stream.carried))
        return Start(made, carried)

    def _drawn(self, epoch: int, number: int, size: int) -> list[int]:
        """Draws of each dataset before a window."""
        windows = self.num_windows(size)
        return [int(rate * (epoch * windows + number) / windows) for rate in self._rates]


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

    def __init__(self, info: DatasetInfo, members: Members, seed: int, replacement: bool, start: Start) -> None:
        self.info = info
        self.count = members.count
        self.carried = start.carried.get(info.name, Draws.none())
        self.made = start.drawn.get(info.name, 0)
        self._members = members
        self._seed = seed
        self._draw = self._independent if replacement else self._passes

    def mean_tokens(self, table: Table) -> Fraction:
        """Mean expanded length of the members."""
        if self.count == 0:
            return Fraction(0)
        left_out = int(table["num_tokens"][self._members.excluded].sum(dtype=np.int64))
        return Fraction(self.info.num_tokens - left_out, self.count)

    def draws(self, begin: int, end: int) -> Draws:
        """Draws ``begin`` to ``end - 1``, counted from where this mixture began."""
        carried, moved = self.carried[begin:end], self.made - len(self.carried)
        return Draws.concatenate([carried, self._draw(begin + len(carried) + moved, end + moved)])

    def _passes(self, begin: int, end: int) -> Draws:
        """Draws of the dataset, counted from the beginning of the run, pass by pass."""
        parts = []
        for number in range(begin // self.count, -(-end // self.count)) if begin < end else ():
            first, last = max(begin - number * self.count, 0), min(end - number * self.count, self.count)
            places = random.permutation(self.count, "order", self._seed, self.info.name, number, begin=first, end=last)
            parts.append(Draws.whole(self._members.samples(places), number))
        return Draws.concatenate(parts)

    def _independent(self, begin: int, end: int) -> Draws:
        """The same, each drawn from all members; the visit is the number of the draw."""
        if begin >= end:
            return Draws.none()
        numbers = np.arange(begin, end, dtype=np.int64)
        places = random.choice_index(random.keys("draw", self._seed, self.info.name, numbers), self.count)
        return Draws.whole(self._members.samples(places), numbers)


def _rates(streams: list[_Stream], settings: MixtureSettings, table: Table) -> list[Fraction]:
    """Draws per epoch of each dataset, exactly."""
    full = [_exact(max(s.info.repeat_time, 1.0)) * s.count for s in streams]  # each sample repeat_time times
    weights = _weights(streams, settings)
    kinds: dict[str, list[int]] = {"language": [], "multimodal": []}
    for i, s in enumerate(streams):
        on = settings.datasets is None or s.info.name in settings.datasets
        if on and s.count > 0 and weights.get(s.info.name, Fraction(1)) > 0:
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
        tokens = sum((draws[i] * streams[i].mean_tokens(table) for i in group), Fraction(0))
        for i in group:
            rates[i] = draws[i] * share / tokens

    scale = sum((full[i] for i in used), Fraction(0)) / sum(rates, Fraction(0))
    return [rate * scale for rate in rates]


def _weights(streams: list[_Stream], settings: MixtureSettings) -> dict[str, Fraction]:
    """Weights by dataset name, from the settings or else the index; checked for being complete."""
    names = [s.info.name for s in streams]
    for name in (*settings.weights, *(settings.datasets or ())):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the index has {', '.join(names)}"
            raise ValueError(f"the mixture names dataset {name!r}, which the index does not have: {hint}")
    given = {s.info.name: settings.weights.get(s.info.name, s.info.weight) for s in streams}
    chosen = [s.info for s in streams if settings.datasets is None or s.info.name in settings.datasets]
    groups = [[info.name for info in chosen]]
    if settings.language_ratio is not None:
        groups = [[info.name for info in chosen if info.kind == kind] for kind in ("language", "multimodal")]
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
