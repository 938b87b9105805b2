"""The report of a single run, from what lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ogpsa.compare_settings import PLAIN
from lora_ogpsa.compare_summary import safety_measure
from lora_ogpsa.compare_table import Section
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.export.model_files import read_json
from lora_ogpsa.export.quantisation import RUN_FILE
from lora_ogpsa.recipe import Recipe, load_recipe
from lora_ogpsa.report.costs import stage_seconds
from lora_ogpsa.report.model import Arm, PathPoint, Report, StageRecord, Value
from lora_ogpsa.report.verdict import cost_sentence, run_verdict
from lora_ogpsa.results import ARM_TITLES, column_title, difference_rows, in_order, measure_rows
from lora_ogpsa.run_record import merge_line, versions
from lora_ogpsa.stages import TRAINING_FILE
from lora_ogpsa.training_record import ENERGY_FILE, read_energy

# What to do about a damaged file.
AGAIN = "Repeat the command that made it with --resume, then write the report again."


def read_run(folder: Path, recipe_file: Path) -> Report:
    """Everything a report of the run in `folder` shows; what is missing is left out.

    Args:
        folder: output folder of ``lora-ogpsa run``.
        recipe_file: the recipe in it.

    Raises:
        OGPSAError: the recipe or an evaluation in it cannot be read.
    """
    recipe = load_recipe(recipe_file)
    content = _json(folder / "results.json")
    results = _evaluations(folder, recipe)
    base = results.get("base")
    last = recipe.stages[-1].name
    safety, taxes = _roles(recipe, results)
    arms = [_arm(folder, recipe, arm, results) for arm in reversed(recipe.arms)]
    plain, own = results.get(f"plain/{last}"), results.get(f"ogpsa/{last}")
    verdict = run_verdict(base, plain, own, safety, taxes)
    protected = next((arm for arm in arms if not arm.plain), None)
    columns = {column_title(p, len(recipe.stages)): results[p] for p in in_order(list(results))}
    report = Report(
        title=f"{Path(recipe.model['model_name_or_path']).name}: report of a run",
        about=about(recipe),
        verdict=type(verdict)(
            verdict.tone, verdict.sentence, cost_sentence(protected.times) if protected else ""
        ),
        arms=[arm for arm in arms if arm.path or arm.stages],
        base=base,
        safety=safety,
        taxes=taxes,
        units={n: m.unit for result in results.values() for n, m in result.measures.items()},
        notes=[note for result in results.values() for note in result.notes],
        recipe=recipe_file.read_text(encoding="utf-8"),
        versions=content.get("versions") or versions(),
    )
    if columns:
        report.headings = ["measure", "n", *columns]
        report.sections = [Section("", measure_rows(columns))]
        report.caption = "In brackets 95 % intervals over the choice of prompts. One seed."
    if plain is not None and own is not None:
        report.differences["OGPSA minus plain training, paired by prompt"] = difference_rows(
            plain, own
        )
    if base is not None and own is not None:
        report.differences["OGPSA minus the base model, paired by prompt"] = difference_rows(
            base, own
        )
    if content.get("merge") and merge_line(content):
        report.notes.append(merge_line(content))
    if content and not content.get("finished"):
        report.notes.append("The run is not finished; this is what there is so far.")
    report.notes = list(dict.fromkeys(report.notes))
    return report


def about(recipe: Recipe) -> str:
    """What was trained on what, in a line."""
    model = recipe.model
    bits = "4-bit, " if model["load_in_4bit"] else ""
    stages = ", then ".join(f"{s.trainer.upper()} on {s.dataset_name}" for s in recipe.stages)
    return f"{model['model_name_or_path']}, {bits}{recipe.adapter}; {stages}."


def stage_records(folders: list[Path], names: list[str]) -> list[StageRecord]:
    """Records of the stages of one training, as far as there are any."""
    found: list[StageRecord] = []
    before = 0
    for folder, name in zip(folders, names, strict=True):
        record = _json(folder / "adapter" / TRAINING_FILE)
        if record:
            settings = _json(folder / "adapter" / RUN_FILE).get("ogpsa")
            energy = read_energy(folder / ENERGY_FILE)
            found.append(StageRecord(name, before, record, settings, energy))
            before += record["steps"]
    return found


def _arm(folder: Path, recipe: Recipe, arm: str, results: Mapping[str, EvaluationResult]) -> Arm:
    names = [stage.name for stage in recipe.stages]
    records = stage_records([folder / "runs" / arm / name for name in names], names)
    found = Arm(ARM_TITLES[arm], arm == PLAIN, stages=records)
    found.times = stage_seconds([record.record["seconds"] for record in records])
    base = results.get("base")
    measured = [(r, results[p]) for r in records if (p := f"{arm}/{r.name}") in results]
    if measured:
        found.final = measured[-1][1]
        steps = [(r.before + r.record["steps"], result) for r, result in measured]
        if base is not None:
            steps.insert(0, (0, base))
        everything = list(dict.fromkeys(n for _, result in steps for n in result.measures))
        found.path = [PathPoint(step, _values(result, everything)) for step, result in steps]
    return found


def _values(result: EvaluationResult, names: list[str]) -> dict[str, Value]:
    found = {}
    for name in names:
        measure = result.measures.get(name)
        if measure is not None:
            found[name] = Value(measure.value, measure.low, measure.high)
        else:
            # A base has no divergence from itself among its measures: it is 0.
            found[name] = Value(0.0 if result.base else None)
    return found


def _roles(recipe: Recipe, results: Mapping[str, EvaluationResult]) -> tuple[str | None, list[str]]:
    """The measure of safety, and those in which a tax may be paid."""
    suite = recipe.evaluation
    names = list(dict.fromkeys(n for result in results.values() for n in result.measures))
    if suite is None or not names:
        return None, []
    try:
        wanted = safety_measure(suite, recipe.comparison.safety)
    except ConfigError:
        wanted = ""
    safety = next((n for n in names if wanted in (n, n.partition(".")[0])), None)
    taxes = []
    for name in names:
        spec = suite.measures.get(name.partition(".")[0])
        aim = spec is None or spec.measure == "preference" or spec.want == "refuse"
        if name != safety and not aim:
            taxes.append(name)
    return safety, taxes


def _evaluations(folder: Path, recipe: Recipe) -> dict[str, EvaluationResult]:
    parts = ["base", *(f"{arm}/{s.name}" for arm in recipe.arms for s in recipe.stages)]
    paths = {part: folder / "evaluations" / f"{part.replace('/', '-')}.json" for part in parts}
    return {part: EvaluationResult.load(path) for part, path in paths.items() if path.is_file()}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, AGAIN) if path.is_file() else {}
