"""``evovlm preference build``: from the command line to files, with a server that answers by a script."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.answers.rules import RULES
from evovlm.launch import cli

from .scripted_server import scripted_server

pytestmark = pytest.mark.usefixtures("no_process_group")


def script(messages: list[dict[str, Any]], num: int) -> list[str]:
    """Add one to the number in the question; every second choice is wrong. Continue an answer with "eleven"."""
    if messages[-1]["role"] == "assistant":
        return [" eleven"]
    number = int(messages[-1]["content"].split("+")[0])
    return [str(number + 1 if i % 2 == 0 else number + 2) for i in range(num)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted_server(script) as address:
        yield address


def words(meta: Path, url: str, *more: str) -> list[str]:
    out = ["--out", str(meta.parent / "out"), "--model", "tiny", "--backend", "server", "--url", url]
    return ["preference", "build", str(meta), *out, "--num-samples", "4", *more]


def test_help_imports_nothing_heavy_and_names_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preference", "build", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    *names, last = RULES
    named = f"{', '.join(names)} or {last}".replace("numeric, ", "numeric, numeric:TOLERANCE, ")
    assert named in shown
    assert cli.main(["preference", "--help"]) == 0


def test_pairs_come_from_the_server(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(meta, url, "--verify", "numeric", "--limit", "5", "--start", "1")) == 0
    out = meta.parent / "out"
    pairs = [json.loads(line) for line in (out / "sums.jsonl").read_text().splitlines()]
    assert [(p["question"], p["chosen"], p["rejected"]) for p in pairs] == [
        (f"{i}+1?", f"{i + 1}", f"{i + 2}") for i in range(21, 26)
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "5 pairs of 20 answers" in printed
    assert "left out: 15 duplicates" in printed
    assert "evovlm index" in printed
    assert json.loads((out / "summary.json").read_text())["datasets"]["sums"]["share_correct"] == 0.5
    # Another rule on the same samples, without a model: now a wrong answer is within the tolerance, too.
    again = ["preference", "build", str(meta), "--out", str(out), "--reuse-samples", "--limit", "5", "--start", "1"]
    assert cli.main([*again, "--verify", "numeric"]) == 0
    assert cli.main([*again, "--verify", "anls"]) == 0
    assert cli.main([*again, "--verify", "sums=numeric:0.5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no pair from 20 answers to 5 questions: 5 questions have correct answers only, 0 have none" in error
    assert json.loads((out / "summary.json").read_text())["all_correct"] == 5


def test_dropout_ntp(meta: Path, url: str) -> None:
    file = meta.parent / "sums.jsonl"
    file.write_text(file.read_text().replace('"gpt", "value": "', '"gpt", "value": "It is '))
    assert cli.main(words(meta, url, "--method", "dropout-ntp")) == 0
    pairs = [json.loads(line) for line in (meta.parent / "out" / "sums.jsonl").read_text().splitlines()]
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(f"It is {i + 1}", "It eleven") for i in range(20, 26)]


def test_ranks_share_the_work(meta: Path, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(meta, url, "--ranks", "2")) == 0
    out = meta.parent / "out"
    counts = [len((out / "samples" / f"rank-0000{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [3, 3]
    assert json.loads((out / "summary.json").read_text())["pairs"] == 6
    assert "6 pairs of 24 answers" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--verify", "exakt"], "'exakt' is no rule for answers: did you mean 'exact'?"),
        (["--verify", "sum=exact"], "dataset 'sum', which the meta JSON does not have: did you mean 'sums'?"),
        (["--temperature", "0"], "temperature = 0 gives the same answer 4 times"),
        (["--top-p", "0"], "top_p = 0.0 is not in (0, 1]"),
        (["--start-ratio", "2"], "ratio = 2.0 is not in [0, 1)"),
        (["--chosen-from", "x"], "chosen_from is for the method dropout-ntp"),
        (["--backend", "evovlm"], "--backend server and --url go together"),
        (["--model", "other"], "serves tiny, not 'other'"),
    ],
)
def test_a_mistake_is_one_line(
    meta: Path, url: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(meta, url, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evovlm: ")
    assert message in line


def test_a_missing_model_or_meta(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["preference", "build", str(meta), "--out", str(meta.parent / "out")]
    assert cli.main(build) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert cli.main([*build, "--model", str(meta.parent / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["preference", "build", "no.json", "--out", "x", "--model", "y"]) == 2
    assert "meta JSON 'no.json' does not exist" in capsys.readouterr().err
    assert not (meta.parent / "out").exists()
