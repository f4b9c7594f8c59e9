"""Layers of other packages keep parameters and names; choices that cannot be are one line; FP8 goes where it may."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from evovlm.csrc.attention_cuda import pick_kernel
from evovlm.csrc.backends import Backends, Package, find_backends, look
from evovlm.engine import kernels as kernels_module
from evovlm.engine.kernel_choice import choose_kernels
from evovlm.engine.kernels import Kernels
from evovlm.engine.options import EngineOptions
from evovlm.engine.recompute import Recompute, apply_recompute
from evovlm.engine.settings import FP8Skip, KernelSettings
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import INTERNVL
from evovlm.parallel.layout import Layout, ParallelPlan

from ..csrc import fake_packages
from ..csrc.fake_packages import ACTIVE, LOG
from .support import STEPS, plain_loss, plain_model

PLAIN = ParallelPlan.for_llm(Layout())
CONFIG = InternVLConfig(
    vision=VisionConfig(hidden_size=16, num_layers=3, num_heads=2, ffn_size=32, tile_size=8, patch_size=2),
    decoder=DecoderConfig(
        vocab_size=37, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=4, ffn_size=32
    ),
)
"""Sizes that FP8 takes."""
ALL = ("flash_attn", "flash_attn_interface", "transformer_engine", "apex")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backends]:
    """A Hopper with everything, as far as its packages can tell."""
    fake_packages.install(monkeypatch, *ALL)
    yield replace(look("cuda", (9, 0)), own=Package("evovlm.csrc._ops"), compiler=Package("triton"))


def apply(model: InternVL, chosen: Kernels, recompute: Recompute = "none") -> InternVL:
    """What is done to each module before it is sharded."""
    for module, path in INTERNVL.roots.items():
        root, blocks = model.get_submodule(path), INTERNVL.blocks.get(module)
        chosen.replace_layers(root, module, blocks)
        chosen.wrap_blocks(root, module, blocks)
        if blocks:
            apply_recompute(root, blocks, recompute)
        chosen.wrap_module(root, module)
    return model


def fresh(dtype: torch.dtype = torch.float32, config: InternVLConfig = CONFIG) -> InternVL:
    return plain_model(config).to(dtype).train()


def run(model: InternVL) -> tuple[float, dict[str, torch.Tensor]]:
    loss = plain_loss(model, STEPS[0][3])
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def describe(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        KernelSettings(linear="te"),
        KernelSettings(norm="te"),
        KernelSettings(norm="apex"),
        KernelSettings(norm="torch"),
        KernelSettings(linear="te", norm="te"),
    ],
    ids=lambda s: f"{s.linear}-{s.norm}",
)
def test_other_layers_keep_names_weights_and_results(machine: Backends, settings: KernelSettings) -> None:
    chosen = choose_kernels(settings, machine, PLAIN, dtype=torch.float32)
    plain, ours = fresh(), fresh()
    frozen = ours.mlp1[1].weight.requires_grad_(False)
    before = {name: p.data_ptr() for name, p in ours.named_parameters()}
    apply(ours, chosen)
    plain.mlp1[1].weight.requires_grad_(False)
    assert describe(ours) == describe(plain)
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == before
    assert ours.mlp1[1].weight is frozen
    expected, gradients = run(plain)
    LOG.clear()
    loss, ours_gradients = run(ours)
    kinds = {name for name, _ in LOG}
    wanted = {"linear"} if settings.linear == "te" else set()
    assert kinds == wanted | ({"norm"} if settings.norm in ("te", "apex") else set())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == ours_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_defaults_change_nothing() -> None:
    plain, ours = fresh(), fresh()
    apply(ours, Kernels())
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
    assert all("forward" not in module.__dict__ for module in ours.modules())


def test_a_model_on_the_meta_device_stays_there(machine: Backends) -> None:
    with torch.device("meta"):
        model = InternVL(CONFIG)
    apply(model, choose_kernels(KernelSettings(linear="te", norm="apex"), machine, PLAIN, dtype=torch.float32))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_an_encoder_without_tiles(machine: Backends) -> None:
    model = apply(fresh(), Kernels(KernelSettings(linear="te", norm="te")))
    tokens = model.encode(torch.zeros(0, 3, 8, 8))
    assert tokens.shape == (0, 16)
    tokens.sum().backward()
    for name, p in [*model.vision_model.named_parameters(), *model.mlp1.named_parameters()]:
        assert p.grad is not None, name
        assert not p.grad.any(), name


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_fp8_is_for_the_blocks_it_is_meant_for(machine: Backends, recipe: Any) -> None:
    skip = FP8Skip(modules=("vit", "projector"), first=1, last=1)
    settings = KernelSettings(linear="te", fp8=recipe, fp8_skip=skip)
    model = apply(fresh(torch.bfloat16), choose_kernels(settings, machine, PLAIN, dtype=torch.bfloat16))
    blocks = [{type(layer).__name__ for layer in block.modules()} for block in model.language_model.model.layers]
    assert ["TELinear" in kinds for kinds in blocks] == [False, True, False]
    assert ["Linear" in kinds for kinds in blocks] == [True, False, True]
    assert type(model.language_model.lm_head) is nn.Linear
    expected, plain_gradients = run(fresh(torch.bfloat16))
    LOG.clear()
    loss, gradients = run(model)
    names = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
    llm = [used for kind, used in LOG if kind == "linear"]
    assert llm.count(names[recipe]) == 7  # of the one block
    assert set(llm) == {names[recipe], None}  # ViT and projector are transformer-engine's too, in 16 bits
    assert loss == pytest.approx(expected, rel=0.05)
    assert gradients.keys() == plain_gradients.keys()
    assert any(not torch.equal(gradients[name], plain_gradients[name]) for name in gradients)
    assert ACTIVE == [None]


def test_delayed_scales_are_not_reduced_over_ranks(machine: Backends) -> None:
    with kernels_module._fp8_context("delayed")():
        assert ACTIVE[-1] is not None
        assert ACTIVE[-1].reduce_amax is False


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_are_in_fp8_again(machine: Backends, mode: Recompute) -> None:
    settings = KernelSettings(linear="te", fp8="current")
    recompute: dict[str, Recompute] = {"llm": mode, "vit": mode}
    chosen = choose_kernels(settings, machine, PLAIN, dtype=torch.bfloat16, recompute=recompute)
    loss, gradients = run(apply(fresh(torch.bfloat16), chosen, mode))
    again = [used for kind, used in LOG if kind == "linear"].count("Float8CurrentScaling")
    LOG.clear()
    once = choose_kernels(settings, machine, PLAIN, dtype=torch.bfloat16)
    expected, expected_gradients = run(apply(fresh(torch.bfloat16), once))
    assert [used for kind, used in LOG if kind == "linear"].count("Float8CurrentScaling") == 21
    assert again == 42
    assert loss == expected
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


def test_the_choice_of_attention_holds_in_forward_and_recomputation(machine: Backends) -> None:
    seen: list[str] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with_8_channels = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
            from evovlm.csrc.attention_cuda import _choice

            seen.append(pick_kernel(with_8_channels, machine, _choice.get()))
            return x * self.weight

    for attention, kernel in (("auto", "flash_attn_3"), ("torch", "varlen"), ("flash_attn", "flash_attn_3")):
        root = nn.Sequential(Spy())
        chosen = Kernels(KernelSettings(attention=attention), {"llm": "full"})  # type: ignore[arg-type]
        chosen.wrap_blocks(root, "llm", "0")
        apply_recompute(root, "0", "full")
        chosen.wrap_module(root, "llm")
        seen.clear()
        root(torch.ones(1, requires_grad=True)).sum().backward()
        assert seen == [kernel, kernel]


@pytest.mark.parametrize(
    ("change", "settings", "options", "said"),
    [
        ("transformer_engine", {"linear": "te"}, {}, 'linear = "te": transformer-engine: gone; or take the default'),
        ("transformer_engine", {"adam": "te"}, {}, 'adam = "te": transformer-engine: gone'),
        ("apex_norm", {"norm": "apex"}, {}, 'norm = "apex": transformer-engine: gone'),
        ("apex_adam", {"adam": "apex"}, {}, 'adam = "apex": transformer-engine: gone'),
        ("compiler", {"compile": "block"}, {}, 'compile = "block": transformer-engine: gone'),
        ("own", {}, {}, "transformer-engine: gone"),
        ("", {"fp8": "current"}, {}, 'fp8 = "current" needs linear = "te"'),
        ("", {"fp8": "mxfp8", "linear": "te"}, {}, 'fp8 = "mxfp8": transformer-engine says: Device compute capab'),
        ("", {"fp8": "current", "linear": "te"}, {"dtype": torch.float32}, "precision is float32"),
        ("", {"attention": "flash_attn"}, {"dtype": torch.float32}, 'set precision = "bfloat16"'),
        ("", {"norm": "te"}, {"dtype": torch.float64}, "does not know float64"),
        ("", {"norm": "apex"}, {"plan": ParallelPlan.for_llm(Layout(tp=2))}, "[parallel.llm] has tp = 2; set tp = 1"),
        ("", {"linear": "te"}, {"plan": ParallelPlan.for_llm(Layout(dp=2), vit=Layout(tp=2))}, "[parallel.vit]"),
        (
            "",
            {"fp8": "delayed", "linear": "te"},
            {"recompute": {"vit": "none", "llm": "full"}},
            'fp8 = "delayed" with [recompute] llm = "full"',
        ),
        ("", {"compile": "block", "norm": "te"}, {}, 'compile = "block" with norm = "te"'),
        ("", {"compile": "block"}, {"plan": ParallelPlan.for_llm(Layout(cp=2, hp=2))}, "(cp = 2, hp = 2)"),
        ("", {"cuda_graphs": True}, {}, 'set compile = "block"'),
        ("", {"cuda_graphs": True, "compile": "block"}, {}, "under zero = 3"),
    ],
)
def test_what_cannot_be_is_one_line(
    machine: Backends, change: str, settings: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    if change:
        machine = replace(machine, **{change: Package("transformer-engine", "", "gone")})
    given = {"plan": PLAIN, "dtype": torch.bfloat16} | options
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        choose_kernels(KernelSettings(**settings), machine, given.pop("plan"), **given)
    assert str(caught.value).startswith("[kernels] ")
    assert "\n" not in str(caught.value)


def test_a_cpu_refuses_what_is_for_gpus() -> None:
    found = look("cpu", None)
    for settings in (
        KernelSettings(attention="flash_attn"),
        KernelSettings(attention="torch"),
        KernelSettings(linear="te"),
        KernelSettings(norm="apex"),
        KernelSettings(adam="te"),
        KernelSettings(compile="block", cuda_graphs=True),
    ):
        with pytest.raises(ValueError, match=r"^\[kernels\] "):
            choose_kernels(settings, found, PLAIN, dtype=torch.float32)
    for fine in (KernelSettings(), KernelSettings(norm="torch"), KernelSettings(compile="block")):
        assert choose_kernels(fine, found, PLAIN, dtype=torch.float64).settings is fine


def test_sizes_that_fp8_cannot_take_are_named(machine: Backends) -> None:
    odd = replace(CONFIG, decoder=replace(CONFIG.decoder, ffn_size=24))
    chosen = Kernels(KernelSettings(linear="te", fp8="current"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj maps 16 to 24 channels.*multiples of 16"):
        apply(fresh(torch.bfloat16, odd), chosen)


def test_unknown_keys_and_values_are_errors() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        KernelSettings(flash=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Input should be"):
        KernelSettings(fp8="fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [KernelSettings(linear="te"), KernelSettings(compile="block")])
def test_zero_bubble_needs_backwards_in_two_halves(settings: KernelSettings) -> None:
    plan = ParallelPlan.for_llm(Layout(pp=2, zero=1))
    EngineOptions(schedule="zero_bubble").check(plan)
    with pytest.raises(ValueError, match=r"\[kernels\] .*zero-bubble"):
        EngineOptions(schedule="zero_bubble", kernels=settings).check(plan)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        KernelSettings(linear="te"),
        KernelSettings(norm="te"),
        KernelSettings(norm="apex"),
        KernelSettings(attention="flash_attn"),
        KernelSettings(attention="torch"),
        KernelSettings(compile="block"),
        *(KernelSettings(linear="te", fp8=fp8) for fp8 in ("delayed", "current", "block", "mxfp8")),
    ],
    ids=repr,
)
def test_on_a_gpu(settings: KernelSettings) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        chosen = choose_kernels(settings, find_backends(device), PLAIN, dtype=torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    wide = replace(CONFIG, decoder=replace(CONFIG.decoder, hidden_size=64, head_dim=16, ffn_size=64))
    tokens = torch.arange(64, device=device) % 37
    tiles = torch.linspace(-1, 1, 3 * 3 * 8 * 8, device=device).view(3, 3, 8, 8)
    rows = torch.arange(2, 14, device=device)
    borders = torch.tensor([0, 20, 64], dtype=torch.int32)
    logits, gradients = [], []
    for kernels in (Kernels(), chosen):
        model = apply(fresh(torch.bfloat16, wide).to(device), kernels)
        out = model(tokens, tokens.float(), borders, tiles, rows)
        (out.float() ** 2).sum().backward()
        logits.append(out.float())
        gradients.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < (0.02 if settings.fp8 == "none" else 0.15)
    assert all(gradient.isfinite().all() for gradient in gradients[1].values())
