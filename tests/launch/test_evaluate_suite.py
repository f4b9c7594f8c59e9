"""Suites: their commands, a process that is really started, recorded result files, and what can go wrong."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from evovlm.engine import evaluate_language
from evovlm.launch import cli
from evovlm.launch.evaluate_suite import SUITES, Suite, read_results

from .fake_suite import RECORDED, install, model_dir, python


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both suites are installed, as packages that write what was recorded."""
    install(tmp_path / "packages", "lmms_eval", "lmms_eval_results.json")
    install(tmp_path / "packages", "lm_eval", "lm_eval_results.json")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return model_dir(tmp_path / "export", "internvl", min_patches=1, max_patches=6, do_resize=1)


def evaluate(*words: str | Path) -> int:
    return cli.main(["evaluate", *map(str, words)])


def dry_run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    assert evaluate(*words, "--dry-run") == 0
    return shlex.split(capsys.readouterr().out)


def test_command_of_lmms_eval(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--suite", "lmms-eval", "--tasks", "mmmu_val, chartqa", "--suite-args", "--device cpu"]
    words = dry_run(capsys, export, *more)
    assert words == [
        *(python(), "-m", "lmms_eval", "--model", "internvl_hf"),
        *("--model_args", f"pretrained={export},min_patches=1,max_patches=6"),
        *("--tasks", "mmmu_val,chartqa", "--batch_size", "1"),
        *("--output_path", str(export / "evaluations" / "lmms-eval"), "--device", "cpu"),
    ]
    assert not (export / "evaluations").exists()  # nothing is run, nothing is written


def test_results_of_two_models_are_not_put_into_one_table(
    suites: None, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", model_dir(tmp_path / "other", "internvl", min_patches=1, max_patches=6, do_resize=1)
    assert evaluate(export, "--suite", "lmms-eval", "--tasks", "digits", "--out", out) == 0
    assert evaluate(other, "--suite", "lmms-eval", "--tasks", "words", "--out", out) == 0
    found = json.loads((out / "lmms-eval.json").read_text())
    assert (found["target"], list(found["tasks"])) == (str(other), ["words"])


def test_command_of_lm_eval(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a whole model it takes the language model alone; a directory of one is taken as it is."""
    more = ["--suite", "lm-eval", "--tasks", "gsm8k", "--suite-args", "--device cuda:1 --gen_kwargs 'a=1, b'"]
    words = dry_run(capsys, export, *more, "--out", tmp_path / "out")
    assert words == [
        *(python(), "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={tmp_path / 'out' / 'language-model'}"),
        *("--tasks", "gsm8k", "--batch_size", "1", "--output_path", str(tmp_path / "out" / "lm-eval")),
        *("--device", "cuda:1", "--gen_kwargs", "a=1, b"),
    ]
    alone = model_dir(tmp_path / "alone", "qwen2")
    assert f"pretrained={alone}" in dry_run(capsys, alone, *more)


def test_several_processes_and_another_python(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--suite", "lmms-eval", "--tasks", "a", "--ranks", "4", "--suite-python", "/env/bin/python"]
    words = dry_run(capsys, export, *more)
    assert words[:7] == [
        "/env/bin/python",
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "4",
        "-m",
        "lmms_eval",
    ]


def test_a_suite_is_run_and_its_results_are_collected(
    suites: None, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(export, "--suite", "lmms-eval", "--tasks", "digits", "--out", out) == 0
    said = capfd.readouterr().out
    assert "FAKE SUITE" in said
    assert [line.split() for line in said.splitlines() if line.split()[:1] == ["digits"]] == [
        ["digits", "exact_match", "0.9167", "0.0360", "60"]
    ]
    assert f"wrote {out / 'lmms-eval.json'}" in said
    assert evaluate(export, "--suite", "lmms-eval", "--tasks", "words", "--out", out) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines() if "exact_match" in line] == ["words"]
    collected = json.loads((out / "lmms-eval.json").read_text())
    assert list(collected["tasks"]) == ["digits", "words"]  # those of the earlier call stay
    assert collected["tasks"]["words"]["metrics"] == {
        "exact_match": {"value": pytest.approx(0.91666667), "stderr": pytest.approx(0.0359823)}
    }
    assert collected["tasks"]["words"]["results"].endswith("results.json")
    assert "--tasks words" in collected["tasks"]["words"]["command"]


def test_lm_eval_gets_the_language_model_first(
    suites: None, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Path, Path]] = []
    monkeypatch.setattr(evaluate_language, "current_language_model", lambda source, out: made.append((source, out)))
    assert evaluate(export, "--suite", "lm-eval", "--tasks", "a") == 0
    assert made == [(export, export / "evaluations" / "language-model")]
    assert "a" in json.loads((export / "evaluations" / "lm-eval.json").read_text())["tasks"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("fails", "lmms-eval ended with exit code 3; what it said stands above"),
        ("silent", "lmms-eval reported no failure, but left no results in"),
    ],
)
def test_a_suite_that_fails(
    task: str, message: str, suites: None, export: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (export / "evaluations" / "lmms-eval").mkdir(parents=True)
    (export / "evaluations" / "lmms-eval" / "old_results.json").write_text("{}")  # of an earlier call: not this one's
    assert evaluate(export, "--suite", "lmms-eval", "--tasks", task) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_suite_that_is_not_installed(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SUITES, "lmms-eval", Suite("lmms-eval", "no_such_module", "internvl_hf", "benchmarks"))
    assert evaluate(export, "--suite", "lmms-eval", "--tasks", "a") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"lmms-eval (benchmarks) is not installed for {python()}: pip install lmms-eval" in line
    assert not (export / "evaluations").exists()


def test_mistakes(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    published = model_dir(tmp_path / "published", "internvl_chat")
    cases: list[tuple[list[str | Path], str]] = [
        ([export, "--suite", "lmms-eval"], "--suite lmms-eval needs --tasks"),
        ([export, "--suite", "lmms-eval", "--tasks", " , "], "needs --tasks"),
        ([export, "--suite", "lmms-eval", "--tasks", "a", "--suite-args", "'x"], "No closing quotation"),
        ([tmp_path / "none", "--suite", "lmms-eval", "--tasks", "a"], "no directory of a model at"),
        ([run, "--suite", "lmms-eval", "--tasks", "a"], f"is a run, which no suite can load: evovlm export {run} DIR"),
        ([published, "--suite", "lmms-eval", "--tasks", "a"], "export it with --format transformers"),
        ([export, "--suite", "lmms-eval", "--benchmark", "pope"], "give one of them"),
        ([export, export, "--suite", "lmms-eval", "--tasks", "a"], "2 targets"),
        ([export, "--suite", "lm-eval", "--tasks", "a", "--suite-python", "/no/python"], "cannot be started"),
        ([export], "is an exported model: run a suite on it"),
        ([export / "config.json"], "is a file: score its answers with --benchmark NAME"),
        ([tmp_path / "none"], "is not a run directory: it has no settings.json"),
    ]
    for words, message in cases:
        assert evaluate(*words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_recorded_results() -> None:
    assert read_results(RECORDED / "lmms_eval_results.json") == {
        "tiny_digits": {
            "metrics": {"exact_match": {"value": pytest.approx(0.916666667), "stderr": pytest.approx(0.0359823)}},
            "num": 60,
        }
    }
    harness = read_results(RECORDED / "lm_eval_results.json")
    assert harness["tiny_choice"] == {
        "metrics": {"acc": {"value": pytest.approx(1 / 3), "stderr": pytest.approx(1 / 3)}},
        "num": 3,
    }
    assert list(harness) == ["tiny_words", "tiny_choice"]


def test_filters_groups_and_what_is_no_number(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "alias": " - mmlu",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": "N/A",
        "acc": 0.25,
        "submission,none": None,
        "gpt_eval_score,none": {"a": 1},
        "passed,none": True,
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": {"mmlu": values}}))
    assert read_results(file) == {
        "mmlu": {
            "metrics": {
                "exact_match (strict-match)": {"value": 0.5, "stderr": None},
                "acc": {"value": 0.25, "stderr": None},
            },
            "num": None,
        }
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 3}', '{"x": 1}'])
def test_no_result_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="is no result file of a suite"):
        read_results(tmp_path / "results.json")
