"""Errors about data: each names the thing, the numbers and the remedy."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a line did not become a sample; skips are counted by these."""

    BROKEN_JSON = "broken JSON"
    CONVERSATION = "conversation"
    IMAGE_COUNT = "image count"
    MISSING_IMAGE = "missing image"
    BAD_IMAGE = "unreadable image"
    EMPTY_ANSWER = "empty answer"
    NO_TARGETS = "no supervised tokens"
    TOO_LONG = "too long"
    EMPTY_DOCUMENT = "empty document"
    OTHER_KIND = "other kind of line"
    MISSING_KEYS = "missing keys"
    EMPTY_SIDE = "empty chosen or rejected"
    SAME_ANSWERS = "chosen = rejected"


class MetaError(ValueError):
    """A meta JSON, or a dataset as a whole, cannot be used."""


class SampleError(ValueError):
    """One sample cannot be used.

    Attributes:
        reason: the kind of fault in a few words, for counting (see ``Reason``).
        detail: what is wrong, with numbers and remedy.
        name: the sample, dataset and line, such as ``chart/17``; None where the raiser does not know it.
    """

    def __init__(self, reason: str, detail: str, name: str | None = None) -> None:
        super().__init__(detail if name is None else f"sample '{name}': {detail}")
        self.reason = str(reason)
        self.detail = detail
        self.name = name

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str, str | None]]:
        # Raised in worker processes: an exception crosses back by being built again from its arguments.
        return type(self), (self.reason, self.detail, self.name)
