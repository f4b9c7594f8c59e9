"""Ranks end with the process that started them, also when that is killed and can end nobody.

evovlm … --ranks N   writes its number into the environment ─► rank: asks the kernel for SIGTERM when that process dies

A training run takes the signal as it always does: it saves first. Linux alone offers this; elsewhere nothing is done.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STARTER = "EVOVLM_STARTER"
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@contextmanager
def named_starter() -> Iterator[None]:
    """Tell the ranks that are started in the block who starts them."""
    os.environ[_STARTER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_STARTER]


def end_with_starter() -> None:
    """Let this rank be told to end when the process that started it dies; nothing if that said no name."""
    starter = os.environ.pop(_STARTER, None)  # not for what a rank starts itself
    if starter is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(starter):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
