"""The project's own decoder as a generator: a run's checkpoint or a published directory, on CPU or GPU.

requests ─ threads: render, tile, decode ─► prompts ─ decode (generate.py) ─► ids ─► texts, in order
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

from evovlm.data.batch import V2PESettings
from evovlm.data.images import MEAN_STD, Normalization
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate import answer_v2pe
from evovlm.engine.generate import Batching, Task, decode
from evovlm.engine.generation import Completion, Request, Sampling
from evovlm.engine.generation_prompts import PromptMaker, in_order
from evovlm.engine.runs import load_model, read_settings
from evovlm.engine.settings import DTYPES
from evovlm.models.hf.load import load_config, read_state
from evovlm.models.internvl import InternVL

_THREADS, _AHEAD = 4, 8  # that make prompts, and prompts made before they are asked for


class OwnGenerator:
    """Samples from a model in this process; a :class:`~evovlm.engine.generation.Generator`.

    Args:
        model: In any dtype, on any device, not sharded.
        prompts: Makes its prompts.
        batching: How much is decoded at a time.
    """

    def __init__(self, model: InternVL, prompts: PromptMaker, batching: Batching | None = None) -> None:
        self.model, self.prompts, self.batching = model.eval(), prompts, batching

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        checkpoint: str | Path = "newest",
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        system_prompt: str | None = None,
        max_tiles: int | None = None,
        batching: Batching | None = None,
    ) -> "OwnGenerator":
        """Open a run's model, with its tokenizer, pixel normalisation and visual stride.

        Args:
            run: Run directory.
            checkpoint: ``newest``, or a checkpoint directory.
            device: The CPU by default.
            dtype: By default float32 on a CPU, elsewhere what the run computed in.
            system_prompt: System turn of requests that bring none; None: the template's own.
            max_tiles: Most tiles of a request's images; None: as the model's configuration says.
            batching: How much is decoded at a time.

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
            v2pe=answer_v2pe(settings.stage.v2pe),
            normalize=settings.data.normalize,
            system_prompt=system_prompt,
            max_tiles=max_tiles,
        )
        return cls(model.to(dtype or torch.float32), prompts, batching)

    @classmethod
    def from_dir(
        cls,
        directory: str | Path,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        v2pe: V2PESettings | None = None,
        system_prompt: str | None = None,
        max_tiles: int | None = None,
        batching: Batching | None = None,
    ) -> "OwnGenerator":
        """Open an export or a published checkpoint, of either format.

        Args:
            directory: Hugging Face directory with configuration, weights and tokenizer.
            device: The CPU by default.
            dtype: By default float32 on a CPU, elsewhere as the weights are stored.
            v2pe: Visual stride; such a directory does not record it. By default ordinary positions.
            system_prompt: As for :meth:`from_run`.
            max_tiles: As for :meth:`from_run`.
            batching: How much is decoded at a time.

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
            system_prompt=system_prompt,
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
        return cls(model, prompts, batching)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Answer requests, in order; see :class:`~evovlm.engine.generation.Generator`."""
        asked: deque[Request] = deque()

        def tasks() -> Iterator[Task]:
            for request, prompt in in_order(self.prompts.prompt, requests, threads=_THREADS, ahead=_AHEAD):
                asked.append(request)
                yield Task(prompt, tuple(sampling.key(request.name, number) for number in range(request.num)))

        for answers in decode(self.model, tasks(), sampling, stop=self.prompts.stop, batching=self.batching):
            request = asked.popleft()
            yield [
                Completion(self.prompts.continuation(request, answer.ids), answer.finished, len(answer.ids))
                for answer in answers
            ]


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
