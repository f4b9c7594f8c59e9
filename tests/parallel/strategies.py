"""Random layouts and plans."""

import math
from typing import Any

from hypothesis import strategies as st

from evovlm.parallel.layout import Layout, ParallelPlan, divisors


@st.composite
def layouts(draw: st.DrawFn, size: int | None = None, axes: tuple[str, ...] = ("pp", "cp", "hp", "tp")) -> Layout:
    """Any layout of ``size`` ranks (or of a few up to 96), with any sharding and placement."""
    ranks = size or draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96)))
    options: dict[str, Any] = {}
    for axis in draw(st.permutations(axes)):
        options[axis] = draw(st.sampled_from(divisors(ranks // math.prod(options.values()))))
    dp = ranks // math.prod(options.values())
    cp = options.get("cp", 1)
    return Layout(
        **options,
        dp=dp,
        zero=draw(st.sampled_from((1, 2, 3))),
        shard=draw(st.sampled_from([0, *divisors(dp * cp * options.get("hp", 1))])),
        placement=draw(st.sampled_from(("head_first", "context_first"))),
        window=draw(st.sampled_from([0, *divisors(cp)])),
    )


@st.composite
def plans(draw: st.DrawFn) -> ParallelPlan:
    """Any plan of a few to 96 ranks."""
    llm = draw(layouts())
    vit = draw(layouts(llm.size, ("tp",)))
    projector = draw(layouts(llm.size, ()) | layouts(llm.size, ("tp",)).filter(lambda p: p.tp in (1, vit.tp)))
    return ParallelPlan(llm=llm, vit=vit, projector=projector)
