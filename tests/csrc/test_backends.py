"""What a machine can use is found once, without importing what cannot run, and told in one line."""

import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from evovlm.csrc import backends
from evovlm.csrc.backends import FP8_RECIPES, Package, find_backends, look

from . import fake_packages

HOPPER = (9, 0)


def problems(found: backends.Backends) -> dict[str, str]:
    packages = {field.name: getattr(found, field.name) for field in fields(found)}
    return {name: package.problem for name, package in packages.items() if isinstance(package, Package)}


def test_a_cpu_uses_evovlms_own_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "transformer_engine", "apex")
    imported: list[str] = []
    monkeypatch.setattr(backends.importlib, "import_module", imported.append)
    found = look("cpu", None)
    assert found.own.usable
    assert found.compiler.usable
    assert not found.flash_attn.usable
    assert "runs on CUDA only" in found.flash_attn.problem
    assert imported == ["evovlm.csrc._ops"]


def test_it_is_found_once() -> None:
    assert find_backends(torch.device("cpu")) is find_backends(torch.device("cpu"))


def test_what_is_missing_has_a_line_with_a_remedy() -> None:
    found = look("cuda", HOPPER)
    for name, problem in problems(found).items():
        assert "\n" not in problem, name
    assert "not installed: pip install --no-build-isolation 'evovlm[cuda]'" in str(found.transformer_engine)
    assert "from source" in str(found.apex_adam)
    assert "from source" in str(found.flash_attn_3)
    assert found.fp8.keys() == FP8_RECIPES.keys()
    assert all("transformer-engine" in problem for problem in found.fp8.values())


def test_packages_that_work_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "flash_attn_interface", "transformer_engine", "apex")
    found = look("cuda", HOPPER)
    wrong = {name: text for name, text in problems(found).items() if name not in ("own", "compiler") and text}
    assert not wrong
    assert found.flash_attn is found.flash_attn_3
    assert found.fp8 | {"mxfp8": ""} == dict.fromkeys(FP8_RECIPES, "")
    assert "10.0 or higher" in found.fp8["mxfp8"]  # the package's own reason


@pytest.mark.parametrize(
    ("capability", "flash_2", "flash_3"),
    [((7, 5), False, False), ((8, 0), True, False), ((9, 0), True, True), ((10, 0), True, False)],
)
def test_gpus_that_flash_attn_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_2: bool, flash_3: bool
) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "flash_attn_interface")
    found = look("cuda", capability)
    assert (found.flash_attn_2.usable, found.flash_attn_3.usable) == (flash_2, flash_3)
    assert found.flash_attn.usable == (flash_2 or flash_3)


def test_a_package_that_breaks_on_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "transformer_engine")
    real = backends.importlib.import_module

    def broken(name: str) -> ModuleType:
        if name.startswith("transformer_engine"):
            raise RuntimeError("Found empty `transformer-engine` meta package installed.\nInstall a core.")
        return real(name)

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    problem = look("cuda", HOPPER).transformer_engine.problem
    assert problem.startswith(
        "does not import (RuntimeError: Found empty `transformer-engine` meta package installed.)"
    )
    assert "\n" not in problem


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "transformer_engine")
    monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")
    assert "has no transformer_engine.pytorch.autocast" in look("cuda", HOPPER).transformer_engine.problem


def test_apex_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "apex")
    monkeypatch.delitem(sys.modules, "amp_C")
    found = look("cuda", HOPPER)
    assert "without amp_C" in found.apex_adam.problem
    assert found.apex_norm.usable


@pytest.mark.gpu
def test_this_gpu() -> None:
    found = find_backends(torch.device("cuda", torch.cuda.current_device()))
    assert found.device == "cuda"
    for name, problem in problems(found).items():
        print(name, problem or "usable")  # noqa: T201 - what `make test-gpu -s` shows of the machine
        assert "\n" not in problem
