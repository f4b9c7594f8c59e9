"""The command ``evovlm evaluate``: a run on its test tasks, an exported model in a suite, or an answer file."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_BENCHMARKS = (
    "mmmu, ai2d, mmbench, chartqa, docvqa, infovqa, textvqa, vqa, ocrbench, pope, refcoco, screenspot, vsibench, "
    "mathvista"
)


class SuiteName(StrEnum):
    """Who measures."""

    LMMS_EVAL = "lmms-eval"
    LM_EVAL = "lm-eval"


class AnswerForm(StrEnum):
    """Where the answer stands in what the model said."""

    DIRECT = "direct"
    MARKED = "marked"
    EN_V2 = "en_v2"
    EN = "en"
    R1 = "r1"


def evaluate(
    context: typer.Context,
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TARGET",
            help="Folder of a run, folder of an exported model (--suite), or answer files (--benchmark).",
        ),
    ],
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes to start on this machine.")] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Of a run: newest, initial (the weights it started from), or a checkpoint's folder.")
    ] = "newest",
    test_index: Annotated[
        Path | None,
        typer.Option(help="Index of questions for a run, one dataset per task; by default what the run names."),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Score answer files as this benchmark does: {_BENCHMARKS}.")
    ] = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Truths of questions, where answer files do not hold them. Repeatable."),
    ] = None,
    prompt: Annotated[
        AnswerForm,
        typer.Option(help="How answer files hold answers: direct is the whole reply; others as in preference build."),
    ] = AnswerForm.DIRECT,
    answer_key: Annotated[
        str | None, typer.Option(help="Key of the model's answer in answer files; by default the usual ones.")
    ] = None,
    truth_key: Annotated[
        str | None, typer.Option(help="Key of the truth in answer files; by default the usual ones.")
    ] = None,
    suite: Annotated[
        SuiteName | None,
        typer.Option(help="Run this suite on an exported model; lm-eval gets its language model alone."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="The suite's tasks, such as mmmu_val,chartqa or gsm8k.")
    ] = None,
    suite_args: Annotated[
        str | None, typer.Option(metavar="WORDS", help="More options for the suite, such as '--limit 100'.")
    ] = None,
    suite_python: Annotated[
        Path | None, typer.Option(help="Python that has the suite installed; by default the one that runs evovlm.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the suite's command and run nothing.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="JSON file for scores of answer files; folder for a suite's results, by default TARGET/evaluations.",
        ),
    ] = None,
) -> None:
    """Score a run, an exported model or answer files.

    A run answers its test tasks greedily, exact matches count; scores and answers go to evaluations/ in its folder.
    With --suite, lmms-eval or lm-eval runs on an exported model. With --benchmark, files of a model's answers are
    scored by the benchmark's own definition; several files are splits of one benchmark.
    """
    if benchmark is not None and suite is not None:
        raise ValueError("--benchmark scores answer files, --suite runs on an exported model: give one of them")
    if benchmark is not None:
        from evovlm.launch.evaluate_answers import AnswerOptions, evaluate_answers

        options = AnswerOptions(benchmark, annotations or [], prompt.value, answer_key, truth_key, out)
        evaluate_answers(targets, options)
        return
    if len(targets) > 1:
        raise ValueError(f"{len(targets)} targets: only answer files, with --benchmark, are scored together")
    if suite is not None:
        from evovlm.launch.evaluate_suite import evaluate_suite, parse_options

        chosen = parse_options(targets[0], suite.value, tasks, suite_args, out, suite_python, ranks)
        evaluate_suite(targets[0], chosen, dry_run=dry_run)
        return
    _check_run(targets[0])
    from evovlm.launch import commands
    from evovlm.launch.cli import as_rank

    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        commands.evaluate(targets[0], me, checkpoint, test_index)


def _check_run(target: Path) -> None:
    """Say what is wrong where the target is something else than a run, before any rank starts."""
    if target.is_file():
        raise ValueError(f"{target} is a file: score its answers with --benchmark NAME, which is one of {_BENCHMARKS}")
    if (target / "settings.json").is_file():
        return
    if (target / "config.json").is_file():
        raise ValueError(
            f"{target} is an exported model: run a suite on it, --suite lmms-eval or --suite lm-eval with --tasks"
        )
    raise FileNotFoundError(f"{target} is not a run directory: it has no settings.json")
