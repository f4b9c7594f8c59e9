"""A tied head under pipeline parallelism: the embedding lives on the first stage, its copy on the last.

    first stage  embedding  grad e ─┐
                                    ├─► e + h on both, so that both take the same optimizer step
    last stage   head       grad h ─┘

Both stages shard the matrix alike, so each rank exchanges its piece with one other rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.engine.local_state import LocalParameter, LocalState
from evovlm.parallel.mesh import ModuleMesh


def add_tied_gradients(state: LocalState, mesh: ModuleMesh) -> None:
    """Add up the gradients of parameters that the first and the last pipeline stage both hold. Collective among them.

    Args:
        state: This rank's parameters, their gradients reduced over the data ranks.
        mesh: Meshes of the LLM.
    """
    group = mesh.groups.get("pp")
    if group is None:
        return
    rank, size = mesh.place.pp, mesh.layout.pp
    for parameter in _shared(state, rank, size):
        own = parameter.gradient
        if own is None:
            continue
        mine = own.contiguous()
        other = torch.empty_like(mine)
        peer = size - 1 - rank
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
            ]
        )
        for work in works:
            work.wait()
        own.copy_(_sum_in_order(mine, other, rank))


def _shared(state: LocalState, rank: int, size: int) -> list[LocalParameter]:
    """This rank's side of each shared parameter, in the same order on both ranks."""
    if rank == size - 1:
        return [p for p in state.parameters if p.is_copy]
    return [p for p in state.parameters if rank == 0 and p.name in state.shared_names]


def _sum_in_order(mine: Tensor, other: Tensor, rank: int) -> Tensor:
    """The first stage's gradient plus the last stage's: the same rounding on both."""
    return mine + other if rank == 0 else other + mine
