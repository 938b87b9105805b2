"""A comparison: the same recipe under several update rules and seeds, at matched safety."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ogpsa.checks import check_adapters, check_arguments, check_data, check_hub
from lora_ogpsa.compare_cells import Cell, run_cell
from lora_ogpsa.compare_results import compare_json
from lora_ogpsa.compare_settings import PLAIN, cell_mapping, chosen_rules
from lora_ogpsa.compare_summary import safety_measure
from lora_ogpsa.compare_table import compare_markdown, compare_table
from lora_ogpsa.console import out, say
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.evaluation import EvaluationResult, evaluate
from lora_ogpsa.measure import recipe_suite
from lora_ogpsa.output_folder import RECIPE_FILE, OutputFolder, check_same_recipe
from lora_ogpsa.quiet import quiet_libraries
from lora_ogpsa.recipe import Recipe, parse_recipe
from lora_ogpsa.report import HTML_FILE, REPORT_FILES, write_report
from lora_ogpsa.results import save_result
from lora_ogpsa.run import RunInterrupted
from lora_ogpsa.stage_data import checked_rows
from lora_ogpsa.stages import load_base, write_json, write_text, write_yaml

COMPARE_FILE = "compare.yaml"
BASE_FILE = Path("evaluations") / "base.json"
_OWN = (COMPARE_FILE, "cells", "evaluations", "compare.json", "compare.md", *REPORT_FILES)


def compare(
    recipe: Recipe,
    *,
    rules: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a recipe under several rules with several seeds, evaluate along the way, compare.

    Args:
        recipe: the recipe; everything goes to its `output_dir`.
        rules: names of the rules; ``None`` takes those of the recipe.
        seeds: the seeds; ``None`` takes those of the recipe.
        overwrite: delete what an earlier comparison left in the output folder.
        resume: go on where an earlier comparison of the same recipe stopped; rules and seeds may
            be added to it.

    Returns:
        The content of ``compare.json``.

    Raises:
        OGPSAError: something in the recipe, the data, the model or the training cannot work.
        RunInterrupted: on Ctrl-C.
    """
    quiet_libraries()
    cells = plan_cells(recipe, rules=rules, seeds=seeds)
    output = OutputFolder(
        recipe.output_dir,
        recipe.raw,
        marker=COMPARE_FILE,
        own=_OWN,
        what="comparison",
        overwrite=overwrite,
        resume=resume,
        relevant=_fixed,
    )
    try:
        return _execute(recipe, cells, output)
    except KeyboardInterrupt:
        if not output.claimed:
            raise
        raise RunInterrupted(_interrupted(recipe.output_dir, cells)) from None


