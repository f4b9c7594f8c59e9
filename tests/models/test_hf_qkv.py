"""Rows of fused q, k, v projections: any run of whole heads is an attention of its own; nothing else is touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evovlm.models.hf.qkv import by_head, by_part, stream_by_head

from .hf_support import as_published

WEIGHT = "vision_model.encoder.layers.11.attn.qkv.weight"
BIAS = WEIGHT.replace("weight", "bias")


def test_rows_of_each_head_lie_together() -> None:
    published = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23])  # two heads of two rows; q, then k, then v
    assert by_head(BIAS, published, 2).tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    first, second = by_head(BIAS, published, 2).chunk(2)  # what two tensor-parallel ranks hold
    assert first.view(3, 1, 2).tolist() == [[[0, 1]], [[10, 11]], [[20, 21]]]
    assert second.view(3, 1, 2).tolist() == [[[2, 3]], [[12, 13]], [[22, 23]]]


@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from(((), (3,))), st.sampled_from((torch.bfloat16, torch.float64))
)
def test_there_and_back(num_heads: int, dim: int, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    ours = torch.randn(3 * num_heads * dim, *rest).to(dtype)
    published = by_part(WEIGHT, ours, num_heads)
    assert (published.dtype, published.is_contiguous()) == (dtype, True)
    assert torch.equal(published, as_published({WEIGHT: ours}, num_heads)[WEIGHT])
    ((name, back),) = stream_by_head([(WEIGHT, published)], num_heads)
    assert name == WEIGHT
    assert torch.equal(back, ours)


@pytest.mark.parametrize(
    "name",
    ["vision_model.encoder.layers.0.attn.proj.weight", "language_model.model.layers.0.self_attn.q_proj.weight"],
)
def test_other_tensors_pass_as_they_are(name: str) -> None:
    tensor = torch.randn(12, 12)
    assert by_head(name, tensor, 2) is tensor
    assert by_part(name, tensor, 2) is tensor
