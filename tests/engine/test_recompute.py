"""Activation checkpointing changes memory, never numbers."""

import pytest
import torch
from torch import Tensor

from evovlm.engine.recompute import Recompute, apply_recompute
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import INTERNVL

from .support import STEPS, plain_loss, plain_model

BATCH = STEPS[0][3]
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


def recompute(model: InternVL, modes: dict[str, Recompute]) -> None:
    for module, mode in modes.items():
        apply_recompute(model.get_submodule(INTERNVL.roots[module]), INTERNVL.blocks[module], mode)


def run(modes: dict[str, Recompute]) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that autograd keeps between forward and backward, weights left out."""
    model = plain_model().train()  # drop path on: what is recomputed must drop the same
    recompute(model, modes)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = plain_loss(model, BATCH)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, sum(kept.values())


@pytest.mark.parametrize("vit", MODES)
@pytest.mark.parametrize("llm", MODES)
def test_loss_and_gradients_are_the_same(vit: Recompute, llm: Recompute) -> None:
    loss, gradients, _ = run({"vit": vit, "llm": llm})
    expected_loss, expected, _ = run({})
    assert loss == expected_loss
    assert set(gradients) == set(expected) == {name for name, _ in plain_model().named_parameters()}
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("module", ["vit", "llm"])
def test_full_keeps_least(module: str) -> None:
    none, full = (run({module: mode})[2] for mode in ("none", "full"))
    assert full < 0.8 * none


def count_products(mode: Recompute) -> int:
    """Matrix products of a backward pass, per mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func._opname in ("mm", "addmm", "attention")
            return func(*args, **(kwargs or {}))

    model = plain_model().train()
    recompute(model, {"vit": mode, "llm": mode})
    loss = plain_loss(model, BATCH)
    with Products() as products:
        loss.backward()
    return products.count


def test_selective_recomputes_no_matrix_product_and_full_all() -> None:
    none, selective, full = (count_products(mode) for mode in MODES)
    assert selective == none
    # ViT: 4 linears, 1 attention. Decoder: 7 linears, of which the last only feeds a sum and is not needed again,
    # and 1 attention.
    assert full == none + 2 * (4 + 1) + 2 * (6 + 1)


def test_names_of_parameters_do_not_change() -> None:
    model = plain_model()
    recompute(model, {"vit": "full", "llm": "selective"})
    assert list(model.state_dict()) == list(plain_model().state_dict())


def test_a_block_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no module matches 'blocks"):
        apply_recompute(plain_model().vision_model, "blocks.*", "full")
