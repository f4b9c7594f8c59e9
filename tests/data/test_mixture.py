"""Epoch orders: nothing lost or repeated, exact visits, ratios by tokens, purity."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evovlm.data.mixture import Mixture, MixtureSettings, parse_ratio
from evovlm.data.order import Sequential

MakeIndex = Callable[..., Any]
NATURAL = MixtureSettings(language_ratio=None)


def datasets(sizes: list[int], repeats: list[float] | None = None) -> list[dict[str, Any]]:
    repeats = repeats or [1.0] * len(sizes)
    return [
        {"name": f"d{i}", "tokens": [5 + (7 * j + i) % 40 for j in range(n)], "repeat_time": r}
        | ({"tiles": [j % 4 for j in range(n)]} if i % 2 else {})
        for i, (n, r) in enumerate(zip(sizes, repeats, strict=True))
    ]


def check_visits(history: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """A visit is the number of earlier draws of the sample, over all epochs so far."""
    seen: Counter[int] = Counter()
    for samples, visits in history:
        for sample, visit in zip(samples.tolist(), visits.tolist(), strict=True):
            assert visit == seen[sample]
            seen[sample] += 1


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)


@given(SIZES, st.integers(0, 2**32))
@settings(deadline=None)
def test_natural_epoch_holds_every_sample_once(make_index: MakeIndex, sizes: list[int], seed: int) -> None:
    mixture = Mixture(make_index(*datasets(sizes)), NATURAL, seed)
    for epoch in range(3):
        samples, visits = mixture.order(epoch)
        assert sorted(samples.tolist()) == list(range(sum(sizes)))
        assert (visits == epoch).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_repeat_time_is_exact(make_index: MakeIndex, sizes: list[int], data: st.DataObject) -> None:
    repeats = [data.draw(st.sampled_from([1.0, 2.0, 2.5, 3.1])) for _ in sizes]
    index = make_index(*datasets(sizes, repeats))
    history = [Mixture(index, NATURAL, 3).order(epoch) for epoch in range(10)]
    check_visits(history)
    for epochs in (1, 2, 10):  # after 10 epochs every repeat_time above has come out even
        drawn = np.bincount(np.concatenate([s for s, _ in history[:epochs]]), minlength=sum(sizes))
        for info, repeat in zip(index.datasets, repeats, strict=True):
            counts = drawn[info.first : info.first + info.count]
            assert counts.max() - counts.min() <= 1  # passes: nobody again before everybody
            assert counts.sum() == int(round(repeat * 10) * epochs * info.count // 10)


@given(SIZES.filter(lambda sizes: sum(sizes) > 1), st.integers(0, 2**32), st.booleans())
@settings(deadline=None)
def test_order_is_pure(make_index: MakeIndex, sizes: list[int], seed: int, replacement: bool) -> None:
    index = make_index(*datasets(sizes))
    mix = MixtureSettings(replacement=replacement)
    walked = Mixture(index, mix, seed)
    history = [walked.order(epoch) for epoch in range(4)]
    check_visits(history)
    for epoch in (3, 0, 2):  # jumped to, also backwards
        for got, expected in zip(walked.order(epoch), history[epoch], strict=True):
            assert got.tolist() == expected.tolist()
        for got, expected in zip(Mixture(index, mix, seed).order(epoch), history[epoch], strict=True):
            assert got.tolist() == expected.tolist()


def test_seeds_and_epochs_give_other_orders(make_index: MakeIndex) -> None:
    index = make_index(*datasets([200]))
    orders = [Mixture(index, NATURAL, seed).order(epoch)[0].tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("ratio", "share"), [("1:3", 1 / 4), ("1:2.5", 2 / 7), ("3 : 1", 3 / 4), ("0:1", 0.0)])
@pytest.mark.parametrize("replacement", [False, True])
def test_ratio_is_by_tokens(make_index: MakeIndex, ratio: str, share: float, replacement: bool) -> None:
    rng = np.random.default_rng(0)
    index = make_index(
        {"name": "text", "tokens": rng.integers(50, 70, 500)},
        {"name": "chart", "tokens": rng.integers(150, 450, 700), "tiles": rng.integers(1, 5, 700), "repeat_time": 2},
        {"name": "book", "tokens": rng.integers(200, 300, 100)},
    )
    mixture = Mixture(index, MixtureSettings(language_ratio=ratio, replacement=replacement), 1)
    samples = np.concatenate([mixture.order(epoch)[0] for epoch in range(8)])
    language = index.samples["dataset"][samples] != 1
    tokens = index.samples["num_tokens"][samples]
    assert tokens[language].sum() / tokens.sum() == pytest.approx(share, abs=0.002)
    assert len(samples) / 8 == pytest.approx(500 + 100 + 1400, abs=1)  # an epoch has as many draws as repeat_time asks
    shares = {s.name: s for s in mixture.shares}
    assert shares["text"].token_share + shares["book"].token_share == pytest.approx(share)
    if share:  # inside a kind, draws stay in proportion
        assert shares["text"].draws == pytest.approx(5 * shares["book"].draws)


def test_scarce_datasets_are_passed_evenly(make_index: MakeIndex) -> None:
    index = make_index(
        {"name": "text", "tokens": [20] * 10}, {"name": "chart", "tokens": [20] * 200, "tiles": [1] * 200}
    )
    mixture = Mixture(index, MixtureSettings(language_ratio="1:1"), 0)
    history = [mixture.order(epoch) for epoch in range(3)]
    check_visits(history)
    counts = np.bincount(np.concatenate([samples for samples, _ in history]), minlength=210)
    assert set(counts[:10]) <= {31, 32}  # 105 draws of 10 samples in each epoch
    assert set(counts[10:]) <= {1, 2}


def test_ratio_needs_both_kinds(make_index: MakeIndex) -> None:
    mixture = Mixture(make_index({"name": "text", "tokens": [5, 6, 7]}), MixtureSettings(language_ratio="1:3"), 0)
    assert sorted(mixture.order(0)[0].tolist()) == [0, 1, 2]


def test_weights_are_relative_draws(make_index: MakeIndex) -> None:
    index = make_index(
        {"name": "a", "tokens": [10] * 100, "weight": 1.0},
        {"name": "b", "tokens": [90] * 300, "weight": 1.0},
        {"name": "c", "tokens": [20] * 50, "weight": 0.5},
    )

    def counts(given: dict[str, float]) -> list[int]:
        samples, _ = Mixture(index, MixtureSettings(weights=given, language_ratio=None), 0).order(0)
        return np.bincount(index.samples["dataset"][samples], minlength=3).tolist()

    assert counts({}) == [180, 180, 90]
    assert counts({"a": 0.0, "b": 0.1, "c": 0.2}) == [0, 116, 233]  # datasets in use ask for 350 draws


def test_weights_inside_a_kind_keep_the_ratio(make_index: MakeIndex) -> None:
    index = make_index(
        {"name": "text", "tokens": [10] * 400},
        {"name": "a", "tokens": [30] * 100, "tiles": [1] * 100},
        {"name": "b", "tokens": [60] * 100, "tiles": [1] * 100},
    )
    shares = Mixture(index, MixtureSettings(weights={"a": 1, "b": 3}), 0).shares
    assert [round(s.token_share, 6) for s in shares] == [0.25, round(0.75 / 7, 6), round(0.75 * 6 / 7, 6)]


def test_with_replacement_draws_are_independent(make_index: MakeIndex) -> None:
    mixture = Mixture(make_index({"name": "a", "tokens": [9] * 1000}), MixtureSettings(replacement=True), 0)
    samples, visits = mixture.order(0)
    assert len(samples) == 1000
    assert len(set(samples.tolist())) == pytest.approx(632, abs=45)  # 1 - 1/e of them
    assert visits.max() >= 2


@pytest.mark.parametrize("replacement", [False, True])
def test_without_leaves_samples_out(make_index: MakeIndex, replacement: bool) -> None:
    index = make_index({"name": "a", "tokens": [10] * 5}, {"name": "b", "tokens": [10] * 5 + [990], "tiles": [1] * 6})
    mixture = Mixture(index, MixtureSettings(language_ratio="1:1", replacement=replacement), 0)
    for less in (mixture.without(np.array([10, 2])), mixture.without(np.array([2])).without(np.array([10]))):
        drawn = {int(s) for epoch in range(20) for s in less.order(epoch)[0]}
        assert drawn == set(range(10)) - {2}
        assert [s.token_share for s in less.shares] == [0.5, 0.5]  # of what is left


def test_bad_settings_are_errors(make_index: MakeIndex) -> None:
    index = make_index({"name": "chart", "tokens": [5]}, {"name": "text", "tokens": [5]})
    with pytest.raises(ValueError, match=r"'chrat'.*did you mean 'chart'"):
        Mixture(index, MixtureSettings(weights={"chrat": 1}), 0)
    with pytest.raises(ValueError, match="dataset 'text' has no weight"):
        Mixture(index, MixtureSettings(weights={"chart": 1}), 0)
    with pytest.raises(ValueError, match="nothing to draw"):
        Mixture(index, MixtureSettings(weights={"chart": 0, "text": 0}), 0)
    with pytest.raises(ValueError, match="nothing to draw"):
        Mixture(make_index({"name": "chart", "tokens": []}), NATURAL, 0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        MixtureSettings(weights={"chart": -1})
    for ratio in ("1", "a:b", "1:2:3", "-1:2", "0:0", "1:1/0"):
        with pytest.raises(ValueError, match="language_ratio"):
            MixtureSettings(language_ratio=ratio)
    assert [float(part) for part in parse_ratio("1:2.5")] == [1.0, 2.5]


def test_sequential_is_index_order(make_index: MakeIndex) -> None:
    order = Sequential(make_index(*datasets([3, 4])))
    assert order.order(0)[0].tolist() == list(range(7))
    assert order.without(np.array([5, 1])).order(0)[0].tolist() == [0, 2, 3, 4, 6]
    with pytest.raises(IndexError, match="no epoch 1"):
        order.order(1)
