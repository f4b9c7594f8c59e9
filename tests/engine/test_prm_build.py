"""Process reward data from a scripted model: steps get the share of right rollouts, builds go on where they ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import parse_rules
from evovlm.data.index import Index
from evovlm.data.solution_steps import PRM_SYSTEM_PROMPT
from evovlm.engine.generation import Request, Sampling, open_generator
from evovlm.engine.prm_build import build_prm
from evovlm.engine.prm_settings import PrmSettings
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .build_support import Builder, read, sums, write_meta
from .fake_generator import FakeGenerator
from .small_data import draw_shapes, small_index

NUM_SUMS, NUM_SHAPES = 7, 4


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """``sums``: questions of text, number i asks for i plus one; ``shapes``: pictures, at most 2 tiles."""
    return write_meta(tmp_path, sums(NUM_SUMS, "Answer: {}"), NUM_SHAPES)


def reply(request: Request, number: int) -> str:
    """Solve sums in two steps and an answer, shapes in one; finish what was begun.

    Sums: right; wrong after "Oops."; the first once more; cut off in its third step. From "Start." half of the
    rollouts are right, from "So." all, from "Oops." none; from "Hm." one is right, one wrong, one says no answer, and
    one is cut off. Shapes: "box" each time, blank each fourth time.
    """
    dataset, rest = request.name.split("/")
    if dataset == "shapes":
        return " " if number == 3 else "Answer: box"
    right = int(rest.split("#")[0])  # lines count from 1, questions from 0
    if not request.prefix:
        solutions = (
            f"So.\n\nAnswer: {right}",
            f"Oops.\n\nAnswer: {right + 1}",
            f"So.\n\nAnswer: {right}",
            "Hm.\n\nand…",
        )
        return "Start.\n\n" + solutions[number % 4]
    last = request.prefix.removesuffix("\n\n").split("\n\n")[-1]
    good, bad = f"Answer: {right}", "Answer: -1"
    ends = {"Start.": (good, bad, good, bad), "So.": (good,), "Oops.": (bad,), "Hm.": (good, bad, "no idea", "and…")}
    return ends[last][number % len(ends[last])]


def settings(**changes: Any) -> PrmSettings:
    base: dict[str, Any] = {"sampling": Sampling(1.0, seed=5), "rules": parse_rules([]), "style": PromptStyle.MARKED}
    return PrmSettings(**{**base, "num_rollouts": 4, **changes})


build = Builder(build_prm, settings, reply)


def outputs(out: Path) -> dict[str, bytes]:
    files = [*out.glob("*.json*"), *out.glob("steps/*")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files if file.name != "settings.json"}


def shares(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(step["step"], step["num_mc_correct"], step["num_mc_total"]) for step in row["steps_with_score"]]


def test_each_step_gets_its_share_of_right_rollouts(meta: Path, tmp_path: Path) -> None:
    summary, _ = build(meta, tmp_path / "out")
    rows = read(tmp_path / "out" / "steps" / "sums.jsonl")
    assert len(rows) == 3 * NUM_SUMS
    assert [shares(row) for row in rows[3:6]] == [
        [("Start.", 2, 4), ("So.", 4, 4), ("Answer: 2", 1, 1)],
        [("Start.", 2, 4), ("Oops.", 0, 4), ("Answer: 3", 0, 1)],
        [("Start.", 2, 4), ("Hm.", 1, 4)],
    ]
    assert rows[5] == {
        "image": [],
        "question": "1+1?",
        "question_orig": "1+1?",
        "answer": "Answer: 2",
        "response": "Start.\n\nHm.",
        "steps_with_score": [
            {"step": "Start.", "score": 0.5, "num_mc_correct": 2, "num_mc_total": 4},
            {"step": "Hm.", "score": 0.25, "num_mc_correct": 1, "num_mc_total": 4},
        ],
        "num_mc_sequences": 4,
        "source": "sums/2#3",
    }
    shape = read(tmp_path / "out" / "steps" / "shapes.jsonl")[0]
    assert shape["image"] == str(tmp_path / "0.png")
    assert shares(shape) == [("Answer: box", 1, 1)]
    counts = summary["datasets"]["sums"]
    assert (counts["questions"], counts["solutions"], counts["correct"], counts["cut_off"]) == (7, 28, 14, 7)
    assert counts["rollouts"] == NUM_SUMS * 4 * 4
    assert counts["left_out"] == {"duplicates": NUM_SUMS}
    assert summary["datasets"]["shapes"]["left_out"] == {"duplicates": 2 * NUM_SHAPES, "no steps": NUM_SHAPES}
    assert [(row["step"], row["steps"], row["good"]) for row in counts["by_step"]] == [
        (1, 21, 21),
        (2, 21, 14),
        (3, 14, 7),
    ]
    assert (counts["steps"], counts["good"], counts["share_good"]) == (56, 42, 0.75)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_what_is_rolled_out(meta: Path, tmp_path: Path) -> None:
    _, (requests,) = build(meta, tmp_path / "out", settings(system_prompt="Look.", limit=2))
    asked = [request for request in requests if request.name.startswith("sums/2")]
    assert [(request.name, request.prefix, request.num) for request in asked] == [
        ("sums/2", "", 4),
        ("sums/2#0.1", "Start.\n\n", 4),  # of a solution one after the other: they share a prefill
        ("sums/2#0.2", "Start.\n\nSo.\n\n", 4),
        ("sums/2#1.2", "Start.\n\nOops.\n\n", 4),
        ("sums/2#3.2", "Start.\n\nHm.\n\n", 4),
    ]
    turns = ({"from": "system", "value": "Look."}, {"from": "human", "value": "1+1?"})
    assert all(request.turns == turns for request in asked)
    (shape, *others) = [request for request in requests if request.name.startswith("shapes/1")]
    assert others == []  # the only step is the last one
    assert shape.turns[0] == {"from": "system", "value": "Read."}


def test_conversations_are_ready_for_training(meta: Path, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    summary, _ = build(meta, tmp_path / "out")
    lines = read(tmp_path / "out" / "sums.jsonl")
    turns = lines[4]["conversations"]
    assert lines[4]["id"] == "sums/2#1"
    assert [turn["value"] for turn in turns] == [
        PRM_SYSTEM_PROMPT, "### Question:\n1+1?\n\n### Solution Process:\nStart.", "+", "Oops.", "-", "Answer: 3", "-"
    ]  # fmt: skip
    shape = read(tmp_path / "out" / "shapes.jsonl")[0]
    assert shape["image"] == "0.png"
    assert shape["conversations"][1]["value"].startswith("### Question:\n<image>\nWhich shape?")
    report = small_index(tmp_path / "out" / "meta.json", tiny_tokenizer_dir, tmp_path / "index")
    index = Index.open(report.path)
    assert {info.name: info.count for info in index.meta.datasets} == summary["sets"] == {"sums": 21, "shapes": 4}
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["shapes"]["max_dynamic_patch"] == 2


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("early_stop", [False, True])
def test_ranks_change_nothing(meta: Path, tmp_path: Path, ranks: int, early_stop: bool) -> None:
    _, (alone,) = build(meta, tmp_path / "one", settings(early_stop=early_stop))
    _, shared = build(meta, tmp_path / "many", settings(early_stop=early_stop), ranks=ranks)
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")
    names = [request.name for share in shared for request in share]
    assert sorted(names) == sorted(request.name for request in alone)
    assert all(shared)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("died_after", "ranks"), [(1, 1), (9, 2), (20, 3), (38, 1)])
def test_a_killed_build_goes_on(meta: Path, tmp_path: Path, died_after: int, ranks: int, early_stop: bool) -> None:
    wanted = settings(early_stop=early_stop)
    _, (whole,) = build(meta, tmp_path / "whole", wanted)
    assert len(whole) == NUM_SUMS * 5 + NUM_SHAPES
    out = tmp_path / "killed"
    with pytest.raises(Exception, match="KeyboardInterrupt"):
        build(meta, out, wanted, generator=lambda: FakeGenerator(reply, die_after=died_after))
    assert not (out / "meta.json").exists()
    for file in out.glob("*/rank-00000.jsonl"):
        file.write_bytes(file.read_bytes()[:-7])  # and the last line was not written whole
    _, requests = build(meta, out, wanted, ranks=ranks)
    assert outputs(out) == outputs(tmp_path / "whole")
    lost = 2 * (5 + 4)  # at most a torn line of each store, and the answers read ahead
    assert sum(map(len, requests)) <= len(whole) - died_after + lost
    _, requests = build(meta, out, wanted, ranks=ranks)
    assert sum(map(len, requests)) == 0


def hopeless(request: Request, number: int) -> str:
    """As ``reply``, but nothing good comes of "Start." in even sums."""
    line = request.name.split("/")[1].split("#")[0]
    if request.name.startswith("sums") and request.prefix == "Start.\n\n" and int(line) % 2 == 0:
        return "Answer: -1"
    return reply(request, number)


def test_early_stop_rolls_out_less(meta: Path, tmp_path: Path) -> None:
    full, (all_requests,) = build(meta, tmp_path / "full", generator=lambda: FakeGenerator(hopeless))
    wanted = settings(early_stop=True)
    early, (requests,) = build(meta, tmp_path / "early", wanted, generator=lambda: FakeGenerator(hopeless))
    assert len(all_requests) - len(requests) == 3 * (NUM_SUMS // 2)
    rows = {row["source"]: row for row in read(tmp_path / "early" / "steps" / "sums.jsonl")}
    assert shares(rows["sums/2#0"]) == [("Start.", 0, 4), ("So.", 0, 0), ("Answer: 2", 0, 0)]
    assert shares(rows["sums/1#0"]) == [("Start.", 2, 4), ("So.", 4, 4), ("Answer: 1", 1, 1)]
    assert shares(rows["sums/1#1"]) == [("Start.", 2, 4), ("Oops.", 0, 4), ("Answer: 2", 0, 0)]
    # Full rollouts serve early stop; the other way round, what lacks is made.
    again, (requests,) = build(meta, tmp_path / "full", wanted, generator=lambda: FakeGenerator(hopeless))
    assert requests == []
    assert again["good"] == early["good"] < full["good"]
    assert outputs(tmp_path / "full")["steps/sums.jsonl"] == outputs(tmp_path / "early")["steps/sums.jsonl"]
    late, (requests,) = build(meta, tmp_path / "early", generator=lambda: FakeGenerator(hopeless))
    assert len(requests) == 3 * (NUM_SUMS // 2)
    assert late == full
    assert early["rollouts"] < late["rollouts"]


def test_other_labels_need_no_model(meta: Path, tmp_path: Path) -> None:
    first, _ = build(meta, tmp_path / "out")
    wanted = settings(mc_threshold=0.5, until_first_error=True, prm_system_prompt=None, num_rollouts=16)
    summary, _ = build(meta, tmp_path / "out", wanted, reuse=True, ranks=2)
    assert {row["num_mc_sequences"] for row in read(tmp_path / "out" / "steps" / "sums.jsonl")} == {4}
    turns = read(tmp_path / "out" / "sums.jsonl")[0]["conversations"]
    assert [turn["value"] for turn in turns[1:]] == ["-"]
    assert summary["datasets"]["sums"]["by_step"] == [{"step": 1, "steps": 21, "good": 0, "share_good": 0.0}]
    back, _ = build(meta, tmp_path / "out", reuse=True)
    assert back == first


def test_an_outcome_reward_model_sees_whole_solutions(meta: Path, tmp_path: Path) -> None:
    summary, (requests,) = build(meta, tmp_path / "out", settings(outcome=True))
    assert len(requests) == NUM_SUMS + NUM_SHAPES  # nothing is rolled out
    assert summary["method"] == "outcome"
    rows = read(tmp_path / "out" / "steps" / "sums.jsonl")
    assert [shares(row) for row in rows[:3]] == [
        [("Start.\n\nSo.\n\nAnswer: 1", 1, 1)],
        [("Start.\n\nOops.\n\nAnswer: 2", 0, 1)],
        [("Start.\n\nHm.\n\nand", 0, 1)],
    ]
    assert summary["datasets"]["sums"]["by_step"] == [{"step": 1, "steps": 21, "good": 7, "share_good": 7 / 21}]
    build(meta, tmp_path / "prm")
    build(meta, tmp_path / "prm", settings(outcome=True), reuse=True)
    assert outputs(tmp_path / "prm") == outputs(tmp_path / "out")


def test_other_rules_judge_the_answers_again(meta: Path, tmp_path: Path) -> None:
    first, _ = build(meta, tmp_path / "out")
    store = tmp_path / "out" / "rollouts" / "rank-00000.jsonl"
    size = store.stat().st_size
    build(meta, tmp_path / "out", reuse=True)
    assert store.stat().st_size == size  # the verdicts are the same: nothing is written again
    loose = settings(rules=parse_rules(["numeric:0.999", "shapes=exact"]))  # one more is right now, minus one never
    second, _ = build(meta, tmp_path / "out", loose, reuse=True, ranks=2)
    assert second["datasets"]["sums"]["correct"] > first["datasets"]["sums"]["correct"]
    assert second["datasets"]["shapes"] == first["datasets"]["shapes"]
    third, _ = build(meta, tmp_path / "out", reuse=True)
    assert third == first


def test_rollouts_that_were_never_made_are_counted(meta: Path, tmp_path: Path) -> None:
    build(meta, tmp_path / "out", settings(outcome=True))
    summary, _ = build(meta, tmp_path / "out", reuse=True)
    assert summary["datasets"]["sums"]["left_out"] == {"duplicates": 7, "not rolled out": 21}
    assert summary["sets"] == {"shapes": 4}


def test_questions_that_cannot_be_asked_are_counted(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("{broken\n")
    refused = {"sums/3", "sums/5#0.2", "sums/7#3.2"}  # a question, rollouts in the middle, and the last of all
    summary, (requests,) = build(meta, tmp_path / "out", generator=lambda: FakeGenerator(reply, refuse=refused))
    assert summary["datasets"]["sums"]["skipped"] == {"broken JSON": 1, "too long": 3}
    assert summary["datasets"]["shapes"]["skipped"] == {"missing image": 1}
    assert summary["sets"] == {"sums": 3 * 4, "shapes": 3}
    draw_shapes(tmp_path, NUM_SHAPES)  # what could not be asked is tried again
    summary, (requests,) = build(meta, tmp_path / "out")
    assert summary["skipped"] == {"broken JSON": 1}
    assert {request.name.split("#")[0] for request in requests} == {"sums/3", "sums/5", "sums/7", "shapes/4"}
    build(meta, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def candidates(file: Path, **changed: str) -> Path:
    """A candidate file of the sums, as ``reply`` solves them, and of a shape."""
    lines = []
    for line in range(1, NUM_SUMS + 1):
        turns = ({"from": "human", "value": "?"},)
        said = [reply(Request(f"sums/{line}", turns), number) for number in range(5)]
        texts = [{"text": text.removesuffix("…"), "finished": not text.endswith("…")} for text in said]
        lines.append({"name": f"sums/{line}", "question": f"{line - 1}+1?", "candidates": texts, **changed})
    shape = {
        "name": "shapes/1",
        "question": "Which shape?",
        "image": ["0.png"],
        "candidates": [{"text": "Answer: disc"}],
    }
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, shape]))
    return file


def test_solutions_of_a_candidate_file_are_labelled(meta: Path, tmp_path: Path) -> None:
    wanted = settings(solutions=candidates(tmp_path / "candidates.jsonl"))
    summary, (requests,) = build(meta, tmp_path / "out", wanted)
    assert all(request.prefix for request in requests)
    assert summary["datasets"]["sums"]["solutions"] == 5 * NUM_SUMS
    assert summary["datasets"]["shapes"]["skipped"] == {"no candidates": NUM_SHAPES - 1}
    build(meta, tmp_path / "sampled")
    made = [outputs(tmp_path / name)["steps/sums.jsonl"] for name in ("out", "sampled")]
    assert made[0] == made[1]  # the fifth one equals the first one
    build(meta, tmp_path / "shared", wanted, ranks=3)
    assert outputs(tmp_path / "shared") == outputs(tmp_path / "out")
    few, _ = build(meta, tmp_path / "few", settings(solutions=wanted.solutions, num_solutions=2))
    assert few["datasets"]["sums"]["solutions"] == 2 * NUM_SUMS


def test_lines_of_a_candidate_file_that_cannot_be_used_are_listed(meta: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path / "candidates.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(["{broken", *lines[1:], '{"name": "sums/1", "question": "0+1?"}']) + "\n")
    summary, _ = build(meta, tmp_path / "out", settings(solutions=file))
    assert summary["unusable_lines"]["count"] == 2
    assert "candidates.jsonl/1" in summary["unusable_lines"]["first"][0]
    assert summary["datasets"]["sums"]["skipped"] == {"no candidates": 1}


def test_a_candidate_file_of_other_questions_is_refused(meta: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path / "candidates.jsonl", question="2+2?")
    with pytest.raises(Exception, match="candidate file of another question set: 7 questions have another text"):
        build(meta, tmp_path / "out", settings(solutions=file))
    assert not (tmp_path / "out").exists()


def test_changed_solutions_do_not_get_old_rollouts(meta: Path, tmp_path: Path) -> None:
    file = candidates(tmp_path / "candidates.jsonl")
    build(meta, tmp_path / "out", settings(solutions=file))
    file.write_text(file.read_text().replace("Oops.", "Well."))
    with pytest.raises(Exception, match="question 'sums/1': the rollouts are of other solutions"):
        build(meta, tmp_path / "out", settings(solutions=file))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_rollouts": 5}, "made with num_rollouts = 4, not 5"),
        ({"max_steps": 3}, "made with max_steps = 16, not 3"),
        ({"sampling": Sampling(0.5, seed=5)}, "made with temperature = 1.0, not 0.5"),
    ],
)
def test_samples_of_other_settings_are_not_mixed_in(
    meta: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    build(meta, tmp_path / "out", settings(limit=2))
    with pytest.raises(Exception, match=f"{message}: use another folder"):
        build(meta, tmp_path / "out", settings(**changed))
    with pytest.raises(Exception, match="exists and is no folder of process reward data"):
        build(meta, tmp_path)


def test_nothing_to_label_is_an_error(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Exception, match=r"no solution of 44 to 11 questions has a step .*\(44 cut off in the first step\)"
    ):
        build(meta, tmp_path / "out", generator=lambda: FakeGenerator(lambda *_: "and…"))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cut_off"] == 44


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_solutions": 0}, "num_solutions = 0 is below 1"),
        ({"num_rollouts": 0}, "num_rollouts = 0 is below 1"),
        ({"mc_threshold": 1.0}, r"mc_threshold = 1.0 is not in \[0, 1\)"),
        ({"sampling": Sampling(0)}, "temperature = 0 gives the same solution 4 times"),
        ({"sampling": Sampling(0), "num_solutions": 1}, "temperature = 0 gives the same rollout 4 times"),
        ({"outcome": True, "early_stop": True}, "an outcome reward model judges whole solutions"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_missing_candidate_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no candidate file"):
        settings(solutions=tmp_path / "none.jsonl")


def test_a_real_model(meta: Path, tmp_path: Path, model_dir: Path) -> None:
    file = candidates(tmp_path / "candidates.jsonl")
    wanted = settings(solutions=file, sampling=Sampling(1.0, 0, max_new_tokens=4, seed=2), num_rollouts=3)

    def job(world: World, out: Path) -> dict[str, Any]:
        return build_prm(meta, out, wanted, world, lambda cap: open_generator(model_dir, max_tiles=cap), model="m")

    (one,) = run_ranks(1, lambda world: job(world, tmp_path / "one"))
    two = run_ranks(2, lambda world: job(world, tmp_path / "two"))
    assert two[0] == one
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
    assert one["rollouts"] == NUM_SUMS * 4 * 3
    answered = [
        entry for line in read(tmp_path / "one" / "rollouts" / "rank-00000.jsonl") for entry in line["rollouts"]
    ]
    assert {entry["cut_off"] + entry["unreadable"] + sum(n for _, n, _ in entry["answers"]) for entry in answered} == {
        3
    }
