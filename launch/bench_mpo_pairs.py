"""What ``evovlm bench mpo`` trains on: a small model of InternVL3's kind, and deterministic preference pairs.

    CPython's documentation ─ passages of 50 to 250 tokens ─► chosen, rejected ─┐
    keyed colours ─ 1 to 5 tiles of 448 pixels ─► JPEG ─────► images ───────────┴─► .jsonl ─► preference index

Images are of one tile, or a row of tiles and a thumbnail; lengths are log-uniform. Tiles are what they are in the
published models: 448 pixels, 1,025 rows in the ViT, 256 visual tokens. As there, an answer is much shorter than a
prompt with a few tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from PIL import Image

from evovlm.csrc.random import keys, uniform
from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.launch.bench_small_index import make_small_index
from evovlm.models.config import InternVLConfig
from evovlm.models.table import size

_ONE = size("1B")
SHRUNK = replace(
    _ONE,
    vision=replace(_ONE.vision, hidden_size=384, num_layers=2, num_heads=6, ffn_size=1536),
    decoder=replace(
        _ONE.decoder,
        vocab_size=5120,
        hidden_size=384,
        num_layers=2,
        num_heads=6,
        num_kv_heads=1,
        ffn_size=2048,
        tie_embeddings=True,
    ),
)
"""12 million parameters. A tile costs the ViT some four times what its 256 visual tokens cost the LLM's layers, and the
tied output head is 27 % of the LLM, as in InternVL3-1B."""

TILES = ((1,), (1, 1), (3,), (4,), (5,))
"""Tiles of a prompt's images; an image of several tiles is a row of them and a thumbnail."""
SHARES = (0.35, 0.2, 0.2, 0.15, 0.1)
"""Share of the pairs that have each of these."""
_CHARACTERS = 3.5  # of a token, about


@dataclass(frozen=True)
class Task:
    """A model and the pairs that it is trained on.

    Attributes:
        model: Its shape.
        num_pairs: Pairs that are made.
        pack_tokens: T, rows of our packs, one of which is a step.
        shortest: Tokens of the shortest answer, about.
        longest: Tokens of the longest answer, about.
        merges: Ids of the tokenizer; the model's vocabulary is larger, and ids above occur nowhere.
        seed: Of the pairs, their order, and the weights.
        lr: Learning rate of AdamW; weights do not decay.
    """

    model: InternVLConfig = SHRUNK
    num_pairs: int = 8
    pack_tokens: int = 3776
    shortest: int = 50
    longest: int = 250
    merges: int = 4096
    seed: int = 0
    lr: float = 1e-5


def write_pairs(folder: Path, task: Task) -> tuple[Index, Tokenizer]:
    """Make pairs and index them.

    Raises:
        ValueError: The tokenizer has more ids than the model's vocabulary.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return make_small_index(
        folder, task.model, text, task.merges, lambda images: _lines(images, task, text), "preference"
    )


def _lines(images: Path, task: Task, text: str) -> Iterator[dict[str, Any]]:
    """Draw the pairs; their images are saved in a folder."""
    # Evenly spaced, in keyed order: few pairs have the shares of many.
    places = (np.arange(task.num_pairs) + 0.5) / task.num_pairs
    kinds = np.searchsorted(np.cumsum(SHARES)[:-1], places, side="right")
    order = np.argsort(keys("bench_mpo", "order", task.seed, np.arange(task.num_pairs)), kind="stable")
    for number, kind in enumerate(kinds[order].tolist()):
        chosen, rejected = (_passage(task, number, side, text) for side in ("chosen", "rejected"))
        paths = [
            save_image(images, task.model, task.seed, number, place, tiles) for place, tiles in enumerate(TILES[kind])
        ]
        asked = "\n".join(["<image>"] * len(paths)) + f"\nWhat does the text in picture {number} say?"
        image = paths if len(paths) > 1 else paths[0]
        yield {"id": number, "image": image, "question": asked, "chosen": chosen, "rejected": rejected}


def _passage(task: Task, number: int, side: str, text: str) -> str:
    """Cut an answer out of a text."""
    length, start = (float(uniform(keys("bench_mpo", what, task.seed, side, number))) for what in ("length", "start"))
    count = round(_CHARACTERS * task.shortest * (task.longest / task.shortest) ** length)
    begin = int(start * (len(text) - count))
    return text[begin : begin + count].replace("<", "(").strip() or "nothing"


def save_image(images: Path, model: InternVLConfig, seed: int, number: int, place: int, tiles: int) -> str:
    """Save an image that is cut into that many tiles: blots of colour, as many pixels as the tiles have.

    Args:
        images: Folder that it is saved in.
        model: Says the tile size.
        seed: Of the colours.
        number: Of what the image belongs to.
        place: Of the image there.
        tiles: Of the image, its thumbnail counted.

    Returns:
        The file's name.
    """
    cols, edge = max(1, tiles - 1), model.vision.tile_size
    blots = uniform(keys("bench_mpo", "image", seed, number, place, np.arange(8 * 8 * cols * 3)))
    small = Image.fromarray((blots.reshape(8, 8 * cols, 3) * 256).astype(np.uint8))
    name = f"{number:04d}_{place}.jpg"
    small.resize((cols * edge, edge), Image.Resampling.BICUBIC).save(images / name, quality=90)
    return name
