"""The trade-off's adapters, as strong as its table says, on prompts that the table did not ask.

    python benchmarks/tradeoff_check.py benchmarks/results/tradeoff_sft_rivals.json --data FOLDER

How strong an adapter has to be, to be as safe as plain training, is read off the table's own
prompts. Here the other prompts of the same files are asked at that strength, the evaluation prompts
of the package, and multiple-choice questions. Of methods that came to plain training's safety;
plain training's adapters as they are. The folder of cells has to be that of the table.

Results go to benchmarks/results/other_prompts.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from peft import PeftModel
from tradeoff_cells import cell_name
from tradeoff_data import Source
from tradeoff_measures import TAXED, Limits, measure, suite, taxed
from tradeoff_summary import mean_values

from lora_ogpsa.data import load_rows
from lora_ogpsa.evaluation import EvaluationSuite
from lora_ogpsa.evaluation.session import measured_rows
from lora_ogpsa.evaluation.tax import taxes_removed
from lora_ogpsa.models import load_model
from lora_ogpsa.strength import at_strength

CHOICES = "multiple_choice"
# Measures of prompts of the package, with the measure of the table whose settings they have.
PACKAGE = {
    "package_harmful": ("embedded:eval_harmful", "harmful"),
    "package_harmless": ("embedded:eval_harmless", "harmless"),
}
_TAXED = (*TAXED, "package_harmless")


def other_prompts(chosen: EvaluationSuite, limit: int) -> dict[str, list[Any]]:
    """Prompts of the refusal measures beyond those that a table asked, by measure.

    Args:
        chosen: what the table measures.
        limit: most prompts of a measure.
    """
    return {
        name: measured_rows(name, spec, None)[spec.limit :][:limit]
        for name, spec in chosen.measures.items()
        if spec.measure == "refusal"
    }


def other_suite(chosen: EvaluationSuite, limit: int) -> EvaluationSuite:
    """The refusal measures with other prompts and with the package's; multiple choice as it is.

    Args:
        chosen: what the table measures.
        limit: most prompts per refusal measure.
    """
    measures = {n: spec for n, spec in chosen.measures.items() if spec.measure == CHOICES}
    asked = {name: (rows, name) for name, rows in other_prompts(chosen, limit).items()}
    asked |= {name: (load_rows(file)[:limit], like) for name, (file, like) in PACKAGE.items()}
    for name, (rows, like) in asked.items():
        spec = chosen.measures[like]
        measures[name] = replace(spec, data=rows, limit=limit, where=None, shuffle_seed=None)
    return replace(chosen, measures=measures)


def compared(table: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """The cells that are as safe as plain training, with the strength at which they are.

    What has no adapter, or was not measured at several strengths, is not among them.
    """
    found = []
    for cell in table["cells"]:
        for row in table["summary"][cell["method"]].get("by_seed", []):
            strength = 1.0 if cell["method"] == "plain" else row.get("strength")
            if row["seed"] == cell["seed"] and row["matched"] and strength is not None:
                found.append((cell, strength))
    return found


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
            "tax_removed": taxes_removed(*(taxed(v, _TAXED) for v in (base, beside, measures))),
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
    parser.add_argument("table", type=Path, help="JSON of tradeoff.py, with strengths")
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
    limits = Limits(**{**settings["limits"], "choices": options.choice_limit})
    asked = suite(source, limits, settings["precision"], dpo=False, final=True)
    chosen = other_suite(asked, options.limit)
    loading = {"dtype": "float32", "load_in_4bit": settings["load_in_4bit"]}
    cache = options.cells / "evaluation"

    model, tokenizer = load_model(options.model, **loading)
    base = measure(model, tokenizer, chosen, base=True, cache=cache)["values"]
    print(f"base model: {base}", flush=True)
    cells = []
    for cell, strength in compared(table):
        method, seed = cell["method"], cell["seed"]
        if options.methods and method not in options.methods:
            continue
        model, tokenizer = load_model(options.model, **loading)
        name = cell_name(settings["stage"], method, seed, cell["made_of"])
        model = PeftModel.from_pretrained(model, str(options.cells / name))
        with at_strength(model, strength):
            values = measure(model, tokenizer, chosen, base=False, cache=cache)["values"]
        cells.append({"method": method, "seed": seed, "strength": strength, "values": values})
        print(f"{method} seed {seed} at {strength:.2f}: {values}", flush=True)
    counts = {n: len(spec.data) for n, spec in chosen.measures.items() if spec.measure != CHOICES}
    report = {
        "table": options.table.name,
        "prompts": {**counts, "choices": options.choice_limit},
        "cells": cells,
        "summary": summarise(base, cells),
    }
    common.write(options.output, report)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
