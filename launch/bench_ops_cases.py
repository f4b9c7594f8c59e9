"""The operators that ``evovlm bench ops`` measures, each with what PyTorch offers for the same work.

    Case  ours(*inputs) ── must equal ──► composition(*inputs)      and each of `others`
          num_bytes ÷ time = share of copy bandwidth         flops ÷ time = share of the matrix products' rate

A new operator is one more :class:`Case` in ``CASES``; statements of what others write are in
:mod:`evovlm.launch.bench_ops_peers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evovlm.csrc import ops
from evovlm.launch import bench_ops_inputs as given
from evovlm.launch import bench_ops_peers as peers
from evovlm.launch.bench_ops_inputs import Inputs, Size

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: Its name in the report.
        ours: The operator.
        composition: The obvious way to write it with PyTorch's operators, called with the same inputs.
        inputs: Makes them, all float32.
        num_bytes: Bytes that must move, each input read once and each result written once, where memory is the limit.
        flops: Floating-point operations, where matrix products are the limit.
        backward: Also run backward, to those of so many first inputs that have a floating dtype.
        into: The operator, writing into memory that is there; None if it always asks for some.
        others: More ways to write it, by name; ``closest`` is the one operator of PyTorch that does most of the work.
    """

    name: str
    ours: Function
    composition: Function
    inputs: Callable[[Size], Inputs]
    num_bytes: Callable[[Size], float] | None = None
    flops: Callable[[Size], float] | None = None
    backward: int = 0
    into: Callable[[Size], Function] | None = None
    others: Mapping[str, Callable[[Size], Function]] = field(default_factory=dict)


def _attention(
    name: str, flash: Function, inputs: Callable[[Size], Inputs], *, causal: bool, backward: bool = False
) -> Case:
    """Two matrix products over all pairs of query and key forward; backward five more."""

    def flops(size: Size) -> float:
        q, *_, borders = inputs(size)
        lengths = [end - start for start, end in pairwise(borders)]
        pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
        return float((14 if backward else 4) * q.shape[1] * q.shape[2] * pairs)

    return Case(
        name, partial(ops.packed_attention, causal=causal), flash, inputs, flops=flops, backward=3 if backward else 0
    )


def _mlp_bytes(size: Size) -> int:
    return size.tokens * size.mlp


def _new(rows: Callable[[Size], int]) -> Callable[[Size], Tensor]:
    return lambda size: torch.zeros(rows(size), size.hidden)


def _with_out(operator: Function, make: Callable[[Size], Tensor]) -> Callable[[Size], Function]:
    def into(size: Size) -> Function:
        out = make(size)
        return lambda *inputs: operator(*inputs, out=out)

    return into


def _same(function: Function) -> Callable[[Size], Function]:
    return lambda _: function


def _rotary_with_tables(size: Size) -> Function:
    """What a layer does that finds its tables made."""
    tables = peers.rotary_tables(*given.angles(size))
    return lambda q, k, *_: peers.rotary_with_tables(q, k, *tables)


def _rotary_in_place(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    torch.ops.evovlm.rotary_qk_(q, k, positions, inv_freq, False)
    return q, k


def _rotary_bytes(size: Size) -> int:
    return 8 * size.tokens * (size.heads + size.kv_heads) * size.head_dim


CASES = (
    Case(
        "gather_rows",
        ops.gather_rows,
        lambda x, index: x[index],
        given.matrix_and_rows,
        lambda size: size.matrix_bytes,
        into=_with_out(ops.gather_rows, _new(lambda size: size.tokens // 2)),
        others={"closest": _same(lambda x, index: x.index_select(0, index))},
    ),
    Case(
        "gather_rows_backward",
        ops.gather_rows,
        lambda x, index: x[index],
        given.matrix_and_rows,
        lambda size: 2.5 * size.matrix_bytes,
        backward=1,
        others={"closest": _same(lambda x, index: x.index_select(0, index))},
    ),
    Case(
        "sum_rows",
        ops.sum_rows,
        peers.add_into_zeros,
        given.rows_to_add,
        lambda size: 1.5 * size.matrix_bytes,
        into=_with_out(ops.sum_rows, _new(lambda size: size.tokens)),
        others={
            "closest": _same(lambda rows, index, num: rows.new_zeros(num, rows.shape[1]).index_add_(0, index, rows))
        },
    ),
    Case(
        "scatter_rows",
        ops.scatter_rows,
        peers.replace_by_mask,
        given.base_and_rows,
        lambda size: 2 * size.matrix_bytes,
        others={"closest": _same(lambda base, index, rows: base.index_copy(0, index, rows))},
    ),
    Case(
        "scatter_rows_",
        ops.scatter_rows_,
        peers.replace_in_place,
        given.base_and_rows,
        lambda size: size.matrix_bytes,
        into=_same(ops.scatter_rows_),
        others={"closest": _same(lambda base, index, rows: base.index_copy_(0, index, rows))},
    ),
    Case(
        "scatter_rows_backward",
        ops.scatter_rows,
        peers.replace_by_mask,
        given.base_and_rows,
        lambda size: 4.5 * size.matrix_bytes,
        backward=3,
        others={"closest": _same(lambda base, index, rows: base.index_copy(0, index, rows))},
    ),
    Case(
        "rotary",
        ops.rotary_qk,
        peers.rotary_qk,
        given.rotary,
        _rotary_bytes,
        into=_same(_rotary_in_place),
        others={"tables": _rotary_with_tables},
    ),
    Case("rotary_", ops.rotary_qk_, peers.rotary_flat, given.rotary_flat, _rotary_bytes, into=_same(ops.rotary_qk_)),
    Case(
        "rotary_backward",
        ops.rotary_qk,
        peers.rotary_qk,
        given.rotary,
        lambda size: 2 * _rotary_bytes(size),
        backward=2,
    ),
    Case(
        "v2pe_positions",
        ops.v2pe_positions,
        peers.positions_at_once,
        given.v2pe,
        lambda size: 32 * size.tokens,
        others={"loop": _same(peers.positions_by_loop)},
    ),
    Case("rms_norm", ops.rms_norm, ops.rms_norm_reference, given.norm, lambda size: 2 * size.matrix_bytes),
    Case(
        "rms_norm_backward",
        ops.rms_norm,
        ops.rms_norm_reference,
        given.norm,
        lambda size: 5 * size.matrix_bytes,
        backward=2,
    ),
    Case("swiglu", ops.swiglu, ops.swiglu_reference, given.mlp, lambda size: 3 * _mlp_bytes(size)),
    Case("swiglu_backward", ops.swiglu, ops.swiglu_reference, given.mlp, lambda size: 8 * _mlp_bytes(size), backward=2),
    Case("add_scaled", ops.add_scaled, ops.add_scaled_reference, given.residual, lambda size: 3 * size.matrix_bytes),
    Case(
        "add_scaled_backward",
        ops.add_scaled,
        ops.add_scaled_reference,
        given.residual,
        lambda size: 6 * size.matrix_bytes,
        backward=3,
    ),
    Case(
        "cross_entropy_",
        peers.our_cross_entropy,
        peers.cross_entropy,
        given.loss,
        lambda size: size.tokens // 2 * size.words,
        into=_same(peers.our_cross_entropy),
    ),
    _attention("attention_causal", peers.flash_causal, given.causal, causal=True),
    _attention("attention_causal_backward", peers.flash_causal, given.causal, causal=True, backward=True),
    _attention("attention_tiles", peers.flash_tiles, given.tiles, causal=False),
    _attention("attention_tiles_backward", peers.flash_tiles, given.tiles, causal=False, backward=True),
)
