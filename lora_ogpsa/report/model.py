"""What a report shows, whatever it was read from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_ogpsa.compare_table import Section
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.training_record import Energy

#: How a verdict is coloured: OGPSA helped, helped at a cost, cannot be told, did not help.
Tone = Literal["good", "mixed", "open", "bad"]


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval; ``None`` where it is unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PathPoint:
    """A model on the way: the base at step 0, a checkpoint, or the trained model.

    Attributes:
        step: optimizer steps taken, over all stages.
        values: what was measured, by name.
    """

    step: int
    values: dict[str, Value]


@dataclass(frozen=True)
class StageRecord:
    """What the training of one stage left.

    Attributes:
        name: of the stage.
        before: optimizer steps of the stages before it.
        record: ``training.json``.
        settings: of OGPSA; ``None`` where it was off.
        energy: removed energy by step and layer.
    """

    name: str
    before: int
    record: dict[str, Any]
    settings: dict[str, Any] | None
    energy: Energy

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a number in the Trainer's log."""
        rows = [row for row in self.record.get("log", []) if key in row and "step" in row]
        return [self.before + row["step"] for row in rows], [float(row[key]) for row in rows]


@dataclass
class Arm:
    """One way of training, as a line in the pictures and a column in the tables.

    Attributes:
        title: what it is called.
        plain: whether nothing protected it.
        path: its models in order, the base first; empty if nothing was evaluated.
        final: the evaluation of the trained model.
        stages: records of its training; of the first seed, if there are several.
        times: seconds by what they went into, the mean over the seeds.
    """

    title: str
    plain: bool
    path: list[PathPoint] = field(default_factory=list)
    final: EvaluationResult | None = None
    stages: list[StageRecord] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def budgets(self) -> set[float]:
        """Nats per token that a reference may lose, where that is what the rule holds."""
        settings = [stage.settings for stage in self.stages if stage.settings]
        return {s["budget"] for s in settings if s.get("constraint") == "budget"}

    def log_names(self, prefix: str) -> list[str]:
        """Names in the log that begin with `prefix`."""
        rows = [row for stage in self.stages for row in stage.record.get("log", [])]
        return list(dict.fromkeys(k for row in rows for k in row if k.startswith(prefix)))

    def series(self, key: str) -> Iterator[tuple[list[int], list[float]]]:
        """(steps, values) of a number in the Trainer's log, stage by stage."""
        for stage in self.stages:
            steps, values = stage.series(key)
            if steps:
                yield steps, values


@dataclass(frozen=True)
class Verdict:
    """What came of it, in a sentence, and what it cost, in another."""

    tone: Tone
    sentence: str
    cost: str = ""


@dataclass
class Report:
    """Everything on the page.

    Attributes:
        title: heading.
        about: what was trained on what, in a line.
        verdict: see `Verdict`.
        arms: plain training first, the recipe's own last.
        base: evaluation of the base model.
        safety: the measure of safety; ``None`` if there is none.
        taxes: the measures in which a tax may be paid.
        target: safety at which runs are matched.
        headings: of the table of results.
        sections: its rows.
        caption: what its numbers are.
        seeds: headings and rows of the single seeds.
        differences: by title, rows of paired differences (measure, difference, interval).
        notes: what a reader should know besides.
        recipe: as YAML.
        versions: of the libraries.
    """

    title: str
    about: str
    verdict: Verdict
    arms: list[Arm]
    base: EvaluationResult | None
    safety: str | None
    taxes: list[str]
    units: dict[str, str]
    target: float | None = None
    headings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    caption: str = ""
    seeds: tuple[list[str], list[list[str]]] = field(default_factory=lambda: ([], []))
    differences: dict[str, list[list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recipe: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def protected(self) -> Arm | None:
        """The arm whose training is shown in detail: the first one that OGPSA protected."""
        return next((arm for arm in self.arms if not arm.plain and arm.stages), None)


def headline(names: list[str]) -> list[str]:
    """The measures that stand for the others: no groups of prompts, no first tokens."""
    return [n for n in names if n.count(".") < 2 and not n.endswith(("kl_first6", ".exact"))]
