"""Context parallel attention: queries stay, keys and values travel round a ring, or round rings of rings.

    cp = 4, window = 2     cycle 0              cycle 1             rank = o·w + i, O = cp / w windows of w ranks
    window 0: ranks 0 1    block 0, then 1      block 2, then 3     inner ring: to the next rank of the window
    window 1: ranks 2 3    block 2, then 3      block 0, then 1     outer hop: to the next window, once in a cycle

The block of keys and values that a rank holds when a cycle starts is at once sent to the next window, which needs it a
whole cycle later; inside a cycle the next block is under way while the present one is computed. Partial outputs are
merged by their log-sum-exps in float32 (float64 for float64). The backward pass runs the rings again; the gradient of a
block follows it: round each window's ring, where the sum of the cycle is added up, and that sum by outer hops home.
Without a window there is one cycle and no outer hop. (Liu et al. 2023; LoongTrain's double ring, Gu et al. 2024.)

Per layer and rank (n = T / cp rows, κ KV heads of an hp rank, D head dim, b bytes of an element, B = max(b, 4)):

    axis  collective         forward                        backward
    cp    send, inner ring   O·(w − 1) × 2·n·κ·D·b          the same, and O·w × 2·n·κ·D·B   (none if w = 1)
    cp    send, outer hops   (O − 1) × 2·n·κ·D·b            the same, and O × 2·n·κ·D·B     (none if O = 1)

So one ring sends cp − 1 blocks forward, and backward cp − 1 blocks and cp gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from evovlm.csrc.ops import attention_block, attention_block_backward, merge_attention_
from evovlm.parallel.attention.blocks import Block


class Flight:
    """A tensor under way to the next rank, and the one that comes from the previous rank in its place."""

    def __init__(self, sent: Tensor, received: Tensor, works: list[dist.Work]) -> None:
        self._sent, self._received, self._works = sent, received, works

    def land(self) -> Tensor:
        """Wait (on CUDA: let the current stream wait); what has come."""
        for work in self._works:
            work.wait()
        return self._received


class Link:
    """One rank's neighbours in a ring of ranks.

    Args:
        ring: Global ranks, in the order in which tensors travel.
        index: This rank's place among them.
        group: A process group that holds all of them.
    """

    def __init__(self, ring: Sequence[int], index: int, group: dist.ProcessGroup) -> None:
        self._alone = len(ring) == 1
        self._next, self._previous = ring[(index + 1) % len(ring)], ring[index - 1]
        self._group = group

    def start(self, tensor: Tensor) -> Flight:
        """Send a contiguous tensor to the next rank and receive one like it; do not change it before it has landed."""
        if self._alone:
            return Flight(tensor, tensor, [])
        received = torch.empty_like(tensor)
        exchange = [
            dist.P2POp(dist.isend, tensor, self._next, self._group),
            dist.P2POp(dist.irecv, received, self._previous, self._group),
        ]
        return Flight(tensor, received, dist.batch_isend_irecv(exchange))


class Ring:
    """The way that blocks of keys and values take over the ranks of a context-parallel group.

    Args:
        cp: Number of ranks.
        rank: This rank's number among them.
        window: w, ranks of an inner ring; it divides cp, and is cp for one ring.
        group: The ranks, in order.
        outer: A group for the outer hops that holds the ranks with the same place in their windows, or all. One group's
            transfers follow each other on CUDA: only with a group of its own does an outer hop overlap a whole cycle.
    """

    def __init__(self, cp: int, rank: int, window: int, group: dist.ProcessGroup, outer: dist.ProcessGroup) -> None:
        self.num_windows, self.window = cp // window, window
        self._place = divmod(rank, window)
        ranks = dist.get_process_group_ranks(group)
        start = rank - rank % window
        self.inner = Link(ranks[start : start + window], rank % window, group)
        self.outer = Link(ranks[rank % window :: window], rank // window, outer)

    @property
    def sources(self) -> list[int]:
        """Whose block this rank holds at each step, in the order of steps."""
        outer, inner = self._place
        return [
            (outer - cycle) % self.num_windows * self.window + (inner - step) % self.window
            for cycle in range(self.num_windows)
            for step in range(self.window)
        ]

    def travel(self, block: Tensor) -> Iterator[Tensor]:
        """Send this rank's block on its way; what this rank holds at each step, the next one always under way."""
        for cycle in range(self.num_windows):
            hop = self.outer.start(block) if cycle + 1 < self.num_windows else None
            for step in range(self.window):
                flight = self.inner.start(block) if step + 1 < self.window else None
                yield block
                if flight is not None:
                    block = flight.land()
            if hop is not None:
                block = hop.land()


