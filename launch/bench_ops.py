"""Measures each tensor operator against PyTorch and against the machine's memory.

| column | what is timed |
|---|---|
| `vs_torch` | the obvious composition of PyTorch's operators, over ours |
| `vs_compiled` | `torch.compile` of that composition, over ours |
| `of_copy_bandwidth` | `copy_` of as many bytes as must move, into memory that is there, over ours done likewise |
| `of_fresh_copy_bandwidth` | `clone` of as many bytes, over ours as it is called: both get new memory, page by page |

All ways of a case take turns, on the same tensors, with the same number of threads; a time is the fastest of all
repetitions, since whatever else runs on the machine only adds. Bytes that must move are each input read once and each
result written once. Every way must give the same result.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from evovlm.csrc import ops
from evovlm.launch.report import make_report

Work = Callable[[], Any]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Size:
    """T tokens of H channels, A query and K key heads of D channels; half of the tokens are visual."""

    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def matrix_bytes(self) -> int:
        """Bytes of float32 ``[T, H]``."""
        return 4 * self.tokens * self.hidden


SIZES = {"small": Size(2048, 896, 14, 2, 64), "large": Size(4096, 3584, 28, 4, 128)}


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: Its name in the report.
        ours: The operator.
        composition: What PyTorch offers, called with the same inputs.
        inputs: Makes them, all float32.
        num_bytes: Bytes that must move.
        backward: Also run backward, to all inputs of a floating dtype.
        into: The operator, writing into memory that is there: ``ours`` where none is needed; None if it always asks.
    """

    name: str
    ours: Callable[..., Any]
    composition: Callable[..., Any]
    inputs: Callable[[Size], Inputs]
    num_bytes: Callable[[Size], float]
    backward: bool = False
    into: Callable[[Size], Callable[..., Any]] | None = None


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def _visual(size: Size) -> Tensor:
    """Rows of visual tokens: runs of 64 in every 128."""
    return torch.arange(size.tokens).view(-1, 2, 64)[:, 1].flatten()


def _matrix_and_rows(size: Size) -> Inputs:
    return _normal(size.tokens, size.hidden), _visual(size)


