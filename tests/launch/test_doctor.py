"""`evovlm doctor` names what is there, what is missing and what does not work, and never shows a traceback."""

import sys

import pytest

from evovlm.launch import doctor
from evovlm.launch.doctor import Package, check_package


def test_report_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.report()
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert all(line.split()[0] in ("ok", "absent", "BROKEN") for line in lines)
    names = [line.split()[1] for line in lines]
    wanted = ["Python", "CPU", "torch", "accelerators", "megatron-core", "flash-attn", "transformer-engine", "apex"]
    assert set(wanted) <= set(names)
    assert not any("Traceback" in line for line in lines)


def test_missing_needed_package_is_broken_and_missing_optional_one_absent() -> None:
    needed = check_package(Package(("no-such-distribution",), "import nothing", "everything"))
    assert needed.state == "broken"
    assert "everything" in needed.detail
    optional = check_package(Package(("no-such-distribution",), "import nothing", "speed", "pip install it"))
    assert optional.state == "absent"
    assert "pip install it" in optional.detail


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        ("raise RuntimeError('core library is missing')", "RuntimeError: core library is missing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends the process (signal 11)"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_package_that_fails_on_import(trial: str, said: str) -> None:
    finding = check_package(Package(("numpy",), trial, "tests", "remedy"))
    assert finding.state == "broken"
    assert said in finding.detail
    assert "\n" not in finding.detail


def test_slow_import_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.2)
    finding = check_package(Package(("numpy",), "import time; time.sleep(30)", "tests", "remedy"))
    assert finding.state == "broken"
    assert "takes more than" in finding.detail


def test_broken_needed_package_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(("no-such-distribution",), "pass", "everything")
    monkeypatch.setattr(doctor, "REQUIRED", (package,))
    monkeypatch.setattr(doctor, "OPTIONAL", ())
    assert doctor.report() == 1


def test_needed_packages_are_those_of_the_package_metadata() -> None:
    import importlib.metadata
    import re

    requires = importlib.metadata.requires("evovlm") or []
    unconditional = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in requires if "extra ==" not in line}
    known = {name for package in doctor.REQUIRED for name in package.distributions}
    assert unconditional - {"typer", "rich"} == known, sys.version
