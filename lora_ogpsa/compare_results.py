"""The results of a comparison as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_ogpsa.compare_cells import Cell
from lora_ogpsa.compare_summary import Summary
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.recipe import Recipe
from lora_ogpsa.run_record import versions


def compare_json(recipe: Recipe, base: EvaluationResult, cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything measured so far.

    Args:
        recipe: the recipe.
        base: evaluation of the base model.
        cells: of the comparison; those that are not complete are left out.
    """
    assert recipe.evaluation is not None
    settings = recipe.comparison
    done = [cell for cell in cells if cell.is_complete()]
    content: dict[str, Any] = {
        "finished": len(done) == len(cells),
        "recipe_file": recipe.source,
        "recipe": recipe.raw,
        "seeds": sorted({cell.seed for cell in done}),
        "safety_margin": settings.safety_margin,
        "versions": versions(),
    }
    paths = {(cell.rule, cell.seed): cell.path() for cell in done}
    if not paths:
        return content | {"rules": {}}
    summary = Summary(recipe.evaluation, base, paths, settings.safety, settings.safety_margin)
    content |= summary.to_json()
    for rule, found in content["rules"].items():
        own = [cell for cell in done if cell.rule == rule]
        found["ogpsa"] = own[0].recipe.ogpsa_settings
        found["training"] = {str(cell.seed): _training(cell) for cell in own}
    return content


def _training(cell: Cell) -> dict[str, Any]:
    """What was recorded of a cell's trainings, by stage."""
    records = {stage.name: cell.record(stage) or {} for stage in cell.recipe.stages}
    return {n: {k: v for k, v in r.items() if k != "log"} for n, r in records.items()}
