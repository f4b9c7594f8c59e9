"""Fits cost models to measured times: which cases a budget of seconds allows, their rounds, least squares.

    cases ─► warm-up, once each ─► rounds over all of them ─► median of each
              │ too slow or too large                         │
              ▼                                               ▼
             listed, with the reason           coefficients ≥ 0 that explain the times best

Rounds go over all cases in turn, so that a machine that slows down for a while slows all of them. What a case runs is
none of this file's business (``calibration_cases.py``), nor is the clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from evovlm.parallel.cost import CostModel, Fit, LLMCost, ProjectorCost, VisionCost

Module = Literal["vit", "projector", "llm"]
FEATURES: dict[Module, tuple[str, ...]] = {
    "vit": ("per_tile", "per_call"),
    "projector": ("per_visual_token", "per_call"),
    "llm": ("per_token", "per_square", "per_target", "per_pack"),
}
"""Coefficients of each module, in the order of its cases' features."""

MIN_ROUNDS = 5
_FLOOR = 0.01  # times below this share of a module's largest weigh as if they were that long


@dataclass(frozen=True, eq=False)
class Case:
    """Something to time.

    Attributes:
        module: Whose cost it is.
        name: For people.
        features: What each coefficient is multiplied by.
        work: Runs it once and waits until it is done.
        weight: Its cost by the model's shape, to foretell how long it takes.
        num_bytes: Memory that it is foretold to need.
        held_out: Whether it checks the fit and takes no part in it.
    """

    module: Module
    name: str
    features: tuple[int, ...]
    work: Callable[[], None]
    weight: float
    num_bytes: float = 0.0
    held_out: bool = False


@dataclass(frozen=True)
class Measured:
    """Times of a case.

    Attributes:
        case: What was timed.
        seconds: Of every repetition after the warm-up.
    """

    case: Case
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest − fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Measurements:
    """What was measured.

    Attributes:
        measured: Cases in the order given.
        left_out: A line for each case that was not measured, with the reason.
        rounds: Repetitions of each case.
        seconds: That measuring took.
    """

    measured: list[Measured]
    left_out: list[str]
    rounds: int
    seconds: float


