"""Requests become the prompts that training would have rendered, and ids become the text that continues them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.batch import V2PESettings
from evovlm.data.chat import render
from evovlm.data.errors import Reason, SampleError
from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate import Evaluator
from evovlm.engine.generate import Prompt
from evovlm.engine.generation import Request, Sampling
from evovlm.engine.generation_prompts import PromptMaker, in_order
from evovlm.models.config import InternVLConfig

from .small_data import MakeIndex, conversation, draw_shapes
from .support import TOKENS_PER_TILE

QUARTER = V2PESettings(mode="fixed", delta=0.25)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def assert_same(a: Prompt, b: Prompt) -> None:
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.positions.tolist() == b.positions.tolist()
    assert a.visual_rows.tolist() == b.visual_rows.tolist()
    assert torch.equal(a.tiles, b.tiles)


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer, small_config: InternVLConfig) -> PromptMaker:
    return PromptMaker(tokenizer, small_config, v2pe=QUARTER, system_prompt="Read.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_shapes(folder, 4)
    return folder


def test_prompts_are_those_of_an_index(
    maker: PromptMaker, make_index: MakeIndex, tokenizer: Tokenizer, folder: Path
) -> None:
    lines = [
        conversation("Which shape?", "a box", image="1.png"),
        conversation("<image> or <image>?", "both", "And <image>?", "a disc", image=["1.png", "2.png", "3.png"]),
        conversation("One plus one?", "two", "And three?", "five"),
    ]
    index = Index.open(make_index(folder, {"some": lines}))
    evaluator = Evaluator(index, tokenizer, v2pe=QUARTER)
    for number, line in enumerate(lines):
        names = line.get("image", [])
        images = tuple(folder / name for name in ([names] if isinstance(names, str) else names))
        request = Request("some", tuple(line["conversations"][1:-1]), images)  # the system turn comes from the maker
        assert_same(maker.prompt(request), evaluator.prompt(number))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("a Aé\n.4{}<box>"), max_size=12))
def test_a_whole_answer_as_prefix_is_what_training_saw(tokenizer: Tokenizer, maker: PromptMaker, answer: str) -> None:
    request = Request("one", (human("What?"),), prefix=answer)
    trained = render(
        [{"from": "system", "value": "Read."}, human("What?"), {"from": "gpt", "value": answer}], 0, tokenizer
    )
    end = int(np.flatnonzero(trained.ids == tokenizer.im_end)[-1])
    assert maker.prompt(request).tokens.tolist() == trained.ids[:end].tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("a é\n.4世"), max_size=6), st.text(st.sampled_from("a é\n.4世"), max_size=6))
def test_new_ids_become_the_text_that_continues(maker: PromptMaker, prefix: str, answer: str) -> None:
    request = Request("one", (human("What?"),), prefix=prefix)
    assert maker.continuation(request, maker.tokenizer.encode(answer)) == answer


def test_a_letter_that_is_cut_in_half_does_not_spoil_the_text(maker: PromptMaker) -> None:
    ids = maker.tokenizer.encode("ok 🚀")
    text = maker.continuation(Request("one", (human("What?"),)), ids[:-1])
    assert text.startswith("ok ")
    assert "🚀" not in text


def test_tiles_are_limited_and_shared_by_images(
    tokenizer: Tokenizer, small_config: InternVLConfig, folder: Path
) -> None:
    def tiles(*names: str, max_tiles: int | None = None) -> int:
        maker = PromptMaker(tokenizer, small_config, max_tiles=max_tiles)
        asked = Request("one", (human("<image>" * len(names)),), tuple(folder / name for name in names))
        made = maker.prompt(asked)
        assert len(made.visual_rows) == len(made.tiles) * TOKENS_PER_TILE
        return len(made.tiles)

    assert tiles("2.png") == 4  # 1 × 3 and a thumbnail
    assert tiles("2.png", max_tiles=1) == 1
    assert tiles("2.png", "1.png") == 3 + 3  # two tiles each, and thumbnails
    assert tiles("2.png", "1.png", "0.png", "2.png", "1.png") == 5


def test_images_of_following_requests_are_loaded_once(
    tokenizer: Tokenizer, small_config: InternVLConfig, folder: Path
) -> None:
    maker = PromptMaker(tokenizer, small_config)
    first = maker.prompt(Request("a", (human("What?"),), (folder / "1.png",)))
    second = maker.prompt(Request("b", (human("Why?"),), (folder / "1.png",), prefix="So"))
    assert first.tiles is second.tiles


def test_errors_name_the_request(maker: PromptMaker, folder: Path) -> None:
    with pytest.raises(SampleError, match=r"sample 'chart/7': image '.*none\.png' does not exist") as caught:
        maker.prompt(Request("chart/7", (human("What?"),), (folder / "none.png",)))
    assert caught.value.reason == Reason.MISSING_IMAGE
    with pytest.raises(SampleError, match="sample 'chart/8': 2 <image> placeholders but 0 images"):
        maker.prompt(Request("chart/8", (human("<image><image>"),)))


def test_models_that_cannot_be_asked_are_refused(tokenizer: Tokenizer, small_config: InternVLConfig) -> None:
    with pytest.raises(ValueError, match="fixed visual stride"):
        PromptMaker(tokenizer, small_config, v2pe=V2PESettings(mode="random"))
    fewer = replace(small_config, decoder=replace(small_config.decoder, vocab_size=40))
    with pytest.raises(ValueError, match=f"has {tokenizer.vocab_size} ids, the model only 40"):
        PromptMaker(tokenizer, fewer)


def test_requests_and_sampling_are_checked() -> None:
    with pytest.raises(ValueError, match="request 'a': num = 0"):
        Request("a", (human("What?"),), num=0)
    for turns in ((), (human("What?"), {"from": "gpt", "value": "That."})):
        with pytest.raises(ValueError, match="request 'a': the last turn must be a human one"):
            Request("a", turns)
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)


def test_keys_differ_by_seed_request_and_number() -> None:
    drawn = {Sampling(seed=seed).key(name, number) for seed in (0, 1) for name in "ab" for number in (None, 0, 1)}
    assert len(drawn) == 12


def test_work_ahead_keeps_its_order_and_limit() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    results = in_order(work, range(30), threads=3, ahead=4)
    assert next(results) == (0, 0)
    results_seen = [next(results) for _ in range(3)]
    assert results_seen == [(1, 1), (2, 4), (3, 9)]
    assert max(begun) <= 3 + 4
    results.close()
    assert max(begun) <= 3 + 4 + 1


def test_work_that_fails_is_raised_in_its_turn() -> None:
    def work(item: int) -> float:
        return 1 / (3 - item)

    results = in_order(work, range(9), threads=2, ahead=4)
    assert [item for item, _ in (next(results) for _ in range(3))] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
