"""``evovlm bench exchange``: bytes at the lower bound, the same rows in every way, a report that names the machine."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer

from evovlm.launch import bench_exchange
from evovlm.launch.bench_exchange import WAYS, measure, run
from evovlm.launch.bench_exchange_step import Mix, draw, plans, tokens_of
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.traffic import traffic

SMALL = Mix(num_rows=128, num_packs=4, tokens_per_tile=4, hidden=8, chunk_tiles=2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_counts_agree_with_the_formulas(ranks: int) -> None:
    for plan in plans(ranks):
        uses, home = draw(plan, SMALL)
        shards = SequenceShards.of(plan.llm, SMALL.num_rows)
        tokens = tokens_of(plan, SMALL, uses, home)
        formula = traffic(uses, home, plan, shards, SMALL.tokens_per_tile, SMALL.chunk_tiles, 1)
        moves = np.count_nonzero(tokens.holder != tokens.owner)
        assert (formula.moved, formula.lower_bound) == (moves, moves)
        hops = np.count_nonzero(tokens.holder != tokens.home) + np.count_nonzero(tokens.home != tokens.owner)
        assert formula.two_exchange == hops
        assert formula.all_gather == uses.num_tiles.sum() * SMALL.tokens_per_tile * (ranks - 1)


def test_plans_differ_and_cover_the_axes() -> None:
    found = plans(8)
    assert str(found[0]).startswith("llm dp2·cp2·tp2·zero3 | vit dp8")
    assert len({str(plan) for plan in found}) == 4
    assert [max(getattr(plan.llm, axis) for plan in found) for axis in ("pp", "dp", "cp", "hp", "tp")] == [
        2,
        8,
        4,
        2,
        2,
    ]
    assert found[2].vit.tp == 2
    with pytest.raises(typer.BadParameter, match="6 ranks; the plans need a power of two, such as 4"):
        plans(6)


def test_images_have_up_to_13_tiles_and_encoders_share_them() -> None:
    uses, _ = draw(plans(8)[0], Mix())
    assert np.ptp(uses.num_tiles) <= 13
    assert uses.num_tiles.sum() * 256 > 0.3 * 4 * 8192  # packs are filled
    assert (uses.row + 256 <= 8192).all()


@pytest.mark.parametrize("number", [0, 2])
def test_bytes_are_the_lower_bound_and_ways_agree(number: int) -> None:
    result = measure(plans(4)[number], SMALL, repetitions=2)
    assert (
        0 < result["bytes"] == result["lower_bound_bytes"] < result["two_exchange_bytes"] < result["all_gather_bytes"]
    )
    assert result["all_gather_bytes"] <= result["all_gather_padded_bytes"]
    assert set(result["seconds"]) == set(WAYS)
    assert min(result["seconds"].values()) > 0


def test_ways_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_exchange.hop

    def wrong(*args: object) -> object:
        chunk, arrived, arrival = right(*args)  # type: ignore[arg-type]
        return chunk, arrived[::-1], arrival

    monkeypatch.setattr(bench_exchange, "hop", wrong)
    with pytest.raises(RuntimeError, match="two_exchange delivered other rows than all_gather on ranks"):
        measure(plans(2)[0], SMALL, repetitions=1)


def test_report_names_machine_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_exchange, "Mix", lambda: SMALL)
    report = run(tmp_path / "new" / "e.json", ranks=2, repetitions=1)
    assert json.loads((tmp_path / "new" / "e.json").read_text()) == report
    assert report["bench"] == "exchange"
    assert {"cpu", "cores"} <= set(report["machine"])
    assert {"torch", "evovlm", "python"} <= set(report["versions"])
    assert len(report["results"]) == 4
    assert "two_exchange" in capsys.readouterr().out
