"""Solutions of one question to what a critic computes: what all of them begin with, once, and what each has of its own.

    solution 0   system question <image> step 1 ? step 2 ?           the conversation of training, with "+" as every
    solution 1   system question <image> step 1 ? other step ?       answer, up to its last decision; ? stands where
    solution 2   system question <image> step 1 ?                    the next token is "+" or "-"
                 ├──────── prefix ────────────┤├── branch ──┤
    branches     "step 2", "other step"; solution 2 begins another one, so it needs none of its own

Decision rows are those of the header ``assistant\\n``'s last token (spec §5.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evovlm.data.chat import render
from evovlm.data.errors import Reason, SampleError
from evovlm.data.solution_steps import BAD, GOOD, judged_turns
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.generate_families import Prompt
from evovlm.engine.generation_prompts import PromptMaker

NO_STEPS = "no steps"
"""Reason of a ``SampleError``: there is nothing in a solution that could be judged."""

_HEADER = "assistant\n"


@dataclass(frozen=True)
class Decisions:
    """Where a solution is judged.

    Attributes:
        branch: Number of the branch that holds it.
        rows: int64 ``[steps]``, counted as if that branch followed the prefix.
    """

    branch: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class JudgedQuestion:
    """A question and its solutions, ready for a pack.

    Attributes:
        prefix: What all solutions begin with, images included; P tokens.
        branches: int32 ``[L]`` each, tokens that follow the prefix; L = 0: the prefix is all.
        solutions: For each solution its decisions, or why it cannot be judged.
    """

    prefix: Prompt
    branches: tuple[NDArray[np.int32], ...]
    solutions: tuple[Decisions | SampleError, ...]


@dataclass(frozen=True)
class _Rendering:
    """A solution up to its last decision, images collapsed: ids, image places and decision rows, in ``ids``."""

    ids: NDArray[np.int32]
    insert_at: list[int]
    rows: NDArray[np.int64]


def sign_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Find the ids of "+" and "-" as they follow an assistant's header.

    Raises:
        ValueError: The vocabulary has no single token for one of them there, so the model is no critic of this kind.
    """
    header = tokenizer.encode(_HEADER)
    found = []
    for sign in (GOOD, BAD):
        whole = tokenizer.encode(_HEADER + sign)
        if len(whole) != len(header) + 1 or whole[:-1] != header:
            raise ValueError(
                f"tokenizer {tokenizer.directory} writes {_HEADER + sign!r} as {whole}, not as the header's {header} "
                f"and one token for {sign!r}: this is not the vocabulary of a process reward model"
            )
        found.append(whole[-1])
    good, bad = found
    if good == bad:
        raise ValueError(
            f"tokenizer {tokenizer.directory} has the same id, {good}, for {GOOD!r} and {BAD!r}: "
            "this is not the vocabulary of a process reward model"
        )
    return good, bad


class JudgedPrompts:
    """Renders questions for one critic.

    Args:
        prompts: Of its model.
        system_prompt: System turn; None: that of ``prompts``.

    Raises:
        ValueError: Its vocabulary is not that of a critic.
    """

    def __init__(self, prompts: PromptMaker, system_prompt: str | None) -> None:
        self.prompts = prompts
        self.system_prompt = prompts.system_prompt if system_prompt is None else system_prompt
        self.signs = sign_ids(prompts.tokenizer)

    def render(
        self, name: str, question: str, images: tuple[Path, ...], solutions: Sequence[Sequence[str]]
    ) -> JudgedQuestion:
        """Render a question with all its solutions.

        Args:
            name: Of the question, for error messages.
            question: Its text.
            images: Files of its images.
            solutions: Steps of each.

        Raises:
            SampleError: An image cannot be read, so nothing of the question can be judged.
        """
        chats = [self._chat(name, question, len(images), steps) for steps in solutions]
        made = [chat for chat in chats if isinstance(chat, _Rendering)]
        if not made:
            return JudgedQuestion(_nothing(), (), tuple(chat for chat in chats if isinstance(chat, SampleError)))
        longest = max(made, key=lambda chat: len(chat.ids))
        whole = self.prompts.lay_out(longest.ids, longest.insert_at, images, name)
        visual = len(whole.tokens) - len(longest.ids)
        # Images come first and text counts on from them, so a row's position is the same in every solution.
        chats = [self._fits(name, chat, whole.positions, visual) for chat in chats]
        leaves, branch_of = _leaves([chat.ids for chat in chats if isinstance(chat, _Rendering)])
        shared = _common([longest.ids, *leaves])
        end = visual + shared
        prefix = Prompt(whole.tokens[:end], whole.positions[:end], whole.visual_rows, whole.tiles)
        branch = iter(branch_of)
        decisions = [
            Decisions(next(branch), visual + chat.rows) if isinstance(chat, _Rendering) else chat for chat in chats
        ]
        return JudgedQuestion(prefix, tuple(leaf[shared:] for leaf in leaves), tuple(decisions))

    def _chat(self, name: str, question: str, num_images: int, steps: Sequence[str]) -> _Rendering | SampleError:
        if not steps:
            return SampleError(NO_STEPS, "the solution is blank: there are no steps to judge", name)
        turns = judged_turns(question, steps, [GOOD] * len(steps), num_images=num_images, system=self.system_prompt)
        try:
            chat = render(turns, num_images, self.prompts.tokenizer, name=name)
        except SampleError as error:
            return error
        rows = np.flatnonzero(~chat.supervised[:-1] & chat.supervised[1:])  # before the first token of each answer
        return _Rendering(chat.ids[: rows[-1] + 1], chat.insert_at, rows)

    def _fits(
        self, name: str, chat: _Rendering | SampleError, positions: NDArray[np.float32], visual: int
    ) -> _Rendering | SampleError:
        """Refuse a solution that leaves the positions that the model knows."""
        most = self.prompts.config.decoder.max_positions
        if isinstance(chat, SampleError) or positions[visual + len(chat.ids) - 1] < most:
            return chat
        length = visual + len(chat.ids)
        return SampleError(
            Reason.TOO_LONG, f"question and solution are {length} tokens, the model knows {most} positions", name
        )


def _common(sequences: Sequence[NDArray[np.int32]]) -> int:
    """Count the tokens that all sequences begin with."""
    ordered = _ordered(sequences)
    first, last = (np.frombuffer(raw, ">i4") for raw in (ordered[0], ordered[-1]))
    length = min(len(first), len(last))
    differs = np.flatnonzero(first[:length] != last[:length])
    return int(differs[0]) if differs.size else length


def _ordered(sequences: Sequence[NDArray[np.int32]]) -> list[bytes]:
    """Return different sequences as bytes, each id big-endian, in the order of their ids."""
    return sorted({ids.astype(">i4").tobytes() for ids in sequences})


def _leaves(sequences: Sequence[NDArray[np.int32]]) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Leave out sequences that others begin with; return the rest, and the number of the one that holds each."""
    # In this order a sequence stands right before those that begin with it.
    ordered = _ordered(sequences)
    leaf_of: dict[bytes, bytes] = {}
    for raw, following in zip(reversed(ordered), [b"", *reversed(ordered)], strict=False):
        leaf_of[raw] = leaf_of[following] if following.startswith(raw) else raw
    wanted = [leaf_of[ids.astype(">i4").tobytes()] for ids in sequences]
    numbers = {raw: number for number, raw in enumerate(dict.fromkeys(wanted))}
    return [np.frombuffer(raw, ">i4").astype(np.int32) for raw in numbers], [numbers[raw] for raw in wanted]


def _nothing() -> Prompt:
    return Prompt(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64), torch.empty(0))
