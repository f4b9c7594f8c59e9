"""``evovlm verify``: which plans it takes, what it calls equal, what it writes, what it says of a plan that fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evovlm.engine.equality import compare, make_steps, train_alone
from evovlm.engine.equality_plans import all_cases
from evovlm.launch import cli, verify
from evovlm.parallel.fork import RankFailedError

RECIPE = """
out = "run"
steps = 1
ranks = 2
[stage]
name = "sft"
[model]
size = "tiny"
[data]
index = "i"
packs_per_step = 4
[optim]
lr = 1e-3
[parallel]
llm = { hp = 2, zero = 1 }
"""


def test_plans_are_chosen_by_name_and_ranks() -> None:
    names = [case.name for case in verify.select(["tied"], max_ranks=4)]
    assert names == [case.name for case in all_cases() if "tied" in case.name and case.plan.size <= 4]
    assert [case.name for case in verify.select(["tp?"], max_ranks=2)] == ["tp2"]
    assert {case.plan.size for case in verify.select([], max_ranks=4, exact=True)} == {4}
    assert len(verify.select([], max_ranks=8)) == len(all_cases())
    with pytest.raises(ValueError, match="no plan of at most 2 ranks is called 'tp9'; there are: one rank; dp2 zero1"):
        verify.select(["tp9"], max_ranks=2)


def test_a_table_a_file_and_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert cli.main(["verify", "--plans", "hp2", "--ranks", "2", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 plans equal one process within 1e-10" in out
    report = json.loads(file.read_text())
    assert report["bench"] == "verify"
    assert {"machine", "versions"} <= set(report)
    for plan in report["results"]["plans"]:
        assert plan["passed"]
        assert 0 < max(plan["difference"].values()) <= 1e-10


def test_a_recipes_own_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    assert cli.main(["verify", str(recipe), "--ranks", "2", "--precision", "float32"]) == 0
    assert "1 of 1 plans equal one process within 1e-05" in capsys.readouterr().out
    assert cli.main(["verify", str(recipe), "--ranks", "4", "--parallel.llm.tp", "3"]) == 2
    assert "hp 2 · tp 3 = 6 does not divide the run's 4 ranks" in capsys.readouterr().err


def test_a_difference_and_a_failure_are_not_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = train_alone(steps=make_steps())
    off = replace(true, losses=[true.losses[0] * (1 + 1e-9), *true.losses[1:]])
    assert compare(true, true).largest == 0
    monkeypatch.setattr(verify, "run_ranks", lambda *_, **__: [off])
    assert cli.main(["verify", "--plans", "one rank"]) == 1
    assert "DIFFERS" in capsys.readouterr().out

    def fail(*_: object, **__: object) -> None:
        raise RankFailedError("rank 0:\nTraceback …\nValueError: tile 7 is odd")

    monkeypatch.setattr(verify, "run_ranks", fail)
    assert cli.main(["verify", "--plans", "one rank"]) == 1
    assert "ValueError: tile 7 is odd" in capsys.readouterr().out


def test_on_ranks_that_a_launcher_has_started() -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "evovlm.launch", "verify"]
    done = subprocess.run(
        [sys.executable, *words, "--plans", "dp2 zero1", "--plans", "pp2 zero1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 of 2 plans equal one process within 1e-10") == 1
