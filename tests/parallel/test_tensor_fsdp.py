"""Tensor parallelism under ``fully_shard`` on a 2-D mesh: a tied language model against one process, two microbatches.

The ranks of the shard axis see different rows; gradients must be the sum over them, whenever they are reduced.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from evovlm.engine.losses import IGNORE, Targets, weighted_cross_entropy
from evovlm.parallel.collectives import part_bounds
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.tensor import shard_tensors
from evovlm.parallel.world import World

H, F_SIZE, T = 6, 10, 8


class Block(nn.Module):
    """An MLP with biases, a norm before it and one after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(H), nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, F_SIZE), nn.Linear(F_SIZE, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(F.silu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Embedding, two blocks, tied head."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, H), nn.Linear(H, vocab, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, loss: Any) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = loss(x, self.head.weight)
        return out


TABLE = {
    "embed": "embedding",
    "head": "head",
    "blocks.*.norm": "norm_gather",
    "blocks.*.last": "norm",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise_scatter",
}


def build(vocab: int) -> Model:
    model = Model(vocab).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def microbatch(vocab: int, data_rank: int, number: int) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(10 * data_rank + number)
    ids, labels = torch.randint(0, vocab, (2, T), generator=generator)
    labels[torch.rand(T, generator=generator) < 0.4] = IGNORE
    return ids, Targets.of(labels, torch.rand(T, generator=generator), torch.device("cpu"))


def plain_loss(hidden: Tensor, head: Tensor, targets: Targets) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden[targets.rows], head), targets.labels, reduction="none")
    return (losses * targets.weights.double()).sum()


class Functional(TorchDispatchMode):
    """Counts DTensor's own collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def own_part(whole: Tensor, parameter: DTensor, mesh: DeviceMesh) -> Tensor:
    """What this rank holds of a tensor: its tp part, of which ``fully_shard`` cuts the first dimension."""
    placement, tp, shard = parameter.placements[-1], mesh["tp"], mesh["shard"]
    if isinstance(placement, Shard):
        bounds = part_bounds(whole.shape[placement.dim], tp.size())
        low, high = bounds[tp.get_local_rank()], bounds[tp.get_local_rank() + 1]
        whole = whole.narrow(placement.dim, low, high - low)
    bounds = part_bounds(whole.shape[0], shard.size())
    return whole[bounds[shard.get_local_rank()] : bounds[shard.get_local_rank() + 1]]


def train(world: World, shards: int, vocab: int, dtype: torch.dtype, *, sync_each: bool, reshard: bool) -> float:
    """Two microbatches on every data rank; returns the largest error of losses and gradients, over their size."""
    size = world.size
    mesh = DeviceMesh("cpu", torch.arange(size).view(shards, size // shards), mesh_dim_names=("shard", "tp"))
    whole, model = build(vocab), build(vocab).to(torch.promote_types(dtype, torch.float32))
    shard_tensors(model, TABLE, mesh["tp"])
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32))
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=mesh["shard"], reshard_after_forward=reshard, mp_policy=precision)
    assert isinstance(model, FSDPModule)
    group, data_rank = mesh["tp"].get_group(), mesh["shard"].get_local_rank()
    errors = [0.0]
    for number in range(2):
        model.set_requires_gradient_sync(sync_each or number == 1)
        for other in range(shards):
            ids, targets = microbatch(vocab, other, number)
            stated = whole(ids, lambda hidden, head, t=targets: plain_loss(hidden, head, t))
            stated.backward()
            if other != data_rank:
                continue
            with Functional() as functional:
                loss = model(
                    ids,
                    lambda hidden, head, t=targets: weighted_cross_entropy(hidden, head, t, group=group, chunk_rows=3),
                )
                loss.backward()
            assert not functional.counts
            errors.append(((loss - stated).abs() / (1 + stated.abs())).item())
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert reference.grad is not None
        assert parameter.grad is not None, name
        # fully_shard takes the mean over the shard axis.
        part = own_part(reference.grad, parameter, mesh) / shards
        assert parameter.grad.to_local().shape == part.shape, name
        if part.numel():
            errors.append(((parameter.grad.to_local() - part).abs().max() / reference.grad.abs().max()).item())
    return max(errors)


def test_two_microbatches_equal_one_process() -> None:
    def job(world: World) -> dict[str, float]:
        results = {}
        for shards, vocab in ((2, 13), (1, 13), (1, 7)):  # parts of 7, 6; of 4, 4, 4, 1; of 2, 2, 2, 1
            for sync_each in (True, False):
                for reshard in (True, False):
                    name = f"{shards} shards, V {vocab}, sync {sync_each}, reshard {reshard}"
                    results[name] = train(world, shards, vocab, torch.float64, sync_each=sync_each, reshard=reshard)
        results["narrow"] = train(world, 2, 13, torch.bfloat16, sync_each=False, reshard=True)
        return results

    for results in run_ranks(4, job):
        assert len(results) == 13
        assert results.pop("narrow") < 0.1
        assert max(results.values()) == pytest.approx(0, abs=1e-10)
