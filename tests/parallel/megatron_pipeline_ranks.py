"""One rank of a comparison of 1F1B with megatron-core: ``python megatron_pipeline_ranks.py RANK SIZE STORE``.

Not a test itself: ``test_megatron_pipeline.py`` starts each rank as a process of its own, since megatron-core keeps its
parallel state in globals. Prints, for each number of microbatches, the largest absolute difference as JSON.
"""

import copy
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evovlm.parallel.pipeline import Absent, Pipeline, cut, split_layers

T, H, V, LAYERS = 6, 8, 11, 5
DOUBLE = torch.float64


class Block(nn.Module):
    """Mixes rows and columns, so that swapped microbatches or transposed messages show."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(H), nn.Linear(H, 2 * H), nn.Linear(2 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x + x.cumsum(0) / len(x)


class Net(nn.Module):
    """Embedding, blocks and a head on packed rows ``[T, H]``; the loss is the sum of cross-entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x if isinstance(self.head, Absent) else F.cross_entropy(self.head(x), labels, reduction="sum")[None]


class MegatronStage(nn.Module):
    """The same stage as megatron-core's schedule sees one: its input is set from outside, rows are ``[T, 1, H]``."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, stage: Net, config: ModelParallelConfig) -> None:
        super().__init__()
        self.stage, self.config = stage, config
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        (self.received,) = tensors

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        out = self.stage(tokens if self.received is None else self.received.squeeze(1), labels)
        return out if out.ndim == 1 else out.unsqueeze(1)


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what megatron-core's schedule makes with ``device="cuda"``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


def theirs(stage: Net, tokens: Tensor, labels: Tensor) -> float:
    """Run megatron-core's 1F1B; returns the loss, on the last stage, and leaves gradients."""
    config = ModelParallelConfig(
        pipeline_model_parallel_size=dist.get_world_size(),
        pipeline_dtype=DOUBLE,
        params_dtype=DOUBLE,
        batch_p2p_sync=False,  # it would call torch.cuda.synchronize
    )
    # The schedule takes a TransformerConfig, whose other settings mean nothing here.
    config.hidden_size, config.fine_grained_activation_offloading = H, False
    config.calculate_per_token_loss = True  # a sum: neither tokens nor microbatches divide it

    def forward_step(
        data: Any, model: MegatronStage
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, float]]]:
        number = next(data)
        out = model(tokens[number], labels[number])
        return out, lambda loss: (loss.sum(), torch.tensor(T, dtype=torch.int), loss.item())

    with OnCpu(), mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
        losses = forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(range(len(tokens))),
            model=MegatronStage(stage, config),
            num_microbatches=len(tokens),
            seq_length=T,
            micro_batch_size=1,
        )
    return sum(losses)


def ours(stage: Net, tokens: Tensor, labels: Tensor, group: dist.ProcessGroup) -> float:
    """Run our pipeline; returns the loss, on the last stage, and leaves gradients."""
    losses = []

    def run(_local: int, number: int, hidden: Tensor | None) -> Tensor:
        out: Tensor = stage(tokens[number] if hidden is None else hidden, labels[number])
        if out.ndim == 1:
            losses.append(out.item())
        return out

    hidden = torch.empty(T, H, dtype=DOUBLE, device="meta")
    Pipeline([stage], run, group, "1f1b", len(tokens), hidden, torch.device("cpu")).train()
    return sum(losses)


def compare(num_microbatches: int, group: dist.ProcessGroup) -> float:
    """The largest difference of the loss and of this stage's gradients; infinity where one has none."""
    rank, size = group.rank(), group.size()
    generator = torch.Generator().manual_seed(num_microbatches)
    tokens, labels = (torch.randint(0, V, (num_microbatches, T), generator=generator) for _ in range(2))
    torch.manual_seed(1)
    stage = Net().double()
    layers = split_layers(LAYERS, size)[rank]
    first, last = (["embed"] if rank > 0 else None), (["head"] if rank < size - 1 else None)
    cut(stage, layers, path="layers", first=first, last=last)
    other = copy.deepcopy(stage)
    difference = abs(ours(stage, tokens, labels, group) - theirs(other, tokens, labels))
    for mine, their in zip(stage.parameters(), other.parameters(), strict=True):
        if mine.grad is None or their.grad is None or not mine.grad.abs().max() > 0:
            return float("inf")
        difference = max(difference, (mine.grad - their.grad).abs().max().item())
    return difference


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=size)
    group = parallel_state.get_pipeline_model_parallel_group()
    print(json.dumps({m: compare(m, group) for m in (2, 4, 7)}))  # noqa: T201 - the result
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
