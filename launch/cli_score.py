"""The command ``evovlm score``: what it takes. What it does is in ``score.py``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evovlm.launch.cli_sampling import (
    MaxTilesOption,
    RanksOption,
    RewardModelOption,
    RewardSystemPromptOption,
)


class Reduction(StrEnum):
    """How the scores of a solution's steps become one."""

    MEAN = "mean"
    MIN = "min"
    PRODUCT = "product"
    LAST = "last"


def score(
    context: typer.Context,
    candidates: Annotated[
        Path, typer.Argument(metavar="CANDIDATES", help="Candidate file (.jsonl): questions with several solutions.")
    ],
    model: RewardModelOption,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File to write; scores are kept in OUT.parts, where a new start goes on."),
    ],
    reduction: Annotated[Reduction, typer.Option(help="From the steps' scores to the reward.")] = Reduction.MEAN,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Most steps of a solution; neighbours of more are joined.")
    ] = 12,
    outcome: Annotated[
        bool, typer.Option("--outcome", help="Judge whole solutions: the model is an outcome reward model.")
    ] = False,
    system_prompt: RewardSystemPromptOption = None,
    max_tiles: MaxTilesOption = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Where relative image paths begin; by default the candidate file's folder.")
    ] = None,
    ranks: RanksOption = None,
) -> None:
    """Score candidate solutions step by step with a process reward model.

    Every candidate gets P("+") of each of its steps and a reward, or the reason why it could not be scored. All
    candidates of a question share one pass over its text and one encoding of its images.
    """
    from evovlm.launch import score as scoring
    from evovlm.launch.cli import as_rank

    options = scoring.Options(
        model=model,
        reduction=reduction.value,
        system_prompt=system_prompt,
        max_steps=max_steps,
        outcome=outcome,
        max_tiles=max_tiles,
        image_root=image_root,
    )
    scoring.check(candidates, out, options)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        scoring.score(candidates, out, options, me)
