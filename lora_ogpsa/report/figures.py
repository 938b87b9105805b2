"""The pictures of a report, each as SVG for the page and as PNG for the Markdown file."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from lora_ogpsa.report.drawing import Picture, picture
from lora_ogpsa.report.model import Arm, PathPoint, Report, headline
from lora_ogpsa.results import measure_title

# Okabe and Ito's colours, the blue lightened, that stand out from white and from black, for the
# colour-blind too.
_COLOURS = ("#d55e00", "#1f83c4", "#009e73", "#cc79a7", "#b08a00", "#56b4e9")
_MARKERS = "osD^vP"
_BASE = "#8a8a8a"
_MOST_COLUMNS = 160


def tradeoff_pictures(report: Report) -> list[Picture]:
    """Safety against each headline tax: every arm's path from the base model to its end."""
    if report.safety is None or not any(arm.path for arm in report.arms):
        return []
    pictures = []
    for name in headline(report.taxes):
        title = f"{measure_title(report.safety, arrow=False)} against {_axis(name)}"
        title = title[0].upper() + title[1:]
        ends = "; ".join(
            f"{arm.title} ends at {_said(report, report.safety, arm.path[-1])} and "
            f"{_said(report, name, arm.path[-1])}"
            for arm in report.arms
            if arm.path
        )
        alt = f"{title}. Better is up and to the left. {ends}."
        draw = partial(_paths, report=report, name=name)
        pictures.append(picture(f"tradeoff-{_slug(name)}", title, alt, draw))
    return pictures


def energy_picture(arm: Arm) -> Picture | None:
    """Removed energy by layer and step."""
    records = [(stage.before, stage.energy) for stage in arm.stages if stage.energy.steps]
    if not records:
        return None
    import numpy as np

    steps = [before + s for before, energy in records for s in energy.steps]
    shares = np.array([row for _, energy in records for row in energy.removed])
    layers = records[0][1].layers
    grid, edges = _binned(shares, steps)
    top = float(grid.mean(0).max())
    strongest = layers[int(grid.mean(1).argmax())]

    def draw(ax: Any) -> None:
        y = np.arange(len(layers) + 1) - 0.5
        mesh = ax.pcolormesh(
            edges,
            y,
            np.minimum(grid, 1.0),
            cmap="viridis",
            vmin=0,
            vmax=min(1.0, grid.max() or 1),
            rasterized=True,
        )
        bar = ax.figure.colorbar(mesh, ax=ax)
        bar.set_label("share of the step's energy changed")
        bar.outline.set_visible(False)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("transformer layer")
        every = max(1, round(len(layers) / 10))
        ax.set_yticks(range(0, len(layers), every), layers[::every])
        for before, _ in records[1:]:
            ax.axvline(before + 0.5, color="white", linewidth=1, linestyle=":")

    alt = (
        f"Heatmap of the share of each step's energy that the projection changed, {len(layers)} "
        f"layers by {len(steps)} steps. Most in layer {strongest}; up to {100 * top:.0f} % of a "
        "step on the average over layers."
    )
    return picture("removed-energy", "Removed energy by layer and step", alt, draw)


def loss_picture(arm: Arm) -> Picture | None:
    """How far the reference losses are above the base model's."""
    names = arm.log_names("ogpsa/excess/")
    if not names:
        return None

    def draw(ax: Any) -> None:
        for i, name in enumerate(names):
            label = name.rpartition("/")[2]
            for part, (steps, values) in enumerate(arm.series(name)):
                style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "markersize": 3}
                ax.plot(
                    steps,
                    values,
                    marker=_MARKERS[i % len(_MARKERS)],
                    label=None if part else label,
                    **style,
                )
        for budget in sorted(arm.budgets):
            ax.axhline(budget, color=_BASE, linewidth=1, linestyle="--")
            ax.annotate(
                f"budget {budget:g}",
                (0.02, budget),
                xycoords=("axes fraction", "data"),
                ha="left",
                va="bottom",
                fontsize=8,
            )
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("nats per token above the base")
        ax.legend()

    last = ", ".join(
        f"{name.rpartition('/')[2]} {series[-1][1][-1]:+.3f}"
        for name in names
        if (series := list(arm.series(name)))
    )
    alt = f"Reference losses above the base model's, over the training. At the end: {last}."
    return picture("reference-losses", "Reference losses", alt, draw)


