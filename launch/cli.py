"""The ``evovlm`` command: what each subcommand takes. What they do is in ``commands.py``.

Nothing heavy is imported before a subcommand runs, so ``evovlm --help`` answers at once. Words that are no option of
``train``, ``submit``, ``index`` or ``plan`` are settings: ``--optimizer.lr 1e-4`` (see ``settings.py``).

A user's mistake (a file that is not there, a `ValueError` raised by evovlm itself) ends the command with one red line
and exit code 2; anything else is a fault of ours and shows its traceback, exit code 1.
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from evovlm.launch.cli_bench import bench_app
from evovlm.launch.cli_best_of_n import best_of_n
from evovlm.launch.cli_evaluate import evaluate
from evovlm.launch.cli_preference import preference_app
from evovlm.launch.cli_prm import prm_app
from evovlm.launch.cli_score import score
from evovlm.launch.heap import restart_with_heap
from evovlm.launch.orphans import end_with_starter
from evovlm.launch.ranks import RankError, RankInfo, RunInterrupted, leave_error, start_ranks

SETTINGS_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}
SETTINGS_METAVAR = "[OPTIONS] [--dotted.key VALUE]..."
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one of evovlm's own.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]

app = typer.Typer(
    name="evovlm",
    help="Train vision-language models of the ViT-MLP-LLM family, from a laptop CPU to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ExportFormat(StrEnum):
    """Whose names an exported checkpoint uses."""

    INTERNVL = "internvl"
    TRANSFORMERS = "transformers"


class VerifyPrecision(StrEnum):
    """What ``verify`` computes in; the tolerance is 1e-10 or 1e-5."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"


class VerifyLoss(StrEnum):
    """What the trainings that ``verify`` compares minimise."""

    CROSS_ENTROPY = "cross_entropy"
    MPO = "mpo"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evovlm {importlib.metadata.version('evovlm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error was raised.")] = False,
) -> None:
    """Hold the options of every subcommand; `main` takes ``--traceback`` wherever it stands."""


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def index(
    context: typer.Context,
    meta: Annotated[Path, typer.Argument(metavar="META", help="InternVL meta JSON: dataset name → settings.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; it is made.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", "-t", help="Folder with tokenizer.json.")],
    size: Annotated[
        str | None, typer.Option(help="Take tile settings from a model size (evovlm models); default: as published.")
    ] = None,
) -> None:
    """Scan a meta JSON's datasets into an index.

    Reads every line, validates it, lists what cannot be used with its reason, and writes the memory-mapped index
    that training reads. Settings: see the data format page of the documentation.
    """
    from evovlm.launch import commands

    commands.index(meta, out, tokenizer, size, context.args)


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def train(
    context: typer.Context,
    recipe: Recipe,
    resume: Annotated[str, typer.Option(help="auto (newest checkpoint of the run), none, or a checkpoint.")] = "auto",
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine; by default what the recipe says.")
    ] = None,
) -> None:
    """Train one stage as a recipe says.

    Settings on the command line are laid over those of the recipe: --optim.lr 1e-4. Values are written as in TOML.
    """
    from evovlm.launch import commands

    settings = commands.run_settings(recipe, context.args)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, settings.ranks, context.obj)
    if me is not None:
        commands.train(settings, me, resume)


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def submit(
    context: typer.Context,
    recipe: Recipe,
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, help="Nodes of the job.")],
    ranks_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each node; by default its GPUs, or the recipe's ranks without GPUs."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs to ask for on each node.")] = 0,
    cpus_per_task: Annotated[
        int | None,
        typer.Option(min=1, help="Cores to ask for on each node; by default one and data.num_workers for each rank."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 1-00:00:00; default: the partition's.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition; default: the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account; default: yours.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job; default: that of the run's folder.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of sbatch, such as mem=0; may be given repeatedly."),
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the job's script and submit nothing.")] = False,
) -> None:
    """Train one stage on several nodes, as a job of SLURM.

    The recipe and the settings on the command line are checked before the job waits in the queue. The script that ran,
    its output and the output of every rank are kept in logs/ in the run's folder.
    """
    from evovlm.launch import commands

    commands.submit(
        recipe,
        context.args,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        job_name=job_name,
        sbatch=sbatch or [],
        print_only=print_only,
    )


app.command()(evaluate)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it is made.")],
    format: Annotated[
        ExportFormat, typer.Option(help="Names of weights and config: OpenGVLab's, or transformers'.")
    ] = ExportFormat.TRANSFORMERS,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint's folder; by default the newest.")] = None,
) -> None:
    """Write a run's weights in Hugging Face format."""
    from evovlm.launch import commands

    commands.export(run, out, "internvl" if format is ExportFormat.INTERNVL else "transformers", checkpoint)


@app.command("extend-tokenizer")
def extend_tokenizer(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a base language model's tokenizer.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it is made.")],
) -> None:
    """Add InternVL's tokens to a base model's tokenizer.

    Needed once before native pre-training from a base language model; index and recipe then name the new folder.
    """
    from evovlm.launch import commands

    commands.extend_tokenizer(source, out)


