"""The rate at which a rank multiplies matrices of the model's own shapes: what its arithmetic could take at best.

every linear of the model, rows as in a step ─► forward, gradient of the input, gradient of the weight: seconds
rate = FLOPs of all of them / seconds of all of them
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from evovlm.data.step_plan import StepPlan
from evovlm.models.config import InternVLConfig
from evovlm.parallel.world import World

_REPETITIONS = 5


@dataclass(frozen=True)
class Gemm:
    """A linear of the model, as often as a step has it.

    Attributes:
        name: Where it is.
        rows: Rows of its input.
        inputs: Columns of its input.
        outputs: Columns of its output.
        count: How many of these there are.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    count: int

    @property
    def flops(self) -> float:
        """FLOPs of forward and both backward products, of all of them."""
        return 6.0 * self.rows * self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class GemmRate:
    """What one rank reached.

    Attributes:
        rate: FLOP/s over all shapes, each weighted by its FLOPs in the model.
        shapes: Name, rows, inputs, outputs and FLOP/s of each.
    """

    rate: float
    shapes: list[tuple[str, int, int, int, float]]


def model_gemms(model: InternVLConfig, plan: StepPlan, ranks: int) -> list[Gemm]:
    """List the linears of the model with a rank's mean share of a step's rows."""
    vision, decoder = model.vision, model.decoder
    tiles = -(-plan.num_tiles // ranks)
    patches, width = tiles * (vision.num_patches + 1), vision.hidden_size
    visual, rows = tiles * model.tokens_per_tile, -(-plan.num_tokens // ranks)
    hidden, layers = decoder.hidden_size, decoder.num_layers
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    found = [
        Gemm("vit qkv", patches, width, 3 * width, vision.num_layers),
        Gemm("vit proj", patches, width, width, vision.num_layers),
        Gemm("vit fc1", patches, width, vision.ffn_size, vision.num_layers),
        Gemm("vit fc2", patches, vision.ffn_size, width, vision.num_layers),
        Gemm("vit patches", patches, 3 * vision.patch_size**2, width, 1),
        Gemm("projector 1", visual, model.shuffled_size, hidden, 1),
        Gemm("projector 2", visual, hidden, hidden, 1),
        Gemm("llm q", rows, hidden, heads, layers),
        Gemm("llm k, v", rows, hidden, kv_heads, 2 * layers),
        Gemm("llm o", rows, heads, hidden, layers),
        Gemm("llm gate, up", rows, hidden, decoder.ffn_size, 2 * layers),
        Gemm("llm down", rows, decoder.ffn_size, hidden, layers),
        Gemm("head", -(-plan.num_supervised // ranks), hidden, decoder.vocab_size, 1),
    ]
    return [gemm for gemm in found if gemm.rows]


def gemm_rate(world: World, _trainer: object, *, model: InternVLConfig, plan: StepPlan) -> GemmRate:
    """Time every linear of the model on this rank while the others do the same. Collective.

    Args:
        world: The ranks.
        model: Shapes.
        plan: A step; its rows are shared evenly.
    """
    flops = seconds = 0.0
    shapes = []
    for gemm in model_gemms(model, plan, world.size):
        x, weight, grad = (
            torch.randn(*shape)
            for shape in ((gemm.rows, gemm.inputs), (gemm.outputs, gemm.inputs), (gemm.rows, gemm.outputs))
        )
        world.barrier()
        least = sum(_least(*factors) for factors in ((x, weight.T), (grad, weight), (grad.T, x)))
        flops, seconds = flops + gemm.flops, seconds + gemm.count * least
        shapes.append((gemm.name, gemm.rows, gemm.inputs, gemm.outputs, gemm.flops / gemm.count / least))
    return GemmRate(flops / seconds, shapes)


def _least(left: Tensor, right: Tensor) -> float:
    """Fewest seconds of one product, into memory that is there."""
    out = left.new_empty(left.shape[0], right.shape[1])
    torch.mm(left, right, out=out)
    least = float("inf")
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        least = min(least, time.perf_counter() - began)
    return least
