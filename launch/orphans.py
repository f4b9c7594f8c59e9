"""Ranks end with the process that started them, also when that is killed and can end nobody.

evovlm … --ranks N   writes its number into the environment ─► rank: a thread sees its parent change, and sends SIGTERM

A training run takes the signal as it always does: it saves first. The kernel could send it (PR_SET_PDEATHSIG), but to a
process of many threads it was seen to come several times, and a second signal ends a run without saving.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_STARTER = "EVOVLM_STARTER"
_SECONDS = 1.0  # between looks


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
    if starter is not None:
        threading.Thread(target=_watch, args=(int(starter),), daemon=True, name="starter").start()


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
