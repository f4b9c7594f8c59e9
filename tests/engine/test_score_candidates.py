"""Scored candidate files: the same for any number of ranks, after any cut, with every fault counted."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evovlm.data.candidates import Candidate, CandidateSet, StepScore, read_candidates, write_candidates
from evovlm.engine.score_candidates import ScoreSettings, score_candidates
from evovlm.engine.step_scores import GROUP, Critic, open_critic, reduction_of, split_solution
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .small_data import draw_shapes

COUNT = 2 * GROUP + 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate file of three groups, with faults: two lines that cannot be used, one image, three candidates."""
    folder = tmp_path_factory.mktemp("candidates")
    draw_shapes(folder, 4)
    sets = []
    for i in range(COUNT):
        texts = [f"So {j}.\n\nThen {i}.\n\nAnswer: {i + j}" for j in range(1 + i % 4)]
        images = (folder / f"{i % 4}.png",) if i % 3 else ()
        sets.append(CandidateSet(f"q/{i}", "Which?", images, tuple(Candidate(text) for text in texts), truth=str(i)))
    sets[7] = replace(sets[7], images=(folder / "none.png",))
    sets[20] = replace(sets[20], candidates=(Candidate(" "), Candidate("So."), Candidate("\n")))
    write_candidates(folder / "candidates.jsonl", sets)
    lines = (folder / "candidates.jsonl").read_text().splitlines(keepends=True)
    lines[3:3] = ["{\n"]
    lines[30:30] = [lines[0]]
    (folder / "candidates.jsonl").write_text("".join(lines))
    return folder / "candidates.jsonl"


class Fake:
    """Scores a step by its length; dies after a number of questions."""

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after = die_after
        self.seen: list[str] = []

    def score(self, sets: Iterable[CandidateSet]) -> Iterator[CandidateSet]:
        for made in list(sets):
            if len(self.seen) == self.die_after:
                raise KeyboardInterrupt
            self.seen.append(made.name)
            yield replace(made, candidates=tuple(self._candidate(one) for one in made.candidates))

    def _candidate(self, one: Candidate) -> Candidate:
        steps = split_solution(one.text, 12, outcome=False)
        if not steps:
            return replace(one, unscored="no steps: blank")
        return replace(one, steps=tuple(StepScore(step, 1 / len(step)) for step in steps), reward=0.0)


def settings_of(model: Path, **changes: Any) -> ScoreSettings:
    return ScoreSettings(model=str(model), system_prompt="Judge.", **changes)


def run(file: Path, out: Path, settings: ScoreSettings, critic: Any = None, num_ranks: int = 1) -> dict[str, Any]:
    """Score a file on forked ranks; what their critic has seen, or what rank 0 raised, comes back."""

    def job(world: World) -> tuple[dict[str, Any], list[str], BaseException | None]:
        torch.set_num_threads(1)
        opened = None if critic is None else lambda: critic
        try:
            summary = score_candidates(file, out, settings, world, open_with=opened)
        except (OSError, ValueError, KeyboardInterrupt) as error:
            return {}, critic.seen, error
        return summary, critic.seen if critic else [], None

    summary, seen, error = run_ranks(num_ranks, job)[0]
    if critic is not None:
        critic.seen = seen
    if error is not None:
        raise error
    return summary


