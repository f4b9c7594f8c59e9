"""What tests of builds from a scripted model share: questions, a build on forked ranks, and its files read back."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evovlm.engine.generation import Request
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .fake_generator import FakeGenerator, Reply
from .small_data import conversation, draw_shapes


def sums(count: int, answer: str = "{}") -> list[dict[str, Any]]:
    """Text questions: number i asks for i plus one, which is put into ``answer``."""
    return [
        {
            "id": i,
            "conversations": [
                {"from": "human", "value": f"{i}+1?"},
                {"from": "gpt", "value": answer.format(i + 1)},
            ],
        }
        for i in range(count)
    ]


def write_meta(folder: Path, sums: Sequence[dict[str, Any]], num_shapes: int) -> Path:
    """Write ``sums``, and ``shapes``: questions of pictures, at most 2 tiles, whose lines have a system turn."""
    shapes = [conversation("Which shape?", shape, image=file) for file, shape in draw_shapes(folder, num_shapes)]
    for name, lines in (("sums", sums), ("shapes", shapes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "sums": {"root": str(folder), "annotation": "sums.jsonl"},
        "shapes": {"root": str(folder), "annotation": "shapes.jsonl", "max_dynamic_patch": 2},
    }
    (folder / "meta.json").write_text(json.dumps(content))
    return folder / "meta.json"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@dataclass(frozen=True)
class Builder:
    """Runs a build on forked ranks with a :class:`FakeGenerator`.

    Attributes:
        function: ``build_prm`` or ``build_preferences``.
        settings: Makes the settings of calls without any.
        reply: What the generator says in calls without one.
    """

    function: Callable[..., dict[str, Any]]
    settings: Callable[[], Any]
    reply: Reply

    def __call__(
        self,
        meta: Path,
        out: Path,
        wanted: Any = None,
        *,
        ranks: int = 1,
        generator: Callable[[], FakeGenerator] | None = None,
        reuse: bool = False,
        model: str = "m",
    ) -> tuple[dict[str, Any], list[list[Request]]]:
        """Build; returns the summary and the requests that each rank's generator has answered."""

        def job(world: World) -> tuple[dict[str, Any], list[Request]]:
            fake = FakeGenerator(self.reply) if generator is None else generator()
            opener = None if reuse else lambda _: fake
            summary = self.function(meta, out, wanted or self.settings(), world, opener, model=model)
            return summary, fake.requests

        results = run_ranks(ranks, job)
        return results[0][0], [requests for _, requests in results]
