"""The decoder: packed segments equal segments alone, positions reach the rotation, visual tokens their rows; ties."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import packed_attention_reference
from evovlm.models import decoder as decoder_module
from evovlm.models.config import DecoderConfig, InternVLConfig
from evovlm.models.decoder import Decoder, PackedAttend
from evovlm.models.internvl import InternVL
from evovlm.models.v2pe import segment_positions

MakeModel = Callable[[InternVLConfig], InternVL]


@pytest.fixture(scope="module")
def decoder(small_config: InternVLConfig, make_model: MakeModel) -> Decoder:
    return make_model(small_config).language_model


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions that restart, borders."""
    tokens = torch.randint(0, 40, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n, dtype=torch.float64) for n in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def logits(decoder: Decoder, tokens: Tensor, positions: Tensor, borders: Tensor) -> Tensor:
    return decoder(tokens, positions, PackedAttend(borders), head=F.linear)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 100))
def test_a_pack_equals_its_segments(decoder: Decoder, lengths: list[int], seed: int) -> None:
    tokens, positions, borders = packed(lengths, seed)
    together = logits(decoder, tokens, positions, borders)
    alone = [
        logits(decoder, tokens[a:b], positions[a:b], torch.tensor([0, b - a], dtype=torch.int32))
        for a, b in pairwise(borders.tolist())
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 100))
def test_branches_behind_one_prefix_equal_each_behind_its_own(
    decoder: Decoder, prefix: int, branches: list[int], seed: int
) -> None:
    """Logits of the branches, and the gradient of every parameter; another segment follows."""
    tokens, _, borders = packed([prefix, *branches, 3], seed)
    parts = [torch.arange(n, dtype=torch.float64) for n in (prefix, *branches, 3)]
    positions = torch.cat([parts[0], *(part + prefix for part in parts[1:-1]), parts[-1]])
    end = borders[-2].item()
    prefixes = torch.tensor([[prefix, end, 0, prefix]], dtype=torch.int32)
    together = decoder(tokens, positions, PackedAttend(borders, prefixes), head=F.linear)
    alone = []
    for a, b in pairwise(borders[1:-1].tolist()):
        rows = [*range(prefix), *range(a, b)]
        cu = torch.tensor([0, len(rows)], dtype=torch.int32)
        alone.append(logits(decoder, tokens[rows], positions[rows], cu)[prefix:])
    expected = torch.cat(alone)
    torch.testing.assert_close(together[prefix:end], expected, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    parameters = list(decoder.parameters())
    found, wanted = (
        torch.autograd.grad((made * weight).sum(), parameters) for made in (together[prefix:end], expected)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_model_passes_prefixes_on(small_config: InternVLConfig, make_model: MakeModel) -> None:
    model = make_model(small_config)
    tokens, positions, borders = packed([5, 3, 4])
    size = small_config.vision.tile_size
    tiles = torch.zeros(0, 3, size, size, dtype=torch.float64)
    no_rows = torch.zeros(0, dtype=torch.int64)
    prefixes = torch.tensor([[5, 12, 0, 5]], dtype=torch.int32)
    got = model(tokens, positions, borders, tiles, no_rows, prefixes=prefixes)
    attend = PackedAttend(borders, prefixes)
    assert torch.equal(got, model.language_model(tokens, positions, attend, head=F.linear))
    assert not torch.allclose(got, model(tokens, positions, borders, tiles, no_rows))
    none = model(tokens, positions, borders, tiles, no_rows, prefixes=prefixes[:0])
    assert torch.equal(none, model(tokens, positions, borders, tiles, no_rows))


def test_prefixes_that_do_not_fit_the_segments_are_refused() -> None:
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"prefix 0 .* must come after its keys"):
        PackedAttend(borders, torch.tensor([[4, 12, 0, 5]]))
    with pytest.raises(ValueError, match="prefixes must stay on the host"):
        PackedAttend(borders, torch.zeros(1, 4, dtype=torch.int32, device="meta"))


def test_attention_is_an_argument(decoder: Decoder) -> None:
    tokens, positions, borders = packed([4, 6])
    calls: list[int] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(layer)
        assert (q.shape, k.shape) == ((10, 4, 4), (10, 2, 4))
        return packed_attention_reference(q, k, v, borders.tolist())

    model = decoder.model
    out = model(model.embed_tokens(tokens), positions, attend)
    torch.testing.assert_close(out, model(model.embed_tokens(tokens), positions, PackedAttend(borders)))
    assert calls == [0, 1]


def test_hidden_states_may_stand_in_place_of_ids(decoder: Decoder) -> None:
    tokens, positions, borders = packed([4, 6])
    attend = PackedAttend(borders)
    hidden = decoder(tokens, positions, attend)
    assert hidden.shape == (10, 16)
    assert torch.equal(decoder(decoder.model.embed_tokens(tokens), positions, attend), hidden)
    assert torch.equal(decoder(tokens.int(), positions, attend), hidden)


def test_the_head_gets_hidden_states_and_its_weight(decoder: Decoder) -> None:
    tokens, positions, borders = packed([4, 6])
    attend = PackedAttend(borders)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        assert weight is decoder.lm_head.weight
        return hidden.flip(0)

    assert torch.equal(decoder(tokens, positions, attend, head=head), decoder(tokens, positions, attend).flip(0))


@given(st.sets(st.integers(0, 9)), st.randoms(use_true_random=False))
def test_visual_tokens_replace_the_embeddings_of_their_rows(decoder: Decoder, chosen: set[int], random: Any) -> None:
    tokens, positions, borders = packed([4, 6])
    rows = random.sample(sorted(chosen), len(chosen))  # in any order
    values = torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    embeddings = decoder.model.embed_tokens(tokens).detach().clone()
    for row, value in zip(rows, values, strict=True):
        embeddings[row] = value
    visual = (torch.tensor(rows, dtype=torch.int64), values)
    got = decoder(tokens, positions, PackedAttend(borders), visual=visual)
    assert torch.equal(got, decoder(embeddings, positions, PackedAttend(borders)))
    changed = tokens.clone()
    changed[rows] = 0  # ids at visual rows do not matter
    assert torch.equal(decoder(changed, positions, PackedAttend(borders), visual=visual), got)


@pytest.mark.parametrize("rows", [[], [7, 2]])
def test_gradients_go_to_visual_tokens_in_place_of_embeddings(decoder: Decoder, rows: list[int]) -> None:
    tokens, positions, borders = packed([10])
    tokens = torch.arange(10)  # every row has an embedding of its own
    values = torch.randn(len(rows), 16, dtype=torch.float64, requires_grad=True)
    visual = (torch.tensor(rows, dtype=torch.int64), values)
    out = decoder(tokens, positions, PackedAttend(borders), visual=visual).square().sum()
    of_values, of_table = torch.autograd.grad(out, (values, decoder.model.embed_tokens.weight))
    assert of_values.shape == values.shape  # zeros of no rows, not None: the graph reaches the encoder
    assert (of_values != 0).all()
    used = [row for row in range(10) if row not in rows]
    assert of_table.abs().sum(1).nonzero().flatten().tolist() == used


def test_visual_tokens_take_the_dtype_of_the_embeddings(small_config: InternVLConfig, make_model: MakeModel) -> None:
    narrow = make_model(small_config).language_model.bfloat16()
    tokens, positions, borders = packed([6])
    values = torch.randn(2, 16, requires_grad=True)
    visual = (torch.tensor([1, 4]), values)
    out = narrow(tokens, positions.float(), PackedAttend(borders), visual=visual)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), values)[0].dtype == torch.float32