def test_any_number_of_ranks_writes_the_same_file(file: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = settings_of(model_dir)
    summaries = [run(file, tmp_path / f"{ranks}.jsonl", settings, num_ranks=ranks) for ranks in (1, 2, 3)]
    texts = [(tmp_path / f"{ranks}.jsonl").read_text() for ranks in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2]
    assert summaries[0] == summaries[1] == summaries[2]
    made = list(read_candidates(tmp_path / "1.jsonl"))
    assert [one.name for one in made if isinstance(one, CandidateSet)] == [f"q/{i}" for i in range(COUNT)]
    critic = open_critic(model_dir, system_prompt="Judge.")
    wanted = list(critic.score(one for one in read_candidates(file) if isinstance(one, CandidateSet)))
    assert made == wanted


def test_faults_are_counted_and_listed(file: Path, model_dir: Path, tmp_path: Path) -> None:
    summary = run(file, tmp_path / "scored.jsonl", settings_of(model_dir))
    num = sum(1 + i % 4 for i in range(COUNT)) - 1 + 3  # number 20 had one candidate and has three
    assert (summary["questions"], summary["candidates"]) == (COUNT, num)
    assert summary["unscored"] == {"missing image": 4, "no steps": 2}
    assert summary["scored"] == num - 6
    assert summary["skipped"] == {"broken JSON": 1, "duplicate name": 1}
    assert [line.split("'")[1] for line in summary["skipped_lines"]] == ["candidates.jsonl/4", "candidates.jsonl/31"]
    assert 0 < summary["mean_reward"] < 1
    assert json.loads((tmp_path / "scored.jsonl.parts" / "summary.json").read_text()) == summary
    by_name = {one.name: one for one in read_candidates(tmp_path / "scored.jsonl") if isinstance(one, CandidateSet)}
    assert [one.unscored is None for one in by_name["q/20"].candidates] == [False, True, False]
    assert all(str(one.unscored).startswith("missing image: ") for one in by_name["q/7"].candidates)
    assert by_name["q/7"].truth == "7"


@pytest.mark.parametrize("die_after", [0, 5, GROUP, 2 * GROUP + 1])
def test_a_start_goes_on_where_the_last_one_ended(file: Path, model_dir: Path, tmp_path: Path, die_after: int) -> None:
    out, settings = tmp_path / "scored.jsonl", settings_of(model_dir)
    with pytest.raises(KeyboardInterrupt):
        run(file, out, settings, Fake(die_after))
    assert not out.exists()
    with (tmp_path / "scored.jsonl.parts" / "rank-00000.jsonl").open("a") as torn:
        torn.write('{"name": "q/1", "revision"')
    again = Fake()
    run(file, out, settings, again, num_ranks=1)
    # A group that was cut off is scored whole again, so that its packs are the same.
    assert again.seen == [f"q/{i}" for i in range(die_after // GROUP * GROUP, COUNT)]
    run(file, tmp_path / "whole.jsonl", settings, Fake())
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    for reduction in ("min", "last"):  # nothing is scored any more
        run(file, out, replace(settings, reduction=reduction), Fake(die_after=0))
        first = next(one for one in read_candidates(out) if isinstance(one, CandidateSet)).candidates[0]
        assert first.steps is not None
        assert first.reward == reduction_of(reduction)([step.score for step in first.steps])


def test_lines_that_changed_are_scored_again(file: Path, model_dir: Path, tmp_path: Path) -> None:
    copy, out, settings = tmp_path / "candidates.jsonl", tmp_path / "scored.jsonl", settings_of(model_dir)
    sets = [one for one in read_candidates(file) if isinstance(one, CandidateSet)]
    write_candidates(copy, sets)
    run(copy, out, settings, Fake())
    sets[GROUP + 1] = replace(sets[GROUP + 1], candidates=(Candidate("Another."),))
    write_candidates(copy, sets)
    again = Fake()
    run(copy, out, settings, again)
    assert again.seen == [f"q/{i}" for i in range(GROUP, 2 * GROUP)]
    (changed,) = [one for one in read_candidates(out) if isinstance(one, CandidateSet) and one.name == f"q/{GROUP + 1}"]
    assert [one.steps for one in changed.candidates] == [(StepScore("Another.", 1 / 8),)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcome": True}, "outcome = False, not True"),
        ({"max_steps": 3}, "max_steps = 12, not 3"),
        ({"max_tiles": 1}, "max_tiles = None, not 1"),
    ],
)
def test_scores_of_another_critic_are_not_mixed(
    file: Path, model_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(file, tmp_path / "scored.jsonl", settings_of(model_dir), Fake())
    with pytest.raises(ValueError, match=message):
        run(file, tmp_path / "scored.jsonl", settings_of(model_dir, **changes), Fake())


def test_scores_of_an_export_that_was_replaced_are_not_mixed(file: Path, model_dir: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(model_dir, export)
    run(file, tmp_path / "scored.jsonl", settings_of(export), Fake())
    weights = load_file(export / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, export / "model.safetensors")
    with pytest.raises(ValueError, match="made with fingerprint"):
        run(file, tmp_path / "scored.jsonl", settings_of(export), Fake())


def test_images_that_have_come_back_are_looked_at_again(file: Path, model_dir: Path, tmp_path: Path) -> None:
    """A reason that another start would find again stays; that an image is missing need not."""

    class Blind(Fake):
        reason = "missing image: not mounted"

        def score(self, sets: Any) -> Iterator[CandidateSet]:
            for made in super().score(sets):
                blind = made.name == f"q/{GROUP}"
                none = tuple(replace(one, steps=None, reward=None, unscored=self.reason) for one in made.candidates)
                yield replace(made, candidates=none) if blind else made

    out, settings = tmp_path / "scored.jsonl", settings_of(model_dir)
    assert run(file, out, settings, Blind())["unscored"]["missing image"] > 0
    seeing = Fake()
    assert "missing image" not in run(file, out, settings, seeing)["unscored"]
    assert seeing.seen == [f"q/{i}" for i in range(GROUP, min(2 * GROUP, COUNT))]  # its whole group
    again = Fake()
    run(file, out, settings, again)
    assert again.seen == []
    fresh = Blind()
    fresh.reason = "too long: really"
    run(file, tmp_path / "other.jsonl", settings, fresh)
    run(file, tmp_path / "other.jsonl", settings, again)
    assert again.seen == []


def test_files_that_cannot_be_scored_are_refused(model_dir: Path, tmp_path: Path) -> None:
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("\n")
    bad.write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match=r"empty.jsonl has no line that can be scored: the file is empty"):
        run(empty, tmp_path / "1.jsonl", settings_of(model_dir), Fake())
    with pytest.raises(ValueError, match=r"bad.jsonl has no line that can be scored: sample 'bad.jsonl/1'"):
        run(bad, tmp_path / "2.jsonl", settings_of(model_dir), Fake())
    with pytest.raises(ValueError, match="is the candidate file itself"):
        run(bad, bad, settings_of(model_dir), Fake())
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "none.jsonl", tmp_path / "3.jsonl", settings_of(model_dir), Fake())
    (tmp_path / "4.jsonl.parts").mkdir()
    (tmp_path / "4.jsonl.parts" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"4.jsonl.parts exists and is no folder of scores"):
        run(bad, tmp_path / "4.jsonl", settings_of(model_dir), Fake())
    with pytest.raises(ValueError, match="reduction 'max' is not one of"):
        settings_of(model_dir, reduction="max")
    with pytest.raises(ValueError, match="max_steps = 0 is below 1"):
        settings_of(model_dir, max_steps=0)


def test_progress_counts_this_ranks_questions(file: Path, model_dir: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def job(world: World) -> list[tuple[int, int]]:
        score_candidates(
            file,
            tmp_path / "scored.jsonl",
            settings_of(model_dir),
            world,
            report=lambda done, total: told.append((done, total)),
            open_with=lambda: Fake(),  # type: ignore[arg-type, return-value]
        )
        return told

    first, second = run_ranks(2, job)
    assert first == [(i, GROUP + 5) for i in range(GROUP + 6)]
    assert second == [(i, GROUP) for i in range(GROUP + 1)]
    assert isinstance(open_critic(model_dir), Critic)
