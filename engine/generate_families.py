"""Consecutive prompts of which one begins with the other become a family: prefilled once, cached once.

    rollouts of every prefix of one solution        one prompt in the cache, and how much of it each task sees
      <image> question step 1                         <image> question step 1 step 2 step 3
      <image> question step 1 step 2           ─►     ├────────────────────┘      │      │
      <image> question step 1 step 2 step 3           ├───────────────────────────┘      │
                                                      └──────────────────────────────────┘

Where a text is cut, its last tokens may differ from those of the whole (two line feeds are often one token): a few
tokens at the end of a shorter prompt, its *tail*, may be its own; every answer of it then begins with feeding them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_TAIL = 8
"""Most tokens of a tail: each of its answers computes and keeps them by itself."""
MAX_MEMBERS = 64
"""Most tasks of a family: so many are read ahead at most."""


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


@dataclass(frozen=True)
class Task:
    """A prompt and the answers wanted.

    Attributes:
        prompt: What is continued.
        keys: For each answer, the key of its random draws, in [0, 2**64).
    """

    prompt: Prompt
    keys: tuple[int, ...]


@dataclass
class Member:
    """A task of a family.

    Attributes:
        task: The task.
        seen: Tokens of the family's prompt that it sees, at least 1.
        tail: Its prompt's tokens after these, at most ``MAX_TAIL``.
    """

    task: Task
    seen: int
    tail: list[int]


@dataclass
class Family:
    """Tasks that share one prefill.

    Attributes:
        prompt: The longest of their prompts.
        members: In the order of the tasks.
    """

    prompt: Prompt
    members: list[Member]

    @property
    def num_answers(self) -> int:
        """Answers that its tasks want."""
        return sum(len(member.task.keys) for member in self.members)


def families(tasks: Iterable[Task]) -> Iterator[Family]:
    """Join consecutive tasks to families; one task more than those of a family is read before it comes out."""
    family: Family | None = None
    for task in tasks:
        if family is not None and _join(family, task):
            continue
        if family is not None:
            yield family
        family = Family(task.prompt, [Member(task, len(task.prompt.tokens), [])])
    if family is not None:
        yield family


def _join(family: Family, task: Task) -> bool:
    """Take a task into a family if all prompts then still begin alike, but for tails."""
    if len(family.members) == MAX_MEMBERS:
        return False
    old, new = family.prompt, task.prompt
    longest = new if len(new.tokens) > len(old.tokens) else old
    prompts = [member.task.prompt for member in family.members] if longest is new else []
    prompts.append(new)
    seen = [_common(longest, prompt) for prompt in prompts]
    if any(len(prompt.tokens) - own > MAX_TAIL or own == 0 for prompt, own in zip(prompts, seen, strict=True)):
        return False
    if not _same_images(old, new, min(seen)):
        return False
    if not all(_counts_on(prompt, own) for prompt, own in zip(prompts, seen, strict=True)):
        return False
    family.members.append(Member(task, 0, []))
    family.prompt = longest
    for member, own in zip(family.members[-len(prompts) :], seen, strict=True):
        member.seen, member.tail = own, member.task.prompt.tokens[own:].tolist()
    return True


def _common(longest: Prompt, prompt: Prompt) -> int:
    """Count the tokens that both begin with."""
    length = min(len(longest.tokens), len(prompt.tokens))
    differs = np.flatnonzero(longest.tokens[:length] != prompt.tokens[:length])
    return int(differs[0]) if differs.size else length


def _counts_on(prompt: Prompt, seen: int) -> bool:
    """Whether the tokens after the shared ones stand one position after the other, as a tail's do.

    Right after an image they may not: its last token may stand at a fraction.
    """
    rest = len(prompt.tokens) - seen
    return np.array_equal(prompt.positions[seen:], prompt.positions[seen - 1] + np.arange(1, rest + 1))


def _same_images(a: Prompt, b: Prompt, seen: int) -> bool:
    """Whether two prompts show the same tiles at the same rows, positions and all, within the rows that are shared."""
    return (
        np.array_equal(a.visual_rows, b.visual_rows)
        and (a.visual_rows.size == 0 or int(a.visual_rows[-1]) < seen)
        and np.array_equal(a.positions[:seen], b.positions[:seen])
        and (a.tiles is b.tiles or (a.tiles.shape == b.tiles.shape and torch.equal(a.tiles, b.tiles)))
    )
