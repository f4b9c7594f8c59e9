"""Task `charts`: a short question about a bar or pie chart drawn with matplotlib.

      ├──────▇▇────────          "Which bar is the largest?" → red        "How many bars are there?" → 3
      ├──────▇▇───▇▇───          "Is the red bar larger than the blue bar?" → yes
      ├─▇▇───▇▇───▇▇───          "What is the value of the blue bar?" → 6      (a line every 2)

Charts are split by what they show: the hash of colours and values decides the split, so no test chart was drawn in
training in any size, order or kind.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, Wedge
from PIL import Image

from evovlm.data.synthetic import sources
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Split

COLOURS = {
    "red": "#d62728",
    "blue": "#1f55d4",
    "green": "#2ca02c",
    "orange": "#ff9a1f",
    "purple": "#9a3fd0",
    "black": "#202020",
    "pink": "#ff8fc8",
    "cyan": "#2fd0e0",
}
_SIZES = ((56, 56), (112, 56), (112, 112), (56, 112))  # 1, 3, 5 and 3 tiles at tile size 56
_TOP = 8  # bar values are 1 … 8
_MOST_PARTS = 4  # bars stand in this many slots, from the left
_DPI = 72  # so that a point is a pixel


@dataclass(frozen=True)
class Chart:
    """What a chart shows: ``values[i]`` belongs to the bar or slice of colour ``colours[i]``."""

    kind: str  # bar | pie
    colours: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def source(self) -> str:
        """The name under which splits are compared: its pairs of colour and share, in no order.

        Values are divided by what they have in common: a pie of 3 and 1 looks like one of 6 and 2.
        """
        common = math.gcd(*self.values)
        parts = zip(self.colours, self.values, strict=True)
        return "chart:" + ",".join(sorted(f"{colour}={value // common}" for colour, value in parts))

    @property
    def part(self) -> str:
        """What its parts are called."""
        return "slice" if self.kind == "pie" else "bar"


def draw_chart(draws: Draws, kind: str, split: Split) -> Chart:
    """Draw 2 to 4 colours and values, all different, until the chart's hash falls into the split."""
    for attempt in range(1000):
        count = draws.integer(f"{attempt}/count", 2, _MOST_PARTS)
        colours = draws.shuffled(f"{attempt}/colours", tuple(COLOURS))[:count]
        values = draws.shuffled(f"{attempt}/values", range(1, _TOP + 1))[:count]
        chart = Chart(kind, tuple(colours), tuple(values))
        if sources.hashed_split(chart.source) == split:
            return chart
    raise AssertionError(f"charts: no {kind} chart of split {split} in 1000 draws")


class _Panel:
    """One figure of fixed size, drawn once without data: a chart is that picture with its bars or slices on top.

    Drawing ticks and making figures is nearly all of matplotlib's time (16 ms a chart, against 1 ms this way).
    """

    def __init__(self, kind: str, size: tuple[int, int]) -> None:
        figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
        self.canvas = FigureCanvasAgg(figure)
        if kind == "pie":
            self.axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-1.08, 1.08), ylim=(-1.08, 1.08))
            self.axes.set_axis_off()
        else:
            # Slots over the whole width: at 56 pixels a bar is a patch of the ViT wide, at 112 a visual token.
            self.axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, 1), ylim=(0, _TOP + 0.4))
            self.axes.set_xticks([])
            self.axes.set_yticks(range(0, _TOP + 1, 2))
            self.axes.grid(axis="y", linewidth=0.5)
        self.canvas.draw()
        self.empty = self.canvas.copy_from_bbox(figure.bbox)

    def draw(self, chart: Chart) -> Image.Image:
        self.canvas.restore_region(self.empty)
        ends = np.cumsum((0, *chart.values)) * (360 / sum(chart.values))
        step = 1 / _MOST_PARTS
        for i, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
            paint = COLOURS[colour]
            shape: Wedge | Rectangle
            if chart.kind == "pie":  # clockwise from the top
                shape = Wedge((0, 0), 1.0, 90 - ends[i + 1], 90 - ends[i], facecolor=paint)
            else:
                shape = Rectangle(((i + 0.13) * step, 0), 0.74 * step, value, facecolor=paint)
            self.axes.add_artist(shape)
            self.axes.draw_artist(shape)
            shape.remove()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


@cache
def _panel(kind: str, size: tuple[int, int]) -> _Panel:
    return _Panel(kind, size)


def render(chart: Chart, size: tuple[int, int]) -> Image.Image:
    """Draw the chart at ``size`` pixels (width, height)."""
    return _panel(chart.kind, size).draw(chart)


def _questions(draws: Draws, chart: Chart) -> list[tuple[str, str]]:
    """All kinds of question about the chart, each once, with its answer; in a drawn order."""
    order = np.argsort(chart.values)
    asked = [
        (f"Which {chart.part} is the largest?", chart.colours[order[-1]]),
        (f"Which {chart.part} is the smallest?", chart.colours[order[0]]),
        (f"How many {chart.part}s are there?", str(len(chart.values))),
    ]
    if chart.kind == "bar":
        first, second = draws.shuffled("asked", range(len(chart.values)))[:2]
        third = draws.integer("third", 0, len(chart.values) - 1)
        larger = "yes" if chart.values[first] > chart.values[second] else "no"
        asked += [
            (f"Is the {chart.colours[first]} bar larger than the {chart.colours[second]} bar?", larger),
            (f"What is the value of the {chart.colours[third]} bar?", str(chart.values[third])),
        ]
    return draws.shuffled("order", asked)


def describe(chart: Chart) -> str:
    """What the chart shows, in words: colours, and values where an axis gives them."""
    if chart.kind == "pie":
        return " ".join(chart.colours)
    return " ".join(f"{colour} {value}" for colour, value in zip(chart.colours, chart.values, strict=True))


def make(seed: int, split: Split, number: int, *, one_tile: bool = False) -> Sample:
    """Make one sample of the split: for training several questions about a chart, otherwise one."""
    draws = Draws("charts", seed, split, number, int(one_tile))
    chart = draw_chart(draws, draws.choice("kind", ("bar", "bar", "bar", "pie")), split)
    size = (56, 56) if one_tile or chart.kind == "pie" else draws.choice("size", _SIZES)
    questions = _questions(draws, chart)
    if split != "train":
        questions = questions[:1]
    questions[0] = ("<image>\n" + questions[0][0], questions[0][1])
    return Sample(
        images=(render(chart, size),),
        transcripts=(describe(chart),),
        questions=tuple(questions),
        sources=(chart.source,),
    )
