"""Tensor parallelism by a table: splits the weights of a module and lets it compute on this rank's parts.

    table  {"layers.*.input_layernorm": "norm_gather", "layers.*.self_attn.q_proj": "colwise", …}
      │
      ▼    [t/tp, H] ─ norm, gather ─► [t, H] ─ colwise ─► [t, A/tp·D] ─ attention ─ rowwise_scatter ─► [t/tp, H]
    parameters become DTensors on the tp mesh, so that fully_shard, optimizers and checkpoints know what they are;
    forward takes their local parts, and sends through :mod:`evovlm.parallel.collectives`

The method is Megatron-LM's with sequence parallelism (Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models"); what each style does stands in :mod:`evovlm.parallel.tensor_styles`.
"""

from collections.abc import Mapping
from itertools import pairwise
from types import FunctionType, MethodType

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from evovlm.parallel.collectives import part_bounds
from evovlm.parallel.sharded_data import units_of
from evovlm.parallel.tensor_styles import STYLES, forward_of


def shard_tensors(module: nn.Module, table: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split a module's parameters over tensor-parallel ranks, in place. Nothing is sent.

    Call it before activation checkpointing is applied and before ``fully_shard``. Names, hooks, buffers and tied
    parameters stay as they are. A real module must hold the same values on every rank. Parts are those of
    ``torch.chunk``: the last may be short, but not empty, which ``fully_shard`` could not reduce.

    Args:
        module: On the meta device or a real one; parameters whole.
        table: Module path pattern (``*`` is one path component) → style, a key of
            :data:`~evovlm.parallel.tensor_styles.STYLES`. Where several patterns match a module, the first in the
            table wins. Modules that no pattern matches are ``replicate``.
        mesh: One-dimensional mesh of the tp ranks.

    Raises:
        ValueError: A pattern matches no module; a style is unknown or does not suit its module; a parameter has too
            few rows or columns for every rank to hold one; one parameter is used by modules that would split it
            differently.
        TypeError: A module's forward was wrapped before.
    """
    unknown = sorted(set(table.values()) - set(STYLES))
    if unknown:
        raise ValueError(f"tensor-parallel table: there is no style {unknown[0]!r}; there are {', '.join(STYLES)}")
    styles: dict[str, str] = {}
    for path, style in units_of(module, table):
        styles.setdefault(path, style)
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for path, child in module.named_modules():
        if any(parameter is not None for parameter in child._parameters.values()):
            _shard_one(path, child, styles.get(path, "replicate"), mesh, placed)


def _shard_one(
    path: str, module: nn.Module, name: str, mesh: DeviceMesh, placed: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Distribute the parameters of one module (not of those inside it) and replace its forward."""
    style = STYLES[name]
    unsuited = style.suits(module)
    if unsuited:
        raise ValueError(f"tensor-parallel style {name!r} does not suit {path!r} ({type(module).__name__}): {unsuited}")
    # On the instance, so that hooks of fully_shard still run around it. A method, so that a deep copy rebinds it.
    original = type(module).forward
    if "forward" in module.__dict__ or not isinstance(original, FunctionType):
        raise TypeError(
            f"the forward of {path!r} ({type(module).__name__}) is already wrapped: "
            "apply tensor parallelism before activation checkpointing and other wrappers"
        )
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        placement = style.placements(key)
        if isinstance(placement, Shard):
            _check_parts(f"{path}.{key}", parameter, placement.dim, mesh.size())
        if parameter not in placed:
            placed[parameter] = nn.Parameter(_distribute(parameter, mesh, placement), parameter.requires_grad)
        shared = placed[parameter]
        if isinstance(shared.data, DTensor) and shared.data.placements != (placement,):
            raise ValueError(
                f"{path}.{key} is tied to a parameter that is placed as {shared.data.placements[0]}, but style "
                f"{name!r} places it as {placement}; give both modules styles that split it alike"
            )
        module._parameters[key] = shared
    module.forward = MethodType(forward_of(type(module), original, style, mesh.get_group()), module)


def _check_parts(name: str, parameter: Tensor, dim: int, tp: int) -> None:
    """Refuse a split that leaves a rank without a part; ranks hold ⌈n / tp⌉ rows as long as there are any."""
    bounds = part_bounds(parameter.shape[dim], tp)
    holders = sum(a < b for a, b in pairwise(bounds))
    if holders < tp:
        raise ValueError(
            f"{name} of shape {list(parameter.shape)} has {bounds[-1]} {'columns' if dim else 'rows'}, which tp = {tp} "
            f"ranks split {bounds[1]} each: {tp - holders} of them would hold none. Lower tp, or enlarge the model "
            "(a vocabulary can be padded)"
        )


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """This rank's part of a parameter, as a DTensor; unlike ``distribute_tensor`` it sends nothing."""
    local = parameter.detach()
    if isinstance(placement, Shard):
        bounds = part_bounds(local.shape[placement.dim], mesh.size())
        rank = mesh.get_local_rank()
        # A copy: a view would keep the whole parameter alive, and fully_shard wants contiguous memory.
        local = local.narrow(placement.dim, bounds[rank], bounds[rank + 1] - bounds[rank]).contiguous().clone()
    return DTensor.from_local(
        local, mesh, (placement,), run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
