"""What a run drew is never rewritten: changes after a step are told, changes before it refused."""

from typing import Any

import pytest

from evovlm.data.curriculum import Phase
from evovlm.data.mixture import MixtureSettings
from evovlm.engine.schedule import changed, changes_of_data, dataset_entries, make_schedule

from ..data.conftest import FakeDataset, fake_index

OLD = fake_index(FakeDataset("text", [5] * 4), FakeDataset("chart", [9] * 3, [1] * 3)).datasets
NEW = fake_index(
    FakeDataset("text", [5] * 4), FakeDataset("chart", [9] * 3, [1] * 3), FakeDataset("maps", [7], [1])
).datasets


def schedule(datasets: Any, *phases: Phase, **last: Any) -> list[dict[str, Any]]:
    base = MixtureSettings(**last)
    return make_schedule([(phase.steps, phase.mixture(base)) for phase in phases], base, datasets)


def test_a_schedule_names_what_is_drawn_from_which_step() -> None:
    spans = schedule(OLD, Phase(steps=3, weights={"text": 2, "chart": 0}), Phase(steps=4, datasets=("chart",)))
    assert [(span["from"], span["draws"]) for span in spans] == [
        (0, {"text": 2.0}),
        (3, {"chart": None}),
        (7, {"text": None, "chart": None}),
    ]
    assert {span["language_ratio"] for span in spans} == {"1:3"}


@pytest.mark.parametrize("step", [5, 9])
def test_changes_from_the_step_on_are_told(step: int) -> None:
    saved = schedule(OLD)
    now = schedule(NEW, Phase(steps=step, datasets=("text", "chart")), weights={"text": 1, "chart": 1, "maps": 0.5})
    assert changed(saved, saved, step) == []
    assert changed(saved, schedule(OLD, Phase(steps=2, datasets=("text", "chart"))), step) == []  # the same in words
    (line,) = changed(saved, now, step)
    assert line == (
        f"from step {step} on: from step {step} text × 1 + chart × 1 + maps × 0.5 at 1:3; "
        f"it was to be from step {step} text + chart at 1:3"
    )


def test_what_was_drawn_cannot_change() -> None:
    saved = schedule(OLD)
    with pytest.raises(ValueError, match=r"up to step 5 .* drew from step 0 text \+ chart at 1:3, but .* from step 0 "
                       r"text \+ chart \+ maps at 1:3: put the steps so far into \[\[data.phases\]\]"):  # fmt: skip
        changed(saved, schedule(NEW), 5)
    with pytest.raises(ValueError, match=r"from step 4 text at 1:3 with replacement|replacement"):
        changed(saved, schedule(OLD, replacement=True), 1)
    late = schedule(NEW, Phase(steps=4, datasets=("text", "chart")))
    with pytest.raises(ValueError, match="up to step 5"):
        changed(saved, late, 5)
    assert changed(saved, late, 4)
    assert changed(saved, schedule(NEW), 0)  # nothing was drawn yet


def test_datasets_may_be_added_behind_those_there_are() -> None:
    saved = {"step": 5, "index": dataset_entries(OLD), "schedule": schedule(OLD)}
    now = {"index": dataset_entries(NEW), "schedule": schedule(NEW, Phase(steps=5, datasets=("text", "chart")))}
    told = changes_of_data(saved, now)
    assert told[0] == "dataset 'maps' is new in the index"
    assert len(told) == 2
    maps, text, chart = (
        FakeDataset("maps", [7], [1]),
        FakeDataset("text", [5] * 4),
        FakeDataset("chart", [9] * 3, [1] * 3),
    )
    moved = fake_index(maps, text, chart)
    with pytest.raises(ValueError, match=r"dataset 'text' .* \[1, 4, 20, 16, 0\] here, \[0, 4, 20, 16, 0\] there"):
        changes_of_data(saved, now | {"index": dataset_entries(moved.datasets)})
    with pytest.raises(ValueError, match=r"dataset 'text' .* is not there here"):
        changes_of_data(saved, now | {"index": {}})
