"""The command ``evovlm best-of-n``: what it takes. What it does is in ``best_of_n.py``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evovlm.launch.cli_preference import Backend, Prompt


class CriticName(StrEnum):
    """Who chooses among candidates."""

    PRM = "prm"
    ORM = "orm"
    MAJORITY = "majority"
    PRM_MAJORITY = "prm-majority"
    RANDOM = "random"


class Reduction(StrEnum):
    """How the scores of steps become a reward."""

    MEAN = "mean"
    MIN = "min"
    PRODUCT = "product"
    LAST = "last"


def best_of_n(
    context: typer.Context,
    meta: Annotated[
        Path,
        typer.Argument(metavar="META", help="InternVL meta JSON of questions: conversations, or preference pairs."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; started again, it goes on there.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder of a run or of an exported model; with a server, its name there."),
    ] = None,
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
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many most likely tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability in all.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest candidate; one cut off there has no answer.")] = (
        4096
    ),
    prompt: Annotated[
        Prompt,
        typer.Option(
            help="direct, marked: questions as written; the answer is the whole reply, or stands behind 'Answer:'. "
            "en_v2, en: steps, and a last line 'Answer: \\boxed{…}' or 'Final answer: …'. r1: thoughts in <think>."
        ),
    ] = Prompt.EN_V2,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATASET=]RULE",
            help="How answers are checked, of all datasets or of one; rules are those of evovlm preference build. "
            "Repeatable.",
        ),
    ] = None,
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
        typer.Option(help="System turn of critics; by default that of their training. '': the chat template's own."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="System turn of questions without one; by default the chat template's own.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Lines to read of each dataset; 0: all.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="Lines of each dataset to pass over first.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling, of blind choices, of subsets and of intervals.")] = 0,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes to start on this machine.")] = None,
    backend: Annotated[Backend, typer.Option(help="What generates.")] = Backend.EVOVLM,
    url: Annotated[
        str | None,
        typer.Option(help="Of an OpenAI-compatible server (vLLM, LMDeploy), such as http://host:8000/v1."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key for the server.", show_default=False)
    ] = None,
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
