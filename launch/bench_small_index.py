"""A tokenizer and an index of lines that a benchmark makes, in a folder of its own.

text ─► tokenizer/     lines ─► NAME.jsonl, images/ ─► meta.json ─► index/
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evovlm.data.build_index import IndexSettings, build_index
from evovlm.data.index import Index
from evovlm.data.index_format import Kind
from evovlm.data.tokenizer import Tokenizer
from evovlm.data.tokenizer_training import build_tokenizer
from evovlm.models.config import InternVLConfig


def make_small_index(
    folder: Path,
    model: InternVLConfig,
    text: str,
    merges: int,
    lines: Callable[[Path], Iterator[dict[str, Any]]],
    kind: Kind,
) -> tuple[Index, Tokenizer]:
    """Make an index.

    Args:
        folder: That everything is written to.
        model: Says tile size, tokens of a tile, and the vocabulary that ids must be below.
        text: What the tokenizer is trained on.
        merges: Ids of the tokenizer.
        lines: Given the folder of images, saves images there and yields lines of InternVL's jsonl.
        kind: What the lines are.

    Raises:
        ValueError: The tokenizer has more ids than the model's vocabulary.
    """
    tokenizer_dir = build_tokenizer([text], folder / "tokenizer", merges)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise ValueError(f"{tokenizer.vocab_size} ids for a vocabulary of {model.decoder.vocab_size}: lower merges")
    (folder / "images").mkdir(parents=True)
    with (folder / "lines.jsonl").open("w", encoding="utf-8") as file:
        for line in lines(folder / "images"):
            file.write(json.dumps(line) + "\n")
    entry = {"lines": {"root": "images", "annotation": "lines.jsonl"}}
    (folder / "meta.json").write_text(json.dumps(entry), encoding="utf-8")
    settings = IndexSettings(
        meta=folder / "meta.json",
        tokenizer=tokenizer_dir,
        out=folder / "index",
        kind=kind,
        tile_size=model.vision.tile_size,
        tokens_per_tile=model.tokens_per_tile,
        system_prompt="",
        num_workers=1,
    )
    return Index.open(build_index(settings).path), tokenizer
