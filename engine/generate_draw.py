"""Draws tokens from logits: temperature, top_k, top_p, and one keyed number per token.

    logits [n, V] ─ / temperature ─ top_k ─ softmax ─ top_p ─► candidates by id ─ running sum ─► first above u · total
                                                               u = uniform(key of the answer, position in it)

Candidates are summed in the order of their ids, so that likely tokens may change places without changing the draw.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evovlm.csrc.random import keys, uniform
from evovlm.engine.generation import Sampling


def draw(logits: Tensor, sampling: Sampling, answers: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Draw one token from each row.

    Args:
        logits: ``[n, V]``, any floating dtype.
        sampling: Temperature, ``top_k`` and ``top_p``; temperature 0 takes the largest logit.
        answers: Key of each row's answer, see :meth:`Sampling.key`.
        positions: Number of each row's token in its answer, from 0.

    Returns:
        n ids.
    """
    if sampling.temperature == 0:
        return list(map(int, logits.argmax(-1).tolist()))
    ids, probabilities = candidates(logits, sampling)
    numbers = uniform(keys(np.array(answers, dtype=np.uint64), np.array(positions, dtype=np.int64)))
    sums = probabilities.cumsum(-1)
    total = sums[:, -1:]
    # Never beyond the last candidate that has a probability, however the product is rounded.
    below = torch.nextafter(total, torch.zeros_like(total))
    at = torch.minimum(torch.from_numpy(numbers).to(total.device)[:, None] * total, below)
    place = (sums <= at).sum(-1, keepdim=True)
    return list(map(int, (place if ids is None else ids.gather(-1, place)).squeeze(-1).tolist()))


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Say which tokens may be drawn, and how likely each is.

    Returns:
        ids int64 ``[n, k]``, rising in each row (None: all V, in order), and float64 ``[n, k]``, which sum up to at
        most 1: those outside the nucleus are 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    size = wide.shape[-1]
    kept = min(sampling.top_k or size, size)
    if kept == size and sampling.top_p == 1:
        return None, wide.double().softmax(-1)
    values, ids = wide.topk(kept)  # falling
    probabilities = values.double().softmax(-1)
    if sampling.top_p < 1:
        above = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(above >= sampling.top_p, 0)
    ids, order = ids.sort(-1)
    return ids, probabilities.gather(-1, order)
