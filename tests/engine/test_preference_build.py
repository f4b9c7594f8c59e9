"""Preference data from a scripted model: questions are shared out, runs go on where they ended, nothing gets lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import parse_rules
from evovlm.data.index import Index
from evovlm.engine.generation import Request, Sampling
from evovlm.engine.preference_build import build_preferences
from evovlm.engine.preference_settings import BuildSettings
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .build_support import Builder, read, sums, write_meta
from .fake_generator import FakeGenerator
from .small_data import conversation, draw_shapes, small_index


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """``sums``: 9 questions of text; ``shapes``: 6 of pictures, at most 2 tiles, whose lines have a system turn."""
    return write_meta(tmp_path, sums(9), 6)


def reply(request: Request, number: int) -> str:
    """Answer sums, then boxes.

    Sums n: n, then a wrong number that n stands in, then a wrong one, then n with a point; the first one is always
    answered rightly, the last one never. Shapes: a box, a disc, nothing, a reply that is cut off.
    """
    dataset, line = request.name.split("/")
    if dataset == "shapes":
        return ("Box", "disc", " ", "a box that is…")[number % 4]
    right = "no idea" if line == "9" else line  # lines count from 1, questions from 0
    return right if line == "1" else (right, f"1{right}", "wrong", f"{right}.0")[number % 4]


def settings(**changes: Any) -> BuildSettings:
    base: dict[str, Any] = {"method": "correctness", "sampling": Sampling(seed=5), "rules": parse_rules([])}
    return BuildSettings(**{**base, "num_samples": 4, **changes})


build = Builder(build_preferences, settings, reply)


def outputs(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file() and file.name != "settings.json"}


def test_pairs_of_right_and_wrong_answers(meta: Path, tmp_path: Path) -> None:
    summary, (requests,) = build(meta, tmp_path / "out")
    assert len(requests) == 15
    assert {request.num for request in requests} == {4}
    pairs = read(tmp_path / "out" / "sums.jsonl")
    assert [(p["question"], p["chosen"], p["rejected"]) for p in pairs] == [
        (f"{i}+1?", str(i + 1), "wrong") for i in range(1, 8)
    ]
    assert pairs[0] == {
        "id": "1", "question": "1+1?", "chosen": "2", "rejected": "wrong", "answer_gt": "2", "source": "sums/2",
    }  # fmt: skip
    counts = summary["datasets"]["sums"]
    assert (counts["questions"], counts["samples"], counts["correct"]) == (9, 36, 4 + 7)
    assert (counts["all_correct"], counts["all_wrong"], counts["pairs"]) == (1, 1, 7)
    assert counts["share_correct"] == pytest.approx(11 / 36)
    assert counts["left_out"] == {"right answer inside the wrong one": 14}
    assert summary["sets"] == {"sums": 7, "shapes": 6, "shapes_format_rules": 6}
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_replies_that_were_cut_off_are_a_set_of_their_own(meta: Path, tmp_path: Path) -> None:
    summary, _ = build(meta, tmp_path / "out")
    shapes = read(tmp_path / "out" / "shapes.jsonl")
    assert {(p["chosen"], p["rejected"]) for p in shapes} == {("Box", "disc"), ("disc", "Box")}
    assert shapes[0]["image"] == "0.png"
    assert shapes[0]["question"] == "<image>\nWhich shape?"
    assert shapes[0]["system"] == "Read."
    # A cut-off reply is rejected for its form; an empty one, which no pair can hold, only counts as unreadable.
    unreadable = read(tmp_path / "out" / "shapes_format_rules.jsonl")
    assert {(p["answer_gt"], p["chosen"], p["rejected"]) for p in unreadable} == {
        ("box", "Box", "a box that is"), ("disc", "disc", "a box that is"),
    }  # fmt: skip
    assert len(unreadable) == 6
    counts = summary["datasets"]["shapes"]
    assert (counts["cut_off"], counts["unreadable"], counts["pairs"]) == (6, 12, 6)


def test_what_is_asked(meta: Path, tmp_path: Path) -> None:
    wanted = settings(system_prompt="Look.", style=PromptStyle.EN_V2, limit=2)
    with pytest.raises(
        Exception, match="no pair from 16 answers to 4 questions: 0 questions have correct answers only"
    ):
        build(meta, tmp_path / "out", wanted)  # nothing here is said in the form that is asked for
    with pytest.raises(Exception, match="16 answers"):
        build(meta, tmp_path / "out", wanted, reuse=True)
    _, (requests,) = build(meta, tmp_path / "direct", settings(system_prompt="Look.", limit=2))
    by_name = {request.name: request for request in requests}
    assert set(by_name) == {"sums/1", "sums/2", "shapes/1", "shapes/2"}
    assert by_name["sums/2"].turns == ({"from": "system", "value": "Look."}, {"from": "human", "value": "1+1?"})
    assert by_name["shapes/1"].turns[0] == {"from": "system", "value": "Read."}
    assert by_name["shapes/1"].images == (tmp_path / "0.png",)
    assert by_name["shapes/1"].prefix == ""


def test_tile_caps_reach_the_generator(meta: Path, tmp_path: Path) -> None:
    caps: list[int | None] = []

    def job(world: World) -> list[int | None]:
        def opened(cap: int | None) -> FakeGenerator:
            caps.append(cap)
            return FakeGenerator(reply)

        build_preferences(meta, tmp_path / "out", settings(), world, opened)
        return caps

    assert run_ranks(1, job) == [[None, 2]]
    written = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert written["shapes"]["max_dynamic_patch"] == 2
    assert "max_dynamic_patch" not in written["sums"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_change_nothing(meta: Path, tmp_path: Path, ranks: int) -> None:
    build(meta, tmp_path / "one")
    _, requests = build(meta, tmp_path / "many", ranks=ranks)
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")
    names = [request.name for share in requests for request in share]
    assert len(names) == len(set(names)) == 15
    assert max(map(len, requests)) - min(map(len, requests)) <= 2


@pytest.mark.parametrize(("died_after", "ranks"), [(1, 1), (6, 3), (12, 2)])
def test_a_killed_build_goes_on(meta: Path, tmp_path: Path, died_after: int, ranks: int) -> None:
    build(meta, tmp_path / "whole")
    out = tmp_path / "killed"
    with pytest.raises(Exception, match="KeyboardInterrupt"):
        build(meta, out, generator=lambda: FakeGenerator(reply, die_after=died_after))
    assert not (out / "meta.json").exists()
    file = out / "samples" / "rank-00000.jsonl"
    assert len(file.read_text().splitlines()) == died_after
    file.write_bytes(file.read_bytes()[:-7])  # and the last line was not written whole
    _, requests = build(meta, out, ranks=ranks)
    assert sum(map(len, requests)) == 15 - died_after + 1
    assert outputs(out) == outputs(tmp_path / "whole")
    _, requests = build(meta, out, ranks=ranks)
    assert sum(map(len, requests)) == 0


def test_a_finished_build_opens_no_generator(meta: Path, tmp_path: Path) -> None:
    build(meta, tmp_path / "out")
    before = outputs(tmp_path / "out")

    def opened(cap: int | None) -> FakeGenerator:
        raise AssertionError("nothing is left to generate")

    run_ranks(1, lambda world: build_preferences(meta, tmp_path / "out", settings(), world, opened, model="m"))
    assert outputs(tmp_path / "out") == before


def test_other_rules_need_no_new_samples(meta: Path, tmp_path: Path) -> None:
    first, _ = build(meta, tmp_path / "out")
    samples = tmp_path / "out" / "samples" / "rank-00000.jsonl"
    size = samples.stat().st_size
    build(meta, tmp_path / "out", reuse=True)
    assert samples.stat().st_size == size  # the verdicts are the same: nothing is written again
    wanted = settings(rules=parse_rules(["sums=numeric", "exact"]), sampling=Sampling(seed=5, temperature=1.5))
    second, (requests,) = build(meta, tmp_path / "out", wanted, reuse=True, ranks=1)
    assert requests == []
    assert second["datasets"]["shapes"] == first["datasets"]["shapes"]
    assert (first["datasets"]["sums"]["correct"], second["datasets"]["sums"]["correct"]) == (11, 18)
    exact, _ = build(meta, tmp_path / "out", reuse=True, ranks=2)
    assert exact == first


def test_without_samples_there_is_nothing_to_judge(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="holds no samples that could be judged again"):
        build(meta, tmp_path / "out", reuse=True)
    build(meta, tmp_path / "out", settings(limit=3))
    summary, _ = build(meta, tmp_path / "out", settings(limit=5), reuse=True)
    assert summary["datasets"]["sums"]["skipped"] == {"not sampled": 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 5}, "made with num_samples = 4, not 5"),
        ({"sampling": Sampling(seed=5, temperature=1.0)}, "made with temperature = 0.7, not 1.0"),
        ({"style": PromptStyle.EN}, "made with prompt = 'direct', not 'en'"),
    ],
)
def test_samples_of_other_settings_are_not_mixed_in(
    meta: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    build(meta, tmp_path / "out", settings(limit=2))
    with pytest.raises(Exception, match=f"{message}: use another folder"):
        build(meta, tmp_path / "out", settings(**changed))


def test_neither_are_those_of_another_model_or_of_changed_questions(meta: Path, tmp_path: Path) -> None:
    build(meta, tmp_path / "out", settings(limit=2))
    with pytest.raises(Exception, match="made with model = 'm', not 'other'"):
        build(meta, tmp_path / "out", settings(limit=2), model="other")
    text = (tmp_path / "sums.jsonl").read_text()
    (tmp_path / "sums.jsonl").write_text(text.replace("1+1?", "1+2?"))
    with pytest.raises(Exception, match=r"sample 'sums/2': the samples are of the question '1\+1\?'"):
        build(meta, tmp_path / "out", settings(limit=2))


def test_a_foreign_folder_is_left_alone(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="exists and is no folder of preference data"):
        build(meta, tmp_path)


def test_questions_that_cannot_be_asked_are_counted(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "4.png").unlink()
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("{broken\n")
    refused = {"sums/3", "sums/9", "shapes/6"}  # one in the middle, and the last of each
    summary, (requests,) = build(
        meta, tmp_path / "out", generator=lambda: FakeGenerator(reply, refuse=refused, ahead=2)
    )
    assert summary["datasets"]["sums"]["skipped"] == {"broken JSON": 1, "too long": 2}
    assert summary["datasets"]["shapes"]["skipped"] == {"missing image": 1, "too long": 1, "unreadable image": 1}
    assert {request.name for request in requests} == (
        {f"sums/{i}" for i in range(1, 9)} | {f"shapes/{i}" for i in (1, 2, 3)}
    ) - refused
    draw_shapes(tmp_path, 6)  # what could not be asked is tried again
    summary, (requests,) = build(meta, tmp_path / "out")
    assert {request.name for request in requests} == {"sums/3", "sums/9", "shapes/4", "shapes/5", "shapes/6"}
    assert summary["skipped"] == {"broken JSON": 1}


def test_a_limit_to_all_lines(meta: Path, tmp_path: Path) -> None:
    build(meta, tmp_path / "all")
    all_lines = sorted(line for name in ("sums", "shapes") for line in read_lines(tmp_path / "all" / f"{name}.jsonl"))
    summary, _ = build(meta, tmp_path / "few", settings(max_lines=10))
    few = [line for file in (tmp_path / "few").glob("*.jsonl") for line in read_lines(file)]
    assert len(few) == 10 == sum(summary["sets"].values())
    assert set(few) <= set(all_lines) | set(read_lines(tmp_path / "all" / "shapes_format_rules.jsonl"))
    assert summary["left_out"]["thinned out"] == len(all_lines) + 6 - 10
    assert {name: entry["length"] for name, entry in json.loads((tmp_path / "few" / "meta.json").read_text()).items()} \
        == summary["sets"]  # fmt: skip


def read_lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_equal_lines_are_written_once(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text((json.dumps(sums(3)[2]) + "\n") * 3)
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": ".", "annotation": "d.jsonl"}}))
    summary, _ = build(
        tmp_path / "meta.json", tmp_path / "out", generator=lambda: FakeGenerator(lambda _, number: "35"[number % 2])
    )
    assert summary["sets"] == {"d": 1}
    assert summary["left_out"] == {"duplicates": 3 * 3 + 2}


def continue_(request: Request, number: int) -> str:
    return {"sums/1": "", "sums/2": " and more…", "sums/3": " I guess"}.get(request.name, " a cat")


def test_answers_finished_without_the_image(meta: Path, tmp_path: Path) -> None:
    wanted = settings(method="dropout-ntp", system_prompt="Look.")
    lines = [conversation("<image>\nWhat?", f"a  {shape}\nof some size", image=f"{i}.png")
             for i, shape in enumerate(("box", "disc"))]  # fmt: skip
    (tmp_path / "shapes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary, (requests,) = build(meta, tmp_path / "out", wanted, generator=lambda: FakeGenerator(continue_))
    asked = {request.name: request for request in requests}
    assert asked["shapes/1"] == Request(
        "shapes/1", ({"from": "system", "value": "Read."}, {"from": "human", "value": "What?"}), (), "a  box", 1
    )
    shapes = read(tmp_path / "out" / "shapes.jsonl")
    assert [(p["image"], p["question"], p["chosen"], p["rejected"]) for p in shapes] == [
        ("0.png", "<image>\nWhat?", "a  box\nof some size", "a  box a cat"),
        ("1.png", "<image>\nWhat?", "a  disc\nof some size", "a  disc a cat"),
    ]
    counts = summary["datasets"]["sums"]
    assert (counts["questions"], counts["samples"], counts["pairs"]) == (9, 9, 7)
    assert counts["left_out"] == {"cut off": 1, "empty": 1}
    assert "share_correct" not in counts


def test_dropout_leaves_out_what_is_the_same(meta: Path, tmp_path: Path) -> None:
    summary, _ = build(
        meta,
        tmp_path / "out",
        settings(method="dropout-ntp", limit=3),
        generator=lambda: FakeGenerator(lambda request, _: " 2 " if request.name == "sums/2" else "x"),
    )
    assert summary["datasets"]["sums"]["left_out"] == {"same as the chosen one": 1}


def test_dropout_of_pairs_and_of_an_earlier_build(meta: Path, tmp_path: Path) -> None:
    build(meta, tmp_path / "first")
    wanted = settings(method="dropout-ntp")
    _, (requests,) = build(tmp_path / "first" / "meta.json", tmp_path / "pairs", wanted,
                           generator=lambda: FakeGenerator(lambda *_: "zzz"))  # fmt: skip
    pairs = read(tmp_path / "pairs" / "sums.jsonl")
    assert {(p["question"], p["chosen"], p["rejected"], p["answer_gt"]) for p in pairs} == {
        (f"{i}+1?", str(i + 1), "zzz", str(i + 1)) for i in range(1, 8)
    }
    assert len(requests) > len(pairs)  # one for each pair of a question; the same line is written once
    earlier = settings(method="dropout-ntp", chosen_from=tmp_path / "first")
    summary, _ = build(meta, tmp_path / "again", earlier, generator=lambda: FakeGenerator(lambda *_: "zzz"))
    again = read(tmp_path / "again" / "sums.jsonl")
    assert [p["chosen"] for p in again] == [str(i + 1) for i in range(8)]  # question 0, always right, is used, too
    assert {p["chosen"] for p in read(tmp_path / "again" / "shapes.jsonl")} == {"Box", "disc"}
    assert summary["datasets"]["sums"]["skipped"] == {"no correct answer": 1}


def test_what_comes_out_can_be_indexed(meta: Path, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    summary, _ = build(meta, tmp_path / "out")
    report = small_index(tmp_path / "out" / "meta.json", tiny_tokenizer_dir, tmp_path / "index", kind="preference")
    index = Index.open(report.path)
    assert {info.name: info.count for info in index.meta.datasets} == summary["sets"]
    assert report.num_skipped == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples = 0 is below 1"),
        ({"max_pairs": 0}, "max_pairs = 0 is below 1"),
        ({"start_ratio": 1.0}, "ratio = 1.0 is not in"),
        ({"sampling": Sampling(temperature=0)}, "temperature = 0 gives the same answer 4 times"),
        ({"chosen_from": Path("x")}, "chosen_from is for the method dropout-ntp"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_chosen_from_must_be_a_build(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a build: it has no samples/"):
        settings(method="dropout-ntp", chosen_from=tmp_path)
