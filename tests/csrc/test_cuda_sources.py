"""The CUDA sources compile with nvcc for A100 (sm_80) and H100 (sm_90); skipped where there is no nvcc."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .kernel_support import CSRC

SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))


@pytest.mark.parametrize("name", SOURCES)
def test_sources_compile_for_sm_80_and_sm_90(name: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip(f"{name} was not compiled: there is no nvcc on this machine")
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    flags = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020d000000000000", f"-I{include}", *targets]
    command = [nvcc, "-c", str(CSRC / name), "-o", str(tmp_path / "kernels.o"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kernels.o").stat().st_size > 0


def test_setup_builds_every_source() -> None:
    """It takes ops_*_cuda.cu; the names differ from those of the .cpp files, for their objects lie in one folder."""
    assert [f"ops_{name}_cuda.cu" for name in ("norm", "rotary", "rows", "v2pe")] == SOURCES
    assert not {Path(name).stem for name in SOURCES} & {path.stem for path in CSRC.glob("*.cpp")}
