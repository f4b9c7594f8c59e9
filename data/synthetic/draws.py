"""Named random draws for one item: each number is a hash of the item's key and the draw's name.

    Draws("words", seed, "train", 17).uniform("size", 0.6, 0.9)

An item therefore looks the same whichever process makes it and whatever else is drawn before it.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from evovlm.csrc.random import key

Item = TypeVar("Item")

_SCALE = 2.0**-53


class Draws:
    """Random numbers of one item. Asking twice for the same name gives the same number."""

    def __init__(self, *parts: int | str) -> None:
        self._prefix = key(*parts).to_bytes(8, "little")

    def _word(self, name: str) -> int:
        # One hash per draw: the NumPy functions of csrc.random cost ten times as much on single numbers.
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=self._prefix).digest(), "little")

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A float in ``[low, high)``."""
        return low + (high - low) * ((self._word(name) >> 11) * _SCALE)

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in ``[low, high]``, both ends included."""
        return low + ((self._word(name) >> 11) * (high - low + 1) >> 53)

    def choice(self, name: str, items: Sequence[Item]) -> Item:
        """One element of a non-empty sequence, each equally likely."""
        return items[self.integer(name, 0, len(items) - 1)]

    def shuffled(self, name: str, items: Sequence[Item]) -> list[Item]:
        """The elements in a random order."""
        order = sorted(range(len(items)), key=lambda i: self._word(f"{name}/{i}"))
        return [items[i] for i in order]
