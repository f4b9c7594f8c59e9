"""The styles of tensor parallelism: how each splits a module's parameters, and what it computes on the parts.

    style            parameters          input                     output                       Megatron's name
    colwise          rows split          gathered [t, ·]           own columns [t, ·/tp]        column parallel
    colwise_copy     rows split          the same on every rank    own columns                  … without sequence par.
    rowwise_scatter  columns split       own columns [t, ·/tp]     own rows [t/tp, ·]           row parallel
    rowwise_reduce   columns split       own columns               the same on every rank       … without sequence par.
    norm             whole               own rows [t/tp, ·]        own rows
    norm_gather      whole               own rows [t/tp, ·]        gathered [t, ·]
    local            whole               own heads                 own heads
    replicate        whole               the same on every rank    the same on every rank
    width_norm       split               own columns               own columns, normed over all
    embedding        vocabulary split    ids [t]                   own rows [t/tp, H]           vocabulary parallel
    head             vocabulary split    (the loss computes)

"Rows" of an activation are its dimension −2; a leading dimension of 1, as Hugging Face decoders have it, may stand
before. Under ``norm``, ``norm_gather`` and ``local`` each rank sees only part of what a parameter acts on, so the
parameter's gradient is added over the ranks in each backward. It could wait as a Partial DTensor until
``fully_shard`` reduces, but that adds in the compute dtype, and through DTensor's own collectives; one small float32
all-reduce in our backward is right under any schedule of accumulation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from evovlm.parallel.collectives import copy_to_ranks, gather_rows, part_bounds, reduce_from_ranks, scatter_rows

Exchange = Callable[[Tensor, dist.ProcessGroup], Tensor]
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Style:
    """What a style does to one module.

    Attributes:
        weight: Placement of every parameter but the bias.
        bias: Placement of the bias, if there is one.
        add_gradients: Whether each rank's gradient of whole parameters is one term of a sum.
        before: Exchange on the input.
        after: Exchange on the output; a whole bias is added after it.
        compute: Replaces the module's own forward: ``(module with local parameters, module, input, group)``.
        kinds: Classes that the style is for; empty: any module.
    """

    weight: Placement
    bias: Placement | None = None
    add_gradients: bool = False
    before: Exchange | None = None
    after: Exchange | None = None
    compute: Callable[[Any, Any, Tensor, dist.ProcessGroup], Tensor] | None = None
    kinds: tuple[type[nn.Module], ...] = ()

    def placements(self, name: str) -> Placement:
        """Where the parameter of this name goes."""
        return self.bias if name == "bias" and self.bias is not None else self.weight

    def suits(self, module: nn.Module) -> str:
        """Say why the style cannot be applied to a module, or nothing."""
        if self.kinds and not isinstance(module, self.kinds):
            return f"it is for {' or '.join(kind.__name__ for kind in self.kinds)}"
        if isinstance(module, nn.Embedding) and self.compute is _embed:
            for option in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(module, option):
                    return f"{option} is not supported"
        if self.compute is _width_norm and set(module._parameters) != {"weight"}:
            return f"it needs one parameter, weight, and there are {list(module._parameters)}"
        if self.compute is _width_norm and _epsilon(module) is None:
            return "it has neither eps nor variance_epsilon"
        if self.compute is _refuse and module._parameters.get("bias") is not None:
            return "an output head with a bias is not supported"
        return ""


def forward_of(kind: type[nn.Module], original: Forward, style: Style, group: dist.ProcessGroup) -> Forward:
    """Build the forward of a module under a style.

    Args:
        kind: The module's class, before ``fully_shard`` changes it.
        original: Its forward, unbound.
        style: The style.
        group: The tp ranks.

    Returns:
        An unbound method. Calling it changes nothing in the module.
    """

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if style.before is None and style.after is None and style.compute is None:
            return original(_localized(module, kind, style, group), *args, **kwargs)
        x, *others = args
        x = x if style.before is None else style.before(x, group)
        local = _localized(module, kind, style, group)
        if style.compute is not None:
            return style.compute(local, module, x, group)
        bias = None
        if style.bias == Replicate() and style.weight != Replicate():
            bias, local._parameters["bias"] = local._parameters["bias"], None
        out = original(local, x, *others, **kwargs)
        out = out if style.after is None else style.after(out, group)
        return out if bias is None else out + bias

    return forward


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter whose gradient, computed on that part, has the same placement.

    Args:
        parameter: A DTensor, or a plain tensor, which is returned as it is.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    part: Tensor = parameter.to_local(grad_placements=parameter.placements)
    return part


def _localized(module: nn.Module, kind: type[nn.Module], style: Style, group: dist.ProcessGroup) -> nn.Module:
    """A stand-in for the module with local parts for parameters; everything else is shared with it."""
    stand_in: nn.Module = object.__new__(kind)
    stand_in.__dict__.update(module.__dict__)
    del stand_in.__dict__["forward"]
    parts: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        parts[name] = parameter if parameter is None else local_part(parameter)
        if style.add_gradients and parameter is not None and style.placements(name) == Replicate():
            parts[name] = copy_to_ranks(parts[name], group)
        elif parameter is not None and (parameter.ndim == 1 or style.placements(name) == Replicate()):
            parts[name] = _own_gradient(parts[name])
    stand_in.__dict__["_parameters"] = parts
    return stand_in


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad.clone()


def _own_gradient(x: Tensor) -> Tensor:
    """Give a parameter's gradient memory of its own.

    What adds up gradients does so in place, unless it sees others hold the tensor, which inside a DTensor it does not.
    A sum with the parameter passes the gradient on as it is, so two parameters could add to the same memory; products
    of matrices make their own.
    """
    out: Tensor = _OwnGradient.apply(x)  # type: ignore[no-untyped-call]
    return out


def _on_rows(exchange: Exchange) -> Exchange:
    """Let an exchange of the first dimension act on dimension −2 of ``[t, ·]`` or ``[1, t, ·]``."""

    def on_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        leading = x.shape[:-2]
        if leading.numel() != 1:
            raise ValueError(f"sequence parallelism takes packed rows [t, H] or [1, t, H], got {list(x.shape)}")
        return exchange(x.reshape(x.shape[-2:]), group).view(*leading, -1, x.shape[-1])

    return on_rows


def _embed(local: Any, module: Any, ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Look up the ids of the own part of the vocabulary, zeros for others; add over ranks and keep own rows."""
    bounds = part_bounds(module.weight.shape[0], dist.get_world_size(group))
    rank = dist.get_rank(group)
    low, high = bounds[rank], bounds[rank + 1]
    torch._assert_async(((ids >= 0) & (ids < bounds[-1])).all(), f"token ids must be from 0 to {bounds[-1] - 1}")
    owned = (ids >= low) & (ids < high)
    weight = local.weight
    if low == high:  # nothing to look up; the sum of no elements keeps the (empty) gradient
        found = weight.new_zeros(*ids.shape, weight.shape[1]) + weight.sum()
    else:
        padding = module.padding_idx
        padding = padding - low if padding is not None and low <= padding < high else None
        found = F.embedding((ids - low).clamp(0, high - low - 1), weight, padding)
        found = found.masked_fill(~owned.unsqueeze(-1), 0)
    return _on_rows(scatter_rows)(found, group)


