"""Phases: the right datasets at the right steps, plans that stay pure, errors that name datasets."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from evovlm.data.curriculum import Curriculum, Phase
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import DataLayout, Planner, PlanSettings

NAMES = ("easy", "hard")
SETTINGS = PlanSettings(seed=3, pack_tokens=32, pack_tiles=4, packs_per_step=2, window=8)
LAYOUT = DataLayout(2, 1)


@pytest.fixture(scope="module")
def index(make_index: Callable[..., Any]) -> Any:
    return make_index(*({"name": name, "tokens": [8] * 40} for name in NAMES))


def planner(index: Any, weights: dict[str, float]) -> Planner:
    return Planner(index, Mixture(index, MixtureSettings(weights=weights, language_ratio=None), 3), SETTINGS)


@pytest.fixture(scope="module")
def curriculum(index: Any) -> Curriculum:
    phases = [Phase(steps=3, weights={"easy": 1}), Phase(steps=2, weights={"hard": 1})]
    made = [(phase.steps, planner(index, dict(phase.over(NAMES)))) for phase in phases]
    return Curriculum(made, planner(index, {}))


def datasets(index: Any, plan: Any) -> set[str]:
    return {NAMES[int(index.samples["dataset"][sample])] for pack in plan.packs for sample in pack.samples}


def test_each_phase_draws_from_its_datasets(curriculum: Curriculum, index: Any) -> None:
    seen = [datasets(index, curriculum.plan_step(step, LAYOUT)) for step in range(9)]
    assert seen[:3] == [{"easy"}] * 3
    assert seen[3:5] == [{"hard"}] * 2
    assert set().union(*seen[5:]) == {"easy", "hard"}


def test_steps_are_numbered_over_the_whole_run(curriculum: Curriculum) -> None:
    assert [curriculum.plan_step(step, LAYOUT).step for step in range(8)] == list(range(8))
    assert curriculum.phase_steps == 5
    assert curriculum.num_steps is None


def test_a_plan_does_not_depend_on_what_was_planned_before(curriculum: Curriculum, index: Any) -> None:
    in_order = [curriculum.plan_step(step, LAYOUT).digest() for step in range(7)]
    fresh = Curriculum([(3, planner(index, {"easy": 1, "hard": 0})), (2, planner(index, {"easy": 0, "hard": 1}))],
                       planner(index, {}))  # fmt: skip
    assert [fresh.plan_step(step, LAYOUT).digest() for step in (6, 1, 4)] == [in_order[i] for i in (6, 1, 4)]


def test_without_phases_it_is_the_last_planner(index: Any) -> None:
    last = planner(index, {})
    assert Curriculum([], last).plan_step(4, LAYOUT).digest() == last.plan_step(4, LAYOUT).digest()


def test_a_sequential_pass_ends_after_the_phases(index: Any) -> None:
    last = Planner(index, Sequential(index), SETTINGS)
    assert Curriculum([(3, planner(index, {}))], last).num_steps == 3 + (last.num_steps or 0)


def test_a_negative_step_is_an_error(curriculum: Curriculum) -> None:
    with pytest.raises(IndexError, match="no step -1"):
        curriculum.plan_step(-1, LAYOUT)


def test_a_phase_names_only_datasets_of_the_index() -> None:
    assert Phase(steps=1, weights={"hard": 2}).over(NAMES) == {"easy": 0.0, "hard": 2.0}
    with pytest.raises(ValueError, match="no dataset 'eezy'; the index has easy, hard"):
        Phase(steps=1, weights={"eezy": 1}).over(NAMES)


@pytest.mark.parametrize("wrong", [{"steps": 0, "weights": {"a": 1}}, {"steps": 1, "weights": {}}, {"steps": 1}])
def test_a_phase_has_steps_and_datasets(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Phase.model_validate(wrong)
