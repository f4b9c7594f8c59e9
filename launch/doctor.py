"""``evovlm doctor``: what this machine has, what it lacks, and what that means; one line each, never a traceback.

A package that is found is tried in a process of its own: one that was built for another torch or CUDA may raise
anything on import (transformer-engine without its core: RuntimeError), or take the process down.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evovlm.launch.ranks import num_cores

State = Literal["ok", "absent", "broken"]
IMPORT_SECONDS = 60
CUDA_EXTRA = "pip install --no-build-isolation 'evovlm[cuda]'"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: ``ok``; ``absent``: not there and not needed; ``broken``: needed, or there and does not work.
        detail: versions and numbers, or what is wrong and what to do.
    """

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Package:
    """A package evovlm can use.

    Attributes:
        distributions: names under which pip may know it.
        trial: Python statements that fail where the package does not work.
        purpose: what evovlm does with it.
        remedy: how to get it; None: evovlm cannot work without it.
    """

    distributions: tuple[str, ...]
    trial: str
    purpose: str
    remedy: str | None = None


REQUIRED = (
    Package(("torch",), "import torch.distributed.fsdp", "tensors, FSDP2"),
    Package(("transformers",), "import transformers", "Hugging Face checkpoints"),
    Package(("tokenizers",), "import tokenizers", "text to tokens"),
    Package(("safetensors",), "import safetensors.torch", "weights"),
    Package(("numpy",), "import numpy", "index and plan"),
    Package(("pillow",), "import PIL.Image", "image decoding"),
    Package(("pydantic",), "import pydantic", "settings"),
    Package(("scipy",), "import scipy.optimize", "cost models"),
    Package(("megatron-core",), "import importlib.util as u; assert u.find_spec('megatron.core')", "text corpora"),
    Package(("webdataset",), "import webdataset", "tar shards"),
    Package(("pyarrow",), "import pyarrow", "tables"),
    Package(("tensorboard",), "import tensorboard", "curves"),
    Package(("matplotlib",), "import matplotlib", "charts of the quickstart, reports"),
    Package(("httpx",), "import httpx", "servers that generate"),
    Package(("math-verify",), "import math_verify", "answers in LaTeX"),
    Package(("protobuf",), "import google.protobuf", "SentencePiece vocabularies"),
)
OPTIONAL = (
    Package(("scikit-learn",), "import sklearn.datasets", "quickstart data", "pip install 'evovlm[quickstart]'"),
    Package(("scikit-image",), "import skimage.data", "quickstart data", "pip install 'evovlm[quickstart]'"),
    Package(("flash-attn",), "import flash_attn", "attention on CUDA", CUDA_EXTRA),
    Package(
        ("transformer-engine",),
        "import transformer_engine.pytorch",
        "FP8, fused norms and Adam on CUDA",
        CUDA_EXTRA,
    ),
    Package(
        ("apex",),
        "from apex.optimizers import FusedAdam",
        "fused norms and Adam on CUDA",
        "build NVIDIA's apex from source (PyPI's package of that name is another one)",
    ),
    Package(
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "import nvidia.dali",
        "image decoding on the GPU",
        CUDA_EXTRA,
    ),
)


def findings() -> Iterator[Finding]:
    """Look at this machine and yield the lines of the report, the slow ones last."""
    yield Finding(
        "evovlm", "ok", f"{_version(('evovlm',)) or 'not installed by pip'}, from {Path(__file__).parents[1]}"
    )
    yield _python()
    yield _cpu()
    yield _extension("evovlm.csrc._plan", "packing and plans")
    with ThreadPoolExecutor() as pool:
        devices = pool.submit(_torch_devices)
        yield from pool.map(check_package, REQUIRED)
        yield devices.result()
        kernels = pool.submit(check_kernels)
        yield from pool.map(check_package, OPTIONAL)
        yield from kernels.result()


