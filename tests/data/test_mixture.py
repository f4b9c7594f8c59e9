"""Epoch orders: nothing lost or repeated, exact visits, ratios by tokens, purity."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evovlm.data.mixture import Mixture, MixtureSettings, parse_ratio
from evovlm.data.order import Draws, Order, Sequential

MakeIndex = Callable[..., Any]
NATURAL = MixtureSettings(language_ratio=None)


def datasets(sizes: list[int], repeats: list[float] | None = None) -> list[dict[str, Any]]:
    repeats = repeats or [1.0] * len(sizes)
    return [
        {"name": f"d{i}", "tokens": [5 + (7 * j + i) % 40 for j in range(n)], "repeat_time": r}
        | ({"tiles": [j % 4 for j in range(n)]} if i % 2 else {})
        for i, (n, r) in enumerate(zip(sizes, repeats, strict=True))
    ]


WINDOW = 13


def order(mixture: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and visits of all windows of an epoch."""
    windows = [mixture.window(epoch, number, WINDOW) for number in range(mixture.num_windows(WINDOW))]
    assert all((w.parts == -1).all() for w in windows)
    whole = Draws.concatenate(windows)
    return whole.samples, whole.visits


def check_visits(history: list[tuple[np.ndarray, np.ndarray]], passes: bool = True) -> None:
    """Visits tell the draws of a sample apart; without replacement they are the numbers of its passes."""
    seen: dict[int, list[int]] = {}
    for samples, visits in history:
        for sample, visit in zip(samples.tolist(), visits.tolist(), strict=True):
            seen.setdefault(sample, []).append(visit)
    for found in seen.values():
        assert len(set(found)) == len(found)
        assert not passes or sorted(found) == list(range(len(found)))


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)


@given(SIZES, st.integers(0, 2**32))
@settings(deadline=None)
def test_natural_epoch_holds_every_sample_once(make_index: MakeIndex, sizes: list[int], seed: int) -> None:
    mixture = Mixture(make_index(*datasets(sizes)), NATURAL, seed)
    for epoch in range(3):
        samples, visits = order(mixture, epoch)
        assert sorted(samples.tolist()) == list(range(sum(sizes)))
        assert (visits == epoch).all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_repeat_time_is_exact(make_index: MakeIndex, sizes: list[int], data: st.DataObject) -> None:
    repeats = [data.draw(st.sampled_from([1.0, 2.0, 2.5, 3.1])) for _ in sizes]
    index = make_index(*datasets(sizes, repeats))
    history = [order(Mixture(index, NATURAL, 3), epoch) for epoch in range(10)]
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
    history = [order(walked, epoch) for epoch in range(4)]
    check_visits(history, passes=not replacement)
    for epoch in (3, 0, 2):  # jumped to, also backwards
        for got, expected in zip(order(walked, epoch), history[epoch], strict=True):
            assert got.tolist() == expected.tolist()
        for got, expected in zip(order(Mixture(index, mix, seed), epoch), history[epoch], strict=True):
            assert got.tolist() == expected.tolist()


