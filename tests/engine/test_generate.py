"""Decoding with a cache equals running the whole sequence anew for every token, whatever else is in the batch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.engine import generate as generate_module
from evovlm.engine.generate import Batching, Drawn, Prompt, Task, decode, generate
from evovlm.engine.generate_cache import StepAttend
from evovlm.engine.generate_draw import draw
from evovlm.engine.generate_families import MAX_TAIL
from evovlm.engine.generation import Sampling
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


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the number of answers in the batch at each step from now on."""
    sizes: list[int] = []

    def attend(*args: Any, slots: Sequence[int], **more: Any) -> StepAttend:
        sizes.append(len(slots))
        return StepAttend(*args, slots=slots, **more)

    monkeypatch.setattr(generate_module, "StepAttend", attend)
    return sizes


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
    sizes = record_steps(monkeypatch)
    generate(model, prompts, max_new_tokens=20, stop={free[0][1], free[1][2]})
    assert 1 <= len(sizes) <= 2
    assert sizes[-1] == 1 or free[0][1] in free[1][:3]


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


@torch.no_grad()
def drawn_alone(model: InternVL, task: Task, sampling: Sampling, stop: set[int]) -> list[Drawn]:
    """Draw each answer by itself, without a cache."""
    answers = []
    for key in task.keys:
        tokens, positions, ids = task.prompt.tokens.tolist(), task.prompt.positions.tolist(), list[int]()
        finished = False
        while not finished and len(ids) < sampling.max_new_tokens:
            logits = model(
                torch.tensor(tokens),
                torch.tensor(positions, dtype=torch.float32),
                torch.tensor([0, len(tokens)], dtype=torch.int32),
                task.prompt.tiles,
                torch.from_numpy(task.prompt.visual_rows),
            )
            (token,) = draw(logits[-1:], sampling, [key], [len(ids)])
            finished = token in stop
            if not finished:
                ids.append(token)
                tokens.append(token)
                positions.append(positions[-1] + 1)
        answers.append(Drawn(ids, finished))
    return answers


def cut(whole: Prompt, length: int, change: int = 0) -> Prompt:
    """Return the beginning of a prompt; its last ``change`` tokens are others, as where a text is cut."""
    tokens = whole.tokens[:length].copy()
    tokens[length - change :] = (tokens[length - change :] + 1) % VOCAB
    return replace(whole, tokens=tokens, positions=whole.positions[:length])


@st.composite
def solutions(draw_: st.DrawFn) -> list[Prompt]:
    """Prompts of which some begin with others, in any order."""
    whole = draw_(PROMPTS)[0]
    image = len(whole.visual_rows) + 2
    lengths = draw_(st.lists(st.integers(min(image + 1, len(whole.tokens)), len(whole.tokens)), max_size=3))
    return [cut(whole, length, draw_(st.integers(0, min(2, length - image)))) for length in lengths] + [whole]


KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)
TASKS = st.lists(st.one_of(solutions(), PROMPTS), min_size=1, max_size=3).flatmap(
    lambda groups: st.tuples(*(st.builds(Task, st.just(p), KEYS.map(tuple)) for group in groups for p in group))
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5, 50]),
    top_p=st.sampled_from([1.0, 0.8]),
    max_new_tokens=st.integers(1, 6),
)
BATCHINGS = st.builds(
    Batching, cache_tokens=st.integers(1, 400), max_answers=st.integers(1, 12), prefill_tokens=st.integers(1, 60)
)


def test_prompts_that_part_right_after_an_image_at_a_fraction(model: InternVL) -> None:
    whole = prompt(0, 3, 1, 1 / 256)
    other = replace(whole, tokens=np.append(whole.tokens[:-1], (whole.tokens[-1] + 1) % VOCAB).astype(np.int32))
    tasks = [Task(whole, (0,)), Task(other, (1, 2))]
    sampling = Sampling(temperature=1.5, top_k=0, max_new_tokens=6)
    expected = [drawn_alone(model, task, sampling, set()) for task in tasks]
    assert list(decode(model, tasks, sampling, stop=NEVER)) == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(TASKS, SAMPLINGS, BATCHINGS, st.sets(st.integers(0, VOCAB - 1), max_size=6))
