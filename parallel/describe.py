"""Who holds what under a plan, as text: a line for each rank, and the ranks that work together along each axis.

    rank  node | llm: pp  dp  cp  hp  tp | vit: dp  tp | projector: dp  tp
       0     0 |       0   0   0   0   0 |       0   0 |             0   0
       …
      llm tp: 4 groups of 2, columns and rows of the same weights
          0,1 | 2,3 | 4,5 | 6,7

Large worlds get a line for each node, with the range of each coordinate there.
"""

from collections.abc import Sequence
from dataclasses import replace

from evovlm.parallel.layout import AXES, Layout, ParallelPlan

WIDTH = 100
_MODULES = {"llm": AXES, "vit": ("dp", "tp"), "projector": ("dp", "tp")}
_MOST_RANKS, _LAST = 32, 4  # lines of the table, and those of them after a gap
_MOST_MEMBERS = 8  # ranks of a group that are written out
_PURPOSE = {
    "pp": "stages of one pipeline",
    "dp": "each with packs or tiles of its own",
    "cp": "chunks of one sequence, in a ring",
    "hp": "heads of one sequence, all to all",
    "tp": "columns and rows of the same weights",
    "shard": "one copy of weights, gradients and optimizer state",
    "replicate": "the same part of different copies",
}


def describe_plan(plan: ParallelPlan, ranks_per_node: int = 8) -> str:
    """Describe a plan in plain text of at most 100 columns.

    Args:
        plan: The layouts.
        ranks_per_node: Ranks of one machine; rank r is on node r // ranks_per_node.

    Returns:
        A table of coordinates (by rank up to 32 ranks, by node beyond) and a legend of groups.

    Raises:
        ValueError: ``ranks_per_node`` is not positive.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node = {ranks_per_node}; a node needs at least one rank")
    nodes = -(-plan.size // ranks_per_node)
    lines = [f"{_count(plan.size, 'rank')} on {_count(nodes, 'node')}"]
    lines += [f"  {name:<9}  {layout}" for name, layout in plan.layouts.items()]
    lines += ["", *_table(plan, ranks_per_node), "", "groups of ranks"]
    for name, layout in plan.layouts.items():
        lines += _legend(name, layout)
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _table(plan: ParallelPlan, ranks_per_node: int) -> list[str]:
    step = 1 if plan.size <= _MOST_RANKS else ranks_per_node
    rows = [
        _row(plan, range(start, min(start + step, plan.size)), ranks_per_node) for start in range(0, plan.size, step)
    ]
    head = [["rank", "node"], *([f"{name}: {axes[0]}", *axes[1:]] for name, axes in _MODULES.items())]
    widths = [[max(map(len, column)) for column in zip(*part, strict=True)] for part in zip(head, *rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    if len(lines) > _MOST_RANKS:
        hidden = len(lines) - _MOST_RANKS
        lines[-_LAST - hidden : -_LAST] = [f"… {_count(hidden, 'more node')}"]
    return [_line(head, widths), *lines]


def _row(plan: ParallelPlan, ranks: range, ranks_per_node: int) -> list[list[str]]:
    row = [[_ranges(list(ranks)), str(ranks.start // ranks_per_node)]]
    for name, axes in _MODULES.items():
        places = [plan.layouts[name].coordinates(rank) for rank in ranks]
        row.append([_ranges(sorted({getattr(place, axis) for place in places})) for axis in axes])
    return row


def _line(row: Sequence[Sequence[str]], width: Sequence[Sequence[int]]) -> str:
    parts = [
        "  ".join(cell.rjust(size) for cell, size in zip(cells, sizes, strict=True))
        for cells, sizes in zip(row, width, strict=True)
    ]
    return " | ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges: ``0-3,6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def groups_of(layout: Layout, axis: str) -> list[list[int]]:
    """List the groups of ranks that differ along one axis alone.

    Args:
        layout: The layout.
        axis: One of its axes; or ``shard``: ranks that share one copy of the state, or ``replicate``: ranks that hold
            the same part of different copies.

    Returns:
        Ranks of each group, ascending, by their first rank.
    """
    groups: dict[object, list[int]] = {}
    block = layout.tp * layout.shard_size  # consecutive ranks that hold one copy
    for rank in range(layout.size):
        place = layout.coordinates(rank)
        if axis == "shard":
            key: object = (rank // block, place.tp)
        elif axis == "replicate":
            key = (place.pp, rank % block)
        else:
            key = replace(place, **{axis: 0})
        groups.setdefault(key, []).append(rank)
    return list(groups.values())


def _legend(name: str, layout: Layout) -> list[str]:
    axes = [axis for axis in _MODULES[name] if getattr(layout, axis) > 1]
    if layout.shard_size < layout.data_ranks:
        axes += ["shard", "replicate"]
    lines = []
    for axis in axes:
        groups = groups_of(layout, axis)
        lines.append(f"  {name} {axis}: {_count(len(groups), 'group')} of {len(groups[0])}, {_PURPOSE[axis]}")
        lines.append(_fill([_group(ranks) for ranks in groups]))
    return lines


def _group(ranks: Sequence[int]) -> str:
    """Write a group, whose ranks lie at equal distances."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) > _MOST_MEMBERS:
        return f"{ranks[0]},{ranks[1]},…,{ranks[-1]}"
    return ",".join(map(str, ranks))


def _fill(groups: Sequence[str]) -> str:
    """As many groups as a line holds."""
    line = " " * 6 + groups[0]
    for number, group in enumerate(groups[1:], start=1):
        more = 0 if number == len(groups) - 1 else len(" | …")
        if len(line) + len(group) + 3 + more > WIDTH:
            return f"{line} | …"
        line += f" | {group}"
    return line