def _base_and_rows(size: Size) -> Inputs:
    return _normal(size.tokens, size.hidden), _visual(size), _normal(size.tokens // 2, size.hidden)


def _rows_to_add(size: Size) -> Inputs:
    return _normal(size.tokens // 2, size.hidden), _visual(size), size.tokens


def _norm(size: Size) -> Inputs:
    return _normal(size.tokens, size.hidden), _normal(size.hidden), 1e-6


def _rotary(size: Size) -> Inputs:
    positions = torch.arange(size.tokens) / 4
    q, k = (_normal(size.tokens, heads, size.head_dim) for heads in (size.heads, size.kv_heads))
    return q, k, positions, ops.rotary_frequencies(positions, size.head_dim, 1e6)


def _new(rows: Callable[[Size], int]) -> Callable[[Size], Tensor]:
    return lambda size: torch.zeros(rows(size), size.hidden)


def _with_out(operator: Callable[..., Tensor], make: Callable[[Size], Tensor]) -> Callable[[Size], Callable[..., Any]]:
    def into(size: Size) -> Callable[..., Tensor]:
        out = make(size)
        return lambda *inputs: operator(*inputs, out=out)

    return into


def _rotary_torch(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rotary_reference(q, positions, inv_freq), ops.rotary_reference(k, positions, inv_freq)


def _rotary_in_place(_: Size) -> Callable[..., Any]:
    return lambda q, k, positions, inv_freq: torch.ops.evovlm.rotary_qk_(q, k, positions, inv_freq, False)


def _rotary_bytes(size: Size) -> float:
    return 8 * size.tokens * (size.heads + size.kv_heads) * size.head_dim


CASES = (
    Case(
        "gather_rows",
        ops.gather_rows,
        lambda x, index: x.index_select(0, index),
        _matrix_and_rows,
        lambda size: size.matrix_bytes,
        into=_with_out(ops.gather_rows, _new(lambda size: size.tokens // 2)),
    ),
    Case(
        "gather_rows_backward",
        ops.gather_rows,
        lambda x, index: x.index_select(0, index),
        _matrix_and_rows,
        lambda size: 2.5 * size.matrix_bytes,
        backward=True,
    ),
    Case(
        "sum_rows",
        ops.sum_rows,
        lambda rows, index, num: rows.new_zeros(num, rows.shape[1]).index_add_(0, index, rows),
        _rows_to_add,
        lambda size: 1.5 * size.matrix_bytes,
        into=_with_out(ops.sum_rows, _new(lambda size: size.tokens)),
    ),
    Case(
        "scatter_rows",
        ops.scatter_rows,
        lambda base, index, rows: base.index_copy(0, index, rows),
        _base_and_rows,
        lambda size: 2 * size.matrix_bytes,
    ),
    Case(
        "scatter_rows_",
        ops.scatter_rows_,
        lambda base, index, rows: base.index_copy_(0, index, rows),
        _base_and_rows,
        lambda size: size.matrix_bytes,
        into=lambda _: ops.scatter_rows_,
    ),
    Case(
        "scatter_rows_backward",
        ops.scatter_rows,
        lambda base, index, rows: base.index_copy(0, index, rows),
        _base_and_rows,
        lambda size: 4.5 * size.matrix_bytes,
        backward=True,
    ),
    Case("rms_norm", ops.rms_norm, ops.rms_norm_reference, _norm, lambda size: 2 * size.matrix_bytes),
    Case(
        "rms_norm_backward",
        ops.rms_norm,
        ops.rms_norm_reference,
        _norm,
        lambda size: 5 * size.matrix_bytes,
        backward=True,
    ),
    Case("rotary", ops.rotary_qk, _rotary_torch, _rotary, _rotary_bytes, into=_rotary_in_place),
)


def measure(case: Case, size: Size, repetitions: int, *, compiled: bool) -> dict[str, Any]:
    """Time one operator in every way.

    Args:
        case: The operator.
        size: Shape of its inputs.
        repetitions: How often each way is timed, after once that is not.
        compiled: Whether to compile the composition, which takes seconds.

    Returns:
        The ratios that the module names (``vs_compiled`` is None unless asked for, ``of_copy_bandwidth`` where the
        operator cannot write into memory that is there); ``ms`` of each way; ``megabytes`` that must move;
        ``copy_gb_s``, bytes read and written each second by ``copy_``.

    Raises:
        RuntimeError: Ours differs from the composition.
    """
    num_bytes = case.num_bytes(size)
    source = torch.zeros(int(num_bytes) // 8)
    target = torch.zeros_like(source)
    ways: dict[str, Work] = {"ours": _work(case, case.ours, size), "torch": _work(case, case.composition, size)}
    _check(case, ways)
    if compiled:
        torch.compiler.reset()
        ways["compiled"] = _work(case, torch.compile(case.composition, dynamic=False), size)
    if case.into is not None:
        ways["into"] = _work(case, case.into(size), size)
    ways |= {"copy": lambda: target.copy_(source), "clone": source.clone}
    ms = _time(ways, repetitions)
    return {
        "vs_torch": ms["torch"] / ms["ours"],
        "vs_compiled": ms["compiled"] / ms["ours"] if compiled else None,
        "of_copy_bandwidth": ms["copy"] / ms["into"] if case.into is not None else None,
        "of_fresh_copy_bandwidth": ms["clone"] / ms["ours"],
        "ms": ms,
        "megabytes": num_bytes / 1e6,
        "copy_gb_s": num_bytes / ms["copy"] / 1e6,
    }


def _work(case: Case, function: Callable[..., Any], size: Size) -> Work:
    """One call on inputs of its own, and its backward if the case has one; returns all results."""
    inputs = case.inputs(size)
    if not case.backward:
        return lambda: function(*inputs)
    leaves = [part.requires_grad_() for part in inputs if isinstance(part, Tensor) and part.is_floating_point()]
    with torch.no_grad():
        grad = case.composition(*inputs).mul_(0.5)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return forward_and_backward


def _check(case: Case, ways: dict[str, Work]) -> None:
    try:
        torch.testing.assert_close(ways["ours"](), ways["torch"](), rtol=1e-4, atol=1e-4)
    except AssertionError as error:
        raise RuntimeError(f"bench ops: {case.name} differs from PyTorch's composition: {error}") from error


def _time(ways: dict[str, Work], repetitions: int) -> dict[str, float]:
    """Fastest of the repetitions of each way, in milliseconds; the ways take turns."""
    fastest = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    for _ in range(repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            fastest[name] = min(fastest[name], 1e3 * (time.perf_counter() - began))
    return fastest


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the compositions, too.")] = True,
) -> dict[str, Any]:
    """Measure all operators at the shapes of a small model and of one of 8 B parameters, and print a table.

    Results are those of the large shape by name of the operator, with those of the small one under ``small``.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    results: dict[str, Any] = {}
    for case in CASES:
        small, large = (measure(case, SIZES[name], repetitions, compiled=compiled) for name in ("small", "large"))
        results[case.name] = {**large, "small": small, "threads": torch.get_num_threads()}
    report = make_report("ops", results, json_file)
    table = Table("operator", "shape", box=SIMPLE_HEAD, caption=f"CPU: {report['machine']['cpu']}")
    for heading in ("ms", "× torch", "× compiled", "of copy", "of fresh copy", "copy GB/s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        for shape, line in (("small", result["small"]), ("large", result)):
            ratios = (line["vs_torch"], line["vs_compiled"])
            shares = (line["of_copy_bandwidth"], line["of_fresh_copy_bandwidth"])
            table.add_row(
                name if shape == "small" else "",
                shape,
                f"{line['ms']['ours']:,.2f}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                *("" if share is None else f"{share:.0%}" for share in shares),
                f"{line['copy_gb_s']:.1f}",
                end_section=shape == "large",
            )
    Console().print(table)
    return report
