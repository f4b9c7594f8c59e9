"""Best-of-N with a scripted model and scripted critics: what is chosen, what is kept, and what is refused."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import parse_rules
from evovlm.data.candidates import Candidate, CandidateSet, StepScore, read_candidates, write_candidates
from evovlm.data.selection import Critic as CriticName
from evovlm.engine.best_of_n import best_of_n
from evovlm.engine.best_of_n_settings import BestOfNSettings
from evovlm.engine.generation import Request, Sampling, open_generator
from evovlm.engine.step_scores import GROUP, open_critic
from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.world import World

from .build_support import read, sums, write_meta
from .fake_generator import FakeGenerator

NUM = 4


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """``sums``: 20 questions of text; ``shapes``: 4 of pictures, at most 2 tiles."""
    return write_meta(tmp_path, sums(20), 4)


def reply(request: Request, number: int) -> str:
    """Answer sums n: wrong, right, wrong in the same way, cut off; after line 10 the third is right, too.

    Shapes: box, nothing, disc, disc.
    """
    dataset, line = request.name.split("/")
    if dataset == "shapes":
        return ("Answer: box", "no idea", "So.\n\nAnswer: disc", "Answer: Disc.")[number]
    third = line if int(line) > 10 else "0"
    return ("Answer: 0", f"So.\n\nAnswer: {line}", f"Thus.\n\nAnswer: {third}", f"Answer: {line}…")[number]


def worth(candidate: Candidate) -> float | None:
    """Of rewards: steps are worth more than none; "no idea" cannot be scored."""
    return None if candidate.text == "no idea" else 0.5 + 0.4 * (candidate.text[:3] in ("So.", "Thu"))


class FakeCritic:
    """Scores candidates by ``worth``; dies after a number of questions."""

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after, self.seen = die_after, list[str]()

    def score(self, sets: Iterable[CandidateSet]) -> Iterator[CandidateSet]:
        for made in sets:
            if len(self.seen) == self.die_after:
                raise KeyboardInterrupt
            self.seen.append(made.name)
            assert all(candidate.reward is None for candidate in made.candidates)
            yield replace(made, candidates=tuple(map(self._scored, made.candidates)))

    def _scored(self, candidate: Candidate) -> Candidate:
        reward = worth(candidate)
        if reward is None:
            return replace(candidate, unscored="blank: it has no steps")
        steps = (StepScore("a", reward - 0.1), StepScore("b", reward + 0.1))
        return replace(candidate, steps=steps, reward=reward)


def settings(*critics: CriticName, **changes: Any) -> BestOfNSettings:
    base: dict[str, Any] = {"sampling": Sampling(seed=5), "rules": parse_rules([]), "style": PromptStyle.MARKED}
    return BestOfNSettings(critics=critics or ("majority", "random"), **{**base, "num": NUM, **changes})


class Result:
    """What one start did.

    Attributes:
        summary: Of rank 0.
        asked: Questions that each rank's model answered.
        scored: Questions that each rank's critics scored, by (critic, tile cap).
    """

    def __init__(self, results: list[Any]) -> None:
        self.summary: dict[str, Any] = results[0][0]
        self.asked: list[list[str]] = [asked for _, asked, _ in results]
        self.scored: list[dict[Any, list[str]]] = [scored for _, _, scored in results]

    def accuracy(self, dataset: str, column: str) -> dict[str, float]:
        table = self.summary["datasets"][dataset]["n"]
        return {size: cells[column]["mean"] for size, cells in table.items()}


def measure(
    meta: Path,
    out: Path,
    wanted: BestOfNSettings,
    *,
    ranks: int = 1,
    generator: Callable[[], FakeGenerator] = lambda: FakeGenerator(reply),
    candidates: Path | None = None,
    models: dict[str, dict[str, Any]] | None = None,
    die_after: int | None = None,
) -> Result:
    """Measure on forked ranks."""

    def job(world: World) -> tuple[dict[str, Any], list[str], dict[Any, list[str]]]:
        fake, critics = generator(), dict[Any, FakeCritic]()
        summary = best_of_n(
            meta,
            out,
            wanted,
            world,
            open_generator=None if candidates else lambda _: fake,
            candidates=candidates,
            model="m",
            open_critic=lambda name, cap: critics.setdefault((name, cap), FakeCritic(die_after)),
            reward_models=models,
        )
        names = [request.name for request in fake.requests]
        return summary, names, {key: critic.seen for key, critic in critics.items()}

    return Result(run_ranks(ranks, job))


def outputs(out: Path) -> dict[str, bytes]:
    """All files that do not depend on who wrote what."""
    files = [*out.glob("*.json*"), *(out / "scores").glob("*.jsonl")]
    return {file.name: file.read_bytes() for file in files}


PRM = {"prm": {"model": "critic", "outcome": False}}


def test_accuracy_and_choices(meta: Path, tmp_path: Path) -> None:
    result = measure(meta, tmp_path / "out", settings("prm", "orm", "majority", "random"), models={**PRM, "orm": {}})
    # Lines 1 to 10: 0, n, 0 and nothing; lines 11 to 20: 0, n, n and nothing.
    assert result.accuracy("sums", "pass@1") == pytest.approx(dict.fromkeys("124", (10 * 0.25 + 10 * 0.5) / 20))
    assert result.accuracy("sums", "prm") == pytest.approx({"1": 0.375, "2": (10 * 3 + 10 * 5) / 6 / 20, "4": 1.0})
    assert result.accuracy("sums", "majority")["4"] == 0.5
    assert result.accuracy("sums", "oracle") == pytest.approx({"1": 0.375, "2": (10 * 3 + 10 * 5) / 6 / 20, "4": 1.0})
    assert result.accuracy("shapes", "majority")["4"] == 0.5  # of "disc", which is right every second time
    counts = result.summary["datasets"]["sums"]
    assert (counts["num_questions"], counts["num_candidates"]) == (20, 80)
    assert (counts["num_unreadable"], counts["num_cut_off"], counts["num_fewer"]) == (20, 20, 0)
    assert result.summary["datasets"]["shapes"]["unscored"] == {"orm: blank": 4, "prm: blank": 4}
    assert result.summary["overall"]["num_questions"] == 24
    overall = result.summary["overall"]["n"]["4"]
    assert overall["prm"]["mean"] == pytest.approx((20 + 2) / 24)
    assert overall["prm"]["gain"]["mean"] == pytest.approx(overall["prm"]["mean"] - overall["pass@1"]["mean"])
    assert overall["prm"]["low"] <= overall["prm"]["mean"] <= overall["prm"]["high"]
    chosen = read(tmp_path / "out" / "selected.jsonl")
    assert [line["name"] for line in chosen] == [f"sums/{i}" for i in range(1, 21)] + [
        f"shapes/{i}" for i in range(1, 5)
    ]
    assert chosen[0]["chosen"]["prm"] == {
        "candidate": 1, "text": "So.\n\nAnswer: 1", "answer": "1", "correct": True, "reward": 0.9,
    }  # fmt: skip
    assert chosen[0]["chosen"]["majority"] == {"candidate": 0, "text": "Answer: 0", "answer": "0", "correct": False}
    assert (chosen[0]["num_candidates"], chosen[0]["num_correct"], chosen[0]["answer_gt"]) == (4, 1, "1")
    assert result.summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert result.scored[0][("prm", 2)] == result.scored[0][("orm", 2)] == [f"shapes/{i}" for i in range(1, 5)]
    assert len(result.scored[0][("prm", None)]) == 20


def test_candidate_files_that_are_written(meta: Path, tmp_path: Path) -> None:
    measure(meta, tmp_path / "out", settings("prm"), models=PRM)
    (first, *_, last) = read_candidates(tmp_path / "out" / "candidates.jsonl")
    assert isinstance(first, CandidateSet)
    assert (first.name, first.question, first.truth, first.system, first.images) == ("sums/1", "0+1?", "1", None, ())
    assert first.candidates[1] == Candidate("So.\n\nAnswer: 1", True, len("So.\n\nAnswer: 1"), "1", 1.0)
    assert [candidate.finished for candidate in first.candidates] == [True, True, True, False]
    assert isinstance(last, CandidateSet)
    assert (last.system, last.images) == ("Read.", (tmp_path / "3.png",))
    (scored, *_) = read_candidates(tmp_path / "out" / "scores" / "prm.jsonl")
    assert isinstance(scored, CandidateSet)
    assert [candidate.reward for candidate in scored.candidates] == [0.5, 0.9, 0.9, 0.5]
    assert scored.candidates[1].steps == (StepScore("a", 0.8), StepScore("b", 1.0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_change_nothing(meta: Path, tmp_path: Path, ranks: int) -> None:
    measure(meta, tmp_path / "one", settings("prm", "majority"), models=PRM)
    many = measure(meta, tmp_path / "many", settings("prm", "majority"), models=PRM, ranks=ranks)
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")
    asked = [name for names in many.asked for name in names]
    assert len(asked) == len(set(asked)) == 24
    scored = [name for critics in many.scored for names in critics.values() for name in names]
    assert len(scored) == len(set(scored)) == 24
    assert {len(critics[("prm", None)]) for critics in many.scored if ("prm", None) in critics} == {GROUP, 20 - GROUP}


@pytest.mark.parametrize(("died_after", "ranks"), [(1, 1), (13, 2), (22, 3)])
def test_what_was_killed_while_candidates_were_made_goes_on(
    meta: Path, tmp_path: Path, died_after: int, ranks: int
) -> None:
    measure(meta, tmp_path / "whole", settings("prm"), models=PRM)
    out = tmp_path / "out"
    with pytest.raises(RankFailedError, match="KeyboardInterrupt"):
        measure(meta, out, settings("prm"), generator=lambda: FakeGenerator(reply, die_after=died_after), models=PRM)
    assert not (out / "candidates.jsonl").exists()
    file = out / "samples" / "rank-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-7])  # the last line was not written whole
    result = measure(meta, out, settings("prm"), models=PRM, ranks=ranks)
    assert sum(map(len, result.asked)) == 24 - died_after + 1
    assert outputs(out) == outputs(tmp_path / "whole")


@pytest.mark.parametrize(("died_after", "left"), [(0, 20 + 4), (3, 20 + 4), (GROUP, 4 + 4), (GROUP + 1, 4 + 4)])
def test_what_was_killed_while_candidates_were_scored_goes_on(
    meta: Path, tmp_path: Path, died_after: int, left: int
) -> None:
    measure(meta, tmp_path / "whole", settings("prm"), models=PRM)
    out = tmp_path / "out"
    with pytest.raises(RankFailedError, match="KeyboardInterrupt"):
        measure(meta, out, settings("prm"), models=PRM, die_after=died_after)
    assert (out / "candidates.jsonl").exists()
    assert not (out / "summary.json").exists()
    result = measure(meta, out, settings("prm"), models=PRM, ranks=2)
    assert result.asked == [[], []]
    scored = [name for critics in result.scored for names in critics.values() for name in names]
    assert len(scored) == left  # groups that were begun are scored whole
    assert outputs(out) == outputs(tmp_path / "whole")
    again = measure(meta, out, settings("prm"), models=PRM)
    assert (again.asked, again.scored) == ([[]], [{}])


def test_other_critics_rules_and_reductions_need_nothing_new(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = measure(meta, out, settings("prm"), models=PRM)
    for wanted in (settings("majority"), settings("prm-majority", "random", reduction="min")):
        again = measure(meta, out, wanted, models=PRM)
        assert (again.asked, again.scored) == ([[]], [{}])
    (scored, *_) = read_candidates(out / "scores" / "prm.jsonl")
    assert isinstance(scored, CandidateSet)
    assert [candidate.reward for candidate in scored.candidates] == pytest.approx([0.4, 0.8, 0.8, 0.4])
    assert first.accuracy("shapes", "pass@1")["4"] == (0.25 + 0.5) / 2
    strict = measure(meta, out, settings("prm", rules=parse_rules(["shapes=relaxed", "exact"])), models=PRM)
    assert strict.accuracy("shapes", "pass@1")["4"] == 0.25  # "Disc." is wrong by this rule
    assert strict.accuracy("sums", "pass@1") == first.accuracy("sums", "pass@1")
    other = measure(meta, out, settings("prm"), models={"prm": {"model": "another"}})
    assert sum(map(len, other.scored[0].values())) == 24
    assert other.asked == [[]]


def test_without_critics_there_are_candidates_and_the_oracle(meta: Path, tmp_path: Path) -> None:
    result = measure(meta, tmp_path / "out", replace(settings(), critics=()))
    assert set(result.summary["overall"]["n"]["4"]) == {"pass@1", "oracle"}
    assert len(read(tmp_path / "out" / "candidates.jsonl")) == 24
    # Scored apart, and read back: the same as in one go.
    written = tmp_path / "out" / "candidates.jsonl"
    critic = FakeCritic()
    lines = [line for line in read_candidates(written) if isinstance(line, CandidateSet)]
    write_candidates(tmp_path / "scored.jsonl", critic.score(lines))
    apart = measure(meta, tmp_path / "apart", settings("prm", "majority"), candidates=tmp_path / "scored.jsonl")
    whole = measure(meta, tmp_path / "whole", settings("prm", "majority"), models=PRM)
    assert apart.summary == whole.summary
    assert (apart.asked, apart.scored) == ([[]], [{}])
    fresh = measure(meta, tmp_path / "fresh", settings("prm", "majority"), candidates=written, models=PRM, ranks=2)
    assert fresh.summary == whole.summary
    on = measure(meta, tmp_path / "out", settings("prm", "majority"), models=PRM)
    assert (on.summary, on.asked) == (whole.summary, [[]])


def test_a_candidate_file_of_fewer_candidates(meta: Path, tmp_path: Path) -> None:
    measure(meta, tmp_path / "made", settings())
    lines = [line for line in read_candidates(tmp_path / "made" / "candidates.jsonl") if isinstance(line, CandidateSet)]
    lines[0] = replace(lines[0], candidates=lines[0].candidates[:2])
    write_candidates(tmp_path / "file.jsonl", lines[:-1])
    with (tmp_path / "file.jsonl").open("a") as file:
        file.write("{\n")
    out = tmp_path / "out"
    result = measure(meta, out, settings(num=32), candidates=tmp_path / "file.jsonl")
    assert list(result.summary["overall"]["n"]) == ["1", "2", "4"]
    overall = result.summary["overall"]
    assert (overall["num_fewer"], overall["num_questions"]) == (1, 23)
    assert overall["skipped"] == {"broken JSON": 1, "no candidates": 1}
    assert [line.partition(":")[0] for line in result.summary["left_out"]] == ["file.jsonl/24", "shapes/4"]
    size = (out / "samples" / "rank-00000.jsonl").stat().st_size
    assert measure(meta, out, settings(num=32), candidates=tmp_path / "file.jsonl", ranks=2).summary == result.summary
    assert (out / "samples" / "rank-00000.jsonl").stat().st_size == size
    less = measure(meta, out, settings(num=2), candidates=tmp_path / "file.jsonl")
    assert list(less.summary["overall"]["n"]) == ["1", "2"]
    assert less.summary["overall"]["num_candidates"] == 46


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sums/99"}, r"1 of its 24 names are no questions \(first: 'sums/99'\)"),
        ({"question": "5+5?"}, r"1 questions have another text \(first: 'sums/1': '5\+5\?' against '0\+1\?'\)"),
        ({"truth": "10"}, r"1 of 24 questions have another answer \(first: 'sums/1': '10' against '1'\)"),
    ],
)
def test_a_candidate_file_of_another_question_set(
    meta: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    measure(meta, tmp_path / "made", settings())
    lines = [line for line in read_candidates(tmp_path / "made" / "candidates.jsonl") if isinstance(line, CandidateSet)]
    write_candidates(tmp_path / "file.jsonl", [replace(lines[0], **change), *lines[1:]])
    with pytest.raises(RankFailedError, match=f"candidate file of another question set: {message}"):
        measure(meta, tmp_path / "out", settings(), candidates=tmp_path / "file.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_candidate_file_may_hold_questions_as_they_were_asked_or_written(meta: Path, tmp_path: Path) -> None:
    measure(meta, tmp_path / "made", settings())
    wanted = settings(style=PromptStyle.EN_V2)
    measure(meta, tmp_path / "asked", replace(wanted, critics=()))
    for made in ("made", "asked"):
        file = tmp_path / made / "candidates.jsonl"
        result = measure(meta, tmp_path / f"of {made}", wanted, candidates=file)
        assert result.summary["overall"]["num_questions"] == 24
        (first, *_) = read_candidates(tmp_path / f"of {made}" / "candidates.jsonl")
        assert isinstance(first, CandidateSet)
        assert first.question.startswith("0+1?\n\nSolve this")


@pytest.mark.parametrize(
    ("critics", "file", "message"),
    [
        (("prm",), False, "critic prm needs a reward model: name its folder with --critic-model"),
        (("prm-majority",), True, "has no rewards for critic prm: score it first"),
        (("prm", "orm"), True, "has no rewards for critic prm"),
    ],
)
def test_critics_without_rewards(
    meta: Path, tmp_path: Path, critics: tuple[CriticName, ...], file: bool, message: str
) -> None:
    measure(meta, tmp_path / "made", settings())
    candidates = tmp_path / "made" / "candidates.jsonl" if file else None
    with pytest.raises(RankFailedError, match=message):
        measure(meta, tmp_path / "out", settings(*critics), candidates=candidates)


def test_rewards_of_a_file_are_of_one_critic(meta: Path, tmp_path: Path) -> None:
    measure(meta, tmp_path / "made", settings("prm"), models=PRM)
    file = tmp_path / "made" / "scores" / "prm.jsonl"
    with pytest.raises(RankFailedError, match="are of one critic, not of prm and orm"):
        measure(meta, tmp_path / "out", settings("prm", "orm"), candidates=file)
    both = measure(meta, tmp_path / "out", settings("prm", "orm"), candidates=file, models={"orm": {"model": "o"}})
    assert both.accuracy("sums", "prm") == both.accuracy("sums", "orm")
    lines = [line for line in read_candidates(file) if isinstance(line, CandidateSet)]
    below = replace(lines[0].candidates[0], reward=-1.0)
    write_candidates(tmp_path / "below.jsonl", [replace(lines[0], candidates=(below,))])
    with pytest.raises(RankFailedError, match=r"'sums/1': a reward of -1\.0 is no weight of a vote"):
        measure(meta, tmp_path / "weighted", settings("prm-majority"), candidates=tmp_path / "below.jsonl")
    assert measure(meta, tmp_path / "plain", settings("prm"), candidates=tmp_path / "below.jsonl").summary


def test_questions_that_cannot_be_asked_are_counted(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").unlink()
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("{\n")
    refused = ["sums/3"]
    result = measure(
        meta, tmp_path / "out", settings("prm"), models=PRM, generator=lambda: FakeGenerator(reply, refuse=refused)
    )
    assert result.summary["datasets"]["sums"]["skipped"] == {"broken JSON": 1, "too long": 1}
    assert result.summary["datasets"]["shapes"]["skipped"] == {"missing image": 1}
    assert result.summary["overall"]["num_questions"] == 19 + 3
    assert [line.partition(":")[0] for line in result.summary["left_out"]] == ["sums/3", "sums/21", "shapes/2"]


def test_nothing_to_measure(meta: Path, tmp_path: Path) -> None:
    refused = [f"sums/{i}" for i in range(1, 3)]
    content = json.loads(meta.read_text())
    del content["shapes"]
    meta.write_text(json.dumps(content))
    with pytest.raises(RankFailedError, match=r"no question has candidates \(2 too long; first: sums/1: 9000 tokens"):
        measure(meta, tmp_path / "out", settings(limit=2), generator=lambda: FakeGenerator(reply, refuse=refused))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RankFailedError, match=r"empty\.jsonl holds no candidates"):
        measure(meta, tmp_path / "other", settings(), candidates=tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 8}, "made with num = 4, not 8: use another folder"),
        ({"sampling": Sampling(seed=6)}, "made with seed = 5, not 6: use another folder"),
        ({"style": PromptStyle.EN}, "made with prompt = 'marked', not 'en': use another folder"),
    ],
)
def test_candidates_of_other_settings_are_not_mixed_in(
    meta: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    measure(meta, tmp_path / "out", settings(limit=2))
    with pytest.raises(RankFailedError, match=message):
        measure(meta, tmp_path / "out", settings(limit=2, **change))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="best of 0"):
        settings(num=0)
    with pytest.raises(ValueError, match="temperature = 0 gives the same candidate 4 times"):
        settings(sampling=Sampling(temperature=0))
    with pytest.raises(ValueError, match="reduction 'median' is not one of mean, min, product, last"):
        settings(reduction="median")
    with pytest.raises(ValueError, match="once at most"):
        settings("prm", "prm")


def test_real_models_on_any_number_of_ranks(meta: Path, tmp_path: Path, model_dir: Path) -> None:
    wanted = settings("prm", "orm", "majority", sampling=Sampling(temperature=1.0, max_new_tokens=6, seed=1))
    wanted = replace(wanted, style=PromptStyle.DIRECT, system_prompt="Say.")

    def job(world: World, out: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        return best_of_n(
            meta,
            out,
            wanted,
            world,
            open_generator=lambda cap: open_generator(model_dir, max_tiles=cap),
            model="small",
            open_critic=lambda name, cap: open_critic(
                model_dir, system_prompt="Judge.", max_tiles=cap, outcome=name == "orm"
            ),
            reward_models={"prm": {}, "orm": {}},
        )

    summaries = [run_ranks(ranks, lambda world, out=tmp_path / str(ranks): job(world, out))[0] for ranks in (1, 2)]
    assert summaries[0] == summaries[1]
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2")
    assert summaries[0]["overall"]["num_candidates"] == 24 * NUM
    scored = [
        line for line in read_candidates(tmp_path / "1" / "scores" / "prm.jsonl") if isinstance(line, CandidateSet)
    ]
    rewards = {candidate.reward for made in scored for candidate in made.candidates}
    assert len(rewards) > NUM
