"""The quickstart's data: no source item and no picture is in two splits, answers are right, files are as promised."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evovlm.data.corpus import open_corpus
from evovlm.data.meta import load_meta
from evovlm.data.solution_steps import split_steps
from evovlm.data.synthetic import build_quickstart_data, charts, digits, sources, steps, words
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import SPLITS, Split
from evovlm.data.tiling import choose_grid, num_tiles
from evovlm.data.tokenizer import Tokenizer

Make = Callable[[int, Split, int], Sample]
TASKS: dict[str, Make] = {"digits": digits.make, "words": words.make, "charts": charts.make, "steps": steps.make}
TRAIN_ONLY: dict[str, Make] = {
    "digit_pages": partial(digits.make, one_tile=True),
    "letters": words.make_letters,
    "letter_pages": partial(words.make_letters, one_tile=True),
    "chart_pages": partial(charts.make, one_tile=True),
}
COUNT = 300


def _pixels(image: Image.Image) -> str:
    return hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=8).hexdigest()


@pytest.fixture(scope="module")
def made() -> dict[Split, list[Sample]]:
    """Samples of all kinds, by split; everything that training reads counts as training."""
    by_split = {split: [make(0, split, i) for make in TASKS.values() for i in range(COUNT)] for split in SPLITS}
    by_split["train"] += [make(0, "train", i) for make in TRAIN_ONLY.values() for i in range(COUNT)]
    return by_split


def test_no_source_item_is_in_two_splits(made: dict[Split, list[Sample]]) -> None:
    used = {split: {name for sample in samples for name in sample.sources} for split, samples in made.items()}
    for kind in ("digit:", "word:", "photo:", "chart:"):
        assert all(any(name.startswith(kind) for name in used[split]) for split in SPLITS), kind
    for one, other in combinations(SPLITS, 2):
        assert not used[one] & used[other], (one, other)


def test_no_picture_is_in_two_splits(made: dict[Split, list[Sample]]) -> None:
    seen = {split: {_pixels(i) for sample in samples for i in sample.images} for split, samples in made.items()}
    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other], (one, other)


def test_whole_pools_of_source_items_are_disjoint() -> None:
    digit_pools = {split: {d.pixels.tobytes() for d in pool} for split, pool in sources.digits(0).items()}
    word_pools = {split: set(pool) for split, pool in sources.words(0).items()}
    photo_pools = {split: {_pixels(image) for _, image in sources.photos(split)} for split in SPLITS}
    text_pools = {split: {d.text for d in pool} for split, pool in sources.text_split(0).items()}
    for pools in (digit_pools, word_pools, photo_pools, text_pools):
        for one, other in combinations(SPLITS, 2):
            assert not pools[one] & pools[other]
    assert sum(len(pool) for pool in sources.digits(0).values()) == 1797


def test_letter_strings_never_spell_a_held_out_word() -> None:
    forbidden = frozenset({"CAT"})
    draws = (Draws("t", i) for i in range(3000))
    texts = {words.letter_string(d, (3,), forbidden) for d in draws}
    assert "CAT" not in texts
    # the same draws, told to avoid a string they would have made, make another one
    first = words.letter_string(Draws("t", 0), (3,), frozenset())
    assert words.letter_string(Draws("t", 0), (3,), frozenset({first})) != first


def test_a_chart_counts_as_the_same_in_any_order_and_kind() -> None:
    one = charts.Chart("bar", ("red", "blue"), (3, 5))
    assert one.source == charts.Chart("pie", ("blue", "red"), (5, 3)).source
    assert one.source != charts.Chart("bar", ("red", "blue"), (5, 3)).source


def test_pies_that_look_the_same_are_one_source() -> None:
    one, other = (charts.Chart("pie", ("cyan", "green"), values) for values in ((3, 1), (6, 2)))
    assert _pixels(charts.render(one, (56, 56))) == _pixels(charts.render(other, (56, 56)))
    assert sources.hashed_split(one.source) == sources.hashed_split(other.source)


@pytest.mark.parametrize("task", TASKS)
def test_the_best_constant_answer_is_poor(task: str) -> None:
    answers = Counter(TASKS[task](0, "test", i).questions[0][1] for i in range(COUNT))
    assert max(answers.values()) / COUNT <= 0.3


@pytest.mark.parametrize("name", [*TASKS, *TRAIN_ONLY])
def test_a_sample_depends_on_its_number_alone(name: str) -> None:
    make = {**TASKS, **TRAIN_ONLY}[name]
    alone = make(0, "train", 7)
    make(0, "train", 3)
    again = make(0, "train", 7)
    assert [_pixels(i) for i in alone.images] == [_pixels(i) for i in again.images]
    assert (alone.transcripts, alone.questions, alone.sources) == (again.transcripts, again.questions, again.sources)
    assert _pixels(make(1, "train", 7).images[0]) != _pixels(alone.images[0])


def test_a_drawn_chart_shows_its_values() -> None:
    """Count each bar's pixels: areas must be in proportion to values, for bars and for slices."""
    for kind in ("bar", "pie"):
        chart = charts.Chart(kind, ("red", "blue", "green"), (2, 4, 6))
        pixels = np.asarray(charts.render(chart, (112, 112))).astype(int)
        areas = []
        for colour in chart.colours:
            paint = np.array([int(charts.COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)])
            areas.append(int((np.abs(pixels - paint).sum(-1) < 30).sum()))
        shares = np.array(areas) / sum(areas)
        np.testing.assert_allclose(shares, np.array(chart.values) / sum(chart.values), atol=0.03)