def _width_norm(local: Any, module: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """RMSNorm, float32 inside, over a width of which each rank has a part."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = wide.square().sum(-1, keepdim=True)
    # Every rank's output depends on the sum: its gradient is added over the ranks too.
    squares = copy_to_ranks(reduce_from_ranks(squares, group), group)
    normed = wide * torch.rsqrt(squares / module.weight.shape[0] + _epsilon(module))
    scaled: Tensor = local.weight * normed.to(x.dtype)
    return scaled


def _epsilon(module: nn.Module) -> float | None:
    eps: float | None = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return eps


def _refuse(local: Any, module: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG001
    raise RuntimeError(
        "an output head whose vocabulary is split is not called: give its weight to a loss that gathers the hidden "
        "states and computes the logits chunk by chunk"
    )


STYLES: dict[str, Style] = {
    "colwise": Style(weight=Shard(0), kinds=(nn.Linear,)),
    "colwise_copy": Style(weight=Shard(0), before=copy_to_ranks, kinds=(nn.Linear,)),
    "rowwise_scatter": Style(
        weight=Shard(1), bias=Replicate(), add_gradients=True, after=_on_rows(scatter_rows), kinds=(nn.Linear,)
    ),
    "rowwise_reduce": Style(weight=Shard(1), bias=Replicate(), after=reduce_from_ranks, kinds=(nn.Linear,)),
    "norm": Style(weight=Replicate(), add_gradients=True),
    "norm_gather": Style(weight=Replicate(), add_gradients=True, after=_on_rows(gather_rows)),
    "local": Style(weight=Replicate(), add_gradients=True),
    "replicate": Style(weight=Replicate()),
    "width_norm": Style(weight=Shard(0), compute=_width_norm),
    "embedding": Style(weight=Shard(0), compute=_embed, kinds=(nn.Embedding,)),
    "head": Style(weight=Shard(0), compute=_refuse, kinds=(nn.Linear,)),
}
"""Style name → what it does."""
