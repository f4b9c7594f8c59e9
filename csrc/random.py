"""Keyed randomness: every random number of a run is a hash of what it is for.

A number never depends on a rank or on how many numbers were drawn before it, so a run gives the same
numbers under every layout and after every resume:

    keys("jpeg", seed, samples, visits, images) ──splitmix64──► uint64 ──► uniform() / choice_index()

NumPy and torch versions agree bit for bit; both use wrapping 64-bit integer arithmetic only.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

Part = int | str | ArrayLike


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def _as_words(part: Part) -> NDArray[np.uint64]:
    if isinstance(part, str):
        digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
        return np.array(int.from_bytes(digest, "little"), dtype=np.uint64)
    if isinstance(part, int):
        return np.array(part & _MASK, dtype=np.uint64)
    array = np.asarray(part)
    if array.dtype.kind not in "iu":
        raise TypeError(f"random keys are made of integers and strings, got an array of {array.dtype}")
    return array.astype(np.uint64)


def keys(*parts: Part) -> NDArray[np.uint64]:
    """Hash integers, strings and integer arrays (broadcast together) to one uint64 key per element."""
    state = np.array(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _mix(np.asarray(state + np.uint64(_GOLDEN), dtype=np.uint64) ^ _mix(_as_words(part)))
    return np.asarray(state, dtype=np.uint64)


def key(*parts: int | str) -> int:
    """Hash integers and strings to one key in ``[0, 2**64)``."""
    return int(keys(*parts))


def uniform(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map keys to numbers in [0, 1): their upper 53 bits, elementwise."""
    return (np.asarray(keys, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choice_index(keys: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """Map keys to integers in ``[0, n)``, elementwise; ``n`` must be in [1, 2**31]."""
    if not 1 <= n <= 1 << 31:
        raise ValueError(f"choice_index: n = {n} is not in [1, 2**31]")
    upper = np.asarray(keys, dtype=np.uint64) >> np.uint64(32)
    return ((upper * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def permutation(n: int, *parts: int | str) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)``: the order of hashes, the same on every platform."""
    return np.argsort(keys(*parts, np.arange(n)), kind="stable").astype(np.int64)


def _signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit word as torch's int64."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _mix_tensor(x: Tensor) -> Tensor:
    def logical_shift(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ logical_shift(x, 30)) * _signed(_MIX1)
    x = (x ^ logical_shift(x, 27)) * _signed(_MIX2)
    return x ^ logical_shift(x, 31)


def uniform_tensor(keys: Tensor, stream: int) -> Tensor:
    """Draw one number per key and stream: ``uniform(keys(key, stream))`` in torch, on the keys' device.

    Args:
        keys: int64 of any shape, the bit patterns of uint64 keys.
        stream: which of the key's numbers is wanted, such as a layer number.

    Returns:
        float64 of the same shape, in [0, 1). Equal bit for bit to the NumPy functions of this file.
    """
    inner_key = _mix_tensor(keys)
    state = _mix_tensor(torch.full_like(keys, _signed(_GOLDEN)) ^ inner_key)
    inner = torch.full_like(keys, _signed(int(_mix_scalar(stream))))
    state = _mix_tensor((state + _signed(_GOLDEN)) ^ inner)
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mix_scalar(word: int) -> np.uint64:
    with np.errstate(over="ignore"):
        return np.uint64(_mix(_as_words(word)))
