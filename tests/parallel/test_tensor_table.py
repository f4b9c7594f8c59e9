"""Tables of tensor parallelism: what a style does to parameters, and which tables, modules and inputs are refused."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.tensor import shard_tensors

H = 4


class Block(nn.Module):
    """Parts of a block; never run as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.q, self.k, self.o = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        self.down = nn.Linear(H, H, bias=False)


def in_one_rank(job: Callable[[DeviceMesh], Any]) -> Any:
    return run_ranks(1, lambda world: job(DeviceMesh("cpu", [0])))[0]


def test_placements_names_buffers_and_frozen_parameters_stay_as_told() -> None:
    def job(mesh: DeviceMesh) -> dict[str, Any]:
        with torch.device("meta"):
            block = Block()
        block.register_buffer("seen", torch.ones(3))
        block.k.requires_grad_(False)
        names = list(block.state_dict())
        # Of patterns that match one module, the first counts; what none matches is whole.
        shard_tensors(block, {"q": "replicate", "?": "colwise", "down": "rowwise_scatter"}, mesh)
        twin = copy.deepcopy(block)
        return {
            "same names": list(block.state_dict()) == names,
            "buffer": type(block.seen) is Tensor,
            "frozen": [name for name, p in block.named_parameters() if not p.requires_grad],
            "placements": {name: getattr(block, name).weight.placements[0] for name in ("q", "k", "o", "down", "norm")},
            "meta": {p.to_local().device.type for p in block.parameters()},
            "twin": twin.q.forward.__self__ is twin.q,
        }

    assert in_one_rank(job) == {
        "same names": True,
        "buffer": True,
        "frozen": ["k.weight", "k.bias"],
        "placements": {"q": Replicate(), "k": Shard(0), "o": Shard(0), "down": Shard(1), "norm": Replicate()},
        "meta": {"meta"},
        "twin": True,
    }


def tied(table: dict[str, str], mesh: DeviceMesh) -> None:
    pair = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    pair["b"].weight = pair["a"].weight
    shard_tensors(pair, table, mesh)


def wrapped(mesh: DeviceMesh) -> None:
    block = Block()
    block.q.forward = partial(checkpoint, block.q.forward)
    shard_tensors(block, {"q": "colwise"}, mesh)


REFUSED: dict[str, tuple[Callable[[DeviceMesh], Any], str]] = {
    "pattern": (lambda mesh: shard_tensors(Block(), {"w": "colwise"}, mesh), r"no module matches 'w' in Block"),
    "style": (lambda mesh: shard_tensors(Block(), {"q": "colum"}, mesh), r"no style 'colum'; there are colwise, "),
    "kind": (
        lambda mesh: shard_tensors(Block(), {"norm": "colwise"}, mesh),
        r"style 'colwise' does not suit 'norm' \(LayerNorm\): it is for Linear",
    ),
    "width norm": (
        lambda mesh: shard_tensors(Block(), {"norm": "width_norm"}, mesh),
        r"does not suit 'norm' \(LayerNorm\): it needs one parameter",
    ),
    "tied": (lambda mesh: tied({"a": "colwise"}, mesh), r"b\.weight is tied to a parameter that is placed as S"),
    "wrapped": (wrapped, r"forward of 'q' \(Linear\) is already wrapped"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what: str) -> None:
    job, message = REFUSED[what]
    with pytest.raises(RankFailedError, match=message):
        in_one_rank(job)


def test_bad_inputs_are_refused() -> None:
    def job(mesh: DeviceMesh) -> list[str]:
        model = nn.ModuleDict(
            {"norm": nn.LayerNorm(4), "embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}
        )
        shard_tensors(model, {"norm": "norm_gather", "embed": "embedding", "head": "head"}, mesh)
        messages = []
        for name, x in (("norm", torch.ones(2, 3, 4)), ("embed", torch.tensor([5])), ("head", torch.ones(2, 4))):
            with pytest.raises((ValueError, RuntimeError)) as error:
                model[name](x)
            messages.append(str(error.value))
        return messages

    rows, ids, head = in_one_rank(job)
    assert "takes packed rows [t, H] or [1, t, H], got [2, 3, 4]" in rows
    assert "token ids must be from 0 to 4" in ids
    assert "give its weight to a loss" in head