def test_seeds_and_epochs_give_other_orders(make_index: MakeIndex) -> None:
    index = make_index(*datasets([200]))
    orders = [order(Mixture(index, NATURAL, seed), epoch)[0].tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
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
    samples = np.concatenate([order(mixture, epoch)[0] for epoch in range(8)])
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
    history = [order(mixture, epoch) for epoch in range(3)]
    check_visits(history)
    counts = np.bincount(np.concatenate([samples for samples, _ in history]), minlength=210)
    assert set(counts[:10]) <= {31, 32}  # 105 draws of 10 samples in each epoch
    assert set(counts[10:]) <= {1, 2}


def test_ratio_needs_both_kinds(make_index: MakeIndex) -> None:
    mixture = Mixture(make_index({"name": "text", "tokens": [5, 6, 7]}), MixtureSettings(language_ratio="1:3"), 0)
    assert sorted(order(mixture, 0)[0].tolist()) == [0, 1, 2]


def test_weights_are_relative_draws(make_index: MakeIndex) -> None:
    index = make_index(
        {"name": "a", "tokens": [10] * 100, "weight": 1.0},
        {"name": "b", "tokens": [90] * 300, "weight": 1.0},
        {"name": "c", "tokens": [20] * 50, "weight": 0.5},
    )

    def counts(given: dict[str, float]) -> list[int]:
        samples, _ = order(Mixture(index, MixtureSettings(weights=given, language_ratio=None), 0), 0)
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
    samples, visits = order(mixture, 0)
    assert len(samples) == 1000
    assert len(set(samples.tolist())) == pytest.approx(632, abs=45)  # 1 - 1/e of them
    assert sorted(visits.tolist()) == list(range(1000))  # the number of the draw


@pytest.mark.parametrize("replacement", [False, True])
def test_without_leaves_samples_out(make_index: MakeIndex, replacement: bool) -> None:
    index = make_index({"name": "a", "tokens": [10] * 5}, {"name": "b", "tokens": [10] * 5 + [990], "tiles": [1] * 6})
    mixture = Mixture(index, MixtureSettings(language_ratio="1:1", replacement=replacement), 0)
    for less in (mixture.without(np.array([10, 2])), mixture.without(np.array([2])).without(np.array([10]))):
        drawn = {int(s) for epoch in range(20) for s in order(less, epoch)[0]}
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
    whole = Sequential(make_index(*datasets([30, 40])))
    assert order(whole, 0)[0].tolist() == list(range(70))
    less = whole.without(np.array([35, 1])).without(np.array([69]))
    assert order(less, 0)[0].tolist() == [i for i in range(69) if i not in (1, 35)]
    with pytest.raises(IndexError, match="no epoch 1"):
        order(whole, 1)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 2**32), st.integers(1, 40))
@settings(deadline=None)
def test_windows_share_every_dataset_evenly(make_index: MakeIndex, sizes: list[int], seed: int, size: int) -> None:
    index = make_index(*datasets(sizes))
    mixture = Mixture(index, NATURAL, seed)
    number = mixture.num_windows(size)
    assert number == -(-sum(sizes) // size)
    for w in range(number):
        drawn = np.bincount(index.samples["dataset"][mixture.window(2, w, size).samples], minlength=len(sizes))
        assert all(abs(n - count / number) < 1 for n, count in zip(drawn, sizes, strict=True))


@given(SIZES.filter(lambda sizes: sum(sizes) > 1), st.integers(0, 2**32), st.booleans(), st.data())
@settings(deadline=None)
def test_a_mixture_goes_on_where_another_ended(
    make_index: MakeIndex, sizes: list[int], seed: int, replacement: bool, data: st.DataObject
) -> None:
    """Other weights from a step on: what was drawn and what follows are still the streams' draws, each once."""
    index = make_index(*datasets(sizes))
    settings_of = MixtureSettings(replacement=replacement, language_ratio=None)
    mixture = Mixture(index, settings_of, seed)
    windows = data.draw(st.integers(1, 5))
    before = Draws.concatenate([mixture.window(*divmod(w, mixture.num_windows(5)), 5) for w in range(windows)])
    used = data.draw(st.integers(0, len(before)))
    epoch, number = divmod(windows - 1, mixture.num_windows(5))
    start = mixture.after(epoch, number, 5, before[used:])
    on = data.draw(st.sampled_from([i for i, n in enumerate(sizes) if n]))
    only = MixtureSettings(replacement=replacement, language_ratio=None, datasets=(f"d{on}",))
    then = Mixture(index, only, seed, start=start)
    unused = before[used:].samples
    after = Draws.concatenate([then.window(0, w, 5) for w in range(then.num_windows(5))])
    assert set(index.samples["dataset"][after.samples].tolist()) == {on}
    first, count = index.datasets[on].first, index.datasets[on].count
    mine = before.samples[(before.samples >= first) & (before.samples < first + count)]
    assert len(after) == count
    whole = Mixture(index, only, seed)
    total = len(mine) - ((unused >= first) & (unused < first + count)).sum() + count
    expected = Draws.concatenate([whole.window(e, w, 5) for e in range(9) for w in range(whole.num_windows(5))])
    all_draws = sorted(zip(expected.visits.tolist(), expected.samples.tolist(), strict=True))
    made = [*zip(before.samples[:used].tolist(), before.visits[:used].tolist(), strict=True)]
    made = [(v, s) for s, v in made if first <= s < first + count]
    made += [*zip(after.visits.tolist(), after.samples.tolist(), strict=True)]
    assert len(set(made)) == len(made) == total
    assert set(made) <= set(all_draws)
    if not replacement:  # whole passes, but for the last and what a later phase of other datasets still carries
        assert max(v for v, _ in made) <= -(-(len(mine) + count) // count)
