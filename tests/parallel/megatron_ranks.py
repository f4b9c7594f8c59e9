"""One rank of a comparison with megatron-core: ``python megatron_ranks.py RANK SIZE STORE``.

Not a test itself: megatron-core keeps its parallel state in globals and does not survive forking, so
``test_megatron.py`` starts each rank as a process of its own. Prints the largest absolute difference of each
comparison as JSON.
"""

import json
import sys
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from evovlm.engine.losses import Targets, weighted_cross_entropy
from evovlm.parallel.collectives import gather_rows
from evovlm.parallel.tensor import shard_tensors

H, F_SIZE, V, T = 6, 8, 24, 8
STYLES = {False: ("colwise_copy", "rowwise_reduce"), True: ("colwise", "rowwise_scatter")}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True))


def local_grads(module: nn.Module) -> list[Tensor]:
    grads = [parameter.grad for parameter in module.parameters()]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads if grad is not None]


class Ours(nn.Module):
    """The same two linears and the embedding, split by a table."""

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(H, F_SIZE).double(), nn.Linear(F_SIZE, H).double()
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = draw(*parameter.shape, seed=seed)
        first, second = STYLES[sequence_parallel]
        shard_tensors(self, {"first": first, "second": second, "embed": "embedding"}, mesh)


def linears(mesh: DeviceMesh, *, sequence_parallel: bool) -> float:
    """Column-, then row-parallel linear: output and gradients of input, weights and biases."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    ours = Ours(mesh, sequence_parallel)
    options: dict[str, Any] = {
        "config": ModelParallelConfig(
            tensor_model_parallel_size=mesh.size(),
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
            gradient_accumulation_fusion=False,
        ),
        "init_method": nn.init.zeros_,
        "bias": True,
        "skip_bias_add": False,
    }
    column = ColumnParallelLinear(H, F_SIZE, gather_output=False, **options)
    row = RowParallelLinear(F_SIZE, H, input_is_parallel=True, **options)
    theirs = nn.ModuleList([column, row])
    for module, of_ours in ((column, ours.first), (row, ours.second)):
        module.weight.data.copy_(of_ours.weight.to_local())
        module.bias.data.copy_(of_ours.bias.to_local())

    own = slice(rank * T // mesh.size(), (rank + 1) * T // mesh.size()) if sequence_parallel else slice(None)
    results = []
    for is_ours in (True, False):
        x = draw(T, H, seed=7)[own].requires_grad_()
        if is_ours:
            out = ours.second(torch.tanh(ours.first(gather_rows(x, group) if sequence_parallel else x)))
        else:
            out = row(torch.tanh(column(x.unsqueeze(1))[0]))[0].squeeze(1)
        (out * draw(T, H, seed=8)[own]).sum().backward()
        assert x.grad is not None
        results.append([out.detach(), x.grad])
    grads = local_grads(ours.first) + local_grads(ours.second), local_grads(theirs)
    if sequence_parallel:
        # Megatron adds up such gradients at the end of a step, over all that are marked.
        assert row.bias.sequence_parallel
        dist.all_reduce(grads[1][-1])
    return distance(results[0] + grads[0], results[1] + grads[1])


def embedding(mesh: DeviceMesh) -> float:
    """Vocabulary-parallel embedding with its output scattered over rows."""
    ours = Ours(mesh, sequence_parallel=True).embed
    theirs = VocabParallelEmbedding(
        V,
        H,
        init_method=nn.init.zeros_,
        reduce_scatter_embeddings=True,
        config=ModelParallelConfig(
            tensor_model_parallel_size=mesh.size(),
            sequence_parallel=True,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
        ),
    )
    theirs.weight.data.copy_(ours.weight.to_local())
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(9))
    own = slice(mesh.get_local_rank() * T // mesh.size(), (mesh.get_local_rank() + 1) * T // mesh.size())
    outs = ours(ids), theirs(ids.unsqueeze(0)).squeeze(1)
    for out in outs:
        (out * draw(T, H, seed=8)[own]).sum().backward()
    return distance([outs[0], *local_grads(ours)], [outs[1], *local_grads(theirs)])


def cross_entropy(mesh: DeviceMesh) -> float:
    """Vocabulary-parallel cross-entropy: the sum and the gradients of hidden states and head."""
    head = nn.ModuleDict({"head": nn.Linear(H, V, bias=False, dtype=torch.float64)})
    head["head"].weight.data = draw(V, H, seed=1)
    shard_tensors(head, {"head": "head"}, mesh)
    theirs = head["head"].weight.to_local().detach().clone().requires_grad_()
    hidden, weights = draw(T, H, seed=2), torch.rand(T, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(4))
    own = slice(mesh.get_local_rank() * T // mesh.size(), (mesh.get_local_rank() + 1) * T // mesh.size())

    part = hidden[own].clone().requires_grad_()
    targets = Targets.of(labels, weights, torch.device("cpu"))
    loss = weighted_cross_entropy(part, head["head"].weight, targets, group=mesh.get_group(), chunk_rows=3)
    loss.backward()
    whole = hidden.clone().requires_grad_()
    logits = copy_to_tensor_model_parallel_region(whole) @ theirs.T
    their_loss = (vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).squeeze(1) * weights).sum()
    their_loss.backward()
    assert part.grad is not None
    assert whole.grad is not None
    assert theirs.grad is not None
    return distance([loss, part.grad, *local_grads(head)], [their_loss, whole.grad[own], theirs.grad])


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    mesh = DeviceMesh("cpu", torch.arange(size))
    results = {"linears": linears(mesh, sequence_parallel=False), "cross-entropy": cross_entropy(mesh)}
    # Megatron allocates what it gathers and scatters on "the current CUDA device".
    with mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
        results["linears, sequence parallel"] = linears(mesh, sequence_parallel=True)
        results["embedding, sequence parallel"] = embedding(mesh)
    print(json.dumps(results))  # noqa: T201 - the result
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
