"""Conversations of InternVL's jsonl to token ids, supervision mask and image places (template ``internvl2_5``).

    [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]

    <|im_start|>system\\n … <|im_end|>\\n                                not supervised
    <|im_start|>user\\n<img></img>\\nWhat is this?<|im_end|>\\n          not supervised
                            └─ insert_at[0]: this image's visual tokens belong here
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                            ├──────────────┘ supervised: the answer and <|im_end|>, not the newline

Rendered ids are *collapsed*: nothing stands between ``<img>`` and ``</img>``, so an index stores them once, whatever
the tiling; ``expand`` puts the runs in. ``{"from": "pretrain"}`` is one turn of plain, possibly interleaved, text
without template, supervised everywhere but at ``<img>`` and ``</img>``. Source: spec §1.6, §3.2, §3.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evovlm.data.errors import Reason, SampleError
from evovlm.data.tokenizer import IM_END, IM_START, Tokenizer

DEFAULT_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"

Turn = Mapping[str, str]
"""``{"from": "system" | "human" | "gpt" | "pretrain", "value": text}``."""

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class ChatTokens:
    """One rendered sample, image runs collapsed.

    Attributes:
        ids: int32 [n].
        supervised: bool [n], token is a target of the loss (before the causal shift: ``ids[i]`` is what is predicted).
        insert_at: for each image, in order, the index in ``ids`` (that of its ``</img>``) before which its run goes.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    insert_at: list[int]


def render(
    conversations: Sequence[Turn], num_images: int, tokenizer: Tokenizer, *, name: str | None = None
) -> ChatTokens:
    """Render a training sample.

    A system turn may come first and replaces the default one. If no ``<image>`` stands in the text of a sample with
    one image, ``<image>`` and a newline are put before its first human (or pretrain) turn.

    Args:
        conversations: turns as in the jsonl; ``<video>`` must have been replaced by ``place_frames``.
        num_images: images (frames) of the sample.
        tokenizer: what makes the ids.
        name: the sample's name for error messages.

    Raises:
        SampleError: unknown or misplaced roles, or ``<image>`` placeholders that do not match ``num_images``.
    """
    turns = place_images(conversations, num_images, name=name)
    writer = _Writer(tokenizer)
    if turns[0]["from"] == "pretrain":
        writer.write(turns[0]["value"], supervised=True)
        return writer.finish()
    for role, text in _with_system(turns):
        writer.turn(role, text)
    return writer.finish()


def prompt(
    conversations: Sequence[Turn], num_images: int, tokenizer: Tokenizer, *, name: str | None = None
) -> ChatTokens:
    """Render a conversation that the model is to continue: it ends with ``<|im_start|>assistant`` and a newline.

    Raises:
        SampleError: as ``render``, and if the last turn is not a human one.
    """
    turns = place_images(conversations, num_images, name=name)
    if turns[-1]["from"] != "human":
        raise SampleError(Reason.CONVERSATION, f"a prompt ends with a human turn, not {turns[-1]['from']!r}", name)
    writer = _Writer(tokenizer)
    for role, text in _with_system(turns):
        writer.turn(role, text)
    writer.special(tokenizer.im_start)
    writer.write("assistant\n")
    return writer.finish()


