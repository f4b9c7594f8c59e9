"""Pipeline stages: how layers are shared out, and what of a decoder a stage keeps."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evovlm.parallel.pipeline import Absent, cut, split_layers


class Net(nn.Module):
    """Modules at the places where a decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(6))})


@given(
    st.integers(1, 9).flatmap(lambda stages: st.tuples(st.integers(stages, 12), st.just(stages))),
    st.floats(0, 5),
    st.floats(0, 5),
)
def test_stages_cover_all_layers_and_the_dearest_is_as_cheap_as_can_be(
    sizes: tuple[int, int], first: float, last: float
) -> None:
    num_layers, num_stages = sizes

    def dearest(borders: list[int]) -> float:
        costs = [float(b - a) for a, b in pairwise(borders)]
        costs[0] += first
        costs[-1] += last
        return max(costs)

    stages = split_layers(num_layers, num_stages, first=first, last=last)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert len(stages) == num_stages
    assert min(map(len, stages)) >= 1
    every = combinations(range(1, num_layers), num_stages - 1)
    best = min(dearest([0, *inner, num_layers]) for inner in every)
    assert dearest([stages[0].start, *(stage.stop for stage in stages)]) <= best + 1e-9


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert [len(stage) for stage in split_layers(12, 4)] == [3, 3, 3, 3]
    assert [len(stage) for stage in split_layers(12, 4, last=1.0)] == [3, 3, 3, 3]  # another would have to take 4
    assert [len(stage) for stage in split_layers(12, 4, last=2.0)] == [3, 3, 4, 2]
    assert [len(stage) for stage in split_layers(12, 4, first=2.0, last=2.0)] == [2, 4, 4, 2]


def test_fewer_layers_than_stages_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 pipeline stages; use at most 3"):
        split_layers(3, 4)


@pytest.mark.parametrize(("is_first", "is_last"), [(True, False), (False, False), (False, True), (True, True)])
def test_a_cut_keeps_names_and_values_of_what_stays(is_first: bool, is_last: bool) -> None:
    whole, stage = Net(), Net()
    stage.load_state_dict(whole.state_dict())
    first, last = (None if is_first else ["embed"]), (None if is_last else ["head"])
    cut(stage, range(2, 4), path="inner.layers", first=first, last=last)
    expected = {
        name: value
        for name, value in whole.state_dict().items()
        if name.startswith(("inner.layers.2.", "inner.layers.3."))
        or (is_first and name.startswith("embed."))
        or (is_last and name.startswith("head."))
    }
    assert {name: value.tolist() for name, value in stage.state_dict().items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    absent = {name for name, module in stage.named_modules() if isinstance(module, Absent)}
    assert absent == {f"inner.layers.{n}" for n in (0, 1, 4, 5)} | ({"embed"} if not is_first else set()) | (
        {"head"} if not is_last else set()
    )


def test_absent_passes_its_first_argument_through() -> None:
    x = torch.ones(2)
    assert Absent()(x, 1, attend=None) is x
