"""Task `digits`: read a grid of one to four real handwritten digits, row by row.

    ┌───┬───┐
    │ 7 │ 0 │   "Which digits are shown?" → 7034      two images: "Read the second image." → 4
    ├───┼───┤
    │ 3 │ 4 │
    └───┴───┘

Training images get a mild affine jitter for each digit (scikit-learn's set is small); val and test images none.
"""

import math

import numpy as np
from PIL import Image, ImageOps

from evovlm.data.synthetic import sources
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Digit, Split

# (columns, rows, pixels of a cell): with tiles of 56 pixels these give 1 to 5 tiles. Cells of 28 or 56 pixels fall on
# the grid of visual tokens (28 pixels each), so that a tiny model learns to read them within minutes.
_LAYOUTS = (
    (1, 1, 56),  # 1 tile
    (2, 2, 28),  # 1 tile
    (2, 1, 56),  # 2 tiles and the thumbnail
    (1, 2, 56),
    (3, 1, 56),  # 3 and the thumbnail
    (2, 2, 56),  # 4 and the thumbnail
)
_PAIR_LAYOUTS = ((1, 1, 56), (2, 1, 56), (2, 2, 28))
_TILE_LAYOUTS = ((1, 1, 56), (2, 2, 28))
_QUESTIONS = ("Which digits are shown?", "Read the digits.")
_PAIR_QUESTIONS = ("Read the first image.", "Read the second image.", "Read both images.")


def _cell(digit: Digit, size: int, draws: Draws, name: str, jitter: bool) -> Image.Image:
    """The digit enlarged to ``size``, ink white on black; one inverse affine map from output to the 8×8 pixels."""
    turn = stretch_x = stretch_y = shear = shift_x = shift_y = 0.0
    if jitter:
        turn = math.radians(draws.uniform(f"{name}/turn", -7, 7))
        stretch_x = draws.uniform(f"{name}/stretch_x", -0.08, 0.08)
        stretch_y = draws.uniform(f"{name}/stretch_y", -0.08, 0.08)
        shear = draws.uniform(f"{name}/shear", -0.1, 0.1)
        shift_x = draws.uniform(f"{name}/shift_x", -0.4, 0.4)
        shift_y = draws.uniform(f"{name}/shift_y", -0.4, 0.4)
    border = 2
    image = ImageOps.expand(Image.fromarray(digit.pixels), border=border, fill=0)
    scale = 9.0 / size  # 8 pixels of ink and half a pixel of paper on each side
    rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = np.diag([1 + stretch_x, 1 + stretch_y]) @ np.array([[1, shear], [0, 1]]) @ rotate * scale
    centre = np.array([4 + border + shift_x, 4 + border + shift_y])
    offset = centre - matrix @ np.array([size / 2, size / 2])
    data = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    return image.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)


def draw_grid(
    draws: Draws, name: str, layout: tuple[int, int, int], pool: tuple[Digit, ...], jitter: bool
) -> tuple[Image.Image, list[Digit]]:
    """Draw digits of a pool into a layout of (columns, rows, pixels of a cell); returns the image and the digits."""
    cols, rows, size = layout
    canvas = Image.new("L", (cols * size, rows * size), 0)
    chosen = [draws.choice(f"{name}/digit/{i}", pool) for i in range(cols * rows)]
    for i, digit in enumerate(chosen):
        canvas.paste(_cell(digit, size, draws, f"{name}/{i}", jitter), (i % cols * size, i // cols * size))
    red, green, blue = (draws.integer(f"{name}/ink/{c}", 225, 255) for c in range(3))
    paper_red, paper_green, paper_blue = (draws.integer(f"{name}/paper/{c}", 0, 25) for c in range(3))
    return ImageOps.colorize(canvas, (paper_red, paper_green, paper_blue), (red, green, blue)), chosen


def make(seed: int, split: Split, number: int, *, one_tile: bool = False) -> Sample:
    """Make one sample of the split; every fifth has two images, unless images of ``one_tile`` are wanted."""
    draws = Draws("digits", seed, split, number, int(one_tile))
    pair = not one_tile and number % 5 == 4
    layouts = _TILE_LAYOUTS if one_tile else _PAIR_LAYOUTS if pair else _LAYOUTS
    pool = sources.digits(seed)[split]
    made = [
        draw_grid(draws, str(i), draws.choice(f"layout/{i}", layouts), pool, jitter=split == "train")
        for i in range(1 + pair)
    ]
    texts = tuple("".join(str(digit.label) for digit in chosen) for _, chosen in made)
    if pair:
        asked = draws.choice("question", _PAIR_QUESTIONS)
        answer = {_PAIR_QUESTIONS[0]: texts[0], _PAIR_QUESTIONS[1]: texts[1]}.get(asked, " and ".join(texts))
        question = "Image-1: <image>\nImage-2: <image>\n" + asked
    else:
        question, answer = "<image>\n" + draws.choice("question", _QUESTIONS), texts[0]
    return Sample(
        images=tuple(image for image, _ in made),
        transcripts=texts,
        questions=((question, answer),),
        sources=tuple(digit.source for _, chosen in made for digit in chosen),
    )
