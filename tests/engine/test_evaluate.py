"""Scoring: the right question is put, the right answer expected, and ranks share the work without changing it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evovlm.data.batch import V2PESettings
from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine import evaluate as evaluate_module
from evovlm.engine.evaluate import Answer, Evaluator, answer_v2pe, constant_baseline, exact_match, summary
from evovlm.engine.generate import Prompt
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .small_data import MakeIndex, conversation, draw_shapes
from .support import TOKENS_PER_TILE, weights_of

QUARTER = V2PESettings(mode="fixed", delta=0.25)


@pytest.fixture(scope="module")
def index(make_index: MakeIndex, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """``shapes``: 7 pictures, of 4 boxes; ``dialogue``: two images in two turns, then text alone; ``long``: text."""
    folder = tmp_path_factory.mktemp("test")
    shapes = draw_shapes(folder, 7)
    asked = [conversation("Which shape?", shape, image=file) for file, shape in shapes]
    dialogue = [
        conversation("<image> first?", "a box", "<image> second?", "a disc", image=["0.png", "1.png"]),
        conversation("One plus one?", "two", "And three?", "five"),
    ]
    long = [conversation("Say it.", "the dog and the cat sit beside the red car"), conversation("Say less.", "it")]
    return Index.open(make_index(folder, {"shapes": asked, "dialogue": dialogue, "long": long}))


def make(index: Index, tokenizer: Tokenizer, **options: Any) -> Evaluator:
    return Evaluator(index, tokenizer, v2pe=QUARTER, **options)


def test_a_prompt_ends_where_the_last_answer_begins(index: Index, tokenizer: Tokenizer) -> None:
    evaluator = make(index, tokenizer)
    prompt = evaluator.prompt(8)
    _, answer = evaluator.question(8)
    assert tokenizer.decode(prompt.tokens.tolist()) == (
        "<|im_start|>system\nRead.<|im_end|>\n<|im_start|>user\nOne plus one?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(answer) == "five"
    assert len(prompt.tiles) == len(prompt.visual_rows) == 0
    assert prompt.positions.tolist() == list(range(len(prompt.tokens)))


def test_images_of_a_prompt(index: Index, tokenizer: Tokenizer) -> None:
    evaluator = make(index, tokenizer)
    prompt = evaluator.prompt(7)  # one tile, and 2 × 1 tiles with a thumbnail
    assert prompt.tiles.shape[0] == 1 + 3
    rows = prompt.visual_rows
    assert len(rows) == 4 * TOKENS_PER_TILE
    assert set(prompt.tokens[rows].tolist()) == {tokenizer.image_context}
    assert int((prompt.tokens == tokenizer.image_context).sum()) == len(rows)
    # δ = 1/4: an image of n tiles of 4 tokens takes n positions.
    assert prompt.positions[rows[:5]].tolist() == [
        *(prompt.positions[rows[0] - 1] + 0.25 * np.arange(1, 5)),
        prompt.positions[rows[4] - 1] + 0.25,
    ]
    assert prompt.positions[-1] == len(prompt.tokens) - 1 - len(rows) + 4
    assert "a disc" not in tokenizer.decode(prompt.tokens.tolist())
    assert "a box" in tokenizer.decode(prompt.tokens.tolist())


def test_images_after_the_last_answer_are_not_shown(
    make_index: MakeIndex, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    draw_shapes(tmp_path, 2)
    open_ended = conversation("<image> first?", "a box", "<image> second?", image=["1.png", "0.png"])
    evaluator = make(Index.open(make_index(tmp_path, {"odd": [open_ended]})), tokenizer)
    prompt = evaluator.prompt(0)
    assert tokenizer.decode(evaluator.question(0)[1]) == "a box"
    assert tokenizer.decode(prompt.tokens.tolist()).endswith("<|im_start|>assistant\n")
    assert prompt.tiles.shape[0] == 3  # of the first image; the second has one tile more
    assert len(prompt.visual_rows) == 3 * TOKENS_PER_TILE


class Scripted:
    """Stands in for ``generate``: knows the answers of a test by its prompts, and gives some of them wrongly."""

    def __init__(self, evaluator: Evaluator, wrong: Collection[int]) -> None:
        self.tokenizer = evaluator.tokenizer
        self.known: dict[bytes, list[int]] = {}
        for sample in range(len(evaluator.index.samples)):
            prompt = evaluator.prompt(sample)
            key = prompt.tokens.tobytes() + prompt.tiles.numpy().tobytes()
            answer = evaluator.question(sample)[1]
            self.known[key] = self.tokenizer.encode("no idea") if sample in wrong else answer
        self.calls: list[tuple[int, int]] = []

    def __call__(
        self, model: object, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]
    ) -> list[list[int]]:
        self.calls.append((len(prompts), max_new_tokens))
        assert set(stop) == {self.tokenizer.im_end, self.tokenizer.end_of_text}
        return [self.known[p.tokens.tobytes() + p.tiles.numpy().tobytes()] for p in prompts]


MODEL: Any = object()


def test_scores_of_a_model_that_knows_most_answers(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(index, tokenizer, batch_size=4)
    script = Scripted(evaluator, wrong=(1, 6, 7))
    monkeypatch.setattr(evaluate_module, "generate", script)
    answers = list(evaluator.answers(MODEL, range(len(index.samples))))
    assert [answer.correct for answer in answers] == [i not in (1, 6, 7) for i in range(11)]
    assert answers[1] == Answer(task="shapes", name="shapes/2", expected="disc", given="no idea")
    assert answers[8] == Answer(task="dialogue", name="dialogue/2", expected="five", given="five")
    assert exact_match(answers) == {"shapes": 5 / 7, "dialogue": 1 / 2, "long": 1.0}
    # The best constant answer says "box" four times of seven; elsewhere no answer comes twice.
    assert constant_baseline(answers) == {"shapes": 4 / 7, "dialogue": 1 / 2, "long": 1 / 2}
    assert summary(answers)["shapes"] == {"exact_match": 5 / 7, "constant_baseline": 4 / 7, "num_test": 7}
    longest = max(len(evaluator.question(i)[1]) for i in range(11))
    assert script.calls == [(4, longest + 4), (4, longest + 4), (3, longest + 4)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_questions(
    index: Index, tokenizer: Tokenizer, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(index, tokenizer, batch_size=3, max_new_tokens=5)
    script = Scripted(evaluator, wrong=(2, 3, 10))
    monkeypatch.setattr(evaluate_module, "generate", script)
    alone = list(evaluator.answers(MODEL, range(len(index.samples))))
    script.calls.clear()

    def job(world: World) -> tuple[list[Answer], int]:
        return evaluator.run(MODEL, world), sum(count for count, _ in script.calls)

    results = run_ranks(size, job)
    assert all(answers == alone for answers, _ in results)
    counts = [count for _, count in results]
    assert sum(counts) == 11
    assert max(counts) - min(counts) <= 1


def test_a_real_model_says_the_same_on_two_ranks(
    index: Index, tokenizer: Tokenizer, small_config: InternVLConfig
) -> None:
    model = InternVL(small_config)
    model.load_state_dict({name: value.float() for name, value in weights_of(small_config)})
    evaluator = make(index, tokenizer, batch_size=4, max_new_tokens=4)
    one = run_ranks(1, lambda world: evaluator.run(model.eval(), world))[0]
    two = run_ranks(2, lambda world: evaluator.run(model.eval(), world))
    assert two[0] == two[1] == one
    assert len({answer.given for answer in one}) > 3
    assert not any(answer.correct for answer in one)


def test_spaces_at_the_ends_do_not_count() -> None:
    def correct(expected: str, given: str) -> bool:
        return Answer("t", "t/1", expected, given).correct

    assert correct("4 2", " 4 2\n")
    assert not correct("4 2", "42")
    assert not correct("Dog", "dog")
    assert not correct("", "x")


def test_the_stride_of_answers() -> None:
    assert answer_v2pe(V2PESettings(mode="random")) == QUARTER  # the best published one
    for same in (V2PESettings(mode="off"), V2PESettings(mode="fixed", delta=0.5)):
        assert answer_v2pe(same) == same


def test_a_random_stride_is_refused(index: Index, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="fixed visual stride"):
        Evaluator(index, tokenizer, v2pe=V2PESettings(mode="random"))


def test_another_tokenizer_is_refused(index: Index, qwen_like: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"tokenizer of {index.meta.vocab_size} ids, this one has"):
        Evaluator(index, qwen_like, v2pe=QUARTER)


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from evovlm.data.tokenizer_training import build_tokenizer

    return Tokenizer.load(build_tokenizer(["other text, other merges"], tmp_path_factory.mktemp("other"), 290))


def test_a_sample_without_an_answer_is_named(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ``build_index`` leaves such samples out, so the index has to be spoilt.
    tokens = index.tokens

    def spoilt(sample: int) -> tuple[Any, Any]:
        ids, supervised = tokens(sample)
        return ids, supervised & (sample != 8)

    monkeypatch.setattr(index, "tokens", spoilt)
    with pytest.raises(ValueError, match="sample 'dialogue/2' has no answer to compare with"):
        make(index, tokenizer)
