"""Rotary positions: against complex numbers, against the reference, in place, and the CUDA kernel's body on a CPU."""

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from evovlm.csrc.ops import rotary, rotary_frequencies, rotary_qk, rotary_qk_, rotary_reference

from .kernel_support import DTYPES, compile_for_host

ANY_TIME = settings(deadline=None)
SEEDS = st.integers(0, 2**31)
FRACTIONAL = st.integers(0, 4096 * 256).map(lambda n: n / 256)
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotated_by_complex_numbers(x: list[float], position: float, theta: float) -> list[float]:
    """One head's channels, in Python's own float64: channels i and i + D/2 are one complex number."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        number = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = number.real, number.imag
    return out


def assert_rotated(ours: Tensor, expected: Tensor, scale: float) -> None:
    """Equal to a rounding of the largest element; both channels of a pair enter each result."""
    assert ours.dtype == expected.dtype
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCES[ours.dtype] * scale)


@ANY_TIME
@given(SEEDS, st.lists(FRACTIONAL, min_size=1, max_size=6), st.integers(1, 8), st.sampled_from([1e4, 1e6, 5e7]))
def test_fractional_positions(seed: int, positions: list[float], half: int, theta: float) -> None:
    x = normal(seed, len(positions), 2, 2 * half)
    expected = torch.tensor(
        [
            [rotated_by_complex_numbers(head, p, theta) for head in token]
            for token, p in zip(x.tolist(), positions, strict=True)
        ],
        dtype=torch.float64,
    )
    exact = torch.tensor(positions, dtype=torch.float64)
    ours = rotary(x, exact, rotary_frequencies(exact, 2 * half, theta))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    # float32 angles are as good as float32 can hold an angle: half a unit in the last place, or a few, of the position.
    single = rotary(x.float(), exact.float(), rotary_frequencies(exact.float(), 2 * half, theta))
    assert single.dtype == torch.float32
    tolerance = 4e-6 + 4e-7 * max(positions)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=tolerance * float(x.abs().max()))


@ANY_TIME
@given(
    SEEDS,
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
)
def test_equals_the_reference(
    seed: int, num_tokens: int, heads: int, half: int, dtype: torch.dtype, wide: torch.dtype, inverse: bool
) -> None:
    positions = (normal(seed, num_tokens).abs() * 3e4 * 256).round().div(256).to(wide)
    inv_freq = rotary_frequencies(positions, 2 * half, 1e6)
    # A view: heads apart, tokens apart, an odd offset.
    fused = normal(seed + 1, num_tokens, heads + 2, 2 * half + 3, dtype=dtype)
    x = fused[:, 1:-1, 3:]
    assert_rotated(
        rotary(x, positions, inv_freq, inverse=inverse),
        rotary_reference(x, positions, inv_freq, inverse=inverse),
        float(x.abs().max()) if x.numel() else 1.0,
    )


@pytest.mark.parametrize("half", [32, 64, 7])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_queries_and_keys_together_and_apart(half: int, dtype: torch.dtype) -> None:
    num_tokens, width = 33, 2 * half
    fused = normal(0, num_tokens, 8 * width, dtype=dtype)
    q, k = fused[:, : 4 * width].unflatten(1, (4, width)), fused[:, 4 * width : 6 * width].unflatten(1, (2, width))
    positions = torch.arange(num_tokens) / 4
    inv_freq = rotary_frequencies(positions, width, 1e4)
    for ours, x in zip(rotary_qk(q, k, positions, inv_freq), (q, k), strict=True):
        assert torch.equal(ours, rotary(x, positions, inv_freq))
    in_place = [x.flatten(1).clone() for x in (q, k)]
    for ours, buffer, x in zip(rotary_qk_(*in_place, positions, inv_freq), in_place, (q, k), strict=True):
        assert torch.equal(ours, rotary(x, positions, inv_freq))
        assert ours.data_ptr() == buffer.data_ptr()


def test_threads_change_nothing() -> None:
    positions = torch.arange(700) / 8
    inv_freq = rotary_frequencies(positions, 64, 1e4)
    q, k = normal(0, 700, 4, 64, dtype=torch.float32), normal(1, 700, 2, 64, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(rotary_qk(q, k, positions, inv_freq))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_sines_are_those_of_float32_angles_to_one_rounding() -> None:
    """Positions up to 2^20 in steps of 1/256: sin and cos of the float32 angle, at most a rounding away."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(-(2**28), 2**28, (20_000,), generator=generator).double().div(256).float()
    inv_freq = rotary_frequencies(positions, 32, 1e4)
    x = torch.zeros(len(positions), 1, 32)
    x[..., :16] = 1
    turned = rotary(x, positions, inv_freq)[:, 0].double()
    angles = (positions[:, None] * inv_freq).double()
    exact = torch.cat((angles.cos(), angles.sin()), dim=-1)
    narrow = exact.float().abs()
    unit = torch.nextafter(narrow, torch.tensor(math.inf)) - narrow
    assert float(((turned - exact).abs() / unit).max()) < 0.51


