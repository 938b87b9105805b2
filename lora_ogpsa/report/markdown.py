"""The report as Markdown, with its pictures as files beside it."""

from __future__ import annotations

import html
import re

from lora_ogpsa.report.drawing import Picture
from lora_ogpsa.report.model import Report
from lora_ogpsa.report.parts import Parts
from lora_ogpsa.results import markdown_table


def to_markdown(report: Report, parts: Parts) -> str:
    """The whole report; texts of models and data sets cannot format anything in it."""
    verdict = report.verdict
    lines = [f"# {plain(report.title)}", "", f"**{verdict.sentence}**", ""]
    lines += [verdict.cost, ""] if verdict.cost else []
    lines += [plain(report.about), "", "## The trade-off", ""]
    lines += _pictures(parts.tradeoff) or [parts.missing["tradeoff"], ""]
    if report.sections:
        rows: list[list[str]] = []
        for section in report.sections:
            rows += [[f"**{section.title}**"]] if section.title else []
            rows += section.rows
        lines += [*markdown_table(report.headings, rows), "", report.caption, ""]
    for title, found in report.differences.items():
        lines += [f"### {title}", ""]
        lines += [*markdown_table(["measure", "difference", "95 % interval"], found), ""]
    if report.seeds[1]:
        lines += ["### Single seeds", "", *markdown_table(*report.seeds), ""]
    lines += ["## Answers before and after", ""]
    lines += _answers(parts) or [parts.missing["answers"], ""]
    lines += ["## What OGPSA did on the way", ""]
    lines += _pictures(parts.training) or [parts.missing["training"], ""]
    lines += ["## Time and memory", ""]
    lines += [*markdown_table(*parts.costs), ""] if parts.costs[1] else [parts.missing["costs"], ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {plain(note)}" for note in report.notes), ""]
    lines += ["## Recipe and versions", "", "```yaml", report.recipe.strip(), "```", ""]
    lines += [", ".join(f"{name} {version}" for name, version in report.versions.items())]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Untrusted text in one line, so that it neither formats nor loads anything."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]!|#~])", r"\\\1", line)


def _pictures(pictures: list[Picture]) -> list[str]:
    lines = []
    for picture in pictures:
        lines += [f"### {plain(picture.title)}", ""]
        lines += [f"![{plain(picture.alt)}](figures/{picture.name}.png)", ""]
    return lines


def _answers(parts: Parts) -> list[str]:
    lines = []
    for group in parts.answers:
        title = f"{plain(group.title)}, {len(group.exchanges)} of {group.total} prompts, unselected"
        lines += (
            [f"<details><summary>{title} (harmful; click to see)</summary>", ""]
            if group.harmful
            else [f"### {title}", ""]
        )
        for exchange in group.exchanges:
            lines += [f"**{plain(exchange.prompt)}**", ""]
            for answer in exchange.answers:
                verdict = f" ({answer.verdict})" if answer.verdict else ""
                lines.append(f"- {plain(answer.model)}{verdict}: {plain(answer.text)}")
            lines.append("")
        lines += ["</details>", ""] if group.harmful else []
    return lines
