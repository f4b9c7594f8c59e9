"""Questions and solutions to P("+") of every decision: several questions a pack, one forward pass a pack.

    Ask ─ threads: render, tile, decode ─► JudgedQuestion ─► pack ─► hidden [T, H]
         (an image is encoded once)                                    │ decision rows alone
    [P("+") of each step] of each solution ◄── softmax over two ◄── logits [n, 2] of "+" and "-"

Source: spec §5.2. What comes out equals one pass for each solution.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.data.errors import SampleError
from evovlm.engine.generation_prompts import in_order
from evovlm.engine.open_model import OpenModel
from evovlm.engine.score_packs import Packer, PackLimits, Part, build_pack
from evovlm.engine.score_prompts import JudgedPrompts, JudgedQuestion
from evovlm.models.decoder import PackedAttend

GROUP = 16
"""Consecutive questions that may share packs: whatever else is scored, a question's scores are the same to the bit."""

_THREADS, _AHEAD = 4, 8  # that render questions, and questions rendered before they are asked for

Judged = list[Tensor | SampleError]
"""Of each solution P("+") of its steps, ``[steps]``, float32 (float64 if the model is) on the CPU; or why not."""


@dataclass(frozen=True)
class Ask:
    """A question whose solutions are split already.

    Attributes:
        name: What messages call it.
        question: Its text, with an ``<image>`` for each image (a single one may be left out).
        images: Files of its images.
        solutions: Steps of each.
    """

    name: str
    question: str
    images: tuple[Path, ...]
    solutions: Sequence[Sequence[str]]


@dataclass
class _Asked:
    """A question that is under way.

    Attributes:
        question: What is computed, or why nothing can be.
        left: Branches that are not computed yet.
        judged: What has become of its solutions.
        visual: Its visual tokens, while packs need them.
    """

    question: JudgedQuestion | SampleError
    left: int
    judged: Judged
    visual: Tensor | None = None


class StepJudge:
    """A process reward model that judges solutions.

    Args:
        opened: The model.
        system_prompt: System turn of the conversations in which it judges; None: the chat template's own.
        limits: How much is computed at a time.

    Raises:
        ValueError: Its vocabulary has no "+" or "-".
    """

    def __init__(self, opened: OpenModel, system_prompt: str | None, limits: PackLimits) -> None:
        self.model, self.prompts = opened.model.eval(), JudgedPrompts(opened.prompts, system_prompt)
        self.limits = limits

    def judge(self, asks: Iterable[Ask]) -> Iterator[Judged]:
        """Judge questions; few are read ahead.

        Yields:
            What became of each question's solutions, in order.
        """
        packer, under_way, first = Packer(self.limits), deque[_Asked](), 0

        def run(packs: Iterable[list[Part]]) -> None:
            for parts in packs:
                self._run(parts, {part.number: under_way[part.number - first] for part in parts})

        rendered = in_order(self._render, asks, threads=_THREADS, ahead=_AHEAD)
        for count, (_, asked) in enumerate(rendered, start=1):
            under_way.append(asked)
            if isinstance(asked.question, JudgedQuestion):
                run(packer.add(count - 1, asked.question))
            if count % GROUP == 0:
                run(packer.flush())
            while under_way and not under_way[0].left:
                yield under_way.popleft().judged
                first += 1
        run(packer.flush())
        for asked in under_way:
            yield asked.judged

    def _render(self, ask: Ask) -> _Asked:
        try:
            question = self.prompts.render(ask.name, ask.question, ask.images, ask.solutions)
        except SampleError as error:
            return _Asked(error, 0, [error] * len(ask.solutions))
        judged: Judged = [found if isinstance(found, SampleError) else torch.empty(0) for found in question.solutions]
        return _Asked(question, len(question.branches), judged)

    @torch.no_grad()
    def _run(self, parts: Sequence[Part], asked: Mapping[int, _Asked]) -> None:
        """Compute a pack, and hand its scores out."""
        pack = build_pack(parts)
        visual = self._see(parts, asked)
        head = self.model.language_model.lm_head.weight
        device = head.device
        hidden = self.model.decode(
            pack.tokens.to(device),
            pack.positions.to(device),
            PackedAttend(pack.cu_seqlens, pack.prefixes),
            None if visual is None else (pack.visual_rows.to(device), visual),
        )
        wide = torch.float64 if head.dtype == torch.float64 else torch.float32
        logits = F.linear(hidden[pack.decisions.to(device)].to(wide), head[list(self.prompts.signs)].to(wide))
        good = logits.softmax(-1)[:, 0].cpu()
        begin = 0
        for part in parts:
            of = asked[part.number]
            for number, decisions in part.solutions:
                of.judged[number] = good[begin : begin + len(decisions.rows)]
                begin += len(decisions.rows)
            of.left -= len(part.branches)
            if not of.left:
                of.visual = None

    def _see(self, parts: Sequence[Part], asked: Mapping[int, _Asked]) -> Tensor | None:
        """Encode the images that no pack before had; returns the visual tokens of all parts ``[Nv, H]``."""
        tiles = {part.number: part.question.prefix.tiles for part in parts if len(part.question.prefix.tiles)}
        new = [number for number in tiles if asked[number].visual is None]
        if new:
            stacked = torch.cat([tiles[number] for number in new]).to(self.model.language_model.lm_head.weight.device)
            encoded = torch.cat([self.model.encode(chunk) for chunk in torch.split(stacked, self.limits.tiles)])
            lengths = [len(tiles[number]) * self.model.config.tokens_per_tile for number in new]
            for number, made in zip(new, torch.split(encoded, lengths), strict=True):
                asked[number].visual = made
        seen = [visual for number in tiles if (visual := asked[number].visual) is not None]
        return torch.cat(seen) if seen else None
