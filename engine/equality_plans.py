"""The plans that ``evovlm verify`` runs: every axis alone, in pairs and in threes, modules unlike each other.

Each is a name, a plan, engine options and, where it matters, another model; none needs more than eight ranks.
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from evovlm.engine.options import EngineOptions
from evovlm.parallel.layout import AXES, Layout, ParallelPlan


@dataclass(frozen=True)
class PlanCase:
    """One row of the table.

    Attributes:
        name: As the table shows it.
        plan: Layouts.
        options: Engine options other than the precision.
        tied: Whether the head is tied to the embedding.
        reduced: Whether it belongs to the reduced matrix that the project's tests run.
    """

    name: str
    plan: ParallelPlan
    options: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    reduced: bool = False

    @property
    def num_packs(self) -> int:
        """Packs of a step: enough that every data-parallel rank fills its pipeline, and several on each."""
        return max(4, self.plan.llm.dp * self.plan.llm.pp)

    def engine_options(self, **more: Any) -> EngineOptions:
        """Engine options; two tiles are encoded at a time, so that there are several chunks."""
        return EngineOptions(**({"encode_tiles": 2} | self.options | more))


def _case(name: str, llm: Layout, *, reduced: bool = False, tied: bool = False, **more: Any) -> PlanCase:
    modules = {key: more.pop(key) for key in ("vit", "projector") if key in more}
    return PlanCase(name, ParallelPlan.for_llm(llm, **modules), more, tied, reduced)


def _along(*, pp: int = 1, dp: int = 1, cp: int = 1, hp: int = 1, tp: int = 1) -> Layout:
    """A layout of some axes, ZeRO 3 over their data ranks."""
    return Layout(pp=pp, dp=dp, cp=cp, hp=hp, tp=tp)


def all_cases() -> list[PlanCase]:
    """The whole matrix, ordered by number of ranks within each kind."""
    cases = [_case("one rank", Layout(), reduced=True)]
    for zero in (1, 2, 3):
        cases += [_case(f"dp{n} zero{zero}", Layout(dp=n, zero=zero)) for n in (2, 4)]
        cases.append(_case(f"dp4 zero{zero}, hybrid", Layout(dp=4, zero=zero, shard=2), reduced=zero == 2))
    for axis in ("tp", "hp", "cp", "pp"):
        cases += [_case(f"{axis}{n}", _along(**{axis: n}), reduced=n == 4 and axis != "tp") for n in (2, 4)]
    chosen = {("dp", "hp"), ("cp", "hp"), ("hp", "tp"), ("pp", "dp"), ("cp", "tp")}
    for a, b in combinations(AXES, 2):
        cases.append(_case(f"{a}2 {b}2", _along(**{a: 2, b: 2}), reduced=(a, b) in chosen))
    cases += [
        _case("pp2 cp2 tp2", Layout(pp=2, cp=2, tp=2), reduced=True),
        _case("pp2 hp2 tp2", Layout(pp=2, hp=2, tp=2)),
        _case("pp2 dp2 tp2", Layout(pp=2, dp=2, tp=2)),
        _case("dp2 cp2 hp2, isp", Layout(dp=2, cp=2, hp=2, shard=4)),
        _case("cp2 hp2 tp2, zero1", Layout(cp=2, hp=2, tp=2, zero=1)),
        _case("cp4 hp2", Layout(cp=4, hp=2)),
        _case("cp4 hp2, context first", Layout(cp=4, hp=2, placement="context_first")),
        _case("cp4, double ring", Layout(cp=4, window=2), reduced=True),
        _case("cp4 hp2, double ring", Layout(cp=4, hp=2, window=2)),
        _case("hp8, copies of KV heads", Layout(hp=8)),
        _case("hp4, isp", Layout(dp=2, hp=4, shard=4)),
        _case("pp2 zero1", Layout(pp=2, zero=1)),
        _case("pp4 dp2 zero2", Layout(pp=4, dp=2, zero=2)),
        _case("pp2, interleaved", Layout(pp=2), schedule="interleaved", virtual_stages=2, reduced=True),
        _case("pp2 dp2, interleaved, zero1", Layout(pp=2, dp=2, zero=1), schedule="interleaved", virtual_stages=2),
        _case("pp2, zero bubble", Layout(pp=2, zero=1), schedule="zero_bubble"),
        _case(
            "pp2 tp2 dp2, zero bubble, virtual",
            Layout(pp=2, tp=2, dp=2, zero=1),
            schedule="zero_bubble",
            virtual_stages=2,
            reduced=True,
        ),
        _case("pp2 cp2, zero bubble", Layout(pp=2, cp=2, zero=1), schedule="zero_bubble"),
        _case("vit tp2 | llm tp4", Layout(tp=4), vit=Layout(dp=2, tp=2), reduced=True),
        _case(
            "vit tp2 projector tp2 | llm pp2 cp2",
            Layout(pp=2, cp=2),
            vit=Layout(dp=2, tp=2),
            projector=Layout(dp=2, tp=2, zero=1),
            reduced=True,
        ),
        _case("vit tp4 | llm dp4", Layout(dp=4), vit=Layout(tp=4)),
        _case("vit dp8 | llm pp2 cp2 tp2", Layout(pp=2, cp=2, tp=2), vit=Layout(dp=8, zero=1)),
        _case(
            "vit hybrid | llm tp2 dp2", Layout(tp=2, dp=2), vit=Layout(dp=4, shard=2), projector=Layout(dp=4, zero=2)
        ),
        _case("tied, pp2 dp2", Layout(pp=2, dp=2), tied=True, reduced=True),
        _case("tied, tp2 dp2", Layout(dp=2, tp=2), tied=True),
        _case("tied, pp2 tp2, interleaved", Layout(pp=2, tp=2), tied=True, schedule="interleaved", virtual_stages=2),
        _case("frozen vit, dp2", Layout(dp=2), freeze=("vit",)),
        _case("frozen vit and projector, pp2 tp2", Layout(pp=2, tp=2), freeze=("vit", "projector"), reduced=True),
        _case("frozen llm, tp2 dp2", Layout(tp=2, dp=2), freeze=("llm",)),
        _case("frozen llm, pp2", Layout(pp=2), freeze=("llm",)),
        _case("recompute all, dp2 tp2", Layout(dp=2, tp=2), recompute={"vit": "full", "llm": "full"}),
        _case("recompute some, cp2", Layout(cp=2), recompute={"vit": "selective", "llm": "selective"}),
        _case("recompute all, pp2 cp2", Layout(pp=2, cp=2), recompute={"vit": "full", "llm": "full"}, reduced=True),
        _case("encoder recomputed, hp2", Layout(hp=2), encoder_activations="recompute", reduced=True),
        _case("encoder recomputed where it is large, dp2", Layout(dp=2), encoder_memory=1e-4),
        _case("vit tp2 zero1, tile by tile", Layout(dp=2), vit=Layout(tp=2, zero=1), encode_tiles=1, reduced=True),
        _case("encoder recomputed, vit tp2", Layout(dp=2), vit=Layout(tp=2), encoder_activations="recompute"),
        _case("small blocks merged, dp2 tp2", Layout(dp=2, tp=2), min_unit=10**9),
    ]
    return sorted(cases, key=lambda case: case.plan.size)
