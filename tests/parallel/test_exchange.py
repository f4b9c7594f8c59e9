"""The vision exchange on real worlds: forward is a direct gather, backward is autograd's of one process."""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.parallel.exchange import exchange, start_exchange, start_return
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.routes import Chunk, plan_exchange
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.traffic import TileUses
from evovlm.parallel.world import World

TOKENS, HIDDEN, NUM_ROWS, NUM_MICROBATCHES = 5, 3, 32, 2
PLANS = {
    2: [(Layout(cp=2), 1), (Layout(tp=2), 2), (Layout(pp=2), 1)],
    4: [(Layout(dp=2, cp=2), 1), (Layout(pp=2, hp=2), 2), (Layout(cp=2, tp=2), 4)],
    8: [(Layout(dp=2, cp=2, tp=2), 1), (Layout(pp=2, dp=2, hp=2, placement="context_first"), 2)],
}
KINDS = ("mixed", "uneven", "giant", "none")
FORMS = (("autograd", 1), ("autograd", 3), ("autograd", 1000), ("started", 3))


def make_plan(llm: Layout, vit_tp: int) -> ParallelPlan:
    vit = Layout(dp=llm.size // vit_tp, tp=vit_tp)
    return ParallelPlan(llm=llm, vit=vit, projector=Layout(dp=llm.size))


def make_uses(plan: ParallelPlan, kind: str) -> TileUses:
    """``mixed``: tiles anywhere, some used again; ``uneven``: all on one encoder; ``giant``: one image fills a pack."""
    random = np.random.default_rng(len(kind) + plan.size)
    uses, count = [], [0] * plan.vit.dp
    tiles: list[tuple[int, int]] = []
    for dp, microbatch in product(range(plan.llm.dp), range(NUM_MICROBATCHES)):
        if kind == "none" or (kind == "giant" and (dp or microbatch)) or (kind == "uneven" and not microbatch):
            continue
        for row in range(0, NUM_ROWS - TOKENS + 1, TOKENS if kind == "giant" else TOKENS + 3):
            if kind == "mixed" and tiles and random.random() < 0.33:
                tile = tiles[random.integers(len(tiles))]
            else:
                encoder = int(random.integers(plan.vit.dp)) if kind == "mixed" else plan.vit.dp - 1
                tile = (encoder, count[encoder])
                count[encoder] += 1
                tiles.append(tile)
            uses.append((*tile, dp, microbatch, row))
    columns = np.array(uses, dtype=np.int64).reshape(-1, 5).T
    return TileUses(*columns, num_tiles=np.array(count))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Step:
    """One step's tiles, and what one process makes of them: packs and the gradient of every tile's tokens."""

    def __init__(self, plan: ParallelPlan, kind: str, dtype: torch.dtype = torch.float64) -> None:
        self.plan, self.uses = plan, make_uses(plan, kind)
        self.first = np.cumsum(self.uses.num_tiles) - self.uses.num_tiles
        self.values = noise(int(self.uses.num_tiles.sum()), TOKENS, HIDDEN, seed=1).to(dtype).requires_grad_()
        self.weight = noise(plan.llm.dp, NUM_MICROBATCHES, NUM_ROWS, HIDDEN, seed=2).to(dtype)
        self.shards = SequenceShards.of(plan.llm, NUM_ROWS)
        self.packs = torch.zeros_like(self.weight)
        u = self.uses
        for e, slot, dp, microbatch, row in zip(u.encoder, u.slot, u.dp, u.microbatch, u.row, strict=True):
            self.packs[dp, microbatch, row : row + TOKENS] = self.values[self.first[e] + slot]
        loss = (self.weight * self.packs**2).sum()
        self.grad = torch.zeros_like(self.values)
        if loss.requires_grad:
            (self.grad,) = torch.autograd.grad(loss, self.values)
        self.packs = self.packs.detach()

    def local(self, packs: Tensor, rank: int) -> Tensor:
        """This rank's rows of its packs, ``[M, T / (cp·hp·tp), H]``; none behind the first pipeline stage."""
        place = self.plan.llm.coordinates(rank)
        return packs[place.dp][:, torch.from_numpy(self.shards.rows(place))] * (place.pp == 0)

    def run(self, rank: int, form: str, chunk_tiles: int) -> dict[str, float]:
        """Carry the exchange out in this world; return the largest errors of forward and backward."""
        routes = self.uses.routes(self.plan, rank)
        planned = plan_exchange(routes, self.plan, rank, self.shards, TOKENS, chunk_tiles)
        begin, end = self.first[self.plan.vit.coordinates(rank).dp] + np.array(
            (0, self.uses.num_tiles[self.plan.vit.coordinates(rank).dp])
        )
        tiles = self.values[begin:end].detach().clone().requires_grad_()  # the encoder's, alone
        parts = [tiles[list(c.slots)][list(c.tiles)].flatten(0, 1) for c in planned.chunks]
        if begin == end:  # an encoder without tiles may hand over rows that no parameter has touched
            parts = [part.detach() for part in parts]
        received = (self.autograd if form == "autograd" else self.started)(parts, planned.chunks)
        weight, loss = self.local(self.weight, rank), received.sum() * 0
        errors = []
        for microbatch, expected in enumerate(self.local(self.packs, rank)):
            rows, sources = (torch.from_numpy(x) for x in planned.of_microbatch(microbatch))
            got = torch.zeros_like(expected).index_copy(0, rows, received[sources])
            errors.append((got - expected).abs().max())
            loss = loss + (weight[microbatch] * got**2).sum()
        if form == "autograd":
            loss.backward()
        else:
            (grad,) = torch.autograd.grad(loss, received)
            grads = grad.split([c.num_received for c in planned.chunks])
            sent = [start_return(g, c) for g, c in zip(grads, planned.chunks, strict=True)]
            returned = [pending.wait() for pending in sent]
            if begin < end:
                torch.autograd.backward(parts, returned)
        handed = [slot for c in planned.chunks for slot in np.array(c.slots)[list(c.tiles)]]
        wanted = torch.zeros_like(tiles)
        wanted[handed] = self.grad[begin:end][handed]
        grad = torch.zeros_like(tiles) if tiles.grad is None else tiles.grad
        return {"forward": float(max(errors)), "backward": float((grad - wanted).abs().sum())}

    @staticmethod
    def autograd(parts: list[Tensor], chunks: tuple[Chunk, ...]) -> Tensor:
        return torch.cat([exchange(part, chunk) for part, chunk in zip(parts, chunks, strict=True)])

    @staticmethod
    def started(parts: list[Tensor], chunks: tuple[Chunk, ...]) -> Tensor:
        """All chunks on their way at once, received into one buffer."""
        buffer = parts[0].new_empty(sum(c.num_received for c in chunks), HIDDEN)
        into = buffer.split([c.num_received for c in chunks])
        pending = [start_exchange(p, c, out=out) for p, c, out in zip(parts, chunks, into, strict=True)]
        assert all(p.wait() is out for p, out in zip(pending, into, strict=True))
        return buffer.detach().requires_grad_()


@cache
def observed(size: int) -> dict[tuple[int, str, tuple[str, int]], list[dict[str, float]]]:
    """Errors of every case of a world, by rank."""
    cases = list(product(range(len(PLANS[size])), KINDS, FORMS))

    def job(world: World) -> list[dict[str, float]]:
        steps = {(p, kind): Step(make_plan(*PLANS[size][p]), kind) for p, kind, _ in cases}
        return [steps[p, kind].run(world.rank, *form) for p, kind, form in cases]

    by_rank = run_ranks(size, job)
    return {case: [errors[n] for errors in by_rank] for n, case in enumerate(cases)}


@pytest.mark.parametrize("size", PLANS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_one_process(size: int, kind: str, form: tuple[str, int]) -> None:
    found = {case: errors for case, errors in observed(size).items() if case[1:] == (kind, form)}
    assert len(found) == len(PLANS[size])
    for case, errors in found.items():
        assert max(e["forward"] for e in errors) == 0, case
        assert max(e["backward"] for e in errors) <= 1e-12, case


def test_the_cases_are_what_they_are_called() -> None:
    for plan in (make_plan(*choice) for choices in PLANS.values() for choice in choices):
        mixed, uneven, giant, none = (make_uses(plan, kind) for kind in KINDS)
        tiles = set(zip(mixed.encoder, mixed.slot, strict=True))
        assert len(tiles) < len(mixed.slot)  # some are used again
        assert np.count_nonzero(uneven.num_tiles) == 1 < uneven.num_tiles.max()
        assert giant.num_tiles.max() == giant.num_tiles.sum() == NUM_ROWS // TOKENS
        assert none.num_tiles.sum() == len(none.slot) == 0


def one_tile(world: World) -> tuple[Chunk, Tensor]:
    """Rank 0's tile of two tokens goes to both ranks."""
    plan = ParallelPlan.for_llm(Layout(dp=2))
    zero = np.array([0, 0])
    uses = TileUses(zero, zero, np.array([0, 1]), zero, zero, num_tiles=np.array([1, 0]))
    planned = plan_exchange(uses.routes(plan, world.rank), plan, world.rank, SequenceShards(4), 2, 1)
    return planned.chunks[0], torch.ones(2 * (world.rank == 0), 3)


def test_details_in_two_ranks() -> None:
    def job(world: World) -> dict[str, Any]:
        chunk, rows = one_tile(world)
        seen: dict[str, Any] = {}
        rows = torch.arange(float(rows.numel())).reshape(rows.shape).bfloat16().requires_grad_()
        received = exchange(rows, chunk)
        seen["bf16"] = received.dtype == torch.bfloat16 and received.tolist() == [[0, 1, 2], [3, 4, 5]]
        received.backward(torch.full_like(received, world.rank + 1.0).T.contiguous().T)  # not contiguous
        seen["fan-out sums"] = rows.grad is not None and (rows.grad == 3).all().item()
        with torch.no_grad():
            seen["no graph"] = not exchange(rows, chunk).requires_grad
        untouched = exchange(rows.detach(), chunk)
        untouched.sum().backward()
        seen["always a graph"] = untouched.requires_grad
        solo = dist.new_group([world.rank], use_local_synchronization=True)
        for name, call in {
            "rows": lambda: exchange(torch.empty(5, 3), chunk),
            "out": lambda: start_exchange(rows, chunk, out=torch.empty(1, 3)),
            "gradient": lambda: start_return(torch.empty(3, 3), chunk),
            "group": lambda: exchange(rows, chunk, solo),
        }.items():
            try:
                call()
            except ValueError as error:
                seen[name] = str(error)
        return seen

    for rank, seen in enumerate(run_ranks(2, job)):
        rows = 2 if rank == 0 else 0
        assert seen["bf16"] and seen["fan-out sums"] and seen["no graph"] and seen["always a graph"]
        assert f"rows to hand over: got [5, 3], the plan says [{rows}, H]" in seen["rows"]
        assert "rows to receive into: got [1, 3], the plan says [2, H]" in seen["out"]
        assert "gradients of rows received: got [3, 3], the plan says [2, H]" in seen["gradient"]
        assert "planned for 2 ranks, but the group has 1" in seen["group"]


def test_a_group_of_some_ranks() -> None:
    def job(world: World) -> list[list[float]]:
        pair = world.rank // 2  # two pairs at once, each with the routes of a run of two
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        chunk, rows = one_tile(World(world.rank % 2, 2, world.device))
        rows = (rows + pair).requires_grad_()
        received = exchange(rows, chunk, groups[pair])
        (received.sum() * (1 + world.rank)).backward()
        assert rows.grad is not None
        return [received.unique().tolist(), rows.grad.unique().tolist()]

    assert run_ranks(4, job) == [[[1], [3]], [[1], []], [[2], [7]], [[2], []]]