def measure(
    cases: Sequence[Case],
    *,
    max_seconds: float,
    max_rounds: int = 25,
    memory: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurements:
    """Time cases within a budget.

    A case is left out if the fewest rounds with it would take longer than the budget, as foretold from the module's
    case before it, or if it needs more memory than there is. Tried first are a module's least and greatest, which say
    most, and last those that are held out.

    Args:
        cases: Of all modules.
        max_seconds: Budget; only a module's least case may exceed it.
        max_rounds: Most repetitions.
        memory: Bytes that there are; None for no limit.
        clock: Seconds.
    """
    begin = clock()
    rate: dict[Module, float] = {}  # seconds per weight of the module's case before
    chosen: list[Case] = []
    left_out: list[str] = []
    round_seconds = 0.0
    for case in _interleaved(cases):
        if memory is not None and case.num_bytes > memory:
            left_out.append(
                f"{case.module}, {case.name}: needs about {case.num_bytes / 2**30:.2f} GiB, "
                f"of which {memory / 2**30:.2f} GiB are free"
            )
            continue
        foretold = rate.get(case.module, 0.0) * case.weight
        left = max_seconds - (clock() - begin)
        if foretold and foretold + MIN_ROUNDS * (round_seconds + foretold) > left:
            left_out.append(f"{case.module}, {case.name}: would take about {foretold:.2g} s, {left:.0f} s are left")
            continue
        taken = _timed(case.work, clock)
        round_seconds += taken
        if case.weight:
            rate[case.module] = taken / case.weight
        chosen.append(case)
    seconds: list[list[float]] = [[] for _ in chosen]
    rounds = 0
    while rounds < max_rounds and (rounds < MIN_ROUNDS or clock() - begin + round_seconds <= max_seconds):
        for times, case in zip(seconds, chosen, strict=True):
            times.append(_timed(case.work, clock))
        rounds += 1
    found = {id(case): Measured(case, tuple(times)) for case, times in zip(chosen, seconds, strict=True)}
    measured = [found[id(case)] for case in cases if id(case) in found]
    return Measurements(measured, left_out, rounds, clock() - begin)


def fit(features: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the coefficients ≥ 0 whose relative errors have the least sum of squares.

    Args:
        features: ``[n, k]``.
        times: ``[n]``, positive; those below 1 % of the largest count as if they were 1 % of it.

    Returns:
        ``[k]``, in the unit of ``times`` per feature.

    Raises:
        ValueError: The cases cannot tell the coefficients apart.
    """
    weights = 1 / np.maximum(times, _FLOOR * times.max(initial=0.0))
    rows = features * weights[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0, initial=0.0), np.finfo(np.float64).tiny)
    if np.linalg.matrix_rank(rows / scale) < features.shape[1]:
        raise ValueError(f"{len(features)} cases cannot tell {features.shape[1]} coefficients apart")
    coefficients, _ = nnls(rows / scale, times * weights)
    fitted: NDArray[np.float64] = coefficients / scale
    return fitted


def errors(measured: Sequence[Measured], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each case, (predicted − measured) / measured, with measured raised to 1 % of the module's largest."""
    times = np.array([m.median for m in measured]) * 1e9
    predicted = _features(measured) @ coefficients
    relative: NDArray[np.float64] = (predicted - times) / np.maximum(times, _FLOOR * times.max(initial=0.0))
    return relative


def coefficients_of(model: CostModel, module: Module) -> NDArray[np.float64]:
    """A module's coefficients, in the order of ``FEATURES``."""
    part = getattr(model, module)
    return np.array([getattr(part, name) for name in FEATURES[module]])


def fit_model(measurements: Measurements, *, machine: str, about: dict[str, str]) -> CostModel:
    """Fit every module's cost model, in nanoseconds.

    Args:
        measurements: Of cases of all three modules.
        machine: Where they were taken.
        about: What else the numbers belong to.

    Raises:
        ValueError: Too few cases of a module were measured; the message says what was left out and why. Or times do
            not grow with the packs.
    """
    parts: dict[str, dict[str, float]] = {}
    fits: dict[Module, Fit] = {}
    for module, names in FEATURES.items():
        mine = [m for m in measurements.measured if m.case.module == module]
        fitted, held_out = ([m for m in mine if m.case.held_out == out] for out in (False, True))
        try:
            found = fit(_features(fitted, len(names)), np.array([m.median for m in fitted]) * 1e9)
        except ValueError as error:
            missing = [line for line in measurements.left_out if line.startswith(f"{module},")]
            raise ValueError(
                f"{module}: {error}; give more seconds, or smaller packs or chunks. Left out:\n  "
                + ("\n  ".join(missing) or "nothing")
            ) from error
        wrong = np.abs(errors(mine, found))
        training = wrong[[not m.case.held_out for m in mine]]
        checked = wrong[[m.case.held_out for m in mine]]
        parts[module] = dict(zip(names, found.tolist(), strict=True))
        fits[module] = Fit(
            cases=len(fitted),
            median_error=float(np.median(training)),
            largest_error=float(training.max()),
            held_out=len(held_out),
            held_out_error=float(checked.max()) if len(checked) else None,
            spread=statistics.median(m.spread for m in mine),
        )
    if not parts["llm"]["per_token"] and not parts["llm"]["per_square"]:
        raise ValueError(
            "llm: the measured times do not grow with the packs, so no plan can be made from them: something else was "
            "using the machine, or the packs are too small to tell; calibrate again, with larger data.pack_tokens"
        )
    return CostModel(
        source="calibrated",
        unit="ns",
        machine=machine,
        about=about,
        vit=VisionCost(**parts["vit"]),
        projector=ProjectorCost(**parts["projector"]),
        llm=LLMCost(**parts["llm"]),
        fits=fits,
    )


def _features(measured: Sequence[Measured], width: int = 0) -> NDArray[np.float64]:
    return np.array([m.case.features for m in measured], np.float64).reshape(len(measured), -1 if measured else width)


def _interleaved(cases: Sequence[Case]) -> list[Case]:
    """The order in which cases are tried: the modules in turn, each module's ends before its middle."""
    order = []
    for module in FEATURES:
        mine = sorted((case for case in cases if case.module == module), key=lambda case: (case.held_out, case.weight))
        first = [case for case in mine if not case.weight]  # foretells nothing
        rest, held_out = ([c for c in mine if c.weight and c.held_out == out] for out in (False, True))
        while rest:
            first.append(rest.pop(0))
            rest.reverse()
        order += list(enumerate([*first, *held_out]))
    return [case for _, case in sorted(order, key=lambda pair: pair[0])]


def _timed(work: Callable[[], None], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin
