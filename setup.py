"""Builds evovlm: maps the top-level folders to the import package ``evovlm`` and compiles ``csrc/``.

    engine/ -> evovlm.engine      models/ -> evovlm.models      parallel/ -> evovlm.parallel
    csrc/   -> evovlm.csrc        data/   -> evovlm.data        launch/   -> evovlm.launch

``evovlm`` itself is a namespace package (there is no ``__init__.py`` at the root), so plain names such as
``data`` or ``models`` never shadow a user's own modules. Everything else stands in ``pyproject.toml``.

CUDA kernels are compiled where torch was built with CUDA and there is nvcc of its release (``CUDA_HOME``), for the GPUs
at hand or those of ``TORCH_CUDA_ARCH_LIST``; ``pip install -v`` shows what was compiled.
"""

import logging
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

FOLDERS = ("engine", "models", "parallel", "csrc", "data", "launch")
HAS_CUDA = torch.version.cuda is not None and CUDA_HOME is not None
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020d000000000000"

packages: list[str] = []
package_dir: dict[str, str] = {}
for folder in FOLDERS:
    for sub in ("", *(f".{name}" for name in find_packages(folder))):
        packages.append(f"evovlm.{folder}{sub}")
        package_dir[f"evovlm.{folder}{sub}"] = folder + sub.replace(".", "/")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


class Build(BuildExtension):
    """Says what it compiles."""

    def build_extensions(self) -> None:
        if HAS_CUDA:
            kernels = f"kernels for CPU and CUDA (torch {torch.__version__}, nvcc of {CUDA_HOME})"
        elif torch.version.cuda is None:
            kernels = f"kernels for CPU alone: torch {torch.__version__} has no CUDA"
        else:
            kernels = f"kernels for CPU alone: torch {torch.__version__} has CUDA, but there is no nvcc (set CUDA_HOME)"
        self.announce(f"evovlm.csrc._ops: {kernels}", level=logging.INFO)
        super().build_extensions()


setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "evovlm.csrc": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.pyi"],
        "evovlm.launch": ["recipes/**/*.toml", "templates/**/*"],
        **{name: ["py.typed"] for name in packages if Path(package_dir[name], "py.typed").exists()},
    },
    ext_modules=[
        # Pure C++ on NumPy arrays: does not link against torch, so it imports in milliseconds.
        Extension(
            "evovlm.csrc._plan",
            [f"csrc/{name}.cpp" for name in ("plan", "pack", "balance", "shuffle")],
            depends=sources("*.h"),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            language="c++",
        ),
        # On torch's stable ABI: seconds to build, and no ATen headers.
        Extension(
            "evovlm.csrc._ops",
            sources("ops_*.cpp", *(["ops_*_cuda.cu"] if HAS_CUDA else [])),
            depends=sources("*.h", "*.cuh"),
            include_dirs=include_paths("cuda" if HAS_CUDA else "cpu"),
            library_dirs=library_paths("cuda" if HAS_CUDA else "cpu"),
            libraries=["torch", "torch_cpu", "c10", *(["torch_cuda", "cudart"] if HAS_CUDA else [])],
            extra_compile_args={
                "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", STABLE_ABI],
                "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI],
            },
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build},
)
