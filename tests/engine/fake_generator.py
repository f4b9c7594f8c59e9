"""A generator for tests: answers by a table or a function, as lazily and in the same order as a real one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from evovlm.data.errors import SampleError
from evovlm.engine.generation import Completion, Request, Sampling

Reply = Callable[[Request, int], str]
"""Called as (request, number of the answer); "…" at the end: the answer was cut off."""


class FakeGenerator:
    """Answers with ``reply``, a few requests behind what it has read.

    Args:
        reply: What is said.
        ahead: Requests that are read before the first is answered.
        refuse: Names of requests that raise a ``SampleError``.
        die_after: After so many requests, raise a ``KeyboardInterrupt``.
    """

    def __init__(
        self, reply: Reply, *, ahead: int = 3, refuse: Iterable[str] = (), die_after: int | None = None
    ) -> None:
        self.reply, self.ahead, self.refuse, self.die_after = reply, ahead, set(refuse), die_after
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        waiting: deque[Request] = deque()
        for request in requests:
            waiting.append(request)
            if len(waiting) > self.ahead:
                yield self._answer(waiting.popleft())
        while waiting:
            yield self._answer(waiting.popleft())

    def _answer(self, request: Request) -> list[Completion]:
        if request.name in self.refuse:
            raise SampleError("too long", "9000 tokens do not fit", request.name)
        if self.die_after is not None and len(self.requests) >= self.die_after:
            raise KeyboardInterrupt
        self.requests.append(request)
        said = [self.reply(request, number) for number in range(request.num)]
        return [Completion(text.removesuffix("…"), not text.endswith("…"), len(text)) for text in said]
