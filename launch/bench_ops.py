"""Measures each tensor operator against PyTorch and against the machine's limit.

| column | what is timed |
|---|---|
| `vs_torch` | the obvious composition of PyTorch's operators, over ours |
| `vs_compiled` | `torch.compile` of that composition, over ours |
| `vs_closest` | the one operator of PyTorch that does most of the work, where there is one |
| `vs_tables`, `vs_loop` | rotary with its tables made before; a Python loop over tokens |
| `of_copy_bandwidth` | `copy_` of as many bytes as must move, into memory that is there, over ours done likewise |
| `of_fresh_copy_bandwidth` | `clone` of as many bytes, over ours as it is called: both ask for memory |
| `of_gemm_peak` | rate of the products inside attention, over that of a float32 product of two 1024 × 1024 matrices |

All ways of a case take turns, with the same inputs and number of threads; a time is the fastest of all calls, since
whatever else runs on the machine only adds. Bytes that must move are each input read once and each result written
once. Every way must give the same result before any is timed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evovlm.launch.bench_ops_cases import CASES, Case
from evovlm.launch.bench_ops_inputs import SIZES
from evovlm.launch.bench_ops_timing import measure
from evovlm.launch.report import make_report


def run(
    json_file: Path | None = None,
    only: Sequence[str] = (),
    threads: int | None = None,
    repetitions: int = 15,
    *,
    compiled: bool = True,
) -> dict[str, Any]:
    """Measure operators at the shapes of a small model and of one of 8 B parameters, and print a table.

    Args:
        json_file: Where to write the report, too.
        only: Names of the operators to measure, or beginnings of names; all if empty.
        threads: Threads that PyTorch and the operators use; all cores by default.
        repetitions: How often each way has its turn, at most.
        compiled: Also compile the compositions, which takes most of the time.

    Returns:
        The report. Results are those of the large shape by name of the operator, with those of the small one under
        ``small``.

    Raises:
        ValueError: No operator's name begins like that.
    """
    cases = _chosen(only)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    results: dict[str, Any] = {}
    try:
        for case in cases:
            small, large = (measure(case, SIZES[name], repetitions, compiled=compiled) for name in ("small", "large"))
            results[case.name] = {**large, "small": small, "threads": torch.get_num_threads()}
    finally:
        torch.set_num_threads(before)
    report = make_report("ops", results, json_file)
    _print(report)
    return report


def _chosen(only: Sequence[str]) -> list[Case]:
    for name in only:
        if not any(case.name.startswith(name) for case in CASES):
            known = ", ".join(case.name for case in CASES)
            raise ValueError(f"bench ops: there is no operator {name!r}; there are {known}")
    return [case for case in CASES if not only or case.name.startswith(tuple(only))]


def _print(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, caption=f"CPU: {report['machine']['cpu']}")
    for heading in ("operator", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "× torch", "compiled", "other", "of copy", "fresh", "of GEMM"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in report["results"].items():
        for shape, line in (("small", result["small"]), ("large", result)):
            others = {key for key in line if key.startswith("vs_")} - {"vs_torch", "vs_compiled"}
            shares = (line.get(key) for key in ("of_copy_bandwidth", "of_fresh_copy_bandwidth", "of_gemm_peak"))
            table.add_row(
                name if shape == "small" else "",
                shape,
                f"{line['ms']['ours']:,.2f}",
                f"{line['vs_torch']:.2f}",
                "" if line["vs_compiled"] is None else f"{line['vs_compiled']:.2f}",
                " ".join(f"{key.removeprefix('vs_')} {line[key]:.2f}" for key in sorted(others)),
                *("" if share is None else f"{share:.0%}" for share in shares),
                end_section=shape == "large",
            )
    Console(width=118).print(table)
