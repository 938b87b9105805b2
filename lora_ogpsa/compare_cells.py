"""One cell of a comparison: a rule trained with a seed, evaluated at its checkpoints."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ogpsa.checkpoints import last_checkpoint
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation import EvaluationResult, evaluate
from lora_ogpsa.export.sources import adapter_weights
from lora_ogpsa.measure import recipe_suite
from lora_ogpsa.recipe import Recipe, Stage
from lora_ogpsa.results import save_result
from lora_ogpsa.stage_data import checked_rows
from lora_ogpsa.stages import (
    TRAINING_FILE,
    Trained,
    load_base,
    load_trained,
    read_record,
    train_stage,
)
from lora_ogpsa.training_record import POINTS_FOLDER, point_folder


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison.

    Attributes:
        rule: name of the update rule.
        seed: of everything random in it.
        recipe: the run as a recipe of its own; its `output_dir` is the cell's folder.
        checkpoints: at how many steps of each stage the model is evaluated.
    """

    rule: str
    seed: int
    recipe: Recipe
    checkpoints: int

    @property
    def folder(self) -> Path:
        """Where everything of this cell lies."""
        return self.recipe.output_dir

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.rule}, seed {self.seed}"

    def stage_folder(self, stage: Stage) -> Path:
        """Where adapter, checkpoints and evaluations of a stage lie."""
        return self.folder / stage.name

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """The record of a finished training; ``None`` before."""
        path = self.stage_folder(stage) / "adapter" / TRAINING_FILE
        return read_record(path) if path.is_file() else None

    def evaluation_file(self, stage: Stage, step: int) -> Path:
        """Where the evaluation after `step` steps of a stage lies."""
        return self.stage_folder(stage) / "evaluations" / f"step-{step}.json"

    def points(self) -> Iterator[tuple[Stage, int, int]]:
        """(stage, its step, steps in all) of the points of finished trainings."""
        before = 0
        for stage in self.recipe.stages:
            record = self.record(stage)
            if record is None:
                return
            for step in record["points"]:
                yield stage, step, before + step
            before += record["steps"]

    def is_complete(self) -> bool:
        """Whether every stage is trained and evaluated."""
        trained = all(self.record(stage) is not None for stage in self.recipe.stages)
        return trained and all(self.evaluation_file(s, n).is_file() for s, n, _ in self.points())

    def path(self) -> list[tuple[int, EvaluationResult]]:
        """(steps in all, evaluation) of what has been evaluated so far."""
        found = []
        for stage, step, total in self.points():
            file = self.evaluation_file(stage, step)
            if file.is_file():
                found.append((total, EvaluationResult.load(file)))
        return found

    def saved(self) -> str | None:
        """What of an unfinished cell is on disk, in a few words."""
        for stage in reversed(self.recipe.stages):
            folder = self.stage_folder(stage)
            if (folder / "adapter").is_dir():
                return f"the adapter {folder / 'adapter'}"
            if (checkpoint := last_checkpoint(folder)) is not None:
                return str(checkpoint)
        return None


def run_cell(cell: Cell, say: Callable[[str], None]) -> None:
    """Train and evaluate what is not there yet.

    Training goes on from the last checkpoint, an evaluation from its last batch.

    Args:
        cell: the cell.
        say: tells the user what is being done.
    """
    previous: Path | None = None
    for stage in cell.recipe.stages:
        folder = cell.stage_folder(stage)
        trained = _train(cell, stage, previous, say) if cell.record(stage) is None else None
        _evaluate(cell, stage, trained, say)
        previous = folder / "adapter"
        del trained
        gc.collect()


def _train(cell: Cell, stage: Stage, previous: Path | None, say: Callable[[str], None]) -> Trained:
    folder = cell.stage_folder(stage)
    title = f"{cell.title}: training {stage.name}"
    say(title)
    # A base that has answered nothing: evaluating packs 4-bit layers of a CPU for inference.
    base = load_base(cell.recipe)
    trained = train_stage(
        cell.recipe,
        stage,
        base,
        checked_rows(stage, base[1]),
        folder,
        protected=stage.ogpsa is not None,
        start=previous,
        resume=True,
        points=cell.checkpoints,
        title=title,
    )
    if "save_steps" not in stage.training:
        # Made for --resume only; they hold the optimizer's state and are large.
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    return trained


def _evaluate(
    cell: Cell, stage: Stage, trained: Trained | None, say: Callable[[str], None]
) -> None:
    """Evaluate the points of a trained stage; their adapters are deleted when that is done."""
    folder, record = cell.stage_folder(stage), cell.record(stage)
    assert record is not None
    steps = [n for n in record["points"] if not cell.evaluation_file(stage, n).is_file()]
    # The last first: if the model is in memory still, its weights are those.
    for step in reversed(steps):
        say(f"{cell.title}: evaluating {stage.name} at step {step} of {record['steps']}")
        last = step == record["steps"]
        adapter = folder / "adapter" if last else point_folder(folder, step)
        if trained is None:
            trained = load_trained(cell.recipe, adapter)
        elif not last:
            _load_weights(trained.model, adapter)
        result = evaluate(trained.model, trained.tokenizer, recipe_suite(cell.recipe))
        save_result(result, cell.evaluation_file(stage, step))
        if not last:
            shutil.rmtree(adapter)
    if (folder / POINTS_FOLDER).is_dir() and not any((folder / POINTS_FOLDER).iterdir()):
        (folder / POINTS_FOLDER).rmdir()


def _load_weights(model: Any, adapter: Path) -> None:
    """Put a saved adapter's weights into a model that has an adapter of the same shape.

    Raises:
        DataError: the adapter is gone.
        ExportError: it is damaged.
    """
    from peft import set_peft_model_state_dict

    if not adapter.is_dir():
        raise DataError(
            f"the adapter {adapter}, which is to be evaluated, is gone. Delete the folder of its "
            "stage and repeat the command with --resume to train it again."
        )
    set_peft_model_state_dict(model, adapter_weights(adapter))
