"""Writes and submits SLURM jobs: one torchrun on each node, started by srun.

    recipe + Job ──► `render` ──► script ──► `submit` ──► sbatch ──► job 42
                        ▲                       └─► RUN/logs/42.sbatch      the script that ran
            templates/train.sbatch                  RUN/logs/42.txt         what the job printed
                                                    RUN/logs/42/node*/…     what each rank printed

A script is made of plain text substitution: words of the shell are quoted for bash, values of ``#SBATCH`` lines for
sbatch, whose quoting rules are others.
"""

import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TEMPLATE = Path(__file__).parent / "templates" / "train.sbatch"
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+=\[\]-]*")
_JOB_ID = re.compile(r"(\d+)(;.*)?\s*")
_OWN_OPTIONS = ("nodes", "cpus-per-task", "gpus-per-node", "time", "partition", "account", "job-name")
_TAKEN = ("ntasks", "ntasks-per-node", "array", "chdir", "output", "open-mode", "parsable", "wrap")
_SHORT_NAMES = {"N": "nodes", "c": "cpus-per-task", "t": "time", "p": "partition", "A": "account", "J": "job-name"}


class SlurmError(ValueError):
    """A job that cannot be written or submitted."""


class _Template(string.Template):
    delimiter = "@@"  # "$" and a single "@" belong to the shell


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of SLURM.

    Attributes:
        nodes: nodes of the job.
        ranks_per_node: processes on each node, one to a GPU where there are any.
        cpus_per_task: cores for all ranks of a node together; SLURM's "task" is the node's torchrun.
        gpus_per_node: GPUs of each node; 0 asks for none.
        name: the job's name.
        time: time limit in one of SLURM's forms, such as ``1-00:00:00``; None leaves it to the partition.
        partition: where to run; None leaves it to the cluster.
        account: who pays; None leaves it to the cluster.
        options: further options of sbatch, long name to value; an empty value stands for an option without one.
    """

    nodes: int
    ranks_per_node: int
    cpus_per_task: int
    gpus_per_node: int = 0
    name: str
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    options: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise SlurmError(
                f"{self.ranks_per_node} ranks per node on {self.gpus_per_node} GPUs per node; a rank needs a GPU of "
                f"its own: choose --ranks-per-node of at most {self.gpus_per_node}, or leave it out"
            )

    @property
    def threads(self) -> int:
        """Threads of each rank, so that a node's ranks share its cores evenly."""
        return max(1, self.cpus_per_task // self.ranks_per_node)


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """Parse words ``KEY=VALUE``, or ``KEY`` for an option without a value, into options of sbatch.

    Raises:
        SlurmError: A key is no long option's name, is given twice, or is one that evovlm sets.
    """
    options: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        key = key.removeprefix("--").removeprefix("-")
        key = _SHORT_NAMES.get(key, key)
        if key in _OWN_OPTIONS:
            raise SlurmError(f"--sbatch {word}: evovlm submit has an option for it: --{key}")
        if key in _TAKEN:
            raise SlurmError(f"--sbatch {word}: evovlm sets '{key}' itself; a job of another form needs its own script")
        if not _OPTION.fullmatch(key) or len(key) == 1:
            raise SlurmError(f"--sbatch {word}: expected a long option of sbatch, such as --sbatch mem=0")
        if key in options:
            raise SlurmError(f"--sbatch {word}: '{key}' is given twice")
        options[key] = value
    return options


def render(job: Job, run: Path, recipe: str, overrides: Sequence[str], *, python: str = sys.executable) -> str:
    """Write the script of a job that trains ``recipe``.

    Args:
        job: What is asked of SLURM.
        run: The run's folder; the job's logs go below it.
        recipe: A recipe's file, or the name of one of evovlm's own.
        overrides: Words of the command line, laid over the recipe.
        python: The interpreter that runs on the nodes.

    Raises:
        SlurmError: A value holds a line break or another control character, or the run's folder a backslash.
    """
    here = Path.cwd()
    logs = here / run / "logs"
    if "\\" in str(logs):  # in a file name it makes sbatch leave %j as it stands
        raise SlurmError(f"{logs} holds a backslash, which SLURM gives a meaning of its own; choose another folder")
    file = here / recipe
    asked = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cpus_per_task),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "chdir": str(here),
        "output": str(logs).replace("%", "%%") + "/%j.txt",
        "open-mode": "append",
        **job.options,
    }
    train = ["train", str(file) if file.is_file() else recipe, *overrides]
    return _Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        directives="\n".join(_directive(key, value) for key, value in asked.items() if value is not None),
        python=_shell(python),
        train=" ".join(map(_shell, train)),
        logs=_shell(str(logs)),
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        cpus_per_task=job.cpus_per_task,
        threads=job.threads,
    )


def submit(script: str, run: Path) -> int:
    """Hand a script to sbatch, keep it in the run's folder, and return the job's number.

    Raises:
        SlurmError: There is no sbatch on this machine, or it refuses the job; the message is sbatch's.
    """
    sbatch = find_sbatch()
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # SLURM makes no folders: a job without it would vanish without a word
    done = subprocess.run([sbatch, "--parsable"], input=script, capture_output=True, text=True, check=False)
    match = _JOB_ID.fullmatch(done.stdout)
    if done.returncode or match is None:
        said = done.stderr.strip() or done.stdout.strip() or "no message"
        raise SlurmError(f"sbatch refuses the job (exit code {done.returncode}): {said}")
    number = int(match[1])
    (logs / f"{number}.sbatch").write_text(script, encoding="utf-8")
    return number


def find_sbatch() -> str:
    """Return the path of sbatch.

    Raises:
        SlurmError: It is not on this machine.
    """
    if (found := shutil.which("sbatch")) is None:
        raise SlurmError(
            "there is no sbatch on this machine: submit where SLURM's commands are, or see the script with --print"
        )
    return found


def _shell(word: str) -> str:
    _check(word)
    return shlex.quote(word)


def _directive(key: str, value: str) -> str:
    """Write one ``#SBATCH`` line; sbatch takes double quotes, and backslashes inside them."""
    _check(value)
    if not value:
        return f"#SBATCH --{key}"
    if not _PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{key}={value}"


def _check(value: str) -> None:
    """Refuse what could end a line of the script."""
    if not value.isprintable():
        raise SlurmError(f"{value!r} holds a line break or another control character, which a job script cannot hold")
