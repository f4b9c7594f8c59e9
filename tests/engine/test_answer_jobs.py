"""Jobs of several requests: answers go back to their job, refused jobs come out as errors, nothing is asked twice."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.errors import SampleError
from evovlm.engine.answer_jobs import Job, answer_jobs
from evovlm.engine.generation import Request, Sampling

from .fake_generator import FakeGenerator


def job(name: str, size: int) -> Job[str]:
    turns = ({"from": "human", "value": name},)
    return Job(name, tuple(Request(f"{name}.{i}", turns, num=2) for i in range(size)))


def reply(request: Request, number: int) -> str:
    return f"{request.name}/{number}"


def run(fake: FakeGenerator, jobs: list[Job[str]]) -> list[tuple[str, list[list[str]] | str]]:
    """Texts of each job in the order they come, or the reason it was refused."""
    return [
        (subject, said.reason if isinstance(said, SampleError) else [[c.text for c in answers] for answers in said])
        for subject, said in answer_jobs(lambda: fake, jobs, Sampling())
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 4), max_size=6),
    st.integers(0, 8),
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=3),
)
def test_every_job_is_answered_or_refused(sizes: list[int], ahead: int, refuse: set[tuple[int, int]]) -> None:
    jobs = [job(str(number), size) for number, size in enumerate(sizes)]
    bad = {f"{number}.{i}" for number, i in refuse}
    fake = FakeGenerator(reply, ahead=ahead, refuse=bad)
    found = dict(run(fake, jobs))
    assert len(found) == len(jobs)
    for one in jobs:
        names = [request.name for request in one.requests]
        expected = "too long" if bad & set(names) else [[f"{name}/0", f"{name}/1"] for name in names]
        assert found[one.subject] == expected
    asked = [request.name for request in fake.requests]
    assert len(asked) == len(set(asked))


def test_nothing_to_do_opens_no_generator() -> None:
    def opened() -> FakeGenerator:
        raise AssertionError("there is no job")

    assert list(answer_jobs(opened, [], Sampling())) == []


def test_jobs_are_read_as_they_are_answered() -> None:
    read: list[int] = []

    def jobs() -> Iterator[Job[str]]:
        for number in range(20):
            read.append(number)
            yield job(str(number), 2)

    answered = answer_jobs(lambda: FakeGenerator(reply, ahead=3), jobs(), Sampling())
    assert next(answered)[0] == "0"
    assert len(read) < 6


def test_an_error_of_no_request_is_raised() -> None:
    class Broken(FakeGenerator):
        def _answer(self, request: Request) -> list[object]:  # type: ignore[override]
            raise SampleError("odd", "nobody asked for this", "other")

    with pytest.raises(SampleError, match="nobody asked for this"):
        run(Broken(reply), [job("0", 1)])
