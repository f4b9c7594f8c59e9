"""A model to be asked, not trained: a run's checkpoint, or a directory of either published format, whole on one device.

RUN/checkpoints, RUN/tokenizer, RUN/settings.json (stride, pixels) ─┐
DIR/*.safetensors, DIR/tokenizer.json, DIR/config.json ─────────────┴─► OpenModel: weights, tokenizer, how to see
"""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from evovlm.data.batch import V2PESettings
from evovlm.data.images import MEAN_STD, Normalization
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate import answer_v2pe
from evovlm.engine.generation_prompts import PromptMaker
from evovlm.engine.runs import load_model, read_settings
from evovlm.engine.settings import DTYPES
from evovlm.models.hf.chat_template import default_system
from evovlm.models.hf.load import load_config, read_state
from evovlm.models.internvl import InternVL


@dataclass(frozen=True)
class OpenModel:
    """A model and what makes its prompts.

    Attributes:
        model: Not sharded, in evaluation mode.
        prompts: Renders conversations and tiles images as it was trained on.
    """

    model: InternVL
    prompts: PromptMaker


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run rather than a published directory."""
    return (Path(folder) / "settings.json").is_file()


def open_run(
    run: str | Path,
    checkpoint: str | Path = "newest",
    device: torch.device | None = None,
    *,
    dtype: torch.dtype | None = None,
    v2pe: V2PESettings | None = None,
    system_prompt: str | None = None,
    max_tiles: int | None = None,
) -> OpenModel:
    """Open a run's model, with its tokenizer, pixel normalisation and visual stride.

    Args:
        run: Run directory.
        checkpoint: ``newest``, or a checkpoint directory.
        device: The CPU by default.
        dtype: By default float32 on a CPU, elsewhere what the run computed in.
        v2pe: Visual stride; None: that of the run, 1/4 where it drew strides at random.
        system_prompt: System turn of conversations without one; None: the one that it was trained with.
        max_tiles: Most tiles of a conversation's images; None: as the model's configuration says.

    Raises:
        FileNotFoundError: No such run or checkpoint.
        ValueError: The checkpoint is damaged or of another model.
    """
    run, device = Path(run), device or torch.device("cpu")
    settings = read_settings(run)
    model = load_model(run, None if checkpoint == "newest" else Path(checkpoint), device)
    if dtype is None and device.type != "cpu":
        dtype = DTYPES[settings.precision].compute
    prompts = PromptMaker(
        Tokenizer.load(run / "tokenizer"),
        model.config,
        v2pe=v2pe or answer_v2pe(settings.stage.v2pe),
        normalize=settings.data.normalize,
        system_prompt=default_system(run / "tokenizer") if system_prompt is None else system_prompt,
        max_tiles=max_tiles,
    )
    return OpenModel(model.to(dtype or torch.float32).eval(), prompts)


def open_dir(
    directory: str | Path,
    device: torch.device | None = None,
    *,
    dtype: torch.dtype | None = None,
    v2pe: V2PESettings | None = None,
    system_prompt: str | None = None,
    max_tiles: int | None = None,
) -> OpenModel:
    """Open an export or a published checkpoint, of either format.

    Args:
        directory: Hugging Face directory with configuration, weights and tokenizer.
        device: The CPU by default.
        dtype: By default float32 on a CPU, elsewhere as the weights are stored.
        v2pe: Visual stride; such a directory does not record it. By default ordinary positions.
        system_prompt: As for :func:`open_run`.
        max_tiles: As for :func:`open_run`.

    Raises:
        CheckpointError: The directory is not a whole checkpoint.
        ConfigError: A setting that evovlm's model cannot honour.
        TokenizerError: The tokenizer cannot be used.
        ValueError: The tokenizer is not the model's.
    """
    directory, device = Path(directory), device or torch.device("cpu")
    prompts = PromptMaker(
        Tokenizer.load(directory),
        load_config(directory),
        v2pe=v2pe,
        normalize=published_normalization(directory),
        system_prompt=default_system(directory) if system_prompt is None else system_prompt,
        max_tiles=max_tiles,
    )
    weights = read_state(directory, prompts.config)
    first = next(weights)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else first[1].dtype
    with torch.device("meta"):
        model = InternVL(prompts.config).to(dtype)
    model.to_empty(device=device)
    model.language_model.tie_weights()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in chain([first], weights):
            parameters[name].copy_(value)
    return OpenModel(model.eval(), prompts)


def published_normalization(directory: Path) -> Normalization:
    """Read from a published directory how its model's pixels are normalised; ImageNet's numbers where it is silent.

    Raises:
        ValueError: The numbers are none that the project knows.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        content = json.loads(file.read_text())
        content = content.get("image_processor", content)
        if "image_mean" in content:
            wanted = (tuple(content["image_mean"]), tuple(content["image_std"]))
            for known, (mean, std) in MEAN_STD.items():
                if wanted == (mean, std):
                    return known
            raise ValueError(f"{file}: pixels normalised by {wanted}, which is none of {', '.join(MEAN_STD)}")
    return "imagenet"
