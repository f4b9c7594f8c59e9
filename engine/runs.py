"""A run's directory: what is written when it starts, and the models that can be read back from it.

RUN/settings.json      every setting, resolved          RUN/checkpoints/step-…   see checkpoint.py
RUN/environment.json   versions, git revision           RUN/export/              Hugging Face directory
RUN/model.json         the model's shape                RUN/tokenizer/           the tokenizer, with the system turn
"""

import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evovlm.engine.box_files import read_tensors
from evovlm.engine.checkpoint import list_checkpoints
from evovlm.engine.model_source import ModelSource
from evovlm.engine.settings import RunSettings
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.chat_template import set_default_system
from evovlm.models.hf.files import TOKENIZER_FILES
from evovlm.models.hf.names import Format
from evovlm.models.hf.save import save_pretrained
from evovlm.models.internvl import InternVL
from evovlm.models.tokenizer_json import write_tokenizer_json
from evovlm.parallel.pieces import write_piece

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "Pillow", "pydantic")


def environment() -> dict[str, str]:
    """Collect what else decides a run's numbers: versions, platform and the project's git revision."""
    found = {name: version(name) for name in _PACKAGES}
    found |= {"python": platform.python_version(), "platform": platform.platform(), "cpu": platform.machine()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    folder = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git:
        command = [git, "-C", str(folder), "describe", "--always", "--dirty"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found["git"] = result.stdout.strip() or "not a git checkout"
    return found


def start_run(settings: RunSettings, source: ModelSource, system: str | None) -> None:
    """Write what defines a run into its directory.

    Args:
        settings: Of the run.
        source: Its model and tokenizer.
        system: System turn of training conversations that bring none; None: that of ``data.chat``.
    """
    run = settings.out
    run.mkdir(parents=True, exist_ok=True)
    _write_json(run / "settings.json", settings.model_dump(mode="json"))
    _write_json(run / "environment.json", environment())
    _write_json(run / "model.json", asdict(source.config))
    target = run / "tokenizer"
    if not target.exists():
        partial = run / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            if (source.tokenizer_dir / file).is_file():
                shutil.copy2(source.tokenizer_dir / file, partial / file)
        if not (partial / "tokenizer.json").is_file():
            write_tokenizer_json(source.tokenizer_dir, partial)
        if system is not None:
            set_default_system(partial, system)
        partial.rename(target)


def read_settings(run: Path) -> RunSettings:
    """Read the settings that a run was started with.

    Raises:
        FileNotFoundError: The directory is not a run.
    """
    file = run / "settings.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not a run directory: it has no settings.json")
    return RunSettings.model_validate_json(file.read_text())


def read_model_config(run: Path) -> InternVLConfig:
    """Read the shape of a run's model."""
    content: dict[str, Any] = json.loads((run / "model.json").read_text())
    vision = VisionConfig(**content.pop("vision"))
    return InternVLConfig(vision=vision, decoder=DecoderConfig(**content.pop("decoder")), **content)


def newest_checkpoint(run: Path) -> Path:
    """Find the newest complete checkpoint of a run.

    Raises:
        FileNotFoundError: There is none.
    """
    found = list_checkpoints(run)
    if not found:
        raise FileNotFoundError(f"{run} has no complete checkpoint; train it first")
    return found[-1][1]


def load_model(run: Path, checkpoint: Path | None = None, device: torch.device | None = None) -> InternVL:
    """Load a run's model whole, on one device, from the newest or a given checkpoint; needs no process group.

    Raises:
        FileNotFoundError: There is no checkpoint, or a file of it is missing.
        ValueError: The checkpoint is damaged or of another model.
    """
    checkpoint = checkpoint or newest_checkpoint(run)
    with torch.device("meta"):
        model = InternVL(read_model_config(run))
    model.to_empty(device=device or torch.device("cpu"))
    model.language_model.tie_weights()
    missing = dict(model.named_parameters())
    for name, tensor in read_tensors(checkpoint, "model."):
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            here = "no such weight" if parameter is None else f"shape {list(parameter.shape)}"
            raise ValueError(f"{checkpoint}: {name} has shape {list(tensor.shape)}, the model of {run} has {here}")
        write_piece(parameter, tensor)
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} weights of the model of {run}, such as {next(iter(missing))}"
        )
    return model.eval()


def export_run(run: Path, out: Path, format: Format, checkpoint: Path | None = None) -> None:
    """Write a checkpoint of a run as a Hugging Face directory; needs no process group.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: No such run or checkpoint.
    """
    model = load_model(run, checkpoint)
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    normalize = read_settings(run).data.normalize
    save_pretrained(model.config, tensors, out, format=format, tokenizer_dir=run / "tokenizer", normalize=normalize)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