@pytest.mark.parametrize("position", [2.0**20, 3e7, -(2.0**24), 1e30])
def test_angles_beyond_the_fast_range(position: float) -> None:
    positions = torch.tensor([position, 1.0])
    inv_freq = rotary_frequencies(positions, 8, 1e4)
    x = normal(0, 2, 3, 8, dtype=torch.float32)
    expected = rotary_reference(x.double(), positions, inv_freq).float()
    torch.testing.assert_close(rotary(x, positions, inv_freq), expected, rtol=0, atol=1e-6)


def test_a_position_that_is_no_number_spoils_its_own_token_alone() -> None:
    positions = torch.tensor([1.0, math.nan, 2.0])
    turned = rotary(torch.ones(3, 1, 8), positions, rotary_frequencies(positions, 8, 1e4))
    assert turned.isnan().flatten(1).all(1).tolist() == [False, True, False]


@ANY_TIME
@given(SEEDS, FRACTIONAL, FRACTIONAL, FRACTIONAL)
def test_scores_depend_on_the_distance_alone(seed: int, a: float, b: float, shift: float) -> None:
    q, k = normal(seed, 1, 1, 8), normal(seed + 1, 1, 1, 8)

    def score(first: float, second: float) -> Tensor:
        at = [torch.tensor([p], dtype=torch.float64) for p in (first, second)]
        turned = [rotary(x, p, rotary_frequencies(p, 8, 1e4)) for x, p in zip((q, k), at, strict=True)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(a, b), score(a + shift, b + shift), rtol=0, atol=1e-9)


def test_float32_angles_tell_the_finest_strides_apart() -> None:
    positions = 8000 + torch.arange(257) / 256
    x = torch.tensor([1.0, 0.0]).expand(257, 1, 2)
    cos = rotary(x, positions, rotary_frequencies(positions, 2, 1e6))  # the fastest pair: one radian per position
    assert len(cos[:, 0, 0].unique()) > 250


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_positions_in_narrow_dtypes_are_refused(dtype: torch.dtype) -> None:
    positions = torch.ones(3).to(dtype)
    with pytest.raises(TypeError, match=f"float32 or float64, got {dtype}"):
        rotary_frequencies(positions, 8, 1e4)
    with pytest.raises(RuntimeError, match="positions and frequencies must both be float32 or both float64"):
        rotary(torch.ones(3, 1, 8), positions, torch.ones(4))


@pytest.mark.parametrize(
    ("x", "num_positions", "message"),
    [
        (torch.ones(3, 2, 8), 4, "T = 4 positions"),
        (torch.ones(3, 2, 6), 3, r"D = 2 \* 4 frequencies"),
        (torch.ones(3, 8), 3, "expected"),
        (torch.ones(3, 2, 8, dtype=torch.int32), 3, "must be float32, float64, bfloat16 or float16"),
    ],
)
def test_wrong_shapes_are_refused(x: Tensor, num_positions: int, message: str) -> None:
    positions = torch.ones(num_positions)
    with pytest.raises(RuntimeError, match=message):
        rotary(x, positions, rotary_frequencies(positions, 8, 1e4))


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.tensor([0.0, 1.25, 7.0, 2.0], dtype=torch.float64)
    return normal(0, 4, 4, 6), normal(1, 4, 2, 6), positions, rotary_frequencies(positions, 6, 1e4)


def test_gradients() -> None:
    q, k, *angles = case()
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: rotary(q, *angles), (q,))
    assert torch.autograd.gradcheck(lambda q, k: rotary_qk(q, k, *angles), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rotary_qk(q, k, *angles), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: rotary_qk_(q.flatten(1) * 2, k.flatten(1) * 2, *angles), (q, k))


