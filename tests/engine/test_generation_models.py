"""The own decoder and transformers say the same of the same weights; both open what a user has."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.data.batch import V2PESettings
from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate import Evaluator, answer_v2pe
from evovlm.engine.generate import Batching, Task, decode
from evovlm.engine.generation import GenerationError, Request, Sampling, open_generator
from evovlm.engine.generation_own import OwnGenerator
from evovlm.engine.generation_transformers import TransformersGenerator
from evovlm.engine.open_model import published_normalization
from evovlm.engine.runs import load_model, read_settings
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.save import save_pretrained

from .small_data import draw_shapes
from .support import weights_of

GREEDY = Sampling(temperature=0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, top_k=0, max_new_tokens=12)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


@pytest.fixture(scope="module")
def export(small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in transformers' format, with weights large enough for lively answers, pixels as SigLIP's."""
    out = tmp_path_factory.mktemp("export") / "small"
    weights = ((name, value.float() * (2 if value.ndim > 1 else 1)) for name, value in weights_of(small_config, 2))
    save_pretrained(small_config, weights, out, tokenizer_dir=tiny_tokenizer_dir, normalize="siglip")
    return out


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """One to six tiles, several images, earlier turns, no image; some begin the answer."""
    folder = tmp_path_factory.mktemp("asked")
    files = [folder / name for name, _ in draw_shapes(folder, 4)]
    said = {"from": "gpt", "value": "A box."}
    system = {"from": "system", "value": "Look."}
    return [
        Request("0", (human("Which shape?"),), (files[0],)),
        Request("1", (human("Which shape?"),), (files[2],), prefix="The answer"),
        Request("2", (system, human("<image> or <image>?"), said, human("Why?")), (files[1], files[2]), num=3),
        Request(
            "3",
            (
                system,
                human("Say 42."),
            ),
            prefix="The answer is 4",
        ),
        Request(
            "4",
            (
                system,
                human("What digits?"),
            ),
            num=2,
        ),
    ]


