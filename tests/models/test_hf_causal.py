"""An unmodified transformers decoder behind the decoder protocol: against transformers' own forward, one by one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from evovlm.models.decoder import PackedAttend
from evovlm.models.hf import CheckpointError
from evovlm.models.hf.causal import HFDecoder, named_weights

from .hf_causal_support import KINDS, V, borders, make, wrap


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_pack_equals_transformers_segment_by_segment(
    kind: str, lengths: list[int], fractional: bool, tied: bool, seed: int
) -> None:
    """Hidden states, loss and every gradient.

    In float64 too transformers computes norms and attention weights in float32, hence no smaller tolerance.
    """
    lm = make(kind, seed, tie_word_embeddings=tied).double()
    decoder = wrap(lm)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (sum(lengths),), generator=generator)
    labels = torch.randint(0, V, (sum(lengths),), generator=generator)
    stride = 0.25 if fractional else 1.0
    positions = torch.cat([torch.arange(length, dtype=torch.float32) * stride for length in lengths])

    losses, states = [], []
    for ids, target, where in zip(*(part.split(lengths) for part in (tokens, labels, positions)), strict=True):
        # A mask, or else it takes every fractional step of positions for the border of another document.
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        base = lm.model(ids[None], position_ids=where[None], attention_mask=mask, use_cache=False)
        states.append(base.last_hidden_state[0])
        losses.append(functional.cross_entropy(lm.lm_head(states[-1]), target, reduction="sum"))
    torch.stack(losses).sum().backward()

    attend = PackedAttend(borders(lengths))
    torch.testing.assert_close(decoder(tokens, positions, attend), torch.cat(states), rtol=0, atol=1e-5)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    total = decoder(tokens, positions, attend, head=loss)
    torch.testing.assert_close(total, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    total.backward()
    theirs = dict(lm.named_parameters())
    for name, parameter in decoder.named_parameters():
        expected = theirs[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-12)
    assert theirs.keys() == dict(decoder.named_parameters()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_count(kind: str) -> None:
    """Positions of float32, not rounded to whole ones, and never those that transformers would count itself."""
    decoder = wrap(make(kind))
    tokens, attend = torch.arange(6), PackedAttend(borders([6]))
    whole = decoder(tokens, torch.arange(6.0), attend)
    assert (decoder(tokens, torch.arange(6.0) / 4, attend) - whole).abs().max() > 1e-3
    torch.testing.assert_close(decoder(tokens, torch.arange(6.0) + 7.25, attend), whole, rtol=0, atol=1e-5)


def test_no_mask_and_no_cache() -> None:
    """Each layer attends once, to all rows, and 1e5 rows would not need 1e10 mask entries."""
    decoder = wrap(make("Qwen3"))
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert k.shape == v.shape
        seen.append((layer, tuple(q.shape), tuple(k.shape)))
        return q

    with torch.no_grad():
        decoder(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000.0), attend)
    assert seen == [(layer, (100_000, 4, 8), (100_000, 2, 8)) for layer in range(3)]


def test_visual_rows_replace_embeddings() -> None:
    decoder = wrap(make("Llama"))
    tokens, positions, attend = torch.arange(7), torch.arange(7.0), PackedAttend(borders([7]))
    values = torch.randn(2, 24, requires_grad=True)
    rows = torch.tensor([4, 1])
    embeddings = decoder.model.embed_tokens(tokens).detach()
    embeddings[4], embeddings[1] = values[0].detach(), values[1].detach()
    got = decoder(tokens, positions, attend, visual=(rows, values))
    torch.testing.assert_close(got, decoder(embeddings, positions, attend), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(got.sum(), values)
    assert gradient.abs().min() > 0
    none = (torch.empty(0, dtype=torch.int64), torch.empty(0, 24, requires_grad=True))
    (empty,) = torch.autograd.grad(decoder(tokens, positions, attend, visual=none).sum(), none[1])
    assert empty.shape == (0, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_the_layers_make_the_whole(kind: str) -> None:
    """A pipeline stage holds some layers; the first the embedding, the last norm and head."""
    lm = make(kind)
    whole, first, last = wrap(lm), wrap(lm), wrap(lm)
    first.model.layers, first.model.norm, first.lm_head = first.model.layers[:1], nn.Identity(), None
    last.model.layers, last.model.embed_tokens = last.model.layers[1:], None
    tokens, positions, attend = torch.arange(9), torch.arange(9.0), PackedAttend(borders([4, 5]))
    got = last(first(tokens, positions, attend), positions, attend, head=functional.linear)
    expected = whole(tokens, positions, attend, head=functional.linear)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_between_blocks_may_be_fewer_than_rows_of_attention(kind: str) -> None:
    """Sequence parallelism: norms give out all rows of the tp group, the last linears one rank's part.

    Two ranks that hold the same half are played by one: the gather doubles its rows, the scatter takes the first half.
    """
    lm = make(kind)
    decoder = wrap(lm)
    for layer in decoder.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _m, _x, out: torch.cat((out, out), dim=-2))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.register_forward_hook(lambda _m, _x, out: out.chunk(2, dim=-2)[0])
    hidden = lm.model.embed_tokens(torch.arange(5)).detach()
    got = decoder(hidden, torch.cat((torch.arange(5.0), torch.arange(5.0))), PackedAttend(borders([5, 5])))
    expected = wrap(lm)(hidden, torch.arange(5.0), PackedAttend(borders([5])))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_heads_of_a_tensor_parallel_rank(kind: str) -> None:
    """Layers take the number of heads from the weights that are there, so two half ranks add up to the whole."""
    lm = make(kind, num_hidden_layers=1)
    x, positions = torch.randn(1, 6, 24), torch.arange(6.0)[None]
    cos_sin = lm.model.rotary_emb(x, positions)
    attend = PackedAttend(borders([6]))
    halves = []
    for half in range(2):
        attention = wrap(lm).model.layers[0].self_attn
        with torch.no_grad():
            for part in ("q", "k", "v"):
                linear = getattr(attention, f"{part}_proj")
                linear.weight = nn.Parameter(linear.weight.chunk(2)[half])
            attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.chunk(2, dim=1)[half])
            halves.append(attention(x, cos_sin, None, attend=attend)[0])
    with torch.no_grad():
        whole = wrap(lm).model.layers[0].self_attn(x, cos_sin, None, attend=attend)[0]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=0, atol=1e-5)


# Building and loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_and_loaded_from_a_directory(tmp_path: Path, kind: str, tied: bool) -> None:
    lm = make(kind, tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path, max_shard_size="10KB")
    with torch.device("meta"):
        decoder = HFDecoder.from_directory(tmp_path).to(torch.bfloat16)  # narrower than any engine's
    decoder.to_empty(device="cpu").float()
    for buffer in decoder.buffers():
        buffer.fill_(torch.nan)  # what to_empty leaves is anything
    decoder.reset_buffers()
    decoder.tie_weights()
    parameters = dict(decoder.named_parameters())
    weights = dict(named_weights(tmp_path))
    assert weights.keys() == parameters.keys() == dict(named_weights(lm)).keys()
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == tied
    tokens = torch.arange(8)
    logits = decoder(tokens, torch.arange(8.0), PackedAttend(borders([8])), head=functional.linear)
    torch.testing.assert_close(logits, lm(tokens[None]).logits[0], rtol=0, atol=1e-5)


def test_damaged_directory_is_named(tmp_path: Path) -> None:
    make("Llama").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = stored.pop("model.layers.1.mlp.up_proj.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors of the model are missing: \S*layers\.1\.mlp\.up_proj"):
        named_weights(tmp_path)
    save_file({**stored, "model.layers.1.mlp.up_proj.weight": lost[1:]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight is \[39, 24\], the configuration says \[40, 24\]"):
        named_weights(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_padding(kind: str) -> None:
    """transformers gives the embedding of pad_token_id no gradient; in a pack every token counts."""
    decoder = wrap(make(kind, pad_token_id=0))
    decoder(torch.zeros(3, dtype=torch.int64), torch.arange(3.0), PackedAttend(borders([3]))).sum().backward()
    assert decoder.model.embed_tokens.weight.grad[0].abs().max() > 0
