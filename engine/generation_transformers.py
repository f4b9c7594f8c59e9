"""transformers as a generator: an exported directory, its own model class, and prompts and tiles made by the project.

    request ─ prompt, tiles (generation_prompts.py) ─► InternVLForConditionalGeneration.generate ─► ids ─► texts
                                                       num_return_sequences = num, one request at a time

Random draws are transformers' own, seeded by (seed, request name) in a state of their own: an answer depends on no
request before it, but the answers of one request are drawn together. Positions are ordinary ones, V2PE is not known
there. Neither torchvision nor code from the directory is needed.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.generation import Completion, GenerationError, Request, Sampling
from evovlm.engine.generation_prompts import PromptMaker, in_order
from evovlm.engine.open_model import published_normalization
from evovlm.models.hf.chat_template import default_system
from evovlm.models.hf.load import detect, load_config

_THREADS, _AHEAD = 2, 2


class TransformersGenerator:
    """Samples with transformers in this process; a :class:`~evovlm.engine.generation.Generator`.

    Args:
        model: An ``InternVLForConditionalGeneration``.
        prompts: Makes its prompts, with ordinary positions.

    Raises:
        ValueError: The prompts have a visual stride.
    """

    def __init__(self, model: Any, prompts: PromptMaker) -> None:
        if prompts.v2pe.mode != "off":
            raise ValueError("transformers knows no visual stride (V2PE): generate with the evovlm back end")
        self.model, self.prompts = model.eval(), prompts

    @classmethod
    def from_dir(
        cls,
        directory: str | Path,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        system_prompt: str | None = None,
        max_tiles: int | None = None,
    ) -> "TransformersGenerator":
        """Open an export in transformers' format.

        Args:
            directory: Hugging Face directory with configuration, safetensors and tokenizer.
            device: The CPU by default.
            dtype: By default float32 on a CPU, elsewhere as the weights are stored.
            system_prompt: System turn of requests that bring none; None: the one that the model was trained with.
            max_tiles: Most tiles of a request's images; None: as the model's configuration says.

        Raises:
            GenerationError: The directory holds another format.
            CheckpointError: It is not a whole checkpoint.
            TokenizerError: The tokenizer cannot be used.
        """
        # transformers takes seconds to import.
        from transformers import InternVLForConditionalGeneration

        directory, device = Path(directory), device or torch.device("cpu")
        if (kind := detect(directory)) != "transformers":
            raise GenerationError(
                f"{directory} holds a checkpoint of the format '{kind}', which transformers could only run by "
                "executing its code: export it with --format transformers, or use the evovlm back end"
            )
        prompts = PromptMaker(
            Tokenizer.load(directory),
            load_config(directory),
            normalize=published_normalization(directory),
            system_prompt=default_system(directory) if system_prompt is None else system_prompt,
            max_tiles=max_tiles,
        )
        model = InternVLForConditionalGeneration.from_pretrained(
            directory,
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            local_files_only=True,
            use_safetensors=True,
        )
        return cls(model.to(device), prompts)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Answer requests, in order; see :class:`~evovlm.engine.generation.Generator`."""
        for request, prompt in in_order(self.prompts.prompt, requests, threads=_THREADS, ahead=_AHEAD):
            # Greedy answers of one request are all the same.
            num = request.num if sampling.temperature else 1
            answers = [self._completion(request, ids) for ids in self._run(prompt, sampling, request, num)]
            yield answers * (request.num // num)

    @torch.no_grad()
    def _run(self, prompt: Any, sampling: Sampling, request: Request, num: int) -> list[list[int]]:
        """Return the new ids of ``num`` answers, with the token that ended them and what follows it."""
        from transformers import GenerationConfig

        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            num_return_sequences=num,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(self.prompts.stop),
            pad_token_id=self.prompts.tokenizer.end_of_text,
            **(drawn if sampling.temperature else {}),
        )
        device = self.model.device
        ids = torch.from_numpy(prompt.tokens).long()[None].to(device)
        tiles = {"pixel_values": prompt.tiles.to(device, self.model.dtype)} if len(prompt.tiles) else {}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.key(request.name) >> 1)
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **tiles
            )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    def _completion(self, request: Request, ids: list[int]) -> Completion:
        """Cut an answer at the token that ended it."""
        end = next((place for place, token in enumerate(ids) if token in self.prompts.stop), None)
        own = ids[:end]
        return Completion(self.prompts.continuation(request, own), end is not None, len(own))
