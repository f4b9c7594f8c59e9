"""What attention sends equals the closed formulas of heads.py and ring.py, call by call and byte by byte."""

import torch

from evovlm.parallel.layout import Layout

from .attend_support import HEAD_DIM, Case, count

BYTES = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}
"""Of an element that travels, and of a gradient in the ring."""

T = 96


def test_calls_and_bytes_of_a_layer() -> None:
    layouts = [Layout(cp=8), Layout(cp=8, window=4), Layout(cp=8, window=1), Layout(cp=4, hp=2, window=2), Layout(hp=8)]
    cases = [Case(layout, (0, 11, 12, 50, T), 8, 2, dtype) for layout in layouts for dtype in BYTES]
    for counts in count(8, cases):
        for case, (calls, sent, _) in zip(cases, counts, strict=True):
            assert (calls, sent) == expected(case), case


def test_transfers_start_before_the_work_that_hides_them() -> None:
    """One long segment: a rank computes two squares and a rectangle on its own block, one rectangle on each other."""
    hop = ["send", "recv_"]
    one, double = (Case(Layout(cp=4, window=window), (0, T)) for window in (0, 2))
    for counts in count(4, [one, double]):
        (_, _, order), (_, _, double_order) = counts
        split = order.index("attention_backward") - 2  # the first hop of the backward pass comes before it
        own, other = ["attention"] * 3, ["attention"]
        assert order[:split] == [*hop, *own, *hop, *other, *hop, *other, *other]
        own, other = ["attention_backward"] * 3, ["attention_backward"]
        # The block and the gradient of the step before travel while a step is computed; then the gradient's way home.
        assert order[split:] == [*hop, *own, *2 * hop, *other, *2 * hop, *other, *hop, *other, *hop]
        # The hop to the next window leaves with the first of the cycle.
        assert double_order[:9] == [*2 * hop, *["attention"] * 4, *hop][:9]


def expected(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    layout, (narrow, wide) = case.layout, BYTES[case.dtype]
    kv_heads = max(case.num_kv_heads // layout.hp, 1)
    calls, sent = {}, {}
    if layout.cp > 1:
        window = layout.window or layout.cp
        windows = layout.cp // window
        blocks = 2 * (windows * (window - 1) + windows - 1)
        gradients = (windows * window if window > 1 else 0) + (windows if windows > 1 else 0)
        one = 2 * (T // layout.cp) * kv_heads * HEAD_DIM
        calls |= {"send": blocks + gradients, "recv_": blocks + gradients}
        sent |= dict.fromkeys(("send", "recv_"), one * (blocks * narrow + gradients * wide))
    if layout.hp > 1:
        rows = T // (layout.cp * layout.hp)
        heads = case.num_heads + 2 * kv_heads * layout.hp + case.num_heads
        calls["alltoall_base_"] = 4
        sent["alltoall_base_"] = 2 * rows * heads * HEAD_DIM * narrow
    return calls, sent
