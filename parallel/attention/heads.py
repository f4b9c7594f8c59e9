"""Head parallel attention (DeepSpeed-Ulysses): one all-to-all turns rows of all heads into all rows of some heads.

    before, rank r           on the wire, to rank p               after, rank p
    q [t, A, D]              q heads of p     A/hp                q [t·hp, A/hp, D]
    k [t, K, D]       ──►    k heads that     κ = max(K/hp, 1) ──► k [t·hp, κ, D]
    v [t, K, D]              those need, v                        v [t·hp, κ, D]

Queries, keys and values travel in one tensor. With fewer KV heads than ranks, each rank is sent just the one KV head
that its query heads need; the gradients of the copies are added where the head came from.

Per layer and rank (t = T / (cp·hp), D head dim, b bytes of an element; of each tensor the part 1/hp stays on the rank):

    axis  collective      forward                                           backward
    hp    all_to_all  1 × t·hp·(A/hp + 2κ)·D·b  and  1 × t·A·D·b            the same two
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def check_heads(num_heads: int, num_kv_heads: int, hp: int) -> None:
    """Check that heads can be split over hp ranks.

    Raises:
        ValueError: hp does not divide A, or neither divides K nor is a multiple of it.
    """
    if num_heads % hp:
        raise ValueError(
            f"hp = {hp} does not divide A = {num_heads} attention heads (those of one tp rank); "
            f"take hp from {[n for n in range(1, num_heads + 1) if num_heads % n == 0]}"
        )
    if num_kv_heads % hp and hp % num_kv_heads:
        raise ValueError(
            f"K = {num_kv_heads} KV heads (those of one tp rank) cannot be shared by hp = {hp} ranks alike: "
            f"one number must divide the other"
        )


def split_heads(q: Tensor, k: Tensor, v: Tensor, hp: int, group: dist.ProcessGroup) -> Tensor:
    """Give each rank all rows of its query heads and of the KV heads that they need.

    Args:
        q: ``[t, A, D]``; hp divides A.
        k: ``[t, K, D]``; hp divides K or K divides hp.
        v: ``[t, K, D]``.
        hp: Ranks of ``group``.
        group: The ranks, in the order of their rows.

    Returns:
        ``[t·hp, A/hp + 2κ, D]``: query heads, key heads, value heads.
    """
    joined: Tensor = _SplitHeads.apply(q, k, v, hp, group)  # type: ignore[no-untyped-call]
    return joined


def join_heads(out: Tensor, hp: int, group: dist.ProcessGroup) -> Tensor:
    """Give each rank its rows of all heads: ``[t·hp, A/hp, D] -> [t, A, D]``."""
    joined: Tensor = _JoinHeads.apply(out, hp, group)  # type: ignore[no-untyped-call]
    return joined


def _exchange(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part r of the first dimension to rank r; part r of the result came from rank r."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hp: int, group: dist.ProcessGroup) -> Tensor:
        num_rows, num_heads, head_dim = q.shape
        own, sharing = num_heads // hp, max(hp // k.shape[1], 1)
        kv = k.shape[1] * sharing // hp
        ctx.hp, ctx.group, ctx.own, ctx.kv, ctx.sharing = hp, group, own, kv, sharing
        sent = q.new_empty(hp, num_rows, own + 2 * kv, head_dim)
        sent[:, :, :own] = torch.unflatten(q, 1, (hp, own)).movedim(1, 0)
        # [ranks with other KV heads, ranks that share one, t, heads, D]
        shared = torch.unflatten(sent, 0, (hp // sharing, sharing))
        shared[..., own : own + kv, :] = torch.unflatten(k, 1, (-1, kv)).movedim(1, 0)[:, None]
        shared[..., own + kv :, :] = torch.unflatten(v, 1, (-1, kv)).movedim(1, 0)[:, None]
        return _exchange(sent, group).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        received = _exchange(torch.unflatten(grad.contiguous(), 0, (ctx.hp, -1)), ctx.group)
        dq = received[:, :, : ctx.own].movedim(0, 1).flatten(1, 2)
        wide = torch.promote_types(grad.dtype, torch.float32)
        copies = torch.unflatten(received[:, :, ctx.own :], 0, (-1, ctx.sharing))
        summed = copies.sum(1, dtype=wide).to(grad.dtype) if ctx.sharing > 1 else copies[:, 0]
        dk, dv = (x.movedim(0, 1).flatten(1, 2) for x in torch.split(summed, ctx.kv, dim=2))
        return dq, dk, dv, None, None


class _JoinHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, hp: int, group: dist.ProcessGroup) -> Tensor:
        ctx.hp, ctx.group = hp, group
        return _exchange(torch.unflatten(out.contiguous(), 0, (hp, -1)), group).movedim(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sent = torch.unflatten(grad, 1, (ctx.hp, -1)).movedim(1, 0).contiguous()
        return _exchange(sent, ctx.group).flatten(0, 1), None, None
