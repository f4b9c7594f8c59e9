"""Scores a model on test questions: greedy answers against expected ones, exact match, task by task.

    test index (one dataset per task) ─► prompt: tokens up to the last answer ─► generate ─► answer == expected?

Questions are read through the same index, chat template, tiling and positions as training data. Ranks share the
questions out; the scores are over all of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from evovlm.data.batch import V2PESettings, run_deltas
from evovlm.data.images import Normalization, load_tiles
from evovlm.data.index import Index
from evovlm.data.sample import IGNORE, expand_sample
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.generate import Prompt, generate
from evovlm.models.internvl import InternVL
from evovlm.models.v2pe import segment_positions
from evovlm.parallel.world import World


@dataclass(frozen=True)
class Answer:
    """One question's outcome.

    Attributes:
        task: Dataset of the test index.
        name: The sample, such as ``digits/17``.
        expected: The last answer of the conversation.
        given: What the model said.
    """

    task: str
    name: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        """Whether both are the same text, apart from space at the ends."""
        return self.given.strip() == self.expected.strip()


def answer_v2pe(training: V2PESettings) -> V2PESettings:
    """Choose the stride for answering: the training one, or 1/4 where training drew strides at random (spec §2)."""
    return V2PESettings(mode="fixed", delta=0.25) if training.mode == "random" else training


class Evaluator:
    """Questions of a test index, ready to be put to models.

    Args:
        index: The test index; each dataset is a task, each sample's last supervised run the expected answer.
        tokenizer: That of the model.
        v2pe: Visual strides; ``random`` is not allowed here.
        normalize: How pixels are normalised.
        batch_size: Questions that are answered together.
        max_new_tokens: Longest answer; by default the longest expected one and 4 more.
    """

    def __init__(
        self,
        index: Index,
        tokenizer: Tokenizer,
        *,
        v2pe: V2PESettings,
        normalize: Normalization = "imagenet",
        batch_size: int = 32,
        max_new_tokens: int | None = None,
    ) -> None:
        if v2pe.mode == "random":
            raise ValueError("evaluation needs a fixed visual stride, not a random one")
        index.check_tokenizer(tokenizer)
        self.index, self.tokenizer, self.v2pe, self.normalize = index, tokenizer, v2pe, normalize
        self.batch_size = batch_size
        longest = max((len(self.question(i)[1]) for i in range(len(index.samples))), default=0)
        self.max_new_tokens = max_new_tokens or longest + 4

    def question(self, sample: int) -> tuple[int, list[int]]:
        """Return the prompt's length and the expected answer's ids (without ``<|im_end|>``) of a sample.

        Raises:
            ValueError: The sample has no supervised token, so no expected answer.
        """
        expanded = expand_sample(self.index, sample, image_context=self.tokenizer.image_context)
        rows = np.flatnonzero(expanded.labels != IGNORE)
        if rows.size == 0:
            raise ValueError(f"sample '{self.index.name(sample)}' has no answer to compare with")
        # The last answer is the last unbroken run of target rows; row t predicts token t + 1.
        start = rows[np.flatnonzero(np.diff(rows, prepend=-2) != 1)[-1]]
        answer = [int(i) for i in expanded.labels[start : rows[-1] + 1] if i != self.tokenizer.im_end]
        return int(start) + 1, answer

    def prompt(self, sample: int) -> Prompt:
        """Read a sample up to its last answer, with its images."""
        length, _ = self.question(sample)
        expanded = expand_sample(self.index, sample, image_context=self.tokenizer.image_context)
        shown = [(run, ref) for run, ref in zip(expanded.runs, expanded.refs, strict=True) if run[0] < length]
        runs = [run for run, _ in shown]
        deltas = run_deltas(self.v2pe, 0, sample, 0, len(runs))
        name, size = self.index.name(sample), self.index.meta.tile_size
        tiles = [load_tiles(ref, size, self.normalize, name=name) for _, ref in shown]
        rows = [np.arange(start, start + count) for start, count in runs]
        return Prompt(
            tokens=expanded.tokens[:length],
            positions=segment_positions(length, runs, deltas),
            visual_rows=np.concatenate(rows) if rows else np.empty(0, np.int64),
            tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else torch.empty(0, 3, size, size),
        )

    def answers(self, model: InternVL, samples: Iterable[int]) -> Iterator[Answer]:
        """Put questions to a model, in batches."""
        remaining = iter(samples)
        stop = {self.tokenizer.im_end, self.tokenizer.end_of_text}
        while batch := list(islice(remaining, self.batch_size)):
            prompts = [self.prompt(sample) for sample in batch]
            given = generate(model, prompts, max_new_tokens=self.max_new_tokens, stop=stop)
            for sample, ids in zip(batch, given, strict=True):
                yield Answer(
                    task=self.index.dataset_of(sample).name,
                    name=self.index.name(sample),
                    expected=self.tokenizer.decode(self.question(sample)[1]),
                    given=self.tokenizer.decode(ids),
                )

    def run(self, model: InternVL, world: World) -> list[Answer]:
        """Put every question to a model, shared out over the ranks; every rank gets all answers, in index order."""
        mine = list(self.answers(model, range(world.rank, len(self.index.samples), world.size)))
        gathered: list[list[Answer] | None] = [None] * world.size
        dist.all_gather_object(gathered, mine)
        total = len(self.index.samples)
        return [(gathered[i % world.size] or [])[i // world.size] for i in range(total)]


def exact_match(answers: Iterable[Answer]) -> dict[str, float]:
    """Return the share of correct answers of each task, 0 to 1."""
    by_task: dict[str, list[bool]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer.correct)
    return {task: sum(correct) / len(correct) for task, correct in by_task.items()}


def constant_baseline(answers: Iterable[Answer]) -> dict[str, float]:
    """Return, for each task, the exact match of the one answer that is right most often."""
    expected: dict[str, Counter[str]] = {}
    for answer in answers:
        expected.setdefault(answer.task, Counter())[answer.expected.strip()] += 1
    return {task: max(counts.values()) / counts.total() for task, counts in expected.items()}


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Return exact match, best constant answer and number of questions of each task, over all ranks."""
    scores, constants = exact_match(answers), constant_baseline(answers)
    counts = Counter(answer.task for answer in answers)
    return {
        task: {"exact_match": scores[task], "constant_baseline": constants[task], "num_test": counts[task]}
        for task in scores
    }
