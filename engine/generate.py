"""Decoding of many prompts with a key-value cache: answers leave the batch when they end, others enter in their place.

    tasks ─ families ─► prefill: prompts packed [T] ─► a slot each, and the first token of each answer
                          ▲                              │
                          │ room again                   ▼
                          └──────── steps: one token per answer [B] ─► draw ─► <|im_end|>? leave : stay

Answers of one prompt share its prefill, the encoding of its images and its keys and values. Generated token t takes
position ``last prompt position + t`` (spec §2); prompts may use any visual stride. What is drawn depends on the key of
the answer and its tokens so far, not on what else is in the batch (but for rounding).
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.engine.generate_cache import KVSlots, PromptAttend, StepAttend
from evovlm.engine.generate_draw import draw
from evovlm.engine.generate_families import MAX_TAIL, Family, Member, Prompt, Task, families
from evovlm.engine.generation import Sampling
from evovlm.models.internvl import InternVL

__all__ = ["Batching", "Drawn", "Prompt", "Task", "decode", "generate"]

_REFILL = 0.75  # of the cache in use: above, a prefill for a few answers would cost more than their empty places do


@dataclass(frozen=True)
class Batching:
    """How much is decoded at a time; no answer depends on it.

    Attributes:
        cache_tokens: Room of the cache in tokens: prompts as long as the longest one, answers as long as they may get.
            A token takes 2 · layers · KV heads · head dim numbers.
        max_answers: Most answers in the batch.
        prefill_tokens: Most prompt tokens that are computed at a time (a longer prompt goes alone).

    Raises:
        ValueError: A number is below 1.
    """

    cache_tokens: int = 131_072
    max_answers: int = 256
    prefill_tokens: int = 16_384

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value} is below 1")


@dataclass(frozen=True)
class Drawn:
    """One answer.

    Attributes:
        ids: Its tokens, without the one that ended it.
        finished: Whether such a token ended it.
    """

    ids: list[int]
    finished: bool


@dataclass
class _Group:
    """A family in the cache: its slot, its prompt's tokens, and how many of its answers are not finished."""

    slot: int
    length: int
    left: int


@dataclass
class _Sequence:
    """One answer under way. In the cache it consists of its tail and its own tokens.

    Attributes:
        answers: Answers of its task, to be filled.
        number: Which of them it is.
        key: Of its random draws.
        group: Its prompt in the cache.
        seen: Tokens that it sees of that prompt.
        tail: Prompt tokens after these.
        position: Of the first token after what it sees.
        hidden: ``[H]``, last hidden state of what it sees.
        ids: Its tokens so far.
        fed: How many tokens of ``tail`` and ``ids`` are in the cache.
    """

    answers: list[Drawn | None]
    number: int
    key: int
    group: _Group
    seen: int
    tail: list[int]
    position: float
    hidden: Tensor
    ids: list[int] = field(default_factory=list)
    fed: int = 0

    @property
    def next_token(self) -> int:
        """What is fed next."""
        return self.tail[self.fed] if self.fed < len(self.tail) else self.ids[self.fed - len(self.tail)]


def generate(
    model: InternVL, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]
) -> list[list[int]]:
    """Continue prompts greedily, one answer each.

    Args:
        model: In any dtype, on any device, not sharded.
        prompts: At least one.
        max_new_tokens: Most tokens that are generated for a prompt.
        stop: Ids that end a sequence; they are not returned.

    Returns:
        The new ids of each prompt.
    """
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    drawn = decode(model, (Task(prompt, (0,)) for prompt in prompts), greedy, stop=stop)
    return [answers[0].ids for answers in drawn]


