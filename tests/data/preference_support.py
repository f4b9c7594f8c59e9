"""What tests of preference pairs share: an index of given pairs, and both renderings of a pair, made without it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evovlm.data.batch import MicroBatch
from evovlm.data.build_index import IndexReport, IndexSettings, build_index
from evovlm.data.chat import expand, render
from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer

TILE, TOKENS_PER_TILE = 28, 4
SYSTEM = "Prefer."
PICTURES = {"square.png": (28, 28), "wide.png": (56, 28), "tall.png": (30, 90)}


def pair_line(question: str, chosen: str, rejected: str, **keys: Any) -> dict[str, Any]:
    return {"question": question, "chosen": chosen, "rejected": rejected, **keys}


def build(folder: Path, tokenizer_dir: Path, lines: Sequence[Any], **changes: Any) -> IndexReport:
    """Build an index of one dataset ``p`` in ``folder``; lines that are strings go in as they are."""
    folder.mkdir(exist_ok=True)
    for number, (name, size) in enumerate(PICTURES.items()):
        if not (folder / name).exists():
            noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "p.jsonl").write_text(text)
    (folder / "meta.json").write_text(json.dumps({"p": {"root": ".", "annotation": "p.jsonl", "data_augment": True}}))
    given: dict[str, Any] = {
        "meta": folder / "meta.json",
        "tokenizer": tokenizer_dir,
        "out": folder / "index",
        "kind": "preference",
        "tile_size": TILE,
        "tokens_per_tile": TOKENS_PER_TILE,
        "max_tiles": 4,
        "system_prompt": SYSTEM,
        "num_workers": 1,
        "max_skipped": 1.0,
    }
    return build_index(IndexSettings(**(given | changes)))


def skips(folder: Path) -> list[tuple[int, str, str]]:
    """Line, reason and detail of what was left out."""
    lines = (folder / "index" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(skip["line"], skip["reason"], skip["detail"]) for skip in map(json.loads, lines)]


@dataclass
class Side:
    """One answer of a pair as a conversation of its own: tokens and shifted labels [L], runs of visual tokens."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int64]
    runs: list[tuple[int, int]]


def render_sides(line: dict[str, Any], index: Index, sample: int, tokenizer: Tokenizer) -> tuple[Side, Side]:
    """Chosen and rejected as conversations of their own."""
    tiles = [ref.num_tiles for ref in index.image_refs(sample)]
    sides = []
    for answer in (line["chosen"], line["rejected"]):
        turns = [("system", SYSTEM), ("human", line["question"]), ("gpt", answer)]
        chat = render([{"from": role, "value": text} for role, text in turns], len(tiles), tokenizer)
        lengths = [count * TOKENS_PER_TILE for count in tiles]
        before = np.cumsum([0, *lengths])
        tokens, supervised = expand(chat.ids, chat.supervised, chat.insert_at, lengths, tokenizer.image_context)
        labels = np.append(np.where(supervised[1:], tokens[1:], -100), -100)
        runs = [(at + int(shift), n) for at, shift, n in zip(chat.insert_at, before, lengths, strict=False)]
        sides.append(Side(tokens, labels, runs))
    return sides[0], sides[1]


def visible(batch: MicroBatch) -> Tensor:
    """Bool [T, T], which keys each row sees: the causal runs of ``cu_seqlens``, and the rectangles of ``prefixes``."""
    T = len(batch.tokens)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for begin, end in pairwise(batch.cu_seqlens.tolist()):
        seen[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    for query, query_end, key, key_end in batch.prefixes.tolist():
        assert not seen[query:query_end, key:key_end].any(), "a rectangle overlaps what is seen already"
        seen[query:query_end, key:key_end] = True
    return seen
