"""The project's own decoder as a generator: a run's checkpoint or a published directory, on CPU or GPU.

requests ─ threads: render, tile, decode ─► prompts ─ decode (generate.py) ─► ids ─► texts, in order
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from evovlm.data.batch import V2PESettings
from evovlm.engine.generate import Batching, Task, decode
from evovlm.engine.generation import Completion, Request, Sampling
from evovlm.engine.generation_prompts import PromptMaker, in_order
from evovlm.engine.open_model import open_dir, open_run
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
            system_prompt: System turn of requests that bring none; None: the one that the model was trained with.
            max_tiles: Most tiles of a request's images; None: as the model's configuration says.
            batching: How much is decoded at a time.

        Raises:
            FileNotFoundError: No such run or checkpoint.
            ValueError: The checkpoint is damaged or of another model.
        """
        opened = open_run(run, checkpoint, device, dtype=dtype, system_prompt=system_prompt, max_tiles=max_tiles)
        return cls(opened.model, opened.prompts, batching)

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
        opened = open_dir(directory, device, dtype=dtype, v2pe=v2pe, system_prompt=system_prompt, max_tiles=max_tiles)
        return cls(opened.model, opened.prompts, batching)

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
