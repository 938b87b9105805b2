"""`--dry-run`: what a recipe would do, and what it would cost, without doing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_ogpsa import chat, data
from lora_ogpsa.checks import check_adapters, check_arguments, check_data
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.memory import ModelSize, estimate, local_config, model_size
from lora_ogpsa.recipe import Recipe, Stage
from lora_ogpsa.reference import Reference
from lora_ogpsa.stage_data import check_batches, checked_rows

if TYPE_CHECKING:
    from lora_ogpsa.compare_cells import Cell

# Where no tokenizer is at hand.
_CHARACTERS_PER_TOKEN = 4
_SAMPLED = 200  # texts that a mean length is taken from


@dataclass
class StagePlan:
    """What a stage would do.

    Args:
        stage: the stage.
        rows: training rows; ``None`` if the data are not on this machine.
        tokens: of an average sequence, prompt and answer, or what is packed into one; the limit on
            length if that is unknown.
        steps: optimizer steps; ``None`` if that depends on unknown data.
        batch: rows per step, or packed sequences.
        overhead: tokens of the reference passes as a share of those of training; ``None`` without
            OGPSA.
        packed: how many sequences the rows are packed into; ``None`` if they are not.
        notes: what could not be found out.
    """

    stage: Stage
    rows: int | None
    tokens: int
    steps: int | None
    batch: int
    overhead: float | None
    packed: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def row_tokens(self) -> int:
        """Of an average row; a pair is two sequences."""
        return _sequences(self.stage) * self.tokens


@dataclass
class Plan:
    """What a recipe would do.

    Args:
        recipe: the recipe.
        size: of the model; ``None`` if nothing is known about it.
        stages: one plan each.
    """

    recipe: Recipe
    size: ModelSize | None
    stages: list[StagePlan]

    def memory(self) -> dict[str, float]:
        """Bytes by what they hold, of the stage that needs most."""
        if self.size is None:
            return {}
        found = [estimate(self.recipe, p.stage, self.size, p.tokens) for p in self.stages]
        return max(found, key=lambda parts: sum(parts.values()))


def make_plan(recipe: Recipe, cells: Sequence[Cell] = ()) -> Plan:
    """Resolve what can be resolved on this machine, and check what is here.

    Args:
        recipe: the recipe.
        cells: of a comparison, if the recipe is to be trained in one.

    Raises:
        OGPSAError: settings, or data or a model that are here, cannot work.
    """
    config = local_config(recipe.model["model_name_or_path"])
    check_arguments(recipe)
    if config is not None:
        for trained in {cell.rule: cell.recipe for cell in cells}.values() or [recipe]:
            check_adapters(trained, config)
    tokenizer = _local_tokenizer(recipe)
    stages = [_stage_plan(stage, tokenizer) for stage in recipe.stages]
    check_data(recipe, tokenizer, _is_here)
    return Plan(recipe, model_size(recipe), stages)


def _local_tokenizer(recipe: Recipe) -> Any | None:
    from transformers import AutoTokenizer

    from lora_ogpsa.models import EMBEDDED, checked_source, embedded_target

    name = recipe.model["model_name_or_path"]
    if name == EMBEDDED:
        name = str(embedded_target())
        if not Path(name).is_dir():
            return None  # reading it out of the GGUF file takes longer than all the rest
    try:
        return AutoTokenizer.from_pretrained(checked_source(name), local_files_only=True)
    except (OSError, ValueError):
        return None


def _stage_plan(stage: Stage, tokenizer: Any | None) -> StagePlan:
    notes: list[str] = []
    if tokenizer is None:
        notes.append(
            f"the tokenizer is not at hand; lengths are guessed, at {_CHARACTERS_PER_TOKEN} "
            "characters a token and without what a chat template adds"
        )
    batch = stage.argument("per_device_train_batch_size")
    batch *= stage.argument("gradient_accumulation_steps")
    longest = stage.argument("max_length") or 1024
    packing = bool(stage.argument("packing"))
    rows, packed, tokens = None, None, longest
    if _is_here(stage.dataset_name):
        found = checked_rows(stage, tokenizer)
        rows = len(found)
        if packing:
            lengths = _packed(stage, found, longest, tokenizer)
            packed, tokens = len(lengths), max(1, round(sum(lengths) / len(lengths)))
            check_batches(stage, packed)
        else:
            tokens = _training_tokens(stage, found, longest, tokenizer)
    else:
        notes.append(
            f"{stage.dataset_name} is not on this machine; its "
            f"{'packed sequences' if packing else 'rows'} are taken to have {longest} tokens"
        )
    steps = stage.argument("max_steps")
    if steps is None or steps <= 0:
        known = packed if packing else stage.dataset_limit if rows is None else rows
        steps = None if known is None else _steps(stage, known)
    overhead = None
    if stage.ogpsa is not None:
        trained = batch * tokens * _sequences(stage)
        overhead = _overhead(stage.ogpsa, stage.references, trained, tokenizer, notes)
    return StagePlan(stage, rows, tokens, steps, batch, overhead, packed, notes)


def _is_here(name: str) -> bool:
    """Whether `name` is a local data set, or a path that should be one."""
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith(".") or path.suffix in data.FILE_TYPES
    return name.startswith("embedded:") or path.exists() or is_path


def _steps(stage: Stage, sequences: int) -> int:
    """Optimizer steps of all epochs, as the Trainer counts them."""
    batches = sequences / stage.argument("per_device_train_batch_size")
    batches = int(batches) if stage.argument("dataloader_drop_last") else math.ceil(batches)
    steps = max(1, math.ceil(batches / stage.argument("gradient_accumulation_steps")))
    return math.ceil(steps * stage.argument("num_train_epochs"))


def _sequences(stage: Stage) -> int:
    """How many sequences a row is trained as."""
    return 2 if stage.trainer == "dpo" else 1


def _training_tokens(
    stage: Stage, rows: list[dict[str, Any]], longest: int, tokenizer: Any | None
) -> int:
    """Tokens of an average sequence."""
    # With `rejected: base` the rejected side takes the model to make, and is about as long.
    sides = ["chosen", "rejected"] if "chosen" in rows[0] else ["completion"]
    counts = [
        _tokens(row["prompt"], row[side][0]["content"], longest, tokenizer, stage.dataset_name)
        for row in rows[:: max(1, len(rows) // _SAMPLED)]
        for side in sides
    ]
    return max(1, round(sum(counts) / len(counts)))


def _packed(
    stage: Stage, rows: list[dict[str, Any]], longest: int, tokenizer: Any | None
) -> list[int]:
    """Tokens of the sequences that TRL packs the rows into, which depend on every row."""
    import datasets
    from trl import pack_dataset

    # As TRL encodes them: whole, with what a template has behind the end of the turn.
    turns = [[*row["prompt"], *row["completion"]] for row in rows]
    if tokenizer is None:
        lengths = [_guessed(sum(len(turn["content"]) for turn in row)) for row in turns]
    else:
        texts = [chat.render(tokenizer, row, stage.dataset_name) for row in turns]
        lengths = list(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
    table = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    if stage.argument("shuffle_dataset"):
        table = table.shuffle(seed=stage.argument("seed"))
    given = {"num_proc": stage.argument("dataset_num_proc")}
    packed = pack_dataset(table, longest, stage.argument("packing_strategy"), given)
    return [len(ids) for ids in packed["input_ids"]]


def _overhead(
    config: OGPSAConfig,
    references: tuple[Reference, ...],
    trained: int,
    tokenizer: Any | None,
    notes: list[str],
) -> float:
    """n_ref · T_ref / (refresh_every · batch · T), of the training tokens."""
    lengths = []
    for reference in references:
        if _is_here(str(reference.data)):
            length = _example_tokens(reference, tokenizer)
        else:
            length = reference.max_length
            notes.append(f"{reference.data} is not on this machine; reference lengths are guessed")
        lengths.append(length)
    shares = [reference.share for reference in references]
    mean = sum(s * n for s, n in zip(shares, lengths, strict=True)) / sum(shares)
    return (config.references_per_refresh or 1) * mean / ((config.refresh_every or 1) * trained)


def _example_tokens(reference: Reference, tokenizer: Any | None) -> float:
    """Tokens of an average example of a reference, by the first of its rows."""
    rows = reference.rows()[:_SAMPLED]
    return sum(_tokens_of_row(reference, row, number, tokenizer) for number, row in rows) / len(
        rows
    )


def _tokens_of_row(
    reference: Reference, row: Mapping[str, Any], number: int, tokenizer: Any | None
) -> int:
    place, longest = f"reference `{reference.name}`, row {number}", reference.max_length
    if "input_ids" in row:
        return min(longest, len(row["input_ids"]))
    if reference.loss == "dpo":
        prompt, *answers = chat.as_preference(row, name=place)
        return sum(_tokens(prompt, answer, longest, tokenizer, place) for answer in answers)
    messages, answer = chat.as_messages(row, name=place)
    if reference.loss == "sft":
        return _tokens(messages, answer, longest, tokenizer, place)
    return _tokens(messages, None, longest, tokenizer, place) + reference.max_new_tokens


def _tokens(
    messages: list[dict[str, Any]],
    answer: str | None,
    longest: int,
    tokenizer: Any | None,
    place: str,
) -> int:
    """Tokens of a conversation and of the answer to it, as it is trained on."""
    if tokenizer is not None:
        return sum(
            map(len, chat.encode(tokenizer, messages, answer, max_length=longest, name=place))
        )
    characters = sum(len(turn["content"]) for turn in messages) + len(answer or "")
    return min(longest, _guessed(characters))


def _guessed(characters: int) -> int:
    return max(1, round(characters / _CHARACTERS_PER_TOKEN))


# ------------------------------------------------------------------------------------ rendering


def render(plan: Plan, cells: Sequence[Cell] = ()) -> RenderableType:
    """The plan as text and tables.

    Args:
        plan: the plan.
        cells: of a comparison, if the recipe is to be trained in one.
    """
    recipe, model = plan.recipe, plan.recipe.model
    bits = "4-bit " + model["bnb_4bit_quant_type"].upper() if model["load_in_4bit"] else "16/32-bit"
    parts: list[RenderableType] = [
        Text(f"Plan of {recipe.source}", style="bold"),
        Text(
            f"model     {model['model_name_or_path']}, {bits}, {recipe.adapter}"
            + ("" if recipe.contrast else f" on {model['lora_target_modules']}")
        ),
        Text(f"output    {recipe.output_dir}"),
        *_run_lines(recipe, cells),
    ]
    if recipe.evaluation is not None:
        measures = ", ".join(
            f"{name} on {spec.data or ', '.join(spec.tasks)}"
            + (f" (first {limit})" if (limit := spec.limit or recipe.evaluation.limit) else "")
            for name, spec in recipe.evaluation.measures.items()
        )
        parts.append(Text(f"measures  {measures}"))
    for stage in plan.stages:
        parts += _stage_lines(stage)
    parts += _memory_lines(plan)
    return Group(*parts)


def _run_lines(recipe: Recipe, cells: Sequence[Cell]) -> list[RenderableType]:
    if not cells:
        merged = f"; merged in {recipe.merge}" if recipe.merge else ""
        return [Text(f"runs      {' and '.join(recipe.arms)}{merged}")]
    rules = ", ".join(dict.fromkeys(cell.rule for cell in cells))
    seeds = ", ".join(map(str, dict.fromkeys(cell.seed for cell in cells)))
    trainings = len(cells) * len(recipe.stages)
    evaluations = 1 + trainings * cells[0].checkpoints
    return [
        Text(f"rules     {rules}"),
        Text(f"seeds     {seeds}"),
        Text(f"in all    {trainings} trainings and up to {evaluations} evaluations"),
    ]


def _stage_lines(plan: StagePlan) -> list[RenderableType]:
    stage = plan.stage
    lines = [Text(f"\nStage {stage.name}", style="bold")]
    unknown = f"up to {stage.dataset_limit}" if stage.dataset_limit else "an unknown number of"
    rows = unknown if plan.rows is None else str(plan.rows)
    steps = "an unknown number of" if plan.steps is None else str(plan.steps)
    units = f"rows of about {plan.row_tokens} tokens"
    if plan.packed is not None:
        units = f"rows, packed into {plan.packed} sequences of about {plan.tokens} tokens"
    lines.append(Text(f"data      {stage.dataset_name}: {rows} {units}"))
    batched = "packed sequences" if stage.argument("packing") else "rows"
    total = "" if plan.steps is None else f", {plan.steps * plan.batch * plan.row_tokens:,} tokens"
    lines.append(
        Text(
            f"training  {stage.trainer.upper()}, {steps} steps of {plan.batch} {batched}{total}, "
            f"learning rate {stage.argument('learning_rate'):g}"
        )
    )
    if stage.rejected == "base":
        lines.append(Text("pairs     chosen: the data's answers; rejected: the base model's own"))
    if stage.acting is None:
        lines.append(Text("OGPSA     off"))
    else:
        settings = ", ".join(f"{k}={v}" for k, v in shown_settings(stage.acting).items())
        lines.append(Text(f"OGPSA     {settings}"))
        for r in stage.references:
            kind = f" ({r.kind})" if r.kind else ""
            lines.append(
                Text(f"reference {r.name}: {r.loss} on {r.data}{kind}, up to {r.limit} rows")
            )
        share = 100 * (plan.overhead or 0)
        lines.append(
            Text(f"overhead  about {share:.0f} % of the training tokens, in reference examples")
        )
    lines += [Text(f"note      {note}", style="yellow") for note in dict.fromkeys(plan.notes)]
    return list(lines)


def shown_settings(config: OGPSAConfig) -> dict[str, Any]:
    """The resolved settings that have a say under the chosen constraint."""
    of_bases = ("rank", "energy", "sketch_size", "rows", "basis_dtype", "offload")
    idle = {
        "budget": (*of_bases, "restoration"),
        "halfspace": (*of_bases, "budget", "recovery"),
        "orthogonal": ("budget", "recovery", "max_correction", "penalty"),
    }[config.constraint]
    skipped = {*idle, "preset" if config.preset is None else ""}
    if config.restoration == 0:
        skipped |= {"restoration", "restoration_cap"}
    if config.refresh == "stream":
        skipped |= {"early_refreshes", "adaptive_threshold"}
    if config.constraint == "halfspace":
        skipped.add("max_correction")
    if config.penalty == 0:
        skipped.add("penalty_of")
    return {k: v for k, v in config.to_dict().items() if k not in skipped}


def _memory_lines(plan: Plan) -> list[RenderableType]:
    if plan.size is None:
        return [
            Text(
                "\nnote      the model is not on this machine and its name says nothing of its "
                "size, so there is no memory estimate",
                style="yellow",
            )
        ]
    table = Table(title="\nMemory on the device", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("GB", justify="right")
    parts = plan.memory()
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("in all", f"{sum(parts.values()) / 1e9:.2f}")
    billions = (
        f"{plan.size.parameters / 1e9:.2f} B parameters, {plan.size.adapter / 1e6:.1f} M trained"
    )
    lines: list[RenderableType] = [table, Text(billions)]
    if plan.size.note:
        lines.append(Text(f"note      sizes are {plan.size.note}", style="yellow"))
    if not plan.size.layers:
        lines.append(Text("note      activations come on top", style="yellow"))
    return lines