def report() -> int:
    """Print the findings; return 1 if something that evovlm needs is missing, else 0."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True)
    signs = {"ok": "[green]ok    [/]", "absent": "[dim]absent[/]", "broken": "[red]BROKEN[/]"}
    own = {"evovlm", "Python", "evovlm.csrc._plan", "evovlm.csrc._ops", "kernels"}
    needed = own | {package.distributions[0] for package in REQUIRED}
    failed = False
    for finding in findings():
        console.print(f"{signs[finding.state]} {escape(finding.name):<20} {escape(finding.detail)}", highlight=False)
        failed |= finding.state == "broken" and finding.name in needed
    return int(failed)


def check_package(package: Package) -> Finding:
    """Find a package's version and try it in a process of its own."""
    name = package.distributions[0]
    version = _version(package.distributions)
    if version is None:
        if package.remedy is None:
            return Finding(name, "broken", f"missing ({package.purpose}): install evovlm again with pip")
        return Finding(name, "absent", f"{package.purpose}: {package.remedy}")
    trouble = _try(package.trial)
    if trouble is not None:
        return Finding(name, "broken", f"{version} is installed but does not work ({package.purpose}): {trouble}")
    return Finding(name, "ok", f"{version} ({package.purpose})")


def check_kernels() -> list[Finding]:
    """Ask, in a process of its own, which kernels a run here would use, and whether evovlm's own are there."""
    command = [sys.executable, "-m", "evovlm.launch.doctor_kernels"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [Finding("kernels", "broken", f"looking for them takes more than {IMPORT_SECONDS} s")]
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        return [Finding("kernels", "broken", f"they cannot be looked for: {reason}")]
    found = json.loads(done.stdout.splitlines()[-1])
    own = found["own"] or f"tensor operators, with kernels for {found['device']}"
    return [
        Finding("evovlm.csrc._ops", "broken" if found["own"] else "ok", own),
        *(Finding(name, "ok", detail) for name, detail in found["lines"]),
    ]


def _try(statements: str) -> str | None:
    """Run statements in a fresh Python; return what went wrong in one line, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", statements],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"import takes more than {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"import ends the process (signal {-done.returncode})"
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _python() -> Finding:
    where = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036 - doctor is for machines where something is wrong
        return Finding("Python", "broken", f"{where}; evovlm needs 3.11 or newer")
    return Finding("Python", "ok", where)


def cpu_model() -> str:
    """Name the CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("CPU", "ok", f"{cpu_model()}, {num_cores()} cores usable, {memory:.1f} GiB memory")


def _extension(module: str, purpose: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(module, "broken", f"not built ({purpose}): run pip install again, it needs a C++20 compiler")
    trouble = _try(f"import {module}")
    return Finding(module, "broken" if trouble else "ok", trouble or purpose)


def _torch_devices() -> Finding:
    """Ask torch, in a process of its own, which accelerators and communication backends it has."""
    program = (
        "import torch, torch.distributed as d\n"
        "backends = [n for n, there in (('gloo', d.is_gloo_available()), ('nccl', d.is_nccl_available())) if there]\n"
        "gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]\n"
        "names = ', '.join(f'{g.name} ({g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor})' for g in gpus)\n"
        "cuda = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'\n"
        "cpu = torch.backends.cpu.get_cpu_capability()\n"
        "print(f\"{names or 'no GPU: everything runs on the CPU'}; torch {cuda}, {cpu}, {' and '.join(backends)}\")\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("accelerators", "broken", f"torch does not answer within {IMPORT_SECONDS} s: look at nvidia-smi")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["torch cannot be asked"])[-1]
        return Finding("accelerators", "broken", reason)
    if done.stdout.startswith("no GPU") and Path("/proc/driver/nvidia/version").exists():
        return Finding("accelerators", "broken", f"an NVIDIA driver runs here, but torch sees {done.stdout.strip()}")
    return Finding("accelerators", "ok", done.stdout.strip())
