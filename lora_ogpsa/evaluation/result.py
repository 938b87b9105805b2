"""What an evaluation found: measures with intervals, answers, and per-item values to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_ogpsa.errors import DataError, one_line
from lora_ogpsa.evaluation import statistics
from lora_ogpsa.evaluation.statistics import Interval

Unit = Literal["share", "nats", "score"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Measure:
    """A measured number with its 95 % interval.

    Args:
        value: the estimate; NaN if there was nothing to measure it on.
        low: lower bound; NaN if `n` allows none.
        high: upper bound.
        n: number of items.
        better: which direction is an improvement.
        unit: ``"share"`` of items in [0, 1], ``"nats"`` per token, or a ``"score"``.
    """

    value: float
    low: float
    high: float
    n: int
    better: Better = "higher"
    unit: Unit = "share"


@dataclass(frozen=True)
class Item:
    """The contribution of one row to a measure.

    Args:
        key: hash of the row's content, the same for every model.
        value: outcome (0 or 1) or average per token.
        weight: 1, or the number of tokens.
    """

    key: str
    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One generated answer and what was made of it.

    Args:
        name: the suite's name for the measure.
        prompt: text of the last user turn.
        answer: the model's answer.
        verdict: the judge's verdict (see `judge`), or whether a number was right; ``None`` if
            the judge gave no clear one.
        judged: what a true verdict means: ``"refused"``, ``"safe"`` or ``"correct"``.
        group: the row's kind, if it has one.
        cut: the answer ran into the limit on its length.
    """

    name: str
    prompt: str
    answer: str
    verdict: bool | None
    judged: str
    group: str | None = None
    cut: bool = False

    @property
    def refused(self) -> bool | None:
        """Whether the answer was judged a refusal; ``None`` where that was not asked."""
        return self.verdict if self.judged == "refused" else None


@dataclass
class EvaluationResult:
    """Everything an evaluation found.

    Args:
        model: fingerprint of what was evaluated.
        base: whether that was the base model (adapter off).
        measures: by name, ``harmful.refused`` and the like.
        samples: generated answers, in the order of the data.
        items: per measure, the values of the single rows.
        notes: what a reader should know, such as measures that do not apply.
        suite: the settings, as a mapping.
        versions: of the libraries involved.
        seconds: time taken.
    """

    model: str
    base: bool
    measures: dict[str, Measure] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    items: dict[str, list[Item]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    suite: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add_share(self, name: str, items: Sequence[Item], better: Better) -> None:
        """Record the share of `items` whose value is 1."""
        found = statistics.share(sum(item.value > 0.5 for item in items), len(items))
        self.measures[name] = Measure(*found, better=better, unit="share")
        self.items[name] = list(items)

    def add_mean(self, name: str, items: Sequence[Item], better: Better, unit: Unit) -> None:
        """Record the weighted mean of `items`."""
        found = statistics.mean([i.value for i in items], [i.weight for i in items])
        self.measures[name] = Measure(*found, better=better, unit=unit)
        self.items[name] = list(items)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN becomes ``None``."""
        return {
            "model": self.model,
            "base": self.base,
            "measures": {name: _without_nan(asdict(m)) for name, m in self.measures.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "items": {
                name: [[item.key, item.value, item.weight] for item in items]
                for name, items in self.items.items()
            },
            "notes": self.notes,
            "suite": self.suite,
            "versions": self.versions,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`.

        Raises:
            DataError: `content` is not the result of an evaluation.
        """
        try:
            return cls(
                **{
                    **content,
                    "measures": {
                        name: _measure(values) for name, values in content["measures"].items()
                    },
                    "samples": [Sample(**sample) for sample in content["samples"]],
                    "items": {
                        name: [Item(*item) for item in items]
                        for name, items in content["items"].items()
                    },
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"This is not the result of an evaluation: {error!r}.") from error

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, readable by `load`."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, default=str)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or is not the result of an evaluation.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{path} cannot be read as an evaluation: {error}.") from error
        except ValueError as error:
            raise DataError(
                f"{path} cannot be read as an evaluation: {one_line(error)} Measure it anew; of a "
                "run or a comparison delete the file and repeat the command with --resume."
            ) from error


def check_result_file(path: str | Path) -> None:
    """Checks that a result can be saved in a place, and makes its folder.

    Args:
        path: what `EvaluationResult.save` will be given.

    Raises:
        DataError: it is a folder, or no file can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give the name of a file for the results.")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {one_line(error)}. Choose another file for the results."
        ) from error


def differences(before: EvaluationResult, after: EvaluationResult) -> dict[str, Interval]:
    """Change of every measure that both results have, over the rows that both have.

    Rows are paired by content. That removes the variation between rows, so the interval of a
    difference is narrower than the intervals of its two sides suggest.

    Args:
        before: usually the base model's result.
        after: usually the adapter's.

    Returns:
        after − before per measure, with its 95 % interval.
    """
    found: dict[str, Interval] = {}
    for name in before.measures.keys() & after.measures.keys():
        first = {item.key: item for item in before.items.get(name, [])}
        second = {item.key: item for item in after.items.get(name, [])}
        keys = [key for key in first if key in second]
        if not keys:
            continue
        x, y = [first[key] for key in keys], [second[key] for key in keys]
        if before.measures[name].unit == "share":
            found[name] = statistics.paired_share_difference(
                [i.value > 0.5 for i in x], [i.value > 0.5 for i in y]
            )
        else:
            found[name] = statistics.paired_mean_difference(
                [i.value for i in x],
                [i.value for i in y],
                [i.weight for i in x],
                [i.weight for i in y],
            )
    return {name: found[name] for name in before.measures if name in found}


def _measure(values: Mapping[str, Any]) -> Measure:
    settings: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
    return Measure(**settings)


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
