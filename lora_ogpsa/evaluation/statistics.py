"""95 % intervals for shares, token-weighted means and paired differences; no model in sight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution
_RESAMPLES = 2000
_SEED = 20240229  # fixed: the same values always give the same interval


class Interval(NamedTuple):
    """An estimate with its 95 % interval; the bounds are NaN where `n` allows none."""

    value: float
    low: float
    high: float
    n: int


def share(successes: int, n: int) -> Interval:
    """Share of successes with Wilson's score interval.

    Wilson's interval keeps its coverage at 0 % and 100 %, where the textbook one collapses to a
    point: 0 refusals out of 100 prompts means "below 3.7 %", not "never".

    Args:
        successes: how many of the `n`.
        n: number of trials; 0 gives NaN throughout.
    """
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At p = 0 and 1 the bound is exact in theory; rounding must not push it past p.
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """Weighted mean with a percentile bootstrap interval over the items.

    With token counts as weights and per-item averages as values this is the average per token.
    Whole items are drawn, because tokens of one text are not independent of each other.

    Args:
        values: one number per item.
        weights: one positive number per item; ``None`` weighs all alike.
    """
    x, w = _arrays(values, weights)
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float((x * w).sum() / w.sum())
    if len(x) == 1:
        return Interval(value, math.nan, math.nan, 1)
    low, high = np.percentile(_bootstrap_means(x * w, w), [2.5, 97.5])
    return Interval(value, float(low), float(high), len(x))


def paired_share_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Share of the second minus share of the first on the same items (Bonett & Price 2012).

    Half a pseudo-observation is added to each kind of disagreement, so that two runs which
    happen to agree on every item still get an interval of honest width.

    Args:
        first: one outcome per item.
        second: the outcomes of the same items, in the same order.
    """
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    value = (gained - lost) / n
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return Interval(value, min(value, low), max(value, high), n)


def paired_mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    first_weights: Sequence[float] | None = None,
    second_weights: Sequence[float] | None = None,
) -> Interval:
    """Weighted mean of the second minus that of the first on the same items.

    Args:
        first: one number per item.
        second: the numbers of the same items, in the same order.
        first_weights: weights of `first`; they differ from `second_weights` where two tokenizers
            count differently.
        second_weights: weights of `second`.

    Raises:
        ValueError: the two differ in length.
    """
    x, w = _arrays(first, first_weights)
    y, v = _arrays(second, second_weights)
    if len(x) != len(y):
        raise ValueError(f"Paired values should be of one length. Found {len(x)} and {len(y)}.")
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float((y * v).sum() / v.sum() - (x * w).sum() / w.sum())
    if len(x) == 1:
        return Interval(value, math.nan, math.nan, 1)
    # The same seed draws the same items for both: that is the pairing.
    difference = _bootstrap_means(y * v, v) - _bootstrap_means(x * w, w)
    low, high = np.percentile(difference, [2.5, 97.5])
    return Interval(value, float(low), float(high), len(x))


def _arrays(
    values: Sequence[float], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape:
        raise ValueError(f"`weights` should be one per value. Found {len(w)} for {len(x)}.")
    return x, w


def _bootstrap_means(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of `_RESAMPLES` resamples, [_RESAMPLES]; drawn in slices to bound memory."""
    generator = np.random.default_rng(_SEED)
    n = len(sums)
    step = max(1, 2_000_000 // n)
    means = []
    for start in range(0, _RESAMPLES, step):
        picks = generator.integers(0, n, size=(min(step, _RESAMPLES - start), n))
        means.append(sums[picks].sum(1) / weights[picks].sum(1))
    return np.concatenate(means)
