"""A packed, batch-free decoder that covers Qwen2.5 and InternLM3 (spec §1.1).

    embeddings [T, H] ─► layers: x + attention(norm(x)); x + gated MLP(norm(x)) ─► norm ─► [T, H]

Segments of a pack never see each other. *How* queries meet keys is not the decoder's business: it calls an
``Attend`` object, so that training (packed segments), generation (a cache) and sharded sequences share this code.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from evovlm.csrc.ops import packed_attention, rotary_frequencies, rotary_qk_, scatter_rows, scatter_rows_, swiglu
from evovlm.csrc.prefixes import list_prefixes
from evovlm.models.config import DecoderConfig
from evovlm.models.vit import RMSNorm

Head = Callable[[Tensor, Tensor], Tensor]
"""What is made of the last hidden states: ``(hidden [T, H], head weight [V, H]) -> Tensor``."""


class Attend(Protocol):
    """Attention of one layer: ``(layer, q [T, A, D], k [T, K, D], v [T, K, D]) -> [T, A, D]``."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; queries and keys are already rotated."""
        ...


class PackedAttend:
    """Causal attention inside each segment of a pack, and of some queries to a shared prefix.

    Args:
        cu_seqlens: int32 ``[S + 1]`` on the host, segment borders from 0 to T.
        prefixes: int32 ``[n, 4]`` on the host, rows of the pack (query start, query end, key start, key end): queries
            that see all these keys besides their segment.

    Raises:
        ValueError: Borders or prefixes are on a device, or prefixes do not fit the segments.
    """

    def __init__(self, cu_seqlens: Tensor, prefixes: Tensor | None = None) -> None:
        if cu_seqlens.device.type != "cpu":
            raise ValueError("cu_seqlens must stay on the host: reading it from a device would stall every layer")
        self.cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
        self.prefixes: Tensor | None = None
        if prefixes is not None and len(prefixes):
            self.prefixes = torch.tensor(list_prefixes(prefixes, cu_seqlens.tolist()), dtype=torch.int32)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's name
        """Attend; see :func:`evovlm.csrc.ops.packed_attention`."""
        return packed_attention(q, k, v, self.cu_seqlens, prefixes=self.prefixes)


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        hidden, q_size, kv_size = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=False)

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, attend: Attend) -> Tensor:
        """Transform ``[T, H]``; positions are ``[T]``, frequencies ``[D/2]``."""
        q, k = rotary_qk_(self.q_proj(x), self.k_proj(x), positions, inv_freq)
        out = attend(self.layer, q, k, self.v_proj(x).unflatten(-1, (-1, self.head_dim)))
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``, no biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``[T, H]``."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then gated MLP, each with a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = DecoderAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, attend: Attend) -> Tensor:
        """Transform ``[T, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), positions, inv_freq, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DecoderModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the blocks.

        Args:
            embeddings: ``[T, H]``, text and visual tokens in place.
            positions: ``[T]`` float32, possibly fractional; they are never cast to a narrower type.
            attend: How queries meet keys.

        Returns:
            ``[T, H]`` after the final norm.
        """
        inv_freq = rotary_frequencies(positions, self.config.head_dim, self.config.rope_theta)
        x = embeddings
        for layer in self.layers:
            x = layer(x, positions, inv_freq, attend)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """A language model: :class:`DecoderModel` and its output head.

    Args:
        config: Its shape. With ``tie_embeddings`` the head *is* the embedding matrix.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter where the config says so (again after ``to_empty``)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        visual: tuple[Tensor, Tensor] | None = None,
        head: Head | None = None,
    ) -> Tensor:
        """Run the decoder, or the part of it that a pipeline stage holds.

        Args:
            x: int64 ``[T]`` token ids, or hidden states ``[T, H]`` of the stage before.
            positions: ``[T]`` float32, possibly fractional.
            attend: How queries meet keys.
            visual: Rows int64 ``[n]`` and values ``[n, H]`` that replace the embeddings of those rows.
            head: What to make of the last hidden states ``[T, H]`` and the head's weight ``[V, H]``, such as a loss
                that never holds all logits.

        Returns:
            What ``head`` returns; without one, the last hidden states ``[T, H]``.
        """
        embeddings = x if x.is_floating_point() else self.model.embed_tokens(x)
        if visual is not None:
            rows, values = visual
            # Also with no rows at all: the graph then still reaches the encoder, on every rank alike.
            # Fresh embeddings are written in place; hidden states belong to the caller.
            write = scatter_rows if embeddings is x else scatter_rows_
            embeddings = write(embeddings, rows, values.to(embeddings.dtype))
        hidden: Tensor = self.model(embeddings, positions, attend)
        return hidden if head is None else head(hidden, self.lm_head.weight)
