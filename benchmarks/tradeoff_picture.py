"""The Pareto picture: what a run costs against how safe it is, along its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tradeoff_measures import taxed
from tradeoff_summary import end

from lora_ogpsa.evaluation.tax import mean_of_known, taxes_removed

OURS = "default"

Cell = Mapping[str, Any]
Coordinates = tuple[float, float | None, float | None]


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Over-refusal and utility tax against harmful refusals; the upper left is best.

    Args:
        cells: of one setting, with the base model and plain training.
        path: of the PNG.
    """
    lines = paths(cells)
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("harmless prompts refused", "utility tax left (1 = plain training)")
    others = [name for name in lines if name not in (OURS, "base")]
    for index, (panel, title) in enumerate(zip(panels, titles, strict=True), start=1):
        for number, name in enumerate([*others, *([OURS] if OURS in lines else [])]):
            ours = name == OURS
            known = [p for p in lines[name] if p[index] is not None]
            panel.plot(
                [point[index] for point in known],
                [point[0] for point in known],
                color="black" if ours else f"C{number % 10}",
                linestyle=("-", "--", ":", "-.")[0 if ours else number // 10 % 4],
                linewidth=3 if ours else 1.2,
                marker="o",
                markersize=6 if ours else 3,
                label=f"{name} (ours)" if ours else name,
                zorder=10 if ours else 2,
            )
        panel.set_xlabel(title)
        panel.set_ylabel("harmful prompts refused")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def paths(cells: Sequence[Cell]) -> dict[str, list[Coordinates]]:
    """Per method: (harmful refused, harmless refused, utility tax) along it, means over seeds.

    Along the strengths of its adapter where they were measured, else along its training.

    The utility tax is the mean over measures other than over-refusal of the share of plain
    training's tax at its end; ``None`` if plain training paid none.
    """
    base = next((cell for cell in cells if cell["method"] == "base"), None)
    plain = {cell["seed"]: cell for cell in cells if cell["method"] == "plain"}
    found: dict[str, list[Coordinates]] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells if cell["method"] != "base"):
        own = [cell for cell in cells if cell["method"] == method]
        start = [] if base is None else [_coordinates(base["points"][0]["values"], None, None)]
        runs = [
            [
                _coordinates(
                    point["values"],
                    None if base is None else end(base),
                    end(plain[cell["seed"]]) if cell["seed"] in plain else None,
                )
                for point in _line(cell)
            ]
            for cell in own
        ]
        length = min(map(len, runs))
        found[method] = start + [_average([run[i] for run in runs]) for i in range(length)]
    return found


def _line(cell: Cell) -> Sequence[Mapping[str, Any]]:
    """The trained adapter at growing strengths where they were measured, else the run."""
    if not cell.get("strengths"):
        return cell["points"]
    return sorted(
        [*cell["strengths"], {"strength": 1.0, **cell["points"][-1]}], key=lambda p: p["strength"]
    )


def _coordinates(
    values: Mapping[str, float],
    base: Mapping[str, float] | None,
    plain: Mapping[str, float] | None,
) -> Coordinates:
    left = 0.0 if base is None else None
    if base is not None and plain is not None:
        removed = taxes_removed(taxed(base), taxed(plain), taxed(values))
        mean = mean_of_known(v for name, v in removed.items() if name != "over_refusal")
        left = None if mean is None else 1 - mean
    return values["harmful"], values.get("over_refusal"), left


def _average(points: Sequence[Coordinates]) -> Coordinates:
    harmful, refused, tax = zip(*points, strict=True)
    return sum(harmful) / len(harmful), mean_of_known(refused), mean_of_known(tax)
