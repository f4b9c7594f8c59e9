"""``evovlm best-of-n``: from the command line to a table, with a server that answers by a script."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evovlm.launch import cli

from .scripted_server import scripted_server

pytestmark = pytest.mark.usefixtures("no_process_group")


def script(messages: list[dict[str, Any]], num: int) -> list[str]:
    """Add one to the number in the question in every second candidate, two in the others."""
    number = int(messages[-1]["content"].split("+")[0])
    return [f"So.\n\nAnswer: {number + 1 + i % 2}" for i in range(num)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted_server(script) as address:
        yield address


def words(meta: Path, *more: str, out: str = "out") -> list[str]:
    return ["best-of-n", str(meta), "--out", str(meta.parent / out), "--prompt", "marked", *more]


def asking(meta: Path, url: str, *more: str) -> list[str]:
    return words(meta, "--model", "tiny", "--backend", "server", "--url", url, "-n", "4", *more)


def reward_all(file: Path, out: Path) -> None:
    """Write the candidates again, with the highest reward for the second one."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        for number, candidate in enumerate(line["candidates"]):
            candidate["reward"] = 0.9 if number == 1 else 0.1
            candidate["steps"] = [{"step": "So.", "score": 0.8 if number == 0 else 0.1}]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_help_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["best-of-n", "--help"]) == 0
    assert "accuracy against N = 1, 2, 4, 8, 16, 32" in " ".join(capsys.readouterr().out.split())


def test_generation_and_choice_apart(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = meta.parent
    assert cli.main(asking(meta, url, "--generate-only", "--limit", "5")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "20 candidates to 5 questions" in printed
    assert "next: evovlm best-of-n" in printed
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["datasets"]["sums"]["n"]["4"]["pass@1"]["mean"] == 0.5
    assert summary["overall"]["n"]["2"]["oracle"]["mean"] == pytest.approx(5 / 6)
    reward_all(folder / "out" / "candidates.jsonl", folder / "scored.jsonl")
    choosing = words(meta, "--candidates", str(folder / "scored.jsonl"), "--critic", "prm", out="chosen")
    assert cli.main([*choosing, "--critic", "majority", "--critic", "random"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "n pass@1 prm majority random oracle" in printed
    assert "left out: 1 no candidates" in printed
    table = json.loads((folder / "chosen" / "summary.json").read_text())["datasets"]["sums"]["n"]
    # The second candidate has the highest reward and is wrong; of the others, the first one stands for all.
    assert [table[size]["prm"]["mean"] for size in "124"] == [0.5, 0.5, 0]
    assert table["4"]["majority"]["mean"] == 1  # two votes against two: what came first
    # Another reduction is made of the steps in the file.
    assert cli.main([*choosing, "--reduction", "last"]) == 0
    table = json.loads((folder / "chosen" / "summary.json").read_text())["datasets"]["sums"]["n"]
    assert table["4"]["prm"]["mean"] == 1


def test_ranks_share_the_work(meta: Path, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(asking(meta, url, "--ranks", "2")) == 0
    out = meta.parent / "out"
    counts = [len((out / "samples" / f"rank-0000{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [3, 3]
    printed = " ".join(capfd.readouterr().out.split())
    assert "n pass@1 majority random oracle" in printed
    assert "24 candidates to 6 questions" in printed
    alone = [*asking(meta, url), "--out", str(meta.parent / "alone")]
    assert cli.main(alone) == 0
    assert (meta.parent / "alone" / "summary.json").read_text() == (out / "summary.json").read_text()


def test_answers_in_another_form(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*asking(meta, url), "--prompt", "en_v2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no candidate has an answer in the form that --prompt en_v2 asks for" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--verify", "exakt"], "'exakt' is no rule for answers: did you mean 'exact'?"),
        (["--temperature", "0"], "temperature = 0 gives the same candidate 4 times"),
        (["--critic", "prm"], "critic prm needs a reward model: name its folder with --critic-model"),
        (["--critic-model", "x"], "--critic-model x: no critic asks for it; add --critic prm"),
        (["--critic", "prm", "--critic-model", "orm=x"], "--critic-model x: no critic asks for it; add --critic orm"),
        (["--critic", "prm", "--critic-model", "nowhere"], "there is no folder nowhere: --critic-model names a run"),
        (["--critic", "prm", "--critic-model", "x", "--critic-model", "y"], "two reward models for the same critic"),
        (["--candidates", "x.jsonl"], "--candidates and --model: candidates are read from a file, or generated"),
        (["--critic", "random", "--critic", "random"], "name each of prm, orm, majority, prm-majority, random once"),
        (["--backend", "evovlm"], "--backend server and --url go together"),
    ],
)
def test_a_mistake_is_one_line(
    meta: Path, url: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(asking(meta, url, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evovlm: ")
    assert message in line
    assert not (meta.parent / "out").exists()


def test_files_that_are_missing_or_of_other_questions(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(meta)) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert cli.main(words(meta, "--candidates", str(meta.parent / "none.jsonl"))) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert cli.main(["best-of-n", "no.json", "--out", "x", "--model", "y"]) == 2
    assert "meta JSON 'no.json' does not exist" in capsys.readouterr().err
    assert cli.main(asking(meta, url, "--generate-only")) == 0
    capsys.readouterr()
    file = meta.parent / "sums.jsonl"
    file.write_text(file.read_text().replace("20+1", "30+1"))
    candidates = ["--candidates", str(meta.parent / "out" / "candidates.jsonl")]
    assert cli.main(words(meta, *candidates, out="other")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "candidate file of another question set: 1 questions have another text" in line
    assert cli.main(words(meta, *candidates, "--generate-only", out="other")) == 2
    assert "--candidates and --generate-only" in capsys.readouterr().err
