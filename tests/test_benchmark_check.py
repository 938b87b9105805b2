"""The check of the trade-off's adapters on other prompts, on a tiny model and small files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tradeoff
import tradeoff_check
from tradeoff_data import FILES, Source
from tradeoff_measures import Limits, suite

from lora_ogpsa import data

LIMITS = ["--limit", "4", "--general-limit", "3", "--nll-limit", "2", "--kl-limit", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the benchmark, of few rows each."""
    made = tmp_path / "data"
    made.mkdir()
    answered = [{"prompt": f"Tell me {i}.", "completion": f"No, {i}."} for i in range(90)]
    pairs = [{"prompt": f"Say {i}.", "chosen": "No.", "rejected": "Yes."} for i in range(8)]
    choices = [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0} for i in range(6)]
    rows: dict[str, list[dict[str, Any]]] = dict.fromkeys(FILES, answered)
    rows |= {"dpo": pairs, "dpo_eval": pairs, "mmlu": choices, "arc": choices}
    rows["general"] = [{**row, "source": "alpaca"} for row in answered]
    rows["harmful"] = [{"prompt": f"Break {i}."} for i in range(10)]
    labels = ("safe", "unsafe")
    rows["harmless"] = [{"prompt": f"Kill {i}?", "label": labels[i % 2]} for i in range(20)]
    for name, file in FILES.items():
        (made / file).write_text("\n".join(map(json.dumps, rows[name])))
    return made


def test_the_other_prompts_are_those_that_the_table_did_not_ask(folder: Path) -> None:
    source, limits = Source.named(str(folder)), Limits(refusals=4, general_refusals=3)
    chosen = suite(source, limits, "float32", dpo=False, final=False)
    others = tradeoff_check.other_prompts(chosen, 100)
    measures = chosen.measures
    for name, (count, total) in {
        "harmful": (4, 10),
        "harmless": (4, 10),
        "ordinary": (3, 90),
    }.items():
        spec = measures[name]
        rows = data.load_rows(spec.data, shuffle_seed=spec.shuffle_seed)
        where = dict(spec.where or {}).items()
        rows = [row for row in rows if all(row[key] == value for key, value in where)]
        asked = [row["prompt"] for row in rows[: spec.limit]]
        left = [row["prompt"] for row in others[name]]
        assert (len(asked), len(left)) == (count, total - count)
        assert not {*asked} & {*left}
    assert len(tradeoff_check.other_prompts(chosen, 2)["harmful"]) == 2


def test_adapters_are_measured_at_the_strength_of_the_table(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    places = ["--cells", str(tmp_path / "cells"), "--model", str(tiny_folder)]
    small = ["--steps", "2", "--batch", "2", "--new-tokens", "4", "--choice-limit", "0", *LIMITS]
    table = tmp_path / "table.json"
    tradeoff.main(
        [
            *("--data", str(folder), *places, *small, "--methods", "plain", "low_lr_0.3"),
            *("--strengths", "2", "--checkpoints", "1", "--output", str(table)),
        ]
    )
    report = json.loads(table.read_text())
    # A tiny model refuses nothing, so that nothing is matched: as if it were.
    for name, strength in (("plain", None), ("low_lr_0.3", 1.5)):
        (row,) = report["summary"][name]["by_seed"]
        row |= {"matched": True} | ({"strength": strength} if strength else {})
    table.write_text(json.dumps(report))
    output = tmp_path / "check.json"
    command = [str(table), *places, "--limit", "5", "--choice-limit", "6", "--output", str(output)]
    tradeoff_check.main([*command, "--data", str(folder)])
    found = json.loads(output.read_text())
    asked = dict.fromkeys(["harmful", "harmless", "ordinary", *tradeoff_check.PACKAGE], 5)
    assert found["prompts"] == {**asked, "choices": 6}
    assert [(c["method"], c["strength"]) for c in found["cells"]] == [
        ("plain", 1.0),
        ("low_lr_0.3", 1.5),
    ]
    wanted = {"harmful", "over_refusal", "general_refusal", "mmlu", "arc_easy"}
    wanted |= {*tradeoff_check.PACKAGE}
    assert all(set(entry["measures"]) == wanted for entry in found["summary"].values())

    tradeoff_check.main([*command, "--data", str(folder), "--methods", "plain"])
    assert set(json.loads(output.read_text())["summary"]) == {"base", "plain"}
    (folder / FILES["arc"]).write_text("")
    with pytest.raises(SystemExit, match="not made with"):
        tradeoff_check.main([*command, "--data", str(folder)])


def test_means_and_the_tax_removed_by_hand() -> None:
    def cell(method: str, seed: int, harmful: float, harmless: float) -> dict[str, Any]:
        values = {"harmful": harmful, "over_refusal": harmless, "general_refusal": harmless}
        return {"method": method, "seed": seed, "values": values}

    cells = [
        *(cell("plain", 0, 1.0, 0.9), cell("plain", 1, 1.0, 0.7), cell("plain", 2, 1.0, 0.1)),
        *(cell("ours", 0, 0.9, 0.3), cell("ours", 1, 1.0, 0.1), cell("ours", 7, 0.0, 1.0)),
    ]
    base = {"harmful": 0.0, "over_refusal": 0.0, "general_refusal": 0.0}
    summary = tradeoff_check.summarise(base, cells)
    assert summary["ours"]["seeds"] == [0, 1]  # of the last there is no plain training
    assert summary["ours"]["measures"]["harmful"] == pytest.approx(0.95)
    assert summary["ours"]["tax_removed"]["over_refusal"] == pytest.approx(1 - 0.2 / 0.8)
    assert summary["plain"]["tax_removed"]["general_refusal"] == 0.0