def format_text(conversations: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
    """Return the template as one string, ``<image>`` placeholders left as they are: what humans read."""
    text = "".join(f"{IM_START}{role}\n{value}{IM_END}\n" for role, value in _with_system(conversations))
    return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")


def expand(
    ids: NDArray[np.int32],
    supervised: NDArray[np.bool_],
    insert_at: ArrayLike,
    run_lengths: ArrayLike,
    image_context: int,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Put each image's run of ``<IMG_CONTEXT>`` ids into collapsed ids.

    Args:
        ids: int32 [n], collapsed.
        supervised: bool [n].
        insert_at: int [images], ascending, from ``ChatTokens``.
        run_lengths: int [images], visual tokens of each image: tiles · tokens per tile.
        image_context: id of ``<IMG_CONTEXT>``.

    Returns:
        ids int32 and supervised bool, both [n + sum(run_lengths)]; runs are never supervised.

    Raises:
        ValueError: numbers of places and of runs differ, or places do not ascend.
    """
    places, lengths = np.asarray(insert_at, dtype=np.int64), np.asarray(run_lengths, dtype=np.int64)
    if places.shape != lengths.shape:
        raise ValueError(f"{places.size} image places but {lengths.size} image runs")
    total = len(ids) + int(lengths.sum())
    tokens, targets = np.full(total, image_context, dtype=np.int32), np.zeros(total, dtype=np.bool_)
    borders = [0, *places.tolist(), len(ids)]
    shift = 0
    # A sample has few images: copying the stretches between them beats np.insert several times over.
    for (begin, end), length in zip(pairwise(borders), (*lengths.tolist(), 0), strict=True):
        if end < begin:
            raise ValueError(f"image places must ascend from 0 to {len(ids)} tokens, got {places.tolist()}")
        tokens[begin + shift : end + shift] = ids[begin:end]
        targets[begin + shift : end + shift] = supervised[begin:end]
        shift += length
    return tokens, targets


def place_images(conversations: Sequence[Turn], num_images: int, *, name: str | None = None) -> list[dict[str, str]]:
    """Check roles and ``<image>`` placeholders; prepend the placeholder of a single image that has none.

    Only human and pretrain turns hold placeholders; in an answer or a system turn ``<image>`` is plain text.

    Raises:
        SampleError: unknown or misplaced roles, text that is not a string, or counts that differ.
    """
    turns = _checked(conversations, name)
    asking = [turn for turn in turns if turn["from"] in ("human", "pretrain")]
    found = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in asking)
    if found == 0 and num_images == 1 and asking:
        asking[0]["value"] = f"{IMAGE_PLACEHOLDER}\n{asking[0]['value']}"
        found = 1
    if found != num_images:
        raise SampleError(
            Reason.IMAGE_COUNT,
            f"{found} {IMAGE_PLACEHOLDER} placeholder{'s' if found != 1 else ''} "
            f"but {num_images} image{'s' if num_images != 1 else ''}",
            name,
        )
    return turns


def place_frames(conversations: Sequence[Turn], num_frames: int, *, name: str | None = None) -> list[dict[str, str]]:
    """Replace ``<video>`` by one line ``Frame-i: <image>`` for each frame (spec §3.2).

    Without a ``<video>``, one is put on a line of its own before the first human (or pretrain) turn.

    Raises:
        SampleError: more than one ``<video>``, ``<image>`` beside it, or no turn to hold it.
    """
    turns = _checked(conversations, name)
    asking = [turn for turn in turns if turn["from"] in ("human", "pretrain")]
    found = sum(turn["value"].count(VIDEO_PLACEHOLDER) for turn in asking)
    images = sum(turn["value"].count(IMAGE_PLACEHOLDER) for turn in asking)
    if found > 1 or images or not asking:
        raise SampleError(
            Reason.IMAGE_COUNT,
            f"a video sample has one {VIDEO_PLACEHOLDER} placeholder in its human turns, "
            f"not {found} and {images} {IMAGE_PLACEHOLDER}",
            name,
        )
    if not found:
        asking[0]["value"] = f"{VIDEO_PLACEHOLDER}\n{asking[0]['value']}"
    frames = "\n".join(f"Frame-{i + 1}: {IMAGE_PLACEHOLDER}" for i in range(num_frames))
    for turn in asking:
        turn["value"] = turn["value"].replace(VIDEO_PLACEHOLDER, frames)
    return turns


def _checked(conversations: Sequence[Turn], name: str | None) -> list[dict[str, str]]:
    """Copy the turns' ``from`` and ``value`` after checking both."""
    if not conversations:
        raise SampleError(Reason.CONVERSATION, "a sample without turns", name)
    for number, turn in enumerate(conversations):
        role, value = turn.get("from"), turn.get("value")
        if not isinstance(value, str):
            raise SampleError(
                Reason.CONVERSATION, f"turn {number}: 'value' is {type(value).__name__}, not a string", name
            )
        if role == "pretrain":
            if len(conversations) > 1:
                raise SampleError(
                    Reason.CONVERSATION,
                    f"a 'pretrain' turn stands alone, but there are {len(conversations)} turns",
                    name,
                )
            if not value:
                raise SampleError(Reason.EMPTY_ANSWER, "an empty 'pretrain' text", name)
        elif role not in _ROLES:
            raise SampleError(
                Reason.CONVERSATION, f"turn {number}: 'from' is {role!r}, not one of {[*_ROLES, 'pretrain']}", name
            )
        elif role == "system" and number:
            raise SampleError(Reason.CONVERSATION, f"turn {number}: a system turn comes first or not at all", name)
    return [{"from": turn["from"], "value": turn["value"]} for turn in conversations]


def _with_system(conversations: Sequence[Turn]) -> list[tuple[str, str]]:
    turns = [(_ROLES[turn["from"]], turn["value"]) for turn in conversations]
    return turns if conversations[0]["from"] == "system" else [("system", DEFAULT_SYSTEM), *turns]


class _Writer:
    """Appends tokens to one sample; pieces between special tokens are tokenised separately, as upstream does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.supervised: list[bool] = []
        self.insert_at: list[int] = []
        if tokenizer.bos_id is not None:
            self.special(tokenizer.bos_id)

    def special(self, token: int, *, supervised: bool = False) -> None:
        self.ids.append(token)
        self.supervised.append(supervised)

    def text(self, text: str, *, supervised: bool = False, skip: int = 0) -> None:
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.supervised += [supervised and i >= skip for i in range(len(ids))]

    def write(self, text: str, *, supervised: bool = False) -> None:
        """Append text in which ``<image>`` stands for an image."""
        for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if number:
                self.special(self.tokenizer.image_start)
                self.insert_at.append(len(self.ids))
                self.special(self.tokenizer.image_end)
            if piece:
                self.text(piece, supervised=supervised)

    def turn(self, role: str, value: str) -> None:
        """Append ``<|im_start|>role``, newline, value, ``<|im_end|>``, newline."""
        self.special(self.tokenizer.im_start)
        if role == "user":
            self.write(f"user\n{value}")
        elif role == "assistant":
            # The answer is tokenised with its header, so a leading newline may merge into the header's; that
            # merged token is then unsupervised, as upstream masks a fixed number of tokens.
            header = "assistant\n"
            self.text(header + value, supervised=True, skip=len(self.tokenizer.encode(header)))
        else:
            self.text(f"{role}\n{value}")
        self.special(self.tokenizer.im_end, supervised=role == "assistant")
        self.text("\n")

    def finish(self) -> ChatTokens:
        return ChatTokens(
            ids=np.array(self.ids, dtype=np.int32),
            supervised=np.array(self.supervised, dtype=np.bool_),
            insert_at=self.insert_at,
        )
