"""Small real data in InternVL's format: drawn shapes and questions about them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from evovlm.data.build_index import IndexReport, IndexSettings, build_index

from .support import TILE, TOKENS_PER_TILE

MAX_TILES = 4

MakeIndex = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]
"""``make_index(folder, {dataset: lines})`` builds ``folder/index``; images lie in ``folder``."""


def conversation(question: str, answer: str, *more: str, **keys: Any) -> dict[str, Any]:
    """A line of InternVL's jsonl, with a short system turn: the default one is long in bytes."""
    turns = [("system", "Read."), ("human", question), ("gpt", answer)]
    turns += [(("human", "gpt")[i % 2], text) for i, text in enumerate(more)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def draw_shapes(folder: Path, count: int) -> list[tuple[str, str]]:
    """Pictures of one bright shape, in several sizes; (file, what it shows)."""
    names, rng = [], np.random.default_rng(3)
    for number in range(count):
        width, height = [(8, 8), (16, 8), (9, 30), (20, 20)][number % 4]
        picture = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
        shape = ("box", "disc")[number % 2]
        draw = ImageDraw.Draw(picture)
        corners = (1, 1, width - 2, height - 2)
        (draw.rectangle if shape == "box" else draw.ellipse)(corners, fill=(250, 240, 30 * (number % 5)))
        picture.save(folder / f"{number}.png")
        names.append((f"{number}.png", shape))
    return names


def small_index(meta: Path, tokenizer: Path, out: Path, **settings: Any) -> IndexReport:
    """Build an index for the small model; a line that cannot be used is an error."""
    return build_index(
        IndexSettings(
            meta=meta,
            tokenizer=tokenizer,
            out=out,
            tile_size=TILE,
            tokens_per_tile=TOKENS_PER_TILE,
            max_tiles=MAX_TILES,
            num_workers=1,
            strict=True,
            **settings,
        )
    )
