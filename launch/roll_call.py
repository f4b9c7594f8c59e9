"""Finds out which rank of a run failed first or died, and ends the others with an error that names it.

    rank 0   … all_reduce ✗ "connection closed" ─► alarm, who answers? ─► PeerFailedError: rank 2 (node1) does not …
    rank 1   … all_reduce, hangs                   └► listener: here!   ─► still there after a while? ends likewise
    rank 2   … killed                                 (no answer)

Ranks talk through the key-value store by which they met, which needs no collective. On each rank a thread waits for
the alarm and does nothing else; until a rank fails, nothing is sent.
"""

import platform
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL = 0.05  # seconds between looks at who has answered


Store = Any
"""One of torch's key-value stores; its stubs lack half of what is documented."""


class PeerFailedError(RuntimeError):
    """Another rank failed or died, and this one cannot go on; the message names that rank and its node."""


class RollCall:
    """One rank's part in the roll call.

    Args:
        store: The run's store; keys are ``roll_call/…``.
        rank: This rank.
        size: R, ranks in the run.
        patience: Seconds in which a rank that lives must answer.
        end: Ends this process with an error. Called from the listening thread, if the main thread has not ended the
            process by itself in twice ``patience`` after the alarm: it hangs in a collective.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, patience: float, end: Callable[[PeerFailedError], object]
    ) -> None:
        self._store: Store = dist.PrefixStore("roll_call", store)  # type: ignore[attr-defined]
        self._rank, self._size, self._patience, self._end = rank, size, patience, end
        self._store.set(f"node/{rank}", platform.node())
        threading.Thread(target=self._listen, daemon=True).start()

    def explain(self, error: Exception) -> PeerFailedError | None:
        """Tell the other ranks that this one has failed; say whether another rank is the cause.

        Args:
            error: What this rank failed with.

        Returns:
            An error that names the rank that died, or else the rank that failed before this one. None if this rank
            failed first, with an error that no collective raises, or if the store itself is out of reach.
        """
        try:
            if self._store.add("failures", 1) == 1:
                self._store.set("first", f"{self._rank}")
            summary = (str(error).strip() or "no message").splitlines()[0]
            self._store.set(f"failed/{self._rank}", f"{type(error).__name__}: {summary}")
            self._store.set(f"here/{self._rank}", "")
            self._store.set("alarm", "")
            # Collectives raise RuntimeError (gloo) or kinds of DistError (NCCL, store); all else is this rank's own.
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                return None
            return self._cause(self._store)
        except dist.DistError:
            return None

    def _cause(self, store: Store) -> PeerFailedError | None:
        """Wait for all ranks' answers; name those that died, or the one that failed first if that is another."""
        deadline = time.monotonic() + self._patience
        keys = [f"here/{rank}" for rank in range(self._size)]
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL)
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if silent:
            named = ", ".join(f"rank {rank} ({_text(store, f'node/{rank}')})" for rank in silent[:8])
            more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
            verb, whose = ("does", "its") if len(silent) == 1 else ("do", "their")
            return PeerFailedError(
                f"{named}{more} {verb} not answer within {self._patience:g} s: {whose} process has died, or {whose} "
                f"node cannot be reached; look at {whose} output, and for a lack of memory there"
            )
        first = int(_text(store, "first"))
        if first == self._rank:
            return None
        node, failure = _text(store, f"node/{first}"), _text(store, f"failed/{first}")
        return PeerFailedError(f"rank {first} ({node}) failed: {failure}")

    def _listen(self) -> None:
        try:
            store = self._store.clone()  # a connection of its own: one that waits blocks all others who use it
            store.wait(["alarm"], timedelta(days=365))
            store.set(f"here/{self._rank}", "")
            time.sleep(2 * self._patience)
            cause = self._cause(store)
        except dist.DistError:  # the store is gone, and with it the run
            return
        if cause is not None:
            self._end(cause)


def _text(store: Store, key: str) -> str:
    return str(store.get(key).decode())
