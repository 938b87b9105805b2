"""Intervals: known values, coverage, pairing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ogpsa.evaluation import statistics


@pytest.mark.parametrize(("successes", "n"), [(0, 100), (11, 100), (50, 100), (100, 100), (1, 2)])
def test_share_is_wilsons_interval(successes, n):
    found = statistics.share(successes, n)
    assert (found.value, found.n) == (successes / n, n)
    # Its bounds are the shares that a score test at 5 % just rejects: (p - b)^2 = z^2 b (1 - b) / n
    for bound in (found.low, found.high):
        score = (found.value - bound) ** 2
        assert score == pytest.approx(1.96**2 * bound * (1 - bound) / n, rel=1e-3, abs=1e-12)


def test_no_refusal_in_a_hundred_is_not_never():
    assert statistics.share(0, 100).high == pytest.approx(0.037, abs=1e-3)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_share_interval_holds_the_share_and_stays_in_range(case):
    found = statistics.share(*case)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("found", [statistics.share(0, 0), statistics.mean([])])
def test_nothing_measured_is_nan_and_not_zero(found):
    assert found.n == 0
    assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_one_item_has_a_mean_but_no_interval():
    found = statistics.mean([2.5])
    assert found.value == 2.5
    assert math.isnan(found.low) and math.isnan(found.high)


def test_weighted_mean_is_the_average_per_token():
    # 3 tokens at 1 nat each and 1 token at 5 nats
    assert statistics.mean([1.0, 5.0], [3, 1]).value == pytest.approx(2.0)


def test_mean_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = statistics.mean(generator.normal(1.0, 2.0, size=60).tolist())
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 198


def test_intervals_are_deterministic_and_leave_random_state_alone():
    values = np.random.default_rng(1).exponential(size=40).tolist()
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    assert statistics.mean(values) == statistics.mean(values)
    assert np.random.get_state()[1].tolist() == before


def test_large_samples_are_resampled_in_slices():
    values = np.random.default_rng(1).normal(size=3000)
    means = statistics._bootstrap_means(values, np.ones_like(values))
    assert means.shape == (2000,)
    assert means.std() == pytest.approx(values.std() / math.sqrt(3000), rel=0.1)


def test_paired_shares_see_what_unpaired_ones_cannot():
    before = [False] * 90 + [True] * 10
    after = [False] * 75 + [True] * 25  # 15 items changed, all in one direction
    found = statistics.paired_share_difference(before, after)
    assert found.value == pytest.approx(0.15)
    assert 0 < found.low < 0.15 < found.high
    unpaired = math.hypot(0.0590, 0.0849)  # 1.96 standard errors of the two shares
    assert found.high - found.low < 2 * unpaired


def test_paired_shares_that_agree_everywhere_still_have_an_interval():
    found = statistics.paired_share_difference([True] * 50, [True] * 50)
    assert found.value == 0
    assert found.low < -0.01 and found.high > 0.01
    assert found.low == pytest.approx(-found.high)


def test_paired_shares_by_hand():
    """Bonett and Price (2012): of 50 pairs 12 gained and 2 lost."""
    first = [False] * 12 + [True] * 2 + [True] * 36
    second = [True] * 12 + [False] * 2 + [True] * 36
    found = statistics.paired_share_difference(first, second)
    up, down = 13 / 52, 3 / 52
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 52)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))


def test_the_interval_of_a_mean_is_weighted_as_the_mean_is():
    """Items without weight are not there, whatever their values."""
    values, weights = np.arange(40.0), np.ones(40)
    heavy = statistics.mean(values, np.where(values < 20, 1000.0, 1.0))
    assert heavy.high < 13 and heavy.low > 5
    assert statistics.mean(values, weights).high > 20


def test_paired_means_cancel_what_the_items_share():
    generator = np.random.default_rng(2)
    level = generator.normal(0, 10, size=50)
    before, after = level, level + 0.5 + generator.normal(0, 0.1, size=50)
    found = statistics.paired_mean_difference(before.tolist(), after.tolist())
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.high - found.low < 0.1  # unpaired it would be about 8


def test_paired_means_may_differ_in_weights():
    found = statistics.paired_mean_difference([1.0, 2.0], [1.0, 2.0], [1, 1], [1, 3])
    assert found.value == pytest.approx(1.75 - 1.5)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="of one length"):
        statistics.paired_mean_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="one per value"):
        statistics.mean([1.0, 2.0], [1.0])
