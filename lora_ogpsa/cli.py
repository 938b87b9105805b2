"""`lora-ogpsa`: the command line. Heavy imports happen inside the commands, so help is quick."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_ogpsa import cli_export
from lora_ogpsa.cli_errors import fail, one_line_errors

app = typer.Typer(
    name="lora-ogpsa",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Safety-align chat models with LoRA or QLoRA without paying the alignment tax.\n\n"
        "Try it on the small model that comes with the package: "
        "`lora-ogpsa run recipes/quickstart.yaml`"
    ),
)


_Smoke = Annotated[
    bool, typer.Option("--smoke", help="A few steps and prompts, to see that it all works.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and the memory it needs; do nothing.")
]
_Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable."),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the earlier results in the folder first.")
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what was interrupted; finished parts stay.")
]


def main() -> None:
    """Entry point of the console script."""
    # Threads that spin while they wait for one another make a CPU that is shared with other work
    # three to fifteen times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A question mark for what the terminal cannot show, rather than no result at all.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


@app.command()
@one_line_errors
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/recipes.md explains its keys.")],
    smoke: _Smoke = False,
    dry_run: _DryRun = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where results go, instead of the recipe's `output_dir`.")
    ] = None,
    changes: _Changes = None,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
) -> None:
    """Align a model as a recipe says: evaluate, train, evaluate, merge, report.

    For example:

        lora-ogpsa run recipes/quickstart.yaml

        lora-ogpsa run recipes/quickstart.yaml --set max_steps=20 --set ogpsa.budget=0.05

        lora-ogpsa run recipes/llama3_8b_sft_24gb.yaml --dry-run
    """
    if overwrite and resume:
        fail("--overwrite deletes the run that --resume goes on with. Pass one of them.")
    if dry_run:
        # A plan downloads nothing; read when the libraries are imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa.console import out
    from lora_ogpsa.recipe import load_recipe

    checked = load_recipe(recipe, overrides=changes or (), smoke=smoke, output_dir=output_dir)
    if dry_run:
        from lora_ogpsa.plan import make_plan, render

        out.print(render(make_plan(checked)), soft_wrap=True)
        return
    from lora_ogpsa.run import run as run_recipe

    run_recipe(checked, overwrite=overwrite, resume=resume)


@app.command()
@one_line_errors
def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/comparing.md explains more.")],
    rules: Annotated[
        str | None,
        typer.Option(help="Which update rules, such as `plain,default`. Default: the recipe's."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Which seeds, such as `0,1,2`. Default: the recipe's.")
    ] = None,
    smoke: _Smoke = False,
    dry_run: _DryRun = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where results go. Default: `output_dir`-compare.")
    ] = None,
    changes: _Changes = None,
    overwrite: _Overwrite = False,
    resume: _Resume = False,
) -> None:
    """Train a recipe under several update rules and seeds, and compare them at equal safety.

    Built-in rules: `plain` (no projection), `default` (the recipe's own settings), `paper` (the
    published algorithm). A recipe can name more. Finished trainings are kept: with --resume, rules
    and seeds can be added.

    For example:

        lora-ogpsa compare recipes/quickstart.yaml

        lora-ogpsa compare recipes/quickstart.yaml --rules plain,default --seeds 0,1

        lora-ogpsa compare recipes/quickstart.yaml --rules plain,default,paper --resume
    """
    if overwrite and resume:
        fail("--overwrite deletes the comparison that --resume goes on with. Pass one of them.")
    if dry_run:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa.compare import compare as compare_rules
    from lora_ogpsa.compare import in_own_folder, plan_cells
    from lora_ogpsa.compare_settings import parse_names, parse_seeds
    from lora_ogpsa.recipe import load_recipe

    checked = load_recipe(recipe, overrides=changes or (), smoke=smoke, output_dir=output_dir)
    if output_dir is None:
        checked = in_own_folder(checked)
    chosen = None if rules is None else parse_names(rules)
    numbers = None if seeds is None else parse_seeds(seeds)
    if smoke and numbers is None:
        numbers = list(checked.comparison.seeds[:1])
    if dry_run:
        from lora_ogpsa.console import out
        from lora_ogpsa.plan import make_plan, render

        cells = plan_cells(checked, rules=chosen, seeds=numbers)
        out.print(render(make_plan(checked, cells), cells), soft_wrap=True)
        return
    compare_rules(checked, rules=chosen, seeds=numbers, overwrite=overwrite, resume=resume)


@app.command()
@one_line_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of `run` or `compare`.")],
) -> None:
    """Write the report of a run or a comparison again, from what lies in its folder.

    One HTML page that loads nothing, and the same as Markdown with pictures beside it.

    For example:

        lora-ogpsa report outputs/quickstart
    """
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa.report import write_report

    typer.echo(f"report: {write_report(folder)}", err=True)


@app.command()
@one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Adapter folder, model folder, hub id, `embedded`.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Measure what this recipe's `evaluation:` section says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most prompts per measure.")] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(help="Load the base in 4 bits; for an adapter of ours, as in its training."),
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            help="How much of the adapter's change is applied, as in `merge`; repeatable, a column "
            "each.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Also write the results as JSON; of several weights, the last."),
    ] = None,
) -> None:
    """Measure safety, over-refusal, utility and divergence; an adapter beside its base.

    For example:

        lora-ogpsa evaluate outputs/quickstart/adapter

        lora-ogpsa evaluate outputs/quickstart/adapter --weight 1 --weight 1.5 --weight 2

        lora-ogpsa evaluate outputs/quickstart/merged --limit 40 --output merged.json
    """
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa.console import out, say
    from lora_ogpsa.evaluation.result import check_result_file
    from lora_ogpsa.measure import measure_model
    from lora_ogpsa.results import results_table

    if output is not None:  # now rather than after hours
        check_result_file(output)
    columns = measure_model(
        model, recipe=recipe, limit=limit, load_in_4bit=load_in_4bit, weights=weights or ()
    )
    if output is not None:
        list(columns.values())[-1].save(output)
    out.print(results_table(columns))
    for heading, result in columns.items():
        for note in result.notes:
            say(f"{heading}: {note}")


app.command()(cli_export.merge)
app.command()(cli_export.export)


@app.command()
def version() -> None:
    """Print the versions of this library and of those it works on.

    For example:

        lora-ogpsa version
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from lora_ogpsa import __version__

    typer.echo(f"lora-ogpsa {__version__}")
    for library in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        try:
            typer.echo(f"{library} {installed(library)}")
        except PackageNotFoundError:
            typer.echo(f"{library} is missing")
