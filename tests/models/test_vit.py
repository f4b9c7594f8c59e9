"""The vision encoder: positions of other grids, drop path by tile key, both norms, and no tiles at all."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc import random
from evovlm.models.config import InternVLConfig, VisionConfig
from evovlm.models.internvl import InternVL
from evovlm.models.vit import InternViT, VisionAttention, VisionEmbeddings, VisionLayer

MakeModel = Callable[[InternVLConfig], InternVL]


@pytest.fixture(scope="module")
def vit(small_config: InternVLConfig, make_model: MakeModel) -> InternViT:
    return make_model(small_config).vision_model


@pytest.fixture(scope="module")
def tiles() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cubic_weight(distance: float) -> float:
    """Keys' cubic kernel with a = −0.75, torch's bicubic."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(grid: Tensor, rows: int, cols: int) -> Tensor:
    """Bicubic, pixel centres at half-integers, borders repeated: plain loops over ``[g, g, C]``."""
    size = grid.shape[0]
    out = torch.zeros(rows, cols, grid.shape[2], dtype=grid.dtype)
    for i in range(rows):
        for j in range(cols):
            y, x = ((n + 0.5) * size / count - 0.5 for n, count in ((i, rows), (j, cols)))
            for r in range(int(y // 1) - 1, int(y // 1) + 3):
                for c in range(int(x // 1) - 1, int(x // 1) + 3):
                    weight = cubic_weight(y - r) * cubic_weight(x - c)
                    out[i, j] += weight * grid[min(max(r, 0), size - 1), min(max(c, 0), size - 1)]
    return out


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (6, 6), (8, 8), (3, 5), (4, 7)])
def test_positions_of_other_grids_are_bicubic(rows: int, cols: int) -> None:
    config = VisionConfig(hidden_size=6, num_layers=1, num_heads=1, ffn_size=4, tile_size=8, patch_size=2)
    embeddings = VisionEmbeddings(config).double()
    with torch.no_grad():
        embeddings.position_embedding.normal_(generator=torch.Generator().manual_seed(0))
    learned = embeddings.position_embedding.detach()
    positions = embeddings.positions(rows, cols).detach()
    assert positions.shape == (1, 1 + rows * cols, 6)
    assert torch.equal(positions[:, 0], learned[:, 0])  # the class token's stays
    expected = interpolated(learned[0, 1:].reshape(4, 4, 6), rows, cols).reshape(-1, 6)
    torch.testing.assert_close(positions[0, 1:], expected, rtol=0, atol=1e-12)


def test_positions_of_the_own_grid_are_the_learned_ones(vit: InternViT) -> None:
    assert vit.embeddings.positions(4, 4) is vit.embeddings.position_embedding


def test_larger_tiles_are_encoded(vit: InternViT) -> None:
    assert vit(torch.zeros(2, 3, 12, 16, dtype=torch.float64)).shape == (2, 1 + 6 * 8, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positions_are_interpolated_in_float32_at_least(dtype: torch.dtype) -> None:
    config = VisionConfig(hidden_size=4, num_layers=1, num_heads=1, ffn_size=4, tile_size=8, patch_size=2)
    embeddings = VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.position_embedding.normal_(generator=torch.Generator().manual_seed(0))
    embeddings.to(dtype)
    expected = interpolated(embeddings.position_embedding.detach()[0, 1:].double().reshape(4, 4, 4), 6, 6)
    got = embeddings.positions(6, 6)
    assert got.dtype == dtype
    torch.testing.assert_close(got[0, 1:], expected.reshape(-1, 4).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.lists(st.integers(0, 6), max_size=3))
def test_drop_path_depends_on_the_tile_alone(vit: InternViT, tiles: Tensor, order: list[int], cuts: list[int]) -> None:
    keys = torch.from_numpy(random.keys("drop_path", 3, [0, 0, 0, 7, 7, 9], [0, 1, 2, 0, 1, 0]).astype("int64"))
    vit.train()
    together = vit(tiles, keys)
    bounds = [0, *sorted(cuts), 6]
    pieces = [order[a:b] for a, b in pairwise(bounds)]  # also empty ones
    apart = torch.cat([vit(tiles[piece], keys[piece]) for piece in pieces])
    torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-12)
    vit.eval()
    assert not torch.allclose(together, vit(tiles, keys))  # something was dropped


def test_drop_path_zeroes_branches_and_scales_the_rest(vit: InternViT, tiles: Tensor) -> None:
    layer = vit.encoder.layers[2]
    assert isinstance(layer, VisionLayer)
    assert layer.drop_path_rate == 0.5
    keys = torch.arange(100, 106)
    x = vit.embeddings(tiles)
    keep = [torch.from_numpy(random.uniform(random.keys(keys.numpy(), 2 * 2 + which)) >= 0.5) for which in (0, 1)]
    assert 0 < sum(k.sum() for k in keep) < 12  # the case is not an empty one

    expected = x + layer.attn(layer.norm1(x)) * layer.ls1 * 2.0 * keep[0][:, None, None]
    expected = expected + layer.mlp(layer.norm2(expected)) * layer.ls2 * 2.0 * keep[1][:, None, None]
    layer.train()
    dropped = layer(x, keys)
    layer.eval()
    torch.testing.assert_close(dropped, expected, rtol=0, atol=1e-13)
    assert torch.equal(layer(x, keys), layer(x))  # evaluation drops nothing


def test_drop_path_rates_rise_linearly(small_config: InternVLConfig) -> None:
    vision = replace(small_config.vision, num_layers=5, drop_path_rate=0.4)
    rates = [layer.drop_path_rate for layer in InternViT(vision).encoder.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])  # linspace(0, rate, layers), spec §1.2
    assert InternViT(replace(vision, num_layers=1)).encoder.layers[0].drop_path_rate == 0.0


def test_drop_path_has_its_rate(small_config: InternVLConfig) -> None:
    keys = torch.from_numpy(random.keys("drop_path", 0, range(4000), 0, 0, 0).astype("int64"))
    layer = InternViT(replace(small_config.vision, drop_path_rate=0.25)).encoder.layers[2].train()
    for which in (0, 1):
        kept = layer._drop_path(keys, which, torch.float32)
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert abs(float((kept == 0).float().mean()) - 0.25) < 0.03


def test_no_tiles_run_and_give_every_parameter_a_gradient(vit: InternViT) -> None:
    vit.train()
    out = vit(torch.empty(0, 3, 8, 8, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
    vit.eval()
    assert out.shape == (0, 17, 16)
    gradients = torch.autograd.grad(out.sum(), list(vit.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_query_and_key_norms_cover_all_heads_together(small_config: InternVLConfig, make_model: MakeModel) -> None:
    vision = replace(small_config.vision, norm="rms_norm", qkv_bias=False, qk_norm=True)
    attention = make_model(replace(small_config, vision=vision)).vision_model.encoder.layers[0].attn
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Rows are ordered [2 heads, q | k | v, 8]; a norm takes those of both heads.
    q, k, v = (attention.qkv.weight.reshape(2, 3, 8, 16)[:, i].reshape(16, 16) for i in range(3))

    def normed(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight  # over 16 channels, not over 8

    queries, keys, values = normed(x @ q.T, attention.q_norm.weight), normed(x @ k.T, attention.k_norm.weight), x @ v.T
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = (queries[..., head] @ keys[..., head].transpose(1, 2) * 8**-0.5).softmax(-1)
        heads.append(weights @ values[..., head])
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 4), slice(0, 4)])
def test_rows_of_some_heads_are_attention_of_their_own(heads: slice) -> None:
    """What tensor parallelism rests on: heads are runs of the projection's rows, and their outputs add up."""
    config = VisionConfig(hidden_size=12, num_layers=1, num_heads=4, ffn_size=4, tile_size=8, patch_size=2)
    attention = VisionAttention(config).double()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.zeros_like(x)
    for head in range(4)[heads]:
        rows = slice(9 * head, 9 * (head + 1))
        q, k, v = (x @ attention.qkv.weight[rows].T + attention.qkv.bias[rows]).split(3, dim=-1)
        out = (q @ k.transpose(1, 2) * 3**-0.5).softmax(-1) @ v
        expected = expected + out @ attention.proj.weight[:, 3 * head : 3 * (head + 1)].T

    part = VisionAttention(config).double()  # as large as those heads
    rows, columns = slice(9 * heads.start, 9 * heads.stop), slice(3 * heads.start, 3 * heads.stop)
    part.qkv.weight, part.qkv.bias = (torch.nn.Parameter(p[rows]) for p in (attention.qkv.weight, attention.qkv.bias))
    part.proj.weight = torch.nn.Parameter(attention.proj.weight[:, columns])
    torch.testing.assert_close(part(x), expected + part.proj.bias, rtol=0, atol=1e-12)


def test_shapes_that_do_not_fit_are_errors() -> None:
    shape = {"hidden_size": 10, "num_layers": 1, "ffn_size": 4}
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_heads 3"):
        VisionConfig(**shape, num_heads=3)
    with pytest.raises(ValueError, match="tile_size 450 is not a multiple of patch_size 14"):
        VisionConfig(**shape, num_heads=2, tile_size=450)
