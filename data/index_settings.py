"""What an index is to be built from, and how."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evovlm.data.images import MAX_PIXELS
from evovlm.data.index_format import MAX_GRID_TILES, Kind
from evovlm.data.video import frame_indices

Positive = Annotated[int, Field(ge=1)]


class IndexSettings(BaseModel):
    """Settings of ``evovlm index``.

    Attributes:
        meta: InternVL's meta JSON.
        tokenizer: folder with tokenizer.json.
        out: folder that the index gets.
        kind: what the lines are: "conversations", or "preference": pairs of a chosen and a rejected answer.
        tile_size: pixels per tile side.
        tokens_per_tile: visual tokens that the model makes of a tile (256 for 448 pixels).
        min_tiles: fewest tiles of an image's grid.
        max_tiles: most tiles of an image's grid, without the thumbnail, at most 254; ``max_dynamic_patch`` of a
            dataset wins.
        thumbnail: one more tile with the whole image where the grid has more than one.
        max_tokens: most expanded tokens of a sample; None: no limit, so that an index serves packs of any length (a
            recipe's ``data.long_samples`` says what becomes of samples that are longer than a pack).
        overlong: what happens to a sample above ``max_tokens``: "skip" counts and lists it; "error" stops.
        system_prompt: system turn of conversations that bring none; None: the template's own (``chat.DEFAULT_SYSTEM``).
        num_workers: processes; 0: one per core.
        check_images: "header" reads every image's size; "decode" decodes all of it, which finds truncated files too
            and is several times slower.
        video_min_frames: fewest frames wanted of a video.
        video_max_frames: most frames wanted of a video; the number is drawn between the two for each video.
        video_sampling: which frames: "rand", "middle" or "fpsX" (``video.frame_indices``).
        video_folder_fps: frames per second at which folders of frames were taken, to find a ``clip``.
        max_pixels: images with more are taken for decompression bombs.
        seed: of what is drawn while indexing: the frames of videos.
        strict: make the first unusable line an error.
        max_skipped: share of a dataset's lines (from 20 lines on) that may be unusable before it is an error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    meta: Path
    tokenizer: Path
    out: Path
    kind: Kind = "conversations"
    tile_size: Positive = 448
    tokens_per_tile: Positive = 256
    min_tiles: Positive = 1
    max_tiles: Annotated[int, Field(ge=1, le=MAX_GRID_TILES)] = 12
    thumbnail: bool = True
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    overlong: Literal["skip", "error"] = "skip"
    system_prompt: str | None = None
    num_workers: Annotated[int, Field(ge=0)] = 0
    check_images: Literal["header", "decode"] = "header"
    video_min_frames: Positive = 8
    video_max_frames: Positive = 32
    video_sampling: str = "rand"
    video_folder_fps: Annotated[float, Field(gt=0)] = 1.0
    max_pixels: Positive = MAX_PIXELS
    seed: int = 0
    strict: bool = False
    max_skipped: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _check(self) -> "IndexSettings":
        for low, high in (("min_tiles", "max_tiles"), ("video_min_frames", "video_max_frames")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}")
        frame_indices(1, 1, self.video_sampling)  # raises for a name that it does not know
        return self

    @property
    def num_processes(self) -> int:
        """Processes that do the work: ``num_workers``, or the cores that this process may use."""
        return self.num_workers or len(os.sched_getaffinity(0))
