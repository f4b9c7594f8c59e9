"""Layers of other packages in place of a model's linear layers and norms; parameters and their names stay.

    nn.Linear                 ─► transformer_engine.pytorch.Linear                      weight, bias
    RMSNorm, nn.RMSNorm       ─► transformer-engine's, apex' or torch's RMSNorm         weight
    nn.LayerNorm              ─► transformer-engine's or apex' LayerNorm                weight, bias

A new layer takes the old one's parameters over, whatever device they are on, so ties, frozen parameters, sharding
tables, checkpoints and exports never learn of it. Must run before anything is sharded.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evovlm.csrc.backends import load
from evovlm.models.vit import RMSNorm

ROWS = 32
"""FP8 products take rows in multiples of this: 8 for tensor scaling, 32 for blocks."""
COLUMNS = {"delayed": 16, "current": 16, "block": 16, "mxfp8": 32}
"""What FP8 recipes want the sizes of a weight to be a multiple of."""


def replace_linear(root: nn.Module, paths: Iterable[str], fp8: str) -> None:
    """Put transformer-engine's linear layers in place of torch's.

    Args:
        root: Changed in place.
        paths: Paths of the layers, each an ``nn.Linear``.
        fp8: Recipe that they will compute in, or ``none``.

    Raises:
        ValueError: A weight's sizes do not suit the recipe.
    """
    made_of = _linear_class()
    for path in paths:
        linear = root.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        multiple = COLUMNS.get(fp8, 1)
        if linear.in_features % multiple or linear.out_features % multiple:
            raise ValueError(
                f'[kernels] fp8 = "{fp8}": {path} maps {linear.in_features} to {linear.out_features} channels, and '
                f"both must be multiples of {multiple}; leave its module or block out with fp8_skip"
            )
        made = made_of(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=linear.weight.dtype,
            device="meta",
        )
        root.set_submodule(path, _take_over(made, linear))


def replace_norms(root: nn.Module, kind: Literal["torch", "te", "apex"]) -> None:
    """Put torch's, transformer-engine's or apex' norms in place of evovlm's and torch's, wherever they are.

    Norms of other classes stay: only of these is it known what they compute. torch has no other LayerNorm than its own.
    """
    rms, layer = _norm_classes(kind)
    for path, norm in [*root.named_modules()]:
        made = None
        if type(norm) is RMSNorm or (type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None):
            made = rms
        elif type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None:
            made = layer
        if made is not None:
            on_meta = {"device": "meta"} if kind == "te" else {}  # otherwise it goes to the GPU
            with torch.device("meta"):  # apex has no argument for it
                new = made(norm.weight.shape[0], eps=norm.eps, **on_meta)
            root.set_submodule(path, _take_over(new, norm))


def _take_over(made: nn.Module, old: nn.Module) -> nn.Module:
    """Give a new layer an old one's parameters, which are all that it may have."""
    names = {name for name, _ in old.named_parameters()}
    if extra := names ^ {name for name, _ in made.named_parameters()}:
        raise RuntimeError(f"{type(made).__name__} and {type(old).__name__} differ in parameters: {sorted(extra)}")
    for name in names:
        setattr(made, name, old.get_parameter(name))
    return made.train(old.training)


def _norm_classes(kind: str) -> tuple[Any, Any]:
    """Classes of RMSNorm and LayerNorm; None for one that stays as it is."""
    if kind == "torch":
        return nn.RMSNorm, None
    if kind == "apex":
        apex = load("apex.normalization")
        return _of_any_rows(apex.FusedRMSNorm), _of_any_rows(apex.FusedLayerNorm)
    engine = load("transformer_engine.pytorch")
    return _of_any_rows(engine.RMSNorm), _of_any_rows(engine.LayerNorm)


def _linear_class() -> Any:
    """transformer-engine's Linear, taking any number of rows: an encoder may have no tile, or 1025 rows of each."""
    base = load("transformer_engine.pytorch").Linear

    def forward(self: Any, x: Tensor) -> Tensor:
        """Apply to the last dimension: ``[..., in]`` to ``[..., out]``."""
        rows = x.shape[:-1].numel()
        missing = max(ROWS - rows, -rows % ROWS)
        if not missing:
            unpadded: Tensor = base.forward(self, x)
            return unpadded
        padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, missing))
        out: Tensor = torch.unflatten(base.forward(self, padded)[:rows], 0, x.shape[:-1])
        return out

    return type("TELinear", (base,), {"forward": forward})


def _of_any_rows(base: Any) -> Any:
    """A class of norms that also takes no rows at all."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Norm over the last dimension."""
        if x.numel():
            normed: Tensor = base.forward(self, x)
            return normed
        # Nothing to norm; the graph still reaches the parameters, on every rank alike.
        empty: Tensor = x * self.weight
        bias: Tensor | None = getattr(self, "bias", None)
        return empty if bias is None else empty + bias

    return type(base.__name__, (base,), {"forward": forward})
