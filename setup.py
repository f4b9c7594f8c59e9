"""Builds evovlm: maps the top-level folders to the import package ``evovlm`` and compiles ``csrc/``.

    engine/ -> evovlm.engine      models/ -> evovlm.models      parallel/ -> evovlm.parallel
    csrc/   -> evovlm.csrc        data/   -> evovlm.data        launch/   -> evovlm.launch

``evovlm`` itself is a namespace package (there is no ``__init__.py`` at the root), so plain names such as
``data`` or ``models`` never shadow a user's own modules. Everything else stands in ``pyproject.toml``.
"""

from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

FOLDERS = ("engine", "models", "parallel", "csrc", "data", "launch")

packages: list[str] = []
package_dir: dict[str, str] = {}
for folder in FOLDERS:
    for sub in ("", *(f".{name}" for name in find_packages(folder))):
        packages.append(f"evovlm.{folder}{sub}")
        package_dir[f"evovlm.{folder}{sub}"] = folder + sub.replace(".", "/")

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
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            language="c++",
        ),
        # On torch's stable ABI: seconds to build, and no ATen headers.
        Extension(
            "evovlm.csrc._ops",
            sorted(str(path) for path in Path("csrc").glob("ops_*.cpp")),
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020d000000000000"],
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
