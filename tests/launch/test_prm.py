"""``evovlm prm build``: from the command line to files, with a server that answers by a script."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evovlm.launch import cli
from evovlm.launch.sampling import phase_progress

from .scripted_server import scripted_server

pytestmark = pytest.mark.usefixtures("no_process_group")


def script(messages: list[dict[str, Any]], num: int) -> list[str]:
    """Add one to the number in the question in two steps; every second answer is wrong, and all after "Hm."."""
    asked = [m["content"] for m in messages if m["role"] == "user"][-1]
    right = int(asked.split("+")[0]) + 1
    texts = [f"Answer: {right + i % 2}" for i in range(num)]
    if messages[-1]["role"] != "assistant":
        return [f"{('Count.', 'Hm.')[i % 2]}\n\n{text}" for i, text in enumerate(texts)]
    return ["Answer: none"] * num if "Hm." in messages[-1]["content"] else texts


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted_server(script) as address:
        yield address


def words(meta: Path, url: str, *more: str) -> list[str]:
    out = ["--out", str(meta.parent / "out"), "--model", "tiny", "--backend", "server", "--url", url]
    return ["prm", "build", str(meta), *out, "--rollouts", "4", "--prompt", "marked", *more]


def labels(meta: Path) -> list[str]:
    """The labels of each conversation, one after the other."""
    lines = [json.loads(line) for line in (meta.parent / "out" / "sums.jsonl").read_text().splitlines()]
    return ["".join(t["value"] for t in line["conversations"] if t["from"] == "gpt") for line in lines]


def test_help_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prm", "build", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--until-first-error" in shown
    assert cli.main(["prm", "--help"]) == 0


def test_steps_are_labelled(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--limit", "5", "--start", "1", "--prm-system-prompt", "Judge."]
    assert cli.main(words(meta, url, *some)) == 0
    assert labels(meta) == ["++", "--"] * 5
    out = meta.parent / "out"
    first = json.loads((out / "sums.jsonl").read_text().splitlines()[0])["conversations"]
    assert first[0] == {"from": "system", "value": "Judge."}
    printed = " ".join(capsys.readouterr().out.split())
    assert "10 conversations of 20 solutions, 40 rollouts" in printed
    assert '"+" by step: 1: 50% of 10, 2: 50% of 10' in printed
    assert "left out: 10 duplicates" in printed
    assert "evovlm index" in printed
    # Other labels of the same rollouts, without a model.
    again = ["prm", "build", str(meta), "--out", str(out), "--reuse-samples", "--prompt", "marked", "--limit", "5"]
    again += ["--start", "1", "--prm-system-prompt", ""]
    assert cli.main([*again, "--until-first-error"]) == 0
    assert labels(meta) == ["++", "-"] * 5
    assert cli.main([*again, "--mc-threshold", "0.5", "--until-first-error"]) == 0
    assert labels(meta) == ["-"] * 10
    assert 'every step is "-": there is nothing to learn from' in capsys.readouterr().out
    assert cli.main([*again, "--outcome"]) == 0
    assert labels(meta) == ["+", "-"] * 5
    first = json.loads((out / "sums.jsonl").read_text().splitlines()[0])["conversations"]
    assert first[0]["from"] == "human"


def test_ranks_share_the_work(meta: Path, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(meta, url, "--ranks", "2")) == 0
    for folder in ("samples", "rollouts"):
        files = sorted((meta.parent / "out" / folder).iterdir())
        assert [len(file.read_text().splitlines()) for file in files] == [3, 3]
    assert labels(meta) == ["++", "--"] * 6
    assert "12 conversations of 24 solutions" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--verify", "exakt"], "'exakt' is no rule for answers: did you mean 'exact'?"),
        (["--verify", "sum=exact"], "dataset 'sum', which the meta JSON does not have: did you mean 'sums'?"),
        (["--temperature", "0"], "temperature = 0 gives the same solution 4 times"),
        (["--mc-threshold", "1"], "mc_threshold = 1.0 is not in [0, 1)"),
        (["--outcome", "--early-stop"], "an outcome reward model judges whole solutions"),
        (["--solutions", "none.jsonl"], "there is no candidate file none.jsonl"),
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


def test_a_missing_model_or_no_samples(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["prm", "build", str(meta), "--out", str(meta.parent / "out")]
    assert cli.main(build) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert cli.main([*build, "--reuse-samples"]) == 2
    assert "holds no samples that could be judged again" in capsys.readouterr().err


def test_other_settings_in_the_same_folder(meta: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(meta, url)) == 0
    assert cli.main(words(meta, url, "--max-steps", "2")) == 2
    assert "made with max_steps = 16, not 2: use another folder" in capsys.readouterr().err


def test_progress_is_told_of_each_phase() -> None:
    console = Console(record=True, force_terminal=False)
    with phase_progress(console, show=True) as report:
        for phase in ("solutions", "rollouts"):
            for done in range(1, 4):
                report(phase, done, 3)
    lines = console.export_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "solutions: 3 of 3 questions of rank 0",
        "rollouts: 3 of 3 questions of rank 0",
    ]
    with phase_progress(console, show=False) as report:
        report("solutions", 3, 3)
    terminal = Console(record=True, force_terminal=True, width=100)
    with phase_progress(terminal, show=True) as report:
        report("solutions", 2, 3)
        report("rollouts", 1, 3)
    assert "2/3" in terminal.export_text()
