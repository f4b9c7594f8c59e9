"""Counts the collectives that a piece of code calls: which, between which ranks, how many bytes.

    with CollectiveCounter() as counter:          FSDP2, DTensor, pipelining and this package all end in the
        engine.train_step(batch, weight)          operators of torch.ops.c10d, which this sees as they are called
    counter.seen[(0, 1), "all_gather", 6272]      between ranks 0 and 1: calls of 6,272 bytes

``CommDebugMode`` of ``torch.distributed.tensor.debug`` counts calls alone, neither bytes nor groups, does not see
sends, and fails where a module runs more than once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evovlm.parallel.communication import Collective

_COLLECTIVES: dict[str, tuple[Collective, int, int]] = {
    "_allgather_base_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "allreduce_": ("all_reduce", 0, 1),
    "alltoall_base_": ("all_to_all", 1, 2),
    "send": ("send", 0, 1),
    "recv_": ("receive", 0, 1),
}
"""Operator → name; which argument holds the bytes that :mod:`evovlm.parallel.communication` counts; which the group."""


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives while it is entered, in this thread (on the CPU backward runs in it, too).

    Attributes:
        seen: (ranks, collective, bytes of a call) → calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[tuple[int, ...], Collective, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, then call; of a DTensor's operation only the collectives in it are seen.

        Raises:
            NotImplementedError: A collective that this does not know.
        """
        if func.namespace == "c10d":
            name = func.name().partition("::")[2].partition(".")[0]
            if name not in _COLLECTIVES:
                raise NotImplementedError(
                    f"collective c10d::{name} is not counted; known are {', '.join(_COLLECTIVES)}"
                )
            collective, payload, group = _COLLECTIVES[name]
            tensors: list[Tensor] = tree_leaves(args[payload])
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[group])))
            self.seen[ranks, collective, sum(tensor.nbytes for tensor in tensors)] += 1
        return func(*args, **(kwargs or {}))
