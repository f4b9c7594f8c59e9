"""The commands under ``evovlm preference``: what they take. What they do is in ``preference.py``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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


class Prompt(StrEnum):
    """How a question asks for an answer that can be checked."""

    DIRECT = "direct"
    MARKED = "marked"
    EN_V2 = "en_v2"
    EN = "en"
    R1 = "r1"


class Backend(StrEnum):
    """What generates."""

    EVOVLM = "evovlm"
    TRANSFORMERS = "transformers"
    SERVER = "server"


@preference_app.callback()
def _preference() -> None:
    """Keep ``build`` a subcommand: with a single command and no callback it would be the group itself."""


@preference_app.command()
def build(
    context: typer.Context,
    meta: Annotated[
        Path,
        typer.Argument(metavar="META", help="InternVL meta JSON of questions: conversations, or preference pairs."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; started again, a build goes on there.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder of a run or of an exported model; with a server, its name there."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(help="correctness: right against wrong answers. dropout-ntp: answers finished without the image."),
    ] = Method.CORRECTNESS,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers to each question (correctness).")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many most likely tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability in all.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; one cut off there is not used.")] = 4096,
    prompt: Annotated[
        Prompt,
        typer.Option(
            help="direct, marked: questions as written; the answer is the whole reply, or stands behind 'Answer:'. "
            "en_v2, en: steps, and a last line 'Answer: \\boxed{…}' or 'Final answer: …'. r1: thoughts in <think>."
        ),
    ] = Prompt.DIRECT,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATASET=]RULE", help=f"How answers are checked, of all datasets or of one: {_RULES}. Repeatable."
        ),
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=1, help="Most pairs of a question.")] = 15,
    max_lines: Annotated[int, typer.Option(min=1, help="Most pairs in all; more are thinned out.")] = 1_200_000,
    limit: Annotated[int, typer.Option(min=0, help="Lines to read of each dataset; 0: all.")] = 7000,
    start: Annotated[int, typer.Option(min=0, help="Lines of each dataset to pass over first.")] = 0,
    start_ratio: Annotated[
        float, typer.Option(help="Share of the chosen answer's words that stays (dropout-ntp).")
    ] = 0.5,
    chosen_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Continue right answers of this earlier build, not the data's own (dropout-ntp)."
        ),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="System turn of questions without one; by default the chat template's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling and of the choice of pairs.")] = 0,
    reuse_samples: Annotated[
        bool, typer.Option("--reuse-samples", help="Generate nothing: check and pair the samples in OUT again.")
    ] = False,
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
