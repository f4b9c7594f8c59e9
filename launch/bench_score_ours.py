"""Our side of ``evovlm bench score``: the critic as it is, and the same scores without one idea or another.

    as it is         │ prefix a │ solution 1 │ … │ solution N │ prefix b │ solution 1 │ …        tiles of a, b
    prefix N times   │ prefix a │ solution 1 │ prefix a │ solution 2 │ …                         tiles of a, b
    tiles N times                                                                                tiles of a N times, …
    a question, or a solution, in a pack                                                         a forward pass for each

Scores stay what they are: tiles that are encoded again for a prefix that is not are encoded for nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.data.candidates import CandidateSet
from evovlm.engine.score_packs import Part, build_pack
from evovlm.engine.score_prompts import JudgedQuestion
from evovlm.engine.step_scores import Critic
from evovlm.models.decoder import PackedAttend


@dataclass(frozen=True)
class Switches:
    """Which ideas are on.

    Attributes:
        tiles_once: A question's tiles are encoded once, not once for each solution.
        prefix_once: Its prefix passes the LLM once, not once for each solution.
        pack: What shares a forward pass: as many questions as fit, one question, or one solution.
    """

    tiles_once: bool = True
    prefix_once: bool = True
    pack: Literal["questions", "question", "solution"] = "questions"


SWITCHES = {
    "evovlm": Switches(),
    "tiles for each candidate": Switches(tiles_once=False),
    "prefix for each candidate": Switches(prefix_once=False),
    "one question in a pack": Switches(pack="question"),
    "tiles and prefix for each": Switches(tiles_once=False, prefix_once=False),
    "and one candidate in a pack": Switches(tiles_once=False, prefix_once=False, pack="solution"),
}
"""With everything, with ideas off, and with none: one forward pass of ours for each candidate."""


def render(critic: Critic, sets: Sequence[CandidateSet]) -> list[JudgedQuestion]:
    """Render questions and decode their images, before a clock starts."""
    return [
        critic.prompts.render(
            made.name, made.question, made.images, [critic.split(one.text) for one in made.candidates]
        )
        for made in sets
    ]


def timed_scores(critic: Critic, sets: Sequence[CandidateSet]) -> tuple[float, list[list[float]]]:
    """Score from files to rewards as a user does; returns seconds, and P("+") of each candidate's steps."""
    began = time.perf_counter()
    scored = list(critic.score(sets))
    seconds = time.perf_counter() - began
    return seconds, [[step.score for step in one.steps or ()] for made in scored for one in made.candidates]


@torch.no_grad()
def switched_scores(critic: Critic, questions: Sequence[JudgedQuestion], switches: Switches) -> list[list[float]]:
    """Score rendered questions with ideas on or off; returns P("+") of each candidate's steps."""
    visual: dict[int, Tensor] = {}
    scores: dict[tuple[int, int], list[float]] = {}
    for parts in _packs(questions, switches, critic.limits.tokens):
        for part in parts:
            if switches.prefix_once and part.number not in visual:
                copies = 1 if switches.tiles_once else len(part.question.branches)
                visual[part.number] = _encode(critic, part.question, copies)
            elif not switches.prefix_once and (not switches.tiles_once or part.number not in visual):
                visual[part.number] = _encode(critic, part.question, 1)
        _score(critic, parts, [visual[part.number] for part in parts], scores)
    return [scores[number, i] for number, found in enumerate(questions) for i in range(len(found.solutions))]


def _packs(questions: Sequence[JudgedQuestion], switches: Switches, most_tokens: int) -> list[list[Part]]:
    """Share the questions, or their solutions, out to forward passes."""
    packs: list[list[Part]] = []
    size = 0
    for number, question in enumerate(questions):
        every = range(len(question.branches))
        runs = [every] if switches.prefix_once else [range(i, i + 1) for i in every]
        for place, run in enumerate(runs):
            tokens = len(question.prefix.tokens) + sum(len(question.branches[i]) for i in run)
            alone = switches.pack == "solution" or (switches.pack == "question" and place == 0)
            if not packs or alone or size + tokens > most_tokens:
                packs.append([])
                size = 0
            packs[-1].append(Part(number, question, run))
            size += tokens
    return packs


def _encode(critic: Critic, question: JudgedQuestion, copies: int) -> Tensor:
    """Encode a question's tiles, several times if asked to; returns its visual tokens once."""
    tiles = question.prefix.tiles.repeat(copies, 1, 1, 1)
    encoded = torch.cat([critic.model.encode(chunk) for chunk in torch.split(tiles, critic.limits.tiles)])
    return encoded[: len(encoded) // copies]


def _score(
    critic: Critic, parts: Sequence[Part], visual: Sequence[Tensor], scores: dict[tuple[int, int], list[float]]
) -> None:
    """Compute a pack as the critic does."""
    pack, head = build_pack(parts), critic.model.language_model.lm_head.weight
    attend = PackedAttend(pack.cu_seqlens, pack.prefixes)
    hidden = critic.model.decode(pack.tokens, pack.positions, attend, (pack.visual_rows, torch.cat(list(visual))))
    good = F.linear(hidden[pack.decisions], head[list(critic.prompts.signs)]).softmax(-1)[:, 0].tolist()
    begin = 0
    for part in parts:
        for number, decisions in part.solutions:
            scores[part.number, number] = good[begin : begin + len(decisions.rows)]
            begin += len(decisions.rows)
