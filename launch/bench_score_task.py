"""What ``evovlm bench score`` scores: questions with images, each with several solutions in steps; all deterministic.

    CPython's documentation ─ passages ─► solutions of 3 to 6 steps, 100 to 400 tokens ─┐
    keyed colours ─ 1 to 5 tiles of 448 pixels ─► JPEG ─► images of a question ─────────┴─► CandidateSet

Model, images and their shares are those of ``evovlm bench mpo``. No two solutions begin alike, so a question's prefix
is its system turn, its images and its text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from evovlm.csrc.random import keys, uniform
from evovlm.data.candidates import Candidate, CandidateSet
from evovlm.data.solution_steps import SEPARATOR
from evovlm.data.tokenizer_training import build_tokenizer
from evovlm.engine.model_source import random_weights
from evovlm.launch.bench_mpo_pairs import SHARES, SHRUNK, TILES, save_image
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.save import save_pretrained

_CHARACTERS = 3.5  # of a token, about
_FEWEST_STEPS, _MOST_STEPS = 3, 6


@dataclass(frozen=True)
class Task:
    """A critic, and what it scores.

    Attributes:
        model: Its shape.
        num_questions: Questions.
        num_candidates: N, solutions of each.
        shortest: Tokens of the shortest solution, about.
        longest: Tokens of the longest solution, about.
        merges: Ids of the tokenizer; the model's vocabulary is larger, and ids above occur nowhere.
        seed: Of solutions, images and weights.
    """

    model: InternVLConfig = SHRUNK
    num_questions: int = 4
    num_candidates: int = 8
    shortest: int = 100
    longest: int = 400
    merges: int = 4096
    seed: int = 0


def write_critic(folder: Path, task: Task) -> Path:
    """Train a tokenizer and export a model with random weights, in transformers' format; returns the directory."""
    tokenizer = build_tokenizer([_text()], folder / "tokenizer", task.merges)
    save_pretrained(
        task.model,
        random_weights(task.model, task.seed),
        folder / "critic",
        tokenizer_dir=tokenizer,
        normalize="imagenet",
    )
    return folder / "critic"


def make_questions(folder: Path, task: Task) -> list[CandidateSet]:
    """Draw the questions; their images are saved in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return list(_questions(folder, task))


def _text() -> str:
    return SEPARATOR.join(topics[name] for name in sorted(topics))


def _questions(folder: Path, task: Task) -> Iterator[CandidateSet]:
    text = _text()
    # Evenly spaced, in keyed order: few questions have the shares of many.
    places = (np.arange(task.num_questions) + 0.5) / task.num_questions
    kinds = np.searchsorted(np.cumsum(SHARES)[:-1], places, side="right")
    order = np.argsort(keys("bench_score", "order", task.seed, np.arange(task.num_questions)), kind="stable")
    for number, kind in enumerate(kinds[order].tolist()):
        images = [
            folder / save_image(folder, task.model, task.seed, number, place, tiles)
            for place, tiles in enumerate(TILES[kind])
        ]
        question = "\n".join(["<image>"] * len(images)) + f"\nWhat does the text in picture {number} say?"
        candidates = tuple(Candidate(_solution(task, number, i, text)) for i in range(task.num_candidates))
        yield CandidateSet(f"q/{number}", question, tuple(images), candidates)


def _solution(task: Task, number: int, candidate: int, text: str) -> str:
    """Cut a solution's steps out of a text; blank lines stand only between them."""
    length, start, steps = (
        float(uniform(keys("bench_score", what, task.seed, number, candidate))) for what in ("length", "start", "steps")
    )
    count = round(_CHARACTERS * task.shortest * (task.longest / task.shortest) ** length)
    num_steps = _FEWEST_STEPS + int(steps * (_MOST_STEPS - _FEWEST_STEPS + 1))
    begin = int(start * (len(text) - count))
    passage = " ".join(text[begin : begin + count].replace("<", "(").split()) or "nothing"
    size = -(-len(passage) // num_steps)
    cut = [passage[i : i + size].strip() for i in range(0, len(passage), size)]
    return SEPARATOR.join([f"Way {candidate}: {cut[0]}", *(step or "so" for step in cut[1:])])
