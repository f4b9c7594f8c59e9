"""Attention of one pack over many ranks: heads by all-to-all, the sequence by a ring, or both.

blocks.py   which queries of a rank meet which keys of another: the work, decided on the host
heads.py    head parallel: rows of all heads <-> all rows of some heads
ring.py     context parallel: keys and values travel, queries stay
attend.py   both together, behind one call for every layer
"""

from evovlm.parallel.attention.attend import ShardedAttend
from evovlm.parallel.attention.blocks import Block, blocks_between

__all__ = ["Block", "ShardedAttend", "blocks_between"]
