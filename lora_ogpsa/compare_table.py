"""The table of a comparison: one for the terminal, Markdown and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lora_ogpsa.compare_settings import PLAIN
from lora_ogpsa.results import markdown_table, measure_title

NO_TAX = "no clear tax"


@dataclass(frozen=True)
class Section:
    """Rows of a table that belong together.

    Attributes:
        title: heading.
        rows: cells, the first one naming the row.
    """

    title: str
    rows: list[list[str]]


def columns(content: Mapping[str, Any]) -> list[str]:
    """Headings of the table of a comparison."""
    return ["measure", "base", *content["rules"]]


def sections(content: Mapping[str, Any]) -> list[Section]:
    """Everything that the table of a comparison shows.

    Args:
        content: of ``compare.json``.
    """
    rules, taxes = content["rules"], content["taxes"]
    if not rules:
        return []
    base, safety = content["base"], content["safety"]
    order = [safety, *(n for n in content["measures"] if n != safety)]
    end = [
        [measure_title(n), *(_cell(content, n, x) for x in (base[n], *_each(rules, "end", n)))]
        for n in order
    ]
    found = [Section("at the end of training", end)]
    target = matched_target(content)
    if target is not None:
        matched = [["optimizer steps", "0", *(_steps(rule["matched"]) for rule in rules.values())]]
        for n in taxes:
            cells = (_cell(content, n, rule["matched"]["measures"][n]) for rule in rules.values())
            matched.append([measure_title(n), "", *cells])
        found.append(Section(f"when first {target}", matched))
    if PLAIN not in rules or len(rules) == 1:
        return found  # nothing there yet that could have removed a tax, or paid one
    for place, when in (("matched", "at matched safety"), ("end", "at the end of training")):
        if place == "matched" and target is None:
            continue
        rows = []
        for n in taxes:
            cells = (
                "" if r == PLAIN else _removed(rules[r]["tax_removed"][place][n]) for r in rules
            )
            rows.append([measure_title(n, arrow=False), "", *cells])
        found.append(Section(f"tax removed, {when}", rows))
    return found


def matched_target(content: Mapping[str, Any]) -> str | None:
    """What the runs are matched at, in words; ``None`` if plain training has not set it.

    It is not there yet, or made the model no safer.
    """
    plain = content["rules"].get(PLAIN)
    if plain is None or not plain["matched"]["reached"]:
        return None
    target = content["plain_safety"] - content["safety_margin"]
    name = content["safety"]
    share = content["measures"][name]["unit"] == "share"
    value = f"{100 * target:.0f} %" if share else f"{target:.3f}"
    return f"{measure_title(name, arrow=False)} at {value}"


def seed_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """The values of the single seeds behind the means: at the end, and the tax removed."""
    rules = content["rules"]
    rows = []
    for name in (content["safety"], *content["taxes"]):
        cells = [_seeds(content, name, rule["end"][name]) for rule in rules.values()]
        rows.append([f"{measure_title(name)}, at the end", *cells])
    for name in content["taxes"]:
        cells = [
            "" if rule == PLAIN else _seeds(content, None, found["tax_removed"]["matched"][name])
            for rule, found in rules.items()
        ]
        title = measure_title(name, arrow=False)
        rows.append([f"{title}: tax removed, at matched safety", *cells])
    return rows


def compare_table(content: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(title=caption(content), title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(columns(content)):
        table.add_column(heading, justify="right" if number else "left")
    for section in sections(content):
        table.add_section()
        table.add_row(escape(section.title), style="bold")
        for row in section.rows:
            # Brackets of a measure's name are no styles.
            table.add_row(*map(escape, (f"  {row[0]}", *row[1:])))
    return table


def compare_markdown(content: Mapping[str, Any]) -> str:
    """The table in Markdown, with the values of the single seeds."""
    state = "" if content["finished"] else " (so far)"
    lines = [f"# Comparison of {content['recipe_file']}{state}", "", caption(content), ""]
    lines += markdown_table(
        columns(content),
        [row for section in sections(content) for row in [[f"**{section.title}**"], *section.rows]],
    )
    if len(content["seeds"]) > 1:
        lines += ["", f"## Single seeds: {' / '.join(map(str, content['seeds']))}", ""]
        lines += markdown_table(["measure", *content["rules"]], seed_rows(content))
    return "\n".join(lines) + "\n"


def caption(content: Mapping[str, Any]) -> str:
    """What the numbers are."""
    count = len(content["seeds"])
    seeds = "one seed" if count == 1 else f"means of {count} seeds"
    spread = "" if count == 1 else " and of seeds"
    return f"{seeds.capitalize()}; in brackets 95 % intervals over the choice of prompts{spread}"


def _each(rules: Mapping[str, Any], place: str, name: str) -> list[Mapping[str, Any]]:
    return [rule[place][name] for rule in rules.values()]


def _cell(content: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "not reached"
    scale, digits, unit = _format(content["measures"][name]["unit"])
    value = f"{scale * found['value']:.{digits}f}{unit}"
    if found["low"] is None or found["low"] == found["high"]:
        return value
    return f"{value} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"


def _removed(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "not reached" if found["clear"] else NO_TAX
    if not found["clear"]:
        return NO_TAX
    value = f"{100 * found['value']:.0f} %"
    if found["low"] is None:
        return value
    return f"{value} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _steps(matched: Mapping[str, Any]) -> str:
    value, seeds = matched["step"]["value"], matched["step"]["seeds"]
    if value is None:
        return "not reached"
    missing = len(seeds) - len(matched["reached"])
    return f"{value:.0f}" + (f" ({missing} of {len(seeds)} seeds never)" if missing else "")


def _seeds(content: Mapping[str, Any], name: str | None, found: Mapping[str, Any]) -> str:
    unit = content["measures"][name]["unit"] if name is not None else "share"
    scale, digits, sign = _format(unit)
    values = found["seeds"].values()
    cells = ["-" if v is None else f"{scale * v:.{digits}f}" for v in values]
    return " / ".join(cells) + sign


def _format(unit: str) -> tuple[float, int, str]:
    return (100.0, 0, " %") if unit == "share" else (1.0, 3, "")
