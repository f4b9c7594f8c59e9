"""Compiles CUDA kernels of csrc/ for the CPU through ``host_shim.h``, to run them without a GPU."""

import ctypes
import subprocess
from pathlib import Path

import torch

import evovlm.csrc.ops

HERE = Path(__file__).parent
CSRC = Path(evovlm.csrc.ops.__file__).parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of the kernels, in the order of ``shim::of_dtype``."""


def compile_for_host(name: str, folder: Path) -> ctypes.CDLL:
    """Build ``name``, which includes ``host_shim.h`` and kernels of csrc/, as a library; unaligned accesses abort."""
    library = folder / "kernels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=alignment", "-fno-sanitize-recover=all"]
    flags += ["-static-libubsan", f"-I{HERE}", f"-I{CSRC}"]
    result = subprocess.run(["g++", *flags, str(HERE / name), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))
