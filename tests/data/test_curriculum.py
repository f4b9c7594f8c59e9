"""Phases: the right datasets at the right steps, nothing lost at a change, plans that stay pure, named errors."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evovlm.data.curriculum import Curriculum, Phase
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout

NAMES = ("easy", "hard")
SETTINGS = PlanSettings(seed=3, pack_tokens=32, pack_tiles=4, packs_per_step=2, window=8)
LAYOUT = DataLayout(2, 1)


@pytest.fixture(scope="module")
def index(make_index: Callable[..., Any]) -> Any:
    return make_index(*({"name": name, "tokens": [8] * 40} for name in NAMES))


BASE = MixtureSettings(language_ratio=None)
PHASES = (Phase(steps=3, weights={"easy": 1}), Phase(steps=2, datasets=("hard",)))


def make(index: Any, phases: Sequence[Phase] = PHASES, base: MixtureSettings = BASE, **changes: Any) -> Curriculum:
    mixtures = [(phase.steps, phase.mixture(base)) for phase in phases]
    return Curriculum(index, mixtures, base, SETTINGS.model_copy(update=changes))


@pytest.fixture(scope="module")
def curriculum(index: Any) -> Curriculum:
    return make(index)


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
    assert [make(index).plan_step(step, LAYOUT).digest() for step in (6, 1, 4)] == [in_order[i] for i in (6, 1, 4)]


def test_without_phases_it_is_a_planner(index: Any) -> None:
    planner = Planner(index, Mixture(index, BASE, 3), SETTINGS)
    assert make(index, ()).plan_step(4, LAYOUT).digest() == planner.plan_step(4, LAYOUT).digest()


@given(
    lengths=st.lists(st.integers(1, 9), max_size=3), seed=st.integers(0, 99), replacement=st.booleans(),
    balance_steps=st.integers(1, 3), datasets=st.lists(st.sampled_from(["easy", "hard"]), min_size=3, max_size=3),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_changes_lose_and_repeat_nothing(
    make_index: Callable[..., Any],
    lengths: list[int],
    seed: int,
    replacement: bool,
    balance_steps: int,
    datasets: list[str],
) -> None:
    """Over whole passes every part of every sample is trained on as often as its dataset was passed, or drawn."""
    index = make_index(*({"name": name, "tokens": [8, 3, 40, 70, 5] * 3} for name in NAMES))
    index.tokens = lambda sample: (np.zeros(70, np.int32), np.ones(70, np.bool_))
    phases = [Phase(steps=n * balance_steps, datasets=(d,)) for n, d in zip(lengths, datasets, strict=False)]
    base = BASE.model_copy(update={"replacement": replacement})
    changes = {"seed": seed, "window": 7, "long_samples": "split", "balance_steps": balance_steps}
    curriculum = make(index, phases, base, **changes)
    steps = sum(lengths) * balance_steps + 30 * balance_steps
    trained: Counter[tuple[int, int, int]] = Counter()
    for step in range(steps):
        for pack in curriculum.plan_step(step, LAYOUT).packs:
            columns = (pack.samples, pack.visits, pack.begins)
            trained.update(zip(*(column.tolist() for column in columns), strict=True))
    assert set(trained.values()) == {1}
    _, _, unused = curriculum.last.stream.unused(steps - curriculum.phase_steps)
    left = {(s, v, max(p, 0) * 32) for s, v, p in zip(unused.samples, unused.visits, unused.parts, strict=True)}
    assert not left & set(trained)
    if not replacement:
        per_sample = Counter((s, b) for s, _, b in trained)
        drawn = {(s, v) for s, v, _ in trained}
        for first in (0, 15):  # visits are passes: none is left out before the last ones
            for number in range(max((v for s, v in drawn if first <= s < first + 15), default=0) - 1):
                missing = {s for s in range(first, first + 15) if (s, number) not in drawn}
                assert missing <= {s for s, v, _ in left if v == number}
        assert max(per_sample.values()) <= max(v for _, v in drawn) + 1


def test_a_phase_ends_where_steps_are_planned_anew(index: Any) -> None:
    with pytest.raises(ValueError, match=r"a phase of 3 steps ends inside of balance_steps = 2"):
        make(index, balance_steps=2)


def test_a_negative_step_is_an_error(curriculum: Curriculum) -> None:
    with pytest.raises(IndexError, match="no step -1"):
        curriculum.plan_step(-1, LAYOUT)


def test_a_phase_names_only_datasets_of_the_index(index: Any) -> None:
    for phase in (Phase(steps=1, weights={"eezy": 1}), Phase(steps=1, datasets=("eezy",))):
        with pytest.raises(ValueError, match="'eezy', which the index does not have: the index has easy, hard"):
            make(index, (PHASES[0], phase))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0, "weights": {"a": 1}},
        {"steps": 1, "weights": {}},
        {"steps": 1},
        {"steps": 1, "weights": {"a": 1}, "datasets": ["a"]},
    ],
)
def test_a_phase_has_steps_and_datasets(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Phase.model_validate(wrong)
