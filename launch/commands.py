"""What the subcommands of ``evovlm`` do: read settings, join the ranks, call the engine.

Imports stand inside the functions: a subcommand pays only for what it uses.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.settings import find_recipe, load_settings, parse_overrides

if TYPE_CHECKING:
    from evovlm.engine.run_data import RunData
    from evovlm.engine.settings import RunSettings
    from evovlm.models.hf.names import Format
    from evovlm.parallel.world import World


def run_settings(recipe: str, overrides: Sequence[str]) -> "RunSettings":
    """Read a run's settings; see `load_settings` for the errors."""
    from evovlm.engine.settings import RunSettings

    return load_settings(RunSettings, find_recipe(recipe), overrides)


def index(meta: Path, out: Path, tokenizer: Path, size: str | None, overrides: Sequence[str]) -> None:
    """Build an index and print what went into it; nothing is done if it is current."""
    from evovlm.data.build_index import IndexSettings
    from evovlm.launch.indexing import build_with_progress

    words = [f"--meta={meta}", f"--out={out}", f"--tokenizer={tokenizer}"]
    if size is not None:
        from evovlm.models.table import size as size_of

        config = size_of(size)
        words += [f"--tile_size={config.vision.tile_size}", f"--tokens_per_tile={config.tokens_per_tile}"]
        words += [f"--max_tiles={config.max_tiles}"]
    build_with_progress(load_settings(IndexSettings, None, [*words, *overrides]))


def train(settings: "RunSettings", ranks: RankInfo, resume: str) -> None:
    """Train as one rank of a run."""
    from evovlm.engine import trainer

    with process_group(ranks, timeout=settings.parallel.timeout) as world:
        trainer.train(_on_nodes(settings, ranks, world), world, resume)


def _on_nodes(settings: "RunSettings", ranks: RankInfo, world: "World") -> "RunSettings":
    """Say how many ranks a node has, where the recipe does not and all nodes have as many: plans are made by it."""
    largest, smallest = world.max([ranks.local_world_size, -ranks.local_world_size])
    if settings.parallel.node_ranks or largest != -smallest:
        return settings
    parallel = settings.parallel.model_copy(update={"node_ranks": ranks.local_world_size})
    return settings.model_copy(update={"parallel": parallel})


def submit(
    recipe: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int | None,
    gpus_per_node: int,
    cpus_per_task: int | None,
    time: str | None,
    partition: str | None,
    account: str | None,
    job_name: str | None,
    sbatch: Sequence[str],
    print_only: bool,
) -> None:
    """Submit a run to SLURM and say where its logs will be, or print the script only."""
    from rich.console import Console

    from evovlm.launch import slurm

    settings = run_settings(recipe, overrides)
    if any(override.path == ("ranks",) for override in parse_overrides(overrides)):
        raise slurm.SlurmError("--ranks counts processes of this machine; on a cluster give --ranks-per-node")
    ranks = ranks_per_node or gpus_per_node or settings.ranks
    job = slurm.Job(
        nodes=nodes,
        ranks_per_node=ranks,
        cpus_per_task=cpus_per_task or ranks * (1 + settings.data.num_workers),
        gpus_per_node=gpus_per_node,
        name=job_name or settings.out.absolute().name,
        time=time,
        partition=partition,
        account=account,
        options=slurm.parse_options(sbatch),
    )
    script = slurm.render(job, settings.out, recipe, overrides)
    if print_only:
        sys.stdout.write(script)
        return
    slurm.find_sbatch()
    _open_data(settings, nodes * ranks)  # an index that is missing, or does not fit, shall not wait in the queue
    number = slurm.submit(script, settings.out)
    logs = settings.out / "logs"
    console = Console(soft_wrap=True)
    console.print(f"submitted job {number}: {nodes} nodes × {ranks} ranks", highlight=False)
    for what, file in (("script", f"{number}.sbatch"), ("output", f"{number}.txt"), ("ranks", f"{number}/node*")):
        console.print(f"  {what:6}  {logs / file}", highlight=False, markup=False)


def evaluate(run: Path, ranks: RankInfo, checkpoint: str, test_index: Path | None) -> None:
    """Score a run as one of its ranks, and print the scores."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from evovlm.engine.score_run import score_run

    with process_group(ranks) as world:
        result = score_run(run, world, checkpoint=checkpoint, test_index=test_index)
    if ranks.rank:
        return
    table = Table("task", box=SIMPLE_HEAD, title=f"{run}, {result['checkpoint']}: exact match on held-out questions")
    for column in ("exact match", "best constant answer", "questions"):
        table.add_column(column, justify="right")
    for task, scores in result["tasks"].items():
        table.add_row(
            task, f"{scores['exact_match']:.1%}", f"{scores['constant_baseline']:.1%}", f"{scores['num_test']:,}"
        )
    Console().print(table)


def export(run: Path, out: Path, format: "Format", checkpoint: Path | None) -> None:
    """Write a run's weights as a Hugging Face directory."""
    from rich.console import Console

    from evovlm.engine.runs import export_run

    export_run(run, out, format, checkpoint)
    Console().print(f"wrote {out} ({format} format)", highlight=False)


