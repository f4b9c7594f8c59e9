"""Tensor-parallel modules against the same modules whole, in one process: outputs and every gradient."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from evovlm.parallel.collectives import part_bounds
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.tensor import shard_tensors
from evovlm.parallel.tensor_styles import local_part
from evovlm.parallel.world import World

A, K, D, H, F_SIZE = 8, 4, 2, 12, 20
HERE = {"rtol": 1e-10, "atol": 1e-10}


class RMSNorm(nn.Module):
    """As published decoders have it, with Hugging Face's name for epsilon."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Block(nn.Module):
    """Decoder block: grouped-query attention over all rows with normed heads, then SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(H), nn.LayerNorm(H)
        self.q, self.k, self.v = nn.Linear(H, A * D), nn.Linear(H, K * D), nn.Linear(H, K * D)
        self.q_norm = RMSNorm(D)
        self.o = nn.Linear(A * D, H)
        self.gate, self.up, self.down = nn.Linear(H, F_SIZE), nn.Linear(H, F_SIZE), nn.Linear(F_SIZE, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (proj(y).unflatten(-1, (-1, D)).movedim(-2, -3) for proj in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(A // K, dim=-3) for x in (k, v))
        out = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        x = x + self.o(out.movedim(-3, -2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


BLOCK = {
    "norm*": "norm_gather",
    "q": "colwise",
    "k": "colwise",
    "v": "colwise",
    "q_norm": "local",
    "o": "rowwise_scatter",
    "gate": "colwise",
    "up": "colwise",
    "down": "rowwise_scatter",
}


class VisionBlock(nn.Module):
    """ViT block with heads normed over the full width, a learned scale of its own and two-layer MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(H), RMSNorm(H)
        self.qkv = nn.Linear(H, A * 3 * D)  # rows by head, then q, k and v
        self.q_norm, self.k_norm = RMSNorm(A * D), RMSNorm(A * D)
        self.proj = nn.Linear(A * D, H)
        self.scale = nn.Parameter(torch.full((H,), 0.5))
        self.fc1, self.fc2 = nn.Linear(H, F_SIZE), nn.Linear(F_SIZE, H)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale  # a parameter that a method other than forward reads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, D)).unbind(-2)
        q, k = (norm(t.flatten(-2)).unflatten(-1, (-1, D)) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.scaled(self.proj(out.transpose(1, 2).flatten(-2)))
        return x + self.scaled(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


VISION = {
    "qkv": "colwise_copy",
    "?_norm": "width_norm",
    "proj": "rowwise_reduce",
    "fc1": "colwise_copy",
    "fc2": "rowwise_reduce",
}


def randomized(module: nn.Module) -> nn.Module:
    """In float64, every parameter drawn, so that no gradient is hidden by a symmetry."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_gradients(sharded: nn.Module, whole: nn.Module, mesh: DeviceMesh) -> int:
    """Compare this rank's part of each parameter's gradient; returns how many there were."""
    whole_parameters = dict(whole.named_parameters())
    assert [name for name, _ in sharded.named_parameters()] == list(whole_parameters)
    for name, parameter in sharded.named_parameters():
        grad, stated = parameter.grad, whole_parameters[name].grad
        assert isinstance(grad, DTensor), name
        assert stated is not None, name
        assert grad.placements == parameter.placements, name  # never Partial: nothing is left to reduce
        if isinstance(grad.placements[0], Shard):
            dim, rank = grad.placements[0].dim, mesh.get_local_rank()
            bounds = part_bounds(stated.shape[dim], mesh.size())
            stated = stated.narrow(dim, bounds[rank], bounds[rank + 1] - bounds[rank])
        torch.testing.assert_close(grad.to_local(), stated, **HERE, msg=lambda text, n=name: f"{n}: {text}")
    return len(whole_parameters)


def compare(whole: nn.Module, table: dict[str, str], x: Tensor, mesh: DeviceMesh, own: slice, **options: Any) -> int:
    """Run the module whole on x, and its parts on ``own`` rows (dimension −2), and compare everything."""
    sharded = copy.deepcopy(whole)
    shard_tensors(sharded, table, mesh)
    if "context_fn" in options:
        sharded.forward = partial(checkpoint, sharded.forward, use_reentrant=False, **options)
    whole_x, own_x = (x.clone().requires_grad_() for _ in range(2))
    for _ in range(2):  # gradients accumulate
        stated = whole(whole_x)
        coefficients = draw(*stated.shape, seed=9)
        (stated * coefficients).sum().backward()
        out = sharded(own_x[..., own, :])
        (out * coefficients[..., own, :]).sum().backward()
        torch.testing.assert_close(out, stated[..., own, :], **HERE)
    stated_grad, grad = whole_x.grad, own_x.grad
    assert stated_grad is not None
    assert grad is not None
    torch.testing.assert_close(grad[..., own, :], stated_grad[..., own, :], **HERE)
    return same_gradients(sharded, whole, mesh)


def keep_linears(*args: Any, **kwargs: Any) -> Any:
    """Selective recomputation keeps the very outputs that are reduced right after."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def embedding_and_head(mesh: DeviceMesh, vocab: int, padding: int | None, lead: tuple[int, ...]) -> int:
    """Embedding and a head tied to it."""

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(vocab, H, padding), nn.Linear(H, vocab, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.embed(ids), self.head.weight

    whole = randomized(Ends())
    sharded = copy.deepcopy(whole)
    shard_tensors(sharded, {"embed": "embedding", "head": "head"}, mesh)
    assert sharded.embed.weight is sharded.head.weight
    t, rank = 4 * mesh.size(), mesh.get_local_rank()
    ids = torch.randint(0, vocab, (*lead, t), generator=torch.Generator().manual_seed(3))
    own = slice(4 * rank, 4 * (rank + 1))
    coefficients, head_coefficients = draw(*lead, t, H), draw(vocab, H, seed=4)
    bounds = part_bounds(vocab, mesh.size())
    part = slice(bounds[rank], bounds[rank + 1])
    rows, weight = whole(ids)
    ((rows * coefficients).sum() + (weight * head_coefficients).sum()).backward()
    own_rows, weight = sharded(ids)
    torch.testing.assert_close(own_rows, rows[..., own, :], **HERE)
    ((own_rows * coefficients[..., own, :]).sum() + (local_part(weight) * head_coefficients[part]).sum()).backward()
    return same_gradients(sharded, whole, mesh)


def check_world(world: World) -> dict[str, Any]:
    mesh = DeviceMesh("cpu", torch.arange(world.size))
    own = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    block, vision = randomized(Block()), randomized(VisionBlock())
    result: dict[str, Any] = {
        "block": compare(copy.deepcopy(block), BLOCK, draw(8, H), mesh, own),
        "block with a batch of 1": compare(copy.deepcopy(block), BLOCK, draw(1, 8, H), mesh, own),
        "block, recomputed": compare(copy.deepcopy(block), BLOCK, draw(8, H), mesh, own, context_fn=keep_linears),
        "vision": compare(copy.deepcopy(vision), VISION, draw(3, 5, H), mesh, slice(None)),
        "vision, recomputed": compare(vision, VISION, draw(3, 5, H), mesh, slice(None), context_fn=keep_linears),
        "no tile": compare(randomized(VisionBlock()), VISION, draw(0, 5, H), mesh, slice(None)),
    }
    # 13 in parts of 7 and 6, or 4, 4, 4 and 1; 5 in 2, 2, 1 and none.
    for vocab, padding, lead in ((13, None, ()), (13, 12, (1,)), (7, 0, ())):
        result[f"vocabulary {vocab}"] = embedding_and_head(mesh, vocab, padding, lead)
    # MLP width 10: parts of 5, or of 3, 3, 3 and 1.
    uneven = randomized(nn.Sequential(RMSNorm(H), nn.Linear(H, 10), nn.Tanh(), nn.Linear(10, H)))
    table = {"0": "norm_gather", "1": "colwise", "3": "rowwise_scatter"}
    result["uneven"] = compare(uneven, table, draw(8, H), mesh, own)
    return result


@pytest.mark.parametrize("size", [2, 4])
def test_equal_to_one_process(size: int) -> None:
    for counts in run_ranks(size, check_world):
        assert counts == {
            "block": 17,
            "block with a batch of 1": 17,
            "block, recomputed": 17,
            "vision": 14,
            "vision, recomputed": 14,
            "no tile": 14,
            "vocabulary 13": 1,
            "vocabulary 7": 1,
            "uneven": 5,
        }
