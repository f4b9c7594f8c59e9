"""Plans that cannot run: every problem is told with its numbers, and what is suggested instead can."""

import re
import tomllib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.requirements import LLMShape, ModelShapes, ProjectorShape, ViTShape
from evovlm.parallel.validate import as_toml, check_plan

from .strategies import layouts, plans

LLM = LLMShape(
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    hidden_size=3584,
    ffn_size=18944,
    vocab_size=151_674,
    pack_tokens=32768,
    packs_per_step=256,
)
VIT_6B = ViTShape(num_layers=45, num_heads=25, hidden_size=3200, ffn_size=12800, width_norm=True)
SHAPES = ModelShapes(llm=LLM, vit=VIT_6B, projector=ProjectorShape(hidden_size=3584))


def complaint(
    llm: Layout | None = None,
    vit: Layout | None = None,
    projector: Layout | None = None,
    *,
    shapes: ModelShapes = SHAPES,
    ranks: int | None = None,
    **options: Any,
) -> str:
    size = (llm or vit or Layout()).size
    plan = ParallelPlan.for_llm(llm or Layout(dp=size), vit, projector)
    with pytest.raises(ValueError, match="the parallel plan cannot run:\n") as caught:
        check_plan(plan, shapes, ranks or size, **options)
    return str(caught.value)


def with_llm(**changes: int) -> ModelShapes:
    return replace(SHAPES, llm=replace(LLM, **changes))


@pytest.mark.parametrize(
    ("layout", "changes", "options", "message"),
    [
        ({"tp": 8}, {}, {}, r"llm: A = 28 attention heads cannot be split over tp = 8; tp can be one of \[1, 2, 4, 7,"),
        ({"tp": 7}, {}, {}, r"K = 4 KV heads cannot be split over tp = 7 \(they are not copied .* \[1, 2, 4\]"),
        ({"hp": 8}, {}, {}, r"A/tp = 28 attention heads of each tp rank cannot be split over hp = 8; .* \[1, 2, 4, 7,"),
        ({"hp": 8, "tp": 2}, {}, {}, "A/tp = 14 attention heads of each tp rank cannot be split over hp = 8"),
        ({"hp": 7}, {}, {}, r"K/tp = 4 KV heads .* shared by hp = 7 ranks alike: one number must divide the other"),
        ({"hp": 4}, {"num_kv_heads": 14}, {}, "K/tp = 14 KV heads of each tp rank cannot be shared by hp = 4 ranks"),
        (
            {"tp": 4},
            {"ffn_size": 18942},
            {},
            r"F = 18942 feed-forward channels cannot be split over tp = 4; .* \[1, 2,",
        ),
        ({"tp": 4}, {"vocab_size": 3}, {}, "V = 3 tokens of the vocabulary leave some of tp = 4 ranks without a row"),
        (
            {"cp": 2, "hp": 2, "tp": 2},
            {"pack_tokens": 1000},
            {},
            r"T = 1000 rows .* cp = 2, hp = 2, tp = 2: T must be a multiple of 2·cp·hp·tp = 16; take 992 or 1008",
        ),
        ({"tp": 4}, {"pack_tokens": 30}, {}, r"T must be a multiple of hp·tp = 4; take 28 or 32"),
        (
            {"dp": 3},
            {},
            {},
            r"packs_per_step = 256 cannot be dealt to dp = 3 ranks alike; take a multiple of 3, or dp ",
        ),
        ({"pp": 32}, {}, {}, "28 layers cannot be cut into pp = 32 stages; lower pp to at most 28"),
        (
            {"pp": 8},
            {},
            {"schedule": "interleaved", "virtual_stages": 4},
            r"28 layers cannot be cut into pp · virtual_stages = 8 · 4 = 32 stages; lower pp to at most 7",
        ),
        ({"pp": 2}, {}, {"virtual_stages": 2}, "one stage on each rank, virtual_stages = 2 needs 'interleaved'"),
        (
            {"pp": 4, "dp": 8},
            {"packs_per_step": 24},
            {},
            r"packs_per_step/dp = 24/8 = 3 microbatches cannot fill pp = 4 stages; .* multiple of 8 from 32 on",
        ),
        (
            {"pp": 4, "dp": 8},
            {"packs_per_step": 48},
            {"schedule": "interleaved"},
            "48/8 = 6 microbatches are not a multiple of pp = 4, .* take packs_per_step = 32, or schedule '1f1b'",
        ),
        (
            {"pp": 2},
            {},
            {"schedule": "zero_bubble", "frozen": ["vit", "llm"]},
            "zero-bubble schedule with a frozen first stage gives later weights no gradient",
        ),
    ],
)
def test_what_the_llm_cannot_be(
    layout: dict[str, int], changes: dict[str, int], options: dict[str, Any], message: str
) -> None:
    text = complaint(Layout(**layout), shapes=with_llm(**changes), **options)  # type: ignore[arg-type]
    assert re.search(message, text), text
    assert "[parallel.llm]" in text
    assert "[parallel.vit]" not in text


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"tp": 4, "hp": 4, "dp": 2}, {"shapes": with_llm(num_heads=32)}),  # one KV head of a tp rank, for 4 hp ranks
        ({"cp": 4, "hp": 2, "pp": 4}, {}),
        ({"pp": 14, "dp": 2}, {"schedule": "1f1b"}),
        ({"pp": 2, "dp": 32}, {"schedule": "interleaved", "virtual_stages": 2, "frozen": ["llm"]}),
        ({"pp": 2}, {"schedule": "zero_bubble", "frozen": ["vit", "projector"]}),
        ({"dp": 4}, {"schedule": "zero_bubble", "frozen": ["llm"]}),  # no pipeline, no schedule
    ],
)
def test_plans_that_run(layout: dict[str, int], options: dict[str, Any]) -> None:
    options = dict(options)
    plan = ParallelPlan.for_llm(Layout(**layout))  # type: ignore[arg-type]
    shapes = options.pop("shapes", SHAPES)
    check_plan(plan, shapes, plan.size, **options)
    check_plan(plan, ModelShapes(llm=shapes.llm), plan.size, **options)


