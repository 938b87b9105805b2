"""How well the base model itself tells harmful prompts from harmless look-alikes, layer by layer.

    python benchmarks/separability.py --data FOLDER

It says what there is to refuse by, and so what the methods of the trade-off benchmark leave
unused; it is no bound, being one direction of one layer. Per layer, one direction is taken from the
hidden states of a few prompts of the safety training data and as many of the references, at the
last token before the answer: the first generalised eigenvector of their second moments, the
direction along which safety prompts differ most from what references do. No gradient is taken. Then
the prompts to measure on are put in the order of their coordinate along it.

Results go to benchmarks/results/separability_MODEL.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from rich.progress import track
from torch import Tensor
from tradeoff_data import Source

from lora_ogpsa import chat, data
from lora_ogpsa.models import load_model

REFUSED = 0.98  # share of harmful prompts that a threshold on the coordinate has to find


def direction(safety: Tensor, references: Tensor, ridge: float) -> Tensor:
    """The first generalised eigenvector of two second moments, of a mean coordinate of 1.

    Args:
        safety: hidden states of safety prompts [n, d].
        references: of reference prompts [m, d].
        ridge: added to the diagonal of the references' moment, as a share of its mean.

    Returns:
        [d], float64.
    """
    moment = references.double().T @ references.double() / len(references)
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    factor = torch.linalg.cholesky(moment)
    whitened = torch.linalg.solve_triangular(factor, safety.double().T, upper=False)
    first = torch.linalg.svd(whitened, full_matrices=False)[0][:, :1]
    found = torch.linalg.solve_triangular(factor.T, first, upper=True).squeeze(1)
    return found / (safety.double() @ found).mean()


def separation(harmful: Tensor, harmless: Tensor) -> dict[str, float]:
    """How well a coordinate tells two sets of prompts apart.

    Args:
        harmful: coordinates [n].
        harmless: coordinates [m].

    Returns:
        ``auc``, the chance that a harmful prompt has the higher one, and ``harmless_above``, the
        share of harmless prompts above the threshold that finds `REFUSED` of the harmful ones.
    """
    above = harmful.unsqueeze(1) - harmless
    threshold = harmful.sort().values[int((1 - REFUSED) * len(harmful))]
    return {
        "auc": ((above > 0).double() + 0.5 * (above == 0)).mean().item(),
        "harmless_above": (harmless >= threshold).double().mean().item(),
    }


@torch.no_grad()
def hidden_states(model: Any, tokenizer: Any, prompts: Sequence[str], title: str) -> Tensor:
    """Hidden states [n, layers + 1, d] at the last token before the answer, embeddings first."""
    found = []
    for prompt in track(prompts, title):
        messages = [{"role": "user", "content": prompt}]
        ids, _ = chat.encode(tokenizer, messages, None, max_length=1024)
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        found.append(torch.stack([state[0, -1] for state in states]))
    return torch.stack(found)


def prompts_of(source: Source, references: int) -> tuple[list[str], list[str]]:
    """Prompts of the safety training data, and of the two references in turn."""
    safety = [chat.as_messages(row)[0][-1]["content"] for row in source.safety_rows()[1]]
    drawn = [
        [
            chat.as_messages(row)[0][-1]["content"]
            for row in data.load_rows(reference.data)
            if reference.kind in (row.get("kind"), row.get("source"))
        ]
        for reference in source.references("shared")
    ]
    mixed = [prompt for pair in zip(*drawn, strict=False) for prompt in pair]
    return safety, mixed[:references]


def evaluation_prompts(source: Source) -> dict[str, list[str]]:
    """Prompts to measure on: harmful ones by their source, and harmless ones."""
    if source.folder is None:
        names = {"embedded": "embedded:eval_harmful", "harmless": "embedded:eval_harmless"}
        return {name: [r["prompt"] for r in data.load_rows(file)] for name, file in names.items()}
    rows = data.load_rows(source.path("harmful"))
    sets: dict[str, list[str]] = {}
    for row in rows:
        sets.setdefault(row["source"], []).append(row["prompt"])
    # As many of each source, spread over it.
    least = min(map(len, sets.values()))
    sets = {name: found[:: len(found) // least][:least] for name, found in sets.items()}
    harmless = data.load_rows(source.path("harmless"))
    return {**sets, "harmless": [r["prompt"] for r in harmless if r["label"] == "safe"]}


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="embedded", help="folder with the benchmark's files, or `embedded`")
    add("--model", default="embedded", help="folder or hub id, or `embedded`")
    add("--prompts", type=int, default=48, help="of the safety data, and of the references")
    add("--draws", type=int, default=3, help="disjoint sets of safety prompts, one direction each")
    add("--ridge", type=float, default=1.0)
    add("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    source = Source.named(options.data)
    model, tokenizer = load_model(options.model, dtype="float32")
    model.eval()
    safety, references = prompts_of(source, options.prompts)
    wanted = options.prompts * options.draws
    if len(safety) < wanted:
        parser.error(f"{options.draws} draws of {options.prompts} need {wanted} safety prompts.")
    sets = evaluation_prompts(source)
    learned = hidden_states(model, tokenizer, safety[:wanted], "safety prompts")
    kept = hidden_states(model, tokenizer, references, "references")
    measured = {
        name: hidden_states(model, tokenizer, prompts, name) for name, prompts in sets.items()
    }
    harmless = measured.pop("harmless")
    layers = []
    # The first entry is the embedding of a token that all prompts have in common.
    for layer in range(1, learned.shape[1]):
        draws = []
        for part in learned[:, layer].split(options.prompts):
            along = direction(part, kept[:, layer], options.ridge)
            coordinates = {n: states[:, layer].double() @ along for n, states in measured.items()}
            safe = harmless[:, layer].double() @ along
            found = {
                f"auc_{name}": separation(values, safe)["auc"]
                for name, values in coordinates.items()
            }
            draws.append({**separation(torch.cat(list(coordinates.values())), safe), **found})
        means = {name: sum(d[name] for d in draws) / len(draws) for name in draws[0]}
        layers.append({"layer": layer, **means, "draws": draws})
    report = {
        "settings": {
            **{k: v for k, v in vars(options).items() if k != "results"},
            "data": source.identity(),
            "model": Path(options.model).name,
            "evaluated": {name: len(prompts) for name, prompts in sets.items()},
            "refused": REFUSED,
        },
        **common.environment(torch.device("cpu")),
        "layers": layers,
    }
    name = "smollm2" if options.model == "embedded" else Path(options.model).name
    common.write(options.results / f"separability_{name}.json", report)
    columns = [key for key in layers[0] if key not in ("layer", "draws")]
    rows = [[str(row["layer"]), *(f"{row[c]:.3f}" for c in columns)] for row in layers]
    print(common.table(["after layer", *columns], rows))


if __name__ == "__main__":
    main()