def test_what_is_drawn_depends_on_nothing_else_in_the_batch(
    model: InternVL, tasks: tuple[Task, ...], sampling: Sampling, batching: Batching, stop: set[int]
) -> None:
    expected = [drawn_alone(model, task, sampling, stop) for task in tasks]
    assert list(decode(model, tasks, sampling, stop=stop, batching=batching)) == expected
    assert list(decode(model, tasks[::-1], sampling, stop=stop)) == expected[::-1]


def test_answers_of_a_prompt_differ_by_their_keys(model: InternVL) -> None:
    task = Task(prompt(0, 8, 1), tuple(range(16)))
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    (answers,) = decode(model, [task], sampling, stop=NEVER)
    assert len({tuple(answer.ids) for answer in answers}) > 12
    (again,) = decode(model, [replace(task, keys=(3, 99))], sampling, stop=NEVER)
    assert again[0] == answers[3]


def test_answers_of_a_prompt_share_prefill_images_and_cache(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, prefilled, rooms = [], [], []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda tiles: (encoded.append(len(tiles)), encode(tiles))[1])
    attend = generate_module.PromptAttend

    def note(slots: Any, lengths: Sequence[int], first: int) -> Any:
        prefilled.extend(lengths)
        rooms.append(slots.layers[0].shape)
        return attend(slots, lengths, first)

    monkeypatch.setattr(generate_module, "PromptAttend", note)
    whole = prompt(0, 20, 3)
    parts = [Task(cut(whole, length), (length, 1, 2, 3)) for length in (20, 25, len(whole.tokens), 30)]
    list(decode(model, parts, Sampling(max_new_tokens=3), stop=NEVER))
    assert encoded == [3]
    assert prefilled == [len(whole.tokens)]
    assert rooms == [(2, 1, SMALL.decoder.num_kv_heads, len(whole.tokens), SMALL.decoder.head_dim)]


def test_others_take_the_place_of_finished_answers(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(prompt(seed, 5, 0), (seed,)) for seed in range(24)]
    sampling = Sampling(temperature=1.0, max_new_tokens=40)
    lengths = [len(a.ids) for (a,) in decode(model, tasks, sampling, stop={1, 2, 3, 4})]
    assert max(lengths) > 2 * sum(lengths) / len(lengths)  # a tail that would keep a batch of 4 waiting
    sizes = record_steps(monkeypatch)
    list(decode(model, tasks, sampling, stop={1, 2, 3, 4}, batching=Batching(max_answers=4)))
    assert max(sizes) == 4
    in_batches = sum(max(lengths[i : i + 4]) for i in range(0, 24, 4))
    assert len(sizes) < in_batches


def test_tasks_are_read_as_room_gets_free(model: InternVL) -> None:
    read = []

    def tasks() -> Iterator[Task]:
        for seed in range(20):
            read.append(seed)
            yield Task(prompt(seed, 5, 0), (seed,))

    answers = decode(model, tasks(), Sampling(max_new_tokens=3), stop=NEVER, batching=Batching(max_answers=2))
    next(answers)
    assert len(read) <= 2 + 2 + 2  # in the batch, after it, and one read ahead of each of two
    assert len(list(answers)) == 19


def test_the_cache_keeps_to_its_budget(model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def attend(prompts: Any, answers: Any, **more: Any) -> StepAttend:
        used.append((len(set(more["slots"])) * max(more["seen"]), len(more["slots"])))
        return StepAttend(prompts, answers, **more)

    monkeypatch.setattr(generate_module, "StepAttend", attend)
    tasks = [Task(prompt(seed, 4 + seed, seed % 3), (1, 2, 3)) for seed in range(12)]
    budget, new = 200, 6
    list(decode(model, tasks, Sampling(max_new_tokens=new), stop=NEVER, batching=Batching(cache_tokens=budget)))
    assert max(prompts + answers * (new + MAX_TAIL) for prompts, answers in used) <= budget
    assert max(answers for _, answers in used) > 6


@pytest.mark.parametrize("name", ["cache_tokens", "max_answers", "prefill_tokens"])
def test_no_room_at_all_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0 is below 1"):
        Batching(**{name: 0})
