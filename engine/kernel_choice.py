"""Checks settings of kernels against the machine, the plan and each other, before anything is built.

[kernels] + what the machine has + plan ─► one line: what is wrong, why, what to do
                                        └► Kernels
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from evovlm.csrc.backends import Backends, Package
from evovlm.engine.kernels import Kernels
from evovlm.engine.recompute import Recompute
from evovlm.engine.settings import KernelSettings
from evovlm.parallel.layout import ParallelPlan


def choose_kernels(
    settings: KernelSettings,
    backends: Backends,
    plan: ParallelPlan,
    *,
    dtype: torch.dtype,
    recompute: Mapping[str, Recompute] | None = None,
) -> Kernels:
    """Check that a machine, a plan and the other settings allow the kernels that are asked for.

    Args:
        settings: What is asked for.
        backends: What the machine has, from :func:`evovlm.csrc.backends.find_backends`.
        plan: Layouts of the modules.
        dtype: What forward and backward compute in.
        recompute: Module → activation checkpointing.

    Raises:
        ValueError: One line that names the setting, what stands in its way, and what to do.
    """
    recompute = recompute or {}
    for problem in _problems(settings, backends, plan, dtype, recompute):
        raise ValueError(f"[kernels] {problem}")
    return Kernels(settings, recompute)


def _problems(
    settings: KernelSettings,
    backends: Backends,
    plan: ParallelPlan,
    dtype: torch.dtype,
    recompute: Mapping[str, Recompute],
) -> Iterator[str]:
    if not backends.own.usable:
        yield f"{backends.own}"
    yield from _missing(settings, backends)
    yield from _unfit_dtypes(settings, dtype)
    others = [
        f'{key} = "{value}"'
        for key, value in (("linear", settings.linear), ("norm", settings.norm))
        if value in ("te", "apex")
    ]
    for name, layout in plan.layouts.items():
        if others and layout.tp > 1:
            yield (
                f"{others[0]}: its layers cannot be split by evovlm's tensor parallelism, and [parallel.{name}] has "
                f'tp = {layout.tp}; set tp = 1, or choose "torch"'
            )
    if settings.fp8 != "none" and settings.linear != "te":
        yield f'fp8 = "{settings.fp8}" needs linear = "te": only transformer-engine\'s layers compute in FP8'
    again = [module for module, mode in recompute.items() if mode != "none" and module not in settings.fp8_skip.modules]
    if settings.fp8 == "delayed" and again:
        yield (
            f'fp8 = "delayed" with [recompute] {again[0]} = "{recompute[again[0]]}": what is computed again would use '
            'later scales than the forward; choose fp8 = "current", or recompute nothing there'
        )
    if settings.compile == "block":
        yield from _uncompilable(others, plan)
    if settings.cuda_graphs:
        yield from _unreplayable(settings, backends, plan, recompute)


def _missing(settings: KernelSettings, backends: Backends) -> Iterator[str]:
    """Choices whose package is not there or does not work."""
    engine = backends.transformer_engine
    wanted: list[tuple[str, str, Package]] = []
    if settings.attention == "flash_attn":
        wanted.append(("attention", "flash_attn", backends.flash_attn))
    if settings.linear == "te":
        wanted.append(("linear", "te", engine))
    if settings.norm in ("te", "apex"):
        wanted.append(("norm", settings.norm, engine if settings.norm == "te" else backends.apex_norm))
    if settings.adam in ("te", "apex"):
        wanted.append(("adam", settings.adam, engine if settings.adam == "te" else backends.apex_adam))
    if settings.compile == "block":
        wanted.append(("compile", "block", backends.compiler))
    for key, value, package in wanted:
        if not package.usable:
            yield f'{key} = "{value}": {package}; or take the default of {key}'
    if settings.attention == "torch" and backends.device == "cpu":
        yield 'attention = "torch" chooses among CUDA kernels; on a CPU evovlm\'s operator attends: take "auto"'
    if settings.fp8 != "none" and backends.fp8[settings.fp8]:
        yield f'fp8 = "{settings.fp8}": {backends.fp8[settings.fp8]}; or take another recipe, or "none"'


def _unfit_dtypes(settings: KernelSettings, dtype: torch.dtype) -> Iterator[str]:
    name = str(dtype).removeprefix("torch.")
    for key, default in (("attention", ("auto", "torch")), ("fp8", ("none",))):
        value = getattr(settings, key)
        if value not in default and dtype != torch.bfloat16:
            yield f'{key} = "{value}" computes from 16-bit numbers, and precision is {name}; set precision = "bfloat16"'
    for key in ("linear", "norm", "adam"):
        value = getattr(settings, key)
        if value in ("te", "apex") and dtype == torch.float64:
            yield f'{key} = "{value}" does not know float64; choose precision = "float32" or "bfloat16", or "torch"'


def _uncompilable(others: Sequence[str], plan: ParallelPlan) -> Iterator[str]:
    if others:
        yield f'compile = "block" with {others[0]}: those layers are compiled already; choose one of the two'
    for name, layout in plan.layouts.items():
        split = [f"{axis} = {getattr(layout, axis)}" for axis in ("tp", "cp", "hp") if getattr(layout, axis) > 1]
        if split and name != "projector":
            yield (
                f'compile = "block": blocks of {name} send to other ranks in their midst ({", ".join(split)}), which '
                f"no graph can hold; set these to 1 in [parallel.{name}], or compile nothing"
            )


def _unreplayable(
    settings: KernelSettings, backends: Backends, plan: ParallelPlan, recompute: Mapping[str, Recompute]
) -> Iterator[str]:
    llm = plan.llm
    for wrong, reason in (
        (backends.device != "cuda", f"this run is on {backends.device}"),
        (settings.compile != "block", 'graphs are recorded from compiled blocks: set compile = "block"'),
        (llm.zero == 3, "under zero = 3 weights move in memory with each use: set zero = 2 or 1 in [parallel.llm]"),
        (llm.pp > 1, "a pipeline keeps several microbatches under way, and a graph has room for one: set pp = 1"),
        (recompute.get("llm", "none") != "none", 'a graph holds its activations: set recompute of the LLM to "none"'),
    ):
        if wrong:
            yield f"cuda_graphs = true: {reason}; or cuda_graphs = false"
