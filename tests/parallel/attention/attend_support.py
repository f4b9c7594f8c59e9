"""Runs sharded attention on a world of ranks, and states in one process what it must equal, row by row."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch._dynamo  # checkpoint() and dispatch modes load it: once here, not in each forked rank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from evovlm.parallel.attention import ShardedAttend
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout
from evovlm.parallel.mesh import ModuleMesh, build_mesh
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.world import World

HEAD_DIM = 8
KEEP_BLOCKS = partial(create_selective_checkpoint_contexts, [torch.ops.evovlm.attention.default])
"""Recompute all but the blocks of attention."""


@dataclass(frozen=True)
class Case:
    """One pack under one layout (of as many ranks as the world has)."""

    layout: Layout
    borders: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 4
    dtype: torch.dtype = torch.float64
    recompute: Literal["none", "selective", "full"] = "none"
    strided: bool = False
    prefixes: tuple[tuple[int, int, int, int], ...] = ()

    def inputs(self) -> list[Tensor]:
        """Whole q, k, v and the gradient of the output, float64."""
        generator = torch.Generator().manual_seed(hash((self.borders, self.num_heads)) % 2**31)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        return [torch.randn(self.borders[-1], n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in heads]

    def shards(self) -> SequenceShards:
        return SequenceShards(self.borders[-1], self.layout.cp, self.layout.hp)


class CountCollectives(TorchDispatchMode):
    """Counts what is called on process groups and the bytes that it carries, and notes when attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            self.calls[name] += 1
            self.order.append(name)
            self.bytes[name] += tensor.numel() * tensor.element_size()
        elif func.namespace == "evovlm" and func._opname in ("attention", "attention_backward"):
            self.order.append(func._opname)
        return func(*args, **(kwargs or {}))


def attend_rows(mesh: ModuleMesh, case: Case) -> list[Tensor]:
    """This rank's rows of the output and of the gradients of q, k and v."""
    rows = torch.from_numpy(case.shards().block_rows(mesh.place.cp, mesh.place.hp))
    q, k, v, grad = (x[rows].to(case.dtype) for x in case.inputs())
    leaves = [x.transpose(0, 2).contiguous() if case.strided else x for x in (q, k, v)]
    for leaf in leaves:
        leaf.requires_grad_()
    q, k, v = (leaf.transpose(0, 2) if case.strided else leaf for leaf in leaves)
    if case.strided:
        grad = grad.transpose(0, 2).contiguous().transpose(0, 2)
    attend = ShardedAttend(
        case.borders, case.shards(), mesh.place, mesh.groups, window=case.layout.window, prefixes=case.prefixes
    )
    if case.recompute == "none":
        out = attend(0, q, k, v)
    else:
        options = {"context_fn": KEEP_BLOCKS} if case.recompute == "selective" else {}
        out = checkpoint(attend, 0, q, k, v, use_reentrant=False, **options)
    out.backward(grad)
    grads = [leaf.grad.transpose(0, 2) if case.strided else leaf.grad for leaf in leaves]
    return [out.detach(), *grads]


def run_cases(size: int, cases: Sequence[Case]) -> list[list[Tensor]]:
    """For each case the whole output and gradients of q, k and v, put together from the ranks of one world."""

    def job(world: World) -> list[list[Tensor]]:
        meshes = {layout: build_mesh(layout, world.rank, "cpu") for layout in dict.fromkeys(c.layout for c in cases)}
        return [attend_rows(meshes[case.layout], case) for case in cases]

    return [
        put_together(case, parts) for case, parts in zip(cases, zip(*run_ranks(size, job), strict=True), strict=True)
    ]


def put_together(case: Case, parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """From rows of ranks to rows of the pack; data-parallel ranks beyond the first did the same and must agree."""
    wholes = [torch.full_like(x, float("nan"), dtype=case.dtype) for x in (*case.inputs()[:1], *case.inputs()[:3])]
    for rank, tensors in enumerate(parts):
        place = case.layout.coordinates(rank)
        rows = torch.from_numpy(case.shards().block_rows(place.cp, place.hp))
        for whole, tensor in zip(wholes, tensors, strict=True):
            if place.dp:
                assert torch.equal(whole[rows], tensor)
            whole[rows] = tensor
    return wholes


def reference(case: Case) -> list[Tensor]:
    """Dense float64 softmax with an explicit mask, and its gradients by autograd."""
    q, k, v, grad = case.inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = torch.bucketize(torch.arange(len(q)), torch.tensor(case.borders[1:]), right=True)
    forbidden = (segments[:, None] != segments[None]) | torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    for query_start, query_end, key_start, key_end in case.prefixes:
        forbidden[query_start:query_end, key_start:key_end] = False
    k, v = (x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=1) for x in leaves[1:])
    scores = torch.einsum("nad,mad->anm", leaves[0], k) / HEAD_DIM**0.5
    out = torch.einsum("anm,mad->nad", scores.masked_fill(forbidden, float("-inf")).softmax(-1), v)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def wrong_rows(case: Case, got: list[Tensor], tolerance: float) -> list[str]:
    """Each row of each tensor that is off by more than the tolerance (of the tensor's largest number)."""
    wrong = []
    for name, x, expected in zip(("out", "dq", "dk", "dv"), got, reference(case), strict=True):
        error = (x.double() - expected).abs().amax(dim=(1, 2)) / expected.abs().max().clamp_min(1)
        wrong += [
            f"{case}: {name} row {row} off by {off}" for row, off in enumerate(error.tolist()) if not off <= tolerance
        ]
    return wrong


def check_cases(size: int, cases: Sequence[Case], tolerance: Callable[[Case], float] = lambda case: 1e-10) -> None:
    """Run cases on one world and compare every row."""
    for case, got in zip(cases, run_cases(size, cases), strict=True):
        assert not wrong_rows(case, got, tolerance(case))


Counts = tuple[Counter[str], Counter[str], list[str]]


def count(size: int, cases: Sequence[Case]) -> list[list[Counts]]:
    """For each rank and case calls and bytes by collective, forward and backward, and the order of events."""

    def job(world: World) -> list[Counts]:
        counts = []
        meshes = {layout: build_mesh(layout, world.rank, "cpu") for layout in dict.fromkeys(c.layout for c in cases)}
        for case in cases:
            with CountCollectives() as counter:
                attend_rows(meshes[case.layout], case)
            counts.append((counter.calls, counter.bytes, counter.order))
        return counts

    return run_ranks(size, job)
