"""The file that every benchmark writes: what was measured, on which machine, with which versions."""

import json
from pathlib import Path
from typing import Any

from evovlm.launch.bench import machine

_VERSIONS = ("python", "evovlm", "torch", "numpy", "pillow", "cuda")


def make_report(bench: str, results: Any, json_file: Path | None) -> dict[str, Any]:
    """Put a benchmark's results beside the machine and versions that they belong to.

    Args:
        bench: Name of the benchmark.
        results: What it measured, as JSON.
        json_file: Where to write the report, too; its folder is made.

    Returns:
        ``{"bench", "machine", "versions", "results"}``.
    """
    about = machine()
    report = {
        "bench": bench,
        "machine": {name: value for name, value in about.items() if name not in _VERSIONS},
        "versions": {name: value for name, value in about.items() if name in _VERSIONS},
        "results": results,
    }
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
