"""How each module is laid out over the ranks of a run.

    rank = ((((pp · DP + dp) · CP + cp) · HP + hp) · TP + tp          pp outermost, tp innermost

    pp  layers          dp  samples        cp, hp  the sequence of a sample, around attention
    tp  columns and rows of weights, and the sequence between them

Weights, gradients and optimizer state of a pipeline stage are sharded by ZeRO over its data ranks (dp × cp × hp):
``shard`` of them share one copy, the rest hold further copies (hybrid ZeRO). ``placement = "context_first"`` swaps cp
and hp in the order of ranks.
"""

from dataclasses import dataclass
from typing import Literal

Zero = Literal[1, 2, 3]
Placement = Literal["head_first", "context_first"]
AXES = ("pp", "dp", "cp", "hp", "tp")


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands on each axis of a layout."""

    pp: int
    dp: int
    cp: int
    hp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of one module over all ranks of a run.

    Attributes:
        pp: Pipeline stages.
        dp: Data-parallel ranks: each trains on packs (the ViT: encodes tiles) of its own.
        cp: Context-parallel ranks: a ring over chunks of the sequence.
        hp: Head-parallel ranks: all-to-all between sequence and heads around attention.
        tp: Tensor-parallel ranks.
        zero: What is kept whole between uses. 1: weights and accumulated gradients whole, one reduction per step;
            2: weights whole, gradients reduced and split after each microbatch; 3: all split, weights gathered layer
            by layer. Optimizer state is always split.
        shard: Data ranks (dp × cp × hp) that share one copy of the state; 0 means all of them.
        placement: ``head_first``: ranks of an hp group are neighbours (all-to-all inside a node); ``context_first``:
            ranks of a cp ring are.
        window: Ranks of a cp ring's inner rings (double ring); 0 means one ring.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    hp: int = 1
    tp: int = 1
    zero: Zero = 3
    shard: int = 0
    placement: Placement = "head_first"
    window: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"layout: {axis} = {getattr(self, axis)}; every axis needs at least one rank")
        if self.shard < 0 or self.data_ranks % self.shard_size:
            product = "dp" if self.cp == self.hp == 1 else "dp·cp·hp"
            raise ValueError(
                f"layout: shard = {self.shard} does not divide {product} = {self.data_ranks}; "
                f"it can be one of {divisors(self.data_ranks)}"
            )
        if self.window < 0 or self.cp % (self.window or self.cp):
            raise ValueError(
                f"layout: window = {self.window} does not divide cp = {self.cp}; it can be one of {divisors(self.cp)}"
            )

    @property
    def size(self) -> int:
        """Ranks that the layout needs."""
        return self.pp * self.dp * self.cp * self.hp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks of one pipeline stage that hold the same (tensor-parallel) weights: dp · cp · hp."""
        return self.dp * self.cp * self.hp

    @property
    def shard_size(self) -> int:
        """Ranks that share one copy of weights and optimizer state."""
        return self.shard or self.data_ranks

    @property
    def sequence_ranks(self) -> int:
        """Ranks over which one pack's rows are spread between blocks: cp · hp · tp."""
        return self.cp * self.hp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        rank, tp = divmod(rank, self.tp)
        if self.placement == "head_first":
            rank, hp = divmod(rank, self.hp)
            rank, cp = divmod(rank, self.cp)
        else:
            rank, cp = divmod(rank, self.cp)
            rank, hp = divmod(rank, self.hp)
        pp, dp = divmod(rank, self.dp)
        return Coordinates(pp, dp, cp, hp, tp)

    def rank_of(self, place: Coordinates) -> int:
        """The rank that stands at a place; inverse of :meth:`coordinates`."""
        rank = place.pp * self.dp + place.dp
        if self.placement == "head_first":
            rank = (rank * self.cp + place.cp) * self.hp + place.hp
        else:
            rank = (rank * self.hp + place.hp) * self.cp + place.cp
        return rank * self.tp + place.tp

    def __str__(self) -> str:
        axes = [f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        shard = f"/{self.shard}" if self.shard else ""
        extra = ["context-first"] if self.placement == "context_first" and self.cp > 1 < self.hp else []
        extra += [f"window{self.window}"] if self.window else []
        return "·".join([*(axes or ["dp1"]), f"zero{self.zero}{shard}", *extra])


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """The layouts of the three modules of a vision-language model, over the same ranks.

    Raises:
        ValueError: The layouts need different numbers of ranks, or a module is split along an axis it does not have.
    """

    vit: Layout
    projector: Layout
    llm: Layout

    def __post_init__(self) -> None:
        sizes = {name: layout.size for name, layout in self.layouts.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size} ({self.layouts[name]})" for name, size in sizes.items())
            raise ValueError(f"every module must be laid out over all ranks of the run, but they need: {listed}")
        for name in ("vit", "projector"):
            layout = self.layouts[name]
            for axis in ("pp", "cp", "hp"):
                if getattr(layout, axis) > 1:
                    raise ValueError(f"layout of the {name}: {axis} = {getattr(layout, axis)}; it has dp and tp only")
        if self.projector.tp not in (1, self.vit.tp):
            raise ValueError(
                f"layout of the projector: tp = {self.projector.tp}; it can be 1 or the ViT's tp = {self.vit.tp}"
            )

    @property
    def layouts(self) -> dict[str, Layout]:
        """Module name → layout."""
        return {"vit": self.vit, "projector": self.projector, "llm": self.llm}

    @property
    def size(self) -> int:
        """Ranks of the run."""
        return self.llm.size

    @classmethod
    def for_llm(cls, llm: Layout, vit: Layout | None = None, projector: Layout | None = None) -> "ParallelPlan":
        """Complete a plan: a module without a layout of its own is data parallel over all ranks, ZeRO as the LLM."""
        rest = Layout(dp=llm.size, zero=llm.zero)
        return cls(vit=vit or rest, projector=projector or rest, llm=llm)

    def __str__(self) -> str:
        return f"llm {self.llm} | vit {self.vit} | projector {self.projector}"


def divisors(number: int) -> list[int]:
    """The numbers that divide ``number``, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
