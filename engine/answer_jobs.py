"""Jobs of several requests each go through a generator as one stream; one that is refused takes no other with it.

jobs ─► requests, in order ─► Generator ─► completions ─► (job, answers to its requests)
             ▲                    │ SampleError names a request
             └── the others of ───┘ its job comes as the error
                 those read ahead
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, TypeVar

from evovlm.data.errors import SampleError
from evovlm.engine.generation import Completion, Generator, Request, Sampling

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Job(Generic[Subject]):
    """Requests that belong together.

    Attributes:
        subject: What they are about; handed back with the answers.
        requests: At least one; they follow one another, so prompts that begin alike share their prefill.
    """

    subject: Subject
    requests: tuple[Request, ...]


@dataclass
class _UnderWay(Generic[Subject]):
    """A job, and the answers that it has by now."""

    job: Job[Subject]
    answers: list[list[Completion]] = field(default_factory=list)


def answer_jobs(
    open_generator: Callable[[], Generator], jobs: Iterable[Job[Subject]], sampling: Sampling
) -> Iterator[tuple[Subject, list[list[Completion]] | SampleError]]:
    """Answer jobs.

    Args:
        open_generator: Called only if there is a job, and again after a refusal.
        jobs: Consumed lazily, a few ahead.
        sampling: Holds for all of them.

    Yields:
        Each job's subject with the completions of its requests; or with the error that named one of its requests.
        Those come in the order of the jobs, but for jobs refused before earlier ones were answered.

    Raises:
        SampleError: One that names no request that is under way.
        GenerationError: The model or server cannot answer.
    """
    fresh = (_UnderWay(job) for job in jobs)
    again: list[_UnderWay[Subject]] = []
    while first := again or list(islice(fresh, 1)):
        asked: deque[_UnderWay[Subject]] = deque()
        again = []
        try:
            for completions in open_generator().generate(_requests(chain(first, fresh), asked), sampling):
                job = asked[0]
                job.answers.append(completions)
                if len(job.answers) == len(job.job.requests):
                    asked.popleft()
                    yield job.job.subject, job.answers
        except SampleError as error:
            refused = [one for one in asked if error.name in {request.name for request in one.job.requests}]
            if not refused:
                raise
            yield refused[0].job.subject, error
            again = [one for one in asked if one is not refused[0]]


def _requests(jobs: Iterable[_UnderWay[Subject]], asked: deque[_UnderWay[Subject]]) -> Iterator[Request]:
    for job in jobs:
        asked.append(job)
        yield from job.job.requests[len(job.answers) :]
