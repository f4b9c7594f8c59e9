"""Questions with known answers, read from the data that models are trained on.

    meta.json ──► .jsonl lines ──┬─ conversation: first human turns, first answer ─┬─► Question(text, images, truth)
                                 └─ preference pair: question, chosen, answer_gt ──┘

What is asked of a model here is generated anew, so later turns of a conversation are not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from evovlm.data.annotation import parse_sample, read_object
from evovlm.data.chat import IMAGE_PLACEHOLDER, Turn
from evovlm.data.errors import MetaError, Reason, SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.preference import parse_pair


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        dataset: Its dataset.
        line: Line in the file, from 1.
        id: The line's ``id``, or None.
        text: The question, with an ``<image>`` for each image.
        images: Image paths as written, relative to the dataset's root.
        system: The line's own system turn, or None.
        truth: The reference answer; of a pair its ``answer_gt``, or else the chosen answer.
        reference: The whole reply that data hold for it: the answer of the conversation, or the chosen one.
    """

    dataset: str
    line: int
    id: str | None
    text: str
    images: tuple[str, ...]
    system: str | None
    truth: str
    reference: str

    @property
    def name(self) -> str:
        """Dataset and line, such as ``charts/17``."""
        return f"{self.dataset}/{self.line}"

    def turns(self, text: str, system: str | None) -> tuple[Turn, ...]:
        """Return the conversation that asks ``text``; ``system`` stands for a missing system turn."""
        asked: Turn = {"from": "human", "value": text}
        system = system if self.system is None else self.system
        return (asked,) if system is None else ({"from": "system", "value": system}, asked)


def parse_question(raw: bytes | str, dataset: str, line: int) -> Question:
    """Turn a line, a conversation or a preference pair, into a question.

    Raises:
        SampleError: The line cannot be used, is a video, or does not begin with a question that has an answer.
    """
    name = f"{dataset}/{line}"
    content = read_object(raw, name)
    system: str | None = None
    if "conversations" not in content and "chosen" in content:
        pair = parse_pair(raw, dataset, line)
        sample, text, reference = pair.sample, pair.sample.turns[0]["value"], pair.chosen
        truth: Any = content.get("answer_gt")
    else:
        sample = parse_sample(raw, dataset, line)
        system, text, reference = _first_exchange(sample.turns, name)
        truth = None
    if sample.video is not None:
        raise SampleError("video", "questions about videos are not generated", name)
    images = sample.images[: text.count(IMAGE_PLACEHOLDER)]
    truth = reference if truth is None else str(truth)
    return Question(dataset, line, sample.id, text, images, system, truth, reference)


def read_questions(
    dataset: DatasetMeta, *, limit: int | None = None, start: int = 0, rank: int = 0, size: int = 1
) -> Iterator[Question | SampleError]:
    """Read a dataset's questions; a line that cannot be used comes as its error.

    Args:
        dataset: From ``load_meta``; a ``repeat_time`` below 1 cuts it as in training.
        limit: Most lines.
        start: Lines that are passed over first; blank lines do not count.
        rank: Of those lines, read each ``size``-th, beginning with line ``rank``.
        size: See ``rank``.

    Raises:
        MetaError: The dataset is a text corpus.
    """
    end = start + num_questions(dataset, limit=limit, start=start)
    with dataset.annotation.open("rb") as file:
        lines = ((number, raw) for number, raw in enumerate(file, start=1) if raw.strip())
        for number, raw in islice(lines, start + rank, end, size):
            try:
                yield parse_question(raw, dataset.name, number)
            except SampleError as error:
                yield error


def num_questions(dataset: DatasetMeta, *, limit: int | None = None, start: int = 0) -> int:
    """Count the lines that ``read_questions`` reads on all ranks together.

    Raises:
        MetaError: The dataset is a text corpus.
    """
    if dataset.format != "internvl":
        raise MetaError(
            f"dataset '{dataset.name}' is a text corpus, which holds no questions: leave it out of the meta"
        )
    with dataset.annotation.open("rb") as file:
        count = sum(not raw.isspace() for raw in file)
    if dataset.repeat_time < 1:
        count = int(count * dataset.repeat_time)
    left = max(0, count - start)
    return left if limit is None else min(left, limit)


def _first_exchange(turns: tuple[Turn, ...], name: str) -> tuple[str | None, str, str]:
    """Return system turn, first question and its answer."""
    system = turns[0]["value"] if turns[0]["from"] == "system" else None
    rest = turns[system is not None :]
    asked = []
    for turn in rest:
        if turn["from"] != "human":
            break
        asked.append(turn["value"])
    if not asked or len(asked) == len(rest):
        raise SampleError(Reason.CONVERSATION, "the line does not begin with a question and an answer to it", name)
    return system, "\n".join(asked), rest[len(asked)]["value"]
