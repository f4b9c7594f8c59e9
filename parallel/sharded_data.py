"""Sharded data parallelism: applies ``fully_shard`` (FSDP2) to a model by a table of its units.

table  {"vision_model.encoder.layers.*": "vit", …, "": "llm"}      a unit's weights are gathered together
  │                                                                and freed together; "" is the root
  ▼
fully_shard(unit, mesh and ZeRO level of the module it belongs to), innermost units first
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from evovlm.parallel.layout import Layout


def units_of(model: nn.Module, table: Mapping[str, str]) -> list[tuple[str, str]]:
    """List the (module path, layout name) of each sharding unit, innermost first.

    Raises:
        ValueError: A pattern of the table matches no module of this model.
    """
    paths = [path for path, _ in model.named_modules()]
    units: list[tuple[str, str]] = []
    for pattern, layout in table.items():
        found = [path for path in paths if path == pattern or (pattern and _matches(path, pattern))]
        if not found:
            raise ValueError(f"sharding table: no module matches {pattern!r} in {type(model).__name__}")
        units += [(path, layout) for path in found]
    # The sort is stable: within a depth, units keep the order in which the model runs them.
    return sorted(units, key=lambda unit: -(unit[0].count(".") + 1 if unit[0] else 0))


def _matches(path: str, pattern: str) -> bool:
    """Glob match where ``*`` stays inside one path component."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def shard_model(
    model: nn.Module,
    table: Mapping[str, str],
    layouts: Mapping[str, Layout],
    *,
    device_type: str,
    compute_dtype: torch.dtype | None = None,
    min_unit: int = 0,
) -> None:
    """Shard a model's parameters in place over the data-parallel ranks.

    Args:
        model: Built on the meta device or on a real one.
        table: Module path pattern → name of its layout; must contain ``""``, the root.
        layouts: Name → layout.
        device_type: ``cpu`` or ``cuda``.
        compute_dtype: Dtype of weights and activations in forward and backward; None keeps the parameters' own.
            Gradients are reduced in float32 (or the parameters' wider dtype). Inputs are never cast: positions
            must stay float32, so a model casts its own pixels.
        min_unit: Units of fewer parameters join the one around them, if they share the root's layout: a collective for
            each of a tiny model's blocks costs more than it computes.
    """
    meshes: dict[Layout, DeviceMesh] = {}
    parameter_dtype = next(model.parameters()).dtype
    reduce_dtype = torch.promote_types(parameter_dtype, torch.float32)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for path, name in units_of(model, table):
        layout = layouts[name]
        num_parameters = sum(p.numel() for p in model.get_submodule(path).parameters())
        if path and num_parameters < min_unit and layout == layouts[table[""]]:
            continue
        if layout not in meshes:
            meshes[layout] = layout.mesh(device_type)
        fully_shard(
            model.get_submodule(path),
            mesh=meshes[layout],
            reshard_after_forward=layout.zero == 3,
            mp_policy=precision,
        )


def accumulate(model: nn.Module, table: Mapping[str, str], layouts: Mapping[str, Layout], *, last: bool) -> None:
    """Tell each unit whether the coming backward is the step's last one.

    Under ZeRO 1 gradients stay whole and local until then and are reduced once; under ZeRO 2 and 3 they are reduced
    after every microbatch.
    """
    for path, name in units_of(model, table):
        unit = model.get_submodule(path)
        if not isinstance(unit, FSDPModule):
            if not path:
                raise TypeError("the model is not sharded: call shard_model first")
            continue  # too small to be a unit of its own: it joined the one around it
        unit.set_requires_gradient_sync(last or layouts[name].zero >= 2, recurse=False)
        unit.set_is_last_backward(last)
