"""A quickstart goes on in a folder of its own kind only."""

from pathlib import Path

import pytest

from evovlm.launch.quickstart import Quickstart


def start(out: Path, *, short: bool = False, seed: int = 0, ranks: int = 2) -> None:
    Quickstart(out, short=short, ranks=ranks, seed=seed).claim()


def test_a_folder_is_of_one_seed_and_one_length(tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    start(out, seed=1)
    start(out, seed=1, ranks=1)
    with pytest.raises(ValueError, match=r"'seed': 1, 'short': False.*not \{'seed': 0.*name another folder with --out"):
        start(out)
    with pytest.raises(ValueError, match="'short': True"):
        start(out, seed=1, short=True)
