"""What the tests of the fused operators share: poisoned memory, dtypes with tolerances, comparisons, thread counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from torch import Tensor

ANY_TIME = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the sizes of the terms: a unit in the last place, or a few of them.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that what an operator leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype, sizes: Tensor | None = None) -> None:
    """Compare with a result in float64, within a part of ``sizes`` (of the result where there are none)."""
    assert ours.dtype == dtype
    bounds = TOLERANCES[dtype] * (expected if sizes is None else sizes).abs() + torch.finfo(dtype).tiny
    apart = (ours.detach().double() - expected).abs()
    assert (apart <= bounds).all(), f"{float((apart / bounds).max())} times the tolerance"


def by_threads(work: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Results with one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(work())
    finally:
        torch.set_num_threads(before)
    return results
