"""Costs by shape are the FLOPs of flops.py, pass by pass."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.engine.cost_shape import ForwardFlops, shape_costs
from evovlm.engine.flops import forward_flops, training_flops
from evovlm.models.config import InternVLConfig
from evovlm.models.table import SIZES

from .support import SMALL

CONFIG = replace(SMALL, decoder=replace(SMALL.decoder, num_heads=6, num_kv_heads=3, head_dim=6, hidden_size=20))


@pytest.mark.parametrize("config", [CONFIG, *SIZES.values()], ids=["small", *SIZES])
def test_parts_add_up_to_the_count_of_a_pack(config: InternVLConfig) -> None:
    parts, lengths, tiles, targets = ForwardFlops.of(config), [700, 1, 2048, 33], 5, 1234
    whole = forward_flops(config, tiles, lengths, targets)
    assert parts.per_tile * tiles == whole.vit
    assert parts.per_visual_token * tiles * config.tokens_per_tile == whole.projector
    squares = sum(length**2 for length in lengths)
    llm = parts.per_token * sum(lengths) + parts.per_square * squares + parts.per_target * targets
    assert llm == whole.llm
    assert min(vars(parts).values()) > 0
    assert all(value == int(value) for value in vars(parts).values())


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=9),
    st.integers(0, 20),
    st.sampled_from([(), ("vit",), ("llm",), ("vit", "llm"), ("vit", "projector")]),
)
def test_costs_of_a_pack_are_those_of_training(lengths: list[int], tiles: int, freeze: tuple[str, ...]) -> None:
    rows, squares = sum(lengths), sum(length**2 for length in lengths)
    targets = rows // 2
    costs = shape_costs(CONFIG, freeze=freeze)
    counted = training_flops(forward_flops(CONFIG, tiles, lengths, targets), freeze)
    assert costs.vit.predict(tiles) == counted.vit
    assert costs.projector.predict(tiles * CONFIG.tokens_per_tile) == counted.projector
    assert costs.llm.predict(rows, squares, targets) == counted.llm
    assert costs.unit == "flops"


def test_recomputation_adds_forwards() -> None:
    parts, plain = ForwardFlops.of(CONFIG), shape_costs(CONFIG)
    full = shape_costs(CONFIG, recompute={"vit": "full", "llm": "full"})
    assert full.vit.per_tile == plain.vit.per_tile + parts.per_tile
    assert full.llm.per_token == plain.llm.per_token + parts.per_token  # the head is outside the blocks
    assert full.llm.per_square == plain.llm.per_square + parts.per_square
    assert full.projector == plain.projector
    assert shape_costs(CONFIG, recompute={"vit": "selective", "llm": "selective"}) == plain
    again = shape_costs(CONFIG, encoder_activations="recompute")
    assert again.vit.per_tile == plain.vit.per_tile + parts.per_tile
    assert again.projector.per_visual_token == plain.projector.per_visual_token + parts.per_visual_token
    assert again.llm == plain.llm


def test_what_is_never_run_backward_is_not_recomputed() -> None:
    frozen = ("vit", "projector")
    costs = shape_costs(CONFIG, freeze=frozen, recompute={"vit": "full"}, encoder_activations="recompute")
    assert costs == shape_costs(CONFIG, freeze=frozen)
