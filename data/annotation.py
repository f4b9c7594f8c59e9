"""One line of an InternVL .jsonl to a typed, checked sample.

    {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "What is this?"}, …]}
        │ parse_sample
        ▼
    Sample(images=("a.png",), turns=({"from": "human", "value": "<image>\\nWhat is this?"}, …))

Which keys decide (spec §3.2): ``image`` (a path or a list of them), ``video`` (a gif or a folder of frames), neither:
text. ``<image>`` stands once per image in the human turns (or the pretrain text); before a lone image it may be left
out. Grounding boxes are ordinary text here. Keys that this project does not use, such as ``width``, are passed over.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evovlm.data.chat import VIDEO_PLACEHOLDER, Turn, place_frames, place_images
from evovlm.data.errors import Reason, SampleError


@dataclass(frozen=True)
class Sample:
    """One line of a .jsonl.

    Attributes:
        dataset: name of its dataset.
        line: line in the file, counted from 1.
        id: the line's ``id`` as text, or None.
        turns: the conversation as ``evovlm.data.chat`` takes it; placeholders match ``images``. A video's
            ``<video>`` is still there: ``chat.place_frames`` replaces it once the number of frames is known.
        images: image paths as written, relative to the dataset's root.
        video: path of a gif or of a folder of frames, or None; never beside ``images``.
        clip: (start, end) in seconds of the video, or None for all of it.
    """

    dataset: str
    line: int
    id: str | None
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    video: str | None = None
    clip: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Dataset and line, such as ``chart/17``."""
        return f"{self.dataset}/{self.line}"


def parse_sample(raw: bytes | str, dataset: str, line: int) -> Sample:
    """Turn one line into a ``Sample``; ``<image>`` and a newline are prepended where a lone image has no placeholder.

    Args:
        raw: the line.
        dataset: name of its dataset.
        line: its number, counted from 1.

    Raises:
        SampleError: the line cannot be used; reason ``BROKEN_JSON``, ``CONVERSATION``, ``IMAGE_COUNT``,
            ``MISSING_IMAGE`` (a remote address), ``EMPTY_ANSWER``, ``NO_TARGETS`` or ``OTHER_KIND``.
    """
    name = f"{dataset}/{line}"
    content = read_object(raw, name)
    if "conversations" not in content and "chosen" in content:
        detail = "the line is a preference pair, not a conversation: build an index of pairs with `--kind preference`"
        raise SampleError(Reason.OTHER_KIND, detail, name)
    sample = make_sample(content, _turns(name, content.get("conversations")), dataset, line)
    if all(turn["from"] not in ("gpt", "pretrain") for turn in sample.turns):
        raise SampleError(Reason.NO_TARGETS, f"none of its {len(sample.turns)} turns is from 'gpt' or 'pretrain'", name)
    return sample


def read_object(raw: bytes | str, name: str) -> dict[str, Any]:
    """Parse a line of a .jsonl.

    Raises:
        SampleError: it is no JSON object; reason ``BROKEN_JSON``.
    """
    try:
        content = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(Reason.BROKEN_JSON, f"the line is not valid JSON: {error}", name) from None
    if not isinstance(content, dict):
        raise SampleError(Reason.BROKEN_JSON, f"the line is a JSON {type(content).__name__}, not an object", name)
    return content


def make_sample(content: dict[str, Any], turns: Sequence[Turn], dataset: str, line: int) -> Sample:
    """Put a line's images or video to its turns.

    Args:
        content: the line.
        turns: texts of it, checked.
        dataset: name of its dataset.
        line: its number, counted from 1.

    Raises:
        SampleError: bad ``image``, ``video`` or ``clip``, or placeholders that do not match them.
    """
    name = f"{dataset}/{line}"
    images = _images(name, content.get("image"))
    video = content.get("video") or None
    if video is not None and not isinstance(video, str):
        detail = "'video' must be one path, of a gif or of a folder of frames; give single frames as a list in 'image'"
        raise SampleError(Reason.CONVERSATION, detail, name)
    if video is not None and images:
        detail = f"has both 'video' and 'image' ({len(images)}): keep one of them"
        raise SampleError(Reason.CONVERSATION, detail, name)
    for path in (*images, *([video] if video else [])):
        check_text(name, path, "a path")
        if "://" in path:
            detail = f"'{path}' is a remote address, only file systems are read: mount or copy it"
            raise SampleError(Reason.MISSING_IMAGE, detail, name)
    if video is not None:
        place_frames(turns, 1, name=name)  # only to check them: the number of frames is not known here
    else:
        turns = place_images(turns, len(images), name=name)
        if any(VIDEO_PLACEHOLDER in turn["value"] for turn in turns if turn["from"] == "human"):
            raise SampleError(Reason.IMAGE_COUNT, f"a {VIDEO_PLACEHOLDER} placeholder but no 'video'", name)
    sample_id = content.get("id")
    return Sample(
        dataset=dataset,
        line=line,
        id=None if sample_id is None else str(sample_id),
        turns=tuple(turns),
        images=images,
        video=video,
        clip=_clip(name, content.get("clip")) if video else None,
    )


def with_system(turns: Sequence[Turn], system_prompt: str | None) -> tuple[Turn, ...]:
    """Put a system turn before a conversation that has none; None leaves that to the template's own default."""
    if system_prompt is None or turns[0]["from"] in ("system", "pretrain"):
        return tuple(turns)
    return {"from": "system", "value": system_prompt}, *turns


def _images(name: str, value: Any) -> tuple[str, ...]:
    """Read ``image``: a path, a list of paths, or nothing (also as empty string or list)."""
    paths = [value] if isinstance(value, str) and value else value or []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise SampleError(Reason.CONVERSATION, "'image' must be a path or a list of paths", name)
    return tuple(paths)


def _turns(name: str, conversations: Any) -> list[dict[str, str]]:
    """Check that there are turns with texts and no empty answers; ``chat`` checks roles and their order."""
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(Reason.CONVERSATION, "'conversations' must be a list of at least one turn", name)
    for number, turn in enumerate(conversations, start=1):
        texts = [turn.get("from"), turn.get("value")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            detail = f"turn {number} must be an object with the texts 'from' and 'value'"
            raise SampleError(Reason.CONVERSATION, detail, name)
        check_text(name, turn["value"], f"turn {number}")
        if turn["from"] in ("gpt", "pretrain") and not turn["value"].strip():
            detail = f"the text of turn {number} (from '{turn['from']}') is empty: there is nothing to learn"
            raise SampleError(Reason.EMPTY_ANSWER, detail, name)
    return conversations


def check_text(name: str, text: str, what: str) -> None:
    """Raise ``SampleError`` if a text cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer or file system takes
        raise SampleError(Reason.BROKEN_JSON, f"{what} holds half a surrogate pair: {error}", name) from None


def _clip(name: str, clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    if (
        not isinstance(clip, list)
        or len(clip) != 2
        or not all(isinstance(second, int | float) for second in clip)
        or not 0 <= clip[0] < clip[1]
    ):
        raise SampleError(Reason.CONVERSATION, f"'clip' must be [start, end] in seconds, not {clip!r}", name)
    return float(clip[0]), float(clip[1])


def image_value(images: Sequence[str]) -> str | list[str]:
    """Return images as a line names them: one as a path, several or none as a list."""
    return images[0] if len(images) == 1 else list(images)
