"""Which kernels this machine has besides evovlm's own: looked at once, never imported where they cannot run.

    is a package there? ─► does it import? ─► does it have what we call? ─► does it know this GPU?
            │ no                │ no                  │ no                        │ no          each a line: why not
            ▼                   ▼                     ▼                           ▼
         Package(problem = "not installed: pip install …")                Package(problem = "")   usable

What a run then uses is decided from its settings in :mod:`evovlm.engine.kernels`; ``evovlm doctor`` lists it.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

INSTALL = "pip install --no-build-isolation 'evovlm[cuda]'"
"""What installs the optional packages, in the versions of pyproject.toml."""
APEX_BUILD = "build NVIDIA's apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (PyPI's apex is another package)"

FP8_RECIPES = {
    "delayed": ("DelayedScaling", "is_fp8_available"),
    "current": ("Float8CurrentScaling", "is_fp8_available"),
    "block": ("Float8BlockScaling", "is_fp8_block_scaling_available"),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available"),
}
"""Our name of a recipe → transformer-engine's class, and the function that knows whether a GPU can run it."""


@dataclass(frozen=True)
class Package:
    """One thing that offers kernels.

    Attributes:
        name: What users call it.
        version: Its version, or "" where that is not known.
        problem: Why it cannot be used here, and what to do about it, in one line; "" where it can.
    """

    name: str
    version: str = ""
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether it can be used here."""
        return not self.problem

    def __str__(self) -> str:
        named = f"{self.name} {self.version}".strip()
        return named if self.usable else f"{named}: {self.problem}"


@dataclass(frozen=True)
class Backends:
    """What one device can use.

    Attributes:
        device: ``cpu`` or ``cuda``.
        flash_attn_3: flash-attn's functions for Hopper, module ``flash_attn_interface``.
        flash_attn_2: Package ``flash_attn``.
        transformer_engine: Linear layers, norms and Adam.
        fp8: Recipe (:data:`FP8_RECIPES`) → why it cannot be used, or "".
        apex_norm: apex' fused norms.
        apex_adam: apex' fused Adam.
        compiler: What ``torch.compile`` generates code with.
        own: evovlm's operators for this device.
    """

    device: str
    flash_attn_3: Package
    flash_attn_2: Package
    transformer_engine: Package
    fp8: dict[str, str]
    apex_norm: Package
    apex_adam: Package
    compiler: Package
    own: Package

    @property
    def flash_attn(self) -> Package:
        """The newest flash-attn that can be used; where none can, the reason that stands in the way of version 2."""
        return self.flash_attn_3 if self.flash_attn_3.usable else self.flash_attn_2


@functools.cache
def find_backends(device: torch.device) -> Backends:
    """Look once at what a device can use; on a CPU no package of these is imported.

    Args:
        device: Where a rank computes.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return look(device.type, capability)


def look(device: str, capability: tuple[int, int] | None) -> Backends:
    """Look at what a kind of device can use.

    Args:
        device: ``cpu`` or ``cuda``.
        capability: CUDA compute capability, such as (9, 0).
    """
    flash_3 = _package("flash-attn 3", "flash_attn_interface", ("flash_attn_varlen_func",), device, _FLASH_3)
    if flash_3.usable and capability is not None and capability[0] != 9:
        flash_3 = Package(flash_3.name, flash_3.version, f"made for sm_90, and this GPU is sm_{_digits(capability)}")
    flash_2 = _package("flash-attn", "flash_attn", ("flash_attn_varlen_func",), device, INSTALL)
    if flash_2.usable and capability is not None and capability < (8, 0):
        flash_2 = Package(flash_2.name, flash_2.version, f"needs sm_80 or newer, this GPU is sm_{_digits(capability)}")
    engine = _package(
        "transformer-engine",
        "transformer_engine.pytorch",
        ("Linear", "RMSNorm", "LayerNorm", "autocast", "optimizers.FusedAdam"),
        device,
        INSTALL,
    )
    return Backends(
        device=device,
        flash_attn_3=flash_3,
        flash_attn_2=flash_2,
        transformer_engine=engine,
        fp8={recipe: _fp8_problem(recipe, engine) for recipe in FP8_RECIPES},
        apex_norm=_package("apex", "apex.normalization", ("FusedRMSNorm", "FusedLayerNorm"), device, APEX_BUILD),
        apex_adam=_package("apex", "apex.optimizers", ("FusedAdam",), device, APEX_BUILD),
        compiler=_compiler(device),
        own=_own_operators(device),
    )


_FLASH_3 = "build flash-attention's folder hopper/ from source"


def load(module: str) -> Any:
    """Import a module of an optional package that :func:`find_backends` has found usable."""
    return importlib.import_module(module)


def _package(name: str, module: str, wanted: tuple[str, ...], device: str, remedy: str) -> Package:
    top = module.partition(".")[0]
    if not _is_there(top):
        return Package(name, "", f"not installed: {remedy}")
    version = _version(top)
    if device != "cuda":
        return Package(name, version, f"runs on CUDA only, and this is {device}")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a package built for another torch or CUDA may raise anything
        return Package(name, version, f"does not import ({_one_line(error)}): {remedy}")
    absent = [path for path in wanted if not _has(found, path)]
    if absent:
        return Package(name, version, f"has no {module}.{absent[0]}: {remedy}")
    if name == "apex":
        # apex imports without its kernels, and fails when the first layer is made.
        for kernels in ("fused_layer_norm_cuda" if module == "apex.normalization" else "amp_C",):
            if not _is_there(kernels):
                return Package(name, version, f"was built without {kernels}: {remedy}")
    return Package(name, version)


def _fp8_problem(recipe: str, engine: Package) -> str:
    """Why transformer-engine cannot run an FP8 recipe here, or ""."""
    if not engine.usable:
        return str(engine)
    name, available = FP8_RECIPES[recipe]
    recipes, pytorch = load("transformer_engine.common.recipe"), load("transformer_engine.pytorch")
    if not hasattr(recipes, name) or not hasattr(pytorch, available):
        return f"{engine} has no recipe {name}: {INSTALL}"
    there, why = getattr(pytorch, available)(return_reason=True)
    return "" if there else f"transformer-engine says: {why or 'this GPU cannot run it'}"


def _compiler(device: str) -> Package:
    if device == "cuda":
        if not _is_there("triton"):
            return Package("triton", "", "not installed: pip install triton, as torch's CUDA builds do")
        return Package("triton", _version("triton"))
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found is None:
        return Package("C++ compiler", "", "neither g++ nor clang++ is in PATH: install one")
    return Package(found)


def _own_operators(device: str) -> Package:
    """Whether ``evovlm.csrc._ops`` has kernels for a device."""
    name = "evovlm.csrc._ops"
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - an extension built for another torch may raise anything
        return Package(name, "", f"does not import ({_one_line(error)}): run pip install again")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    absent = [each for each in ("rms_norm", "rotary_qk") if not has_kernel(f"evovlm::{each}", device.upper())]
    if absent:
        return Package(name, "", f"was built without kernels for {device}: install evovlm again where nvcc is found")
    return Package(name)


_DISTRIBUTIONS = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "transformer_engine": "transformer-engine",
}
"""Module → distribution, where their names differ."""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module put into sys.modules without a spec
        return True


def _has(module: ModuleType, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def _version(module: str) -> str:
    """Version of the distribution that a module comes from, or "" where it comes from none."""
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _digits(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"
