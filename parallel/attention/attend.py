"""Attention of a sharded pack behind the decoder's ``attend`` call: heads first, then the ring (2-D attention).

    q, k, v [t, ·, D]   rows of (cp, hp), all heads of a tp rank          t = T / (cp·hp)
          │ all-to-all over hp                    heads.py
          ▼
    [T/cp, A/hp, D]     rows of cp, some heads ──► ring over cp           ring.py, blocks.py
          │ all-to-all over hp
          ▼
    out [t, A, D]

One object serves all layers of a microbatch: what each rank computes at each step is listed once, from the borders.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.csrc.ops import packed_attention
from evovlm.csrc.prefixes import list_prefixes
from evovlm.parallel.attention.blocks import Block, blocks_between, check_borders
from evovlm.parallel.attention.heads import check_heads, join_heads, split_heads
from evovlm.parallel.attention.ring import Ring, ring_attention
from evovlm.parallel.layout import Coordinates
from evovlm.parallel.sequence import SequenceShards


class ShardedAttend:
    """Causal attention inside each segment of a pack whose rows are spread over cp × hp ranks (spec §7; LoongTrain).

    Queries behind a shared prefix see that, too, wherever its rows are.

    Args:
        borders: Segment borders on the host: S + 1 rising integers from 0 to T, rows of the pack.
        shards: The split of the pack; tp does not matter here.
        place: Where this rank stands.
        groups: Process groups by axis: ``cp`` and ``hp``, each needed where the axis has more than one rank. With a
            window, ``cp_outer``, if there, is what outer hops use; see :class:`evovlm.parallel.attention.ring.Ring`.
        window: w, ranks of a double ring's inner rings; 0 means one ring.
        prefixes: ``[n, 4]`` on the host, rows of the pack (query start, query end, key start, key end): queries that
            see all these keys besides their segment; see :func:`evovlm.csrc.prefixes.list_prefixes`.

    Raises:
        ValueError: Borders do not cover the pack, prefixes do not fit it, w does not divide cp, or a group does not fit
            its axis.
    """

    def __init__(
        self,
        borders: Sequence[int],
        shards: SequenceShards,
        place: Coordinates,
        groups: Mapping[str, dist.ProcessGroup],
        *,
        window: int = 0,
        prefixes: Sequence[Sequence[int]] | Tensor = (),
    ) -> None:
        check_borders(borders, shards.num_rows)
        rectangles = list_prefixes(prefixes, borders)
        if window < 0 or shards.cp % (window or shards.cp):
            raise ValueError(f"window = {window} does not divide cp = {shards.cp}")
        for axis, size, index in (("cp", shards.cp, place.cp), ("hp", shards.hp, place.hp)):
            if size > 1:
                _check_group(groups, axis, size, index)
        # A tensor: whatever attends reads it as it is, and keeps what it makes of it for the next layer.
        self._borders = torch.tensor(borders, dtype=torch.int32)
        self._prefixes = torch.tensor(rectangles, dtype=torch.int32) if rectangles else None
        self._shards, self._groups = shards, groups
        self._ring: Ring | None = None
        sources = [place.cp]
        if shards.cp > 1:
            group = groups["cp"]
            self._ring = Ring(shards.cp, place.cp, window or shards.cp, group, groups.get("cp_outer", group))
            sources = self._ring.sources
        self.steps: list[list[Block]] = [
            blocks_between(borders, shards, place.cp, source, rectangles) for source in sources
        ]
        """The blocks that this rank computes, for each head, at each step of the ring."""

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that this rank computes for each of its heads."""
        return sum(block.num_pairs for blocks in self.steps for block in blocks)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's name
        """Attend.

        Args:
            layer: Number of the layer; all layers attend alike.
            q: ``[t, A, D]``: rows ``shards.block_rows(place.cp, place.hp)``, rotated; A heads of this tp rank.
            k: ``[t, K, D]``, rotated.
            v: ``[t, K, D]``.

        Returns:
            ``[t, A, D]``.

        Raises:
            ValueError: The number of rows is not T / (cp·hp), or the heads cannot be split over hp ranks.
            TypeError: Queries, keys and values differ in dtype.
        """
        shards, num_heads = self._shards, q.shape[1]
        expected = shards.num_rows // (shards.cp * shards.hp)
        if not len(q) == len(k) == len(v) == expected:
            raise ValueError(
                f"attention got {len(q)} queries, {len(k)} keys and {len(v)} values; a rank of cp = {shards.cp}, "
                f"hp = {shards.hp} holds {expected} of the pack's T = {shards.num_rows} rows"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"queries, keys and values must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        check_heads(num_heads, k.shape[1], shards.hp)
        if self._ring is None and shards.hp == 1:
            return packed_attention(q, k, v, self._borders, prefixes=self._prefixes)
        own = num_heads // shards.hp
        qkv = split_heads(q, k, v, shards.hp, self._groups["hp"]) if shards.hp > 1 else torch.cat((q, k, v), dim=1)
        if self._ring is None:
            kv = (qkv.shape[1] - own) // 2
            q, k, v = torch.split(qkv, [own, kv, kv], dim=1)
            out = packed_attention(q, k, v, self._borders, prefixes=self._prefixes)
        else:
            out = ring_attention(qkv, own, self._ring, self.steps)
        return join_heads(out, shards.hp, self._groups["hp"]) if shards.hp > 1 else out


def _check_group(groups: Mapping[str, dist.ProcessGroup], axis: str, size: int, index: int) -> None:
    if axis not in groups:
        raise ValueError(f"the pack is split over {axis} = {size} ranks, but there is no {axis} process group")
    group = groups[axis]
    if group.size() != size or group.rank() != index:
        raise ValueError(
            f"this rank is number {index} of {axis} = {size}, but number {group.rank()} of {group.size()} in that group"
        )