@pytest.fixture(scope="module")
def own(export: Path) -> OwnGenerator:
    return OwnGenerator.from_dir(export, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs(export: Path) -> TransformersGenerator:
    return TransformersGenerator.from_dir(export, dtype=torch.float64)


def texts(answers: Any) -> list[list[str]]:
    return [[completion.text for completion in completions] for completions in answers]


def test_both_give_the_same_greedy_answers(
    own: OwnGenerator, theirs: TransformersGenerator, requests: list[Request]
) -> None:
    ours = list(own.generate(requests, GREEDY))
    assert ours == list(theirs.generate(requests, GREEDY))
    assert [len(completions) for completions in ours] == [1, 1, 3, 1, 2]
    assert all(len(set(completions)) == 1 for completions in ours)
    assert len({completions[0].text for completions in ours}) == 5


def test_one_candidate_is_greedy_in_both(
    own: OwnGenerator, theirs: TransformersGenerator, requests: list[Request]
) -> None:
    greedy = texts(own.generate(requests, GREEDY))
    one = Sampling(temperature=5.0, top_k=1, max_new_tokens=12)
    assert texts(own.generate(requests, one)) == greedy
    assert texts(theirs.generate(requests, one)) == greedy  # also with images of several tiles and several answers


def test_own_answers_depend_on_seed_and_name_alone(own: OwnGenerator, requests: list[Request]) -> None:
    together = list(own.generate(requests, WARM))
    assert len({completion.text for completions in together for completion in completions}) == 8
    own.batching = Batching(cache_tokens=1, max_answers=1, prefill_tokens=1)
    try:
        assert list(own.generate(requests[::-1], WARM)) == together[::-1]
    finally:
        own.batching = None
    other = list(own.generate(requests, Sampling(temperature=1.0, top_k=0, max_new_tokens=12, seed=1)))
    assert other != together


def test_answers_of_transformers_depend_on_seed_and_name_alone(
    theirs: TransformersGenerator, requests: list[Request]
) -> None:
    state = torch.random.get_rng_state()
    together = list(theirs.generate(requests, WARM))
    assert list(theirs.generate(requests[::-1], WARM)) == together[::-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({completion.text for completion in together[2]}) == 3
    other = list(theirs.generate(requests, Sampling(temperature=1.0, top_k=0, max_new_tokens=12, seed=1)))
    assert other != together


def test_a_prefix_cut_from_an_answer_is_continued_by_the_rest(own: OwnGenerator) -> None:
    asked = [Request(str(i), (human(f"Say {i}."),)) for i in range(12)]
    prompts, header = own.prompts, own.prompts.answer_ids("")
    cuts = []
    for request, whole in zip(asked, texts(own.generate(asked, GREEDY)), strict=True):
        task = Task(prompts.prompt(request), (0,))
        ((drawn,),) = decode(own.model, [task], GREEDY, stop=prompts.stop)
        for length in range(1, len(drawn.ids)):
            prefix = prompts.continuation(request, drawn.ids[:length])
            if prompts.answer_ids(prefix) == [*header, *drawn.ids[:length]]:  # the text gives these tokens again
                cuts.append((Request("cut", request.turns, prefix=prefix), whole[0].removeprefix(prefix)))
    assert len(cuts) > 5
    answers = texts(own.generate([request for request, _ in cuts], GREEDY))
    assert all(answer.startswith(rest) for (answer,), (_, rest) in zip(answers, cuts, strict=True))


def test_an_answer_that_the_model_ends_is_finished(own: OwnGenerator, theirs: TransformersGenerator) -> None:
    asked = [Request(str(i), (human(f"Say {i}."),), num=1) for i in range(16)]
    long = Sampling(temperature=20.0, top_k=0, max_new_tokens=40)
    for generator in (own, theirs):
        answers = [completion for (completion,) in generator.generate(asked, long)]
        ended = [answer for answer in answers if answer.finished]
        assert ended
        assert all(answer.num_tokens < 40 for answer in ended)
        assert all(answer.num_tokens == 40 for answer in answers if not answer.finished)


def test_a_run_answers_as_its_evaluation_does(finished_run: Path, indexes: dict[str, Path]) -> None:
    settings = read_settings(finished_run)
    index = Index.open(indexes["val"])
    evaluator = Evaluator(
        index,
        Tokenizer.load(finished_run / "tokenizer"),
        v2pe=answer_v2pe(settings.stage.v2pe),
        max_new_tokens=GREEDY.max_new_tokens,
    )
    asked = range(5)
    expected = [answer.given for answer in evaluator.answers(load_model(finished_run), asked)]
    generator = open_generator(finished_run, system_prompt="Read.")
    assert isinstance(generator, OwnGenerator)
    requests = [
        Request(str(i), (human("Which shape?"),), tuple(ref.path for ref in index.image_refs(i))) for i in asked
    ]
    assert [text for (text,) in texts(generator.generate(requests, GREEDY))] == expected


def test_directories_of_both_formats_are_opened(model_dir: Path, export: Path) -> None:
    assert isinstance(open_generator(model_dir), OwnGenerator)
    assert isinstance(open_generator(export, v2pe=V2PESettings(mode="fixed")), OwnGenerator)
    assert isinstance(open_generator(export, backend="transformers"), TransformersGenerator)
    with pytest.raises(GenerationError, match=r"format 'internvl'.*--format transformers"):
        open_generator(model_dir, backend="transformers")
    with pytest.raises(ValueError, match="'vllm' is not one of evovlm, transformers, server"):
        open_generator(export, backend="vllm")  # type: ignore[arg-type]


def test_the_published_normalisation_is_read(model_dir: Path, export: Path, tmp_path: Path) -> None:
    assert published_normalization(model_dir) == "imagenet"
    assert published_normalization(export) == "siglip"
    assert published_normalization(tmp_path) == "imagenet"
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [9, 9, 9]}')
    with pytest.raises(ValueError, match="none of imagenet, clip, siglip"):
        published_normalization(tmp_path)


def test_a_visual_stride_is_refused_by_transformers(own: OwnGenerator, theirs: TransformersGenerator) -> None:
    own_prompts = OwnGenerator.from_dir(
        own.prompts.tokenizer.directory, v2pe=V2PESettings(mode="fixed", delta=0.5)
    ).prompts
    with pytest.raises(ValueError, match="no visual stride"):
        TransformersGenerator(theirs.model, own_prompts)


def test_nothing_asked_is_nothing_answered(own: OwnGenerator, theirs: TransformersGenerator) -> None:
    nothing: list[Request] = []
    assert list(own.generate(nothing, GREEDY)) == list(theirs.generate(nothing, GREEDY)) == []
