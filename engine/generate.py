"""Greedy decoding of a batch of prompts with a key-value cache.

    prefill   prompts packed as in training [T] ─► cache [L, B, K, length, D] and the first new token of each
    steps     one token per sequence [B] ─► attend to the own cache only ─► next token …  until <|im_end|>

Generated token t takes position ``last prompt position + t`` (spec §2); prompts may use any visual stride.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evovlm.csrc.ops import packed_attention
from evovlm.models.config import DecoderConfig
from evovlm.models.internvl import InternVL


@dataclass(frozen=True)
class Prompt:
    """One sequence to continue.

    Attributes:
        tokens: int ``[L]``, ids with visual runs in place.
        positions: float32 ``[L]``.
        visual_rows: int64 ``[Nv]``, rows that visual tokens fill.
        tiles: float32 ``[N, 3, S, S]``.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.float32]
    visual_rows: NDArray[np.int64]
    tiles: Tensor


class KVCache:
    """Keys and values of B sequences, and attention over them; an ``Attend`` for the decoder.

    Args:
        config: The decoder's shape.
        lengths: Prompt length of each sequence.
        max_new_tokens: Room for generated tokens.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(
        self,
        config: DecoderConfig,
        lengths: Sequence[int],
        max_new_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (
            config.num_layers,
            len(lengths),
            config.num_kv_heads,
            max(lengths) + max_new_tokens,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.prompt_lengths = list(lengths)
        self.lengths = torch.tensor(self.prompt_lengths, device=device)
        self.borders = [0, *np.cumsum(self.prompt_lengths).tolist()]
        self.prefilling = True

    def advance(self) -> None:
        """Make room for one more token per sequence, which the next forward writes."""
        self.prefilling = False
        self.lengths += 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values, then attend: whole prompts at first, one token per sequence afterwards."""
        if self.prefilling:
            for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
                for sequence, part in enumerate(torch.split(new, self.prompt_lengths)):
                    cache[sequence, :, : part.shape[0]] = part.transpose(0, 1)
            return packed_attention(q, k, v, self.borders)
        batch = torch.arange(q.shape[0], device=q.device)
        self.keys[layer][batch, :, self.lengths - 1] = k
        self.values[layer][batch, :, self.lengths - 1] = v
        used = int(self.lengths.max())
        mask = torch.arange(used, device=q.device) < self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2),
            self.keys[layer][:, :, :used],
            self.values[layer][:, :, :used],
            attn_mask=mask[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(2)


@torch.no_grad()
def generate(
    model: InternVL, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]
) -> list[list[int]]:
    """Continue prompts greedily.

    Args:
        model: In any dtype, on any device, not sharded.
        prompts: At least one.
        max_new_tokens: Most tokens that are generated for a prompt.
        stop: Ids that end a sequence; they are not returned.

    Returns:
        The new ids of each prompt.
    """
    weight = model.language_model.lm_head.weight
    device = weight.device
    lengths = [len(prompt.tokens) for prompt in prompts]
    cache = KVCache(model.config.decoder, lengths, max_new_tokens, weight.dtype, device)
    offsets = cache.borders[:-1]

    tokens = torch.from_numpy(np.concatenate([p.tokens for p in prompts]).astype(np.int64)).to(device)
    positions = torch.from_numpy(np.concatenate([p.positions for p in prompts])).to(device)
    rows = np.concatenate([p.visual_rows + offset for p, offset in zip(prompts, offsets, strict=True)])
    visual = model.encode(torch.cat([p.tiles for p in prompts]).to(device))
    hidden = model.decode(tokens, positions, cache, (torch.from_numpy(rows.astype(np.int64)).to(device), visual))
    last = torch.tensor(cache.borders[1:], device=device) - 1
    hidden, position = hidden[last], positions[last]

    generated: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for number in range(max_new_tokens):
        token = F.linear(hidden, weight).argmax(-1)
        for sequence, value in enumerate(token.tolist()):
            if sequence in running:
                if value in stop:
                    running.discard(sequence)
                else:
                    generated[sequence].append(value)
        if not running or number + 1 == max_new_tokens:
            break
        cache.advance()
        position = position + 1
        hidden = model.decode(token, position, cache)
    return generated
