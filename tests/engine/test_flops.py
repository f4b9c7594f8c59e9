"""The FLOP formula against PyTorch's own count of what the model does."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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


class AttentionFlops(TorchDispatchMode):
    """Counts the score and value products of attention on the CPU, which FlopCounterMode takes for free."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = self.causal = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func._opname:
            batch, heads, rows, width = args[0].shape
            is_causal = (len(args) > 4 and args[4]) or (kwargs or {}).get("is_causal", False)
            pairs = rows * (rows + 1) // 2 if is_causal else rows * rows
            flops = 4 * batch * heads * pairs * width
            self.dense, self.causal = self.dense + flops * (not is_causal), self.causal + flops * is_causal
        return func(*args, **(kwargs or {}))


def counted(config: InternVLConfig, lengths: Sequence[int], num_tiles: int, num_supervised: int) -> dict[str, int]:
    """Forward FLOPs of a pack without padding, by module, as they are done."""
    T = sum(lengths)
    model = InternVL(config).eval()
    labels = torch.full((T,), -100)
    labels[:num_supervised] = 1
    targets = Targets.of(labels, torch.ones(T), torch.device("cpu"))

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return weighted_cross_entropy(hidden, weight, targets)

    with torch.no_grad(), FlopCounterMode(display=False) as counter, AttentionFlops() as attention:
        model(
            torch.zeros(T, dtype=torch.int64),
            torch.arange(T, dtype=torch.float32),
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            torch.zeros(num_tiles, 3, config.vision.tile_size, config.vision.tile_size),
            torch.arange(num_tiles * config.tokens_per_tile),
            head=head,
        )
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    vit, projector = by_module.get("InternVL.vision_model", 0), by_module.get("InternVL.mlp1", 0)
    # Where PyTorch counts an attention operator itself, it must not be counted twice.
    assert not any("scaled_dot" in str(op) for counts in counter.get_flop_counts().values() for op in counts)
    return {
        "vit": vit + attention.dense,
        "projector": projector,
        "llm": by_module["Global"] - vit - projector + attention.causal,
    }


@pytest.mark.parametrize(
    ("lengths", "num_tiles", "num_supervised"), [(LENGTHS, NUM_TILES, NUM_SUPERVISED), ((40,), 0, 39), ((1,) * 8, 1, 1)]
)
def test_the_formula_is_what_pytorch_counts(lengths: tuple[int, ...], num_tiles: int, num_supervised: int) -> None:
    formula = forward_flops(CONFIG, num_tiles, lengths, num_supervised)
    measured = counted(CONFIG, lengths, num_tiles, num_supervised)
    assert {"vit": formula.vit, "projector": formula.projector, "llm": formula.llm} == measured
    assert formula.total == sum(measured.values())


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