def captured_picture(arm: Arm) -> Picture | None:
    """How much of a fresh reference gradient was known before."""
    series = list(arm.series("ogpsa/captured_energy"))
    if not series:
        return None

    def draw(ax: Any) -> None:
        for steps, values in series:
            ax.plot(steps, values, color=_COLOURS[1], marker="o", markersize=3)
        ax.set_ylim(0, 1)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("share of energy captured")

    values = [value for _, part in series for value in part]
    alt = (
        f"Share of a fresh reference gradient's energy that the kept gradients held already: "
        f"{100 * values[0]:.0f} % at first, {100 * values[-1]:.0f} % at the end."
    )
    return picture("captured-energy", "Captured energy", alt, draw)


# ---------------------------------------------------------------------------------------- drawing


def _paths(ax: Any, report: Report, name: str) -> None:
    assert report.safety is not None
    xs, ys = _scale(report, name), _scale(report, report.safety)
    drawn = [arm for arm in report.arms if arm.path]
    for i, arm in enumerate(drawn):
        known = [
            (point.values[name], point.values[report.safety])
            for point in arm.path
            if None not in (point.values[name].value, point.values[report.safety].value)
        ]
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        x = [xs * (tax.value or 0.0) for tax, _ in known]
        y = [ys * (safe.value or 0.0) for _, safe in known]
        ax.plot(x, y, color=colour, linewidth=1.2, marker=marker, markersize=3, alpha=0.8)
        for at, (px, py) in enumerate(known):
            last = at == len(known) - 1
            if at:
                ax.errorbar(
                    x[at],
                    y[at],
                    xerr=_arms(px, xs),
                    yerr=_arms(py, ys),
                    color=colour,
                    marker=marker,
                    markersize=7 if last else 3,
                    linewidth=1.4 if last else 0.5,
                    linestyle="",
                    alpha=1.0 if last else 0.35,
                    label=arm.title if last else None,
                )
    start = drawn[0].path[0]
    ax.plot(
        [xs * (start.values[name].value or 0)],
        [ys * (start.values[report.safety].value or 0)],
        marker="*",
        markersize=10,
        color=_BASE,
        linestyle="",
        label="base",
    )
    if report.target is not None:
        ax.axhline(ys * report.target, color=_BASE, linewidth=1, linestyle=":")
        ax.annotate(
            "matched",
            (1, ys * report.target),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            fontsize=8,
        )
    ax.set_xlabel(f"{_axis(name)} {_unit(report, name)}".strip())
    ax.set_ylabel(
        f"{measure_title(report.safety, arrow=False)} {_unit(report, report.safety)}".strip()
    )
    ax.legend(loc="best")


def _arms(found: Any, scale: float) -> Any:
    if found.low is None or found.high is None:
        return None
    return [[scale * max(found.value - found.low, 0)], [scale * max(found.high - found.value, 0)]]


def _binned(shares: Any, steps: list[int]) -> tuple[Any, Any]:
    """Layers by at most `_MOST_COLUMNS` columns, and the columns' edges."""
    import numpy as np

    groups = np.array_split(np.arange(len(steps)), min(len(steps), _MOST_COLUMNS))
    grid = np.stack([shares[group].mean(0) for group in groups], axis=1)
    edges = [steps[group[0]] - 0.5 for group in groups] + [steps[-1] + 0.5]
    return grid, np.array(edges)


# ------------------------------------------------------------------------------------------ words


def _axis(name: str) -> str:
    return measure_title(name, arrow=False)


def _scale(report: Report, name: str) -> float:
    return 100.0 if report.units.get(name) == "share" else 1.0


def _unit(report: Report, name: str) -> str:
    return {"share": "(%)", "nats": "(nats per token)"}.get(report.units.get(name, ""), "")


def _said(report: Report, name: str, point: PathPoint) -> str:
    value = point.values[name].value
    if value is None:
        return "an unknown value"
    if report.units.get(name) == "share":
        return f"{100 * value:.0f} % {_axis(name)}"
    return f"{value:.3f} {_axis(name)}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
