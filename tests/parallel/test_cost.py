"""Cost models: integers that no platform changes, files that give back what was saved, errors that name the key."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from evovlm.parallel.cost import (
    MAX_TILES,
    MAX_TOKENS,
    PLAN_LIMIT,
    CostModel,
    Fit,
    IntegerCosts,
    LLMCost,
    ProjectorCost,
    VisionCost,
)

COEFFICIENT = st.floats(0, 1e16, allow_subnormal=False)
SHAPE_8B = CostModel.from_shape(
    per_tile=1.8e12, per_visual_token=8.3e7, per_token=4.3e10, per_square=602_112, per_target=3.2e9
)


@st.composite
def models(draw: st.DrawFn) -> CostModel:
    a, b, c, target, tile, token = (draw(COEFFICIENT) for _ in range(6))
    assume(a + b > 0)
    return CostModel(
        source="calibrated",
        unit="ns",
        machine=draw(st.none() | st.text()),
        about=draw(st.dictionaries(st.text(), st.text(), max_size=2)),
        vit=VisionCost(per_tile=tile, per_call=draw(COEFFICIENT)),
        projector=ProjectorCost(per_visual_token=token, per_call=draw(COEFFICIENT)),
        llm=LLMCost(per_token=a, per_square=b, per_target=target, per_pack=c),
        fits={"llm": Fit(cases=3, median_error=draw(COEFFICIENT), largest_error=draw(COEFFICIENT))},
    )


def dearest(costs: IntegerCosts) -> int:
    most = np.array([costs.max_tokens])
    pack = costs.pack_costs(most**2, most, costs.max_tokens)[0]
    tiles = costs.vit_costs(np.array([costs.max_tiles]))[0]
    return int(max(pack, tiles, costs.projector_costs(np.array([costs.max_tokens]))[0]))


@given(models(), st.integers(1, MAX_TOKENS), st.integers(1, MAX_TILES))
def test_integers_are_bounded_and_as_large_as_they_can_be(model: CostModel, tokens: int, tiles: int) -> None:
    costs = model.integers(tokens, tiles)
    assert 0 < dearest(costs) < PLAN_LIMIT
    assert costs == model.integers(tokens, tiles)
    numbers = [costs.per_token, costs.per_square, costs.per_target, costs.per_pack]
    numbers += [costs.per_tile, costs.per_visual_token]
    assert all(isinstance(number, int) for number in numbers)
    assert np.gcd.reduce(np.array(numbers)) == 1


@given(models(), st.integers(1, MAX_TOKENS))
def test_costs_in_integers_are_the_costs(model: CostModel, tokens: int) -> None:
    # Rounding moves a pack's cost by less than 2⁻²⁰ of the dearest pack's, or half an integer for each feature.
    costs, llm = model.integers(tokens, 1), model.llm
    worst = llm.predict(tokens, tokens**2, tokens)
    half = tokens // 2
    ratio = Fraction(int(costs.pack_costs(np.array([half**2]), np.array([half // 3]), half)[0]), dearest(costs))
    largest = max(worst, model.vit.per_tile, model.projector.per_visual_token * tokens)
    wanted = llm.predict(half, half**2, half // 3) / largest
    assert float(ratio) == pytest.approx(wanted, abs=2 * (tokens**2 + 2 * tokens + 1) / PLAN_LIMIT, rel=1e-9)


@given(models(), st.integers(1, MAX_TOKENS), st.integers(1, MAX_TOKENS))
def test_costs_rise_with_rows_and_squares(model: CostModel, first: int, second: int) -> None:
    costs = model.integers()
    short, long = sorted((first, second))
    samples = costs.sample_costs(np.array([short, long]), np.array([short // 2, short]))
    assert samples.dtype == np.int64
    assert 0 <= samples[0] <= samples[1]
    packs = costs.pack_costs(np.array([short, short**2, long**2]), np.array([0, short, short]), long)
    assert packs.dtype == np.int64
    assert packs[0] <= packs[1] <= packs[2]
    assert costs.pack_costs(np.array([short**2]), np.array([short // 2]), short)[0] == samples[0] + costs.per_pack


def test_a_pack_costs_its_samples_and_its_padding() -> None:
    costs = SHAPE_8B.integers(16_384)
    lengths = np.array([9000, 4000, 3000, 384])  # the last is padding, which attends to itself
    targets = lengths // 3
    pack = costs.pack_costs(np.array([(lengths**2).sum()]), np.array([targets.sum()]), 16_384)
    assert pack[0] == costs.sample_costs(lengths, targets).sum() + costs.per_pack


def test_integers_of_a_known_model_do_not_change() -> None:
    # A recorded plan must be made again by later versions: the coefficients over 2⁸, the last of them rounded.
    assert SHAPE_8B.integers() == IntegerCosts(
        per_token=167_968_750,
        per_square=2352,
        per_pack=0,
        per_tile=7_031_250_000,
        per_visual_token=324_219,
        max_tokens=131_072,
        max_tiles=1024,
        per_target=12_500_000,
    )
    squares = CostModel.from_shape(per_tile=0, per_visual_token=0, per_token=0, per_square=1)
    assert squares.integers() == IntegerCosts(0, 1, 0, 0, 0, 131_072, 1024)


def test_what_integers_are_not_scaled_for() -> None:
    costs = SHAPE_8B.integers(1000)
    with pytest.raises(ValueError, match="packs of 1001 rows, but costs are scaled for at most 1000"):
        costs.pack_costs(np.array([1]), np.array([0]), 1001)
    with pytest.raises(ValueError, match=r"from 1 to 1000001, but a pack of 1000 rows has at most 1000² = 1000000"):
        costs.pack_costs(np.array([1, 1_000_001]), np.array([0, 0]), 1000)
    with pytest.raises(ValueError, match="samples of 3 to 1001 tokens, but costs are scaled for at most 1000"):
        costs.sample_costs(np.array([3, 1001]), np.array([0, 0]))
    with pytest.raises(ValueError, match="from 0 to 1001 targets in packs of 1000 rows"):
        costs.pack_costs(np.array([1, 1]), np.array([0, 1001]), 1000)
    with pytest.raises(ValueError, match=r"max_tokens = 0, max_tiles = 1024: costs can be scaled"):
        SHAPE_8B.integers(0)
    none = np.array([], np.int64)
    assert costs.pack_costs(none, none, 1000).shape == costs.sample_costs(none, none).shape == (0,)


@given(models())
def test_a_file_gives_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, model: CostModel) -> None:
    path = tmp_path_factory.getbasetemp() / "costs" / "cost.json"
    model.save(path)
    assert CostModel.load(path) == model
    assert CostModel.load(path).integers() == model.integers()


def saved(path: Path, **changes: Any) -> Path:
    content = json.loads(SHAPE_8B.model_dump_json())
    for name, value in changes.items():
        content[name] = value
    path.write_text(json.dumps(content))
    return path


def test_errors_name_the_file_and_the_key(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    with pytest.raises(FileNotFoundError, match=r"no cost model at .*cost\.json; make one with: evovlm calibrate"):
        CostModel.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"cost\.json: not valid JSON"):
        CostModel.load(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object of costs, got list"):
        CostModel.load(file)
    for version in (2, None):
        with pytest.raises(ValueError, match=rf"cost\.json: version = {version}; this evovlm reads version 1"):
            CostModel.load(saved(file, version=version))
    with pytest.raises(ValueError, match=r"'vit\.per_tile' is missing"):
        CostModel.load(saved(file, vit={}))
    with pytest.raises(ValueError, match=r"'llm\.per_square' = -1: should be greater than or equal to 0") as caught:
        CostModel.load(saved(file, llm={"per_token": "fast", "per_square": -1, "per_hour": 3}))
    assert "'llm.per_token' = 'fast': should be a valid number" in str(caught.value)
    assert "'llm.per_hour' is not a key of a cost model" in str(caught.value)
    assert "'llm.per_target' is missing" in str(caught.value)  # a file from before heads were balanced
    with pytest.raises(ValueError, match=r"'llm': per_token and per_square are both 0"):
        CostModel.load(saved(file, llm={"per_token": 0.0, "per_square": 0.0, "per_target": 1.0}))
    with pytest.raises(ValueError, match="costs of source 'shape' are in 'flops', not in 'ns'"):
        CostModel.load(saved(file, unit="ns"))


def test_costs_are_finite() -> None:
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValidationError):
            VisionCost(per_tile=bad)


def test_predictions() -> None:
    assert VisionCost(per_tile=3.0, per_call=1.0).predict(4) == 13
    assert ProjectorCost(per_visual_token=2.0).predict(4) == 8
    assert LLMCost(per_token=2.0, per_square=0.5, per_target=3.0, per_pack=7.0).predict(10, 60, 4) == 69