def test_25_heads() -> None:
    """InternViT-6B's heads and tp = 2, which the projector of the plan follows."""
    text = complaint(Layout(dp=8), Layout(dp=4, tp=2), Layout(dp=4, tp=2))
    assert text.splitlines()[1:] == [
        "  vit: A = 25 attention heads cannot be split over tp = 2; tp can be one of [1, 5]",
        "    nearest that works: [parallel.vit] tp = 1 (dp = 8)",
        "  projector: tp = 2 is the ViT's tp, which must change",
        "    nearest that works: [parallel.projector] tp = 1 (dp = 8)",
    ]
    odd = replace(SHAPES, vit=ViTShape(num_layers=1, num_heads=2, hidden_size=6, ffn_size=5, width_norm=True))
    text = complaint(vit=Layout(tp=4), shapes=odd)
    assert "C = 6 channels of the query and key norms cannot be split over tp = 4" in text
    assert "F = 5 feed-forward channels cannot be split over tp = 4" in text
    check_plan(ParallelPlan.for_llm(Layout(dp=10), Layout(dp=2, tp=5)), with_llm(packs_per_step=10), 10)


def test_projector() -> None:
    shapes = ModelShapes(llm=LLM, vit=replace(VIT_6B, num_heads=32), projector=ProjectorShape(hidden_size=30))
    text = complaint(Layout(dp=4), Layout(tp=4), Layout(tp=4), shapes=shapes)
    assert "projector: H = 30 hidden channels cannot be split over tp = 4; tp can be one of [1, 2, 3, 5," in text
    assert "nearest that works: [parallel.projector] tp = 1 (dp = 4)" in text
    assert "[parallel.vit]" not in text


def test_another_number_of_ranks() -> None:
    text = complaint(Layout(dp=4, tp=2), ranks=16)
    assert (
        "the layouts are for 8 ranks (llm dp4·tp2·zero3 | vit dp8·zero3 | projector dp8·zero3), the run has 16" in text
    )
    assert "[parallel.vit] (dp = 16)" in text
    assert text.splitlines()[-3:] == [
        "      [parallel.llm] tp = 2 (dp = 8)",
        "      [parallel.llm] tp = 4 (dp = 4)",
        "      [parallel.llm] hp = 2, tp = 2 (dp = 4)",
    ]


def test_number_that_stands_in_the_way() -> None:
    text = complaint(Layout(dp=11), shapes=with_llm(packs_per_step=8))
    assert "no layout of 11 ranks works: at best, with [parallel.llm] (dp = 11), packs_per_step = 8 stands" in text
    text = complaint(Layout(pp=11), shapes=with_llm(num_layers=2, packs_per_step=22, vocab_size=9), frozen=["vit"])
    assert "nearest that works: [parallel.llm] pp = 1 (dp = 11)" in text


