"""Leaf operators: the only code that may differ between devices, each beside its plain PyTorch reference.

    normalisation       rms_norm           [..., H]                        ->  [..., H]
    gate of an MLP      swiglu             gate, up [..., F]               ->  [..., F]
    residual branch     add_scaled         x, branch [..., C], scale [C]   ->  [..., C]
    cross-entropy       cross_entropy_     logits [n, V], labels [n]       ->  [n]; logits become their gradient
    copies of rows      gather_rows        [N, H], index [n]               ->  [n, H]
                        scatter_rows       [T, H], index [n], rows [n, H]  ->  [T, H]
                        sum_rows           [n, H], index [n]               ->  [N, H]
    rotary              rotary, rotary_qk  q or k [T, ·, D] + positions [T] -> [T, ·, D]
    positions           v2pe_positions     run table [n, 2] + cu_seqlens   ->  [T]
    segment attention   packed_attention   q, k, v [T, ·, D] + cu_seqlens  ->  [T, A, D]     (+ shared prefixes)
    attention block     attention_block    q [n, A, D], k, v [m, K, D]     ->  [n, A, D], log-sum-exp [A, n]

A function here chooses the implementation by device; ``*_reference`` states what it must equal.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from evovlm.csrc import attention_autograd, fused_autograd, norm_autograd  # noqa: F401 - register shapes and gradients
from evovlm.csrc.rotary_autograd import RotateInPlace
from evovlm.csrc.rows_autograd import ScatterInPlace


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (or wider) and cast back (spec §1.2).

    One pass over memory forward, one backward, which keeps only ``x`` and a number a row. Gradients of the weight are
    summed in a fixed order: no result depends on the number of threads. Differentiable once.

    Args:
        x: ``[..., H]``, any floating dtype.
        weight: ``[H]``.
        eps: Added to the mean square.

    Returns:
        Same shape and dtype as ``x``; a wider weight widens it.
    """
    if x.dtype != weight.dtype or isinstance(x, DTensor) or isinstance(weight, DTensor):
        return rms_norm_reference(x, weight, eps)
    normed: Tensor = torch.ops.evovlm.rms_norm(x, weight, eps)[0]
    return normed


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """State :func:`rms_norm` with one operator a term."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate of a SwiGLU MLP: ``silu(gate) · up``, on CPU in one pass over memory, and its gradient in another.

    Only ``gate`` and ``up`` are kept for backward. 16-bit numbers are widened, and the result is rounded once.

    Args:
        gate: ``[..., F]``: float32, float64, bfloat16 or float16.
        up: Same shape and dtype.

    Returns:
        Same shape and dtype. Differentiable once on CPU.
    """
    if not gate.is_cpu or gate.dtype != up.dtype or isinstance(gate, DTensor) or isinstance(up, DTensor):
        return swiglu_reference(gate, up)
    gated: Tensor = torch.ops.evovlm.swiglu(gate, up)
    return gated


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """State :func:`swiglu` with one operator a term."""
    return F.silu(gate) * up


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor, factors: Tensor | None = None) -> Tensor:
    """Add a residual branch with a scale per channel: ``x + branch · scale · factors``, on CPU in one pass over memory.

    Its gradient is one pass as well, which keeps the branch; that of the scale is summed in a fixed order, so that no
    result depends on the number of threads. 16-bit numbers are widened, and the result is rounded once.

    Args:
        x: ``[..., C]``: float32, float64, bfloat16 or float16.
        branch: Same shape and dtype.
        scale: ``[C]``.
        factors: ``[N]``, N the first dimension of ``x``: factor of each tile's branch (drop path). It has no gradient.

    Returns:
        Shape and dtype of ``x``. Differentiable once on CPU.
    """
    given = [x, branch, scale] if factors is None else [x, branch, scale, factors]
    if not x.is_cpu or any(part.dtype != x.dtype or isinstance(part, DTensor) for part in given):
        return add_scaled_reference(x, branch, scale, factors)
    added: Tensor = torch.ops.evovlm.add_scaled(x, branch, scale, factors)
    return added


