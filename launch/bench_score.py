"""Scoring N candidate solutions of questions with images: our critic beside transformers on the same weights.

    questions, weights (``bench_score_task``) ─┬─► ours: shared prefixes, packs         (``bench_score_ours``)
                                               └─► transformers, in several ways        (``bench_score_peer``)
                                                                │ in turn
    candidates/s, ratio_vs_transformers ◄───────────────────────┤
    scores equal to 1e-4, or an error ◄─────────────────────────┤
    each of our ideas off in turn ◄─────────────────────────────┘

One process with all of its threads, float32. Our time includes rendering and decoding of images; transformers is given
ids and tiles. In the first round its batches are tried at each size, and the fastest goes on.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evovlm.engine.step_scores import Critic, open_critic
from evovlm.launch.bench_score_ours import SWITCHES, render, switched_scores, timed_scores
from evovlm.launch.bench_score_peer import Peer, Way
from evovlm.launch.bench_score_task import Task, make_questions, write_critic
from evovlm.launch.ranks import num_cores
from evovlm.launch.report import make_report
from evovlm.models.table import num_parameters

TOLERANCE = 1e-4
ONE, ONE_HEAD = "one forward a candidate", "head on decisions only"
BATCH, BATCH_TILES, CACHED = "batches", "batches, tiles once", "tiles and prefix once"
"""transformers' ways."""

Scores = list[list[float]]


@dataclass(frozen=True)
class Settings:
    """How the sides are compared.

    Attributes:
        repetitions: How often each way is timed.
        batches: Candidates of a batch of transformers' among which the fastest is chosen.
    """

    repetitions: int = 2
    batches: tuple[int, ...] = (2, 4, 8)

    def ways(self, num_candidates: int) -> dict[str, list[Way]]:
        """transformers' ways by name, each with the batch sizes that are tried."""
        sizes = sorted({min(size, num_candidates) for size in self.batches})
        return {
            ONE: [Way(all_rows=True)],
            ONE_HEAD: [Way()],
            BATCH: [Way(size) for size in sizes],
            BATCH_TILES: [Way(size, "tiles") for size in sizes],
            CACHED: [Way(size, "prefix") for size in sizes],
        }


