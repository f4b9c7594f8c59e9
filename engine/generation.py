"""Generation behind one interface: what is asked, how answers are drawn, and what comes back.

Request (turns, images, beginning of the answer, num) ─┐
Sampling (temperature, top_k, top_p, …, seed) ─────────┴─► Generator ─► one list of ``num`` completions a request

own decoder (CPU, GPU)      evovlm.engine.generation_own
transformers                evovlm.engine.generation_transformers     all three keyed by (seed, request, number):
server given by its URL     evovlm.engine.generation_server           what a model says depends on no batching
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from evovlm.csrc.random import key
from evovlm.data.chat import Turn


class GenerationError(RuntimeError):
    """A generator cannot answer; the message is one line that says which one, what happened and what to do."""


@dataclass(frozen=True)
class Request:
    """One question, and how many answers are wanted.

    Attributes:
        name: What error messages call it. Random draws are keyed by it, so it should differ from request to request.
        turns: A conversation whose last turn is a human one; images by ``<image>``, as in InternVL's jsonl.
        images: The files that the placeholders stand for, in order.
        prefix: Beginning of the assistant's answer, which is continued and not returned.
        num: Answers wanted.

    Raises:
        ValueError: ``num`` is below 1, or the turns do not end with a human one.
    """

    name: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    prefix: str = ""
    num: int = 1

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"request '{self.name}': num = {self.num}, ask for at least one answer")
        if not self.turns or self.turns[-1].get("from") != "human":
            last = self.turns[-1].get("from") if self.turns else None
            raise ValueError(f"request '{self.name}': the last turn must be a human one, not {last!r}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logits / temperature, then the ``top_k`` largest, then the nucleus ``top_p``.

    Attributes:
        temperature: 0 takes the largest logit (greedy).
        top_k: Tokens that may be drawn; 0: all.
        top_p: The smallest set of most likely tokens with at least this probability may be drawn; 1: all.
        max_new_tokens: Longest answer, the prefix not counted.
        seed: First part of every key of a random draw.

    Raises:
        ValueError: A setting is out of its range.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature} is not a number of at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} is below 0; 0 allows all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} is not in (0, 1]; 1 allows all tokens")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} is below 1")

    def key(self, request: str, number: int | None = None) -> int:
        """Return the key of all draws of a request, or of its answer ``number``, in [0, 2**64)."""
        return key("answer", self.seed, request, *([] if number is None else [number]))


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: What comes after the request's prefix.
        finished: Whether the model stopped by itself, rather than at ``max_new_tokens``.
        num_tokens: Tokens that the model made, the one that ends an answer not counted.
    """

    text: str
    finished: bool
    num_tokens: int


class Generator(Protocol):
    """Answers requests. Requests may be a stream: few are read ahead, so a caller can show progress and resume."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Answer requests, in order.

        Args:
            requests: Consumed lazily.
            sampling: Holds for all of them.

        Yields:
            ``request.num`` completions for each request.

        Raises:
            SampleError: A request's turns or images cannot be used; its name is in the message.
            GenerationError: The model or server cannot answer.
        """
        ...


Backend = Literal["evovlm", "transformers", "server"]
"""Who generates: the own decoder, transformers, or an OpenAI-compatible server."""


def open_generator(model: str | Path, *, backend: Backend = "evovlm", **options: Any) -> Generator:
    """Open a generator.

    Args:
        model: With ``evovlm`` a run directory, or a Hugging Face directory of either format; with ``transformers`` a
            directory in its format; with ``server`` the name under which the server knows the model.
        backend: Who generates.
        options: Of the back end: those of ``OwnGenerator.from_run`` or ``OwnGenerator.from_dir``,
            ``TransformersGenerator.from_dir``, ``ServerGenerator`` (``url`` is needed).

    Raises:
        ValueError: The back end is unknown, or the model cannot be used with it.
        FileNotFoundError: There is no such directory.
    """
    # Imported where they are needed: the back ends build upon this file, and transformers takes seconds.
    if backend == "evovlm":
        from evovlm.engine.generation_own import OwnGenerator
        from evovlm.engine.open_model import is_run

        return (OwnGenerator.from_run if is_run(model) else OwnGenerator.from_dir)(model, **options)
    if backend == "transformers":
        from evovlm.engine.generation_transformers import TransformersGenerator

        return TransformersGenerator.from_dir(model, **options)
    if backend == "server":
        from evovlm.engine.generation_server import ServerGenerator

        return ServerGenerator(str(model), **options)
    raise ValueError(f"backend {backend!r} is not one of evovlm, transformers, server")
