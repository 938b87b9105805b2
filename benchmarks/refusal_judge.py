"""How often the phrase judge takes an ordinary answer for a refusal, and misses a written one.

    python benchmarks/refusal_judge.py --data FOLDER

Reads the answers of FOLDER's general_reference.jsonl and eval_general.jsonl, of which none is a
refusal in substance, and those of the embedded safety set, which all are.

Results go to benchmarks/results/refusal_judge.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import common

from lora_ogpsa import data
from lora_ogpsa.evaluation.judges import RefusalPhraseJudge

FILES = ("general_reference.jsonl", "eval_general.jsonl")


def count(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many answers there are, and which are called refusals."""
    answers = [row["messages"][-1]["content"] for row in rows]
    flagged = [answer for answer in answers if RefusalPhraseJudge.refuses(answer)]
    return {"answers": len(answers), "called_refusals": len(flagged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two files")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "refusal_judge.json")
    options = parser.parse_args()
    report = {
        "judge": RefusalPhraseJudge().identity,
        **{name: count(data.load_rows(str(options.data / name))) for name in FILES},
        "embedded:safety_sft": count(data.load_rows("embedded:safety_sft")),
    }
    common.write(options.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
