"""AdamW with one learning rate per module and no weight decay on vectors; the schedule is a function of the step.

Whichever package's fused kernel takes the steps, the state of a parameter is ``step``, ``exp_avg``, ``exp_avg_sq``: a
checkpoint of one can be continued with another.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evovlm.csrc.backends import load
from evovlm.engine.settings import OptimSettings
from evovlm.models.sharding import module_of

Adam = Literal["torch", "te", "apex"]


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
    *,
    adam: Adam = "torch",
) -> torch.optim.Optimizer:
    """Build fused AdamW over the trainable parameters.

    Args:
        parameters: Name → parameter, float32 (with torch's also float64).
        settings: Rates, betas, decay.
        module_of_parameter: Name → module; InternVL's by default.
        adam: Whose kernel.

    Raises:
        ValueError: Every parameter is frozen.
    """
    modules = module_of_parameter or {name: module_of(name) for name in parameters}
    groups = parameter_groups(parameters, settings, modules)
    if not groups:
        raise ValueError("every parameter is frozen: nothing is left to train; shorten [model] freeze")
    if adam == "torch":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    package = load("apex.optimizers" if adam == "apex" else "transformer_engine.pytorch.optimizers")
    built: torch.optim.Optimizer = package.FusedAdam(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adam_w_mode=True
    )
    built.register_step_pre_hook(_tell_steps)
    built.register_step_post_hook(_count_steps)
    return built


def _tell_steps(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Tell groups the number of steps behind them: these optimizers count by group, checkpoints by parameter.

    Raises:
        RuntimeError: Parameters of a group have been trained for different numbers of steps.
    """
    for group in optimizer.param_groups:
        states = [optimizer.state[parameter] for parameter in group["params"] if parameter.grad is not None]
        counted = [state["step"] for state in states if "step" in state]
        ages = torch.stack(counted).tolist() if counted else [0.0]
        if min(ages) != max(ages):
            raise RuntimeError(
                f"parameters of group {group.get('name')!r} are {min(ages):.0f} to {max(ages):.0f} steps old, and this "
                'fused Adam counts once for all of a group: choose [kernels] adam = "torch"'
            )
        group["step"] = int(ages[0])


def _count_steps(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Count the step just taken where checkpoints look for it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device)).add_(1)


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
