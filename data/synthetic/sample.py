"""One made sample, before it is written: images, what stands in each, questions with answers, and its source items."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """Images and what can be asked and told about them.

    Attributes:
        images: as the user would supply them.
        transcripts: what each image shows, one text per image; pre-training reads these.
        questions: (question, expected answer); the first question holds the ``<image>`` placeholders.
        sources: names of the digit images, words, photographs or chart numbers that are visible.
    """

    images: tuple[Image.Image, ...]
    transcripts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
