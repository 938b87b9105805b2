"""Safety against utility: OGPSA's rules and every rival on one model, one data set, equal budgets.

    python benchmarks/tradeoff.py --data ../shared/data --stage sft --seeds 0 1 2

Every method gets the same model, data order, optimizer, steps and number of reference-example
passes. One cell is one method with one seed; a finished cell is kept in `--cells` and not run
again, so an interrupted benchmark goes on where it stopped, and several processes with different
`--methods` may share the folder. Its adapter is kept too: further `--strengths` are measured
without training again. On another machine `--extend` takes the cells out of an earlier result, to
add methods or seeds to its table. From all finished cells of the setting come the JSON with its
`summary`, a Markdown table and a picture; `--summary-only` makes them without running anything.

`--data embedded` runs on the data in the package, a folder on the files named in
`tradeoff_data.FILES`. A variant of the default rule is named on the command line:
`--ogpsa 'tight={"budget": 0.05}'`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rivals import METHODS, Method, ogpsa_method
from tradeoff_cells import Cells, Setting, default_passes
from tradeoff_data import Source
from tradeoff_measures import Limits
from tradeoff_stages import StageSettings, fastest_precision
from tradeoff_summary import MARGIN, summarise, table
from transformers.utils import logging as hf_logging

DEFAULT_METHODS = ["plain", "default"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", choices=["sft", "dpo", "sft_dpo"], default="sft")
    add("--data", default="embedded", help="folder with the files, or `embedded`")
    add(
        "--embedded-share",
        type=float,
        default=0.0,
        help="part of the SFT rows taken from the package beside those of a folder",
    )
    add(
        "--own-pairs",
        type=int,
        default=0,
        metavar="N",
        help="DPO on so many of the SFT rows, whose answers are preferred to the base model's "
        "own, and not on the folder's pairs",
    )
    add("--model", default="embedded", help="folder or hub id, or `embedded`")
    add("--load-in-4bit", action="store_true", help="NF4 base")
    add(
        "--methods",
        nargs="*",
        default=DEFAULT_METHODS,
        metavar="NAME",
        help=f"any of {', '.join(METHODS)}, or `all`; none for those of `--ogpsa` alone",
    )
    add(
        "--ogpsa",
        nargs="+",
        default=[],
        metavar="NAME=JSON",
        help="more OGPSA rules, by their settings",
    )
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=60, help="of the SFT stage")
    add("--dpo-steps", type=int, default=60)
    add("--batch", type=int, default=8, help="examples per step of the SFT stage")
    add("--dpo-batch", type=int, default=4, help="pairs per step of the DPO stage")
    add("--learning-rate", type=float, default=5e-4)
    add("--dpo-learning-rate", type=float, default=1e-4)
    add("--beta", type=float, default=0.1, help="of the preference loss")
    add(
        "--likelihood",
        type=float,
        default=0.0,
        help="weight of the chosen answers' negative log-likelihood beside the preference loss",
    )
    add(
        "--schedule",
        choices=["constant", "linear"],
        default="constant",
        help="of the learning rate after its warm-up; linear ends at zero",
    )
    add("--max-length", type=int, default=256, help="tokens of a training example")
    add(
        "--precision",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of forward passes; `auto` is what is fast on this machine",
    )
    add(
        "--reference-passes",
        type=float,
        default=None,
        help="reference examples per step; as many as the default rule takes if not given",
    )
    add("--checkpoints", type=int, default=4, help="measurements per stage, evenly spaced")
    add("--checkpoint-steps", nargs="+", type=int, help="the steps themselves; the end is added")
    add(
        "--strengths",
        nargs="+",
        type=float,
        default=[],
        help="factors on the trained adapter; methods are then compared where these make them "
        "as safe as plain training, not along the run; those beyond 1 only until they suffice",
    )
    add("--limit", type=int, default=60, help="prompts per refusal measure")
    add(
        "--general-limit",
        type=int,
        default=0,
        help="ordinary requests whose refusals are measured too; none if not given",
    )
    add("--nll-limit", type=int, default=32, help="rows per likelihood measure")
    add("--kl-limit", type=int, default=12, help="rows per divergence from the base model")
    add("--choice-limit", type=int, default=60, help="multiple-choice questions; 0 for none")
    add("--new-tokens", type=int, default=24, help="length of judged answers")
    add("--jobs", type=int, default=1, help="cells at a time, each in a process of its own")
    add("--cells", type=Path, default=Path("outputs/tradeoff"))
    add(
        "--extend",
        type=Path,
        metavar="JSON",
        help="an earlier result of the same setting, whose cells count as finished: to add methods "
        "or seeds to its table",
    )
    add("--output", type=Path, help="JSON; benchmarks/results/tradeoff_STAGE.json if not given")
    add("--summary-only", action="store_true", help="run nothing, use the finished cells")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """What all cells share, from the command line."""
    stages = {
        "sft": StageSettings(
            "sft",
            options.steps,
            options.batch,
            options.learning_rate,
            schedule=options.schedule,
        ),
        "dpo": StageSettings(
            "dpo",
            options.dpo_steps,
            options.dpo_batch,
            options.dpo_learning_rate,
            options.beta,
            options.schedule,
            options.likelihood,
        ),
    }
    chosen = tuple(stages[name] for name in options.stage.split("_"))
    passes = options.reference_passes
    return Setting(
        source=Source.named(options.data, options.embedded_share, options.own_pairs),
        model=options.model,
        load_in_4bit=options.load_in_4bit,
        stages=chosen,
        max_length=options.max_length,
        precision=fastest_precision() if options.precision == "auto" else options.precision,
        passes=default_passes() if passes is None else passes,
        checkpoints={
            stage.name: checkpoints(stage.steps, options.checkpoints, options.checkpoint_steps)
            for stage in chosen
        },
        limits=Limits(
            options.limit,
            options.nll_limit,
            options.kl_limit,
            options.choice_limit,
            options.new_tokens,
            options.general_limit,
        ),
        strengths=tuple(sorted(set(options.strengths) - {1.0})),
    )


def checkpoints(steps: int, count: int, named: list[int] | None) -> tuple[int, ...]:
    """After which of `steps` a run is measured: always at the end."""
    inner = named or [round(steps * (i + 1) / count) for i in range(count)]
    return tuple(sorted({step for step in inner if 0 < step < steps} | {steps}))


def methods_of(options: argparse.Namespace) -> dict[str, Method]:
    """The methods asked for, by name."""
    names = list(METHODS) if options.methods == ["all"] else options.methods
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"Unknown methods {unknown}. There are {', '.join(METHODS)}.")
    chosen = {name: METHODS[name] for name in names}
    for text in options.ogpsa:
        name, _, settings = text.partition("=")
        if name in METHODS:
            raise SystemExit(f"`{name}` is a method already; give the variant another name.")
        chosen[name] = ogpsa_method(name, json.loads(settings), settings)
    return chosen


def extend(cells: Cells, path: Path) -> None:
    """Take the cells of an earlier result as finished.

    Raises:
        SystemExit: it cannot be read, or has none of this setting.
    """
    try:
        taken = cells.take(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result of this benchmark: {error!r}") from error
    if not taken:
        raise SystemExit(
            f"{path} is of another setting: give the options with which it was made, "
            "`--methods` and `--seeds` apart."
        )


def run(
    cells: Cells, methods: dict[str, Method], seeds: list[int], jobs: int = 1
) -> list[dict[str, str | int]]:
    """Run what is not finished. A cell that fails does not take the others with it.

    Args:
        cells: the folder and its setting.
        methods: by name.
        seeds: of each method.
        jobs: cells at a time. A small model leaves most of a GPU idle.

    Returns:
        The failures.
    """
    began = time.time()
    hf_logging.disable_progress_bar()
    cells.run_base(lambda text: _say("base", began, text))
    todo = [(method, seed) for seed in seeds for method in methods.values()]
    titled = [
        (cells, method, seed, f"[{number}/{len(todo)}] {method.name} seed {seed}", began)
        for number, (method, seed) in enumerate(todo, start=1)
    ]
    if jobs == 1:
        found = [_run_cell(*arguments) for arguments in titled]
    else:
        # Not forked: CUDA would not survive it.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, context, initializer=hf_logging.disable_progress_bar
        ) as pool:
            found = list(pool.map(_run_cell, *zip(*titled, strict=True)))
    return [failure for failure in found if failure is not None]


def _run_cell(
    cells: Cells, method: Method, seed: int, title: str, began: float
) -> dict[str, str | int] | None:
    """Run one cell; the failure, if it is one."""
    try:
        cells.run(method, seed, lambda text: _say(title, began, text))
    except Exception as error:  # whatever a rival's own library raises
        traceback.print_exc()
        return {"method": method.name, "seed": seed, "error": repr(error)}
    return None


def _say(title: str, began: float, text: str) -> None:
    minutes = (time.time() - began) / 60
    print(f"{minutes:6.1f} min  {title}: {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run, summarise, and write JSON, table and picture.

    Raises:
        SystemExit: cells failed, or there are none.
    """
    options = parse(arguments)
    setting, methods = setting_of(options), methods_of(options)
    cells = Cells(options.cells, setting)
    if options.extend is not None:
        extend(cells, options.extend)
    failures = [] if options.summary_only else run(cells, methods, options.seeds, options.jobs)
    finished = cells.all({**METHODS, **methods})
    if not finished:
        raise SystemExit(f"{options.cells} holds no finished cell of this setting.")
    summary = summarise(finished)
    settings = {"stage": options.stage, "margin": MARGIN, **setting.identity()}
    if setting.strengths:
        settings["strengths"] = list(setting.strengths)
    report: dict[str, Any] = {
        "settings": settings,
        # Cells may come from several machines.
        "environments": [
            json.loads(text)
            for text in sorted({json.dumps(cell["environment"]) for cell in finished})
        ],
        "failures": failures,
        "cells": finished,
        "summary": summary,
    }
    output = options.output or Path(f"benchmarks/results/tradeoff_{options.stage}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(summary)}")
    # Of a grid only its best setting, or nothing could be told apart.
    drawn = [cell for cell in finished if summary[cell["method"]].get("best_of_grid", True)]
    draw(drawn, output.with_suffix(".png"))
    if failures:
        raise SystemExit(f"{len(failures)} cells failed: {json.dumps(failures)}")


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """The picture, where matplotlib is installed."""
    try:
        from tradeoff_picture import picture
    except ImportError:
        print("No picture: `pip install matplotlib` for one.", file=sys.stderr)
        return
    picture(cells, path)


if __name__ == "__main__":
    main()
