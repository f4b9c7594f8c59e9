"""Compiles CUDA kernels of csrc/: for a GPU, and for the CPU through ``host_shim.h``, to run them without one."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import evovlm.csrc.ops

HERE = Path(__file__).parent
CSRC = Path(evovlm.csrc.ops.__file__).parent


def compile_for_host(source: str, folder: Path) -> ctypes.CDLL:
    """Build C++ that includes ``host_shim.h`` and kernels of csrc/ into a library; unaligned accesses abort."""
    file, library = folder / "kernels.cpp", folder / "kernels.so"
    file.write_text(source)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=alignment", "-fno-sanitize-recover=all"]
    flags += ["-static-libubsan", f"-I{HERE}", f"-I{CSRC}"]
    result = subprocess.run(["g++", *flags, str(file), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def compile_for_cuda(name: str, folder: Path) -> None:
    """Build csrc/``name`` with nvcc for sm_80 and sm_90; skips where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip(f"{name} was not compiled: there is no nvcc on this machine")
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    flags = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020d000000000000", f"-I{include}", *targets]
    command = [nvcc, "-c", str(CSRC / name), "-o", str(folder / "kernels.o"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (folder / "kernels.o").stat().st_size > 0
