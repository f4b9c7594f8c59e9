"""Prefetches whole steps: plans, reads and decodes ahead of the training loop, and hands the steps over in order.

    consumer      step 7 ─────────────────►│ step 8 ───────────────────►│      takes a step, asks for one more
    planning      plan 9, tokens 9         │ plan 10, tokens 10         │      one thread: steps in order
    decoding      images of 8, 9 …         │ images of 9, 10 …          │      processes, into shared memory

Each rank decodes only the images that it encodes. At most ``prefetch`` steps are in the making while one is trained on.
Their tiles lie in buffers that are used again when nothing looks into them any more: prefetch + 2 of them, if a batch
is dropped when the next has come. An error is raised where its step is asked for, and names the sample.
"""

import itertools
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evovlm.data.batch import BatchSettings, V2PESettings
from evovlm.data.curriculum import Curriculum
from evovlm.data.decode import DecodeOptions, TileJob
from evovlm.data.decode_pool import DecodePool, DecodingTime, InlineDecoder
from evovlm.data.images import MAX_PIXELS, Normalization
from evovlm.data.index import Index
from evovlm.data.plan import Planner
from evovlm.data.step_batch import ImageJob, StepBatch, build_step
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.tile_buffers import CudaPinning, TileBuffers


class LoaderSettings(BaseModel):
    """How a rank reads its data.

    Attributes:
        normalization: mean and standard deviation of pixels: "imagenet", "clip" or "siglip".
        prefetch: steps made ahead.
        num_workers: processes that decode images; 0: the thread that plans decodes, too, which starts sooner.
        max_pixels: images with more pixels are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    normalization: Normalization = "imagenet"
    prefetch: int = Field(2, ge=1)
    num_workers: int = Field(0, ge=0)
    max_pixels: int = Field(MAX_PIXELS, gt=0)


@dataclass(frozen=True)
class StepTimings:
    """Where the time of making a step went; most of it passes while earlier steps are trained on.

    Attributes:
        planning: seconds to plan the step.
        building: seconds to read its tokens and make its tensors.
        decoding: seconds of decoding its images, added up over workers.
        decoding_cpu: processor time of that, in seconds.
        images: images decoded, parts of images included.
        tiles: tiles decoded.
        buffers: buffers that hold the tiles of steps, in use or free.
        buffer_bytes: memory that these take.
    """

    planning: float
    building: float
    decoding: float
    decoding_cpu: float
    images: int
    tiles: int
    buffers: int
    buffer_bytes: int

    @property
    def images_per_second(self) -> float:
        """Images that one worker decodes in a second; 0 for a step without images."""
        return self.images / self.decoding if self.decoding else 0.0


@dataclass(frozen=True)
class _Pending:
    """A step whose images are still being decoded."""

    plan: StepPlan
    batch: StepBatch
    decoding: Future[DecodingTime]
    planning: float
    building: float
    images: int


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
        settings: normalisation, workers, prefetch.
        device: where batches are going to be copied. For CUDA, tensors are page-locked, so that
            ``.to(device, non_blocking=True)`` does not wait. If a copy is made on a stream of its own, let the current
            stream wait for that one before the batch is dropped.

    Attributes:
        wait_seconds: how long the last step was waited for.
        total_wait_seconds: how long all steps were waited for, since the loader was made.
        timings: how long the last step took to make; None before the first.

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
        device: torch.device | None = None,
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
        self._device = device if device is not None and device.type == "cuda" else None
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self.timings: StepTimings | None = None

    def __iter__(self) -> Generator[tuple[StepPlan, StepBatch], None, None]:
        return self.steps()

    def steps(self, start: int = 0, stop: int | None = None) -> Generator[tuple[StepPlan, StepBatch], None, None]:
        """Yield steps ``start`` to ``stop - 1`` in order; its thread and processes end with it, also on ``close()``.

        A batch may be kept for as long as it is wanted: its memory is not used again before.

        Args:
            start: first step; resuming is starting elsewhere.
            stop: step to stop before; None: the end of a sequential pass, or never.

        Raises:
            SampleError: an image cannot be decoded.
            ValueError: a sample is not what the index says.
            WorkerDiedError: a process that decodes was killed, or has failed.
        """
        ends = [end for end in (stop, self._planner.num_steps) if end is not None]
        upcoming = iter(range(start, min(ends)) if ends else itertools.count(start))
        ahead: deque[Future[_Pending]] = deque()
        with ExitStack() as ending:
            buffers = TileBuffers(CudaPinning(self._device) if self._device else None)
            ending.callback(buffers.close)
            use_device = (torch.cuda.set_device, (self._device,)) if self._device else (None, ())
            planning = ThreadPoolExecutor(1, "plan", *use_device)
            ending.callback(planning.shutdown, cancel_futures=True)
            decoder = self._start_decoder(buffers)
            ending.callback(decoder.close)  # the first to end: planning may wait for it
            for step in itertools.islice(upcoming, self._settings.prefetch):
                ahead.append(planning.submit(self._prepare, step, buffers, decoder))
            while ahead:
                plan, batch = self._finish(ahead.popleft(), buffers)
                for step in itertools.islice(upcoming, 1):
                    ahead.append(planning.submit(self._prepare, step, buffers, decoder))
                yield plan, batch

    def _start_decoder(self, buffers: TileBuffers) -> DecodePool | InlineDecoder:
        options = DecodeOptions(self._index.meta.tile_size, self._settings.normalization, self._settings.max_pixels)
        if self._settings.num_workers == 0:
            return InlineDecoder(options)
        return DecodePool(self._settings.num_workers, options, buffers.file)

    def _prepare(self, step: int, buffers: TileBuffers, decoder: DecodePool | InlineDecoder) -> _Pending:
        """Plan a step, make this rank's tensors, and start decoding its images."""
        began = time.perf_counter()
        plan = self._planner.plan_step(step, self._layout)
        planned = time.perf_counter()
        offset = 0

        def allocate(num_tiles: int) -> Tensor:
            nonlocal offset
            tiles, offset = buffers.new_tiles(num_tiles, self._index.meta.tile_size)
            return tiles

        batch, jobs = build_step(
            self._index, plan, self._batch_settings, data_rank=self._rank, encoder=self._encoder, allocate=allocate
        )
        if self._device is not None:
            _pin(batch)
        tile_jobs = [_tile_job(job, batch.tiles, offset) for job in jobs]
        built = time.perf_counter()
        decoding = decoder.submit(tile_jobs, batch.tiles, offset)
        return _Pending(plan, batch, decoding, planned - began, built - planned, len(jobs))

    def _finish(self, future: Future[_Pending], buffers: TileBuffers) -> tuple[StepPlan, StepBatch]:
        """Wait for a step."""
        began = time.perf_counter()
        pending = future.result()
        decoding = pending.decoding.result()
        self.wait_seconds = time.perf_counter() - began
        self.total_wait_seconds += self.wait_seconds
        self.timings = StepTimings(
            planning=pending.planning,
            building=pending.building,
            decoding=decoding.seconds,
            decoding_cpu=decoding.cpu_seconds,
            images=pending.images,
            tiles=len(pending.batch.tiles),
            buffers=buffers.num_buffers,
            buffer_bytes=buffers.num_bytes,
        )
        return pending.plan, pending.batch


def _tile_job(job: ImageJob, tiles: Tensor, offset: int) -> TileJob:
    """Say where in the shared memory an image goes, if ``tiles`` lie at ``offset`` of it."""
    ref, count = job.ref, job.end - job.begin
    if not 0 <= job.slot <= job.slot + count <= len(tiles):  # a worker would write over another step
        raise ValueError(
            f"sample '{job.name}': {count} tiles of image '{ref.path}' from slot {job.slot} on, of {len(tiles)} slots"
        )
    where = offset + job.slot * tiles[:1].nbytes
    grid = (ref.cols, ref.rows, ref.thumbnail)
    return TileJob(job.name, str(ref.path), ref.frame, *grid, job.begin, job.end, job.jpeg_qualities, where)


def _pin(batch: StepBatch) -> None:
    """Move to page-locked memory what is going to be copied to a device; tiles are in it already."""
    batch.tile_keys = batch.tile_keys.pin_memory()
    for pack in batch.packs:
        for field in fields(pack):
            if field.name not in ("cu_seqlens", "prefixes", "pairs"):  # these are read on the CPU
                setattr(pack, field.name, getattr(pack, field.name).pin_memory())
