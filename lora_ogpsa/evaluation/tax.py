"""The alignment tax that a run paid, compared with another at the same safety."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One checkpoint of a run.

    Attributes:
        step: optimizer steps taken; 0 is the base model.
        safety: share of harmful prompts refused, or another measure of which more is better.
        metrics: what the tax is counted in, by name; of each, less is better.
    """

    step: float
    safety: float
    metrics: Mapping[str, float]


def matched_point(run: Iterable[Point], target: float) -> Point | None:
    """Where a run first becomes as safe as `target`, interpolated between its checkpoints.

    Training may stop there, and so may that of any run it is compared with. The first such point
    among noisy measurements is a little optimistic, for every run alike.

    Args:
        run: the run's checkpoints, its base model among them.
        target: the safety to match.

    Returns:
        The point, its step and metrics interpolated linearly; ``None`` if the run never gets there.
    """
    before: Point | None = None
    for point in sorted(run, key=lambda p: p.step):
        if point.safety >= target:
            if before is None:
                return point
            share = (target - before.safety) / (point.safety - before.safety)
            return Point(
                before.step + share * (point.step - before.step),
                target,
                {
                    name: before.metrics[name] + share * (value - before.metrics[name])
                    for name, value in point.metrics.items()
                },
            )
        before = point
    return None


def tax_removed(base: float, plain: float, own: float) -> float | None:
    r"""Share of plain training's tax that a run did not pay.

    .. math:: 1 - (own - base) / (plain - base)

    with an `own` below `base` counted as `base`: a model better than the base has had all of the
    tax removed, not more. Negative where the run paid more than plain training.

    Returns:
        The share; ``None`` if plain training paid no tax, so that none could be removed.
    """
    tax = plain - base
    return 1.0 - max(own - base, 0.0) / tax if tax > 0 else None


def taxes_removed(
    base: Mapping[str, float], plain: Mapping[str, float], own: Mapping[str, float]
) -> dict[str, float | None]:
    """:func:`tax_removed` of every metric that `own` has."""
    return {name: tax_removed(base[name], plain[name], value) for name, value in own.items()}


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not ``None``; ``None`` if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
