"""The baselines' ranks in ``bench train``: transformers' model under DDP or FSDP2, as one would write it with care.

    samples of a step ─┬─ one:    dealt in turn, one at a time                    ─┬─► forward, backward ─► … ─► clip ─►
                       └─ padded: sorted by length, dealt in turn, padded batches ─┘   no reduction       fused AdamW
                                                                                       but in the last
                                                                                       ▲ eager, or each block compiled

Samples are those of our step. A batch is padded on the right and comes without an attention mask, which causal
attention does not need: padding is after all that counts. Batches with images come last on every rank, so that the ViT
takes part in the backward that reduces gradients without a tile too many; a rank without any image in a step encodes a
blank one there. Weights are gathered once a step under FSDP2. Blocks are compiled one by one (``dynamic=True``), as
PyTorch and transformers advise for repeated blocks: seconds, where the whole model takes minutes for every kind of
batch.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from evovlm.data.images import load_tiles
from evovlm.data.index import Index
from evovlm.data.sample import IGNORE, expand_sample
from evovlm.data.step_plan import DataLayout
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.settings import OptimSettings
from evovlm.launch.bench_train_samples import Task, planner, step_samples
from evovlm.models.config import InternVLConfig
from evovlm.parallel.world import World

Wrap = Literal["ddp", "fsdp2"]
WRAPS: tuple[Wrap, ...] = get_args(Wrap)


@dataclass(frozen=True)
class Way:
    """One way to train transformers' model.

    Attributes:
        wrap: Data parallelism.
        batch: Samples of a padded batch; 1: one sample at a time.
        compiled: Whether blocks are compiled.
    """

    wrap: Wrap
    batch: int
    compiled: bool

    @property
    def name(self) -> str:
        """Its name in tables and reports, such as ``ddp-padded-compile``."""
        return f"{self.wrap}-{'padded' if self.batch > 1 else 'one'}-{'compile' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Batch:
    """What one forward gets: n samples of at most L tokens.

    Attributes:
        tokens: int64 [n, L], padded on the right.
        labels: int64 [n, L] as transformers wants them, not shifted; -100 where there is no target.
        tiles: float32 [N, 3, S, S].
    """

    tokens: Tensor
    labels: Tensor
    tiles: Tensor


class LossModel(nn.Module):
    """transformers' model and its own loss, over batches with and without images.

    Args:
        directory: An exported model.
        config: Its shape.
    """

    def __init__(self, directory: Path, config: InternVLConfig) -> None:
        from transformers import InternVLForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # in this rank
        super().__init__()
        self.model: Any = InternVLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self._blank = (1, 3, config.vision.tile_size, config.vision.tile_size)

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of ViT and LLM."""
        yield from self.model.model.vision_tower.encoder.layer
        yield from self.model.model.language_model.layers

    def forward(self, batch: Batch, denominator: Tensor, *, last: bool) -> Tensor:
        """Sum of the batch's cross-entropies over the number of targets of all ranks' batches.

        The last batch of a step uses every parameter, also without images.
        """
        some = len(batch.tiles) > 0
        unused = None
        if last and not some:  # before the LLM, so that gradients come in the order in which they do elsewhere
            unused = self.model.get_image_features(pixel_values=torch.zeros(self._blank)).pooler_output
        out = self.model(
            input_ids=batch.tokens,
            pixel_values=batch.tiles if some else None,
            labels=batch.labels,
            num_items_in_batch=denominator,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss if unused is None else loss + 0.0 * unused.sum()


class PeerTrainer:
    """A way of training transformers' model, on one rank.

    Args:
        world: The ranks.
        data: Index and tokenizer.
        task: Model and steps.
        steps: How many steps are loaded.
        way: How.
        directory: The exported model.
    """

    def __init__(
        self, world: World, data: tuple[Index, Tokenizer], task: Task, steps: int, way: Way, directory: Path
    ) -> None:
        self._ranks, self._way = world.size, way
        self._steps = [_load(data, task, number, world, way.batch) for number in range(steps)]
        model = LossModel(directory, task.model)
        if way.compiled:
            import torch._inductor.config as inductor

            inductor.compile_threads = 1  # a forked rank has no pool of compilers
            for block in model.blocks():
                block.compile(dynamic=True)
        self._model: nn.Module = model
        self._gathered: list[FSDPModule] = []
        if way.wrap == "ddp":
            # Of dimensions of size 1 alone.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self._model = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
        else:
            self._gathered = [fully_shard(block, reshard_after_forward=False) for block in (*model.blocks(), model)]
        settings = OptimSettings(lr=task.lr)
        self._max_norm = settings.clip_norm
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=0.0,
            fused=True,
        )

    def step(self, number: int) -> float:
        """Train a step; returns its loss over all ranks."""
        batches, targets = self._steps[number]
        denominator = torch.tensor(targets)
        total = torch.zeros(())
        for block in self._gathered:
            block.unshard()
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            with self._accumulate(last=last):
                # Gradients are averaged over ranks, and the loss is a sum over them.
                loss = self._model(batch, denominator, last=last) * self._ranks
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        dist.all_reduce(total)
        return total.item() / self._ranks

    def _accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Reduce gradients in the last backward of a step only."""
        if isinstance(self._model, DistributedDataParallel):
            return nullcontext() if last else self._model.no_sync()
        assert isinstance(self._model, FSDPModule)
        self._model.set_requires_gradient_sync(last)
        self._model.set_reshard_after_backward(last)
        self._model.set_is_last_backward(last)
        return nullcontext()


def _load(data: tuple[Index, Tokenizer], task: Task, number: int, world: World, size: int) -> tuple[list[Batch], int]:
    """A rank's batches of a step, and the number of targets of the whole step."""
    index, tokenizer = data
    plan = planner(index, task).plan_step(number, DataLayout(world.size, task.packs_per_step // world.size))
    samples = step_samples(plan, task)
    if size > 1:
        samples = _grouped([int(index.samples["num_tokens"][sample]) for sample in samples], samples, size)
    mine = samples[world.rank :: world.size]
    batches = [_batch(index, tokenizer, mine[first : first + size]) for first in range(0, len(mine), size)]
    batches.sort(key=lambda batch: len(batch.tiles) > 0)
    return batches, plan.num_supervised


def _grouped(lengths: list[int], samples: list[int], size: int) -> list[int]:
    """Order a step's samples as transformers' ``group_by_length`` does, which here sorts all of them together."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices(lengths, size, mega_batch_mult=-(-len(samples) // size), generator=generator)
    return [samples[i] for i in order]


def _batch(index: Index, tokenizer: Tokenizer, samples: list[int]) -> Batch:
    """Pad samples to the longest of them, and decode their images."""
    expanded = [expand_sample(index, sample, image_context=tokenizer.image_context) for sample in samples]
    longest = max(len(sample.tokens) for sample in expanded)
    tokens = torch.full((len(samples), longest), tokenizer.end_of_text)
    labels = torch.full((len(samples), longest), IGNORE)
    size = index.meta.tile_size
    tiles = [np.empty((0, 3, size, size), np.float32)]
    for row, sample in enumerate(expanded):
        length = len(sample.tokens)
        tokens[row, :length] = torch.from_numpy(sample.tokens)
        labels[row, 1:length] = torch.from_numpy(sample.labels[:-1])  # transformers shifts them itself
        tiles += [load_tiles(ref, size) for ref in sample.refs]
    return Batch(tokens, labels, torch.from_numpy(np.concatenate(tiles)))
