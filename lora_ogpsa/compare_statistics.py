"""Means over training seeds with 95 % intervals that count both the prompts and the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.evaluation.statistics import share

RESAMPLES = 1000
_SEED = 20240229  # the same results always give the same intervals
# Two-sided 95 % points of Student's t by degrees of freedom; beyond, 1.96 + 2.4 / df is close.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def resampled_values(
    results: Sequence[EvaluationResult], measure: str, *, absent: float = 0.0
) -> np.ndarray:
    """A measure of several models, on the prompts as they are and on prompts drawn anew.

    Every draw takes the same prompts for all models, so what they have in common cancels in
    differences and ratios of the columns.

    Args:
        results: evaluations on the same data.
        measure: name of the measure.
        absent: its value for a model that does not have it (the base's divergence from itself).

    Returns:
        Values [1 + RESAMPLES, models]; the first row is that of all prompts.
    """
    keys = {item.key for result in results for item in result.items.get(measure, [])}
    index = {key: i for i, key in enumerate(sorted(keys))}
    values = np.zeros((len(results), len(index)))
    weights = np.zeros_like(values)
    for row, result in enumerate(results):
        for item in result.items.get(measure, []):
            values[row, index[item.key]] = item.value
            weights[row, index[item.key]] = item.weight
    n = len(index)
    generator = np.random.default_rng(_SEED)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) if n else np.zeros((0, 0))
    found = np.full((1 + RESAMPLES, len(results)), absent)
    for column, result in enumerate(results):
        if measure not in result.measures:
            continue
        found[:, column] = result.measures[measure].value
        if weights[column].any():
            total = counts @ weights[column]
            sums = counts @ (weights[column] * values[column])
            drawn = np.divide(sums, total, out=np.full(RESAMPLES, np.nan), where=total > 0)
            found[1:, column] = drawn
    return found


def over_seeds(
    values: Mapping[int, float | None],
    drawn: Sequence[float | None],
    *,
    prompts: int | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """The mean over seeds, its 95 % interval, and the single values.

    The interval joins two independent sources of error in quadrature: which prompts were asked
    (the resampled means, or Wilson's interval of a share) and which seeds were trained with
    (Student's t; nothing with one seed, where the spread is unknown).

    Args:
        values: by seed; ``None`` where there is none.
        drawn: means over seeds on resampled prompts.
        prompts: number of prompts, if the values are shares of them.
        bounds: what the values lie between; the interval is cut there.

    Returns:
        ``value``, ``low``, ``high`` and ``seeds``; the first three ``None`` where unknown.
    """
    seeds = {str(seed): _finite(value) for seed, value in values.items()}
    known = [value for value in seeds.values() if value is not None]
    if not known:
        return {"value": None, "low": None, "high": None, "seeds": seeds}
    value = sum(known) / len(known)
    low, high = _prompt_bounds(value, drawn, prompts)
    spread = _seed_half_width(known)
    if low is not None and high is not None:
        low, high = (
            value - math.hypot(value - low, spread),
            value + math.hypot(high - value, spread),
        )
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return {"value": value, "low": low, "high": high, "seeds": seeds}


def _prompt_bounds(
    value: float, drawn: Sequence[float | None], prompts: int | None
) -> tuple[float | None, float | None]:
    if prompts is not None:
        found = share(round(value * prompts), prompts)
        # The mean over seeds lies between two counts: the interval moves with it.
        shift = value - found.value
        return min(value, found.low + shift), max(value, found.high + shift)
    usable = [x for x in drawn if x is not None and math.isfinite(x)]
    if not drawn or len(usable) < 0.95 * len(drawn):
        return None, None  # so often undefined that an interval would speak of the rest only
    low, high = np.percentile(usable, [2.5, 97.5])
    return min(value, float(low)), max(value, float(high))


def _seed_half_width(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return 0.0
    t = _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)
    return float(t * np.std(values, ddof=1) / math.sqrt(n))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
