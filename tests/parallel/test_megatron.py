"""Tensor-parallel linears, embedding and cross-entropy against megatron-core's own on the same weights, on 2 ranks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 2


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_equal_to_megatron_core(tmp_path: Path) -> None:
    script = Path(__file__).with_name("megatron_ranks.py")
    logs = [tmp_path / f"{rank}.log" for rank in range(SIZE)]
    command = [sys.executable, str(script)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stderr:
                ranks.append(
                    subprocess.Popen(
                        [*command, str(rank), str(SIZE), str(tmp_path / "store")],
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                )
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, output, log in zip(ranks, outputs, logs, strict=True):
        assert process.returncode == 0, log.read_text()
        distances = json.loads(output.splitlines()[-1])
        assert distances.pop("cross-entropy") < 1e-5  # Megatron's is float32 inside
        assert set(distances) == {"linears", "linears, sequence parallel", "embedding, sequence parallel"}
        assert max(distances.values()) < 1e-10