def ring_attention(qkv: Tensor, num_heads: int, ring: Ring, steps: Sequence[Sequence[Block]]) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of a ring.

    Args:
        qkv: ``[n, A + 2·K, D]``: query heads, key heads, value heads of this rank's rows.
        num_heads: A.
        ring: The way of the blocks.
        steps: For each of ``ring.sources`` the blocks to compute; those of this rank itself hold each row in one causal
            square, which comes before the rectangles.

    Returns:
        ``[n, A, D]``.
    """
    out: Tensor = _RingAttention.apply(qkv, num_heads, ring, steps)  # type: ignore[no-untyped-call]
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, ring: Ring, steps: Sequence[Sequence[Block]]) -> Tensor:
        ctx.num_heads, ctx.ring, ctx.steps = num_heads, ring, steps
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q = qkv[:, :num_heads]
        merged = torch.empty_like(q, dtype=wide, memory_format=torch.contiguous_format)
        lse = merged.new_empty(num_heads, len(q))
        for held, blocks in zip(ring.travel(qkv[:, num_heads:].contiguous()), steps, strict=True):
            k, v = held.chunk(2, dim=1)
            for block in blocks:
                part, part_lse = attention_block(q[block.queries], k[block.keys], v[block.keys], block.causal)
                if block.causal:  # the first that these queries meet
                    merged[block.queries], lse[:, block.queries] = part, part_lse
                else:
                    merge_attention_(merged[block.queries], lse[:, block.queries], part, part_lse)
        out = merged.to(qkv.dtype)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad, q, kv = grad.contiguous(), qkv[:, : ctx.num_heads], qkv[:, ctx.num_heads :].contiguous()
        wide = lse.dtype
        dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        # cycle_sum: gradient of the block of the last step, from the steps of its cycle so far; home: gradient of a
        # block that has left a window, from all its cycles so far, on its way to the next.
        cycle_sum: Tensor | None = None
        home: Flight | None = None
        for step, (held, blocks) in enumerate(zip(ring.travel(kv), ctx.steps, strict=True)):
            flight = ring.inner.start(cycle_sum) if cycle_sum is not None else None
            k, v = held.chunk(2, dim=1)
            dkv = torch.zeros_like(held, dtype=wide)
            dk, dv = dkv.chunk(2, dim=1)
            for block in blocks:
                rows, keys = block.queries, block.keys
                parts = attention_block_backward(
                    grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], block.causal
                )
                for total, part in zip((dq[rows], dk[keys], dv[keys]), parts, strict=True):
                    total += part
            cycle_sum = dkv
            if flight is not None:
                arrived = flight.land()
                if step % ring.window:
                    cycle_sum += arrived
                else:  # it was once round the window
                    home = _homeward(ring, home, arrived)
        assert cycle_sum is not None  # a ring has steps
        home = _homeward(ring, home, ring.inner.start(cycle_sum).land())
        return torch.cat((dq, home.land()), dim=1).to(qkv.dtype), None, None, None


def _homeward(ring: Ring, home: Flight | None, cycle_sum: Tensor) -> Flight:
    """Add a cycle's gradient to that of earlier cycles and send it to the next window."""
    return ring.outer.start(cycle_sum if home is None else cycle_sum + home.land())