@app.command()
def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for data, runs and summary.json; by default runs/quickstart, or runs/quickstart-short.",
        ),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A few steps of everything: checks, but learns little.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of data, weights, order and sampling.")] = 0,
) -> None:
    """Train and measure a tiny model, end to end.

    Makes small data from real digits, fonts, photographs and text, indexes it, pre-trains and tunes a tiny model on
    it, lets it prefer its own right answers to its wrong ones, and prints what the model has learned.
    """
    from evovlm.launch import commands

    folder = out or Path("runs/quickstart-short" if short else "runs/quickstart")
    commands.quickstart(folder, short=short, ranks=ranks, seed=seed)


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def plan(
    context: typer.Context,
    recipe: Recipe,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to show.")] = 10,
    first: Annotated[int, typer.Option(min=0, help="The first step to show.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
) -> None:
    """Show what the steps of a recipe take.

    Plans steps as training would and prints which rank holds what, and the steps' samples, tokens, tiles and balance;
    nothing is trained.
    """
    from evovlm.launch import commands

    commands.plan(commands.run_settings(recipe, context.args), first=first, steps=steps, num_ranks=ranks)


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def calibrate(
    context: typer.Context,
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file of costs to write.")],
    max_seconds: Annotated[float, typer.Option(min=1, help="What measuring may take.")] = 120.0,
    max_rounds: Annotated[int, typer.Option(min=5, help="Most repetitions of each case.")] = 25,
    supervised: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rows with a target; default: the index's.")
    ] = None,
) -> None:
    """Measure what a recipe's modules cost on this machine.

    Times forward and backward of ViT, projector and LLM on the shapes that the recipe trains, fits the cost models that
    plans are balanced by, and says how well they predict. Name the file as parallel.cost_model in the recipe.
    """
    from evovlm.launch import commands

    commands.calibrate(commands.run_settings(recipe, context.args), out, max_seconds, max_rounds, supervised)


@app.command(context_settings=SETTINGS_WORDS, options_metavar=SETTINGS_METAVAR)
def verify(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Verify this recipe's layouts instead of the matrix.")
    ] = None,
    plans: Annotated[
        list[str] | None, typer.Option("--plans", help="Only plans whose name contains or fits this; repeatable.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Most ranks to fork, where no launcher has started any.")] = 8,
    precision: Annotated[VerifyPrecision, typer.Option(help="Of the trainings that are compared.")] = (
        VerifyPrecision.FLOAT64
    ),
    loss: Annotated[
        VerifyLoss, typer.Option(help="Of the trainings: conversations, or preference pairs; a recipe says it itself.")
    ] = VerifyLoss.CROSS_ENTROPY,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file, too.")] = None,
) -> None:
    """Check that every layout trains the same model.

    Trains a small model under each plan of a matrix on this machine's ranks, and in one process without the engine,
    and prints the largest relative differences of loss, gradients, and weights after three steps.
    """
    from evovlm.launch import commands

    wanted: Literal["float32", "float64"] = "float64" if precision is VerifyPrecision.FLOAT64 else "float32"
    of: Literal["cross_entropy", "mpo"] = "mpo" if loss is VerifyLoss.MPO else "cross_entropy"
    if not commands.verify(recipe, context.args, plans or [], ranks, wanted, json_file, of):
        raise typer.Exit(1)


app.add_typer(bench_app, name="bench")
app.add_typer(preference_app, name="preference")
app.add_typer(prm_app, name="prm")
app.command()(score)
app.command()(best_of_n)


@app.command()
def models() -> None:
    """List the model sizes."""
    from evovlm.launch import commands

    commands.models()


@app.command()
def doctor() -> None:
    """Say what this machine has and lacks.

    One line each: versions, CPU, GPUs, evovlm's own extension, and the optional packages with what they are for.
    """
    from evovlm.launch.doctor import report

    raise typer.Exit(report())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (a fault), 2 (a user's mistake), 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        restart_with_heap(words)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        app(words, prog_name="evovlm", obj=words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except RankError as error:
        _say(f"rank {error.rank}: {error}")
        if error.details and (show_traceback or error.exit_code != 2):
            sys.stderr.write(error.details)
        return error.exit_code
    except RunInterrupted as interrupt:
        _say(str(interrupt))
        return 128 + interrupt.signal
    except Exception as error:  # noqa: BLE001 - the outermost frame: a rank leaves its error for the agent
        exit_code = 2 if _is_users_mistake(error) else 1
        leave_error(error, exit_code)
        if exit_code == 1 or show_traceback:
            sys.excepthook(type(error), error, error.__traceback__)
        if exit_code == 2:
            _say(str(error))
        return exit_code
    return 0


def as_rank(asked: int | None, default: int, words: Sequence[str]) -> RankInfo | None:
    """Return which rank this process is; None if it has started the ranks and they have finished."""
    me = RankInfo.from_environment()
    if me.launched and asked not in (None, me.world_size):
        raise ValueError(f"--ranks {asked}, but the launcher has started {me.world_size} ranks; leave --ranks out")
    if me.launched:
        end_with_starter()
    if me.launched or (asked or default) == 1:
        return me
    start_ranks(asked or default, words)
    return None


def _is_users_mistake(error: Exception) -> bool:
    """Whether the input is at fault: a file is missing or in the way, or evovlm raised a `ValueError` on purpose."""
    if isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | PermissionError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_by = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return isinstance(error, ValueError) and any(
        name.split(".")[0] == "evovlm" for name in (type(error).__module__, raised_by)
    )


def _say(message: str) -> None:
    typer.secho(f"evovlm: {message}", fg=typer.colors.RED, err=True)