def add_scaled_reference(x: Tensor, branch: Tensor, scale: Tensor, factors: Tensor | None = None) -> Tensor:
    """State :func:`add_scaled` with one operator a term."""
    scaled = branch * scale
    return x + (scaled if factors is None else scaled * factors.view(-1, *[1] * (x.ndim - 1)))


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool) -> Tensor:
    """Weighted cross-entropy of each row; where wanted, the logits become its gradient. Outside of any graph.

    On CPU a row stays in the cache: largest logit, exponentials and their sum, then w·(p − onehot).

    Args:
        logits: ``[n, V]``, float32 or float64, contiguous; overwritten on CPU if ``gradient``, elsewhere in any case.
        labels: int64 ``[n]``, from 0 to V − 1.
        weights: ``[n]`` in the dtype of the logits.
        gradient: Whether to write ``weights · (softmax(logits) − onehot(labels))`` over the logits.

    Returns:
        ``[n]``: weight · (log Σ exp(logits) − logits at the label).

    Raises:
        RuntimeError: A label is not a column (on CUDA the kernel stops), or shapes do not fit.
    """
    if not logits.is_cpu:
        return cross_entropy_reference(logits, labels, weights, gradient)
    losses: Tensor = torch.ops.evovlm.cross_entropy_(logits, labels, weights, gradient)
    return losses


def cross_entropy_reference(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool) -> Tensor:
    """State :func:`cross_entropy_` with one operator a term, all in place."""
    largest, target = logits.amax(1, keepdim=True), logits.gather(1, labels[:, None])
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    if gradient:
        logits.mul_(weights[:, None] / sums).scatter_add_(1, labels[:, None], -weights[:, None])
    return (sums.log() + largest - target).squeeze(1) * weights


