"""The FLOP formula against PyTorch's own count of what the model does."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evovlm.engine.flops import Flops, forward_flops, peak_flops, training_flops
from evovlm.engine.losses import Targets, weighted_cross_entropy
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL

from .support import SMALL

CONFIG = replace(
    SMALL,
    vision=replace(SMALL.vision, hidden_size=24, ffn_size=40, num_layers=3),
    decoder=replace(SMALL.decoder, num_heads=6, num_kv_heads=3, head_dim=6, hidden_size=20),
)
LENGTHS = (13, 20, 7)
NUM_TILES, NUM_SUPERVISED = 3, 9


def counted(
    config: InternVLConfig, lengths: Sequence[int], num_tiles: int, num_supervised: int, *, backward: bool = False
) -> FlopCounterMode:
    """What PyTorch counts in a pack without padding; attention operators bring their own count."""
    T = sum(lengths)
    model = InternVL(config)
    labels = torch.full((T,), -100)
    labels[:num_supervised] = 1
    targets = Targets.of(labels, torch.ones(T), torch.device("cpu"))

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return weighted_cross_entropy(hidden, weight, targets)

    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        loss = model(
            torch.zeros(T, dtype=torch.int64),
            torch.arange(T, dtype=torch.float32),
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            torch.zeros(num_tiles, 3, config.vision.tile_size, config.vision.tile_size),
            torch.arange(num_tiles * config.tokens_per_tile),
            head=head,
        )
        if backward:
            loss.backward()
    return counter


@pytest.mark.parametrize(
    ("lengths", "num_tiles", "num_supervised"), [(LENGTHS, NUM_TILES, NUM_SUPERVISED), ((40,), 0, 39), ((1,) * 8, 1, 1)]
)
def test_the_formula_is_what_pytorch_counts(lengths: tuple[int, ...], num_tiles: int, num_supervised: int) -> None:
    formula = forward_flops(CONFIG, num_tiles, lengths, num_supervised)
    counts = counted(CONFIG, lengths, num_tiles, num_supervised).get_flop_counts()
    vit, projector, everything = (
        sum(counts.get(name, {}).values()) for name in ("InternVL.vision_model", "InternVL.mlp1", "Global")
    )
    assert (formula.vit, formula.projector, formula.llm) == (vit, projector, everything - vit - projector)
    assert formula.total == everything


def test_a_step_costs_what_pytorch_counts() -> None:
    """Forward and backward: three times the forward, but that pixels have no gradient, that attention's backward, which
    computes its scores again, costs 2.5 times its forward instead of twice, and that PyTorch passes over products that
    are added in place, as the head's gradient is.
    """
    counter = counted(CONFIG, LENGTHS, NUM_TILES, NUM_SUPERVISED, backward=True)
    formula = training_flops(forward_flops(CONFIG, NUM_TILES, LENGTHS, NUM_SUPERVISED), ())
    vision, decoder = CONFIG.vision, CONFIG.decoder
    pixels = 2 * NUM_TILES * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
    pairs = NUM_TILES * (vision.num_patches + 1) ** 2 * vision.num_layers * vision.hidden_size
    seen = sum(length * (length + 1) // 2 for length in LENGTHS)
    pairs += seen * decoder.num_layers * decoder.num_heads * decoder.head_dim
    head = 2 * NUM_SUPERVISED * decoder.hidden_size * decoder.vocab_size
    assert counter.get_total_flops() == formula.total - pixels + 2 * pairs - head


def test_a_backward_costs_twice_its_forward() -> None:
    # Linears only, where PyTorch counts both: three products of the same size, but for the input of the first.
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False))
    with FlopCounterMode(display=False) as forward:
        out = layers(torch.ones(4, 8, requires_grad=True))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize(
    ("freeze", "factors"),
    [
        ((), (3, 3, 3)),
        (("vit",), (1, 3, 3)),  # nothing before it is trained: no backward
        (("llm",), (3, 3, 2)),  # passes gradients on to what is
        (("projector",), (3, 2, 3)),
        (("vit", "llm"), (1, 3, 2)),
        (("vit", "projector"), (1, 1, 3)),
    ],
)
def test_frozen_modules_cost_less(freeze: tuple[str, ...], factors: tuple[int, int, int]) -> None:
    trained = training_flops(Flops(vit=1.0, projector=10.0, llm=100.0), freeze)
    assert (trained.vit, trained.projector, trained.llm) == (factors[0], 10 * factors[1], 100 * factors[2])


def test_a_published_size_costs_six_flops_per_parameter_and_token() -> None:
    # The field's rule of thumb, 6·N·T, holds for short segments where attention is small.
    from evovlm.models.table import num_parameters, size

    config, tokens = size("8B"), 1024
    flops = training_flops(forward_flops(config, 0, [tokens], tokens), ())
    embedding = config.decoder.vocab_size * config.decoder.hidden_size
    assert flops.llm == pytest.approx(6 * tokens * (num_parameters(config)["llm"] - embedding), rel=0.02)


def test_the_peak_of_a_cpu_is_measured() -> None:
    rate, source = peak_flops(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e8 < rate < 1e14
    assert source == "matrix product measured here, float32"
