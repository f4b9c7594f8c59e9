"""The sum of squares that the gradient norm is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evovlm.engine.local_state import sum_squares


@given(st.integers(0, 9000), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-18, 1e-3, 1.0, 1e15]))
def test_squares_add_up_whatever_the_length(count: int, dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=dtype) * scale
    found = sum_squares(x)
    assert (found.dtype, found.shape) == (torch.float64, ())
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    assert found.item() == pytest.approx(x.double().square().sum().item(), rel=tolerance, abs=1e-300)


def test_a_large_tensor_is_not_summed_in_its_own_precision() -> None:
    x = torch.full((3_000_000,), 1.0 + 2**-12)
    assert sum_squares(x.view(3, -1)).item() == pytest.approx(3_000_000 * (1 + 2**-12) ** 2, rel=1e-6)


def test_what_is_not_finite_shows() -> None:
    for wrong in (float("nan"), float("inf")):
        x = torch.zeros(5000)
        x[17] = wrong
        assert not sum_squares(x).isfinite()
