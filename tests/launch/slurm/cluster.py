"""A real SLURM of several nodes on this machine, for as long as a ``with`` block lasts.

    munged ── slurmctld ─┬─ slurmd -N n1        all in the foreground, as children of this process: each is ended by
                         └─ slurmd -N n2        its own process id, and whatever they write lies in one folder

It needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. Another SLURM beside it is left alone.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "setpriv")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
ReturnToService=2
KillWait=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP
"""


def why_not() -> str | None:
    """Say what keeps a cluster from starting here; None if nothing does."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"SLURM is not installed here: there is no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """Nodes n1, n2, … of 64 pretended cores each; use as a context manager.

    Args:
        folder: Where configuration, state and logs go; short, since a socket lies in it.
        num_nodes: How many.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        host = socket.gethostname().split(".")[0]
        with _free_ports(1 + len(self.names)) as (controller_port, *ports):
            nodes = "\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 State=UNKNOWN"
                for name, port in zip(self.names, ports, strict=True)
            )
        conf = _CONF.format(host=host, folder=self.folder, controller_port=controller_port, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        try:
            self._start_daemons()
        except BaseException:
            self._end_daemons()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_daemons()

    def ask(self, *command: str) -> str:
        """Run one of SLURM's commands on this cluster and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def wait_for(self, job: int, seconds: float) -> str:
        """Wait until a job has ended and return its state."""
        deadline = time.monotonic() + seconds
        while True:
            words = self.ask("scontrol", "--oneliner", "show", "job", str(job)).split()
            state = next(word.partition("=")[2] for word in words if word.startswith("JobState="))
            if state in _ENDED:
                return state
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds:.0f} s: {' '.join(words)}"
            time.sleep(0.2)

    def _start_daemons(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.socket", "log-file": "munged.log"}
        files |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
        # --force: the folder is not among those that munged knows, and only root can reach it.
        self._start(
            "munged", "--foreground", "--force", *(f"--{key}={self.folder / file}" for key, file in files.items())
        )
        self._start("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for name in self.names:
            self._start("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", name)
        deadline = time.monotonic() + 60
        while self._num_idle() < len(self.names):
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not ended, f"{ended} ended:\n{self._logs()}"
            assert time.monotonic() < deadline, f"the nodes are not idle after 60 s:\n{self._logs()}"
            time.sleep(0.1)

    def _num_idle(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--states=idle", "--format=%D"],
            env={**self.environment, "SLURM_TIMEOUT": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        return sum(int(word) for word in done.stdout.split())

    def _start(self, program: str, *arguments: str) -> None:
        path = _find(program)
        assert path is not None
        with (self.folder / "daemons.txt").open("ab") as output:
            # A test process that is killed cannot end its daemons: the system does it then.
            command = ["setpriv", "--pdeathsig", "TERM", path, *arguments]
            daemon = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        self.daemons.append(daemon)

    def _end_daemons(self) -> None:
        if any(daemon.poll() is None for daemon in self.daemons[1:]):
            with contextlib.suppress(AssertionError):
                self.ask("scancel", "--user=root")
                self._wait_until_free()
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _wait_until_free(self) -> None:
        """Wait until no process of a job is left: a daemon's end does not end them."""
        deadline = time.monotonic() + 15
        while self._num_idle() < len(self.names) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _logs(self) -> str:
        files = [*sorted(self.folder.glob("*.log")), self.folder / "daemons.txt"]
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def _find(program: str) -> str | None:
    """Find a program; those of daemons are not on every user's path."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nothing listens on; all are different, since they are held together for a moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]
