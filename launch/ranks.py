"""Starts the ranks of a run on this machine, and tells each process which rank it is.

    evovlm train r.toml --ranks 2
      └─ torch's elastic agent ─┬─► evovlm train r.toml --ranks 2   RANK=0: shows its output here
                                └─► evovlm train r.toml --ranks 2   RANK=1: writes it to a file of its own
                                        └─ `process_group` ──► World(rank, size, device)

Under `torchrun`, or any launcher that sets the same variables, a process is already a rank and nothing is started.
The variables are read here and nowhere else. A rank that fails leaves its error in the file that the agent names;
the agent ends the other ranks, and the error that came first is shown once. Ranks on other nodes, which this agent
cannot end, learn from a roll call which rank it was (:mod:`evovlm.launch.roll_call`).
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evovlm.launch.orphans import named_starter

if TYPE_CHECKING:  # torch takes a second to import; the command line's help must not wait for it
    from evovlm.parallel.world import World

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PROGRAM_FAULTS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class RankError(RuntimeError):
    """A rank of a run failed.

    Attributes:
        rank: the rank whose error came first.
        exit_code: what the command shall end with: 2 for a user's mistake, else 1.
        details: the rank's traceback, or the end of its output when it was killed.
    """

    def __init__(self, rank: int, message: str, exit_code: int, details: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
        self.details = details


class RunInterrupted(RuntimeError):  # noqa: N818 - not an error: somebody wanted it
    """The run was ended from outside, all ranks with it.

    Attributes:
        signal: by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = number


class RankVariablesError(ValueError):
    """The launcher's environment variables are incomplete or contradict each other."""


@dataclass(frozen=True)
class RankInfo:
    """Which rank this process is, as its launcher says.

    Attributes:
        rank: from 0.
        world_size: R, ranks in the run.
        local_rank: from 0 on each node; numbers the node's accelerators.
        local_world_size: ranks on this node.
        launched: whether a launcher started this process as one rank of a run.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "RankInfo":
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

        Without any of ``RANK`` and ``WORLD_SIZE`` the process is a run of its own.

        Raises:
            RankVariablesError: Some are there and some are missing, are no number, or are out of range.
        """
        environ = os.environ if environ is None else environ
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls()
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in environ]
        if missing:
            raise RankVariablesError(
                f"the environment looks like that of a launcher such as torchrun, but {', '.join(missing)} "
                "is not set; start with torchrun, or unset RANK and WORLD_SIZE"
            )
        rank, world_size, local_rank = (_number(environ, name) for name in needed[:3])
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else local_rank + 1
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
            raise RankVariablesError(
                f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world_size} "
                "do not fit together"
            )
        return cls(rank, world_size, local_rank, local_world_size, launched=True)


@contextlib.contextmanager
def process_group(
    ranks: RankInfo, device_type: str = "auto", timeout: float = 1800.0, patience: float = 10.0
) -> "Iterator[World]":
    """Join the run's default process group and leave it after the block.

    Args:
        ranks: This process among those of the run.
        device_type: ``"cpu"`` (gloo), ``"cuda"`` (NCCL, with gloo for CPU tensors), or ``"auto"``: CUDA where it is.
        timeout: Seconds after which a collective that a rank never joins is an error.
        patience: When a rank has failed, seconds in which another that still lives must answer.

    Yields:
        This process's rank, the number of ranks and its device; on CUDA, GPU ``local_rank`` is made current.

    Raises:
        RankVariablesError: CUDA is asked for and this node has fewer GPUs than ranks.
        PeerFailedError: The block failed because another rank died or failed before; the message names that rank.
    """
    import torch
    import torch.distributed as dist

    from evovlm.launch.roll_call import RollCall
    from evovlm.parallel.world import World

    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cpu")
    backend = "gloo"
    if device_type == "cuda":
        if torch.cuda.device_count() < ranks.local_world_size:
            raise RankVariablesError(
                f"{ranks.local_world_size} ranks on this node, but torch sees {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # Without a launcher the store is this process's own. With one, it is found as torch itself would.
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # documented, not in its stubs
    roll_call = None
    if ranks.launched:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=timeout))
        roll_call = RollCall(store, ranks.rank, ranks.world_size, patience=patience, end=_end_after)
    try:
        dist.init_process_group(
            backend,
            rank=ranks.rank,
            world_size=ranks.world_size,
            store=dist.PrefixStore("default_pg", store),  # type: ignore[attr-defined]
            timeout=timedelta(seconds=timeout),
        )
        yield World(ranks.rank, ranks.world_size, device)
        # Only after success: a rank that leaves the group early makes its peers fail first, with a lesser error.
        dist.barrier()
    except Exception as error:
        cause = None if roll_call is None else roll_call.explain(error)
        if cause is None:
            raise
        raise cause from error
    if not ranks.launched:  # a launched rank ends without tear-down, see `leave`
        dist.destroy_process_group()


