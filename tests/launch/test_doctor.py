"""`evovlm doctor` names what is there, what is missing and what does not work, and never shows a traceback."""

import json
import sys
from dataclasses import replace

import pytest

from evovlm.csrc import backends
from evovlm.csrc.backends import look
from evovlm.launch import doctor, doctor_kernels
from evovlm.launch.doctor import Package, check_kernels, check_package
from evovlm.launch.doctor_kernels import kernel_lines

from ..csrc import fake_packages


def test_report_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.report()
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert all(line.split()[0] in ("ok", "absent", "BROKEN") for line in lines)
    names = [line.split()[1] for line in lines]
    wanted = ["Python", "CPU", "torch", "accelerators", "megatron-core", "flash-attn", "transformer-engine", "apex"]
    assert set(wanted) <= set(names)
    assert {"evovlm.csrc._ops", "attention", "linear", "norm", "Adam", "compile", "CUDA"} <= set(names)
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


def test_kernels_of_a_cpu() -> None:
    lines = dict(kernel_lines(look("cpu", None)))
    assert list(lines) == ["attention", "linear", "norm", "Adam", "compile", "CUDA graphs"]
    assert lines["attention"].startswith("evovlm's operator; not flash-attn 3: ")
    assert lines["norm"].startswith("evovlm's operator (can be chosen: torch); not transformer-engine: not installed")
    assert not any("\n" in line for line in lines.values())


def test_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "transformer_engine", "apex")
    lines = dict(kernel_lines(look("cuda", (9, 0))))
    assert lines["attention"].startswith("flash-attn (can be chosen: torch); not flash-attn 3: not installed")
    assert lines["linear"].startswith("torch (can be chosen: te, fp8 delayed, fp8 current, fp8 block); not fp8 mxfp8:")
    assert lines["norm"] == "evovlm's operator (can be chosen: torch, te, apex)"
    assert lines["Adam"] == "torch, fused (can be chosen: te, apex)"
    without = replace(look("cuda", (9, 0)), flash_attn_2=backends.Package("flash-attn", "2.8", "gone"))
    assert dict(kernel_lines(without))["attention"].startswith("torch's flash kernels; not flash-attn 3: not installed")


def test_missing_operators_are_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without = replace(look("cpu", None), own=backends.Package("evovlm.csrc._ops", "", "built for another torch"))
    monkeypatch.setattr(doctor_kernels, "find_backends", lambda _: without)
    doctor_kernels.main()
    found = json.loads(capsys.readouterr().out)
    assert found["own"] == "built for another torch"

    class Done:
        returncode, stdout, stderr = 0, json.dumps(found), ""

    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: Done)
    first = check_kernels()[0]
    assert (first.name, first.state, first.detail) == ("evovlm.csrc._ops", "broken", "built for another torch")
    Done.returncode, Done.stderr = 1, "Traceback (most recent call last):\nRuntimeError: no"
    (only,) = check_kernels()
    assert (only.state, only.detail) == ("broken", "they cannot be looked for: RuntimeError: no")
