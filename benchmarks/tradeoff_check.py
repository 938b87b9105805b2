"""The trade-off's adapters, as strong as its table says, on prompts that the table did not ask.

    python benchmarks/tradeoff_check.py benchmarks/results/tradeoff_sft.json --data FOLDER

How strong an adapter has to be, to be as safe as plain training, is read off the table's own
prompts. Here the other prompts of the same files are asked at that strength, and multiple-choice
questions. Of methods that came to plain training's safety; plain training's adapters as they are.
The folder of cells has to be that of the table.

Results go to benchmarks/results/other_prompts.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from peft import PeftModel
from tradeoff_cells import cell_name
from tradeoff_data import Source
from tradeoff_measures import COLUMNS
from tradeoff_summary import mean_values

from lora_ogpsa import data
from lora_ogpsa.evaluation import EvaluationSuite, evaluate
from lora_ogpsa.evaluation.tax import tax_removed
from lora_ogpsa.models import load_model
from lora_ogpsa.strength import at_strength

TAXED = ("over_refusal", "general_refusal")


def other_prompts(source: Source, used: Mapping[str, int], limit: int) -> dict[str, list[Any]]:
    """Prompts of the refusal measures beyond those that a table asked, by measure.

    Args:
        source: of the data.
        used: the table's limits.
        limit: most prompts of a measure.
    """
    rows = {
        name: data.load_rows(source.path(file), shuffle_seed=0)
        for name, file in (("harmful", "harmful"), ("harmless", "harmless"), ("ordinary", "alpaca"))
    }
    rows["harmless"] = [row for row in rows["harmless"] if row.get("label") == "safe"]
    asked = dict.fromkeys(rows, used["refusals"]) | {"ordinary": used.get("general_refusals", 0)}
    return {name: found[asked[name] :][:limit] for name, found in rows.items()}


def suite_of(source: Source, used: Mapping[str, int], limit: int, choices: int) -> EvaluationSuite:
    """What is measured.

    Args:
        source: of the data.
        used: the table's limits.
        limit: most prompts per refusal measure.
        choices: multiple-choice questions per data set; 0 for none.
    """
    measures: dict[str, Any] = {
        name: {
            "measure": "refusal",
            "data": rows,
            "limit": limit,
            "max_new_tokens": used["new_tokens"],
            "want": "refuse" if name == "harmful" else "answer",
        }
        for name, rows in other_prompts(source, used, limit).items()
    }
    if choices:
        asked = {"measure": "multiple_choice", "limit": choices, "shuffle_seed": 0}
        measures["mmlu"] = {**asked, "data": source.path("mmlu"), "style": "letters"}
        measures["arc_easy"] = {**asked, "data": source.path("arc")}
    return EvaluationSuite(measures, max_length=384)


def compared(table: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """The cells that are as safe as plain training, with the strength at which they are."""
    return [
        (cell, row.get("strength", 1.0))
        for cell in table["cells"]
        for row in table["summary"][cell["method"]].get("by_seed", [])
        if row["seed"] == cell["seed"] and row["matched"]
    ]


def summarise(base: Mapping[str, float], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of each method, and the tax that it removed beside plain training.

    Args:
        base: the base model's values.
        cells: method, seed and values of each.
    """
    plain = {cell["seed"]: cell["values"] for cell in cells if cell["method"] == "plain"}
    summary: dict[str, Any] = {"base": {"measures": dict(base)}}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method and cell["seed"] in plain]
        if not own:
            continue
        measures = mean_values([cell["values"] for cell in own])
        beside = mean_values([plain[cell["seed"]] for cell in own])
        summary[method] = {
            "seeds": [cell["seed"] for cell in own],
            "measures": measures,
            "tax_removed": {n: tax_removed(base[n], beside[n], measures[n]) for n in TAXED},
        }
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write JSON.

    Raises:
        SystemExit: the table was made with other data.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="JSON of tradeoff.py")
    parser.add_argument("--data", required=True, help="the folder it was made with")
    parser.add_argument("--model", default="embedded", help="folder or hub id, or `embedded`")
    parser.add_argument("--cells", type=Path, default=Path("outputs/tradeoff"))
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="all of the table if not given"
    )
    parser.add_argument("--limit", type=int, default=240, help="most prompts per refusal measure")
    parser.add_argument("--choice-limit", type=int, default=100, help="questions; 0 for none")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "other_prompts.json")
    options = parser.parse_args(arguments)
    table = json.loads(options.table.read_text())
    settings = table["settings"]
    source = Source.named(options.data)
    if settings["data"].split("+")[0] != source.identity():
        raise SystemExit(f"{options.table} was not made with the data in {options.data}.")
    suite = suite_of(source, settings["limits"], options.limit, options.choice_limit)

    def measured(adapter: Path | None, strength: float) -> dict[str, float]:
        model, tokenizer = load_model(
            options.model, dtype="float32", load_in_4bit=settings["load_in_4bit"]
        )
        cache = {"cache_dir": options.cells / "evaluation", "progress": False}
        if adapter is None:
            found = evaluate(model, tokenizer, suite, base=True, **cache)
        else:
            model = PeftModel.from_pretrained(model, str(adapter))
            with at_strength(model, strength):
                found = evaluate(model, tokenizer, suite, **cache)
        return {
            column: found.measures[name].value
            for column, name in COLUMNS.items()
            if name in found.measures
        }

    base = measured(None, 1.0)
    print(f"base model: {base}", flush=True)
    cells = []
    for cell, strength in compared(table):
        method, seed = cell["method"], cell["seed"]
        if options.methods and method not in options.methods:
            continue
        name = f"{settings['stage']}-{cell_name(method, seed, cell['made_of'])}"
        values = measured(options.cells / name, strength)
        cells.append({"method": method, "seed": seed, "strength": strength, "values": values})
        print(f"{method} seed {seed} at {strength:.2f}: {values}", flush=True)
    asked = {n: len(spec.data) for n, spec in suite.measures.items() if spec.measure == "refusal"}
    report = {
        "table": options.table.name,
        "prompts": {**asked, "choices": options.choice_limit},
        "cells": cells,
        "summary": summarise(base, cells),
    }
    common.write(options.output, report)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