@torch.no_grad()
def decode(
    model: InternVL,
    tasks: Iterable[Task],
    sampling: Sampling,
    *,
    stop: Collection[int],
    batching: Batching | None = None,
) -> Iterator[list[Drawn]]:
    """Continue prompts, several answers each.

    Args:
        model: In any dtype, on any device, not sharded.
        tasks: Read as room gets free.
        sampling: How tokens are drawn, and how many at most.
        stop: Ids that end an answer.
        batching: How much is decoded at a time.

    Yields:
        The answers of each task, in order.
    """
    batch = _Batch(model, tasks, sampling, frozenset(stop), batching or Batching())
    while batch.fill():
        yield from batch.done()
        batch.step()
        yield from batch.done()


class _Batch:
    """What is under way: prompts in slots 0 … G − 1, answers in rows 0 … B − 1, and answers that wait for a row."""

    def __init__(
        self,
        model: InternVL,
        tasks: Iterable[Task],
        sampling: Sampling,
        stop: frozenset[int],
        batching: Batching,
    ) -> None:
        self.model, self.sampling, self.stop, self.batching = model, sampling, stop, batching
        self.head = model.language_model.lm_head.weight
        self.device = self.head.device
        self.prompts = KVSlots(model.config.decoder, self.head.dtype, self.device)
        self.answers = KVSlots(model.config.decoder, self.head.dtype, self.device)
        self.families = families(tasks)
        self.upcoming = next(self.families, None)
        self.groups: list[_Group] = []
        self.rows: list[_Sequence] = []
        self.waiting: deque[_Sequence] = deque()
        self.order: deque[list[Drawn | None]] = deque()
        self.room = sampling.max_new_tokens + MAX_TAIL

    def done(self) -> Iterator[list[Drawn]]:
        """Yield the answers of tasks that are complete, as far as no earlier task is not."""
        while self.order and None not in self.order[0]:
            yield [answer for answer in self.order.popleft() if answer is not None]

    def fill(self) -> bool:
        """Let answers in while there is room; return whether there is anything left to do."""
        if not self.rows or self._load(0, 0, 0) <= _REFILL:
            while self._enter() and self._prefill():
                pass
        return bool(self.order)

    def _load(self, groups: int, length: int, rows: int) -> float:
        """Say what share of the room would be used with so many more prompts, of this length, and answers."""
        groups, rows = groups + len(self.groups), rows + len(self.rows)
        tokens = groups * max([length, *(group.length for group in self.groups)]) + rows * self.room
        return max(tokens / self.batching.cache_tokens, rows / self.batching.max_answers)

    def _enter(self) -> bool:
        """Give rows to waiting answers, and draw their first tokens; return whether none waits any more."""
        entering: list[_Sequence] = []
        while self.waiting and (self._load(0, 0, len(entering) + 1) <= 1 or not (self.rows or entering)):
            entering.append(self.waiting.popleft())
        self.rows += entering
        begin = [sequence for sequence in entering if not sequence.tail]
        if begin:
            self._draw(torch.stack([sequence.hidden for sequence in begin]), begin)
        return not self.waiting

    def _prefill(self) -> bool:
        """Compute the next prompts, as many as there is room for; return whether there were any."""
        batch: list[Family] = []
        tokens = longest = answers = 0
        while self.upcoming is not None:
            length = len(self.upcoming.prompt.tokens)
            full = self._load(len(batch) + 1, max(longest, length), answers + 1) > 1
            if (full and (batch or self.rows)) or (batch and tokens + length > self.batching.prefill_tokens):
                break
            batch.append(self.upcoming)
            tokens, longest, answers = tokens + length, max(longest, length), answers + self.upcoming.num_answers
            self.upcoming = next(self.families, None)
        if not batch:
            return False
        first = len(self.groups)
        for family in batch:
            self.groups.append(_Group(len(self.groups), len(family.prompt.tokens), family.num_answers))
        self.prompts.reserve(len(self.groups), max(group.length for group in self.groups))
        hidden = self._run_prompts([family.prompt for family in batch], first)
        ends = np.cumsum([group.length for group in self.groups[first:]])
        for family, group, end in zip(batch, self.groups[first:], ends.tolist(), strict=True):
            for member in family.members:
                self._wait(member, group, hidden[end - group.length + member.seen - 1].clone())
        return True

    def _run_prompts(self, prompts: Sequence[Prompt], first_slot: int) -> Tensor:
        """Run prompts as one pack into slots from ``first_slot`` on; returns the hidden states ``[T, H]``."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        offsets = np.cumsum([0, *lengths[:-1]])
        tokens = torch.from_numpy(np.concatenate([p.tokens for p in prompts]).astype(np.int64)).to(self.device)
        positions = torch.from_numpy(np.concatenate([p.positions for p in prompts])).to(self.device)
        rows = np.concatenate([p.visual_rows + offset for p, offset in zip(prompts, offsets, strict=True)])
        visual = self.model.encode(torch.cat([p.tiles for p in prompts]).to(self.device))
        places = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        attend = PromptAttend(self.prompts, lengths, first_slot)
        return self.model.decode(tokens, positions, attend, (places, visual))

    def _wait(self, member: Member, group: _Group, hidden: Tensor) -> None:
        """Queue the answers of a task."""
        answers: list[Drawn | None] = [None] * len(member.task.keys)
        position = float(member.task.prompt.positions[member.seen - 1]) + 1
        for number, key in enumerate(member.task.keys):
            self.waiting.append(_Sequence(answers, number, key, group, member.seen, member.tail, position, hidden))
        self.order.append(answers)

    def step(self) -> None:
        """Feed one token of each row, and draw the next ones."""
        if not self.rows:
            return
        rows = self.rows
        length = max(row.fed for row in rows) + 1
        self.answers.reserve(len(rows), min(self.room, max(32, 1 << (length - 1).bit_length())))
        attend = StepAttend(
            self.prompts,
            self.answers,
            slots=[row.group.slot for row in rows],
            seen=[row.seen for row in rows],
            lengths=[row.fed for row in rows],
        )
        tokens = torch.tensor([row.next_token for row in rows], device=self.device)
        positions = torch.tensor([row.position + row.fed for row in rows], dtype=torch.float32, device=self.device)
        hidden = self.model.decode(tokens, positions, attend)
        for row in rows:
            row.fed += 1
        drawing = [number for number, row in enumerate(rows) if row.fed >= len(row.tail)]
        if len(drawing) < len(rows):
            hidden = hidden[drawing]
        if drawing:
            self._draw(hidden, [rows[number] for number in drawing])

    def _draw(self, hidden: Tensor, sequences: Sequence[_Sequence]) -> None:
        """Draw a token for each sequence from hidden states ``[n, H]``; those that end with it leave."""
        logits = F.linear(hidden, self.head)
        positions = [len(sequence.ids) for sequence in sequences]
        tokens = draw(logits, self.sampling, [sequence.key for sequence in sequences], positions)
        ended = set()
        for sequence, token in zip(sequences, tokens, strict=True):
            stopped = token in self.stop
            if not stopped:
                sequence.ids.append(token)
            if stopped or len(sequence.ids) == self.sampling.max_new_tokens:
                sequence.answers[sequence.number] = Drawn(sequence.ids, stopped)
                sequence.group.left -= 1
                ended.add(id(sequence))
        if ended:
            self._leave(ended)

    def _leave(self, ended: set[int]) -> None:
        """Take away answers by their ``id()``, and prompts that have no more; the last ones take their places.

        From the end on, so that where each prompt has one answer both keep the same order.
        """
        for row in reversed(range(len(self.rows))):
            if id(self.rows[row]) in ended:
                last = self.rows.pop()
                if row < len(self.rows):
                    if last.fed:  # one that has just entered may have no room yet
                        self.answers.move(len(self.rows), row, last.fed)
                    self.rows[row] = last
        for group in reversed(self.groups.copy()):
            if not group.left:
                mover = self.groups.pop()
                if mover is not group:
                    self.prompts.move(mover.slot, group.slot, mover.length)
                    self.groups[group.slot], mover.slot = mover, group.slot