def test_future_tokens_are_not_seen(decoder: Decoder) -> None:
    tokens, positions, borders = packed([8])
    changed = tokens.clone()
    changed[5] = (changed[5] + 1) % 40
    before, after = (logits(decoder, ids, positions, borders) for ids in (tokens, changed))
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_stride_one_gives_the_logits_of_ordinary_positions(decoder: Decoder) -> None:
    tokens, _, borders = packed([20])
    runs = [(3, 8), (13, 4)]
    ordinary = logits(decoder, tokens, torch.arange(20, dtype=torch.float32), borders)

    def at_stride(delta: float) -> Tensor:
        return logits(decoder, tokens, torch.from_numpy(segment_positions(20, runs, [delta, delta])), borders)

    assert torch.equal(at_stride(1.0), ordinary)
    assert not torch.allclose(at_stride(0.25)[4:], ordinary[4:])
    assert not torch.allclose(at_stride(1 / 256)[4:], at_stride(1 / 128)[4:])


def test_positions_stay_float32_in_a_bfloat16_model(
    small_config: InternVLConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    rotate = decoder_module.rotary_qk_

    def watched(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        assert inv_freq.dtype == torch.float32
        seen.append(positions)
        return rotate(q, k, positions, inv_freq)

    monkeypatch.setattr(decoder_module, "rotary_qk_", watched)
    narrow = make_model(small_config).language_model.bfloat16()
    tokens, _, borders = packed([300])
    positions = torch.from_numpy(segment_positions(300, [(20, 256)], [1 / 256]))
    assert narrow(tokens, positions, PackedAttend(borders)).dtype == torch.bfloat16
    assert [p.dtype for p in seen] == [torch.float32] * small_config.decoder.num_layers
    assert all(torch.equal(p, positions) for p in seen)
    assert len(positions.unique()) == 300  # bfloat16 would hold about a tenth of them


def test_borders_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens must stay on the host"):
        PackedAttend(torch.zeros(2, dtype=torch.int32, device="meta"))


def test_tied_heads_share_one_parameter(small_config: InternVLConfig) -> None:
    tied = Decoder(replace(small_config.decoder, tie_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    tied.to_empty(device="cpu")
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    free = Decoder(small_config.decoder)
    assert free.lm_head.weight is not free.model.embed_tokens.weight


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_those_of_the_family(small_config: InternVLConfig, bias: bool) -> None:
    names = dict(Decoder(replace(small_config.decoder, qkv_bias=bias)).named_parameters())
    found = {name.split(".")[-2] for name in names if name.endswith("bias")}
    assert found == ({"q_proj", "k_proj", "v_proj"} if bias else set())  # never o_proj, never the MLP


def test_shapes_that_do_not_fit_are_errors() -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 6, "ffn_size": 4}
    with pytest.raises(ValueError, match="num_heads 6 is not a multiple of num_kv_heads 4"):
        DecoderConfig(**shape, num_kv_heads=4, head_dim=4)
    with pytest.raises(ValueError, match="head_dim 3 is odd"):
        DecoderConfig(**shape, num_kv_heads=2, head_dim=3)
