"""Requests to prompts, as training rendered them: chat template, tiles, visual rows and positions.

turns ─ chat template ─► collapsed ids ─┐ (the answer's beginning is tokenised with its header "assistant\\n",
prefix ─────────────────────────────────┤  as a whole answer is)
images ─ tiling, decoding ─► tiles ─────┴─► Prompt: ids with visual runs, V2PE positions, rows of the runs, tiles
new ids ─────────────────────────────────► text of the continuation
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evovlm.data.annotation import with_system
from evovlm.data.batch import V2PESettings, run_deltas
from evovlm.data.chat import expand, prompt
from evovlm.data.errors import SampleError
from evovlm.data.images import Normalization, load_tiles, read_size
from evovlm.data.index_format import ImageRef
from evovlm.data.tiling import choose_grid, max_tiles_per_image, num_tiles
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.generate import Prompt
from evovlm.engine.generation import Request
from evovlm.models.config import InternVLConfig
from evovlm.models.v2pe import segment_positions

_HEADER = "assistant\n"
_IMAGES_KEPT = 4  # requests on the same images follow one another

Item = TypeVar("Item")
Made = TypeVar("Made")


class PromptMaker:
    """Makes prompts for one model.

    Args:
        tokenizer: That of the model.
        config: The model's shape: tile size, tokens of a tile, and how images are tiled.
        v2pe: Visual strides; ``random`` is not allowed here.
        normalize: How pixels are normalised.
        system_prompt: System turn of requests that bring none; None: that of ``data.chat``.
        max_tiles: Most tiles of a request's images; None: as the model's configuration says.

    Raises:
        ValueError: A random stride, or a tokenizer with more ids than the model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: InternVLConfig,
        *,
        v2pe: V2PESettings | None = None,
        normalize: Normalization = "imagenet",
        system_prompt: str | None = None,
        max_tiles: int | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.v2pe, self.normalize, self.system_prompt = v2pe or V2PESettings(), normalize, system_prompt
        self.max_tiles = max_tiles or config.max_tiles
        if self.v2pe.mode == "random":
            raise ValueError("generation needs a fixed visual stride, not a random one")
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.directory} has {tokenizer.vocab_size} ids, the model only "
                f"{config.decoder.vocab_size}: use the one that the model was trained with"
            )
        self._see = lru_cache(maxsize=_IMAGES_KEPT)(self._load)

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(dict.fromkeys((self.tokenizer.im_end, self.tokenizer.end_of_text)))

    def answer_ids(self, prefix: str) -> list[int]:
        """Return the ids of an answer's header and beginning."""
        return self.tokenizer.encode(_HEADER + prefix)

    def prompt(self, request: Request) -> Prompt:
        """Render a request and load its images.

        Raises:
            SampleError: The turns and the images do not go together, or an image cannot be read.
        """
        turns = with_system(request.turns, self.system_prompt)
        chat = prompt(turns, len(request.images), self.tokenizer, name=request.name)
        header = len(self.answer_ids(""))
        ids = np.concatenate([chat.ids[:-header], self.answer_ids(request.prefix)]).astype(np.int32)
        return self.lay_out(ids, chat.insert_at, request.images, request.name)

    def lay_out(self, ids: NDArray[np.int32], insert_at: Sequence[int], images: tuple[Path, ...], name: str) -> Prompt:
        """Load images, and put their runs into ids that are rendered.

        Args:
            ids: int32 ``[n]``, collapsed, as ``evovlm.data.chat`` renders them.
            insert_at: Where in ``ids`` the run of each image belongs.
            images: Files.
            name: What error messages call them.

        Raises:
            SampleError: An image cannot be read.
        """
        try:
            counts, tiles = self._see(images)
        except SampleError as error:
            raise SampleError(error.reason, error.detail, name) from error
        lengths = [count * self.config.tokens_per_tile for count in counts]
        nothing = np.zeros(len(ids), dtype=np.bool_)
        tokens, _ = expand(ids, nothing, insert_at, lengths, self.tokenizer.image_context)
        starts = np.array(insert_at, dtype=np.int64) + np.cumsum([0, *lengths])[: len(lengths)]
        runs = list(zip(starts.tolist(), lengths, strict=True))
        rows: list[NDArray[np.int64]] = [np.arange(start, start + length) for start, length in runs]
        return Prompt(
            tokens=tokens,
            positions=segment_positions(len(tokens), runs, run_deltas(self.v2pe, 0, 0, 0, len(runs))),
            visual_rows=np.concatenate(rows) if rows else np.empty(0, np.int64),
            tiles=tiles,
        )

    def continuation(self, request: Request, ids: list[int]) -> str:
        """Turn new ids into text; read after what they continue, since a token may mean another text at a beginning."""
        known = self.answer_ids(request.prefix)
        begin, whole = self.tokenizer.decode(known), self.tokenizer.decode([*known, *ids])
        return whole[len(begin) :] if whole.startswith(begin) else self.tokenizer.decode(ids)

    def _load(self, images: tuple[Path, ...]) -> tuple[list[int], Tensor]:
        """Tile and decode images; returns tiles of each, and all of them, float32 ``[N, 3, S, S]``."""
        size, cap = self.config.vision.tile_size, max_tiles_per_image(self.max_tiles, len(images))
        counts, tiles = [], [np.empty((0, 3, size, size), dtype=np.float32)]
        for path in images:
            width, height = read_size(path)
            grid = choose_grid(width, height, min(self.config.min_tiles, cap), cap, size)
            thumbnail = self.config.thumbnail and grid.cols * grid.rows > 1
            counts.append(num_tiles(grid, thumbnail))
            ref = ImageRef(path, -1, grid.cols, grid.rows, thumbnail, counts[-1], insert_at=0)
            tiles.append(load_tiles(ref, size, self.normalize))
        return counts, torch.from_numpy(np.concatenate(tiles))


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[tuple[Item, Made]]:
    """Do work on items in threads, up to ``ahead`` items before they are asked for; yields them and what was made.

    Raises:
        Exception: What the work on the next item raised.
    """
    under_way: deque[tuple[Item, Future[Made]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                under_way.append((item, pool.submit(work, item)))
                if len(under_way) > ahead:
                    first, made = under_way.popleft()
                    yield first, made.result()
            while under_way:
                first, made = under_way.popleft()
                yield first, made.result()
        finally:
            for _, made in under_way:
                made.cancel()