def test_sharding_of_a_suggestion() -> None:
    """``shard`` and ``window`` are kept where they still divide, and given up aloud where not."""
    text = complaint(Layout(dp=3, cp=4, shard=6, window=4), shapes=with_llm(packs_per_step=4))
    assert "[parallel.llm] pp = 3, cp = 4, shard = 0, window = 4 (dp = 1)" in text


@pytest.mark.parametrize("changes", [{}, {"packs_per_step": 1, "num_kv_heads": 1, "pack_tokens": 7}])
def test_a_thousand_ranks(changes: dict[str, int]) -> None:
    text = complaint(Layout(dp=16, pp=2, tp=32), shapes=with_llm(**changes))
    assert ("no layout of 1024 ranks works" if changes else "nearest that work:") in text


def suggestions(text: str) -> list[tuple[str, str, int]]:
    """Module, settings and dp of every suggested line of a message."""
    works = "\n".join(line for line in text.splitlines() if "no layout" not in line)
    found = re.findall(r"\[parallel\.(\w+)\] ?([^()\n]*)\(dp = (\d+)\)", works)
    return [(module, keys, int(dp)) for module, keys, dp in found]


def parse(keys: str, dp: int, like: Layout) -> Layout:
    written = tomllib.loads(keys.replace(", ", "\n"))
    return replace(like, **{"dp": dp, **written})


SMALL_SHAPES = st.builds(
    ModelShapes,
    llm=st.builds(
        LLMShape,
        num_layers=st.integers(1, 12),
        num_heads=st.sampled_from((12, 24)),
        num_kv_heads=st.sampled_from((2, 3, 4, 6, 12)),
        hidden_size=st.just(96),
        ffn_size=st.sampled_from((96, 100)),
        vocab_size=st.sampled_from((5, 1000)),
        pack_tokens=st.sampled_from((96, 1024, 100)),
        packs_per_step=st.integers(1, 24),
    ),
    vit=st.builds(
        ViTShape,
        num_layers=st.just(2),
        num_heads=st.sampled_from((4, 6, 25)),
        hidden_size=st.just(150),
        ffn_size=st.sampled_from((64, 75)),
        width_norm=st.booleans(),
    ),
    projector=st.builds(ProjectorShape, hidden_size=st.sampled_from((30, 96))),
)
OPTIONS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(("1f1b", "interleaved", "zero_bubble")),
        "virtual_stages": st.sampled_from((1, 2)),
        "frozen": st.lists(st.sampled_from(("vit", "llm")), unique=True),
    }
)


@settings(max_examples=80, deadline=None)
@given(plans(), SMALL_SHAPES, OPTIONS, st.sampled_from((0, 0, 0, 1, 6)))
def test_suggestions_run(plan: ParallelPlan, shapes: ModelShapes, options: dict[str, Any], more: int) -> None:
    """Every suggestion for the LLM beside the first ones for ViT and projector, and the other way round."""
    ranks = plan.size + more
    try:
        check_plan(plan, shapes, ranks, **options)
    except ValueError as error:
        text = str(error)
    else:
        return
    assert re.search(r"\d", text)
    found: dict[str, list[Layout]] = {}
    for module, keys, dp in suggestions(text):
        found.setdefault(module, []).append(parse(keys, dp, plan.layouts[module]))
    assume("no layout" not in text)  # then nothing is promised
    assert all(len(each) <= 3 for each in found.values())
    first = {module: each[0] for module, each in found.items()}
    for module, each in found.items():
        for layout in each:
            check_plan(ParallelPlan(**{**plan.layouts, **first, module: layout}), shapes, ranks, **options)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from((7, 8, 22, 32)), SMALL_SHAPES, OPTIONS)
def test_no_layout_means_none(data: st.DataObject, ranks: int, shapes: ModelShapes, options: dict[str, Any]) -> None:
    """Where a message says that nothing works, a layout drawn at random does not either."""
    bare, messages = ModelShapes(llm=shapes.llm), []
    for _ in range(2):
        try:
            check_plan(ParallelPlan.for_llm(data.draw(layouts(ranks))), bare, ranks, **options)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("works")
    assert len({"no layout of" in message for message in messages}) == 1


def test_layout_as_toml() -> None:
    assert as_toml("llm", Layout(dp=2, tp=4)) == "[parallel.llm] tp = 4 (dp = 2)"
    assert as_toml("llm", Layout(dp=8)) == "[parallel.llm] (dp = 8)"
    assert as_toml("llm", Layout(dp=8), Layout(pp=2, dp=4, shard=2)) == "[parallel.llm] pp = 1, shard = 0 (dp = 8)"
