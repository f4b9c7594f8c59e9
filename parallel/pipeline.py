"""Pipeline parallelism: a decoder cut into stages, and a schedule that runs a step's microbatches through them.

    stage 0  embedding, layers 0…a   ─ hidden [t, H] ─►  stage 1  layers a…b   ─►  …  layers …, norm, head + loss
             F0 F1 F2 B0 F3 B1 …                                   F0 B0 F1 B1 …

What a microbatch is (tokens, positions, segment borders, targets) every stage knows from the step's plan; only hidden
states and their gradients travel. The schedules themselves are those of ``torch.distributed.pipelining``. A rank holds
``virtual`` stages under the interleaved and zero-bubble schedules: rank r has stages r, r + P, r + 2P, …
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

Schedule = Literal["1f1b", "interleaved", "zero_bubble"]
RunStage = Callable[[int, int, Tensor | None], Tensor]
"""``(local stage, microbatch, hidden of the stage before or None) -> hidden, or the loss of the last stage``."""


class Absent(nn.Module):
    """Stands where another stage's module would be: passes its first argument through."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return ``x``."""
        return x


def split_layers(num_layers: int, num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut layers into consecutive stages so that the dearest stage costs least.

    Args:
        num_layers: Layers, of cost 1 each.
        num_stages: Stages, at most as many as layers.
        first: What the first stage does besides (embedding), in layers.
        last: What the last one does besides (head and loss), in layers.

    Returns:
        The layers of each stage, at least one each.

    Raises:
        ValueError: There are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"{num_layers} layers cannot be cut into {num_stages} pipeline stages; use at most {num_layers}"
        )
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        # Later stages first among equals: the first stage also waits for the exchange of visual tokens.
        cheapest = min(range(num_stages), key=lambda s: (counts[s] + extra[s], -s))
        counts[cheapest] += 1
    borders = [0, *accumulate(counts)]
    return [range(a, b) for a, b in pairwise(borders)]


def cut(root: nn.Module, layers: range, *, path: str, first: Sequence[str] | None, last: Sequence[str] | None) -> None:
    """Take out of a decoder what other stages hold; names of what stays do not change.

    Args:
        root: The decoder, changed in place.
        layers: The layers that stay.
        path: Path of the list of layers.
        first: Paths that go unless this is the first stage (then None).
        last: Paths that go unless this is the last stage (then None).
    """
    blocks = cast(nn.ModuleList, root.get_submodule(path))
    for number in range(len(blocks)):
        if number not in layers:
            blocks[number] = Absent()
    for name in (*(first or ()), *(last or ())):
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, Absent())


class _Stage(nn.Module):
    """What torch's schedule calls for one stage; microbatches are told by number."""

    def __init__(self, root: nn.Module, run: Callable[[int, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.root, self.run = root, run

    def forward(self, *hidden: Tensor, number: Tensor) -> Tensor:
        return self.run(int(number), hidden[0] if hidden else None)


class Pipeline:
    """The pipeline of one rank.

    Args:
        stages: This rank's stages, in order.
        run: Runs one of them on a microbatch.
        group: The pipeline's ranks.
        schedule: Which schedule.
        num_microbatches: M.
        hidden: Shape and dtype of what travels, as a meta tensor.
        device: Where this rank computes.

    Raises:
        ValueError: The schedule cannot run that many microbatches.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        run: RunStage,
        group: dist.ProcessGroup,
        schedule: Schedule,
        num_microbatches: int,
        hidden: Tensor,
        device: torch.device,
    ) -> None:
        self.group, self.run, self.hidden, self.device = group, run, hidden, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.num_local, self.num_stages = len(stages), len(stages) * self.size
        if num_microbatches < self.size:
            raise ValueError(
                f"a pipeline of {self.size} ranks needs at least {self.size} microbatches, the step has "
                f"{num_microbatches} on each data-parallel rank; raise packs_per_step or lower pp"
            )
        wrapped = [self._stage(number, root) for number, root in enumerate(stages)]
        kinds: dict[Schedule, Any] = {
            "1f1b": Schedule1F1B,
            "interleaved": ScheduleInterleaved1F1B,
            "zero_bubble": ScheduleInterleavedZeroBubble,
        }
        self.num_microbatches = num_microbatches
        self.schedule = kinds[schedule](
            wrapped[0] if schedule == "1f1b" else wrapped, num_microbatches, loss_fn=_loss_of, scale_grads=False
        )

    def _index(self, local: int) -> int:
        return self.rank + local * self.size

    def _stage(self, local: int, root: nn.Module) -> PipelineStage:
        index = self._index(local)
        is_first, is_last = index == 0, index == self.num_stages - 1
        module = _Stage(root, lambda number, hidden: self.run(local, number, hidden))
        wire = self.hidden.detach().requires_grad_()  # tells the stages that gradients travel, too
        loss_dtype = torch.promote_types(wire.dtype, torch.float32)
        out = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True) if is_last else wire
        return PipelineStage(
            module,
            index,
            self.num_stages,
            self.device,
            input_args=() if is_first else (wire,),
            output_args=(out,),
            group=self.group,
        )

    def train(self) -> None:
        """Run forward and backward of all microbatches; gradients are left on the parameters."""
        numbers = torch.arange(self.num_microbatches)
        last = self._index(self.num_local - 1) == self.num_stages - 1
        options: dict[str, Any] = {"target": numbers, "losses": []} if last else {}
        self.schedule.step(number=numbers, return_outputs=False, **options)


@torch.no_grad()
def relay(
    run: RunStage, num_local: int, group: dist.ProcessGroup, num_microbatches: int, hidden: Tensor, device: torch.device
) -> None:
    """Run the forward of some microbatches through the stages, one after another; for evaluation.

    Args:
        run: Runs one of this rank's stages on a microbatch.
        num_local: This rank's stages.
        group: The pipeline's ranks.
        num_microbatches: How many, the same on every rank of the group.
        hidden: Shape and dtype of what travels.
        device: Where this rank computes.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for number in range(num_microbatches):
        for local in range(num_local):
            index = rank + local * size
            received = None
            if index > 0:
                received = torch.empty(hidden.shape, dtype=hidden.dtype, device=device)
                dist.recv(received, group=group, group_src=(index - 1) % size)
            out = run(local, number, received)
            if index < num_local * size - 1:
                dist.send(out.contiguous(), group=group, group_dst=(index + 1) % size)


def _loss_of(output: Tensor, _target: Tensor) -> Tensor:
    """The last stage computes its own loss; this hands it to the schedule as a scalar."""
    return output.sum()
