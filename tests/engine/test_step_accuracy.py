"""Step accuracy of a critic: pooled over solutions, by source, the same on any number of ranks."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.engine.step_accuracy import step_accuracy
from evovlm.engine.step_scores import Critic, open_critic
from evovlm.parallel.fork import RankFailedError, run_ranks

from .small_data import draw_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions of rollouts and of people, two to a question here and there, with and without images."""
    folder = tmp_path_factory.mktemp("steps")
    draw_shapes(folder, 4)
    steps = [["There are 3 boxes.", "Answer: 3"], ["There are 4 boxes.", "Or 3.", "Answer: 4"], ["Answer: 3"]]
    shares = [[1.0, 0.5], [0.25, 0.0, 0.0], [1.0]]
    rollouts = [
        {
            "image": f"{question}.png" if question else [],
            "question": f"How many in {question}?",
            "steps_with_score": [{"step": a, "score": b} for a, b in zip(steps[i], shares[i], strict=True)],
        }
        for question in range(4)
        for i in range(1 + question % 3)
    ]
    people = [
        {
            "image": [f"{i}.png"],
            "question": "What is it?",
            "data_source": ("easy", "hard")[i % 2],
            "response": {"steps": steps[1], "process_correctness": [1, 0, (-1, 1)[i % 2]]},
        }
        for i in range(3)
    ]
    broken = [people[0] | {"image": "none.png"}, people[0] | {"question": "<image> <image>"}, {"question": "?"}]
    for name, rows in {"shapes": rollouts, "people": people, "broken": [*broken, people[0]]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def open_small(model_dir: Path) -> Callable[[], Critic]:
    return partial(open_critic, model_dir, dtype=torch.float64)


def test_counts_are_those_of_each_solution_alone(folder: Path, open_small: Callable[[], Critic]) -> None:
    files = [folder / "shapes.jsonl", folder / "people.jsonl"]
    critic = open_small()
    scores: list[float] = []
    labels: list[bool] = []
    for line in (folder / "shapes.jsonl").read_text().splitlines():
        row = json.loads(line)
        images = [folder / row["image"]] if row["image"] else []
        steps = [step["step"] for step in row["steps_with_score"]]
        scores += critic.step_scores(row["question"], images, [steps])[0].tolist()
        labels += [step["score"] > 0.3 for step in row["steps_with_score"]]
    threshold = sorted(scores)[len(scores) // 2]
    (found,) = run_ranks(
        1, lambda world: step_accuracy(files, open_small, world, threshold=threshold, mc_threshold=0.3)
    )
    shapes = found["sources"]["shapes"]
    assert (shapes["solutions"], shapes["steps"], shapes["neutral"]) == (7, len(scores), 0)
    right = sum((score > threshold) == label for score, label in zip(scores, labels, strict=True))
    assert shapes["accuracy"] == pytest.approx(right / len(scores))
    assert shapes["classes"]["+"]["count"] == sum(labels)
    assert shapes["best_constant"]["accuracy"] == max(sum(labels), len(labels) - sum(labels)) / len(labels)
    assert (found["sources"]["easy"]["steps"], found["sources"]["easy"]["neutral"]) == (4, 2)
    assert (found["sources"]["hard"]["steps"], found["sources"]["hard"]["neutral"]) == (2, 1)
    assert found["sources"]["hard"]["auc"] is None
    assert found["overall"]["steps"] == len(scores) + 6
    assert found["skipped_lines"] == []


def test_ranks_share_the_questions(folder: Path, open_small: Callable[[], Critic]) -> None:
    files = [folder / "shapes.jsonl", folder / "broken.jsonl"]

    def measure(world: Any) -> dict[str, Any]:
        return step_accuracy(files, open_small, world, threshold=0.5)

    (one,) = run_ranks(1, measure)
    two = run_ranks(2, measure)
    assert two[0] == two[1]
    three = run_ranks(9, measure)[8]  # more ranks than questions
    for found in (two[0], three):
        assert found["overall"] == {**one["overall"], "auc": found["overall"]["auc"]}
        assert found["overall"]["auc"] == pytest.approx(one["overall"]["auc"], abs=1e-12)
        assert sorted(found["skipped_lines"]) == sorted(one["skipped_lines"])


def test_steps_behind_a_wrong_one_do_not_count_if_so_asked(folder: Path, open_small: Callable[[], Critic]) -> None:
    def measure(world: Any, file: str, until_first_error: bool) -> dict[str, Any]:
        found = step_accuracy(
            [folder / file],
            open_small,
            world,
            threshold=1e-9,
            mc_threshold=0.3,
            until_first_error=until_first_error,
        )
        return dict(found["overall"])

    # Shares (1, 0.5), (0.25, 0, 0) and (1,): 4, 2 and 1 times; of the second only its first, wrong, step counts.
    every, some = (run_ranks(1, lambda world, u=u: measure(world, "shapes.jsonl", u))[0] for u in (False, True))
    assert (every["steps"], every["after_error"], every["accuracy"]) == (15, 0, pytest.approx(9 / 15))
    assert (some["steps"], some["after_error"], some["accuracy"]) == (11, 4, pytest.approx(9 / 11))
    # Labels (1, 0, 1), (1, 0, -1), (1, 0, 1): the neutral step is no error.
    (people,) = run_ranks(1, lambda world: measure(world, "people.jsonl", True))
    assert (people["steps"], people["neutral"], people["after_error"]) == (6, 3, 0)


def test_lines_that_cannot_be_used_are_listed(folder: Path, open_small: Callable[[], Critic]) -> None:
    (found,) = run_ranks(1, lambda world: step_accuracy([folder / "broken.jsonl"], open_small, world))
    assert found["overall"]["skipped"] == {"image count": 1, "missing image": 1, "missing keys": 1}
    assert found["overall"]["solutions"] == 1
    listed = "\n".join(found["skipped_lines"])
    for name in ("broken.jsonl/1", "broken.jsonl/2", "broken.jsonl/3"):
        assert name in listed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "none of 0 lines is a labelled solution"),
        ([{"question": "?"}], "none of 1 lines .* neither 'steps_with_score'"),
        (
            [{"question": "?", "response": {"steps": ["a"], "process_correctness": [0]}}],
            "no labelled step could be judged .1 neutral",
        ),
        (
            [{"question": "?", "image": "none.png", "steps_with_score": [{"step": "a", "score": 1}]}],
            "no labelled step .*1 missing image; first: x.jsonl/1",
        ),
    ],
)
def test_nothing_to_measure(tmp_path: Path, open_small: Callable[[], Critic], rows: list[Any], message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RankFailedError, match=message):
        run_ranks(1, lambda world: step_accuracy([file], open_small, world))


def test_thresholds_are_reported(folder: Path, open_small: Callable[[], Critic]) -> None:
    (found,) = run_ranks(1, lambda world: step_accuracy([folder / "people.jsonl"], open_small, world))
    assert (found["threshold"], found["mc_threshold"]) == (0.85, 0.0)
    assert math.isfinite(found["overall"]["macro_f1"])
