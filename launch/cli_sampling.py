"""Options that several commands take alike: of what samples from a model, and of what judges steps.

preference build, prm build, best-of-n ─► questions, prompt, sampling, generator
score, prm evaluate                    ─► reward model
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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


MetaArgument = Annotated[
    Path,
    typer.Argument(metavar="META", help="InternVL meta JSON of questions: conversations, or preference pairs."),
]
BuildOutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; started again, a build goes on there.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder of a run or of an exported model; with a server, its name there."),
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Of sampling.")]
TopKOption = Annotated[int, typer.Option(min=0, help="Draw from so many most likely tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability in all.")]
PromptOption = Annotated[
    Prompt,
    typer.Option(
        help="direct, marked: questions as written; the answer is the whole reply, or stands behind 'Answer:'. "
        "en_v2, en: steps, and a last line 'Answer: \\boxed{…}' or 'Final answer: …'. r1: thoughts in <think>."
    ),
]
VerifyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[DATASET=]RULE",
        help="How answers are checked, of all datasets or of one; rules are those of evovlm preference build. "
        "Repeatable.",
    ),
]
LimitOption = Annotated[int, typer.Option(min=0, help="Lines to read of each dataset; 0: all.")]
StartOption = Annotated[int, typer.Option(min=0, help="Lines of each dataset to pass over first.")]
SystemPromptOption = Annotated[
    str | None, typer.Option(help="System turn of questions without one; by default what the model was trained with.")
]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Processes to start on this machine.")]
BackendOption = Annotated[Backend, typer.Option(help="What generates.")]
UrlOption = Annotated[
    str | None,
    typer.Option(help="Of an OpenAI-compatible server (vLLM, LMDeploy), such as http://host:8000/v1."),
]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key for the server.", show_default=False)
]

RewardModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Process reward model: folder of a run or of an exported model.")
]
RewardSystemPromptOption = Annotated[
    str | None,
    typer.Option(
        help="System turn that the model was trained with; '': the chat template's own. By default that of "
        "evovlm prm build, and of a published reward model its own."
    ),
]
MaxTilesOption = Annotated[
    int | None, typer.Option(min=1, help="Most tiles of a question's images; by default as the model says.")
]