def plan_cells(
    recipe: Recipe, *, rules: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[Cell]:
    """The cells of a comparison, seed by seed, plain training first.

    Raises:
        ConfigError: there is nothing to compare, or a rule is wrong.
    """
    settings = recipe.comparison
    if all(stage.ogpsa is None for stage in recipe.stages):
        raise ConfigError(
            f"{recipe.source}: `ogpsa: false` leaves nothing to compare plain training with. Leave "
            "it out; plain training is one of the rules."
        )
    if recipe.evaluation is None:
        raise ConfigError(
            f"{recipe.source}: `evaluation: false` leaves nothing to compare by. Leave it out to "
            "measure on the embedded data."
        )
    safety_measure(recipe.evaluation, settings.safety)
    cells = []
    for seed in seeds or settings.seeds:
        for name, rule in chosen_rules(settings, rules).items():
            folder = recipe.output_dir / "cells" / name / f"seed-{seed}"
            raw = cell_mapping(recipe.raw, rule, seed, str(folder))
            cells.append(Cell(name, seed, parse_recipe(raw, recipe.source), settings.checkpoints))
    return cells


def in_own_folder(recipe: Recipe) -> Recipe:
    """`recipe` with results beside those of a run of it, not among them."""
    folder = recipe.output_dir
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise ConfigError(
            f"{recipe.source}: there is no room beside `output_dir` {recipe.output_dir}. Pass "
            "--output-dir with a folder for the comparison."
        )
    return replace(recipe, output_dir=folder.with_name(f"{folder.name}-compare"))


def _fixed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay the same between a comparison and its resumption."""
    section = raw.get("compare")
    section = section if isinstance(section, Mapping) else {}
    fixed = {k: v for k, v in raw.items() if k not in ("compare", "merge")}
    return {**fixed, "compare.checkpoints": section.get("checkpoints")}


def _claim_cells(cells: Sequence[Cell]) -> None:
    """Check that finished cells were trained as this comparison would train them."""
    for cell in cells:
        path = cell.folder / RECIPE_FILE
        if path.is_file():
            check_same_recipe(path, cell.recipe.raw)
        else:
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_yaml(path, cell.recipe.raw)


def _execute(recipe: Recipe, cells: Sequence[Cell], output: OutputFolder) -> dict[str, Any]:
    began = time.monotonic()
    output.check()
    complete = all(cell.is_complete() for cell in cells) and (output.path / BASE_FILE).is_file()
    loaded = None if complete and output.resume else _checked_base(recipe, cells)
    output.claim()
    _claim_cells(cells)
    base = _evaluate_base(recipe, loaded)
    del loaded
    gc.collect()
    for number, cell in enumerate(cells, start=1):
        heading = f"[{number}/{len(cells)}]"
        if cell.is_complete():
            say(f"{heading} {cell.title}: done already")
            continue
        run_cell(cell, lambda text, heading=heading: say(f"{heading} {text}"))  # type: ignore[misc]
        if any(c.rule == PLAIN and c.is_complete() for c in cells):
            _report(recipe, base, cells)
    content = _report(recipe, base, cells)
    out.print(compare_table(content))
    write_report(recipe.output_dir)
    say(f"time: {time.monotonic() - began:.0f} s")
    say(f"report: {recipe.output_dir / HTML_FILE}")
    return content


def _checked_base(recipe: Recipe, cells: Sequence[Cell]) -> tuple[Any, Any]:
    """Model and tokenizer, after trying settings and data: what is wrong should show now."""
    by_rule = {cell.rule: cell.recipe for cell in cells}
    check_arguments(recipe)
    check_hub(recipe)
    model, tokenizer = load_base(recipe)
    for rule in by_rule.values():
        check_adapters(rule, model.config)
    for stage in recipe.stages:
        checked_rows(stage, tokenizer)
    check_data(recipe, tokenizer)
    return model, tokenizer


def _evaluate_base(recipe: Recipe, loaded: tuple[Any, Any] | None) -> EvaluationResult:
    """Evaluate the base model once; it is not loaded where that was done already."""
    path = recipe.output_dir / BASE_FILE
    if loaded is None or path.is_file():
        say("base: evaluated already")
        return EvaluationResult.load(path)
    say("base: evaluating")
    result = evaluate(*loaded, recipe_suite(recipe), base=True)
    save_result(result, path)
    return result


def _report(recipe: Recipe, base: EvaluationResult, cells: Sequence[Cell]) -> dict[str, Any]:
    content = compare_json(recipe, base, cells)
    write_json(recipe.output_dir / "compare.json", content)
    write_text(recipe.output_dir / "compare.md", compare_markdown(content))
    return content


def _interrupted(folder: Path, cells: Sequence[Cell]) -> str:
    """What is saved, in one line."""
    done = [cell.title for cell in cells if cell.is_complete()]
    parts = [saved for cell in cells if not cell.is_complete() and (saved := cell.saved())]
    saved = "; ".join([*([f"finished: {' / '.join(done)}"] if done else []), *parts])
    return (
        f"interrupted. Saved in {folder}: {saved or 'nothing yet'}. The same command with --resume "
        "goes on from there."
    )
