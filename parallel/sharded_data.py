"""Sharded data parallelism: applies ``fully_shard`` (FSDP2) to a module, block by block.

root ─┬─ block 0 ─┐ each block's weights are gathered together just before it runs (the next block's gather is already
      ├─ block 1 ─┤ under way) and, under ZeRO 3, freed after it; gradients are summed over the data ranks
      └─ rest ────┘ of the layout, in float32 or wider

zero 1  weights whole during a step, one reduction at its end
zero 2  weights whole during a step, gradients reduced and split after every microbatch
zero 3  weights gathered for each use, gradients reduced and split after every microbatch
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from evovlm.parallel.mesh import ModuleMesh


def find_modules(root: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """List the (path, module) that a pattern matches, in the order of the model; ``*`` is one path component.

    Raises:
        ValueError: The pattern matches nothing.
    """
    found = [(path, module) for path, module in root.named_modules() if path and matches(path, pattern)]
    if not found:
        raise ValueError(f"sharding table: no module matches {pattern!r} in {type(root).__name__}")
    return found


def units_of(model: nn.Module, table: Mapping[str, str]) -> list[tuple[str, str]]:
    """List (path, entry) of every module that a table names, in the order of the table.

    Raises:
        ValueError: A pattern of the table matches nothing.
    """
    return [(path, entry) for pattern, entry in table.items() for path, _ in find_modules(model, pattern)]


def matches(path: str, pattern: str) -> bool:
    """Whether a module path fits a pattern; ``*`` stands for one component of the path."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def shard_module(
    root: nn.Module,
    blocks: str | None,
    mesh: ModuleMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    min_unit: int = 0,
) -> None:
    """Shard a module's parameters in place over the data ranks of its layout.

    Args:
        root: Built on the meta device or on a real one; tensor parallelism is already applied.
        blocks: Path pattern of the blocks that are gathered one by one; None for none.
        mesh: The module's meshes.
        compute_dtype: Dtype of weights and activations in forward and backward; None keeps the parameters' own.
            Gradients are reduced in float32 (or the parameters' wider dtype). Inputs are never cast: positions
            must stay float32, so a model casts its own pixels.
        min_unit: Blocks of fewer parameters join the root: a collective for each of a tiny model's blocks costs more
            than it computes.
    """
    parameter_dtype = next(root.parameters()).dtype
    reduce_dtype = torch.promote_types(parameter_dtype, torch.float32)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    units = [module for _, module in find_modules(root, blocks)] if blocks else []
    units = [unit for unit in units if 0 < sum(p.numel() for p in unit.parameters()) >= min_unit]
    for unit in (*units, root):
        fully_shard(unit, mesh=mesh.data, reshard_after_forward=mesh.layout.zero == 3, mp_policy=precision)
    for managed in _units(root):
        # A loss is a sum over ranks, with its denominator already in it: gradients are added up, never averaged.
        managed.set_gradient_divide_factor(1.0)
        managed.set_force_sum_reduction_for_comms(True)
    if mesh.data.device_type == "cpu":
        # On CUDA streams overlap a gather with what runs; on a CPU the backend's thread does, if nobody waits for it.
        for managed in _units(root):
            managed._set_unshard_async_op(True)
    sharded = [unit for unit in units if isinstance(unit, FSDPModule)]
    for unit, following in pairwise(sharded):
        unit.set_modules_to_forward_prefetch([following])


def _units(root: nn.Module) -> Iterator[FSDPModule]:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            yield module


def accumulate(root: nn.Module, mesh: ModuleMesh, *, last: bool) -> None:
    """Tell a sharded module whether the coming backward is the step's last one.

    Under ZeRO 1 gradients stay whole and local until then and are reduced once; under ZeRO 2 and 3 they are
    reduce-scattered after every microbatch, and the copies of hybrid ZeRO are added up with the last.
    """
    zero = mesh.layout.zero
    for unit in _units(root):
        unit.set_requires_gradient_sync(last or zero >= 2, recurse=False)
        unit.set_requires_all_reduce(last, recurse=False)
        unit.set_reshard_after_backward(last or zero == 3, recurse=False)
        unit.set_is_last_backward(last)


def accumulate_unordered(root: nn.Module, mesh: ModuleMesh) -> None:
    """As :func:`accumulate` for a schedule that does not say which backward is the last; end it by :func:`finish`."""
    accumulate(root, mesh, last=False)
    for unit in _units(root):
        unit.set_requires_all_reduce(True, recurse=False)


def finish(root: nn.Module) -> None:
    """Reduce the gradients that were kept local, wait for all reductions, and free gathered weights."""
    if not isinstance(root, FSDPModule):
        raise TypeError("the module is not sharded: call shard_module first")
    for unit in _units(root):
        unit.set_requires_gradient_sync(True, recurse=False)
        unit.set_requires_all_reduce(True, recurse=False)
        unit.set_reshard_after_backward(True, recurse=False)
        unit.set_is_last_backward(True)
    # What torch's own pipeline stages do after their last backward; there is no public call for it.
    for state in root._get_fsdp_state()._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group.post_backward()
    root._get_fsdp_state()._root_post_backward_final_callback()


def free(root: nn.Module) -> None:
    """Free gathered weights that no backward will free, such as after evaluation."""
    for unit in _units(root):
        unit.reshard()
