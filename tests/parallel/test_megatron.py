"""Against megatron-core's own, on 2 ranks: tensor-parallel layers and cross-entropy, and a 1F1B pipeline step.

Ranks are processes of their own, since parts of Megatron do not survive a fork.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 2
pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")


def differences(script: str, folder: Path) -> list[dict[str, float]]:
    """What each rank of a script prints as its last line."""
    logs = [folder / f"{rank}.log" for rank in range(SIZE)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            words = [str(Path(__file__).with_name(script)), str(rank), str(SIZE), str(folder / "store")]
            with log.open("w") as stderr:
                ranks.append(
                    subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=stderr, text=True)
                )
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, log in zip(ranks, logs, strict=True):
        assert process.returncode == 0, log.read_text()
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_layers_and_cross_entropy(tmp_path: Path) -> None:
    for found in differences("megatron_ranks.py", tmp_path):
        assert found.pop("cross-entropy") < 1e-5  # Megatron's is float32 inside
        assert set(found) == {"linears", "linears, sequence parallel", "embedding, sequence parallel"}
        assert max(found.values()) < 1e-10


def test_a_1f1b_step(tmp_path: Path) -> None:
    """The same stages and microbatches."""
    for found in differences("megatron_pipeline_ranks.py", tmp_path):
        assert set(found) == {"2", "4", "7"}  # microbatches
        assert max(found.values()) < 1e-12