def measure(task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Score all questions in every way.

    Args:
        task: Critic and questions.
        settings: How the sides are compared.

    Returns:
        ``ours``, ``transformers`` by name of the way, and ``split`` by name of what is off: each with ``seconds``, the
        fewest, and ``candidates_per_second``; of transformers' also the ``batch`` that was best, of the split also
        ``gain``, its seconds over those with everything on. ``ratio_vs_transformers``: seconds of the faster of its
        two ways of one forward a candidate over ours; ``ratio_vs_transformers_batched``: of the best of its batches,
        tiles and prefix again for each candidate; ``ratio_vs_transformers_best``: of its fastest way of all.
        ``agreement``: the largest difference of any step's score, and the range of all scores. Sizes.

    Raises:
        RuntimeError: The sides, or our ways, do not score the same.
    """
    task, settings = task or Task(), settings or Settings()
    with tempfile.TemporaryDirectory() as folder, _all_threads():
        directory = write_critic(Path(folder), task)
        sets = make_questions(Path(folder, "images"), task)
        critic = open_critic(directory)
        questions = render(critic, sets)
        peer = Peer(directory, critic.prompts.signs, questions)
        _, expected = timed_scores(critic, sets)  # also warms up
        check = _Agreement(expected)
        num_candidates = sum(len(made.candidates) for made in sets)
        least = _race(critic, sets, peer, settings, task.num_candidates, check)
        without = _split(critic, questions, settings.repetitions, check)

    def summary(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "candidates_per_second": num_candidates / seconds}

    ours = least["ours"][1]
    one = min(least[ONE][1], least[ONE_HEAD][1])
    theirs = {name: summary(seconds) | {"batch": batch} for name, (batch, seconds) in least.items() if name != "ours"}
    return {
        "ours": summary(ours),
        "transformers": theirs,
        "split": {name: summary(value) | {"gain": value / without["evovlm"]} for name, value in without.items()},
        "ratio_vs_transformers": one / ours,
        "ratio_vs_transformers_batched": least[BATCH][1] / ours,
        "ratio_vs_transformers_best": min(way["seconds"] for way in theirs.values()) / ours,
        "agreement": {"largest_difference": check.largest, "range": check.range},
        "parameters": num_parameters(task.model)["total"],
        "questions": task.num_questions,
        "candidates": task.num_candidates,
        "tiles": sum(len(question.prefix.tiles) for question in questions),
        "prefix_tokens": sum(len(question.prefix.tokens) for question in questions),
        "candidate_tokens": sum(len(branch) for question in questions for branch in question.branches),
        "steps": sum(map(len, expected)),
        "threads": num_cores(),
        "repetitions": settings.repetitions,
        "peer_version": version("transformers"),
    }


class _Agreement:
    """Makes sure that every way gives the same scores, and scores that could differ."""

    def __init__(self, expected: Scores) -> None:
        self._expected = [score for scores in expected for score in scores]
        self.range = max(self._expected) - min(self._expected)
        self.largest = 0.0

    def check(self, name: str, found: Scores) -> None:
        flat = [score for scores in found for score in scores]
        error = max(abs(a - b) for a, b in zip(flat, self._expected, strict=True))
        self.largest = max(self.largest, error)
        if not error <= TOLERANCE or not self.range > 10 * TOLERANCE:
            raise RuntimeError(
                f"bench score: '{name}' differs from the critic by up to {error:.2g} in a step's score (at most "
                f"{TOLERANCE:g} is allowed; all scores lie within {self.range:.2g}), so the sides do not score the same"
            )


def _race(
    critic: Critic, sets: Sequence[Any], peer: Peer, settings: Settings, num_candidates: int, check: _Agreement
) -> dict[str, tuple[int, float]]:
    """Time our critic and transformers' ways in turn; returns the best batch and fewest seconds of each."""
    least: dict[str, tuple[int, float]] = {}
    ways = settings.ways(num_candidates)
    for _ in range(settings.repetitions):
        seconds, found = timed_scores(critic, sets)
        check.check("evovlm", found)
        least["ours"] = min(least.get("ours", (0, math.inf)), (0, seconds), key=lambda one: one[1])
        for name, tried in ways.items():
            for way in tried if name not in least else [one for one in tried if one.batch == least[name][0]]:
                began = time.perf_counter()
                found = peer.scores(way)
                seconds = time.perf_counter() - began
                check.check(f"transformers, {name}, {way.batch} at a time", found)
                least[name] = min(least.get(name, (0, math.inf)), (way.batch, seconds), key=lambda one: one[1])
    return least


def _split(critic: Critic, questions: Sequence[Any], repetitions: int, check: _Agreement) -> dict[str, float]:
    """Time our ways with ideas off, in turn, from rendered questions; returns the fewest seconds of each."""
    least = dict.fromkeys(SWITCHES, math.inf)
    for _ in range(repetitions):
        for name, switches in SWITCHES.items():
            began = time.perf_counter()
            found = switched_scores(critic, questions, switches)
            least[name] = min(least[name], time.perf_counter() - began)
            check.check(name, found)
    return least


@contextmanager
def _all_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(results: dict[str, Any], cpu: str) -> Any:
    """Lay the results out as a rich table; ``cpu`` names the processor."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    agreement = results["agreement"]
    lines = [
        f"{results['parameters'] / 1e6:.0f} million parameters; {results['questions']} questions with "
        f"{results['tiles']} tiles, {results['prefix_tokens']:,} tokens",
        f"and {results['candidates']} candidates each, {results['candidate_tokens']:,} tokens in "
        f"{results['steps']} steps; {results['threads']} threads, least of {results['repetitions']}",
        f"scores within {agreement['largest_difference']:.0e} of each other (range {agreement['range']:.2f})",
        "below: ours with ideas off, images decoded before",
    ]
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="\n".join([*lines, cpu]))
    made.add_column("way", no_wrap=True)
    for heading in ("batch", "seconds", "candidates/s", "/ ours"):
        made.add_column(heading, justify="right")
    ours = results["ours"]
    rows = {"evovlm": ours | {"batch": ""}}
    rows |= {f"transformers, {name}": way for name, way in results["transformers"].items()}
    for name, way in rows.items():
        ratio = way["seconds"] / ours["seconds"]
        numbers = (f"{way['seconds']:.2f}", f"{way['candidates_per_second']:.1f}", f"{ratio:.2f}")
        made.add_row(name, str(way["batch"]), *numbers)
    made.add_section()
    for name, way in results["split"].items():
        shown = "images ready" if name == "evovlm" else name
        numbers = (f"{way['seconds']:.2f}", f"{way['candidates_per_second']:.1f}", f"{way['gain']:.2f}")
        made.add_row(f"  {shown}", "", *numbers)
    return made


def run(json_file: Path | None = None, task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Score and print a table.

    Args:
        json_file: Where to write the report, too.
        task: Critic and questions.
        settings: How the sides are compared.
    """
    from rich.console import Console

    results = measure(task, settings)
    report = make_report("score", results, json_file)
    Console().print(table(results, report["machine"]["cpu"]))
    return report