def test_a_panel_keeps_nothing_of_the_chart_before() -> None:
    chart = charts.Chart("bar", ("red", "blue"), (1, 2))
    before = _pixels(charts.render(chart, (112, 56)))
    charts.render(charts.Chart("bar", ("green", "black", "pink"), (8, 7, 6)), (112, 56))
    assert _pixels(charts.render(chart, (112, 56))) == before


def test_chart_answers_follow_from_the_chart() -> None:
    for number in range(COUNT):
        sample = charts.make(0, "train", number)
        shown = dict(part.split("=") for part in sample.sources[0].removeprefix("chart:").split(","))
        words = sample.transcripts[0].split()
        if words[1].isdigit():  # a bar chart's transcript has the values; a source only what they are in proportion
            shown = dict(zip(words[::2], words[1::2], strict=True))
        values = {colour: int(value) for colour, value in shown.items()}
        assert sample.questions
        for question, answer in sample.questions:
            assert answer == _right_answer(question, values), question


def _right_answer(question: str, values: dict[str, int]) -> str:
    named = [word for word in question.rstrip("?").split() if word in values]
    if "largest" in question:
        return max(values, key=values.__getitem__)
    if "smallest" in question:
        return min(values, key=values.__getitem__)
    if "How many" in question:
        return str(len(values))
    if "larger than" in question:
        return "yes" if values[named[0]] > values[named[1]] else "no"
    return str(values[named[0]])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("quickstart")
    build_quickstart_data(out, seed=0, scale=0.02, num_workers=2)
    yield out


def _lines(out: Path, part: str) -> Iterator[tuple[str, dict[str, object]]]:
    for dataset in load_meta(out / f"{part}.json").datasets:
        if dataset.format == "internvl":
            for line in dataset.annotation.read_text(encoding="utf-8").splitlines():
                yield str(dataset.root), json.loads(line)


@pytest.mark.parametrize("part", ["pretrain", "sft", "val", "test"])
def test_written_lines_have_their_images(written: Path, part: str) -> None:
    checked = 0
    for root, line in _lines(written, part):
        images = line["image"] if isinstance(line["image"], list) else [line["image"]]
        turns = line["conversations"]
        assert isinstance(turns, list)
        assert sum(turn["value"].count("<image>") for turn in turns) == len(images)
        assert all((Path(root) / str(path)).is_file() for path in images)
        checked += 1
    assert checked


def test_written_splits_share_no_picture(written: Path) -> None:
    seen = {split: {_pixels(Image.open(p)) for p in (written / "images" / split).rglob("*.png")} for split in SPLITS}
    assert all(seen.values())
    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_images_give_one_to_five_tiles(written: Path) -> None:
    counts = set()
    for path in (written / "images" / "train").rglob("*.png"):
        with Image.open(path) as image:
            counts.add(num_tiles(choose_grid(*image.size, 1, 4, 56), True))
    assert counts == {1, 3, 4, 5}  # two tiles never stand without their thumbnail


def test_pretraining_has_documents_conversations_and_text(written: Path) -> None:
    forms = Counter(line["conversations"][0]["from"] for _, line in _lines(written, "pretrain"))  # type: ignore[index]
    assert set(forms) == {"pretrain", "human"}
    assert any(d.format == "megatron" for d in load_meta(written / "pretrain.json").datasets)
    assert {line["conversations"][0]["from"] for _, line in _lines(written, "sft")} == {"human"}  # type: ignore[index]
    assert any(isinstance(line["image"], list) for _, line in _lines(written, "sft"))
    assert {"steps", "digits"} <= {d.name for d in load_meta(written / "sft.json").datasets}
    assert not any("steps" in d.name for d in load_meta(written / "pretrain.json").datasets)


@pytest.mark.parametrize("split", SPLITS)
def test_steps_are_digits(split: Split) -> None:
    for number in range(50):
        sample = steps.make(0, split, number)
        lines = split_steps(sample.questions[0][1])
        assert 2 <= len(lines) <= 4
        assert lines == list(sample.transcripts[0])


def test_checks_say_which_lines_are_right() -> None:
    said = []
    for number in range(50):
        digits_shown = [int(digit) for digit in steps.make(0, "train", number).transcripts[0]]
        for _, *turns in steps.make_checks(0, "train", number, digits_shown):
            lines = [turn["value"].splitlines()[-1] for turn in turns[::2]]
            answers = [turn["value"] for turn in turns[1::2]]
            assert len(lines) == len(digits_shown)
            for line, answer, digit in zip(lines, answers, digits_shown, strict=True):
                assert answer == ("+" if line == str(digit) else str(digit))
            said += answers
    assert 0.5 < said.count("+") / len(said) < 0.7


def test_the_tokenizer_spells_words_letter_by_letter(written: Path) -> None:
    tokenizer = Tokenizer.load(written / "tokenizer")
    for word in sources.words(0)["test"]:
        assert len(tokenizer.encode(word)) == len(word), word
    assert len(tokenizer.encode("7034")) == 4
    corpus = open_corpus(written / "text")
    assert int(corpus.map_tokens().max()) < tokenizer.vocab_size


def test_the_summary_counts_the_files(written: Path) -> None:
    tasks = json.loads((written / "summary.json").read_text())["tasks"]
    for dataset in load_meta(written / "test.json").datasets:
        lines = [json.loads(line) for line in dataset.annotation.read_text().splitlines()]
        answers = Counter(line["conversations"][-1]["value"] for line in lines)
        assert tasks[dataset.name]["num_test"] == len(lines)
        assert tasks[dataset.name]["constant_baseline"] == pytest.approx(max(answers.values()) / len(lines))
