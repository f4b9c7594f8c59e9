"""Validation of a process reward model counts each decision once under any layout, and measures what it says."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.share_out import WholePack, share_out
from evovlm.data.step_metrics import step_quality
from evovlm.engine.engine import Engine
from evovlm.engine.equality import OPTIM, SMALL, make_steps, make_weights, plain_loss, plain_model
from evovlm.engine.equality_plans import all_cases
from evovlm.engine.prm_steps import PRMSteps, judgement_metrics
from evovlm.engine.steps import Validation
from evovlm.models.internvl import InternVL
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

SIGNS = (11, 5)
CASES = {case.name: case for case in all_cases()}
LAYOUTS = ["one rank", "tp2", "cp2 hp2", "cp2 tp2", "pp2 dp2", "dp4 zero3"]


def judged_packs() -> list[WholePack]:
    """Packs of random tokens; about half of the targets are signs. One pack has none."""
    packs = []
    for number, pack in enumerate(make_steps(num_packs=4)[0]):
        generator = torch.Generator().manual_seed(number)
        draws = torch.randint(0, 4, pack.labels.shape, generator=generator)
        signs = torch.where(draws == 0, SIGNS[0], torch.where(draws == 1, SIGNS[1], pack.labels.clamp(min=20)))
        labels = torch.where(pack.labels == -100, -100, signs if number else pack.labels.clamp(min=20))
        packs.append(replace(pack, labels=labels))
    return packs


def said_by_one_process() -> tuple[float, list[float], list[bool]]:
    """Validation loss, P("+") against P("-") at each decision, and whether "+" is the target."""
    model, loss, weight = plain_model().eval(), 0.0, 0.0
    scores: list[float] = []
    labels: list[bool] = []
    with torch.no_grad():
        for pack in judged_packs():
            loss += float(plain_loss(model, pack))
            weight += float(pack.weights[pack.labels != -100].double().sum())
            logits = model(pack.tokens, pack.positions, pack.cu_seqlens, pack.tiles.double(), pack.visual_rows)
            rows = torch.isin(pack.labels, torch.tensor(SIGNS))
            scores += logits[rows][:, SIGNS].softmax(1)[:, 0].tolist()
            labels += (pack.labels[rows] == SIGNS[0]).tolist()
    return loss / weight, scores, labels


@pytest.mark.parametrize("name", LAYOUTS)
def test_decisions_are_counted_once(name: str) -> None:
    case, packs = CASES[name], judged_packs()

    def job(world: World) -> Validation:
        engine = Engine.build(
            lambda: InternVL(SMALL),
            case.plan,
            world,
            optim=OPTIM,
            weights=make_weights(SMALL),
            options=case.engine_options(precision="float64"),
        )
        batch = share_out(packs, case.plan, world.rank, SMALL.tokens_per_tile)
        plan = cast(Any, SimpleNamespace(num_supervised=7))
        return PRMSteps(engine, SIGNS).validate([(plan, batch)])

    found = run_ranks(case.plan.size, job, timeout=300)
    loss, scores, labels = said_by_one_process()
    quality = step_quality(scores, labels, 0.5)
    assert 0.1 < quality.accuracy < 0.9
    assert all(one == found[0] for one in found)
    assert found[0].loss == pytest.approx(loss, rel=1e-10)
    assert found[0].tokens == 7
    assert found[0].metrics == pytest.approx({"step_accuracy": quality.accuracy, "macro_f1": quality.macro_f1})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_metrics_are_those_of_scores(judged: list[tuple[bool, bool]]) -> None:
    labels, said = [label for label, _ in judged], [answer for _, answer in judged]
    counts = [float(judged.count((label, answer))) for label in (True, False) for answer in (True, False)]
    quality = step_quality([float(answer) for answer in said], labels, 0.5)
    assert judgement_metrics(counts) == pytest.approx({"step_accuracy": quality.accuracy, "macro_f1": quality.macro_f1})


def test_without_decisions_there_is_nothing_to_say() -> None:
    assert all(math.isnan(value) for value in judgement_metrics([0, 0, 0, 0]).values())
