"""Preference pairs under every layout: shared prompts and images equal answers run one by one in one process."""

from typing import Any

import pytest

from evovlm.engine.equality import SMALL, Trained, compare, tied
from evovlm.engine.equality_pairs import make_pair_steps, train_pairs_alone, train_pairs_under
from evovlm.engine.equality_plans import PlanCase, all_cases
from evovlm.engine.preference_loss import PreferenceLossSettings
from evovlm.parallel.fork import run_ranks

CASES = {case.name: case for case in all_cases()}
MPO = PreferenceLossSettings()
OTHERS = {
    "previous": PreferenceLossSettings(shift="previous"),
    "no shift": PreferenceLossSettings(shift="none", beta=0.3),
    "DPO": PreferenceLossSettings(bco_weight=0, nll_weight=0, dpo_weight=1),
    "BCO": PreferenceLossSettings(dpo_weight=0, nll_weight=0, bco_weight=1),
    "SFT": PreferenceLossSettings(dpo_weight=0, bco_weight=0),
}
KNOWN: dict[Any, tuple[Trained, list[float]]] = {}


def alone(case: PlanCase, settings: PreferenceLossSettings, precision: Any = "float64") -> tuple[Trained, list[float]]:
    key = (settings, case.tied, case.num_packs, tuple(case.options.get("freeze", ())), precision)
    if key not in KNOWN:
        config = tied() if case.tied else SMALL
        steps = make_pair_steps(num_packs=case.num_packs)
        KNOWN[key] = train_pairs_alone(settings, config, steps, freeze=key[3], precision=precision)
    return KNOWN[key]


def under(case: PlanCase, settings: PreferenceLossSettings, precision: Any = "float64") -> tuple[Trained, list[float]]:
    options = case.engine_options(precision=precision)
    config, steps = (tied() if case.tied else SMALL), make_pair_steps(num_packs=case.num_packs)
    return run_ranks(
        case.plan.size,
        lambda world: train_pairs_under(settings, case.plan, world, options, config, steps),
        timeout=300,
    )[0]


def check(case: PlanCase, settings: PreferenceLossSettings, precision: Any = "float64", bound: float = 1e-10) -> None:
    (ours, our_shifts), (theirs, their_shifts) = under(case, settings, precision), alone(case, settings, precision)
    difference = compare(ours, theirs)
    assert difference.largest <= bound, difference
    if settings.bco_weight:
        assert our_shifts == pytest.approx(their_shifts, rel=bound, abs=bound)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reduced])
def test_reduced_matrix(name: str) -> None:
    check(CASES[name], MPO)


@pytest.mark.parametrize("name", ["one rank", "pp2 dp2", "cp2 tp2"])
@pytest.mark.parametrize("loss", list(OTHERS))
def test_every_loss(name: str, loss: str) -> None:
    check(CASES[name], OTHERS[loss])


@pytest.mark.parametrize("name", ["dp4 zero3", "cp2 hp2"])
def test_float32(name: str) -> None:
    check(CASES[name], MPO, "float32", 1e-5)


def test_delta_moves_and_terms_matter() -> None:
    """What the equalities above compare is not trivial."""
    trained, shifts = alone(CASES["one rank"], MPO)
    assert len({round(shift, 6) for shift in shifts}) == 3
    assert abs(shifts[-1]) > 0.01
    losses = {name: alone(CASES["one rank"], settings)[0].losses[-1] for name, settings in OTHERS.items()}
    assert len({round(loss, 9) for loss in (*losses.values(), trained.losses[-1])}) == len(losses) + 1