def test_nothing_but_positions_is_kept() -> None:
    q, k, *angles = case()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        rotary_qk(q.requires_grad_(), k, *angles)
        rotary_qk_(q.flatten(1) + 0, k.flatten(1) + 0, *angles)
    assert set(kept) == {x.data_ptr() for x in angles}


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_in_place_and_recomputed(mode: str) -> None:
    """Projections may be rotated in place under each way of recomputing: their products' outputs stay as they were."""
    _, _, *angles = case()
    x, *weights = (normal(seed, *shape).requires_grad_() for seed, shape in enumerate(((4, 5), (12, 5), (24, 5))))

    def block(x: Tensor) -> Tensor:
        q, k = rotary_qk_(*(torch.nn.functional.linear(x, weight) for weight in weights), *angles)
        return q.sum(1).sin() * k.sum(1)

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    out = block(x) if mode == "none" else checkpoint(block, x, **options)
    ours = torch.autograd.grad(out.sum(), (x, *weights))

    def stated(x: Tensor) -> Tensor:
        q, k = (rotary_reference((x @ weight.T).unflatten(1, (-1, 6)), *angles) for weight in weights)
        return q.sum(1).sin() * k.sum(1)

    for got, expected in zip(ours, torch.autograd.grad(stated(x).sum(), (x, *weights)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_projections_that_are_views_are_left_alone() -> None:
    q, k, *angles = case()
    fused = torch.cat((q.flatten(1), k.flatten(1)), dim=1)
    before = fused.clone()
    turned = rotary_qk_(fused[:, :24], fused[:, 24:], *angles)
    assert torch.equal(fused, before)
    for ours, x in zip(turned, (q, k), strict=True):
        assert torch.equal(ours, rotary(x, *angles))


def test_registration() -> None:
    q, k, *angles = case()
    for x in (q, k):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.evovlm.rotary.default, (q, *angles, False))
    torch.library.opcheck(torch.ops.evovlm.rotary_qk.default, (q, k, *angles, True))
    torch.library.opcheck(torch.ops.evovlm.rotary_qk_.default, (q.detach(), k.detach(), *angles, False))


def test_compiled_without_breaks() -> None:
    q, k, *angles = case()
    flat = [x.flatten(1) for x in (q, k)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def turned(q: Tensor, k: Tensor) -> Tensor:
        a, b = rotary_qk_(q * 1, k * 1, *angles)
        return a.sum() + b.square().sum() + a.flatten()[3]

    expected = [x.clone().requires_grad_() for x in flat]
    got = [x.clone().requires_grad_() for x in flat]
    a, b = (rotary_reference(x.unflatten(1, (-1, 6)), *angles) for x in expected)
    (a.sum() + b.square().sum() + a.flatten()[3]).backward()
    turned(*got).backward()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("host_rotary.cpp", tmp_path_factory.mktemp("rotary"))


def addresses(*tensors: Tensor) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


@settings(deadline=None, max_examples=60)
@given(
    SEEDS,
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(0, 5),
    st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 8]),
    st.booleans(),
)
def test_cuda_kernel(
    host: ctypes.CDLL,
    seed: int,
    num_tokens: int,
    heads: int,
    kv_heads: int,
    half: int,
    dtype: torch.dtype,
    exact: bool,
    inverse: bool,
    offset: int,
    in_place: bool,
) -> None:
    positions = (normal(seed, num_tokens).abs() * 1e4).to(torch.float64 if exact else torch.float32)
    inv_freq = rotary_frequencies(positions, 2 * half, 1e4)
    fused = normal(seed, num_tokens + 1, (heads + kv_heads) * 2 * half + offset, dtype=dtype)
    rows = fused[:num_tokens, offset:].unflatten(1, (-1, 2 * half))
    q, k = rows[:, :heads], rows[:, heads:]
    expected = [rotary_reference(x, positions, inv_freq, inverse=inverse) for x in (q, k)]
    outputs = [q, k] if in_place else [torch.full_like(x, math.nan).contiguous() for x in (q, k)]
    shape = [num_tokens, half, int(inverse)]
    for x, y in zip((q, k), outputs, strict=True):
        shape += [x.shape[1], x.stride(0), x.stride(1), y.stride(0), y.stride(1)]
    aligned = host.rotate(
        DTYPES.index(dtype),
        ctypes.c_bool(exact),
        addresses(q, k),
        addresses(*outputs),
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_void_p(positions.data_ptr()),
        ctypes.c_void_p(inv_freq.data_ptr()),
    )
    vector = 16 // dtype.itemsize
    if offset == 0 and half % vector == 0:
        assert aligned  # torch aligns what it allocates to 64 bytes
    if half % vector:
        assert not aligned
    scale = float(fused.abs().max()) if num_tokens else 1.0
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCES[dtype] * scale)
