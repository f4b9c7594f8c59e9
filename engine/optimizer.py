"""AdamW with one learning rate per module and no weight decay on vectors; the schedule is a function of the step."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evovlm.engine.settings import OptimSettings
from evovlm.models.sharding import module_of


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], settings: OptimSettings, module_of_parameter: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Group trainable parameters by module and by whether they decay.

    Vectors (norms, biases, layer scales) and learned positions do not decay.

    Args:
        parameters: Name → parameter; frozen ones are left out.
        settings: Learning rates and decay.
        module_of_parameter: Name → module, whose learning rate scale applies.

    Returns:
        Groups as ``torch.optim`` takes them, with ``base_lr`` and a readable ``name``.
    """
    scales = {str(module): scale for module, scale in settings.lr_scale.items()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        module = module_of_parameter[name]
        decays = parameter.ndim > 1 and not name.endswith(("position_embedding", "class_embedding"))
        group = groups.setdefault(
            f"{module}/{'decay' if decays else 'no_decay'}",
            {
                "params": [],
                "name": f"{module}/{'decay' if decays else 'no_decay'}",
                "base_lr": settings.lr * scales.get(module, 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimSettings,
    module_of_parameter: Mapping[str, str] | None = None,
) -> torch.optim.AdamW:
    """Build fused AdamW over the trainable parameters.

    Raises:
        ValueError: Every parameter is frozen.
    """
    modules = module_of_parameter or {name: module_of(name) for name in parameters}
    groups = parameter_groups(parameters, settings, modules)
    if not groups:
        raise ValueError("every parameter is frozen: nothing is left to train; shorten [model] freeze")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def lr_factor(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Return the factor on every learning rate at a step (0-based): linear warm-up, then the schedule.

    ``warmup`` below 1 is a share of the run, otherwise a number of steps. ``cosine`` and ``linear`` end at
    ``min_lr_ratio``.
    """
    warmup = settings.warmup if settings.warmup >= 1 else math.ceil(settings.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = settings.min_lr_ratio
    shapes: dict[Literal["cosine", "linear", "constant"], float] = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }
    return floor + (1.0 - floor) * shapes[settings.schedule]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that brings a gradient of this norm under ``max_norm``; 1 where it is, or without a limit."""
    if max_norm == 0 or norm <= max_norm:
        return 1.0
    return max_norm / (norm + 1e-6)


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """Multiply local gradients in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
