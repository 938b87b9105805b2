"""The report of a comparison, from what lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ogpsa.compare_settings import PLAIN
from lora_ogpsa.compare_table import caption, columns, matched_target, sections, seed_rows
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.export.model_files import read_json
from lora_ogpsa.recipe import load_recipe
from lora_ogpsa.report.costs import stage_seconds
from lora_ogpsa.report.from_run import AGAIN, about, stage_records
from lora_ogpsa.report.model import Arm, PathPoint, Report, Value
from lora_ogpsa.report.verdict import compare_verdict, cost_sentence


def read_compare(folder: Path, recipe_file: Path) -> Report:
    """Everything a report of the comparison in `folder` shows; what is missing is left out.

    Args:
        folder: output folder of ``lora-ogpsa compare``.
        recipe_file: the recipe in it.

    Raises:
        OGPSAError: nothing is finished yet, or what is there cannot be read.
    """
    path = folder / "compare.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds a comparison of which no part is finished. Go on with it first: "
            "lora-ogpsa compare RECIPE --resume."
        )
    content = read_json(path, AGAIN)
    recipe = load_recipe(recipe_file)
    base_file = folder / "evaluations" / "base.json"
    base = EvaluationResult.load(base_file) if base_file.is_file() else None
    names = [stage.name for stage in recipe.stages]
    arms = [_arm(folder, content, rule, names) for rule in content["rules"]]
    verdict = compare_verdict(content)
    protected = next((arm for arm in arms if not arm.plain), None)
    report = Report(
        title=f"{Path(recipe.model['model_name_or_path']).name}: update rules compared",
        about=f"{about(recipe)} Seeds: {', '.join(map(str, content['seeds']))}.",
        verdict=type(verdict)(
            verdict.tone, verdict.sentence, cost_sentence(protected.times) if protected else ""
        ),
        arms=arms,
        base=base,
        safety=content.get("safety"),
        taxes=content.get("taxes", []),
        units={name: m["unit"] for name, m in content.get("measures", {}).items()},
        recipe=recipe_file.read_text(encoding="utf-8"),
        versions=content["versions"],
    )
    if content["rules"]:
        report.headings, report.sections = columns(content), sections(content)
        report.caption = f"{caption(content)}."
        if matched_target(content) is not None:
            report.target = content["plain_safety"] - content["safety_margin"]
        if len(content["seeds"]) > 1:
            report.seeds = (["measure", *content["rules"]], seed_rows(content))
    if not content["finished"]:
        report.notes.append("The comparison is not finished; this is what there is so far.")
    return report


def _arm(folder: Path, content: Mapping[str, Any], rule: str, names: list[str]) -> Arm:
    found = content["rules"][rule]
    seeds = list(found["training"])
    cell = folder / "cells" / rule / f"seed-{seeds[0]}"
    arm = Arm(rule, rule == PLAIN, stages=stage_records([cell / name for name in names], names))
    arm.path = [PathPoint(0, {n: Value(**value) for n, value in content["base"].items()})]
    arm.path += [
        PathPoint(
            point["step"],
            {
                n: Value(value["value"], value["low"], value["high"])
                for n, value in point["measures"].items()
            },
        )
        for point in found["path"]
    ]
    if arm.stages:
        last = arm.stages[-1]
        file = cell / last.name / "evaluations" / f"step-{last.record['steps']}.json"
        arm.final = EvaluationResult.load(file) if file.is_file() else None
    trainings = [
        stage_seconds([record["seconds"] for record in stages.values()])
        for stages in found["training"].values()
    ]
    kinds = dict.fromkeys(kind for seconds in trainings for kind in seconds)
    arm.times = {
        kind: sum(seconds.get(kind, 0.0) for seconds in trainings) / len(trainings)
        for kind in kinds
    }
    return arm
