"""Lets a process keep the memory that it frees: a training step on a CPU asks for the same buffers again and again.

    free(32 MB) ─ glibc's default ─► back to the kernel ─► next step: 8,192 page faults, each a page to clear
               └─ here ────────────► kept              ─► next step: the same memory, in pages of 2 MiB where allowed

glibc reads these settings once, when a process starts, so a command that computes starts itself again with them; the
processes that it starts inherit them. A machine with an NVIDIA driver is left alone: there the step's buffers are not
on the host. Whoever sets ``GLIBC_TUNABLES`` decides alone.
"""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
KEEP = "glibc.malloc.mmap_threshold=1099511627776:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.hugetlb=1"
COMPUTING = ("train", "quickstart", "calibrate", "verify", "bench", "evaluate")
_DRIVER = Path("/proc/driver/nvidia/version")


def wants_heap(words: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a command line is one that computes on this CPU, in a process that has no such settings yet."""
    computes = bool(words) and words[0] in COMPUTING and not {"-h", "--help"} & set(words)
    return computes and VARIABLE not in environ and platform.libc_ver()[0] == "glibc" and not _DRIVER.exists()


def restart_with_heap(words: Sequence[str]) -> None:
    """Start this process again as ``python -m evovlm.launch WORDS`` if it wants the settings; otherwise return."""
    if wants_heap(words, os.environ):
        os.environ[VARIABLE] = KEEP
        os.execv(sys.executable, [sys.executable, "-m", "evovlm.launch", *words])
