"""Keyed randomness: every random number of a run is a hash of what it is for.

A number never depends on a rank or on how many numbers were drawn before it, so a run gives the same
numbers under every layout and after every resume:

    keys("jpeg", seed, samples, visits, images) ──splitmix64──► uint64 ──► uniform() / choice_index()

Wrapping 64-bit integer arithmetic only. Keys that lie on a device as a tensor: ``random_torch``.
"""

import hashlib
import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evovlm.csrc import _plan

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

Part = int | str | ArrayLike


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX2)
    return x ^ (x >> np.uint64(31))


def mix_int(word: int) -> int:
    """Finalizer of splitmix64 on one word in ``[0, 2**64)``."""
    word = ((word ^ (word >> 30)) * MIX1) & _MASK
    word = ((word ^ (word >> 27)) * MIX2) & _MASK
    return word ^ (word >> 31)


def _as_words(part: ArrayLike) -> NDArray[np.uint64]:
    array = np.asarray(part)
    if array.dtype.kind not in "iu":
        raise TypeError(f"random keys are made of integers and strings, got an array of {array.dtype}")
    return array.astype(np.uint64)


def keys(*parts: Part) -> NDArray[np.uint64]:
    """Hash integers, strings and integer arrays (broadcast together) to one uint64 key per element."""
    scalars = [part for part in itertools.takewhile(_is_scalar, parts) if isinstance(part, int | str)]
    state = np.array(key(*scalars), dtype=np.uint64)  # in plain integers, where NumPy costs most
    with np.errstate(over="ignore"):
        for part in parts[len(scalars) :]:
            words = np.array(_as_word(part), np.uint64) if isinstance(part, int | str) else _as_words(part)
            state = _mix(np.asarray(state + np.uint64(GOLDEN), dtype=np.uint64) ^ _mix(words))
    return np.asarray(state, dtype=np.uint64)


def _is_scalar(part: Part) -> bool:
    return isinstance(part, int | str)


def key(*parts: int | str) -> int:
    """Hash integers and strings to one key in ``[0, 2**64)``."""
    state = 0
    for part in parts:
        state = mix_int(((state + GOLDEN) & _MASK) ^ mix_int(_as_word(part)))
    return state


def _as_word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return part & _MASK


def uniform(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map keys to numbers in [0, 1): their upper 53 bits, elementwise."""
    return (np.asarray(keys, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choice_index(keys: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """Map keys to integers in ``[0, n)``, elementwise; ``n`` must be in [1, 2**31]."""
    if not 1 <= n <= 1 << 31:
        raise ValueError(f"choice_index: n = {n} is not in [1, 2**31]")
    upper = np.asarray(keys, dtype=np.uint64) >> np.uint64(32)
    return ((upper * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def permutation(n: int, *parts: int | str, begin: int = 0, end: int | None = None) -> NDArray[np.int64]:
    """Return places ``begin`` to ``end - 1`` (default: all) of a keyed permutation of ``range(n)``.

    The same on every platform; any part costs only its own time and memory (``csrc/shuffle.cpp``).

    Raises:
        ValueError: such places do not exist.
    """
    return _plan.permute(key(*parts), n, begin, n if end is None else end)
