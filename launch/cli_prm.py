"""The commands under ``evovlm prm``: what they take. What they do is in the modules that they import."""

from pathlib import Path
from typing import Annotated

import typer

from evovlm.launch.cli_sampling import (
    ApiKeyOption,
    Backend,
    BackendOption,
    BuildOutOption,
    LimitOption,
    MaxTilesOption,
    MetaArgument,
    ModelOption,
    Prompt,
    PromptOption,
    RanksOption,
    RewardModelOption,
    RewardSystemPromptOption,
    StartOption,
    TopKOption,
    TopPOption,
    UrlOption,
    VerifyOption,
)

prm_app = typer.Typer(
    help="Process reward models: training data with a label for each step, and how well steps are judged.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@prm_app.callback()
def _prm() -> None:
    """Keep commands subcommands: with a single command and no callback it would be the group itself."""


@prm_app.command()
def build(
    context: typer.Context,
    meta: MetaArgument,
    out: BuildOutOption,
    model: ModelOption = None,
    num_solutions: Annotated[
        int | None,
        typer.Option(min=1, help="Solutions of each question; by default 4, or all of --solutions."),
    ] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="Continuations from the end of each step.")] = 16,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Most steps of a solution; where there are more, neighbours are joined.")
    ] = 16,
    early_stop: Annotated[
        bool,
        typer.Option(
            "--early-stop",
            help="Once no rollout is right, count all later steps as wrong, without rollouts. Solutions then go step "
            "by step and share no prefill: it pays where most fail early.",
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Of solutions and rollouts.")] = 1.0,
    top_k: TopKOption = 50,
    top_p: TopPOption = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest solution, and longest rollout; one cut off there has no answer.")
    ] = 4096,
    prompt: PromptOption = Prompt.EN_V2,
    verify: VerifyOption = None,
    mc_threshold: Annotated[
        float, typer.Option(help='A step is "+" if the share of right rollouts is above this.')
    ] = 0.0,
    until_first_error: Annotated[
        bool, typer.Option("--until-first-error", help='End each conversation with its first "-".')
    ] = False,
    outcome: Annotated[
        bool,
        typer.Option(
            "--outcome",
            help="Whole solutions, labelled by their own answers, for an outcome reward model: no rollouts.",
        ),
    ] = False,
    prm_system_prompt: Annotated[
        str | None,
        typer.Option(help="System turn of the conversations; by default one that says what to do. '': none."),
    ] = None,
    solutions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Candidate file whose solutions are labelled; by default they are sampled."),
    ] = None,
    limit: LimitOption = 3072,
    start: StartOption = 0,
    system_prompt: Annotated[
        str | None,
        typer.Option(help="System turn, for the policy, of questions without one; by default the chat template's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    reuse_samples: Annotated[
        bool,
        typer.Option(
            "--reuse-samples", help="Generate nothing: check and label the solutions and rollouts in OUT again."
        ),
    ] = False,
    ranks: RanksOption = None,
    backend: BackendOption = Backend.EVOVLM,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Build process reward data from a model's own solutions.

    Samples solutions, splits them at blank lines, continues each from the end of every step, and labels a step "+" if
    enough of its continuations reach the right answer; the last step is judged by the solution's own answer. Writes
    OUT/meta.json for evovlm index, raw rows in OUT/steps, OUT/summary.json with all counts, and keeps solutions and
    the answers of rollouts in OUT/samples and OUT/rollouts.
    """
    from evovlm.launch import prm
    from evovlm.launch.cli import as_rank
    from evovlm.launch.sampling import Source

    options = prm.Options(
        num_solutions=num_solutions,
        num_rollouts=rollouts,
        max_steps=max_steps,
        early_stop=early_stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        prompt=prompt.value,
        verify=verify or [],
        mc_threshold=mc_threshold,
        until_first_error=until_first_error,
        outcome=outcome,
        prm_system_prompt=prm_system_prompt,
        solutions=solutions,
        limit=limit or None,
        start=start,
        system_prompt=system_prompt,
        seed=seed,
    )
    source = Source(model=model, backend=backend.value, url=url, api_key=api_key, reuse=reuse_samples)
    prm.check(meta, options, source)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        prm.build(meta, out, options, source, me)


@prm_app.command()
def evaluate(
    context: typer.Context,
    steps: Annotated[
        list[Path],
        typer.Argument(
            metavar="STEPS...",
            help="Solutions with labelled steps (.jsonl): raw rows of evovlm prm build (OUT/steps), or "
            "VisualProcessBench's.",
        ),
    ],
    model: RewardModelOption,
    threshold: Annotated[
        float, typer.Option(help='A step is said to be right if P("+") is above this; VisualProcessBench takes 0.85.')
    ] = 0.85,
    mc_threshold: Annotated[
        float, typer.Option(help="A step of prm build is right if its share of right rollouts is above this.")
    ] = 0.0,
    until_first_error: Annotated[
        bool,
        typer.Option(
            "--until-first-error",
            help="Count a solution's steps up to its first wrong one, as in what prm build writes with this option.",
        ),
    ] = False,
    system_prompt: RewardSystemPromptOption = None,
    max_tiles: MaxTilesOption = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Where relative image paths begin; by default each file's folder.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, by source and overall.")
    ] = None,
    ranks: RanksOption = None,
) -> None:
    """Measure how well a process reward model tells right steps from wrong ones.

    Steps of all solutions are pooled: accuracy, macro-F1, precision and recall of "+" and "-", and the area under the
    ROC curve, which needs no threshold; beside them, what answering the more frequent sign every time would reach.
    """
    from evovlm.launch import prm_evaluate
    from evovlm.launch.cli import as_rank

    options = prm_evaluate.Options(
        model=model,
        threshold=threshold,
        mc_threshold=mc_threshold,
        until_first_error=until_first_error,
        system_prompt=system_prompt,
        max_tiles=max_tiles,
        image_root=image_root,
    )
    prm_evaluate.check(steps, options, json_file)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        prm_evaluate.evaluate(steps, options, json_file, me)
