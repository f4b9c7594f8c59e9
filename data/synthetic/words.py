"""Task `words`: read a word set in a real font over a crop of a real photograph.

    ┌──────────────────────┐
    │ ░▒▓ HOUSE ▓▒░ ░▒▓▒░  │   "Which word is written?" → HOUSE
    └──────────────────────┘

Test words are never drawn in training, not even inside the random letter strings that pre-training reads,
and test photographs differ from training photographs.
"""

from functools import cache
from pathlib import Path
from string import ascii_uppercase

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from evovlm.data.synthetic import sources
from evovlm.data.synthetic.draws import Draws
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Split

# Image size by the number of letters: with tiles of 56 pixels 1, 3 or 4 tiles. A letter is about as wide as a visual
# token (28 pixels), since the text is stretched to fill the width.
_SIZES = {1: (56, 56), 2: (56, 56), 3: (112, 56), 4: (112, 56), 5: (168, 56), 6: (168, 56)}
_FONT_SIZE = 60
_QUESTIONS = ("Which word is written?", "Read the word.")


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def _background(draws: Draws, split: Split, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """A random crop of a photograph of the split, scaled to ``size``."""
    source, photo = draws.choice("photo", sources.photos(split))
    zoom = draws.uniform("zoom", 0.8, 1.6)
    width = min(int(size[0] * zoom), photo.width)
    height = min(int(size[1] * zoom), photo.height)
    left = draws.integer("left", 0, photo.width - width)
    top = draws.integer("top", 0, photo.height - height)
    return photo.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)), source


def draw_text(draws: Draws, split: Split, text: str) -> tuple[Image.Image, str]:
    """Set ``text`` brightly over a dimmed photograph crop; returns the image and the photograph's name."""
    size = _SIZES[len(text)]
    photo, source = _background(draws, split, size)
    image = ImageEnhance.Brightness(photo).enhance(draws.uniform("dim", 0.15, 0.35))
    font = _font(draws.choice("font", sources.fonts()), _FONT_SIZE)
    left, top, right, bottom = font.getbbox(text)
    layer = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(layer).text((2 - left, 2 - top), text, font=font, fill=255)
    # A lone letter keeps a letter's shape; longer texts fill the width.
    width = draws.uniform("width", 26, 40) if len(text) == 1 else size[0] * draws.uniform("width", 0.92, 0.99)
    layer = layer.resize((int(width), int(draws.uniform("height", 40, 50))), Image.Resampling.BICUBIC)
    x, y = (int(draws.uniform(f"at/{axis}") * (size[axis] - layer.size[axis])) for axis in range(2))
    red, green, blue = (draws.integer(f"ink/{c}", 225, 255) for c in range(3))
    image.paste(Image.new("RGB", layer.size, (red, green, blue)), (x, y), layer)
    return image, source


def letter_string(draws: Draws, lengths: tuple[int, ...], forbidden: frozenset[str]) -> str:
    """Random capitals that are no word of another split (pre-training reads these)."""
    length = draws.choice("length", lengths)
    for attempt in range(100):
        text = "".join(draws.choice(f"letter/{attempt}/{i}", ascii_uppercase) for i in range(length))
        if text not in forbidden:
            return text
    raise AssertionError("letter_string: a hundred strings in a row were held-out words")


@cache
def _held_out(seed: int, split: Split) -> frozenset[str]:
    split_words = sources.words(seed)
    return frozenset(word for other, members in split_words.items() if other != split for word in members)


def make(seed: int, split: Split, number: int) -> Sample:
    """Make one sample of the split: a real word."""
    draws = Draws("words", seed, split, number)
    pool = sources.words(seed)[split]
    # Each held-out word is asked about equally often.
    return _sample(draws, split, draws.choice("word", pool) if split == "train" else pool[number % len(pool)])


def make_letters(seed: int, split: Split, number: int, *, one_tile: bool = False) -> Sample:
    """Make one sample of the split: a random string of 3 to 6 letters, or of 1 or 2 on a single tile."""
    draws = Draws("letters", seed, split, number, int(one_tile))
    lengths = (1, 1, 2) if one_tile else (3, 4, 5, 6)
    return _sample(draws, split, letter_string(draws, lengths, _held_out(seed, split)))


def _sample(draws: Draws, split: Split, text: str) -> Sample:
    image, photo = draw_text(draws, split, text)
    question = "<image>\n" + draws.choice("question", _QUESTIONS)
    return Sample((image,), (text,), ((question, text),), (f"word:{text}", photo))
