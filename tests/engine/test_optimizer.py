"""Parameter groups, the schedule of the learning rate, and clipping."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evovlm.engine.optimizer import (
    Adam,
    build_optimizer,
    clip_factor,
    lr_factor,
    parameter_groups,
    scale_gradients,
    set_lr,
)
from evovlm.engine.settings import OptimSettings
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import module_of

from ..csrc import fake_packages
from .support import SMALL

SETTINGS = OptimSettings(lr=0.1, lr_scale={"vit": 0.5}, weight_decay=0.05, betas=(0.8, 0.9), eps=1e-6)


@pytest.fixture(scope="module")
def parameters() -> dict[str, nn.Parameter]:
    return dict(InternVL(SMALL).named_parameters())


def test_groups_go_by_module_and_decay(parameters: dict[str, nn.Parameter]) -> None:
    groups = parameter_groups(parameters, SETTINGS, {name: module_of(name) for name in parameters})
    names = {id(p): name for name, p in parameters.items()}
    members = {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}
    assert sorted(name for group in members.values() for name in group) == sorted(parameters)  # each exactly once
    for group in groups:
        module, decay = group["name"].split("/")
        assert group["base_lr"] == (0.05 if module == "vit" else 0.1)
        assert group["weight_decay"] == (0.05 if decay == "decay" else 0.0)
        assert all(module_of(name) == module for name in members[group["name"]])
    # Matrices decay, and nothing else does.
    decaying = {name for group in ("vit", "projector", "llm") for name in members[f"{group}/decay"]}
    assert all(name.endswith("weight") and "norm" not in name for name in decaying)
    assert {"language_model.lm_head.weight", "vision_model.embeddings.patch_embedding.weight"} <= decaying
    for name in ("embeddings.position_embedding", "embeddings.class_embedding", "encoder.layers.0.ls1"):
        assert f"vision_model.{name}" in members["vit/no_decay"]
    assert "mlp1.0.weight" in members["projector/no_decay"]


def test_frozen_parameters_are_left_out(parameters: dict[str, nn.Parameter]) -> None:
    frozen = {name: nn.Parameter(p.detach(), requires_grad=module_of(name) == "llm") for name, p in parameters.items()}
    optimizer = build_optimizer(frozen, SETTINGS)
    assert {group["name"] for group in optimizer.param_groups} == {"llm/decay", "llm/no_decay"}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    nothing = {name: nn.Parameter(p.detach(), requires_grad=False) for name, p in parameters.items()}
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(nothing, SETTINGS)


def test_a_scale_for_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"lr_scale\.vision"):
        OptimSettings(lr=0.1, lr_scale={"vision": 0.5})  # type: ignore[dict-item]


def schedule(total: int, **options: object) -> list[float]:
    chosen = OptimSettings(lr=1.0, **options)  # type: ignore[arg-type]
    return [lr_factor(step, total, chosen) for step in range(total)]


def test_cosine_after_linear_warmup() -> None:
    factors = schedule(24, warmup=4, schedule="cosine", min_lr_ratio=0.1)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.55)  # half of the way from 1 to 0.1
    assert factors[9] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert lr_factor(24, 24, OptimSettings(lr=1.0, warmup=4, min_lr_ratio=0.1)) == pytest.approx(0.1)


def test_other_schedules() -> None:
    assert schedule(4, warmup=0, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert schedule(4, warmup=0, schedule="linear", min_lr_ratio=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    assert schedule(4, warmup=2, schedule="constant") == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_warmup_below_one_is_a_share_of_the_run() -> None:
    assert schedule(100, warmup=0.03, schedule="constant")[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert schedule(100, warmup=0.025, schedule="constant")[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # rounded up
    assert schedule(100, warmup=1, schedule="constant")[:2] == pytest.approx([0.5, 1.0])


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.floats(0, 300),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
    st.integers(0, 300),
)
def test_factors_stay_in_range(total: int, warmup: float, kind: str, floor: float, step: int) -> None:
    chosen = OptimSettings(lr=1.0, warmup=warmup, schedule=kind, min_lr_ratio=floor)  # type: ignore[arg-type]
    factor = lr_factor(step, total, chosen)
    assert 0 <= factor <= 1
    if step >= total > warmup >= 1:
        assert factor == pytest.approx(1.0 if kind == "constant" else floor)


def test_set_lr_keeps_the_ratios(parameters: dict[str, nn.Parameter]) -> None:
    optimizer = build_optimizer(parameters, SETTINGS)
    for factor in (0.5, 0.25):  # from the base rates each time
        set_lr(optimizer, factor)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["vit/decay"] == pytest.approx(0.05 * factor)
        assert rates["llm/no_decay"] == pytest.approx(0.1 * factor)


def test_clipping() -> None:
    assert clip_factor(0.5, 1.0) == clip_factor(1.0, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(1e9, 0.0) == 1.0  # 0: no limit
    gradients = [torch.ones(2), torch.full((1,), 4.0)]
    scale_gradients(gradients, 0.5)
    assert [g.tolist() for g in gradients] == [[0.5, 0.5], [2.0]]
    scale_gradients([], 0.5)


@pytest.mark.parametrize("adam", ["te", "apex"])
def test_other_fused_adams_step_alike_and_continue_each_other(monkeypatch: pytest.MonkeyPatch, adam: Adam) -> None:
    fake_packages.install(monkeypatch, "transformer_engine", "apex")

    def fresh() -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return {
            name: nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
            for name in ("language_model.lm_head.weight", "mlp1.1.weight")
        }

    def take(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_lr(optimizer, 1 / (1 + step))
            for p in parameters.values():
                p.grad = (p.detach() - step).sin()
            optimizer.step()

    whole = fresh()
    take(whole, build_optimizer(whole, SETTINGS), range(6))
    kinds: tuple[Adam, ...] = ("torch", adam, "torch")
    parameters, moments = fresh(), dict[str, dict[str, torch.Tensor]]()
    for number, kind in enumerate(kinds):
        optimizer = build_optimizer(parameters, SETTINGS, adam=kind)
        for name, p in parameters.items():  # as a checkpoint is loaded
            if name in moments:
                optimizer.state[p] = {key: value.clone() for key, value in moments[name].items()}
        take(parameters, optimizer, range(2 * number, 2 * number + 2))
        moments = {name: dict(optimizer.state[p]) for name, p in parameters.items()}
        assert {key for state in moments.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
        assert {float(state["step"]) for state in moments.values()} == {2.0 * number + 2}
    for name, p in parameters.items():
        torch.testing.assert_close(p, whole[name], rtol=1e-12, atol=1e-12)


def test_a_group_of_different_ages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "apex")
    parameters = {f"mlp1.{i}.weight": nn.Parameter(torch.ones(2, 2)) for i in (1, 3)}
    optimizer = build_optimizer(parameters, SETTINGS, adam="apex")
    for p in parameters.values():
        p.grad = torch.ones(2, 2)
    optimizer.step()
    parameters["mlp1.3.weight"].grad = None
    optimizer.step()
    parameters["mlp1.3.weight"].grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"'projector/decay' are 1 to 2 steps old.*adam = \"torch\""):
        optimizer.step()
