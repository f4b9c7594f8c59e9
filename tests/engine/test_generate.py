"""Greedy decoding with a cache equals running the whole sequence anew for every token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.engine.generate import KVCache, Prompt, generate
from evovlm.models.internvl import InternVL
from evovlm.models.v2pe import segment_positions

from .support import SMALL, TILE, TOKENS_PER_TILE, VOCAB, plain_model

NEVER = {-1}


@pytest.fixture(scope="module")
def model() -> InternVL:
    return plain_model().eval()


def prompt(seed: int, length: int, num_tiles: int, delta: float = 1.0) -> Prompt:
    """Text, one image after two tokens, text; ``length`` counts text alone."""
    generator = torch.Generator().manual_seed(seed)
    run = num_tiles * TOKENS_PER_TILE
    runs = [(2, run)] if run else []
    return Prompt(
        tokens=torch.randint(0, VOCAB, (length + run,), generator=generator).numpy().astype(np.int32),
        positions=segment_positions(length + run, runs, [delta] * len(runs)),
        visual_rows=np.arange(2, 2 + run),
        tiles=torch.randn(num_tiles, 3, TILE, TILE, generator=generator, dtype=torch.float64),
    )


@torch.no_grad()
def without_cache(model: InternVL, given: Prompt, count: int) -> list[int]:
    """Run the sequence from its beginning for each token; generated token t stands at last position + t."""
    tokens, positions = given.tokens.tolist(), given.positions.tolist()
    for _ in range(count):
        logits = model(
            torch.tensor(tokens),
            torch.tensor(positions, dtype=torch.float32),
            torch.tensor([0, len(tokens)], dtype=torch.int32),
            given.tiles,
            torch.from_numpy(given.visual_rows),
        )
        tokens.append(int(logits[-1].argmax()))
        positions.append(positions[-1] + 1)
    return tokens[len(given.tokens) :]


PROMPTS = st.lists(
    st.builds(
        prompt,
        st.integers(0, 10_000),
        st.integers(2, 12),
        st.integers(0, 3),
        st.sampled_from([1.0, 0.25, 1 / 256]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=20, deadline=None)
@given(PROMPTS, st.integers(1, 7))
def test_the_cache_changes_nothing(model: InternVL, prompts: list[Prompt], count: int) -> None:
    together = generate(model, prompts, max_new_tokens=count, stop=NEVER)
    assert together == [without_cache(model, p, count) for p in prompts]


def test_the_cases_are_not_all_alike(model: InternVL) -> None:
    # Answers must depend on prompt, image and stride, or the test above would prove little.
    def answer(p: Prompt) -> tuple[int, ...]:
        return tuple(generate(model, [p], max_new_tokens=6, stop=NEVER)[0])

    assert len({answer(prompt(seed, 8, 1)) for seed in range(8)}) > 4
    with_image = [prompt(seed, 8, 2, 0.25) for seed in range(8)]
    black = [replace(p, tiles=torch.zeros_like(p.tiles)) for p in with_image]
    assert sum(answer(a) != answer(b) for a, b in zip(with_image, black, strict=True)) > 2
    ordinary = [replace(p, positions=np.arange(len(p.tokens), dtype=np.float32)) for p in with_image]
    assert sum(answer(a) != answer(b) for a, b in zip(with_image, ordinary, strict=True)) > 0


def test_sequences_end_at_a_stop_token_each_on_its_own(model: InternVL) -> None:
    prompts = [prompt(seed, 5 + seed, seed % 3) for seed in range(6)]
    free = generate(model, prompts, max_new_tokens=8, stop=NEVER)
    stop = {free[0][3], free[1][0]}
    expected = []
    for answer in free:
        end = next((i for i, token in enumerate(answer) if token in stop), len(answer))
        expected.append(answer[:end])
    assert generate(model, prompts, max_new_tokens=8, stop=stop) == expected
    assert expected[1] == []
    assert len({len(answer) for answer in expected}) > 1


def test_decoding_ends_with_the_last_sequence(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(0, 6, 0), prompt(1, 4, 1)]
    free = generate(model, prompts, max_new_tokens=20, stop=NEVER)
    steps = []
    advance = KVCache.advance
    monkeypatch.setattr(KVCache, "advance", lambda self: (steps.append(1), advance(self)))
    generate(model, prompts, max_new_tokens=20, stop={free[0][1], free[1][2]})
    assert len(steps) <= 2


@pytest.mark.parametrize("family", ["grouped", "one head each", "one shared head"])
def test_every_grouping_of_heads(family: str) -> None:
    kv_heads = {"grouped": 2, "one head each": 4, "one shared head": 1}[family]
    config = replace(SMALL, decoder=replace(SMALL.decoder, num_kv_heads=kv_heads))
    model = plain_model(config).eval()
    prompts = [prompt(3, 6, 1), prompt(4, 9, 0)]
    answers = generate(model, prompts, max_new_tokens=5, stop=NEVER)
    assert answers == [without_cache(model, p, 5) for p in prompts]


def test_a_bfloat16_model_answers(model: InternVL) -> None:
    narrow = plain_model().eval().bfloat16()
    answers = generate(narrow, [prompt(0, 8, 2, 0.25)], max_new_tokens=4, stop=NEVER)
    assert len(answers[0]) == 4
