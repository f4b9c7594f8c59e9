"""Fitting costs to times: exact on exact times, never negative, within the budget; and what the cases really run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evovlm.engine.calibration import (
    FEATURES,
    MIN_ROUNDS,
    Case,
    Measured,
    Measurements,
    coefficients_of,
    errors,
    fit,
    fit_model,
    measure,
)
from evovlm.engine.calibration_cases import Bench, draw_lengths, make_cases, split_evenly, weight_bytes
from evovlm.engine.settings import RunSettings
from evovlm.models.config import InternVLConfig
from evovlm.models.table import num_parameters
from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.world import World

from .support import SMALL

TRUE: dict[str, tuple[float, ...]] = {"vit": (2e6, 3e5), "projector": (700.0, 2e3), "llm": (5e4, 11.0, 3e4, 8e5)}
"""Nanoseconds: what the clock of these tests runs by."""
T = 256


class Clock:
    """Time that passes only while cases work, as the true coefficients say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def case(self, module: Any, *features: int, factor: float = 1.0, **changes: Any) -> Case:
        seconds = factor * float(np.dot(TRUE[module], features)) / 1e9

        def work() -> None:
            self.now += seconds

        return replace(Case(module, str(features), features, work, weight=seconds), **changes)

    def cases(self) -> list[Case]:
        packs = [(T, T * T, T), (T, 2 * (T // 2) ** 2, 9), (T, T * 8, 9), (T // 2, (T // 2) ** 2, 0), (T // 4, T, 5)]
        made = [self.case("llm", *features, 1) for features in packs]
        made += [self.case("llm", T, 4 * (T // 4) ** 2, T // 2, 1, held_out=True)]
        made += [self.case(module, n, 1) for module in ("vit", "projector") for n in (0, 4, 16)]
        return made


def test_exact_times_give_the_coefficients_back() -> None:
    clock = Clock()
    found = measure(clock.cases(), max_seconds=1e9, clock=clock, max_rounds=4)
    assert (found.rounds, found.left_out, len(found.measured)) == (4, [], len(clock.cases()))
    assert found.seconds == clock.now
    model = fit_model(found, machine="paper", about={"torch": "none"})
    for module in FEATURES:
        assert coefficients_of(model, module) == pytest.approx(TRUE[module], rel=1e-6, abs=1e-3)
        mine = [m for m in found.measured if m.case.module == module]
        assert np.abs(errors(mine, coefficients_of(model, module))).max() < 1e-6
        assert model.fits[module].largest_error < 1e-6
        assert model.fits[module].spread == pytest.approx(0, abs=1e-6)
    assert (model.source, model.unit, model.machine) == ("calibrated", "ns", "paper")
    assert (model.fits["llm"].cases, model.fits["llm"].held_out) == (5, 1)
    assert model.fits["llm"].held_out_error == pytest.approx(0, abs=1e-6)
    assert model.fits["vit"].held_out_error is None


def test_held_out_cases_take_no_part() -> None:
    clock = Clock()
    wrong = clock.case("llm", T, 4 * (T // 4) ** 2, 7, 1, held_out=True, factor=2.0)
    cases = [case for case in clock.cases() if not case.held_out] + [wrong]
    model = fit_model(measure(cases, max_seconds=1e9, clock=clock), machine="", about={})
    assert coefficients_of(model, "llm") == pytest.approx(TRUE["llm"], rel=1e-6)
    assert model.fits["llm"].held_out_error == pytest.approx(0.5)  # half of twice the time


def test_times_that_do_not_grow_are_no_cost_model() -> None:
    clock = Clock()
    found = measure(clock.cases(), max_seconds=1e9, clock=clock)
    same = [replace(one, seconds=(0.5,)) if one.case.module == "llm" else one for one in found.measured]
    with pytest.raises(ValueError, match="llm: the measured times do not grow with the packs"):
        fit_model(replace(found, measured=same), machine="", about={})


def test_the_median_of_the_rounds_counts() -> None:
    clock = Clock()
    durations = iter([100.0, 1.0, 9.0, 2.0, 3.0, 1.0])  # the first is the warm-up

    def work() -> None:
        clock.now += next(durations)

    found = measure([Case("vit", "1", (1, 1), work, 1.0)], max_seconds=1e9, max_rounds=5, clock=clock)
    (only,) = found.measured
    assert only.seconds == pytest.approx((1.0, 9.0, 2.0, 3.0, 1.0))
    assert only.median == pytest.approx(2.0)
    assert only.spread == pytest.approx(4.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 1e4), st.floats(1e-3, 1e9)), min_size=4, max_size=12, unique=True
    )
)
def test_coefficients_are_never_negative_and_no_worse_than_none(rows: list[tuple[float, float, float]]) -> None:
    features = np.array([[a, b, 1.0] for a, b, _ in rows])
    times = np.array([t for *_, t in rows])
    try:
        found = fit(features, times)
    except ValueError:
        return  # the cases are too alike
    assert (found >= 0).all()
    weights = 1 / np.maximum(times, 0.01 * times.max())
    assert np.linalg.norm((features @ found - times) * weights) <= np.linalg.norm(times * weights) * (1 + 1e-9)


def test_times_that_fall_with_the_feature_give_zero() -> None:
    found = fit(np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), np.array([30.0, 20.0, 10.0]))
    assert found[0] == 0
    assert found[1] > 0


def test_relative_errors_count() -> None:
    # Two small cases say 1 a tile, a large one 2: in absolute errors the large one alone would decide.
    features, times = np.array([[1.0], [1.0], [100.0]]), np.array([10.0, 10.0, 2000.0])
    relative = fit(features, times)[0]
    absolute = float((features.T @ times).item() / (features.T @ features).item())
    assert absolute == pytest.approx(20, rel=0.01)
    # Weights 1/20, 1/20 (the floor of 1 %) and 1/2000.
    assert relative == pytest.approx((2 * 0.05 * 0.5 + 0.05 * 1) / (3 * 0.05**2), rel=1e-9)


def test_cases_too_alike_are_an_error_that_lists_what_was_left_out() -> None:
    clock = Clock()
    cases = [case for case in clock.cases() if case.module != "llm"]
    cases += [clock.case("llm", T, T * T, T, 1), clock.case("llm", T, T * 8, T, 1, num_bytes=2**31)]
    found = measure(cases, max_seconds=1e9, memory=2**30, clock=clock)
    with pytest.raises(ValueError, match=r"llm: 1 cases cannot tell 4 coefficients apart; give more seconds") as caught:
        fit_model(found, machine="", about={})
    assert f"llm, ({T}, {T * 8}, {T}, 1): needs about 2.00 GiB, of which 1.00 GiB are free" in str(caught.value)
    with pytest.raises(ValueError, match="vit: 0 cases cannot tell 2 coefficients apart"):
        fit_model(Measurements([], [], 0, 0.0), machine="", about={})


def test_what_the_budget_does_not_allow_is_left_out_and_listed() -> None:
    clock = Clock()
    cases = [clock.case("vit", n, 1) for n in (0, 1, 2, 1_000_000)]  # the last takes 2,000 s
    found = measure(cases, max_seconds=10.0, clock=clock)
    assert [m.case.features[0] for m in found.measured] == [0, 1, 2]
    (line,) = found.left_out
    assert line == "vit, (1000000, 1): would take about 2e+03 s, 10 s are left"
    assert clock.now <= 10.0
    assert found.rounds == 25


def test_rounds_stop_at_the_budget_but_there_are_some() -> None:
    clock = Clock()
    found = measure([clock.case("vit", 500, 1)], max_seconds=10.0, clock=clock)  # 1 s a round
    assert found.rounds == 8  # and one to warm up
    clock = Clock()
    found = measure([clock.case("vit", 500, 1)], max_seconds=0.1, clock=clock)
    assert found.rounds == MIN_ROUNDS
    assert len(found.measured[0].seconds) == MIN_ROUNDS


def test_rounds_go_over_all_cases_in_turn() -> None:
    ran: list[str] = []

    def case(name: str, weight: float, *, held_out: bool = False) -> Case:
        return Case("vit", name, (1, 1), lambda: ran.append(name), weight, held_out=held_out)

    cases = [case("c", 3), case("e", 5, held_out=True), case("a", 0), case("b", 1), case("d", 9)]
    measure(cases, max_seconds=1e9, max_rounds=3)
    assert "".join(ran) == "abdce" * 4  # the ends first, what is held out last


@given(st.integers(1, 5000), st.integers(0, 9))
def test_drawn_lengths_fill_a_pack(rows: int, number: int) -> None:
    lengths = draw_lengths(rows, number)
    assert sum(lengths) == rows
    assert min(lengths) > 0
    assert lengths == draw_lengths(rows, number)


@given(st.integers(1, 5000), st.integers(1, 70))
def test_even_segments(rows: int, parts: int) -> None:
    lengths = split_evenly(rows, parts)
    assert sum(lengths) == rows
    assert len(lengths) == min(parts, rows)
    assert max(lengths) - min(lengths) <= 1


def settings(**changes: Any) -> RunSettings:
    sections: dict[str, Any] = {
        "out": "run",
        "stage": {"name": "sft"},
        "model": {"size": "tiny"},
        "data": {"index": "none", "pack_tokens": T, "packs_per_step": 1},
        "optim": {"lr": 1e-3},
        "steps": 1,
        "parallel": {"encode_tiles": 8},
    }
    for name, value in changes.items():
        sections[name] = sections.get(name, {}) | value if isinstance(value, dict) else value
    return RunSettings.model_validate(sections)


def on_one_rank(config: InternVLConfig, chosen: RunSettings) -> dict[str, Any]:
    """What the cases are, and which modules have gradients after each module's cases have run."""

    def job(world: World) -> dict[str, Any]:
        bench = Bench(chosen, config, world, 0.5)
        cases = bench.cases()
        parts = {part.module: part for part in bench._parts}
        trained = {}
        for module in FEATURES:
            for part in parts.values():
                part.root.zero_grad()
            for case in cases:
                if case.module == module:
                    case.work()
            trained[module] = {name for name, part in parts.items() if _has_gradients(part.root)}
        listed = [(case.module, case.features, case.held_out, case.num_bytes, case.weight) for case in cases]
        return {"trained": trained, "cases": listed}

    return run_ranks(1, job)[0]


def _has_gradients(root: torch.nn.Module) -> bool:
    found = [p.grad.to_local() for p in root.parameters() if p.grad is not None]
    return any(bool(g.isfinite().all()) and bool(g.any()) for g in found)


def test_cases_run_forward_and_backward_of_one_module_each() -> None:
    found = on_one_rank(SMALL, settings())
    assert found["trained"] == {module: {module} for module in FEATURES}
    llm = [features for module, features, *_ in found["cases"] if module == "llm"]
    assert {rows for rows, *_ in llm} == {T, T // 2, T // 4}
    assert max(squares for _, squares, *_ in llm) == T * T
    assert min(squares for rows, squares, *_ in llm if rows == T) == T * 32  # eight segments of 32
    shares = sorted(targets / rows for rows, _, targets, _ in llm)
    assert (shares[0], shares[-1]) == (0, 1)
    assert 0.4 < shares[len(shares) // 2] < 0.6
    assert all(one == 1 for *_, one in llm)
    assert [f[0] for module, f, *_ in found["cases"] if module == "vit"] == [0, 1, 2, 4, 8, 6]
    tokens = [f[0] for module, f, *_ in found["cases"] if module == "projector"]
    assert tokens == [n * SMALL.tokens_per_tile for n in (0, 1, 2, 4, 8, 6)]
    assert sum(held_out for _, _, held_out, *_ in found["cases"]) == 5
    # A pack's activations: no less than the hidden states that each layer keeps.
    most = max(num_bytes for module, _, _, num_bytes, _ in found["cases"] if module == "llm")
    assert most > SMALL.decoder.num_layers * T * SMALL.decoder.hidden_size * 4


def test_frozen_modules_have_no_gradients_and_cost_less() -> None:
    frozen = settings(model={"freeze": ["vit", "llm"]}, parallel={"encoder_activations": "recompute"})
    found = on_one_rank(SMALL, frozen)
    assert found["trained"] == {"vit": set(), "projector": {"projector"}, "llm": set()}
    whole = on_one_rank(SMALL, settings(recompute={"vit": "full", "llm": "full"}))
    assert whole["trained"] == {module: {module} for module in FEATURES}
    for ours, theirs in zip(found["cases"], whole["cases"], strict=True):
        assert ours[1] == theirs[1]
        if ours[0] != "projector":
            assert ours[4] < theirs[4] or ours[4] == theirs[4] == 0


def test_packs_too_short_for_a_tile() -> None:
    found = on_one_rank(SMALL, settings(data={"pack_tokens": 4}, parallel={"encode_tiles": 1}))
    llm = [features for module, features, *_ in found["cases"] if module == "llm"]
    assert len(llm) == len(set(llm))
    assert {rows for rows, *_ in llm} == {4, 2, 1}


def test_what_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="modules are timed by one rank, not by 2: start one process"):
        make_cases(settings(), SMALL, World(0, 2, torch.device("cpu")))
    nothing = settings(model={"freeze": ["vit", "projector", "llm"]})
    with pytest.raises(RankFailedError, match="freeze names every module: nothing is trained"):
        on_one_rank(SMALL, nothing)


def test_bytes_of_weights_and_gradients() -> None:
    count = num_parameters(SMALL)
    assert weight_bytes(SMALL, ()) == 8 * count["total"]
    assert weight_bytes(SMALL, ("vit",)) == 8 * count["total"] - 4 * count["vit"]


def test_a_case_measured_at_zero_tiles_does_not_divide_by_zero() -> None:
    case = Case("vit", "0", (0, 1), lambda: None, 0.0)
    assert errors([Measured(case, (0.0, 0.0)), Measured(replace(case, features=(1, 1)), (1.0,))], np.zeros(2)) == (
        pytest.approx([0.0, -1.0])
    )
