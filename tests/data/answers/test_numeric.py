"""Numbers are read in the forms that people write, and compared with a tolerance."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.answers.numeric import Number, numeric, parse_number, relaxed_accuracy

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5", 5, ""),
        ("+7", 7, ""),
        ("-3", -3, ""),
        ("−3", -3, ""),
        ("- 3.", -3, ""),
        (".5", 0.5, ""),
        ("1,234", 1234, ""),
        ("1,234,567.25", 1234567.25, ""),
        ("1 234 567", 1234567, ""),
        ("1\u202f234", 1234, ""),
        ("3,14", 3.14, ""),
        ("3/4", 0.75, ""),
        ("-3/4", -0.75, ""),
        ("1 3/4", 1.75, ""),
        ("-1 3/4", -1.75, ""),
        ("½", 0.5, ""),
        ("2½ cups", 2.5, "cup"),
        (r"\frac{3}{4}", 0.75, ""),
        (r"-\dfrac{3}{4}", -0.75, ""),
        ("$5$", 5, ""),
        ("1e-3", 0.001, ""),
        ("2.5E4", 25000, ""),
        ("2×10^3", 2000, ""),
        (r"2 \times 10^{-3}", 0.002, ""),
        ("3 million", 3e6, ""),
        ("12%", 12, "%"),
        (r"12\%", 12, "%"),
        ("12 percent", 12, "%"),
        ("$1,234.50", 1234.5, "$"),
        ("-$5", -5, "$"),
        ("5 km", 5, "km"),
        ("5km/h", 5, "km/h"),
        ("5 m2", 5, "m2"),
        ("5 m²", 5, "m²"),
        (r"5\text{ cm}", 5, "cm"),
        (r"30^\circ", 30, "°"),
        ("12 Apples.", 12, "apple"),
        ("about 5", 5, ""),
        ("٣٤", 34, ""),
    ],
)
def test_parse_number(text: str, value: float, unit: str) -> None:
    assert parse_number(text) == Number(pytest.approx(value, rel=1e-12), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", " ", "cat", "A5", "five", "5-6", "3/4/2020", "5:30", "1.2.3", "10, 20", "1,23,456", "(1, 2)", "1/0", "1 3/0",
     "1e999", "9" * 400, "5 and 6", "x = 5", "%", "-", ".", "inf", "nan", "1e", "0x10"],
)  # fmt: skip
def test_what_is_no_single_number(text: str) -> None:
    found = parse_number(text)
    assert found is None or (text in ("1e", "0x10") and found.unit != ""), found


@given(NUMBERS, st.sampled_from(["{}", " {} ", "{} km", "{:,.4f}", "about {}", "{}."]))
def test_reads_what_python_writes(value: float, form: str) -> None:
    found = parse_number(form.format(value))
    assert found is not None
    assert math.isclose(found.value, float(form.format(value).strip(" about.km").replace(",", "")), rel_tol=1e-12)


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_fractions(above: int, below: int) -> None:
    found = parse_number(f"{above}/{below}")
    assert found is not None
    assert math.isclose(found.value, above / below, rel_tol=1e-12, abs_tol=0)


@given(st.text(max_size=30))
def test_any_text_gives_a_finite_number_or_none(text: str) -> None:
    found = parse_number(text)
    assert found is None or math.isfinite(found.value)
    for scorer in (numeric, relaxed_accuracy):
        assert scorer(text, ["3"]) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("1000.9", "1000", 1),
        ("1001.1", "1000", 0),
        ("0", "0", 1),
        ("1e-9", "0", 0),
        ("-5", "5", 0),
        ("5 km", "5", 1),
        ("5", "5 km", 1),
        ("5 km", "5 kilometers", 0),
        ("5 km", "5 m", 0),
        ("50%", "50", 1),
        ("50%", "0.5", 1),
        ("0.5", "50%", 1),
        ("50%", "50 percent", 1),
        ("50%", "0.5%", 0),
        ("$5", "5 dollars", 0),
        ("0.75", r"\frac{3}{4}", 1),
        ("five", "5", 0),
        ("Five", "five", 1),
        ("", "5", 0),
    ],
)
def test_numeric(prediction: str, truth: str, expected: float) -> None:
    assert numeric(prediction, [truth]) == expected


@given(st.floats(1e-3, 1e6), st.floats(0, 0.2), st.floats(0.001, 0.2), st.sampled_from([-1, 1]))
def test_tolerance_is_relative_to_the_truth(truth: float, off: float, tolerance: float, sign: int) -> None:
    if abs(off - tolerance) < 1e-6:
        return
    prediction = sign * truth * (1 + off)
    assert numeric(repr(prediction), [repr(sign * truth)], tolerance) == (off < tolerance)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("104.9", "100", 1),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-96", "-100", 1),
        ("96", "-100", 0),
        ("0.52", "50%", 1),  # a per cent sign divides by a hundred
        ("52", "50%", 0),
        ("1,030", "1000", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # a truth of 0 is compared as text
        ("Red", "red", 1),
        ("reds", "red", 0),
        ("2013", "2014", 1),  # officially so
        ("5 km", "5", 0),  # officially no number
    ],
)
def test_relaxed_accuracy(prediction: str, truth: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [truth]) == expected


def test_relaxed_accuracy_takes_any_truth() -> None:
    assert relaxed_accuracy("7", ["red", "7.1"]) == 1
    assert relaxed_accuracy("8", ["red", "7.1"]) == 0
