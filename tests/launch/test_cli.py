"""The ``evovlm`` command: quick help, settings from its words, a user's mistakes in one red line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evovlm.launch import cli, commands
from evovlm.launch.settings import SettingsError

COMMANDS = (
    "index",
    "train",
    "preference",
    "submit",
    "evaluate",
    "export",
    "extend-tokenizer",
    "quickstart",
    "plan",
    "verify",
    "bench",
    "models",
    "doctor",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"Usage: evovlm {command}" in capsys.readouterr().out


def test_help_lists_all_commands_and_imports_nothing_heavy() -> None:
    program = "import sys, time; from evovlm.launch.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    heavy = {"torch", "numpy", "transformers", "pydantic", "PIL"}
    assert not heavy & set(done.stdout.rsplit("\n", 2)[-2].strip("[]").replace("'", "").split(", "))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("evovlm 0.")


def test_models_lists_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    totals = {line[0]: line[-1] for line in lines if line and line[0].endswith(("B", "tiny"))}
    assert list(totals) == ["tiny", "1B", "2B", "8B", "9B", "14B", "38B", "78B"]
    assert totals["1B"] == "938.2"  # spec §1.1
    assert totals["78B"] == "78,408.3"


def test_unknown_option_of_train_is_an_unknown_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'out = "run"\nsteps = 1\n[stage]\nname = "pretrain"\n[model]\nsize = "tiny"\n'
        '[data]\nindex = "i"\npacks_per_step = 1\n[optim]\nlr = 1e-3\n'
    )
    assert cli.main(["train", str(recipe), "--optim.lrr", "1e-4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "evovlm: command line: unknown key 'optim.lrr'; the nearest valid key is 'optim.lr'"


def test_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "no/such.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("evovlm: no recipe at no/such.toml")
    assert "Traceback" not in err


def test_traceback_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "no/such.toml", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError("seven by nothing")

    monkeypatch.setattr(commands, "models", fail)
    assert cli.main(["models"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: seven by nothing" in err


def test_whose_mistake_a_value_error_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, raised on purpose: the user's input is at fault. A library's: we have called it wrongly."""

    def purpose() -> None:
        raise SettingsError(["wrong"])

    def library() -> None:
        json.loads("{")

    monkeypatch.setattr(commands, "models", purpose)
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err == "evovlm: wrong\n"
    monkeypatch.setattr(commands, "models", library)
    assert cli.main(["models"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ranks_must_match_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="--ranks 2, but the launcher has started 4 ranks"):
        cli.as_rank(2, 1, [])
    me = cli.as_rank(4, 1, [])
    assert me is not None
    assert me.world_size == 4


def test_installed_script_runs() -> None:
    script = Path(sys.executable).parent / "evovlm"
    done = subprocess.run([script, "train"], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 2
    assert "Missing argument 'RECIPE'" in done.stderr
