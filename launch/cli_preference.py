"""The commands under ``evovlm preference``: what they take. What they do is in ``preference.py``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evovlm.launch.cli_sampling import (
    ApiKeyOption,
    Backend,
    BackendOption,
    BuildOutOption,
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
)

preference_app = typer.Typer(
    help="Preference data: pairs of a better and a worse answer, for MPO.", no_args_is_help=True, rich_markup_mode=None
)

_RULES = (
    "exact, choice, numeric, numeric:TOLERANCE, relaxed, anls, vqa, contains, yes_no, iou, point, mra, mathvista or "
    "math"
)


class Method(StrEnum):
    """How pairs come about."""

    CORRECTNESS = "correctness"
    DROPOUT_NTP = "dropout-ntp"


@preference_app.callback()
def _preference() -> None:
    """Keep ``build`` a subcommand: with a single command and no callback it would be the group itself."""


@preference_app.command()
def build(
    context: typer.Context,
    meta: MetaArgument,
    out: BuildOutOption,
    model: ModelOption = None,
    method: Annotated[
        Method,
        typer.Option(help="correctness: right against wrong answers. dropout-ntp: answers finished without the image."),
    ] = Method.CORRECTNESS,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers to each question (correctness).")] = 32,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 50,
    top_p: TopPOption = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; one cut off there is not used.")] = 4096,
    prompt: PromptOption = Prompt.DIRECT,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATASET=]RULE", help=f"How answers are checked, of all datasets or of one: {_RULES}. Repeatable."
        ),
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="Most pairs of a question.")] = 15,
    max_lines: Annotated[int, typer.Option(min=1, help="Most pairs in all; more are thinned out.")] = 1_200_000,
    limit: LimitOption = 7000,
    start: StartOption = 0,
    start_ratio: Annotated[
        float, typer.Option(help="Share of the chosen answer's words that stays (dropout-ntp).")
    ] = 0.5,
    chosen_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Continue right answers of this earlier build, not the data's own (dropout-ntp)."
        ),
    ] = None,
    system_prompt: SystemPromptOption = None,
    seed: Annotated[int, typer.Option(help="Of sampling and of the choice of pairs.")] = 0,
    reuse_samples: Annotated[
        bool, typer.Option("--reuse-samples", help="Generate nothing: check and pair the samples in OUT again.")
    ] = False,
    ranks: RanksOption = None,
    backend: BackendOption = Backend.EVOVLM,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Build preference data from a model's own answers.

    correctness samples answers to each question, checks them, and pairs right ones with wrong ones. dropout-ntp keeps
    the first half of a good answer and has the model finish it without the image. Writes OUT/meta.json for evovlm
    index --kind preference, OUT/summary.json with all counts, and keeps every sample in OUT/samples.
    """
    from evovlm.launch import preference
    from evovlm.launch.cli import as_rank
    from evovlm.launch.sampling import Source

    options = preference.Options(
        method=method.value,
        num_samples=num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        prompt=prompt.value,
        verify=verify or [],
        max_pairs=max_pairs,
        max_lines=max_lines,
        limit=limit or None,
        start=start,
        start_ratio=start_ratio,
        chosen_from=chosen_from,
        system_prompt=system_prompt,
        seed=seed,
    )
    source = Source(model=model, backend=backend.value, url=url, api_key=api_key, reuse=reuse_samples)
    preference.check(meta, options, source)  # mistakes show here, once, before any rank starts
    me = as_rank(ranks, 1, context.obj)
    if me is not None:
        preference.build(meta, out, options, source, me)
