"""Stand-ins for flash-attn, transformer-engine and apex: their call signatures, computed with plain torch on a CPU.

Each checks what the real package would: dtypes, shapes, arguments that it does not know. Put into ``sys.modules`` by
:func:`install`, they let every line that calls these packages run where none of them can be installed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG: list[Any] = []
"""What the stand-ins were asked to do; emptied by :func:`install`."""


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let stand-ins be imported: ``flash_attn``, ``flash_attn_interface``, ``transformer_engine``, ``apex``."""
    LOG.clear()
    made = {
        "flash_attn": lambda: [module("flash_attn", flash_attn_varlen_func=flash_attn_2)],
        "flash_attn_interface": lambda: [module("flash_attn_interface", flash_attn_varlen_func=flash_attn_3)],
        "transformer_engine": transformer_engine,
        "apex": apex,
    }
    for name in names:
        for each in made[name]():
            monkeypatch.setitem(sys.modules, each.__name__, each)


def dense_varlen(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, causal: bool) -> Tensor:
    """Attention segment by segment, in float32."""
    parts = []
    for start, end in pairwise(borders.tolist()):
        heads = [x[start:end].float().transpose(0, 1) for x in (q, k, v)]
        heads[1:] = [x.repeat_interleave(q.shape[1] // x.shape[0], 0) for x in heads[1:]]
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(0, 1))
    return torch.cat(parts).to(q.dtype)


def check_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.device == q.device
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    longest = int(cu_q.diff().max())
    assert isinstance(max_q, int)
    assert max_q == max_k == longest


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Signature of flash_attn 2.8's function."""
    check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    LOG.append(("flash_attn_2", cu_seqlens_q))
    return dense_varlen(q, k, v, cu_seqlens_q, causal)


def flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Signature of version 3's function, which in early builds returns a pair."""
    check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    LOG.append(("flash_attn_3", cu_seqlens_q))
    return dense_varlen(q, k, v, cu_seqlens_q, causal), torch.zeros(q.shape[1], q.shape[0])


class Recipe:
    """Base of recipes."""

    def __init__(self, *, reduce_amax: bool = True) -> None:
        self.reduce_amax = reduce_amax


ACTIVE: list[Recipe | None] = [None]
"""Recipes of the contexts that are open, innermost last."""


@contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None, amax_reduction_group: Any = None
) -> Iterator[None]:
    """transformer-engine's context, which can be entered again inside itself."""
    ACTIVE.append(recipe if enabled else None)
    try:
        yield
    finally:
        ACTIVE.pop()


class TELinear(nn.Module):
    """transformer-engine's Linear: its arguments, its names, its demands; FP8 is rounding to float8."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        *,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        else:
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)  # as the real one: no parameter

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        recipe = ACTIVE[-1]
        LOG.append(("linear", None if recipe is None else type(recipe).__name__))
        assert inp.dtype == self.weight.dtype
        assert inp.shape[:-1].numel() > 0, "a kernel without rows"
        weight = self.weight
        if recipe is not None:
            assert inp.shape[:-1].numel() % 32 == 0
            assert inp.shape[-1] % 16 == 0
            assert weight.shape[0] % 16 == 0
            weight = weight + (weight.to(torch.float8_e4m3fn).to(weight.dtype) - weight).detach()
        bias = self.bias if isinstance(self.bias, nn.Parameter) else None
        return F.linear(inp, weight, bias)


class TERMSNorm(nn.Module):
    """transformer-engine's RMSNorm."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
    ) -> None:
        super().__init__()
        assert device is not None, "it would go to the GPU"
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        assert x.numel() > 0, "a kernel without rows"
        LOG.append(("norm", type(self).__name__))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TELayerNorm(TERMSNorm):
    """transformer-engine's LayerNorm."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(normalized_shape, eps, **options)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        assert x.numel() > 0, "a kernel without rows"
        LOG.append(("norm", type(self).__name__))
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FusedRMSNorm(nn.Module):
    """apex' RMSNorm: no dtype, no device."""

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps = torch.Size((normalized_shape,)), eps
        self.weight = nn.Parameter(torch.empty(normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        assert input.numel() > 0, "a kernel without rows"
        LOG.append(("norm", type(self).__name__))
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)


class FusedLayerNorm(FusedRMSNorm):
    """apex' LayerNorm."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5) -> None:
        super().__init__(normalized_shape, eps)
        self.bias = nn.Parameter(torch.empty(normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        assert input.numel() > 0, "a kernel without rows"
        LOG.append(("norm", type(self).__name__))
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class FusedAdam(torch.optim.Optimizer):
    """apex' and transformer-engine's Adam: one count of steps for each group, moments for each parameter."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
                first = state["exp_avg"] / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p.sub_(group["lr"] * (first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p))


def transformer_engine() -> list[ModuleType]:
    """The modules of transformer-engine."""
    names = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    recipes = module("transformer_engine.common.recipe", **{name: type(name, (Recipe,), {}) for name in names})
    optimizers = module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam)
    pytorch = module(
        "transformer_engine.pytorch",
        Linear=TELinear,
        RMSNorm=TERMSNorm,
        LayerNorm=TELayerNorm,
        autocast=autocast,
        optimizers=optimizers,
        is_fp8_available=lambda return_reason=False: (True, "") if return_reason else True,
        is_fp8_block_scaling_available=lambda return_reason=False: (True, "") if return_reason else True,
        is_mxfp8_available=lambda return_reason=False: (
            (False, "Device compute capability 10.0 or higher required for MXFP8 execution.")
            if return_reason
            else False
        ),
    )
    common = module("transformer_engine.common", recipe=recipes)
    return [module("transformer_engine", common=common, pytorch=pytorch), common, recipes, pytorch, optimizers]


def apex() -> list[ModuleType]:
    """The modules of apex, and its compiled ones."""
    normalization = module("apex.normalization", FusedRMSNorm=FusedRMSNorm, FusedLayerNorm=FusedLayerNorm)
    optimizers = module("apex.optimizers", FusedAdam=FusedAdam)
    compiled = [module("fused_layer_norm_cuda"), module("amp_C")]
    return [module("apex", normalization=normalization, optimizers=optimizers), normalization, optimizers, *compiled]
