"""A process that compares mathematical expressions: ``python -m evovlm.data.answers.latex_worker SETTINGS``.

    {"prediction": …, "truth": …} on a line of standard input ──math-verify──► true or false, on standard output

It is started by ``latex.py``. What it compares was written by a model and may take for ever (``9^{9^{9}}``), also
inside one call of C code that no exception can interrupt; so before each comparison the process sets a limit to its own
processor time, and the system ends it there. It ends when its input does.
"""

import json
import logging
import resource
import sys
from typing import NamedTuple


class WorkerSettings(NamedTuple):
    """What the process is started with, as JSON.

    Attributes:
        cpu_seconds: Processor time of one comparison.
        memory_bytes: Address space of the process.
    """

    cpu_seconds: int
    memory_bytes: int


def main() -> None:
    """Answer until the input ends."""
    settings = WorkerSettings(*json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))
    logging.disable()  # math-verify would warn that its own time limits are off
    # Imported under the limits, so that they hold for it, too.
    from math_verify import parse, verify

    def boxed(text: str) -> list[object]:
        return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None))

    for line in sys.stdin:
        limit_cpu_time(settings.cpu_seconds)
        question = json.loads(line)
        try:
            same = verify(boxed(question["truth"]), boxed(question["prediction"]), timeout_seconds=None)
        except (MemoryError, RecursionError):
            same = False
        sys.stdout.write(f"{json.dumps(bool(same))}\n")
        sys.stdout.flush()


def limit_cpu_time(seconds: int) -> None:
    """Have the system end this process once it has used so much more processor time, rounded up to seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


if __name__ == "__main__":
    main()
