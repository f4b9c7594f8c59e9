"""Which commands keep their memory, and that the settings reach the processes that compute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evovlm.launch import heap


@pytest.fixture(autouse=True)
def _glibc_without_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(heap, "_DRIVER", tmp_path / "no_driver")


@pytest.mark.parametrize("words", [["train", "r.toml"], ["bench", "ops"], ["quickstart"]])
def test_commands_that_compute_want_it(words: list[str]) -> None:
    assert heap.wants_heap(words, {})


@pytest.mark.parametrize("words", [[], ["doctor"], ["train", "--help"], ["--version"]])
def test_other_commands_do_not(words: list[str]) -> None:
    assert not heap.wants_heap(words, {})


def test_the_users_own_settings_stay() -> None:
    assert not heap.wants_heap(["train"], {heap.VARIABLE: "glibc.malloc.tcache_count=0"})


def test_gpu_machines_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heap, "_DRIVER", tmp_path)
    assert not heap.wants_heap(["train"], {})
    monkeypatch.setattr(heap, "_DRIVER", tmp_path / "no_driver")
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert not heap.wants_heap(["train"], {})


def test_a_restarted_process_has_the_settings_and_the_same_words() -> None:
    program = (
        "import os, sys\n"
        "from evovlm.launch import heap\n"
        "def told(path, words): print(os.environ[heap.VARIABLE], *words[2:]); sys.exit(0)\n"
        "os.execv = told\n"
        "heap.wants_heap = lambda words, environ: heap.VARIABLE not in environ\n"
        "heap.restart_with_heap(['train', 'r.toml', '--ranks', '2'])\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != heap.VARIABLE}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.split() == [heap.KEEP, "evovlm.launch", "train", "r.toml", "--ranks", "2"]


def test_freed_buffers_come_back_without_page_faults() -> None:
    program = (
        "import resource, torch\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4): torch.ones(16_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())\n"
    )
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                env={**os.environ, heap.VARIABLE: settings},
                check=True,
            ).stdout
        )
        for settings in ("glibc.malloc.hugetlb=0", heap.KEEP)
    ]
    assert counts[1] * 10 < counts[0]
