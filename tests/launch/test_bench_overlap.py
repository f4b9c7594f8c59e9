"""The weights of a block are on their way before the block ahead of it has computed: read off real traces."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evovlm.launch.bench_overlap import SHAPE, Gather, Span, read_trace, record
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

LAYERS, STEPS = 3, 2
TINY = replace(SHAPE, vocab_size=64, hidden_size=32, num_layers=LAYERS, head_dim=4, ffn_size=48)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Gather]]:
    """Gathers of rank 0, waited for at once or not."""
    folder = tmp_path_factory.mktemp("traces")
    paths = {wait: folder / f"{wait}.json" for wait in (True, False)}

    def job(world: World) -> None:
        warnings.simplefilter("ignore")
        for wait, path in paths.items():
            record(world, str(path), wait=wait, num_rows=32, steps=STEPS, shape=TINY)

    run_ranks(2, job)
    return {wait: read_trace(_events(path)) for wait, path in paths.items()}


def _events(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


@pytest.mark.parametrize("wait", [True, False])
def test_each_block_is_gathered_once_a_pass_before_the_block_ahead_of_it_has_computed(
    traces: dict[bool, list[Gather]], *, wait: bool
) -> None:
    blocks = [f"model.layers.{number}" for number in range(LAYERS)]
    one_step = [("forward", block) for block in blocks] + [("backward", block) for block in reversed(blocks)]
    gathers = traces[wait]
    assert [(gather.which, gather.unit) for gather in gathers] == STEPS * one_step
    for number, gather in enumerate(gathers):
        if number % LAYERS == 0:
            assert gather.before is None
            continue
        assert gather.before is not None
        assert gather.before.name == one_step[number % len(one_step) - 1][1]
        assert gather.issued < gather.before.end <= gather.needed
        assert gather.run.end <= gather.needed


def test_a_gather_that_is_waited_for_at_once_hides_under_nothing(traces: dict[bool, list[Gather]]) -> None:
    for gather in traces[True]:
        assert gather.before is None or gather.run.end <= gather.before.start
        assert gather.hidden == 0


def test_spans_are_read_as_drawn() -> None:
    # Block 1's gather is issued before block 0 computes (20–50) and runs from 15 to 35: 15 of its 20 under compute.
    spans = [
        Span("FSDP::pre_forward (layers.0)", 0, 10),
        Span("FSDP::all_gather (layers.0)", 1, 9),
        Span("c10d::_allgather_base_", 2, 3),
        Span("gloo:all_gather", 3, 8),
        Span("FSDP::forward_prefetch for layers.1", 11, 20),
        Span("FSDP::all_gather (layers.1)", 12, 19),
        Span("c10d::_allgather_base_", 13, 14),
        Span("gloo:all_gather", 15, 35),
        Span("FSDP::post_forward (layers.0)", 50, 51),
        Span("FSDP::pre_forward (layers.1)", 52, 60),
        Span("FSDP::post_forward (layers.1)", 80, 81),
    ]
    events = [{"ph": "X", "name": s.name, "ts": s.start, "dur": s.end - s.start} for s in spans]
    first, second = read_trace([{"ph": "M", "name": "process_name"}, *reversed(events)])
    assert (first.unit, first.which, first.before, first.hidden) == ("layers.0", "forward", None, 0)
    assert second == Gather(
        "layers.1", "forward", 13, Span("gloo:all_gather", 15, 35), 60, Span("layers.0", 20, 50), 15
    )
    assert second.share == 0.75
    with pytest.raises(ValueError, match="2 calls of all-gather, and gloo ran 1"):
        read_trace([event for event in events if event["ts"] != 15])
