"""The command ``evovlm best-of-n``: what it takes. What it does is in ``best_of_n.py``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evovlm.launch.cli_sampling import (
    ApiKeyOption,
    Backend,
    BackendOption,
    LimitOption,
    MetaArgument,
    ModelOption,
    Prompt,
    PromptOption,
    RanksOption,
    StartOption,
    SystemPromptOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    UrlOption,
    VerifyOption,
)
from evovlm.launch.cli_score import Reduction


class CriticName(StrEnum):
    """Who chooses among candidates."""

    PRM = "prm"
    ORM = "orm"
    MAJORITY = "majority"
    PRM_MAJORITY = "prm-majority"
    RANDOM = "random"


def best_of_n(
    context: typer.Context,
    meta: MetaArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; started again, it goes on there.")],
    model: ModelOption = None,
    critic: Annotated[
        list[CriticName] | None,
        typer.Option(
            help="Who chooses: a process or outcome reward model, the most frequent answer, the same weighted by the "
            "process reward, or chance. Repeatable; by default majority and random."
        ),
    ] = None,
    critic_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CRITIC=]MODEL",
            help="Run or exported directory of the reward model; prm=… and orm=… if there are two. Without it the "
            "rewards of --candidates count.",
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Candidates to each question.")] = 32,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 50,
    top_p: TopPOption = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest candidate; one cut off there has no answer.")] = (
        4096
    ),
    prompt: PromptOption = Prompt.EN_V2,
    verify: VerifyOption = None,
    candidates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Candidate file of these questions; by default candidates are generated."),
    ] = None,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="End with OUT/candidates.jsonl, its pass@1 and its oracle.")
    ] = False,
    reduction: Annotated[
        Reduction | None,
        typer.Option(
            help="How the scores of a candidate's steps become its reward; by default mean, or what --candidates has."
        ),
    ] = None,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Most steps that a critic sees; where there are more, neighbours are joined.")
    ] = 12,
    critic_system_prompt: Annotated[
        str | None,
        typer.Option(
            help="System turn that critics were trained with; '': the chat template's own. By default that of "
            "evovlm prm build, and of a published reward model its own."
        ),
    ] = None,
    system_prompt: SystemPromptOption = None,
    limit: LimitOption = 0,
    start: StartOption = 0,
    seed: Annotated[int, typer.Option(help="Of sampling, of blind choices, of subsets and of intervals.")] = 0,
    ranks: RanksOption = None,
    backend: BackendOption = Backend.EVOVLM,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Measure Best-of-N: sample candidates, let critics choose, print accuracy against N = 1, 2, 4, 8, 16, 32.

    Writes OUT/candidates.jsonl (which evovlm score and --candidates read), OUT/scores, OUT/selected.jsonl (what every
    critic chose among all candidates) and OUT/summary.json: accuracy with 95 % intervals over questions, per dataset
    and overall, of pass@1, of each critic and of the oracle, who always finds a right candidate where there is one.
    """
    from evovlm.launch import best_of_n as command
    from evovlm.launch.cli import as_rank
    from evovlm.launch.sampling import Source

    options = command.Options(
        critics=[name.value for name in critic or (CriticName.MAJORITY, CriticName.RANDOM)],
        critic_models=critic_model or [],
        critic_system_prompt=critic_system_prompt,
        max_steps=max_steps,
        reduction=None if reduction is None else reduction.value,
        num=num,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        prompt=prompt.value,
        verify=verify or [],
        candidates=candidates,
        generate_only=generate_only,
        limit=limit or None,
        start=start,
        system_prompt=system_prompt,
        seed=seed,
    )
    source = Source(model=model, backend=backend.value, url=url, api_key=api_key, reuse=candidates is not None)
    command.check(meta, options, source)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        command.measure(meta, out, options, source, me)
