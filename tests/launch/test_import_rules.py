"""The import rules of pyproject.toml fail on a violation.

The package is a namespace without an ``__init__.py``, which a linter can take for an empty package and find nothing
wrong with. So each rule is tried on a small tree that breaks it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = ("csrc", "parallel", "models", "data", "engine", "launch")
ROOT = Path(__file__).parents[2]


def lint(tree: Path, importer: str | None = None, imported: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run import-linter with the project's contracts on a tree where one function imports another folder's module."""
    for folder in FOLDERS:
        package = tree / "evovlm" / folder
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "part.py").write_text("VALUE = 1\n")
    if importer is not None:
        text = f"def function() -> int:\n    from evovlm.{imported}.part import VALUE\n    return VALUE\n"
        (tree / "evovlm" / importer / "user.py").write_text(text)
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [program, "--config", ROOT / "pyproject.toml", "--no-cache", "--no-logo"],
        env={"PYTHONPATH": str(tree), "PATH": ""},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )


def test_clean_tree_passes(tmp_path: Path) -> None:
    done = lint(tmp_path, "launch", "csrc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("csrc", "parallel"),
        ("parallel", "models"),
        ("parallel", "data"),
        ("parallel", "engine"),
        ("models", "data"),
        ("models", "engine"),
        ("models", "launch"),
        ("data", "engine"),
        ("engine", "launch"),
    ],
)
def test_each_forbidden_import_is_found(tmp_path: Path, importer: str, imported: str) -> None:
    done = lint(tmp_path, importer, imported)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"evovlm.{importer}.user -> evovlm.{imported}.part" in done.stdout
