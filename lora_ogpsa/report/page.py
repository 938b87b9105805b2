"""The report as one HTML page that loads nothing."""

from __future__ import annotations

import re
from typing import Any

from lora_ogpsa.report.model import Report
from lora_ogpsa.report.parts import Parts
from lora_ogpsa.report.style import STYLE

# Everything is escaped unless marked safe, since the models' answers may hold anything.
_TEMPLATE = """\
{%- macro table(headings, rows) -%}
<div class="scroll" role="region" aria-label="table" tabindex="0"><table>
<thead><tr>{% for h in headings %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows -%}
{% if row|length == 1 -%}
<tr class="section"><th scope="rowgroup" colspan="{{ headings|length }}">{{ row[0] }}</th></tr>
{% else -%}
<tr><th scope="row"{% if row[0].startswith("  ") %} class="part"{% endif %}>
{{- row[0].strip() }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endif -%}
{% endfor -%}
</tbody></table></div>
{%- endmacro -%}
{%- macro pictures(found) -%}
<div class="pictures">
{% for p in found -%}
<figure><h3>{{ p.title }}</h3>
<div role="img" aria-label="{{ p.alt }}">{{ p.svg|svg }}</div></figure>
{% endfor -%}
</div>
{%- endmacro -%}
{%- macro exchanges(group) -%}
{% for e in group.exchanges -%}
<article><h4>{{ e.prompt }}</h4><div class="answers">
{% for a in e.answers -%}
<div class="answer"><p class="who">{{ a.model }}
{%- if a.verdict %} <span class="badge {{ a.verdict }}">{{ a.verdict }}</span>{% endif %}</p>
<p class="said">{{ a.text }}</p></div>
{% endfor -%}
</div></article>
{% endfor -%}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ report.title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
<p class="about">{{ report.about }}</p>
<div class="verdict {{ report.verdict.tone }}">
<p>{{ report.verdict.sentence|code }}</p>
{% if report.verdict.cost %}<p class="cost">{{ report.verdict.cost|code }}</p>{% endif %}
</div>
</header>

<section><h2>The trade-off</h2>
{% if parts.tradeoff -%}
<p>Each line is one way of training, from the base model (star) to its end (large mark, with
95&nbsp;% intervals). Better is up and to the left: safer, at a lower price.</p>
{{ pictures(parts.tradeoff) }}
{% else %}<p>{{ parts.missing.tradeoff }}</p>{% endif %}
{% if rows -%}
<h3>All measures</h3>
{{ table(report.headings, rows) }}
<p class="caption">{{ report.caption }} ↑ should rise, ↓ should not.</p>
{% endif -%}
{% for title, found in report.differences.items() -%}
<h3>{{ title }}</h3>
{{ table(["measure", "difference", "95 % interval"], found) }}
{% endfor -%}
{% if report.seeds[1] -%}
<h3>Single seeds</h3>
{{ table(report.seeds[0], report.seeds[1]) }}
{% endif -%}
</section>

<section><h2>Answers before and after</h2>
{% if parts.answers -%}
<p>The first prompts of each kind, unselected. What an answer was counted as stands beside it; the
judge errs, so read them.</p>
{% for group in parts.answers -%}
{% if group.harmful -%}
<h3>{{ group.title }}</h3>
<details><summary>Harmful prompts and answers: {{ group.exchanges|length }} of {{ group.total }}
(folded away; select to see)</summary>
{{ exchanges(group) }}
</details>
{% else -%}
<h3>{{ group.title }}, {{ group.exchanges|length }} of {{ group.total }}</h3>
{{ exchanges(group) }}
{% endif -%}
{% endfor -%}
{% else %}<p>{{ parts.missing.answers }}</p>{% endif %}
</section>

<section><h2>What OGPSA did on the way</h2>
{% if parts.training -%}
<p>{{ detail }}</p>
{{ pictures(parts.training) }}
{% else %}<p>{{ parts.missing.training }}</p>{% endif %}
</section>

<section><h2>Time and memory</h2>
{% if parts.costs[1] -%}
{{ table(parts.costs[0], parts.costs[1]) }}
{% else %}<p>{{ parts.missing.costs }}</p>{% endif %}
</section>

{% if report.notes -%}
<section><h2>Notes</h2>
<ul>{% for note in report.notes %}<li>{{ note|code }}</li>{% endfor %}</ul>
</section>
{% endif -%}

<section><h2>Recipe and versions</h2>
<details><summary>The recipe</summary><pre tabindex="0">{{ report.recipe }}</pre></details>
<p class="caption">
{%- for name, version in report.versions.items() %}{{ name }} {{ version }}
{%- if not loop.last %}, {% endif %}{% endfor %}</p>
</section>
</main>
</body>
</html>
"""


def to_html(report: Report, parts: Parts) -> str:
    """The whole report as a page."""
    from jinja2 import Environment
    from markupsafe import Markup, escape

    environment = Environment(autoescape=True)
    environment.filters["code"] = lambda text: Markup(_with_code(str(escape(text))))
    # Drawn here from numbers; names in it were escaped when it was drawn.
    environment.filters["svg"] = Markup
    rows = [
        row
        for section in report.sections
        for row in ([[section.title]] if section.title else []) + section.rows
    ]
    values: dict[str, Any] = {"style": STYLE, "rows": rows, "detail": _detail(report)}
    return environment.from_string(_TEMPLATE).render(report=report, parts=parts, **values)


def _with_code(text: str) -> str:
    """Escaped text with its `code` set as such, and no line that begins with a per cent sign."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text).replace(" %", "\N{NO-BREAK SPACE}%")


def _detail(report: Report) -> str:
    """What the pictures of the training say, for readers who see such ones for the first time."""
    title = report.protected.title if report.protected is not None else ""
    return (
        f"Of the training called {title}. Removed energy: how much of each step "
        "the projection changed, and in which layers. Reference losses: how far what must not "
        "get worse is above the base model (0). Captured energy: how much of each fresh "
        "reference gradient was known already; near 1 the protection knows what to protect."
    )
