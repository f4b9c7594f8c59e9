"""The peer in ``evovlm bench score``: transformers' InternVLForConditionalGeneration on the same weights and token ids.

    one forward for each candidate     as published reward models are run: tiles and prefix again for each
    batches                            candidates side by side, padded behind: tiles and prefix again for each
    batches, tiles once                visual tokens made once and handed in
    tiles and prefix once              the prefix's keys and values cached, and repeated for a batch of the rest

Ids and decoded tiles are ready before the clock starts. Causal attention never looks at padding behind, so batches need
no mask, and SDPA its fastest way. Every way but the first puts only decision rows through the output head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evovlm.engine.score_prompts import Decisions, JudgedQuestion


@dataclass(frozen=True)
class Way:
    """How transformers is used.

    Attributes:
        batch: Candidates of a forward pass.
        once: What a question's candidates share.
        all_rows: Put every row through the output head, as the published scoring code does.
    """

    batch: int = 1
    once: Literal["nothing", "tiles", "prefix"] = "nothing"
    all_rows: bool = False


@dataclass(frozen=True)
class _Asked:
    """A question, ready for transformers.

    Attributes:
        ids: int64 ``[L]`` of each candidate, whole.
        rows: Decision rows of each, int64 ``[steps]``.
        prefix: Tokens that all begin with.
        tiles: ``[N, 3, S, S]``.
    """

    ids: list[Tensor]
    rows: list[Tensor]
    prefix: int
    tiles: Tensor


class Peer:
    """transformers' model.

    Args:
        directory: Exported critic.
        signs: Ids of "+" and "-".
        questions: What is scored.
    """

    def __init__(self, directory: Path, signs: tuple[int, int], questions: Sequence[JudgedQuestion]) -> None:
        from transformers import InternVLForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        model: Any = InternVLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self._model, self._signs = model.eval(), list(signs)
        self._asked = [_ready(question) for question in questions]

    @torch.no_grad()
    def scores(self, way: Way) -> list[list[float]]:
        """Score all questions; returns P("+") of each candidate's steps."""
        return [scores for asked in self._asked for scores in self._question(asked, way)]

    def _question(self, asked: _Asked, way: Way) -> list[list[float]]:
        seen: dict[str, Any] = {}
        if way.once == "tiles":
            seen = {"features": self._model.get_image_features(pixel_values=asked.tiles).pooler_output}
        elif way.once == "prefix":
            prefix = asked.ids[0][None, : asked.prefix]
            seen = {"prefix": self._model(input_ids=prefix, pixel_values=asked.tiles, use_cache=True, logits_to_keep=1)}
        return [
            scores
            for begin in range(0, len(asked.ids), way.batch)
            for scores in self._batch(asked, range(begin, min(begin + way.batch, len(asked.ids))), way, seen)
        ]

    def _batch(self, asked: _Asked, numbers: range, way: Way, seen: dict[str, Any]) -> list[list[float]]:
        skip = asked.prefix if way.once == "prefix" else 0
        ids = torch.nn.utils.rnn.pad_sequence([asked.ids[i][skip:] for i in numbers], batch_first=True)
        rows = [asked.rows[i] - skip for i in numbers]
        kept = torch.unique(torch.cat(rows))
        given: dict[str, Any] = {"use_cache": False}
        if way.once == "nothing":
            given["pixel_values"] = asked.tiles.repeat(len(numbers), 1, 1, 1)
            given["input_ids"] = ids
        elif way.once == "tiles":
            given["inputs_embeds"] = self._embed(ids, seen["features"])
        else:
            cache = _copy(seen["prefix"].past_key_values, len(numbers))
            given = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if not way.all_rows:
            given["logits_to_keep"] = kept
        logits = self._model(**given).logits
        places = rows if way.all_rows else [torch.searchsorted(kept, of) for of in rows]
        return [logits[i, of][:, self._signs].softmax(-1)[:, 0].tolist() for i, of in enumerate(places)]

    def _embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Put visual tokens that are made already into a batch's embeddings."""
        embeddings: Tensor = self._model.get_input_embeddings()(ids)
        visual = ids == self._model.config.image_token_id
        embeddings[visual] = features.flatten(0, -2).repeat(len(ids), 1)
        return embeddings


def _ready(question: JudgedQuestion) -> _Asked:
    prefix = question.prefix.tokens.astype(np.int64)
    ids, rows = [], []
    for found in question.solutions:
        assert isinstance(found, Decisions)  # the task draws no solution that cannot be judged
        ids.append(torch.from_numpy(np.concatenate([prefix, question.branches[found.branch]])))
        rows.append(torch.from_numpy(found.rows))
    return _Asked(ids, rows, len(prefix), question.prefix.tiles)


def _copy(cache: Any, repeats: int) -> Any:
    """Repeat a prefix's keys and values for a batch; the cache itself stays as it is for the next."""
    from transformers import DynamicCache

    made = DynamicCache()
    for number, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, number)
    made.batch_repeat_interleave(repeats)
    return made
