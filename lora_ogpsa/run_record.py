"""What a run leaves for readers: `results.json` for programs, `results.md` for people."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_ogpsa import __version__
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.recipe import Recipe
from lora_ogpsa.results import (
    column_title,
    differences_json,
    differences_markdown,
    in_order,
    measures_json,
    results_markdown,
    sample_answers,
)

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def columns_of(
    recipe: Recipe, results: Mapping[str, EvaluationResult]
) -> dict[str, EvaluationResult]:
    """Results by table heading, base first and the recipe's own run last."""
    return {column_title(p, len(recipe.stages)): results[p] for p in in_order(list(results))}


def results_json(
    recipe: Recipe,
    results: Mapping[str, EvaluationResult],
    trainings: Mapping[str, Mapping[str, Any]],
    merge: Mapping[str, Any] | None,
    *,
    finished: bool,
    merge_seconds: float | None,
    wall_seconds: float,
) -> dict[str, Any]:
    """Everything measured so far, as JSON values.

    Args:
        recipe: the recipe.
        results: evaluations by part, such as ``base`` and ``ogpsa/sft``.
        trainings: records of trainings by part.
        merge: the report of the merge.
        finished: whether the run is complete.
        merge_seconds: merging and checking; ``None`` if another process did it, or nobody yet.
        wall_seconds: of this process; a resumed run has had others before.
    """
    seconds = {"evaluation": sum(result.seconds for result in results.values())}
    for record in trainings.values():
        for kind, value in record["seconds"].items():
            seconds[kind] = seconds.get(kind, 0.0) + value
    if merge_seconds is not None:
        seconds["merge_and_check"] = merge_seconds
    return {
        "finished": finished,
        "recipe_file": recipe.source,
        "recipe": recipe.raw,
        "seeds": {stage.name: stage.argument("seed") for stage in recipe.stages},
        "ogpsa": recipe.ogpsa_settings,
        "versions": versions(),
        "evaluation": {part: measures_json(result) for part, result in results.items()},
        "differences": {
            f"{after} - {before}": differences_json(results[before], results[after])
            for before, after in _compared(recipe, results)
        },
        "training": {
            part: {key: value for key, value in record.items() if key != "log"}
            for part, record in trainings.items()
        },
        "merge": merge,
        "seconds": {k: round(v, 1) for k, v in seconds.items()} | {"wall": round(wall_seconds, 1)},
    }


def results_page(
    recipe: Recipe, results: Mapping[str, EvaluationResult], content: Mapping[str, Any]
) -> str:
    """The same in Markdown, with sample answers."""
    state = "" if content["finished"] else " (so far)"
    lines = [f"# Results of {recipe.source}{state}", ""]
    if results:
        columns = columns_of(recipe, results)
        lines += [results_markdown(columns), "", "In brackets: 95 % intervals.", ""]
        for before, after in _compared(recipe, results):
            lines += [f"## {after} minus {before}, paired by prompt", ""]
            lines += [differences_markdown(results[before], results[after]), ""]
        lines += ["## Sample answers", "", "The first prompts of each kind, unselected.", ""]
        for kind, prompt, answers in sample_answers(columns, per_kind=3):
            lines += [f"**{kind}**: {prompt}", ""]
            lines += [f"- {heading}: {' '.join(text.split())}" for heading, text in answers.items()]
            lines.append("")
        notes = dict.fromkeys(note for result in results.values() for note in result.notes)
        lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    if merge_line(content):
        lines += ["## Merged model", "", merge_line(content), ""]
    lines += ["## Time", ""]
    lines += [f"- {kind.replace('_', ' ')}: {s:.0f} s" for kind, s in content["seconds"].items()]
    return "\n".join(lines) + "\n"


def merge_line(content: Mapping[str, Any]) -> str:
    """How the reloaded merged model compares with the trained one, in a sentence, or nothing."""
    if not content["merge"]:
        return ""
    dtype, verification = content["merge"]["merge"]["dtype"], content["merge"]["verification"]
    if verification is None:
        return f"The merged {dtype} model was not compared with the trained one (--no-verify)."
    row = verification["comparisons"][0]
    return (
        f"Reloaded with plain transformers, the merged {dtype} model "
        f"prefers the trained model's token at {100 * row['top1_agreement']:.1f} % of "
        f"{row['positions']} positions of prompts and greedy answers; mean KL "
        f"{row['mean_kl']:.1e} nats per token."
    )


def _compared(recipe: Recipe, results: Mapping[str, EvaluationResult]) -> list[tuple[str, str]]:
    """Pairs of parts whose difference is of interest, (before, after)."""
    pairs = []
    for stage in recipe.stages:
        pairs += [("base", f"{arm}/{stage.name}") for arm in recipe.arms]
        pairs.append((f"plain/{stage.name}", f"ogpsa/{stage.name}"))
    return [pair for pair in pairs if pair[0] in results and pair[1] in results]


def versions() -> dict[str, str]:
    """Versions of this library and of those it works on."""
    found = {"lora-ogpsa": __version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
