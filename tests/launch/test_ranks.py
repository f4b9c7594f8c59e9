"""A process knows its rank; ``start_ranks`` starts processes that reduce together, and shows the first error once."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from evovlm.launch.ranks import RankInfo, RankVariablesError, process_group

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_without_a_launcher_a_process_is_a_run_of_its_own() -> None:
    assert RankInfo.from_environment({}) == RankInfo(0, 1, 0, 1, launched=False)


def test_torchrun_environment() -> None:
    assert RankInfo.from_environment(TORCHRUN) == RankInfo(3, 4, 1, 2, launched=True)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_environment_names_what_is_missing(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(RankVariablesError, match=f"{name} is not set"):
        RankInfo.from_environment(environ)


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "9"}])
def test_contradicting_environment(change: dict[str, str]) -> None:
    with pytest.raises(RankVariablesError, match=next(iter(change.values()))):
        RankInfo.from_environment(TORCHRUN | change)


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist, typer
from evovlm.launch import cli
from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.settings import SettingsError

def work(rank: int) -> None:
    {work}

@cli.app.command()
def probe(context: typer.Context, ranks: int = 2) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    me = cli.as_rank(ranks, 1, context.obj)
    if me is None:
        assert signal.getsignal(signal.SIGTERM) is handler
        print("all done")
        return
    with process_group(me, "cpu", timeout=20) as world:
        total = torch.full((), float(world.rank + 1))
        dist.all_reduce(total)
        Path(f"sum{{world.rank}}").write_text(f"{{total.item()}} {{os.environ['OMP_NUM_THREADS']}}")
        print(f"shown by rank {{world.rank}}", flush=True)
        work(world.rank)
        dist.barrier()

if __name__ == "__main__":
    sys.exit(cli.main())
"""


def start(folder: Path, work: str, ranks: int = 2) -> subprocess.Popen[str]:
    """Start PROGRAM as the ``evovlm`` command: the ranks' ``-m evovlm.launch`` finds it through a sitecustomize."""
    program = folder / "probe.py"
    program.write_text(PROGRAM.format(work=textwrap.indent(textwrap.dedent(work), "    ").strip()))
    # The agent starts `python -m evovlm.launch probe …`, which knows no `probe`: add it when the cli is imported there.
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'TORCHELASTIC_ERROR_FILE' in os.environ and '-m' in sys.orig_argv:\n"
        f"    import runpy; runpy.run_path({str(program)!r}, run_name='probe')\n"
    )
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, str(program), "probe", "--ranks", str(ranks)],
        cwd=folder,
        env=environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(folder: Path, work: str) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM to its end."""
    process = start(folder, work)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_ranks_reduce_and_share_the_cores(tmp_path: Path) -> None:
    done = launch(tmp_path, "pass")
    assert done.returncode == 0, done.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"sum{rank}").read_text() for rank in (0, 1)] == [f"3.0 {threads}"] * 2
    assert "shown by rank 0" in done.stdout
    assert "shown by rank 1" not in done.stdout
    assert "all done" in done.stdout


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        ("if rank == 1: raise RuntimeError('tile 7 is odd')", 1, "evovlm: rank 1: RuntimeError: tile 7 is odd"),
        ("if rank == 1: raise SettingsError(['steps are missing'])", 2, "evovlm: rank 1: steps are missing"),
        ("if rank == 1: os.kill(os.getpid(), 9)", 1, "evovlm: rank 1: the process was ended by SIGKILL"),
    ],
)
def test_a_failing_rank_ends_the_run_and_is_named_once(tmp_path: Path, work: str, code: int, line: str) -> None:
    done = launch(tmp_path, work)
    assert done.returncode == code, done.stderr
    assert sum(text.startswith(line) for text in done.stderr.splitlines()) == 1, done.stderr
    assert "rank 0:" not in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert "terminate called" not in done.stderr
    assert done.stderr.count("Traceback") == (1 if "RuntimeError" in work else 0), done.stderr
    assert "all done" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_takes_its_ranks_with_it(tmp_path: Path, number: signal.Signals) -> None:
    work = "Path(f'pid{rank}').write_text(str(os.getpid())); import time; time.sleep(60 * rank)"
    process = start(tmp_path, work)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid0").exists() and (tmp_path / "pid1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # until the last rank has closed what it shares with the process
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert err.strip() == "evovlm: ended by SIGTERM"
    for rank in (0, 1):
        pid = int((tmp_path / f"pid{rank}").read_text())
        while _runs(pid):  # orphans are left for init to collect
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has collected yet has."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_of_its_own_has_a_process_group_of_one() -> None:
    with process_group(RankInfo(), "cpu", timeout=20) as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert world.sum([2.5]) == [2.5]
    assert not dist.is_initialized()
