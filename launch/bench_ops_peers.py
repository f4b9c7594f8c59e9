"""How others write what the operators do: compositions of PyTorch's operators, and a Python loop.

rows        x[index], masked_scatter, index_put         as models are written: the obvious way
rotary      tables of cosines and sines, q · cos + rotate_half(q) · sin
positions   one token after the other; or all at once by bisection and running sums
attention   PyTorch's CPU flash kernel, one segment after the other
loss        log-softmax and its gradient
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from evovlm.csrc import ops


def add_into_zeros(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """``out[index] += rows``: ``[n, H]`` into ``[num_rows, H]``."""
    return rows.new_zeros(num_rows, rows.shape[1]).index_put_((index,), rows, accumulate=True)


def replace_by_mask(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Visual tokens over text, through a mask of the elements to replace, as transformers' InternVL does."""
    mask = torch.zeros(base.shape[0], dtype=torch.bool).index_fill_(0, index, True)
    return base.masked_scatter(mask[:, None].expand_as(base), rows)


def replace_in_place(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``base[index] = rows``."""
    return base.index_put_((index,), rows)


def rotary_qk(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``[T, A, D]`` and ``[T, K, D]``, with tables made here."""
    return rotary_with_tables(q, k, *rotary_tables(positions, inv_freq))


def rotary_flat(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """The same for projections ``[T, A · D]`` and ``[T, K · D]``."""
    shape = (-1, 2 * inv_freq.shape[0])
    return rotary_qk(torch.unflatten(q, -1, shape), torch.unflatten(k, -1, shape), positions, inv_freq)


def rotary_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, 1, D]``."""
    angles = (positions[:, None] * inv_freq).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotary_with_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x · cos + rotate_half(x) · sin``, as transformers does in each layer."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def positions_by_loop(cu_seqlens: Tensor, runs: Tensor, deltas: Tensor, num_tokens: int) -> Tensor:
    """V2PE positions, one token after the other."""
    positions: list[float] = []
    images, number = list(zip(*runs.T.tolist(), deltas.tolist(), strict=True)), 0
    for begin, end in pairwise(cu_seqlens.tolist()):
        last = -1.0
        for token in range(begin, end):
            while number < len(images) and images[number][0] + images[number][1] <= token:
                last, number = math.ceil(last), number + 1
            visual = number < len(images) and images[number][0] <= token
            last += images[number][2] if visual else 1.0
            positions.append(last)
    return torch.tensor(positions[:num_tokens])


def positions_at_once(cu_seqlens: Tensor, runs: Tensor, deltas: Tensor, num_tokens: int) -> Tensor:
    """V2PE positions, all tokens at once: a run of visual tokens takes ⌈δ · length⌉ positions, not its length."""
    starts, lengths, borders = *runs.T.contiguous(), cu_seqlens.long()
    saved = torch.cat((deltas.new_zeros(1), (lengths - (deltas * lengths).ceil()).cumsum(0)))
    before = saved[torch.searchsorted(starts, borders[:-1])]  # saved in the segments before
    token = torch.arange(num_tokens)
    segment = torch.searchsorted(borders, token, right=True) - 1
    run = torch.searchsorted(starts, token, right=True) - 1
    text = token - borders[segment] - (saved[run + 1] - before[segment])
    own = torch.searchsorted(borders, starts, right=True) - 1  # segment of each run
    anchors = starts - 1 - borders[own] - (saved[:-1] - before[own])
    place = token - starts[run]
    visual = (run >= 0) & (place < lengths[run])
    return torch.where(visual, anchors[run] + deltas[run] * (place + 1), text).float()


def flash_causal(q: Tensor, k: Tensor, v: Tensor, borders: Sequence[int]) -> Tensor:
    """Causal attention ``[T, A, D]``, one segment after the other."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    lengths = [end - start for start, end in pairwise(borders)]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    parts = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    outputs = [flash(*part, 0.0, True)[0] for part in parts]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def flash_tiles(q: Tensor, k: Tensor, v: Tensor, borders: Sequence[int]) -> Tensor:
    """Attention inside each tile, ``[T, A, D]``; tiles of one length go as one batch, as a ViT is written."""
    size = borders[1]
    q, k, v = (x.view(-1, size, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)[0]
    return out.transpose(1, 2).flatten(0, 1)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted losses ``[n]`` and their gradient ``[n, V]``."""
    log_p = logits.log_softmax(1)
    losses = -log_p.gather(1, labels[:, None]).squeeze(1) * weights
    gradient = log_p.exp().scatter_add_(1, labels[:, None], log_p.new_full((len(labels), 1), -1.0))
    return losses, gradient.mul_(weights[:, None])


def our_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by ``ops.cross_entropy_``, which overwrites the logits."""
    return ops.cross_entropy_(logits, labels, weights, gradient=True), logits
