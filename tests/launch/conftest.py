"""Fixtures of tests that call commands in this process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """A command that fails leaves its process group to the end of its process, which does not come here."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """``meta.json`` of the dataset ``sums``: six questions of text, "20+1?" and so on, in ``sums.jsonl`` beside it."""
    lines = [
        {"conversations": [{"from": "human", "value": f"{i}+1?"}, {"from": "gpt", "value": f"{i + 1}"}]}
        for i in range(20, 26)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "meta.json").write_text(json.dumps({"sums": {"root": ".", "annotation": "sums.jsonl"}}))
    return tmp_path / "meta.json"
