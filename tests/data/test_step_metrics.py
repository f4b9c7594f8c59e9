"""Step metrics on cases worked out by hand, and against scikit-learn."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.step_metrics import best_constant, step_quality

judged = st.lists(st.tuples(st.sampled_from((0.0, 0.2, 0.5, 0.85, 0.9, 1.0)), st.booleans()), min_size=1, max_size=30)


def test_by_hand() -> None:
    #          hit  hit  miss  hit   miss (score 0.5 is not above 0.5)
    scores, labels = [0.9, 0.8, 0.7, 0.1, 0.5], [True, True, False, False, True]
    found = step_quality(scores, labels, 0.5)
    assert (found.steps, found.accuracy) == (5, 3 / 5)
    assert (found.good.count, found.good.said, found.good.precision, found.good.recall) == (3, 3, 2 / 3, 2 / 3)
    assert (found.bad.count, found.bad.said, found.bad.precision, found.bad.recall) == (2, 2, 1 / 2, 1 / 2)
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.auc == pytest.approx(5 / 6)  # of six pairs, 0.5 stands below 0.7


def test_a_constant_answer() -> None:
    labels = [True, True, True, False]
    sign, found = best_constant(labels)
    assert (sign, found.accuracy) == ("+", 3 / 4)
    assert found.macro_f1 == pytest.approx((6 / 7 + 0) / 2)
    assert (found.bad.precision, found.bad.recall, found.auc) == (None, 0.0, 0.5)
    assert best_constant([False, True, False])[0] == "-"


def test_one_class_alone() -> None:
    found = step_quality([0.9, 0.8], [True, True], 0.5)
    assert (found.accuracy, found.macro_f1, found.auc) == (1.0, 1.0, None)
    assert (found.bad.count, found.bad.said, found.bad.f1) == (0, 0, None)


def test_as_json() -> None:
    content = step_quality([0.9, 0.1], [True, False], 0.5).to_json()
    assert set(content) == {"steps", "accuracy", "macro_f1", "auc", "classes"}
    assert content["classes"]["+"] == {"count": 1, "said": 1, "precision": 1.0, "recall": 1.0, "f1": 1.0}  # type: ignore[index]


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no steps"):
        step_quality([], [], 0.5)
    with pytest.raises(ValueError, match="zip"):
        step_quality([0.5], [], 0.5)


@settings(max_examples=60, deadline=None)
@given(judged)
def test_as_scikit_learn_counts(pairs: list[tuple[float, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = [score for score, _ in pairs], [label for _, label in pairs]
    said = [score > 0.85 for score in scores]
    found = step_quality(scores, labels, 0.85)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, said))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, said, average="macro", zero_division=0))
    precision, recall, _, count = metrics.precision_recall_fscore_support(
        labels, said, labels=[True, False], zero_division=math.nan
    )
    for quality, p, r, n in zip((found.good, found.bad), precision, recall, count, strict=True):
        assert quality.count == n
        assert (math.nan if quality.precision is None else quality.precision) == pytest.approx(p, nan_ok=True)
        assert (math.nan if quality.recall is None else quality.recall) == pytest.approx(r, nan_ok=True)
    if found.auc is not None:
        assert found.auc == pytest.approx(metrics.roc_auc_score(labels, scores))
    else:
        assert len(set(labels)) == 1
