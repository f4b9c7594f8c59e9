"""Whether a plan fits a model and a run, and which layouts near it do.

    plan, shapes, ranks ─► every problem, with its numbers ─► nearest layouts without one ─► one ValueError

    vit: A = 25 attention heads cannot be split over tp = 2; tp can be one of [1, 5, 25]
      nearest that works: [parallel.vit] tp = 1 (dp = 8)

What must divide what is in ``requirements.py``. All is arithmetic on a handful of numbers: nothing is built.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from evovlm.parallel.layout import AXES, Layout, ParallelPlan
from evovlm.parallel.pipeline import Schedule
from evovlm.parallel.requirements import ModelShapes, Pipeline, Problem, problems, sorted_divisors

Distance = tuple[float, int, int, tuple[int, ...]]
_MOST = 3  # suggestions for a module


def check_plan(
    plan: ParallelPlan,
    shapes: ModelShapes,
    world_size: int,
    *,
    schedule: Schedule = "1f1b",
    virtual_stages: int = 1,
    frozen: Sequence[str] = (),
) -> None:
    """Check that a plan fits a model, a step and the ranks of a run.

    Args:
        plan: The layouts.
        shapes: What they must divide.
        world_size: Ranks of the run.
        schedule: Of the pipeline.
        virtual_stages: Pipeline stages of each rank.
        frozen: Modules that are not trained.

    Raises:
        ValueError: Lists every problem with its numbers and, for each module that has one, up to three layouts of
            ``world_size`` ranks that have none, nearest first (fewest doublings and halvings of its axes); where there
            is none, the number that stands in the way.
    """
    pipeline = Pipeline(schedule, virtual_stages, "llm" in frozen)
    found = {name: list(problems(name, layout, shapes, pipeline)) for name, layout in plan.layouts.items()}
    lines = []
    resized = plan.size != world_size
    if resized:
        lines.append(
            f"  the layouts are for {plan.size} ranks ({plan}), the run has {world_size}: start {plan.size} ranks, "
            "or change every layout"
        )
    vit_changes = resized or bool(found["vit"])
    if vit_changes and plan.projector.tp > 1 and not found["projector"]:
        text = f"tp = {plan.projector.tp} is the ViT's tp, which must change"
        found["projector"].append(Problem("tp", text))
    for name, wrong in found.items():
        lines += [f"  {name}: {problem.text}" for problem in wrong]
        if wrong or resized:
            candidates = list(_candidates(name, plan, world_size, vit_changes=vit_changes))
            lines.append(f"    {_advice(name, plan, candidates, shapes, pipeline, world_size)}")
    if lines:
        raise ValueError("\n".join(["the parallel plan cannot run:", *lines]))


def _candidates(name: str, plan: ParallelPlan, world_size: int, *, vit_changes: bool) -> Iterator[Layout]:
    """Every layout of a module over a number of ranks, like the plan's in all but the axes."""
    like = plan.layouts[name]
    widths = {1} if vit_changes else {1, plan.vit.tp}  # of a projector
    for tp in sorted_divisors(world_size):
        if name == "projector" and tp not in widths:
            continue
        for pp, cp, hp in _triples(world_size // tp) if name == "llm" else [(1, 1, 1)]:
            data_ranks = world_size // (tp * pp)
            yield replace(
                like,
                pp=pp,
                dp=data_ranks // (cp * hp),
                cp=cp,
                hp=hp,
                tp=tp,
                shard=like.shard if like.shard and data_ranks % like.shard == 0 else 0,
                window=like.window if like.window and cp % like.window == 0 else 0,
            )


def _triples(number: int) -> Iterator[tuple[int, int, int]]:
    for first in sorted_divisors(number):
        for second in sorted_divisors(number // first):
            for third in sorted_divisors(number // (first * second)):
                yield first, second, third


def _distance(layout: Layout, like: Layout) -> Distance:
    """How far a layout is: doublings over all axes, then how many axes differ; among equals most data parallel."""
    ours, theirs = (tuple(getattr(each, axis) for axis in AXES) for each in (layout, like))
    pairs = list(zip(ours, theirs, strict=True))
    doublings = round(sum(abs(math.log2(a / b)) for a, b in pairs), 6)
    return doublings, sum(a != b for a, b in pairs), -layout.dp, ours


def _fitting(
    name: str, like: Layout, candidates: Sequence[Layout], shapes: ModelShapes, pipeline: Pipeline
) -> list[Layout]:
    found = [layout for layout in candidates if next(problems(name, layout, shapes, pipeline), None) is None]
    return sorted(found, key=lambda layout: _distance(layout, like))


def _advice(
    name: str,
    plan: ParallelPlan,
    candidates: Sequence[Layout],
    shapes: ModelShapes,
    pipeline: Pipeline,
    world_size: int,
) -> str:
    like = plan.layouts[name]
    if found := _fitting(name, like, candidates, shapes, pipeline)[:_MOST]:
        head = "nearest that works: " if len(found) == 1 else "nearest that work:\n      "
        return head + "\n      ".join(as_toml(name, each, like) for each in found)

    def cost(layout: Layout) -> tuple[int, Distance]:
        return len({problem.number for problem in problems(name, layout, shapes, pipeline)}), _distance(layout, like)

    best = min(candidates, key=cost)
    obstacles = list(problems(name, best, shapes, pipeline))
    numbers = " and ".join(dict.fromkeys(problem.number for problem in obstacles))
    texts = "; ".join(problem.text for problem in obstacles)
    return (
        f"no layout of {world_size} ranks works: at best, with {as_toml(name, best, like)}, "
        f"{numbers} stand{'s' * (' and ' not in numbers)} in the way ({texts})"
    )


def as_toml(name: str, layout: Layout, like: Layout | None = None) -> str:
    """Print a layout as a user writes it, on one line; ``dp``, which follows from the number of ranks, behind it.

    Args:
        name: The module.
        layout: Its layout.
        like: A layout that the user has written already: what differs from it is printed too.
    """
    plain = Layout()
    keys = ("pp", "cp", "hp", "tp", "shard", "window")
    written = {
        key: getattr(layout, key)
        for key in keys
        if getattr(layout, key) != getattr(plain, key)
        or (like is not None and getattr(layout, key) != getattr(like, key))
    }
    settings = ", ".join(f"{key} = {value}" for key, value in written.items())
    return f"[parallel.{name}] {settings}{' ' * bool(settings)}(dp = {layout.dp})"
