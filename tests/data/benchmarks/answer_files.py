"""Small answer files for the tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evovlm.data.benchmarks.registry import score_files
from evovlm.data.benchmarks.report import Report

Rows = Sequence[Mapping[str, Any]]


def write(file: Path, rows: Any) -> Path:
    """Write rows as JSON, or as JSON lines where the name says so."""
    lines = file.suffix == ".jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")
    return file


def score(folder: Path, benchmark: str, rows: Any, **options: Any) -> Report:
    """Score rows as one file."""
    return score_files([write(folder / "answers.json", rows)], benchmark, **options)
