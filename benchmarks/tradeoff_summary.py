"""From cells to the table: the tax removed at matched safety, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common
from tradeoff_measures import TAXED, TAXED_AT_END, taxed

from lora_ogpsa.evaluation.tax import Point, matched_point, mean_of_known, taxes_removed

MARGIN = 0.02  # matched safety: within two points of plain training's harmful refusals
NEAR = 0.10  # the same with a wider margin, which more runs meet and chance decides less

# Methods whose seconds others are compared with: a second one where cells are of two machines.
CLOCKS = ("plain", "plain_again")

Cell = Mapping[str, Any]
Values = Mapping[str, float]


def run_path(cell: Cell, base: Cell) -> list[Point]:
    """The checkpoints at which a run may be compared.

    They begin at the base model. After two stages only the last one counts: its start would
    compare the stage before it, whose end is safe already.
    """
    points = cell["points"]
    stages = list(dict.fromkeys(point["stage"] for point in points))
    chosen = [point for point in points if point["stage"] == stages[-1]]
    if len(stages) == 1:
        chosen = [*base["points"], *chosen]
    return [Point(p["step"], p["values"]["harmful"], taxed(p["values"])) for p in chosen]


def strength_path(cell: Cell, base: Cell) -> list[Point]:
    """The trained adapter at growing strengths, from the base model (0) on; empty if not measured.

    A `Point`'s step is the strength.
    """
    if not cell.get("strengths"):
        return []
    found = {0.0: base["points"][0]["values"], 1.0: end(cell)}
    found |= {point["strength"]: point["values"] for point in cell["strengths"]}
    return [Point(s, values["harmful"], taxed(values)) for s, values in sorted(found.items())]


def end(cell: Cell) -> Values:
    """What was measured at the end of a run."""
    return cell["points"][-1]["values"]


def summarise(cells: Sequence[Cell], margin: float = MARGIN) -> dict[str, Any]:
    """Per method: what it measures at the end, and how much of plain training's tax it removed.

    ``tax_removed`` compares each run where it first becomes as safe as plain training's end less
    `margin`, interpolated between its checkpoints, with plain training's end; values are averaged
    over the seeds that get there (``matched`` is their share) before the tax is taken. Where the
    trained adapter was measured at several strengths, these are what it is followed along instead.
    ``near`` is the same at a margin of `NEAR`. ``tax_removed_end`` compares ends, whatever their
    safety (``harmful_gap`` tells). Plain training is compared at its end; stopping it early is the
    row ``early_stop``, scaling its adapter down ``scaled_adapter``. Where plain training did not
    make the model safer, there is no safety to match and no seed counts.
    ``compute_overhead`` and ``run_overhead`` are the tokens that pass through the model and the
    seconds of a whole run, setting up included, beyond those of plain training of the same seeds;
    of seconds only seeds count of which both ran in the same environment, as one of `CLOCKS`, and
    none may be left.
    ``own_overhead`` is what a method adds to the seconds of its own training, which an adapter that
    begins in a middle layer makes shorter than plain training's.

    Args:
        cells: of one setting, the base model's among them.
        margin: of harmful refusals.
    """
    base = next((cell for cell in cells if cell["method"] == "base"), None)
    plain = {cell["seed"]: cell for cell in cells if cell["method"] == "plain"}
    clocks = [cell for cell in cells if cell["method"] in CLOCKS]
    summary: dict[str, Any] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        entry = _facts(own)
        if base is not None and method != "base":
            entry |= _compared(own, plain, base, margin, "end" if method == "plain" else "best")
            entry |= _costs(own, plain, clocks)
            near = _compared(own, plain, base, NEAR, "end" if method == "plain" else "best")
            compared = ("matched", "tax_removed", "tax_removed_mean")
            entry["near"] = {"margin": NEAR, **{k: near[k] for k in compared if k in near}}
        summary[method] = entry
        if method == "plain" and base is not None:
            summary |= _cheapest(own, plain, base, margin)
    _name_best(summary)
    return summary


def _cheapest(
    own: Sequence[Cell], plain: Mapping[int, Cell], base: Cell, margin: float
) -> dict[str, Any]:
    """The rivals that plain training is to itself: stopped early, and its adapter scaled down."""
    rows = {"early_stop": ("steps", "plain, stopped where it is safe enough")}
    if all(strength_path(cell, base) for cell in own):
        rows["scaled_adapter"] = ("strengths", "plain's adapter, scaled to where it is safe enough")
    found = {}
    for name, (path, description) in rows.items():
        compared = _compared(own, plain, base, margin, path)
        # Its end is where it is compared.
        for key in ("tax_removed_end", "tax_removed_end_mean", "harmful_gap"):
            compared.pop(key, None)
        found[name] = {
            "description": description,
            "seeds": [cell["seed"] for cell in own],
            **_costs(own, plain, own),
            **compared,
            "reference_passes": 0.0,
        }
    return found


def _facts(own: Sequence[Cell]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "description": own[0].get("description", ""),
        "seeds": [cell["seed"] for cell in own],
        "measures": mean_values([end(cell) for cell in own]),
    }
    if own[0].get("grid"):
        entry["grid"] = own[0]["grid"]
    if all("train_seconds" in cell for cell in own):
        entry["reference_passes"] = sum(cell["reference_passes"] for cell in own) / len(own)
        entry["own_overhead"] = sum(
            cell["extra_seconds"] / (cell["train_seconds"] - cell["extra_seconds"]) for cell in own
        ) / len(own)
    return entry


def _compared(
    own: Sequence[Cell], plain: Mapping[int, Cell], base: Cell, margin: float, path: str
) -> dict[str, Any]:
    """The comparison with plain training of the same seeds; empty if there are none.

    `path` is ``"end"``, ``"steps"``, ``"strengths"`` or ``"best"``: strengths if measured, else
    steps.
    """
    own = [cell for cell in own if cell["seed"] in plain]
    if not own:
        return {}
    by_seed, matched = [], []
    for cell in own:
        reference = end(plain[cell["seed"]])
        steps, strengths = run_path(cell, base), strength_path(cell, base)
        followed = strengths if path == "strengths" or (path == "best" and strengths) else steps
        target = reference["harmful"] - margin
        found = steps[-1] if path == "end" else matched_point(followed, target)
        if target <= end(base)["harmful"]:
            found = None
        row: dict[str, Any] = {"seed": cell["seed"], "matched": found is not None}
        if found is not None:
            removed = taxes_removed(taxed(end(base)), taxed(reference), found.metrics)
            row |= {
                "step" if followed is steps else "strength": found.step,
                "harmful": found.safety,
                "metrics": dict(found.metrics),
                "tax_removed": removed,
                "tax_removed_mean": mean_of_known(removed.values()),
            }
            matched.append((found.metrics, taxed(reference)))
        by_seed.append(row)
    ends = [(end(cell), end(plain[cell["seed"]])) for cell in own]
    at_ends = taxes_removed(
        taxed(end(base), TAXED_AT_END),
        taxed(mean_values([reference for _, reference in ends]), TAXED_AT_END),
        taxed(mean_values([value for value, _ in ends]), TAXED_AT_END),
    )
    removed = {}
    if matched:
        removed = taxes_removed(
            taxed(end(base)),
            mean_values([reference for _, reference in matched]),
            mean_values([metrics for metrics, _ in matched]),
        )
    return {
        "matched": len(matched) / len(own),
        "tax_removed": removed or dict.fromkeys(taxed(end(base))),
        "tax_removed_mean": mean_of_known(removed.values()),
        "tax_removed_end": at_ends,
        "tax_removed_end_mean": mean_of_known(at_ends[name] for name in TAXED if name in at_ends),
        "harmful_gap": sum(v["harmful"] - r["harmful"] for v, r in ends) / len(ends),
        "by_seed": by_seed,
    }


def _costs(
    own: Sequence[Cell], plain: Mapping[int, Cell], clocks: Sequence[Cell]
) -> dict[str, float]:
    """Tokens and seconds beyond those of plain training of the same seeds."""
    beside = [(cell, plain[cell["seed"]]) for cell in own if cell["seed"] in plain]
    clocked = [
        (cell, of_plain)
        for cell in own
        for of_plain in clocks
        if all(cell.get(name) == of_plain.get(name) for name in ("seed", "environment"))
    ]
    costs = {}
    for name, spent, pairs in (
        ("compute_overhead", "token_passes", beside),
        ("run_overhead", "train_seconds", clocked),
    ):
        if pairs and all(cell.get(spent) and of_plain.get(spent) for cell, of_plain in pairs):
            shares = [cell[spent] / of_plain[spent] for cell, of_plain in pairs]
            costs[name] = sum(shares) / len(shares) - 1
    return costs


def mean_values(rows: Sequence[Values]) -> dict[str, float]:
    """Means of the columns that all rows have."""
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}


def _name_best(summary: dict[str, Any]) -> None:
    """Mark the best setting of every grid: matched most often, then most tax removed."""

    def merit(name: str) -> tuple[float, float]:
        entry = summary[name]
        removed = entry.get("tax_removed_mean")
        return entry.get("matched", 0.0), float("-inf") if removed is None else removed

    grids: dict[str, list[str]] = {}
    for name, entry in summary.items():
        if "grid" in entry:
            grids.setdefault(entry["grid"], []).append(name)
    for names in grids.values():
        best = max(names, key=merit)
        for name in names:
            summary[name]["best_of_grid"] = name == best


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table: what runs end with, and what they removed at matched safety.

    The best of each grid is marked with a star.
    """
    shown = ("harmful", "over_refusal", "general_refusal", "safety_nll", "gsm8k_nll", "alpaca_nll")
    extra = ("gsm8k_kl", "alpaca_kl", "pair_accuracy", "mmlu", "arc_easy")
    measured = {name for entry in summary.values() for name in entry.get("measures", {})}
    columns = [name for name in (*shown, *extra) if name in measured]
    heads = [
        "method",
        "seeds",
        *columns,
        "matched",
        *(f"{name} tax removed" for name in TAXED if name in measured),
        "mean",
        "mean at end",
        "passes",
        "more token passes",
        "overhead",
    ]
    rows = []
    for method, entry in summary.items():
        star = " *" if entry.get("best_of_grid") else ""
        measures, removed = entry.get("measures", {}), entry.get("tax_removed", {})
        row = [
            method + star,
            str(len(entry["seeds"])),
            *(_number(measures.get(name)) for name in columns),
            _share(entry.get("matched")),
            *(_share(removed.get(name)) for name in TAXED if name in measured),
            _share(entry.get("tax_removed_mean")),
            _share(entry.get("tax_removed_end_mean")),
            _number(entry.get("reference_passes"), 2),
            _share(entry.get("compute_overhead")),
            _share(entry.get("run_overhead")),
        ]
        rows.append(row)
    return common.table(heads, rows)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
