"""Real material found inside installed packages, split into train, val and test by source item.

    scikit-learn   1,797 handwritten digits (8×8), two photographs, dataset descriptions
    scikit-image   photographs (only the files that ship in its wheel; nothing is downloaded)
    matplotlib     DejaVu, STIX and Computer Modern fonts, one photograph
    CPython        the language reference (pydoc_data.topics) and the docstrings of the standard library

An item that differs from another only by name (two equal digit images) goes to the same split.
"""

import ast
import hashlib
import importlib.resources
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evovlm.csrc.random import keys, permutation

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_FONT_NAMES = "DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSerif DejaVuSerif-Bold STIXGeneral cmr10 cmss10".split()

# Test and validation photographs; the two motorcycle pictures are a stereo pair and stay in training together.
_PHOTOS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/camera.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/coins.png"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/motorcycle_right.png"),
        ("skimage", "data/retina.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ),
    "val": (("skimage", "data/clock_motion.png"), ("skimage", "data/moon.png")),
    "test": (
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/gravel.png"),
        ("skimage", "data/rocket.jpg"),
        ("skimage", "data/ihc.png"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
}


@dataclass(frozen=True)
class Digit:
    """One handwritten digit: ``pixels`` uint8 [8, 8] with 0 for paper and 255 for full ink."""

    number: int  # row of scikit-learn's data set
    label: int
    pixels: NDArray[np.uint8]

    @property
    def source(self) -> str:
        """Hash of the pixels: the name under which splits are compared."""
        return f"digit:{hashlib.blake2b(self.pixels.tobytes(), digest_size=8).hexdigest()}"


@dataclass(frozen=True)
class Document:
    """One plain text with the name it is split by."""

    name: str
    text: str


def _package_file(package: str, path: str) -> Path:
    found = Path(str(importlib.resources.files(package).joinpath(path)))
    if not found.is_file():
        raise FileNotFoundError(
            f"quickstart data: {package} has no {path}; install it with: pip install 'evovlm[quickstart]'"
        )
    return found


def _cut(names: Sequence[str], fractions: dict[Split, float], *parts: int | str) -> dict[Split, list[str]]:
    """Split distinct names by a keyed permutation; val and test get their fraction, train the rest."""
    ordered = sorted(set(names))
    order = permutation(len(ordered), *parts)
    num_val = round(len(ordered) * fractions["val"])
    num_test = round(len(ordered) * fractions["test"])
    ends = {"val": (0, num_val), "test": (num_val, num_val + num_test), "train": (num_val + num_test, len(ordered))}
    return {split: [ordered[i] for i in order[slice(*ends[split])]] for split in SPLITS}


@cache
def digits(seed: int) -> dict[Split, tuple[Digit, ...]]:
    """The handwritten digits of each split: 5 % val, 15 % test, equal images always together."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    everything = [Digit(i, int(label), pixels[i]) for i, label in enumerate(data.target)]
    names = _cut([d.source for d in everything], {"val": 0.05, "test": 0.15}, "digit_split", seed)
    return {split: tuple(d for d in everything if d.source in set(names[split])) for split in SPLITS}


@cache
def documents() -> tuple[Document, ...]:
    """English plain text: the language reference, docstrings of the standard library, dataset descriptions."""
    from pydoc_data.topics import topics

    found = [Document(f"topic:{name}", text) for name, text in sorted(topics.items())]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        if texts:
            found.append(Document(f"module:{path.stem}", "\n\n".join(texts)))
    descriptions = sorted(_package_file("sklearn", "datasets/descr/digits.rst").parent.glob("*.rst"))
    found += [Document(f"descr:{path.stem}", path.read_text(encoding="utf-8")) for path in descriptions]
    return tuple(found)


@cache
def words(seed: int) -> dict[Split, tuple[str, ...]]:
    """Words of 3 to 6 letters that the documents use, in capitals: 4 % val, 14 % test."""
    pattern = re.compile(r"(?<![\w.'<`-])[a-z]{3,6}(?![\w('<`-])")
    found = {word for document in documents() for word in pattern.findall(document.text)}
    split = _cut([word.upper() for word in found], {"val": 0.04, "test": 0.14}, "word_split", seed)
    return {name: tuple(members) for name, members in split.items()}


def text_split(seed: int) -> dict[Split, list[Document]]:
    """The documents of each split; 4 % val, no test (language is judged by its validation loss)."""
    by_name = {document.name: document for document in documents()}
    split = _cut(list(by_name), {"val": 0.04, "test": 0.0}, "text_split", seed)
    return {name: [by_name[member] for member in members] for name, members in split.items()}


@cache
def photos(split: Split) -> tuple[tuple[str, Image.Image], ...]:
    """``(source, RGB image)`` of each photograph of a split, at most 512 pixels wide."""
    found = []
    for package, path in _PHOTOS[split]:
        with Image.open(_package_file(package, path)) as opened:
            image = opened.convert("RGB")
        image.thumbnail((512, 512))
        found.append((f"photo:{package}/{path}", image))
    return tuple(found)


@cache
def fonts() -> tuple[Path, ...]:
    """Text fonts that ship with matplotlib and hold all Latin letters."""
    return tuple(_package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf") for name in _FONT_NAMES)


def hashed_split(name: str) -> Split:
    """Split of a thing that is drawn, not found (a chart's numbers, a letter string): 80 / 5 / 15 % by its hash."""
    share = int(keys("drawn_split", name)) % 100
    return "val" if share < 5 else "test" if share < 20 else "train"
