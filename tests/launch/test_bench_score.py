"""``evovlm bench score``: every way scores alike, ideas are really off, and numbers are summed up as described."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.data.candidates import CandidateSet
from evovlm.engine.score_prompts import JudgedQuestion
from evovlm.engine.step_scores import Critic, open_critic
from evovlm.launch import bench_score
from evovlm.launch.bench_score import BATCH, BATCH_TILES, CACHED, ONE, ONE_HEAD, Settings, measure, run
from evovlm.launch.bench_score_ours import SWITCHES, Switches, _packs, render, switched_scores, timed_scores
from evovlm.launch.bench_score_peer import Peer, Way
from evovlm.launch.bench_score_task import Task, make_questions, write_critic

from .small_model import SMALL

# Weights drawn this far apart make judgements differ.
CRITIC = replace(SMALL, decoder=replace(SMALL.decoder, initializer_range=0.3))
TASK = Task(model=CRITIC, num_questions=3, num_candidates=3, shortest=8, longest=30, merges=400)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run beside each other."""
    monkeypatch.setattr(bench_score, "num_cores", lambda: 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    write_critic(folder, TASK)
    yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sets(folder: Path) -> list[CandidateSet]:
    return make_questions(folder / "images", TASK)


@pytest.fixture(scope="module")
def critic(folder: Path) -> Critic:
    return open_critic(folder / "critic")


@pytest.fixture(scope="module")
def questions(critic: Critic, sets: list[CandidateSet]) -> list[JudgedQuestion]:
    return render(critic, sets)


def close(found: list[list[float]], expected: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-5) for a, b in zip(found, expected, strict=True))


def test_questions_are_what_they_claim(sets: list[CandidateSet], folder: Path) -> None:
    again = make_questions(folder / "again", TASK)
    assert [made.candidates for made in sets] == [made.candidates for made in again]
    assert [made.name for made in sets] == ["q/0", "q/1", "q/2"]
    for made in sets:
        assert made.images
        assert len({candidate.text.split("\n\n")[0] for candidate in made.candidates}) == TASK.num_candidates
        for candidate in made.candidates:
            assert 2 <= len(candidate.text.split("\n\n")) <= 6


def test_every_way_scores_alike(
    folder: Path, critic: Critic, sets: list[CandidateSet], questions: list[JudgedQuestion]
) -> None:
    seconds, expected = timed_scores(critic, sets)
    assert seconds > 0
    assert len(expected) == 9
    flat = [score for scores in expected for score in scores]
    assert max(flat) - min(flat) > 1e-2
    for name, switches in SWITCHES.items():
        assert close(switched_scores(critic, questions, switches), expected), name
    peer = Peer(folder / "critic", critic.prompts.signs, questions)
    for way in (
        Way(all_rows=True),
        Way(),
        Way(2),
        Way(3, "tiles"),
        Way(2, "prefix"),
        Way(3, "prefix"),
        Way(3, "tiles", all_rows=True),
    ):
        assert close(peer.scores(way), expected), way


class Counting:
    """Counts tiles that are encoded, and rows that pass the LLM, by forward pass."""

    def __init__(self, critic: Critic, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles = 0
        self.rows: list[int] = []
        encode, decode = critic.model.encode, critic.model.decode

        def counted_encode(tiles: Any) -> Any:
            self.tiles += len(tiles)
            return encode(tiles)

        def counted_decode(tokens: Any, *more: Any) -> Any:
            self.rows.append(len(tokens))
            return decode(tokens, *more)

        monkeypatch.setattr(critic.model, "encode", counted_encode)
        monkeypatch.setattr(critic.model, "decode", counted_decode)


def test_ideas_are_really_off(critic: Critic, questions: list[JudgedQuestion], monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = sum(len(question.prefix.tiles) for question in questions)
    prefix = sum(len(question.prefix.tokens) for question in questions)
    rest = sum(len(branch) for question in questions for branch in question.branches)
    expected = {
        "evovlm": (tiles, prefix + rest, 1),
        "tiles for each candidate": (3 * tiles, prefix + rest, 1),
        "prefix for each candidate": (tiles, 3 * prefix + rest, 1),
        "one question in a pack": (tiles, prefix + rest, 3),
        "tiles and prefix for each": (3 * tiles, 3 * prefix + rest, 1),
        "and one candidate in a pack": (3 * tiles, 3 * prefix + rest, 9),
    }
    for name, switches in SWITCHES.items():
        with monkeypatch.context() as patch:
            counting = Counting(critic, patch)
            switched_scores(critic, questions, switches)
        assert (counting.tiles, sum(counting.rows), len(counting.rows)) == expected[name], name


def test_packs_keep_to_their_tokens(questions: list[JudgedQuestion]) -> None:
    longest = max(len(question.prefix.tokens) + sum(map(len, question.branches)) for question in questions)
    packs = _packs(questions, Switches(), longest)
    assert [part.number for parts in packs for part in parts] == [0, 1, 2]
    for parts in packs:
        sizes = [len(part.question.prefix.tokens) + sum(map(len, part.question.branches)) for part in parts]
        assert sum(sizes) <= longest


def test_numbers_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "score.json", TASK, Settings(repetitions=1, batches=(2, 9)))
    assert json.loads((tmp_path / "score.json").read_text()) == report
    assert report["bench"] == "score"
    results = report["results"]
    ours, theirs = results["ours"]["seconds"], results["transformers"]
    assert set(theirs) == {ONE, ONE_HEAD, BATCH, BATCH_TILES, CACHED}
    assert theirs[ONE]["batch"] == 1
    assert theirs[BATCH]["batch"] in (2, 3)  # no more than there are candidates
    fastest = min(theirs[ONE]["seconds"], theirs[ONE_HEAD]["seconds"])
    assert results["ratio_vs_transformers"] == pytest.approx(fastest / ours)
    assert results["ratio_vs_transformers_batched"] == pytest.approx(theirs[BATCH]["seconds"] / ours)
    assert results["ratio_vs_transformers_best"] == pytest.approx(min(w["seconds"] for w in theirs.values()) / ours)
    assert results["ours"]["candidates_per_second"] == pytest.approx(9 / ours)
    assert set(results["split"]) == set(SWITCHES)
    assert results["split"]["evovlm"]["gain"] == 1.0
    assert results["agreement"]["largest_difference"] <= 1e-4
    assert results["tiles"] >= 3
    printed = capsys.readouterr().out
    for name in ("evovlm", f"transformers, {CACHED}", "tiles for each candidate"):
        assert name in printed


def test_a_side_that_scores_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Peer.scores

    def off(self: Peer, way: Way) -> list[list[float]]:
        return [[score + 2e-4 * (way.once == "prefix") for score in one] for one in scores(self, way)]

    monkeypatch.setattr(Peer, "scores", off)
    with pytest.raises(RuntimeError, match=r"'transformers, tiles and prefix once, 2 at a time' differs .*0\.0002"):
        measure(replace(TASK, num_questions=1), Settings(repetitions=1, batches=(2,)))


def test_scores_that_could_not_differ_are_an_error() -> None:
    check = bench_score._Agreement([[0.5, 0.5005]])
    with pytest.raises(RuntimeError, match=r"all scores lie within 0\.0005"):
        check.check("x", [[0.5, 0.5005]])


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    from evovlm.launch import cli

    assert cli.main(["bench", "score", "--help"]) == 0
    assert "beside transformers on the same weights" in " ".join(capsys.readouterr().out.split())