def gather_rows(x: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Copy rows: ``out[i] = x[index[i]]``; ``x.index_select(0, index)`` in one parallel pass.

    The gradient of ``x`` is :func:`sum_rows` of the result's: also summed in a fixed order, without atomics.

    Args:
        x: ``[N, H]``, any dtype; rows need not lie next to each other.
        index: int64 ``[n]``, from 0 to N − 1.
        out: ``[n, H]`` to fill, outside of any graph.

    Returns:
        ``[n, H]``; ``out`` if it was given.

    Raises:
        RuntimeError: A number is not that of a row (on CUDA the kernel stops), or shapes do not fit.
    """
    if out is None:
        picked: Tensor = torch.ops.evovlm.gather_rows(x, index)
        return picked
    torch.ops.evovlm.gather_rows_into(x, index, out)
    return out


def scatter_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Replace rows: ``base`` with row ``index[i]`` set to ``rows[i]``; ``base.index_copy(0, index, rows)`` in one pass.

    Args:
        base: ``[T, H]``, any dtype.
        index: int64 ``[n]``, from 0 to T − 1, each at most once.
        rows: ``[n, H]`` in the dtype of ``base``.

    Returns:
        ``[T, H]``, a new tensor.

    Raises:
        RuntimeError: A number is not that of a row, or comes twice (on CUDA the kernel stops), or shapes do not fit.
    """
    replaced: Tensor = torch.ops.evovlm.scatter_rows(base, index, rows)
    return replaced


def scatter_rows_(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Replace rows as :func:`scatter_rows` does, but in place, so that only n rows move: for a base of no other use.

    Without a graph ``base`` is always what is written. In a graph it is where autograd allows it: on what an embedding
    has just made, but not on a view, nor where a graph is traced or a dispatch mode watches (selective checkpointing
    may have kept the base): there the result is a new tensor. Differentiable once in place.

    Returns:
        ``[T, H]``: what to go on with.

    Raises:
        RuntimeError: As :func:`scatter_rows`; or the base is a leaf that wants a gradient.
    """
    if not (torch.is_grad_enabled() and (base.requires_grad or rows.requires_grad)):
        torch.ops.evovlm.scatter_rows_(base, index, rows)
        return base
    if base._is_view() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return scatter_rows(base, index, rows)
    written: Tensor = ScatterInPlace.apply(base, index, rows)  # type: ignore[no-untyped-call]
    return written


def drop_rows(x: Tensor, index: Tensor) -> Tensor:
    """Copy ``x`` ``[T, H]`` with zeros in rows ``index`` ``[n]``: the gradient of the base of :func:`scatter_rows`."""
    kept: Tensor = torch.ops.evovlm.drop_rows(x, index)
    return kept


def sum_rows(rows: Tensor, index: Tensor, num_rows: int, *, out: Tensor | None = None) -> Tensor:
    """Add rows up: ``out[r] = Σ rows[i]`` over all i with ``index[i] = r``, i ascending; 0 where there is none.

    What ``new_zeros`` and ``index_add_`` make, in one pass that writes each row of the result once.

    Args:
        rows: ``[n, H]``, a floating dtype (any, where no number comes twice); 16-bit rows are summed in float32.
        index: int64 ``[n]``, from 0 to ``num_rows`` − 1.
        num_rows: N.
        out: ``[N, H]`` to fill, outside of any graph; what it holds before does not matter.

    Returns:
        ``[N, H]``; ``out`` if it was given.

    Raises:
        RuntimeError: A number is not that of a row (on CUDA the kernel stops), or shapes do not fit.
    """
    if out is None:
        summed: Tensor = torch.ops.evovlm.sum_rows(rows, index, num_rows)
        return summed
    torch.ops.evovlm.sum_rows_into(rows, index, out)
    return out


def rotary_frequencies(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Frequencies ``theta^(−2i/D)`` of the rotary angles, to go with positions.

    Args:
        positions: ``[T]`` float32 (may be fractional) or float64.
        head_dim: D.
        theta: Base of the frequencies.

    Returns:
        ``[D/2]`` in the dtype and on the device of ``positions``.

    Raises:
        TypeError: Positions came in a dtype that cannot hold fractions exactly (rule 3 of the design).
    """
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotary positions must be float32 or float64, got {positions.dtype}")
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=positions.dtype) / head_dim
    return torch.as_tensor(theta**-exponent)


def rotary(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of every head by the angle ``position · inv_freq[i]`` of its token.

    Cosines and sines are made on the way, once for all heads of a token, and never stored; the gradient is the rotation
    by the negative angle. 16-bit channels are widened, and the result is rounded once.

    Args:
        x: ``[T, A, D]`` queries or keys: float32, float64, bfloat16 or float16, strided.
        positions: ``[T]``, float32 or float64; their dtype is that of the angles.
        inv_freq: ``[D/2]`` in the dtype of ``positions``, at most 1, from :func:`rotary_frequencies`.
        inverse: Rotate by the negative angle.

    Returns:
        ``[T, A, D]`` in the dtype of ``x``, contiguous.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
    """
    rotated: Tensor = torch.ops.evovlm.rotary(x, positions, inv_freq, inverse)
    return rotated


def rotary_qk(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Apply :func:`rotary` to queries ``[T, A, D]`` and keys ``[T, K, D]`` in one pass that shares their angles."""
    rotated: tuple[Tensor, Tensor] = torch.ops.evovlm.rotary_qk(q, k, positions, inv_freq, False)
    return rotated


def rotary_qk_(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Apply :func:`rotary_qk` to projections that nothing else needs: in place where that is allowed.

    It is not where the projections are views, where a graph is traced, or where a dispatch mode watches: selective
    checkpointing keeps outputs of products, and would find them changed.

    Args:
        q: ``[T, A · D]``, channels contiguous; overwritten.
        k: ``[T, K · D]``, likewise.
        positions: ``[T]``.
        inv_freq: ``[D/2]``.

    Returns:
        ``[T, A, D]`` and ``[T, K, D]``.
    """
    shape = (-1, 2 * inv_freq.shape[0])
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or q._is_view() or k._is_view():
        return rotary_qk(torch.unflatten(q, -1, shape), torch.unflatten(k, -1, shape), positions, inv_freq)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        q, k = RotateInPlace.apply(q, k, positions, inv_freq)  # type: ignore[no-untyped-call]
        return torch.unflatten(q, -1, shape), torch.unflatten(k, -1, shape)
    q, k = torch.unflatten(q, -1, shape), torch.unflatten(k, -1, shape)
    torch.ops.evovlm.rotary_qk_(q, k, positions, inv_freq, False)
    return q, k


def rotary_reference(x: Tensor, positions: Tensor, inv_freq: Tensor, *, inverse: bool = False) -> Tensor:
    """State :func:`rotary` with tables of cosines and sines ``[T, D/2]``."""
    compute = torch.promote_types(x.dtype, torch.float32)
    angles = (positions[:, None] * inv_freq).to(torch.promote_types(compute, positions.dtype))
    cos, sin = (table[:, None].to(compute) for table in (angles.cos(), angles.sin()))
    if inverse:
        sin = -sin
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def v2pe_positions(cu_seqlens: Tensor, runs: Tensor, deltas: Tensor, num_tokens: int) -> Tensor:
    """Positions of a whole pack: text steps by 1, the visual tokens of run r by ``deltas[r]``, from 0 in each segment.

    Its reference, one segment at a time, is :func:`evovlm.models.v2pe.segment_positions` (spec §2).

    Args:
        cu_seqlens: int32 ``[S + 1]``, segment borders from 0 to T; padding is a segment of its own.
        runs: int64 ``[n, 2]``: first row in the pack and length of each run of visual tokens (all tiles of an image),
            by rising row, none empty, each inside one segment.
        deltas: float64 ``[n]``, strides in (0, 1].
        num_tokens: T.

    Returns:
        float32 ``[T]``, on the device of the tables.

    Raises:
        RuntimeError: Dtypes or shapes do not fit; on CPU also where borders or runs are not as above. A CUDA kernel
            cannot raise: there the positions of a segment are NaN from a wrong run on.
    """
    positions: Tensor = torch.ops.evovlm.v2pe_positions(cu_seqlens, runs, deltas, num_tokens)
    return positions


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    causal: bool = True,
    prefixes: Tensor | None = None,
) -> Tensor:
    """Attention inside each segment of a pack, and of some queries to a prefix; no ``[T, T]`` mask is made.

    On CPU one operator does all segments and heads: scores stay in the cache, work is shared over threads by segment,
    head and queries, and no result depends on the number of threads. On CUDA the fastest flash kernel there is; with
    prefixes torch's own. Differentiable once.

    Args:
        q: ``[T, A, D]``: float32, float64, bfloat16 or float16 (16-bit is computed in float32, rounded once).
        k: ``[T, K, D]``, K divides A. Rows of all three may be strided: views of a fused projection are not copied.
        v: ``[T, K, D]``.
        cu_seqlens: Segment borders on the host: S + 1 rising integers from 0 to T; an int32 tensor is used as it is.
        causal: Query i of a segment sees keys 0 … i; otherwise it sees all of its segment.
        prefixes: int32 ``[n, 4]`` on the host, rows of the pack (query start, query end, key start, key end): these
            queries see all these keys besides their segment. See :func:`evovlm.csrc.prefixes.list_prefixes`.

    Returns:
        ``[T, A, D]``.

    Raises:
        RuntimeError: Shapes, dtypes or borders do not fit.
        ValueError: A prefix leaves the pack, is not wholly before its queries' segment, or shares queries with another.
    """
    if prefixes is not None and len(prefixes):
        from evovlm.csrc import attention_prefix  # noqa: F401 - registers the operator

        cu = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens, dtype=torch.int32)
        shared: Tensor = torch.ops.evovlm.prefix_attention(q, k, v, cu, prefixes, causal)[0]
        return shared
    if q.is_cuda:
        from evovlm.csrc.attention_cuda import packed_attention_cuda

        on_cuda: Tensor = packed_attention_cuda(q, k, v, cu_seqlens, causal)
        return on_cuda
    cu = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens, dtype=torch.int32)
    out: Tensor = torch.ops.evovlm.attention(q, k, v, cu, cu, causal)[0]
    return out


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    causal: bool = True,
    prefixes: Tensor | None = None,
) -> Tensor:
    """State :func:`packed_attention` with one dense mask over the whole pack."""
    borders = torch.as_tensor(cu_seqlens[1:], device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)
    segment = torch.bucketize(rows, borders, right=True)
    allowed = segment[:, None] == segment[None]
    if causal:
        allowed &= rows[:, None] >= rows[None]
    for query_start, query_end, key_start, key_end in [] if prefixes is None else prefixes.tolist():
        allowed[query_start:query_end, key_start:key_end] = True
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.einsum("tad,sad->ats", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("ats,sad->tad", weights, v)


def attention_block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of some queries over some keys, with what is needed to merge it with other keys of the same queries.

    The operator of :func:`packed_attention` on CPU, torch's flash kernel on CUDA for half precision; elsewhere
    :func:`attention_block_reference`.

    Args:
        q: ``[n, A, D]``, channels contiguous.
        k: ``[m, K, D]``, K divides A.
        v: ``[m, K, D]``.
        causal: Query i sees keys 0 … i (n = m); otherwise it sees all.

    Returns:
        ``out`` ``[n, A, D]`` in the dtype of ``q``, and ``lse`` ``[A, n]``, the logarithms of the denominators,
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: Causal, and n differs from m.
    """
    if causal and q.shape[0] != k.shape[0]:
        raise ValueError(f"a causal block needs as many queries as keys, got {q.shape[0]} and {k.shape[0]}")
    if q.device.type == "cpu":
        out, lse = torch.ops.evovlm.attention(q, k, v, *_block_borders(q, k), causal)
        return out, lse
    if not has_cuda_flash(q):
        return attention_block_reference(q, k, v, causal)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = flash(_heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal)[:2]
    return _rows_first(out), lse.squeeze(0)


def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients, given the merged output of all blocks of its queries.

    Args:
        grad: ``[n, A, D]``, gradient of the merged output; channels contiguous.
        q: ``[n, A, D]``.
        k: ``[m, K, D]``.
        v: ``[m, K, D]``.
        out: ``[n, A, D]``, the merged output.
        lse: ``[A, n]``, the merged log-sum-exp.
        causal: As in :func:`attention_block`.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, in their shapes and dtypes.
    """
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.evovlm.attention_backward(grad, q, k, v, out, lse, *_block_borders(q, k), causal)
        return dq, dk, dv
    if not has_cuda_flash(q):
        return attention_block_backward_reference(grad, q, k, v, out, lse, causal)
    # Without dropout the kernel reads neither the state of the random numbers nor borders of sequences.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(_heads_first(x) for x in (grad, q, k, v, out)),
        lse.contiguous().unsqueeze(0),
        None,
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        causal,
        state,
        state[:0],
    )
    dq, dk, dv = (_rows_first(x) for x in grads)
    return dq, dk, dv


def attention_block_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """State :func:`attention_block` with a dense matrix of scores."""
    scores, _, v_all = _dense_block(q, k, v, causal)
    lse = scores.logsumexp(-1)
    return torch.einsum("anm,mad->nad", (scores - lse[..., None]).exp(), v_all).to(q.dtype), lse


def attention_block_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """State :func:`attention_block_backward` with a dense matrix of scores."""
    scores, k_all, v_all = _dense_block(q, k, v, causal)
    weights = (scores - lse[..., None]).exp()
    grad, out = grad.to(scores.dtype), out.to(scores.dtype)
    grad_weights = torch.einsum("nad,mad->anm", grad, v_all)
    # The softmax's gradient: what all keys of a query, those of other blocks too, share is out · grad.
    shared = (grad * out).sum(-1).T[..., None]
    grad_scores = weights * (grad_weights - shared) * q.shape[-1] ** -0.5
    dq = torch.einsum("anm,mad->nad", grad_scores, k_all)
    dk = torch.einsum("anm,nad->mad", grad_scores, q.to(scores.dtype))
    dv = torch.einsum("anm,nad->mad", weights, grad)
    dk, dv = (torch.unflatten(x, 1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge_attention_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add the keys behind ``part`` to those behind ``out``, in place: their average, weighted by the denominators.

    Args:
        out: ``[n, A, D]``, float32 or float64; overwritten.
        lse: ``[A, n]``, likewise.
        part: ``[n, A, D]``, any floating dtype.
        part_lse: ``[A, n]`` in the dtype of ``lse``.
    """
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse).T[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def _dense_block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores ``[A, n, m]``, and keys and values with one head for each query head; float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nad,mad->anm", q.to(wide), k) * q.shape[-1] ** -0.5
    if causal:
        above = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return scores, k, v


def _block_borders(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Borders of one segment of all queries and all keys, on the host."""
    cu_q = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    return cu_q, cu_q if k.shape[0] == q.shape[0] else torch.tensor([0, k.shape[0]], dtype=torch.int32)


def has_cuda_flash(q: Tensor) -> bool:
    """Whether CUDA's flash kernels take these queries."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _heads_first(x: Tensor) -> Tensor:
    """``[n, A, D]`` as the kernels want it, ``[1, A, n, D]``; a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _rows_first(x: Tensor) -> Tensor:
    """Inverse of :func:`_heads_first`; a view."""
    return x.squeeze(0).transpose(0, 1)
