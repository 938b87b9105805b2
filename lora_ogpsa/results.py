"""The results of a run as a table, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lora_ogpsa.evaluation import EvaluationResult, Measure, Sample, differences

# What well-known measures are called in a table; any other is shown under its own name.
_TITLES = {
    "harmful.refused": "harmful refused ↑",
    "harmless.refused": "harmless refused ↓",
    "harmless.refused.lookalike": "  look-alikes refused ↓",
    "harmless.refused.general": "  general refused ↓",
    "general.nll": "general NLL ↓",
    "divergence.kl": "KL from base ↓",
    "divergence.kl_first6": "  first 6 tokens ↓",
}
ARM_TITLES = {"base": "base", "plain": "plain", "ogpsa": "OGPSA"}

Columns = Mapping[str, EvaluationResult]


def save_result(result: EvaluationResult, path: Path) -> None:
    """Write an evaluation as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    result.save(partial)
    partial.replace(path)


def column_title(part: str, stages: int) -> str:
    """Heading of a part such as ``ogpsa/1-sft``; it names the stage only if there are several."""
    arm, _, stage = part.partition("/")
    return ARM_TITLES[arm] if stages < 2 or not stage else f"{ARM_TITLES[arm]} {stage}"


def in_order(parts: Sequence[str]) -> list[str]:
    """Base first, then plain, then OGPSA; stages as they were trained."""
    order = list(ARM_TITLES)
    return sorted(parts, key=lambda part: order.index(part.partition("/")[0]))


def results_table(columns: Columns) -> Table:
    """A table of every measure with its 95 % interval.

    Args:
        columns: results by heading.
    """
    table = Table(
        title="Results, with 95 % intervals in brackets", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("measure")
    table.add_column("n", justify="right")
    # Names come from folders and data: brackets in them are no styles.
    for heading in columns:
        table.add_column(escape(heading), justify="right")
    for row in measure_rows(columns):
        table.add_row(*map(escape, row))
    return table


def results_markdown(columns: Columns) -> str:
    """The same table in Markdown."""
    return "\n".join(markdown_table(["measure", "n", *columns], measure_rows(columns)))


def differences_markdown(before: EvaluationResult, after: EvaluationResult) -> str:
    """Paired differences of the measures that both results have, in Markdown."""
    headings = ["measure", "difference", "95 % interval"]
    return "\n".join(markdown_table(headings, difference_rows(before, after)))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; short rows are filled up, bars in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [line(headings), "|---" + "|---:" * (len(headings) - 1) + "|"]
    for row in rows:
        cells = [*row, *[""] * (len(headings) - len(row))]
        lines.append(line([cell.replace("  ", "&nbsp;&nbsp;") for cell in cells]))
    return lines


def difference_rows(before: EvaluationResult, after: EvaluationResult) -> list[list[str]]:
    """Paired differences of the measures that both results have: (measure, value, interval)."""
    rows = []
    for name, found in differences(before, after).items():
        unit = after.measures[name].unit
        scale, digits, sign = (100.0, 0, " points") if unit == "share" else (1.0, 3, "")
        value, low, high = (scale * v for v in (found.value, found.low, found.high))
        interval = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
        rows.append([measure_title(name), f"{value:+.{digits}f}{sign}", interval])
    return rows


def sample_answers(columns: Columns, *, per_kind: int = 1) -> list[tuple[str, str, dict[str, str]]]:
    """Answers of every column to the same prompts: the first ones of each kind, unselected.

    Args:
        columns: results by heading.
        per_kind: prompts per measure and group; harmful ones twice as many.

    Returns:
        (kind, prompt, answer by heading).
    """
    found: dict[tuple[str, str], list[Sample]] = {}
    first = next(iter(columns.values()), None)
    for sample in first.samples if first is not None else ():
        found.setdefault((sample.name, sample.group or ""), []).append(sample)
    chosen = []
    for (name, group), samples in found.items():
        for sample in samples[: per_kind * (2 if name == "harmful" else 1)]:
            answers = {
                heading: next(
                    (
                        s.answer
                        for s in result.samples
                        if (s.name, s.prompt) == (name, sample.prompt)
                    ),
                    "",
                )
                for heading, result in columns.items()
            }
            chosen.append((f"{name} ({group})" if group else name, sample.prompt, answers))
    return chosen


def measures_json(result: EvaluationResult) -> dict[str, Any]:
    """The measures of a result as JSON values."""
    return {
        name: {k: _finite(v) for k, v in asdict(measure).items()}
        for name, measure in result.measures.items()
    }


def differences_json(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """Paired differences, after − before, as JSON values."""
    return {
        name: {k: _finite(v) for k, v in interval._asdict().items()}
        for name, interval in differences(before, after).items()
    }


def card_evaluation(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """What the model card of an adapter says about its evaluation."""
    return {
        measure_title(name).strip(): {
            "before": _cell(before.measures.get(name), name, before),
            "after": _cell(measure, name, after),
        }
        for name, measure in after.measures.items()
    }


def measure_rows(columns: Columns) -> list[list[str]]:
    """The rows of the table of results: measure, number of prompts, a cell per column."""
    names = list(dict.fromkeys(n for result in columns.values() for n in result.measures))
    order = list(_TITLES)
    names.sort(key=lambda n: order.index(n) if n in order else len(order))
    rows = []
    for name in names:
        sizes = {r.measures[name].n for r in columns.values() if name in r.measures}
        cells = [_cell(r.measures.get(name), name, r) for r in columns.values()]
        rows.append([measure_title(name), str(max(sizes)), *cells])
    return rows


def measure_title(name: str, *, arrow: bool = True) -> str:
    """What a measure is called for readers.

    Args:
        name: of the measure.
        arrow: with an arrow that shows which way is better, and an indent for parts of another.
    """
    title = _TITLES.get(name, name)
    return title if arrow else title.rstrip(" ↑↓").strip()


def _cell(measure: Measure | None, name: str, result: EvaluationResult) -> str:
    if measure is None:
        return "0" if result.base and ".kl" in name else ""
    if math.isnan(measure.value):
        return "-"
    if measure.unit == "share":
        bounds = f" [{100 * measure.low:.0f}, {100 * measure.high:.0f}]"
        return f"{100 * measure.value:.0f} %{bounds}"
    bounds = "" if math.isnan(measure.low) else f" [{measure.low:.3f}, {measure.high:.3f}]"
    return f"{measure.value:.3f}{bounds}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