def start_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Run ``evovlm ARGUMENTS`` as ``num_ranks`` ranks on this machine and wait for all of them.

    Rank 0 writes to this process's standard output; every other rank to files that are shown only when it is killed.
    The cores are shared out evenly (``OMP_NUM_THREADS``), unless the user has set that variable.

    Raises:
        RankError: A rank failed; the others have been ended.
        RunInterrupted: This process was told to end; the ranks have been told, too.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_agent()
    _set_threads(num_ranks)
    logs = Path(tempfile.mkdtemp(prefix="evovlm-ranks-"))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=logs.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # the host's own name need not resolve on a laptop
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, num_ranks), Std.ALL)),
    )
    handlers = {number: signal.getsignal(number) for number in _AGENT_SIGNALS}
    try:
        with named_starter():
            elastic_launch(config, sys.executable)("-m", "evovlm.launch", *arguments)
    except ChildFailedError as error:
        raise _first_failure(error.failures, logs) from None
    except SignalException as error:
        raise RunInterrupted(error.sigval) from None
    finally:
        shutil.rmtree(logs, ignore_errors=True)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # the agent leaves its own behind


def leave_error(error: BaseException, exit_code: int) -> None:
    """Leave ``error`` for the agent that started this rank and end the process; do nothing if there is no agent.

    The process ends without Python's tear-down: a process group whose peers wait in a collective aborts in it, and
    what it then prints hides the error.
    """
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        return
    from evovlm.launch.roll_call import PeerFailedError

    text = "".join(traceback.format_exception(error))
    message = str(error) if exit_code == 2 else "".join(traceback.format_exception_only(error)).strip()
    # torch's agent reads "timestamp" in whole seconds, too coarse to tell cause from consequence.
    extra = {"py_callstack": text, "timestamp": str(int(time.time())), "time": time.time()}
    extra["consequence"] = isinstance(error, PeerFailedError)
    Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    _end(exit_code)


def leave(exit_code: int) -> None:
    """End this process at once if a launcher started it as a rank; otherwise do nothing.

    Threads of gloo that outlive their process group now and then abort a process in Python's tear-down, after all its
    work is done and written.
    """
    if RankInfo.from_environment().launched:
        _end(exit_code)


def _end_after(error: BaseException) -> None:
    """End this process with an error from any thread, whatever the main thread is at."""
    sys.stderr.write(f"evovlm: {error}\n")
    leave_error(error, 1)
    _end(1)


def _end(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise RankVariablesError(f"{name}={environ[name]!r} is not a number") from None


def _set_threads(num_ranks: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))


def _silence_agent() -> None:
    """Keep the agent from logging each failure in its own form, beside ours; each of its loggers has its own level."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.distributed.elastic") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL)


def _first_failure(failures: Mapping[int, Any], logs: Path) -> RankError:
    """Pick the cause among torch's ``ProcessFailure`` of several ranks; the rest are its consequences.

    A rank that the system killed says nothing, and its peers' "connection closed" comes first: so killed ranks go
    before exceptions, exceptions by time before other exits, then those that name another rank as their cause, and the
    ranks that the agent itself ended go last.
    """

    def order(item: tuple[int, Any]) -> tuple[int, float]:
        failure = item[1]
        if -failure.exitcode in _PROGRAM_FAULTS:
            return 0, failure.timestamp
        if isinstance(failure.message, dict):
            extra = failure.message["extraInfo"]
            return 3 if extra.get("consequence") else 1, extra.get("time", failure.timestamp)
        return 4 if failure.exitcode == -signal.SIGTERM else 2, failure.timestamp

    rank, failure = min(failures.items(), key=order)
    if isinstance(failure.message, dict):
        details = failure.message["extraInfo"]["py_callstack"]
        return RankError(rank, failure.message["message"], max(1, failure.exitcode), details)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; was the machine short of memory?" if name == "SIGKILL" else ""
        message = f"the process was ended by {name}{hint}"
    else:
        message = f"the process ended with exit code {failure.exitcode}"
    outputs = sorted(logs.rglob(f"{rank}/std*.log"))
    tail = "".join("".join(file.read_text(errors="replace").splitlines(keepends=True)[-20:]) for file in outputs)
    return RankError(rank, message, max(1, failure.exitcode), tail)