def extend_tokenizer(source: Path, out: Path) -> None:
    """Add InternVL's tokens to a base language model's tokenizer."""
    from rich.console import Console

    from evovlm.data.tokenizer_extend import extend_tokenizer as extend

    added = extend(source, out)
    Console().print(f"wrote {out}: {len(added)} tokens added ({' '.join(added)})", highlight=False, markup=False)


def quickstart(out: Path, *, short: bool, ranks: int, seed: int) -> None:
    """Run all phases of the quickstart."""
    from evovlm.launch.quickstart import run_quickstart

    run_quickstart(out, short=short, ranks=ranks, seed=seed)


def verify(
    recipe: str | None,
    overrides: Sequence[str],
    patterns: Sequence[str],
    ranks: int,
    precision: Literal["float32", "float64"],
    json_file: Path | None,
    loss: Literal["cross_entropy", "mpo"],
) -> bool:
    """Compare layouts with one process; returns whether all are equal."""
    from evovlm.launch.verify import verify as run

    settings = run_settings(recipe, overrides) if recipe is not None else None
    if settings is not None and settings.stage.name == "mpo":
        loss = "mpo"
    me = RankInfo.from_environment()
    return run(settings, me, patterns=patterns, ranks=ranks, precision=precision, json_file=json_file, loss=loss)


def plan(settings: "RunSettings", *, first: int, steps: int, num_ranks: int) -> None:
    """Print who holds what, and a table of planned steps; loads: largest of a rank over the mean."""
    from rich.console import Console
    from rich.table import Table

    from evovlm.data.step_plan import imbalance
    from evovlm.parallel.describe import describe_plan

    data = _open_data(settings, num_ranks)
    console = Console()
    for line in data.describe():
        console.print(line, markup=False, highlight=False)
    console.print(describe_plan(data.plan), markup=False, highlight=False, soft_wrap=True)
    table = Table(
        box=None,
        title=f"Steps for {num_ranks} ranks",
        caption="LLM, ViT: largest load of a rank over the mean",
    )
    columns = ("step", "epoch", "samples", "tokens", "fill", "tiles", "LLM", "ViT", "targets", "hash")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    capacity = settings.data.packs_per_step * settings.data.pack_tokens
    for step in range(first, first + steps):
        planned = data.curriculum.plan_step(step, data.layout)
        counts = (planned.num_samples, planned.num_tokens)
        table.add_row(
            str(step),
            str(planned.epoch),
            *(f"{count:,}" for count in counts),
            f"{planned.num_tokens / capacity:.1%}",
            f"{planned.num_tiles:,}",
            f"{imbalance(planned.llm_load):.3f}",
            f"{imbalance(planned.vit_load):.3f}",
            f"{planned.num_supervised:,}",
            planned.digest()[:8],
        )
    console.print(table)


def calibrate(
    settings: "RunSettings", out: Path, max_seconds: float, max_rounds: int, supervised: float | None
) -> None:
    """Measure and fit the cost models of a recipe."""
    from evovlm.launch import calibrate

    calibrate.run(
        settings,
        RankInfo.from_environment(),
        out=out,
        max_seconds=max_seconds,
        max_rounds=max_rounds,
        supervised=supervised,
    )


def models() -> None:
    """Print the table of sizes."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from evovlm.models.table import SIZES, num_parameters

    table = Table(
        "size", "ViT", "decoder", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Sizes (millions of parameters)"
    )
    for column in ("ViT", "projector", "LLM", "total"):
        table.add_column(column, justify="right")
    for name, config in SIZES.items():
        vision, decoder, count = config.vision, config.decoder, num_parameters(config)
        table.add_row(
            name,
            f"{vision.num_layers} × {vision.hidden_size}",
            f"{decoder.num_layers} × {decoder.hidden_size} {decoder.family}",
            *(f"{count[part] / 1e6:,.1f}" for part in ("vit", "projector", "llm", "total")),
        )
    Console().print(table)


def _open_data(settings: "RunSettings", num_ranks: int) -> "RunData":
    """Open a run's data as one of ``num_ranks`` ranks would; see `open_data` for the errors."""
    import torch

    from evovlm.engine.model_source import open_source
    from evovlm.engine.run_data import open_data
    from evovlm.parallel.world import World

    return open_data(settings, open_source(settings.model, settings.seed), World(0, num_ranks, torch.device("cpu")))
