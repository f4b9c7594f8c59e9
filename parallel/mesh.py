"""From a layout to device meshes and process groups; every rank builds the same ones, in the same order.

ranks ─► [pp, replicate, shard, tp]   ``fully_shard`` takes (replicate,) shard; tensor parallelism takes tp
      └► [pp, dp, cp, hp, tp]         groups of attention and of the pipeline
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from evovlm.parallel.layout import AXES, Coordinates, Layout, ParallelPlan


@dataclass(frozen=True)
class ModuleMesh:
    """What one rank needs to take its part in a module's layout.

    Attributes:
        layout: The layout.
        place: Where this rank stands in it.
        data: Mesh of ``fully_shard``: ``[shard]``, or ``[replicate, shard]`` for hybrid ZeRO.
        tensor: One-dimensional mesh of the tp ranks, or None with tp = 1.
        groups: Axis → process group of the ranks that differ from this one along that axis alone; axes of one rank
            are absent. With a double ring (0 < window < cp) ``cp_outer`` is a second group of the ``cp`` ranks: what
            its outer hops send overlaps the inner hops, which one NCCL communicator would not let it.
    """

    layout: Layout
    place: Coordinates
    data: DeviceMesh
    tensor: DeviceMesh | None
    groups: dict[str, dist.ProcessGroup]


def build_mesh(layout: Layout, rank: int, device_type: str) -> ModuleMesh:
    """Build the meshes of one layout. Collective: every rank of the run calls it."""
    ranks = torch.arange(layout.size)
    replicas = layout.data_ranks // layout.shard_size
    state = DeviceMesh(
        device_type,
        ranks.view(layout.pp, replicas, layout.shard_size, layout.tp),
        mesh_dim_names=("pp", "replicate", "shard", "tp"),
    )
    groups: dict[str, dist.ProcessGroup] = {}
    if layout.tp > 1:
        groups["tp"] = state.get_group("tp")
    if layout.cp > 1 or layout.hp > 1 or layout.pp > 1 or layout.dp > 1:
        names = AXES if layout.placement == "head_first" else ("pp", "dp", "hp", "cp", "tp")
        axes = DeviceMesh(
            device_type, ranks.view([getattr(layout, axis) for axis in names]), mesh_dim_names=tuple(names)
        )
        groups |= {axis: axes.get_group(axis) for axis in ("pp", "dp", "cp", "hp") if getattr(layout, axis) > 1}
        if 0 < layout.window < layout.cp:
            rings = axes.mesh.movedim(names.index("cp"), -1).reshape(-1, layout.cp).tolist()
            groups["cp_outer"], _ = dist.new_subgroups_by_enumeration(rings)  # type: ignore[no-untyped-call]
    return ModuleMesh(
        layout=layout,
        place=layout.coordinates(rank),
        data=state["replicate", "shard"] if replicas > 1 else state["shard"],
        tensor=state["tp"] if layout.tp > 1 else None,
        groups=groups,
    )


def build_meshes(plan: ParallelPlan, rank: int, device_type: str) -> dict[str, ModuleMesh]:
    """Build the meshes of every module; modules of one layout share theirs. Collective."""
    built: dict[Layout, ModuleMesh] = {}
    for layout in plan.layouts.values():
        if layout not in built:
            built[layout] = build_mesh(layout, rank, device_type)
    return {name: built[layout] for name, layout in plan.layouts.items()}
