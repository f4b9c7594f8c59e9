"""Scorers for numbers: equal up to a relative tolerance, and ChartQA's relaxed accuracy.

"$1,234.50", "−3", "3/4", "1 3/4", "12 %", "5 km", "2×10^3", "3 million"  ──parse_number──► Number(value, unit)
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from evovlm.data.answers.text import exact_match

RELAXED_TOLERANCE = 0.05
_ROUNDING = 1e-9  # of the float arithmetic, so that 1.05 is within 5 % of 1
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SIGNS = str.maketrans(dict.fromkeys("−–—﹣－", "-") | dict.fromkeys("\u00a0\u2007\u2009\u202f", " "))
_DECIMAL = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?:[ ]\d{3})+(?!\d)(?:\.\d+)?|\d+,\d+|\d+\.?\d*|\.\d+"
_NUMBER = re.compile(
    rf"""(?:about|approximately|around|approx\.|[~≈=])?\s*
    (?P<sign>[-+]?\s*(?P<currency>[$€£¥₹])?\s*[-+]?)\s*
    (?:(?P<whole>\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)
      |(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})
      |(?P<decimal>{_DECIMAL})(?:e(?P<e>[-+]?\d{{1,4}})|\s*(?:[×x*]|\\times)\s*10\s*(?:\^|\*\*)\s*\{{?(?P<power>[-+]?\d{{1,4}})\}}?)?)
    \s*(?P<scale>(?:thousand|million|billion|trillion)(?!\w))?
    \s*(?P<unit>(?:%|[^\W\d_][^\d,;:=()\[\]]{{0,24}}[23]?|[°'"′″$€£¥₹][^\d]{{0,24}})?)""",
    re.IGNORECASE | re.VERBOSE,
)
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\[!,;: ]|\\left|\\right|\\\(|\\\)|^\$(?=.*[^\\]\$$)|(?<=[^\s\\])\$$"), ""),
    (re.compile(r"\\([%$])"), r"\1"),
)


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Attributes:
        value: As written; a per cent sign does not divide it.
        unit: In lower case, without plural s and full stops: "%", "km", "$"; empty if there is none.
    """

    value: float
    unit: str = ""


def parse_number(text: str) -> Number | None:
    """Read a text that is one number, with or without a unit; None if it is anything else.

    Signs (also U+2212), thousands separators (comma or space, three digits each), decimal commas where no thousands
    are meant ("3,14"), fractions and mixed numbers (also as ``\\frac`` and as one character), powers of ten, currency
    signs, "million" and its like.
    """
    text = "".join(map(_plain, text.strip().translate(_SIGNS)))
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    found = _NUMBER.fullmatch(text.strip().rstrip(".。"))
    if found is None:
        return None
    if found["whole"]:
        value = float(found["whole"]) + _ratio(float(found["above"]), float(found["below"]))
    elif found["over"]:
        value = _ratio(_decimal(found["over"]), _decimal(found["under"]))
    else:
        value = _decimal(found["decimal"], int(found["e"] or found["power"] or 0))
    value *= _SCALES.get((found["scale"] or "").lower(), 1.0)
    if "-" in found["sign"]:
        value = -value
    return Number(value, _unit(found["currency"] or found["unit"])) if math.isfinite(value) else None


def numeric(prediction: str, truths: Sequence[str], tolerance: float = 1e-3) -> float:
    """Score 1 if the prediction is the number of one of the truths, up to a relative tolerance, else 0.

    |p − t| ≤ tolerance · |t|; a truth of 0 must be met exactly. Units must agree where both sides have one. Where only
    one has a per cent sign, 50 % is both 50 and 0.5. If one side is no number, the texts are compared.
    """
    given = parse_number(prediction)
    for truth in truths:
        wanted = parse_number(truth)
        if given is None or wanted is None:
            if exact_match(prediction, [truth]):
                return 1.0
        elif any(_close(p, t, tolerance) for p, t in _comparable(given, wanted)):
            return 1.0
    return 0.0


def relaxed_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """Score by the relaxed accuracy of ChartQA, for one question.

    Official definition: where both are numbers and the truth is not 0, right iff |p − t| / |t| ≤ 0.05, a number that
    ends with "%" counting a hundredth; otherwise right iff the texts are equal in lower case. Here commas between
    thousands are left out, too.
    """
    for truth in truths:
        given, wanted = _percent_or_number(prediction), _percent_or_number(truth)
        if given is not None and wanted:
            if abs(given - wanted) / abs(wanted) <= RELAXED_TOLERANCE:
                return 1.0
        elif prediction.strip().lower() == truth.strip().lower():
            return 1.0
    return 0.0


def _plain(character: str) -> str:
    """Write any decimal digit as ASCII, and a character such as ½ as a space and 1/2."""
    if character.isascii():
        return character
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKD", character).replace("\u2044", "/")
    return character


def _decimal(digits: str, exponent: int = 0) -> float:
    digits = digits.replace(" ", "")
    thousands = re.search(r",\d{3}(?!\d)", digits) is not None
    return float(f"{digits.replace(',', '' if thousands else '.')}e{exponent}")


def _ratio(over: float, under: float) -> float:
    return over / under if under else math.nan


def _unit(text: str) -> str:
    unit = text.strip().rstrip(".").lower()
    if unit in ("percent", "percentage"):
        return "%"
    return unit.removesuffix("s") if len(unit) > 1 else unit


def _comparable(given: Number, wanted: Number) -> list[tuple[float, float]]:
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return []
    pairs = [(given.value, wanted.value)]
    if (given.unit == "%") != (wanted.unit == "%"):
        pairs.append((given.value / 100, wanted.value) if given.unit == "%" else (given.value, wanted.value / 100))
    return pairs


def _close(prediction: float, truth: float, tolerance: float) -> bool:
    return abs(prediction - truth) <= (tolerance + _ROUNDING) * abs(truth)


def _percent_or_number(text: str) -> float | None:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
