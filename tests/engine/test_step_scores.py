"""The packed, shared scores of a critic are those of one forward pass for each candidate."""

import copy
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.data.batch import V2PESettings
from evovlm.data.candidates import Candidate, CandidateSet, StepScore
from evovlm.data.chat import expand, render
from evovlm.data.errors import SampleError
from evovlm.data.images import load_tiles, read_size
from evovlm.data.index_format import ImageRef
from evovlm.data.solution_steps import PRM_SYSTEM_PROMPT
from evovlm.data.tiling import choose_grid, num_tiles
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.generation_prompts import PromptMaker
from evovlm.engine.open_model import OpenModel
from evovlm.engine.score_packs import PackLimits
from evovlm.engine.score_prompts import JudgedPrompts, sign_ids
from evovlm.engine.step_scores import GROUP, REDUCTIONS, Critic, open_critic, reduction_of, split_solution
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL
from evovlm.models.v2pe import segment_positions

from .small_data import MAX_TILES, draw_shapes
from .support import TILE, TOKENS_PER_TILE, plain_model

SYSTEM = "Judge."
STRIDES = {
    1: V2PESettings(),
    0.25: V2PESettings(mode="fixed", delta=0.25),
    1 / 64: V2PESettings(mode="fixed", delta=1 / 64),
}
WORDS = st.sampled_from(
    ["a", "So", "a box", "a disc", "7", "7.", "8", "é", "+", "-", "assistant\n+", "<box>", "", " ", "\n"]
)
STEPS = st.lists(WORDS.map(lambda word: f"So {word}"), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 1, 2 + thumbnail, 3 + thumbnail and 4 + thumbnail tiles."""
    folder = tmp_path_factory.mktemp("judged")
    draw_shapes(folder, 4)
    return folder


@pytest.fixture(scope="module")
def open_small(tokenizer: Tokenizer, small_config: InternVLConfig) -> Any:
    """Factory of opened models by KV heads, stride and whether the head is tied."""

    @cache
    def make(num_kv_heads: int = 2, delta: float = 1.0, tied: bool = False) -> OpenModel:
        decoder = replace(small_config.decoder, num_kv_heads=num_kv_heads, tie_embeddings=tied)
        config = replace(small_config, decoder=decoder)
        model = plain_model(config, seed=num_kv_heads)
        with torch.no_grad():  # livelier scores
            for parameter in model.language_model.lm_head.parameters():
                parameter.mul_(4)
        return OpenModel(model.eval(), PromptMaker(tokenizer, config, v2pe=STRIDES[delta]))

    return make


def alone(opened: OpenModel, question: str, images: Sequence[Path], steps: Sequence[str], system: str | None) -> Tensor:
    """Score a solution by itself, all of its conversation computed, signs found in its ids and logits in full."""
    tokenizer = opened.prompts.tokenizer
    if len(images) == 1 and "<image>" not in question:
        question = f"<image>\n{question}"
    asked = [f"### Question:\n{question}\n\n### Solution Process:\n{steps[0]}", *steps[1:]]
    turns = [] if system is None else [{"from": "system", "value": system}]
    for step in asked:
        turns += [{"from": "human", "value": step}, {"from": "gpt", "value": "+"}]
    chat = render(turns, len(images), tokenizer)
    tiles, counts = [np.empty((0, 3, TILE, TILE), np.float32)], []
    for path in images:
        cap = max(1, MAX_TILES // len(images))
        grid = choose_grid(*read_size(path), 1, cap, TILE)
        counts.append(num_tiles(grid, thumbnail=True))
        ref = ImageRef(path, -1, grid.cols, grid.rows, grid.cols * grid.rows > 1, counts[-1], insert_at=0)
        tiles.append(load_tiles(ref, TILE))
    lengths = [count * TOKENS_PER_TILE for count in counts]
    ids, _ = expand(chat.ids, chat.supervised, chat.insert_at, lengths, tokenizer.image_context)
    starts = [place + sum(lengths[:number]) for number, place in enumerate(chat.insert_at)]
    runs = list(zip(starts, lengths, strict=True))
    delta = opened.prompts.v2pe.delta if opened.prompts.v2pe.mode == "fixed" else 1.0
    places = [row for start, length in runs for row in range(start, start + length)]
    logits = opened.model(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(segment_positions(len(ids), runs, [delta] * len(runs))),
        torch.tensor([0, len(ids)], dtype=torch.int32),
        torch.from_numpy(np.concatenate(tiles)).double(),
        torch.tensor(places, dtype=torch.int64),
    )
    header = [tokenizer.im_start, *tokenizer.encode("assistant\n")]
    good, bad = (tokenizer.encode(f"assistant\n{sign}")[-1] for sign in "+-")
    pattern = [*header, good, tokenizer.im_end]
    listed = ids.tolist()
    found = [i + len(header) - 1 for i in range(len(listed)) if listed[i : i + len(pattern)] == pattern]
    assert len(found) == len(steps)
    return logits[found][:, [good, bad]].softmax(-1)[:, 0]


@st.composite
def questions(draw: st.DrawFn) -> tuple[str, int, list[list[str]]]:
    """A question, the number of its images, and solutions: some equal, some longer versions of others."""
    num_images = draw(st.integers(0, 3))
    marks = "" if num_images == 1 and draw(st.booleans()) else "<image> " * num_images
    question = f"{marks}What is {draw(WORDS)}?"
    solutions = draw(st.lists(STEPS, min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 2))):
        base = draw(st.sampled_from(solutions))
        change = draw(st.sampled_from(["same", "shorter", "longer", "other end"]))
        solutions.append(
            {
                "same": base,
                "shorter": base[:-1] or base,
                "longer": [*base, draw(WORDS)],
                "other end": [*base[:-1], base[-1] + draw(WORDS)],
            }[change]
        )
    return question, num_images, draw(st.permutations(solutions))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    asked=st.lists(questions(), min_size=1, max_size=4),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    delta=st.sampled_from(list(STRIDES)),
    tied=st.booleans(),
    pack_tokens=st.sampled_from([1, 60, 150, 300, 16_384]),
    pack_tiles=st.sampled_from([1, 3, 64]),
)
@torch.no_grad()
def test_packed_scores_are_those_of_one_pass_for_each_candidate(
    open_small: Any,
    folder: Path,
    asked: list[tuple[str, int, list[list[str]]]],
    num_kv_heads: int,
    delta: float,
    tied: bool,
    pack_tokens: int,
    pack_tiles: int,
) -> None:
    opened = open_small(num_kv_heads, delta, tied)
    critic = Critic(opened, system_prompt=SYSTEM, limits=PackLimits(pack_tokens, pack_tiles))
    sets, wanted = [], []
    for number, (question, num_images, solutions) in enumerate(asked):
        images = tuple(folder / f"{(number + i) % 4}.png" for i in range(num_images))
        texts = ["\n\n".join(steps) for steps in solutions]
        sets.append(CandidateSet(str(number), question, images, tuple(Candidate(text) for text in texts)))
        wanted.append([alone(opened, question, images, critic.split(text), SYSTEM) for text in texts])
    for made, of, expected in zip(critic.score(sets), sets, wanted, strict=True):
        assert (made.name, made.question, made.images) == (of.name, of.question, of.images)
        for candidate, before, scores in zip(made.candidates, of.candidates, expected, strict=True):
            assert candidate.steps is not None
            assert [step.step for step in candidate.steps] == critic.split(before.text)
            given_scores = torch.tensor([step.score for step in candidate.steps], dtype=torch.float64)
            torch.testing.assert_close(given_scores, scores, atol=1e-10, rtol=0)
            assert candidate.reward == math.fsum(given_scores.tolist()) / len(given_scores)
            assert candidate.unscored is None


@torch.no_grad()
def test_scores_depend_on_everything_before_the_decision(open_small: Any, folder: Path) -> None:
    critic = Critic(open_small(), system_prompt=SYSTEM)
    images = [folder / "1.png"]

    def scores(*steps: str, question: str = "Which?", image: Sequence[Path] = images) -> list[float]:
        (found,) = critic.step_scores(question, image, [steps])
        return found.tolist()

    base = scores("So a", "So b", "So c")
    later = scores("So a", "So b", "So d")
    assert later[:2] == pytest.approx(base[:2], abs=1e-12)
    assert abs(later[2] - base[2]) > 1e-6
    assert all(abs(a - b) > 1e-6 for a, b in zip(scores("So x", "So b", "So c"), base, strict=True))
    assert all(abs(a - b) > 1e-6 for a, b in zip(scores("So a", "So b", "So c", question="Why?"), base, strict=True))
    other = scores("So a", "So b", "So c", image=[folder / "2.png"])
    assert all(abs(a - b) > 1e-6 for a, b in zip(other, base, strict=True))
    assert len({round(score, 6) for score in base}) == 3


@pytest.mark.parametrize("system", [None, "Another."])
@torch.no_grad()
def test_the_system_turn_is_the_one_that_was_asked_for(open_small: Any, system: str | None) -> None:
    opened = open_small()
    (found,) = Critic(opened, system_prompt=system).step_scores("What?", [], [["So", "Then"]])
    torch.testing.assert_close(found, alone(opened, "What?", [], ["So", "Then"], system), atol=1e-10, rtol=0)
    (other,) = Critic(opened, system_prompt=SYSTEM).step_scores("What?", [], [["So", "Then"]])
    assert not torch.allclose(found, other, atol=1e-6)


class Counting(InternVL):
    """Counts what is encoded and decoded, and notes what meets the head."""

    encoded: list[int]
    decoded: list[int]

    def encode(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        self.encoded.append(len(tiles))
        return super().encode(tiles, tile_keys)

    def decode(self, tokens: Tensor, *others: Any) -> Tensor:
        self.decoded.append(len(tokens))
        return super().decode(tokens, *others)


def counting(opened: OpenModel) -> Counting:
    model = Counting(opened.model.config).double().eval()
    model.load_state_dict(opened.model.state_dict())
    model.encoded, model.decoded = [], []
    return model


@pytest.mark.parametrize(("pack_tokens", "num_packs"), [(16_384, 1), (1, 4)])
def test_prefix_and_images_are_computed_once_for_all_candidates(
    open_small: Any, folder: Path, pack_tokens: int, num_packs: int
) -> None:
    opened = open_small()
    model = counting(opened)
    critic = Critic(OpenModel(model, opened.prompts), system_prompt=SYSTEM, limits=PackLimits(pack_tokens))
    # All begin with "So"; the fifth equals the fourth, the last is the beginning of it.
    solutions = [["So a"], ["So b"], ["So c"], ["So d", "So e"], ["So d", "So e"], ["So d"]]
    critic.step_scores("Which?", [folder / "1.png"], solutions)
    question = critic.prompts.render("x", "Which?", (folder / "1.png",), solutions)
    prefix, branches = len(question.prefix.tokens), [len(branch) for branch in question.branches]
    assert model.encoded == [3]
    assert len(branches) == 4
    assert len(model.decoded) == num_packs
    assert sum(model.decoded) == num_packs * prefix + sum(branches)
    tokenizer = opened.prompts.tokenizer
    before = tokenizer.decode(question.prefix.tokens[question.prefix.visual_rows[-1] + 1 :].tolist())
    assert before.endswith("Which?\n\n### Solution Process:\nSo") or before.endswith("Process:\nSo ")


def test_equal_candidates_need_no_branch(open_small: Any) -> None:
    critic = Critic(open_small(), system_prompt=SYSTEM)
    question = critic.prompts.render("x", "Which?", (), [["So a"], ["So a", "So b"], ["So a"]])
    assert [len(branch) for branch in question.branches] == [0]
    first, longer, last = critic.step_scores("Which?", [], [["So a"], ["So a", "So b"], ["So a"]])
    assert first.tolist() == last.tolist() == longer[:1].tolist()


def test_several_questions_share_a_pack(open_small: Any, folder: Path) -> None:
    opened = open_small()
    model = counting(opened)
    critic = Critic(OpenModel(model, opened.prompts), system_prompt=SYSTEM)
    sets = [
        CandidateSet(str(i), "Which?", (folder / f"{i % 4}.png",), (Candidate("So a"), Candidate("So b")))
        for i in range(GROUP + 3)
    ]
    assert [made.name for made in critic.score(sets)] == [made.name for made in sets]
    assert len(model.decoded) == 2  # groups do not mix
    assert len(model.encoded) == 2


def test_a_group_is_scored_the_same_whatever_else_is(open_small: Any, folder: Path) -> None:
    decoder = open_small()
    opened = OpenModel(InternVL(decoder.model.config).eval(), decoder.prompts)
    opened.model.load_state_dict(decoder.model.state_dict())
    critic = Critic(opened, system_prompt=SYSTEM, limits=PackLimits(400))
    sets = [
        CandidateSet(
            str(i), "Which?" * (i % 5), (folder / f"{i % 4}.png",), (Candidate("So a"), Candidate("b\n\n" * i + "c"))
        )
        for i in range(2 * GROUP)
    ]
    assert list(critic.score(sets))[GROUP:] == list(critic.score(sets[GROUP:]))


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 0.5), ("min", 0.2), ("product", 0.9 * 0.2 * 0.4), ("last", 0.4)]
)
def test_reductions(reduction: str, expected: float) -> None:
    assert reduction_of(reduction)([0.9, 0.2, 0.4]) == pytest.approx(expected, abs=1e-15)
    assert reduction_of(reduction)([0.3]) == pytest.approx(0.3, abs=1e-15)


def test_rewards_are_by_the_reduction_that_is_asked_for(open_small: Any) -> None:
    critic = Critic(open_small(), system_prompt=SYSTEM)
    made = CandidateSet("0", "What?", (), (Candidate("So a\n\nSo b\n\nSo c"),))
    for name in REDUCTIONS:
        ((candidate,),) = (scored.candidates for scored in critic.score([made], reduction=name))
        assert candidate.steps is not None
        assert candidate.reward == reduction_of(name)([step.score for step in candidate.steps])
    with pytest.raises(ValueError, match="reduction 'max' is not one of mean, min, product, last"):
        next(critic.score([made], reduction="max"))


def test_an_outcome_critic_judges_whole_solutions(open_small: Any) -> None:
    text = " So a\n\n\n\nSo b\n"
    critic = Critic(open_small(), system_prompt=SYSTEM, outcome=True)
    ((candidate, blank),) = (
        made.candidates for made in critic.score([CandidateSet("0", "What?", (), (Candidate(text), Candidate(" ")))])
    )
    assert candidate.steps is not None
    assert [step.step for step in candidate.steps] == [text]
    torch.testing.assert_close(
        torch.tensor([candidate.reward], dtype=torch.float64),
        alone(open_small(), "What?", [], [text], SYSTEM).detach(),
        atol=1e-10,
        rtol=0,
    )
    assert blank.unscored is not None


def test_many_steps_are_joined() -> None:
    assert split_solution("a\n\nb\n\nc", 2, outcome=False) == ["a\n\nb", "c"]
    assert split_solution("a\n\nb\n\nc", 12, outcome=False) == ["a", "b", "c"]


def test_what_cannot_be_judged_says_why_and_spares_the_rest(open_small: Any, folder: Path) -> None:
    opened = open_small()
    config = replace(opened.model.config, decoder=replace(opened.model.config.decoder, max_positions=150))
    critic = Critic(OpenModel(opened.model, PromptMaker(opened.prompts.tokenizer, config)), system_prompt=SYSTEM)
    (folder / "broken.png").write_bytes(b"no image")
    earlier = Candidate("", steps=(StepScore("old", 0.5),), reward=0.5)
    candidates = (Candidate("So a"), earlier, Candidate("a long one " * 60), Candidate("a <image>"), Candidate("So b"))
    asked = [
        CandidateSet("0", "Which?", (folder / "0.png",), candidates),
        CandidateSet("1", "Which?", (folder / "none.png",), candidates[:1]),
        CandidateSet("2", "Which?", (folder / "broken.png",), candidates[:2]),
        CandidateSet("3", "<image> or <image>?", (folder / "0.png",), candidates[:1]),
        CandidateSet("4", "Which?", (), (Candidate(" \n\n "),)),
        CandidateSet("5", "Which?", (), candidates[:1]),
    ]
    mixed, missing, broken, unmatched, blank, fine = critic.score(asked)
    reasons = [candidate.unscored for candidate in mixed.candidates]
    assert reasons[0] is None
    assert reasons[1] == "no steps: the solution is blank: there are no steps to judge"
    assert reasons[2] is not None
    assert reasons[2].startswith("too long: question and solution are ")
    assert reasons[2].endswith(" tokens, the model knows 150 positions")
    assert reasons[3] == "image count: 2 <image> placeholders but 1 image"
    assert reasons[4] is None
    assert [candidate.steps is None for candidate in mixed.candidates] == [False, True, True, True, False]
    assert [candidate.reward is None for candidate in mixed.candidates] == [False, True, True, True, False]
    (alone_scores,) = critic.step_scores("Which?", [folder / "0.png"], [["So b"]])
    assert mixed.candidates[4].reward == pytest.approx(alone_scores.item(), abs=1e-12)
    assert missing.candidates[0].unscored is not None
    assert missing.candidates[0].unscored.startswith("missing image: ")
    assert [candidate.unscored is None for candidate in broken.candidates] == [False, False]
    assert unmatched.candidates[0].unscored == "image count: 2 <image> placeholders but 1 image"
    assert blank.candidates[0].unscored is not None
    assert fine.candidates[0].unscored is None


def test_a_solution_that_just_fits_is_scored(open_small: Any) -> None:
    opened = open_small()
    prompts = JudgedPrompts(opened.prompts, SYSTEM)
    length = len(prompts.render("0", "Which?", (), [["So a"]]).prefix.tokens)
    for positions, fits in ((length, True), (length - 1, False)):
        config = replace(opened.model.config, decoder=replace(opened.model.config.decoder, max_positions=positions))
        critic = Critic(OpenModel(opened.model, PromptMaker(opened.prompts.tokenizer, config)), system_prompt=SYSTEM)
        if fits:
            assert len(critic.step_scores("Which?", [], [["So a"]])[0]) == 1
        else:
            with pytest.raises(SampleError, match=rf"are {length} tokens, the model knows {positions} positions"):
                critic.step_scores("Which?", [], [["So a"]])


def test_questions_are_read_a_little_ahead_and_come_as_soon_as_they_can(open_small: Any) -> None:
    read = []

    def endless() -> Iterator[CandidateSet]:
        while True:
            read.append(len(read))
            yield CandidateSet(str(len(read)), "Which?", (), (Candidate("So"),))

    scored = Critic(open_small(), system_prompt=SYSTEM).score(endless())
    assert [next(scored).name for _ in range(2)] == ["1", "2"]
    assert len(read) <= 5 * GROUP
    scored.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps = 0 is below 1"),
        ({"pack_tokens": 0}, "pack tokens = 0 is below 1"),
        ({"pack_tiles": 0}, "pack tiles = 0 is below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model_dir: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_critic(model_dir, **options)  # type: ignore[arg-type]


class FakeTokenizer:
    """Writes a header and signs by a table."""

    directory = "there"

    def __init__(self, **ids: Iterable[int]) -> None:
        self.ids = {"assistant\n": [1, 2], **{f"assistant\n{key}": list(value) for key, value in ids.items()}}

    def encode(self, text: str) -> list[int]:
        return self.ids[text]


@pytest.mark.parametrize(
    ("plus", "minus", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 5], r"writes 'assistant\\n\+' as \[1, 2, 3, 4\], not as the header's \[1, 2\]"),
        ([1, 7], [1, 2, 5], r"writes 'assistant\\n\+' as \[1, 7\]"),
        ([1, 2, 3], [1, 9, 5], r"writes 'assistant\\n-' as \[1, 9, 5\]"),
        ([1, 2, 3], [1, 2, 3], r"the same id, 3, for '\+' and '-'"),
    ],
)
def test_a_vocabulary_without_the_signs_is_refused(plus: list[int], minus: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sign_ids(FakeTokenizer(**{"+": plus, "-": minus}))  # type: ignore[arg-type]


def test_runs_and_directories_open(finished_run: Path, model_dir: Path, tmp_path: Path) -> None:
    for model in (finished_run, model_dir):
        critic = open_critic(model, dtype=torch.float64)
        assert critic.prompts.system_prompt == PRM_SYSTEM_PROMPT
        (found,) = critic.step_scores("What?", [], [["So", "Then"]])
        opened = OpenModel(critic.model, critic.prompts.prompts)
        torch.testing.assert_close(
            found, alone(opened, "What?", [], ["So", "Then"], PRM_SYSTEM_PROMPT).detach(), atol=1e-10, rtol=0
        )
    assert open_critic(model_dir, system_prompt="").prompts.system_prompt is None
    assert open_critic(model_dir, system_prompt="Other.").prompts.system_prompt == "Other."
    shutil.copytree(model_dir, tmp_path / "few")
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 100
    (tmp_path / "few" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ids, the model only 100: use the one"):
        open_critic(tmp_path / "few")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        open_critic(tmp_path / "nowhere")


def test_float32_and_bfloat16_models_score_in_float32(open_small: Any, folder: Path) -> None:
    exact, solutions, images = open_small(), [["So a", "So b"], ["So c"]], [folder / "1.png"]
    wanted = Critic(exact, system_prompt=SYSTEM).step_scores("What?", images, solutions)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = InternVL(exact.model.config).to(dtype)
        model.load_state_dict({name: value.to(dtype) for name, value in exact.model.state_dict().items()})
        found = Critic(OpenModel(model, exact.prompts), system_prompt=SYSTEM).step_scores("What?", images, solutions)
        assert all(scores.dtype == torch.float32 for scores in found)
        torch.testing.assert_close(torch.cat(found).double(), torch.cat(wanted), atol=error, rtol=0)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu(open_small: Any, folder: Path) -> None:
    exact, solutions, images = open_small(), [["So a", "So b"], ["So c"]], [folder / "1.png"]
    wanted = Critic(exact, system_prompt=SYSTEM).step_scores("What?", images, solutions)
    model = copy.deepcopy(exact.model).cuda()
    found = Critic(OpenModel(model, exact.prompts), system_prompt=SYSTEM).step_scores("What?", images, solutions)
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), atol=1e-10, rtol=0)
