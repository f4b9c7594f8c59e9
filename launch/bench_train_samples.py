"""What ``bench train`` trains: a small model of InternVL3-1B's proportions, and real samples of skewed sizes.

    documents ─ passages of skewed lengths ─┐
    photographs ─ crops of 1 to 5 tiles  ───┴─► .jsonl, JPEG ─► index ─┬─ Planner, Loader ─► packs        (evovlm)
                                                                       └─ sample by sample ─► input_ids   (baselines)

``SHRUNK`` is InternVL3-1B at half its width (ViT 512 wide with 8 heads of 64, LLM 448 wide with 7 query heads of 64 and
one KV head), with 4 of 24 ViT layers and 5 of 24 LLM layers, so that a tile costs the ViT 3.6 times what its 256 visual
tokens cost the LLM's layers (3.9 in the 1B; attention weighs more at half the width, hence not 4 and 4). The vocabulary
of 15,360 gives the tied output head 27 % of the LLM's parameters, as in the 1B. Tiles are what they are there: 448
pixels, 1,025 rows in the ViT, 256 visual tokens. 40 million parameters, float32.

Half of the samples are text, the others have one or two images of 1 to 5 tiles in all; texts are of log-uniform length.
Everything is drawn once, by keyed randomness.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evovlm.csrc.random import choice_index, keys, permutation, uniform
from evovlm.data.index import Index
from evovlm.data.loader import Loader
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.synthetic import sources
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.cost_shape import shape_costs
from evovlm.launch.bench_small_index import make_small_index
from evovlm.models.config import InternVLConfig
from evovlm.models.table import size

_ONE = size("1B")
SHRUNK = replace(
    _ONE,
    vision=replace(_ONE.vision, hidden_size=512, num_layers=4, num_heads=8, ffn_size=2048),
    decoder=replace(
        _ONE.decoder,
        vocab_size=15_360,
        hidden_size=448,
        num_layers=5,
        num_heads=7,
        num_kv_heads=1,
        ffn_size=2432,
        tie_embeddings=True,
    ),
)
"""The model; see the head of this file."""

TILES = ((), (1,), (1, 1), (3,), (4,), (5,))
"""Tiles of a sample's images; an image of several tiles is a row of them and a thumbnail."""
SHARES = (0.5, 0.25, 0.08, 0.07, 0.04, 0.06)
"""Share of the samples that have each of these."""
_CHARACTERS = 3.5  # of a token, about


@dataclass(frozen=True)
class Task:
    """A model, and the steps that it is trained on.

    Attributes:
        model: Its shape.
        num_samples: Samples that are made.
        pack_tokens: T, rows of our packs, of which every step has ``packs_per_step``.
        packs_per_step: G.
        shortest: Tokens of the shortest text.
        longest: Tokens of the longest text of a sample without images; with images texts are a quarter of that at most.
        images: Whether samples have images.
        merges: Ids of the tokenizer; the model's vocabulary is larger, and ids above occur nowhere.
        seed: Of the samples, their order, and the weights.
        lr: Learning rate of AdamW, the same in every way; weights do not decay.
    """

    model: InternVLConfig = SHRUNK
    num_samples: int = 192
    pack_tokens: int = 1600
    packs_per_step: int = 4
    shortest: int = 24
    longest: int = 768
    images: bool = True
    merges: int = 4096
    seed: int = 0
    lr: float = 1e-4

    def text_only(self) -> "Task":
        """The same model and as many rows, on samples without images."""
        return replace(self, images=False)


def write_samples(folder: Path, task: Task) -> tuple[Index, Tokenizer]:
    """Make samples from photographs and documents in installed packages, and index them.

    Raises:
        FileNotFoundError: A package that brings source material is not installed.
        ValueError: The tokenizer has more ids than the model's vocabulary.
    """
    text = "\n\n".join(document.text for document in sources.documents())
    return make_small_index(
        folder, task.model, text, task.merges, lambda images: _lines(images, task, text), "conversations"
    )


def _lines(images: Path, task: Task, text: str) -> Iterator[dict[str, Any]]:
    """Draw the samples; their images are saved in a folder."""
    numbers = np.arange(task.num_samples)
    sizes, starts, kinds = (
        uniform(keys("bench_train", what, task.seed, numbers)) for what in ("size", "start", "kind")
    )
    kind = np.searchsorted(np.cumsum(SHARES)[:-1], kinds, side="right") if task.images else np.zeros(len(numbers), int)
    for number in numbers.tolist():
        tiles = TILES[kind[number]]
        longest = max(task.shortest, task.longest // (4 if tiles else 1))
        length = round(_CHARACTERS * task.shortest * (longest / task.shortest) ** sizes[number])
        begin = int(starts[number] * (len(text) - length))
        passage = text[begin : begin + length].replace("<", "(").strip() or "nothing"
        paths = [_save_crop(images, task, number, place, count) for place, count in enumerate(tiles)]
        if not tiles:
            yield {"id": number, "conversations": [{"from": "pretrain", "value": passage}]}
            continue
        asked = "\n".join(["<image>"] * len(tiles)) + "\nWhat is this?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": passage}]
        yield {"id": number, "image": paths if len(paths) > 1 else paths[0], "conversations": turns}


def _save_crop(images: Path, task: Task, number: int, place: int, tiles: int) -> str:
    """Save a crop of a photograph that is cut into that many tiles: a square, or a row of tiles and a thumbnail."""
    photos = sources.photos("train")
    which, left, top = (keys("bench_train", what, task.seed, number, place) for what in ("photo", "left", "top"))
    photo = photos[int(choice_index(which, len(photos)))][1]
    cols, edge = max(1, tiles - 1), task.model.vision.tile_size
    width = min(photo.width, photo.height * cols)
    height = width // cols
    x, y = (int(uniform(k) * (room + 1)) for k, room in ((left, photo.width - width), (top, photo.height - height)))
    name = f"{number:04d}_{place}.jpg"
    crop = photo.crop((x, y, x + width, y + height)).resize((cols * edge, edge), Image.Resampling.BICUBIC)
    crop.save(images / name, quality=90)
    return name


def planner(index: Index, task: Task) -> Planner:
    """The planner of a run on these samples: its default costs, every target of the same weight."""
    settings = PlanSettings(
        seed=task.seed,
        pack_tokens=task.pack_tokens,
        packs_per_step=task.packs_per_step,
        loss_weighting="token",
        long_samples="error",
    )
    costs = shape_costs(task.model)
    packed = costs.integers(task.pack_tokens, settings.pack_tiles)
    return Planner(index, Mixture(index, MixtureSettings(), task.seed), settings, packed)


def load_steps(
    data: tuple[Index, Tokenizer], task: Task, rank: int, ranks: int, steps: int
) -> list[tuple[StepPlan, StepBatch]]:
    """Load a rank's part of the first steps as a run does, images decoded."""
    index, tokenizer = data
    loader = Loader(
        index,
        planner(index, task),
        DataLayout(ranks, task.packs_per_step // ranks),
        rank,
        rank,
        image_context=tokenizer.image_context,
        padding=tokenizer.end_of_text,
    )
    return list(loader.steps(0, steps))


def step_samples(plan: StepPlan, task: Task) -> list[int]:
    """The samples of a step in the order in which a sampler that knows nothing of packs draws them."""
    samples = np.sort(plan.packs.samples)
    order: list[int] = samples[permutation(len(samples), "bench_train", "order", task.seed, plan.step)].tolist()
    return order
