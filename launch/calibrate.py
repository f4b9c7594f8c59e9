"""``evovlm calibrate``: measures what this machine takes for a recipe's modules, and fits its cost models to it.

    recipe ─► its model, on one rank of this machine ─► times of ViT, projector, LLM ─► coefficients ─► cost.json
                                                         many shapes, several rounds     and their residuals

One process on one device, whatever the recipe's layout: times of a rank that holds only a part of a module shrink
about alike in all coefficients, and plans need only their ratios.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evovlm.data.index import Index
from evovlm.engine.calibration import FEATURES, Measurements, coefficients_of, errors, fit_model, measure
from evovlm.engine.calibration_cases import make_cases, weight_bytes
from evovlm.engine.cost_shape import run_costs, supervised_share
from evovlm.engine.model_source import open_source
from evovlm.engine.settings import RunSettings
from evovlm.launch.bench import machine
from evovlm.launch.ranks import RankInfo, process_group
from evovlm.models.config import InternVLConfig
from evovlm.models.table import num_parameters
from evovlm.parallel.cost import CostModel

_NOISY = 0.5  # (slowest − fastest) / median of a typical case above which the user is told
_PADDING = (0, 1, 0, 0)


def run(
    settings: RunSettings,
    me: RankInfo,
    *,
    out: Path,
    max_seconds: float = 120.0,
    max_rounds: int = 25,
    supervised: float | None = None,
) -> CostModel:
    """Measure, fit, print a table and write the cost model.

    Args:
        settings: Of the recipe.
        me: This process, the only rank.
        out: JSON file to write.
        max_seconds: What measuring may take; building the model comes on top.
        max_rounds: Most repetitions of each case.
        supervised: Share of rows that have a target; None takes it from the recipe's index, or 1 without one.

    Raises:
        ValueError: Several ranks were started; the model does not fit this machine; too few cases fit the budget.
        FileNotFoundError: The recipe's tokenizer or model is not there.
    """
    if me.world_size != 1:
        raise ValueError(
            f"calibrate runs in one process, but {me.world_size} were started: start it without a launcher"
        )
    config = open_source(settings.model, settings.seed).config
    share, whence = _supervised(settings, supervised)
    with process_group(me) as world, _out_of_memory_explained(settings):
        needed, there = weight_bytes(config, settings.model.freeze), free_memory(world.device)
        if there is not None and needed > there:
            raise ValueError(
                f"the model's weights and gradients take {needed / 2**30:.1f} GiB on one rank, and {there / 2**30:.1f} "
                f"GiB are free on {world.device}: calibrate on a device with more memory, or plan with the costs of "
                "the model's shape, which need no file"
            )
        cases = make_cases(settings, config, world, supervised=share)
        memory = free_memory(world.device)
        measurements = measure(
            cases, max_seconds=max_seconds, max_rounds=max_rounds, memory=None if memory is None else 0.8 * memory
        )
    about = machine()
    name = f"{about['gpu'] or about['cpu']}, {about['threads']} threads"
    model = fit_model(measurements, machine=name, about=_about(settings, config, share, measurements.rounds))
    counted = run_costs(settings, config)
    _print(model, counted, measurements, f"{share:.0%}, {whence}")
    model.save(out)
    Console(soft_wrap=True).print(f"wrote {out}", highlight=False, markup=False)
    return model


@contextmanager
def _out_of_memory_explained(settings: RunSettings) -> Iterator[None]:
    """Turn an allocation that failed into advice: what a case needs is foretold, but only about."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory with packs of {settings.data.pack_tokens} tokens and chunks of "
            f"{settings.parallel.encode_tiles} tiles: lower data.pack_tokens or parallel.encode_tiles, or set "
            f"recompute ({str(error).splitlines()[0]})"
        ) from error


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    report = Path("/proc/meminfo")
    if not report.is_file():
        return None
    for line in report.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _supervised(settings: RunSettings, asked: float | None) -> tuple[float, str]:
    """The share of rows that have a target, and where it is from."""
    if asked is not None:
        return asked, "as given"
    try:
        meta = Index.open(settings.data.index).meta
    except FileNotFoundError:
        return 1.0, f"assumed, as there is no index at {settings.data.index}"
    return supervised_share(meta), "of the index's tokens"


def _about(settings: RunSettings, config: InternVLConfig, share: float, rounds: int) -> dict[str, str]:
    """What else the numbers belong to."""
    about, count = machine(), num_parameters(config)
    return {
        **{name: str(about[name]) for name in ("evovlm", "torch", "python", "system")},
        "parameters": ", ".join(f"{module} {count[module]}" for module in FEATURES),
        "precision": settings.precision,
        "pack_tokens": str(settings.data.pack_tokens),
        "encode_tiles": str(settings.parallel.encode_tiles),
        "recompute": f"vit {settings.recompute.vit}, llm {settings.recompute.llm}",
        "frozen": ", ".join(settings.model.freeze) or "nothing",
        "supervised": f"{share:.4f}",
        "rounds": str(rounds),
    }


def _print(model: CostModel, counted: CostModel, measurements: Measurements, supervised: str) -> None:
    console = Console()
    table = Table(
        box=SIMPLE_HEAD, title="Forward and backward", caption="* not fitted: checks the prediction", padding=_PADDING
    )
    for heading in ("", "measured", "spread", "predicted", "error"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for module in FEATURES:
        mine = [m for m in measurements.measured if m.case.module == module]
        for m, error in zip(mine, errors(mine, coefficients_of(model, module)), strict=True):
            predicted = float(coefficients_of(model, module) @ m.case.features)
            times = (_seconds(1e9 * m.median), f"{m.spread:.0%}", _seconds(predicted), f"{error:+.1%}")
            name = f"{module}  {m.case.name}{' *' if m.case.held_out else ''}"
            table.add_row(name, *times, end_section=m is mine[-1])
    console.print(table)
    for line in measurements.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, title="Coefficients, and the errors of what they predict", padding=_PADDING)
    for heading in ("", "measured", "FLOPs", "median", "largest", "held out"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for module, names in FEATURES.items():
        fit = model.fits[module]
        found, shape = coefficients_of(model, module), coefficients_of(counted, module)
        held_out = "-" if fit.held_out_error is None else f"{fit.held_out_error:.1%}"
        quality = (f"{fit.median_error:.1%}", f"{fit.largest_error:.1%}", held_out)
        for number, name in enumerate(names):
            numbers = (_seconds(found[number]), _flops(shape[number]), *(quality if number == 0 else ("", "", "")))
            table.add_row(f"{module}  {name}", *numbers, end_section=name == names[-1])
    console.print(table)
    for module, fit in model.fits.items():
        if fit.spread > _NOISY:
            console.print(
                f"{module}: repetitions differ by {fit.spread:.0%}; something else was using the machine: calibrate "
                "again when it is idle",
                style="yellow",
                highlight=False,
            )
    lines = [f"{model.machine}; {measurements.rounds} rounds in {measurements.seconds:.0f} s"]
    lines.append(f"rows with a target: {supervised}")
    for what, llm in (("measured", model.llm), ("by shape", counted.llm)):
        lines.append(f"a squared token costs as much as {_ratio(llm.per_square, llm.per_token)} rows, {what}")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _ratio(square: float, token: float) -> str:
    return f"{square / token:.3g}" if token else "infinitely many"


def _seconds(nanoseconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.4g} {unit}"
    return f"{nanoseconds:.4g} ns"


def _flops(count: float) -> str:
    """A number of FLOPs in the unit that suits it."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}" if count else "-"
