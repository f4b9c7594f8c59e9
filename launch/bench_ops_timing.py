"""Times one operator and the other ways to the same result, after all of them have given it.

    round 1   ours … ours │ torch … torch │ compiled … │ copy … │ …     each way for TURN seconds, at least once
    round 2   ours … ours │ torch … torch │ …                           a time is the fastest of all calls

In a turn a way finds the caches as it left them itself, not as the way before did.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evovlm.launch.bench_ops_cases import Case, Function
from evovlm.launch.bench_ops_inputs import Size

Work = Callable[[], Any]

TURN = 0.004
LONGEST = 3.0
"""Seconds after which no further round begins; there are at least three."""
GEMM = 1024
"""Rows and columns of the matrices whose product states the machine's rate."""


def measure(case: Case, size: Size, repetitions: int, *, compiled: bool) -> dict[str, Any]:
    """Time one operator in every way.

    Args:
        case: The operator.
        size: Shape of its inputs.
        repetitions: Most rounds, after one call of each way that is not timed.
        compiled: Whether to compile the composition, which takes seconds.

    Returns:
        ``vs_NAME``, time of another way over ours: ``vs_torch``, ``vs_compiled`` (None unless asked for) and the
        case's own; ``ms`` of each way; where memory is the limit ``megabytes`` that must move, ``copy_gb_s`` and the
        shares ``of_copy_bandwidth`` (None where the operator cannot write into memory that is there) and
        ``of_fresh_copy_bandwidth``; where matrix products are, ``gflop``, ``gemm_gflop_s`` and ``of_gemm_peak``.

    Raises:
        RuntimeError: One way's result differs from the composition's.
    """
    functions = {"ours": case.ours, "torch": case.composition}
    functions |= {name: make(size) for name, make in case.others.items()}
    if compiled:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(case.composition, dynamic=False)
    if case.into is not None:
        functions["into"] = case.into(size)
    ways = {name: _work(case, function, size) for name, function in functions.items()}
    _check(case, ways)
    limit, report = _limit(case, size)
    ms = _time(ways | limit, repetitions)
    result: dict[str, Any] = {f"vs_{name}": ms[name] / ms["ours"] for name in functions if name not in ("ours", "into")}
    result.setdefault("vs_compiled", None)
    return {**result, "ms": ms, **report(ms)}


def _work(case: Case, function: Function, size: Size) -> Work:
    """One call on inputs of its own, and its backward if the case has one; returns all results."""
    inputs = case.inputs(size)
    if not case.backward:
        return lambda: function(*inputs)
    first = inputs[: case.backward]
    leaves = [part.requires_grad_() for part in first if isinstance(part, Tensor) and part.is_floating_point()]
    with torch.no_grad():
        results = case.composition(*inputs)
    grads = [part.mul(0.5) for part in (results if isinstance(results, tuple) else (results,))]

    def forward_and_backward() -> tuple[Tensor, ...]:
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return (*(part.detach() for part in results), *torch.autograd.grad(results, leaves, grads))

    return forward_and_backward


def _check(case: Case, ways: dict[str, Work]) -> None:
    expected = ways["torch"]()
    for name, way in ways.items():
        if name == "torch":
            continue
        try:
            torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            who = case.name if name == "ours" else f"{case.name} ({name})"
            raise RuntimeError(f"bench ops: {who} differs from PyTorch's composition: {error}") from error


def _limit(case: Case, size: Size) -> tuple[dict[str, Work], Callable[[dict[str, float]], dict[str, Any]]]:
    """What the machine can do at most, to be timed like the rest, and how it is reported."""
    if case.flops is not None:
        flops = case.flops(size)
        a, b, c = (torch.ones(GEMM, GEMM) for _ in range(3))

        def of_gemm(ms: dict[str, float]) -> dict[str, Any]:
            peak = 2e-6 * GEMM**3 / ms["gemm"]
            return {"of_gemm_peak": flops / 1e6 / ms["ours"] / peak, "gemm_gflop_s": peak, "gflop": flops / 1e9}

        return {"gemm": lambda: torch.mm(a, b, out=c)}, of_gemm
    assert case.num_bytes is not None
    num_bytes = case.num_bytes(size)
    source = torch.zeros(int(num_bytes) // 8)
    target = torch.zeros_like(source)

    def of_copy(ms: dict[str, float]) -> dict[str, Any]:
        return {
            "of_copy_bandwidth": ms["copy"] / ms["into"] if "into" in ms else None,
            "of_fresh_copy_bandwidth": ms["clone"] / ms["ours"],
            "megabytes": num_bytes / 1e6,
            "copy_gb_s": num_bytes / ms["copy"] / 1e6,
        }

    return {"copy": lambda: target.copy_(source), "clone": source.clone}, of_copy


def _time(ways: dict[str, Work], repetitions: int) -> dict[str, float]:
    """Milliseconds of the fastest call of each way."""
    fastest = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    began = time.perf_counter()
    for done in range(repetitions):
        if done >= 3 and time.perf_counter() - began > LONGEST:
            break
        for name, way in ways.items():
            turn = 0.0
            while turn < TURN:
                start = time.perf_counter()
                way()
                seconds = time.perf_counter() - start
                fastest[name], turn = min(fastest[name], 1e3 * seconds), turn + seconds
    return fastest
