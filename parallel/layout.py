"""How each module is laid out over the ranks: data parallelism with its ZeRO level and shard group.

ranks 0 … R−1  ─►  [replicas, shard]      weights, gradients and optimizer state are split inside a row
                                          and copied down a column (hybrid ZeRO); replicas = dp / shard
"""

from dataclasses import dataclass
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Data-parallel layout of one module.

    Attributes:
        dp: Data-parallel ranks.
        zero: What is kept whole between uses. 1: weights and accumulated gradients whole, one reduction per step;
            2: weights whole, gradients reduced and split after each microbatch; 3: all split, weights gathered layer
            by layer. Optimizer state is always split.
        shard: Ranks that share one copy of the state; 0 means all ``dp`` ranks.
    """

    dp: int
    zero: Literal[1, 2, 3] = 3
    shard: int = 0

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ValueError(f"layout: dp = {self.dp}; at least one data-parallel rank is needed")
        if self.shard < 0 or self.dp % self.shard_size:
            divisors = [n for n in range(1, self.dp + 1) if self.dp % n == 0]
            raise ValueError(
                f"layout: shard = {self.shard} does not divide dp = {self.dp}; it can be one of {divisors}"
            )

    @property
    def shard_size(self) -> int:
        """Ranks of one shard group."""
        return self.shard or self.dp

    def mesh(self, device_type: str) -> DeviceMesh:
        """Build the mesh that ``fully_shard`` takes: ``[shard]``, or ``[replicate, shard]`` for hybrid ZeRO."""
        if self.shard_size == self.dp:
            return init_device_mesh(device_type, (self.dp,), mesh_dim_names=("shard",))
        shape = (self.dp // self.shard_size, self.shard_size)
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """The layouts of the three modules of a vision-language model."""

    vit: Layout
    projector: Layout
    llm: Layout

    def __post_init__(self) -> None:
        sizes = {"vit": self.vit.dp, "projector": self.projector.dp, "llm": self.llm.dp}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every module must use all data-parallel ranks of the run, but dp is {sizes}")
