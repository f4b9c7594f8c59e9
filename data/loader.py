"""Prefetches whole steps: plans, reads and decodes ahead of the training loop, in threads, in order.

    consumer      step 7 ─────────────────►│ step 8 ───────────────────►│      takes a step, asks for one more
    planning      plan 9, tokens 9         │ plan 10, tokens 10         │      one thread: steps in order
    decoding      images of 8, 9 …         │ images of 9, 10 …          │      threads: PIL releases the GIL

Each rank decodes only the images that it encodes. At most ``prefetch`` steps are in the making while one is trained
on, which bounds memory. An error in a thread is raised where its step is asked for, and names the sample.
"""

import itertools
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from evovlm.data.batch import BatchSettings, V2PESettings
from evovlm.data.curriculum import Curriculum
from evovlm.data.images import MAX_PIXELS, Normalization, load_tiles
from evovlm.data.index import Index
from evovlm.data.plan import DataLayout, Planner, StepPlan
from evovlm.data.step_batch import ImageJob, StepBatch, build_step


class LoaderSettings(BaseModel):
    """How a rank reads its data.

    Attributes:
        normalization: mean and standard deviation of pixels: "imagenet", "clip" or "siglip".
        prefetch: steps made ahead.
        num_workers: threads that decode images.
        max_pixels: images with more pixels are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    normalization: Normalization = "imagenet"
    prefetch: int = Field(2, ge=1)
    num_workers: int = Field(2, ge=1)
    max_pixels: int = Field(MAX_PIXELS, gt=0)


@dataclass(frozen=True)
class _Pending:
    """A step whose images are still being decoded."""

    plan: StepPlan
    batch: StepBatch
    decoding: list[Future[None]]


class Loader:
    """Iterates over ``(StepPlan, StepBatch)`` of one rank.

    Args:
        index: the index that the planner plans from.
        planner: decides the steps; its seed keys V2PE strides, JPEG qualities and drop path.
        layout: data-parallel ranks, microbatches and encoders.
        rank: this data-parallel rank of the LLM.
        encoder: this data-parallel rank of the ViT.
        image_context: id of ``<IMG_CONTEXT>``.
        padding: id of ``<|endoftext|>``.
        v2pe: strides of visual positions.
        augment: degrade images of datasets that ask for it; False in validation.
        settings: normalisation, threads, prefetch.

    Attributes:
        wait_seconds: how long the last step was waited for.
        total_wait_seconds: how long all steps were waited for, since the loader was made.

    Raises:
        ValueError: no such rank, or the packs of a step cannot be shared out.
    """

    def __init__(
        self,
        index: Index,
        planner: Planner | Curriculum,
        layout: DataLayout,
        rank: int,
        encoder: int,
        *,
        image_context: int,
        padding: int,
        v2pe: V2PESettings | None = None,
        augment: bool = True,
        settings: LoaderSettings | None = None,
    ) -> None:
        planner.check_layout(layout)
        if not 0 <= rank < layout.num_ranks:
            raise ValueError(f"loader: rank {rank} of {layout.num_ranks} data-parallel ranks")
        if not 0 <= encoder < layout.encoders:
            raise ValueError(f"loader: encoder {encoder} of {layout.encoders} data-parallel ranks of the ViT")
        self._index = index
        self._planner = planner
        self._layout = layout
        self._rank, self._encoder = rank, encoder
        self._settings = settings or LoaderSettings()
        self._batch_settings = BatchSettings(
            seed=planner.settings.seed,
            pack_tokens=planner.settings.pack_tokens,
            loss_weighting=planner.settings.loss_weighting,
            image_context=image_context,
            padding=padding,
            v2pe=v2pe or V2PESettings(),
            augment=augment,
        )
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0

    def __iter__(self) -> Generator[tuple[StepPlan, StepBatch], None, None]:
        return self.steps()

    def steps(self, start: int = 0, stop: int | None = None) -> Generator[tuple[StepPlan, StepBatch], None, None]:
        """Yield steps ``start`` to ``stop - 1`` in order; its threads end with it, also on ``close()``.

        Args:
            start: first step; resuming is starting elsewhere.
            stop: step to stop before; None: the end of a sequential pass, or never.

        Raises:
            SampleError: an image cannot be decoded.
            ValueError: a sample is not what the index says.
        """
        ends = [end for end in (stop, self._planner.num_steps) if end is not None]
        upcoming = iter(range(start, min(ends)) if ends else itertools.count(start))
        ahead: deque[Future[_Pending]] = deque()
        planning = ThreadPoolExecutor(1, thread_name_prefix="plan")
        decoding = ThreadPoolExecutor(self._settings.num_workers, thread_name_prefix="decode")
        try:
            for step in itertools.islice(upcoming, self._settings.prefetch):
                ahead.append(planning.submit(self._prepare, step, decoding))
            while ahead:
                began = time.perf_counter()
                pending = ahead.popleft().result()
                for job in pending.decoding:
                    job.result()
                self.wait_seconds = time.perf_counter() - began
                self.total_wait_seconds += self.wait_seconds
                for step in itertools.islice(upcoming, 1):
                    ahead.append(planning.submit(self._prepare, step, decoding))
                yield pending.plan, pending.batch
        finally:
            # Planning first: it hands jobs to decoding.
            planning.shutdown(cancel_futures=True)
            decoding.shutdown(cancel_futures=True)

    def _prepare(self, step: int, decoding: ThreadPoolExecutor) -> _Pending:
        """Plan a step, make this rank's tensors, and start decoding its images."""
        plan = self._planner.plan_step(step, self._layout)
        batch, jobs = build_step(
            self._index,
            plan,
            self._batch_settings,
            data_rank=self._rank,
            encoder=self._encoder,
            num_encoders=self._layout.encoders,
        )
        return _Pending(plan, batch, [decoding.submit(self._decode, job, batch) for job in jobs])

    def _decode(self, job: ImageJob, batch: StepBatch) -> None:
        """Decode one image into its place."""
        name, ref = self._index.name(job.sample), job.ref
        tiles = load_tiles(
            ref,
            self._index.meta.tile_size,
            self._settings.normalization,
            job.jpeg_qualities,
            max_pixels=self._settings.max_pixels,
            name=name,
        )
        if len(tiles) != ref.num_tiles:  # a single tile would be broadcast over all places
            raise ValueError(f"sample '{name}': image '{ref.path}' gave {len(tiles)} tiles, planned {ref.num_tiles}")
        batch.tiles.numpy()[job.first : job.first + ref.num_tiles] = tiles
