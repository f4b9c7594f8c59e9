"""Keyed randomness on tensors: the numbers of ``random``, drawn where the keys lie.

    int64 keys on a device ──splitmix64, stream──► float64 in [0, 1) on that device

A module of its own, so that processes which only draw with NumPy, such as those that decode images, need no torch.
"""

import torch
from torch import Tensor

from evovlm.csrc.random import GOLDEN, MIX1, MIX2, mix_int


def _signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit word as torch's int64."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _mix_tensor(x: Tensor) -> Tensor:
    def logical_shift(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ logical_shift(x, 30)) * _signed(MIX1)
    x = (x ^ logical_shift(x, 27)) * _signed(MIX2)
    return x ^ logical_shift(x, 31)


def uniform_tensor(keys: Tensor, stream: int) -> Tensor:
    """Draw one number per key and stream: ``uniform(keys(key, stream))`` in torch, on the keys' device.

    Args:
        keys: int64 of any shape, the bit patterns of uint64 keys.
        stream: which of the key's numbers is wanted, such as a layer number.

    Returns:
        float64 of the same shape, in [0, 1). Equal bit for bit to the NumPy functions of ``random``.
    """
    inner_key = _mix_tensor(keys)
    state = _mix_tensor(torch.full_like(keys, _signed(GOLDEN)) ^ inner_key)
    inner = torch.full_like(keys, _signed(mix_int(stream)))
    state = _mix_tensor((state + _signed(GOLDEN)) ^ inner)
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
