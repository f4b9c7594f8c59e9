"""Scorer for mathematics: two expressions are equal if math-verify says so, in a process of its own.

    "\\frac{1}{2}", ["0.5"] ─► cheap rules (equal text, numbers) ─► math-verify, in ``latex_worker`` ─► 0.0 or 1.0

Math-verify's own time limits set the alarm signal of the process: they fail outside the main thread, disturb others who
use the signal, and cannot end what hangs in C code. So the comparison runs without them in a process that the system
ends when it has used its processor time; the next comparison then starts another.
"""

import contextlib
import importlib.util
import json
import logging
import re
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from evovlm.data.answers.latex_worker import WorkerSettings
from evovlm.data.answers.numeric import parse_number
from evovlm.data.answers.text import exact_match, normalize

_log = logging.getLogger(__name__)
_LONGEST = 2000
_PLAIN_WORDS = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL = re.compile(r"[\d\\+*/=^_<>{}|()\[\]-]")


class LatexScorer:
    """Scores 1 if the prediction is mathematically equal to one of the truths, else 0.

    Official definition: ``math_verify.verify(parse(truth), parse(prediction))``, both put into ``\\boxed{…}``. Texts
    without any digit or sign that have a word of three letters are compared as texts: math-verify would take a word for
    a product of its letters. May be called from any thread; use it in a ``with``, or call ``close``.

    Args:
        cpu_seconds: Processor time for one comparison; one that takes more counts as not equal.
        wall_seconds: Time after which a process that gives no answer, for whatever reason, is ended.
        memory_bytes: Address space of the process.

    Raises:
        ValueError: Math-verify is not installed.
    """

    def __init__(self, *, cpu_seconds: int = 5, wall_seconds: float = 300.0, memory_bytes: int = 4 << 30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("comparing LaTeX needs math-verify, which is not installed: pip install math-verify")
        self._settings = WorkerSettings(cpu_seconds, memory_bytes)
        self._wall_seconds = wall_seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self.num_given_up = 0

    def __call__(self, prediction: str, truths: Sequence[str]) -> float:
        """Score a prediction."""
        return float(any(self._equal(prediction, truth) for truth in truths))

    def __enter__(self) -> "LatexScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a later call would start another."""
        with self._lock:
            self._end()

    def _equal(self, prediction: str, truth: str) -> bool:
        if exact_match(prediction, [truth]):
            return True
        given, wanted = parse_number(prediction), parse_number(truth)
        if given is not None and given == wanted:
            return True
        texts = normalize(prediction), normalize(truth)
        if not all(texts) or any(_PLAIN_WORDS.search(text) and not _MATHEMATICAL.search(text) for text in texts):
            return False
        if max(len(prediction), len(truth)) > _LONGEST:
            return False
        with self._lock:
            return self._ask({"prediction": prediction, "truth": truth})

    def _ask(self, question: dict[str, Any]) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{json.dumps(question)}\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self._wall_seconds)
            answer = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            answer = ""
        if answer:
            return bool(json.loads(answer))
        self._end()
        self.num_given_up += 1
        _log.warning("gave up comparing %r with %r", question["prediction"][:80], question["truth"][:80])
        return False

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evovlm.data.answers.latex_worker", json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a question that the process did not live to read
                if pipe is not None:
                    pipe.close()
