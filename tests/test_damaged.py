"""Damaged files of a run: one line that names the file and what to do, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluations_for_tests import evaluated
from recipes_for_tests import tiny_recipe
from typer.testing import CliRunner

from lora_ogpsa.checkpoints import check_checkpoint, last_checkpoint
from lora_ogpsa.cli import app
from lora_ogpsa.compare_cells import Cell, _load_weights
from lora_ogpsa.console import StepDisplay
from lora_ogpsa.errors import DataError, ExportError, ModelError, StateError
from lora_ogpsa.evaluation import EvaluationResult
from lora_ogpsa.recipe import parse_recipe
from lora_ogpsa.report import write_report
from lora_ogpsa.run import RunInterrupted, run
from lora_ogpsa.stages import _continued, with_adapter


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a recipe and of its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    content = tiny_recipe(folder, tiny_folder, max_steps=1, compare=False, merge="bfloat16")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml")])
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("damaged", "advice"),
    [
        ("runs/ogpsa/sft/adapter/training.json", "repeat the command with --resume"),
        ("runs/ogpsa/sft/adapter/ogpsa_run.json", "repeat the command with --resume"),
        ("merged/merge_report.json", "repeat the command with --resume"),
        ("evaluations/base.json", "delete the file and repeat the command with --resume"),
        ("recipe.yaml", "Put the recipe in its place, or start anew with --overwrite"),
    ],
)
def test_resume_names_a_damaged_file(damaged: str, advice: str, finished: Path) -> None:
    file = finished / "out" / damaged
    whole, published = file.read_bytes(), finished / "out" / "adapter"
    if "ogpsa_run" in damaged:
        shutil.rmtree(published)  # else nobody reads it
    file.write_bytes(whole[: len(whole) // 2] + b"\n{")
    done = CliRunner().invoke(app, ["run", str(finished / "recipe.yaml"), "--resume"])
    assert done.exit_code == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {file}") and advice in last
    file.write_bytes(whole)
    again = CliRunner().invoke(app, ["run", str(finished / "recipe.yaml"), "--resume"])
    assert again.exit_code == 0, again.stderr
    assert published.is_dir()


def test_a_report_names_a_damaged_file(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match=r"results.json cannot be read .*--resume"):
        write_report(tmp_path / "out")
    (tmp_path / "out" / "recipe.yaml").rename(tmp_path / "out" / "compare.yaml")
    (tmp_path / "out" / "compare.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ExportError, match=r"compare.json should hold an object.*--resume"):
        write_report(tmp_path / "out")


def test_damaged_weights_of_an_adapter_are_named(
    tiny_model: Callable[..., Any], tiny_peft: Callable[..., Any], tmp_path: Path
) -> None:
    tuned = tiny_peft(warm=True)
    tuned.save_pretrained(tmp_path)
    (tmp_path / "ogpsa_run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match=r"ogpsa_run.json cannot be read"):
        _continued(tiny_model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot load the adapter"):
        with_adapter(tiny_model(), tmp_path, trainable=False)
    with pytest.raises(ExportError, match=r"adapter_model.safetensors cannot be read"):
        _load_weights(tuned, tmp_path)


def test_damaged_records_of_a_comparison_are_named(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path, tiny_folder), "r.yaml")
    cell = Cell("plain", 0, recipe, 1)
    adapter = cell.stage_folder(recipe.stages[0]) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "training.json").write_text('{"points": [', encoding="utf-8")
    with pytest.raises(ExportError, match=r"training.json cannot be read .* Delete .*adapter and"):
        cell.is_complete()


def test_an_evaluation_of_another_shape_is_named(tmp_path: Path) -> None:
    evaluated(0.5, 0.5, None).save(tmp_path / "base.json")
    assert EvaluationResult.load(tmp_path / "base.json").base
    (tmp_path / "base.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"base.json cannot be read .*--resume"):
        EvaluationResult.load(tmp_path / "base.json")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    """A recipe whose second stage, of DPO, was interrupted behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    stages = [{"trainer": "sft"}, {"trainer": "dpo", "rejected": "base"}]
    raw = tiny_recipe(
        folder, tiny_folder, max_steps=2, save_steps=1, stages=stages, evaluation=None
    )

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "dpo" in self.title and state.global_step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepDisplay, "on_step_end", interrupt)
        with pytest.raises(RunInterrupted):
            run(parse_recipe(raw, "recipe.yaml"))
    return raw


@pytest.mark.parametrize(
    ("damaged", "how", "said"),
    [
        ("adapter_model.safetensors", "half", "cannot be read"),
        ("ref/adapter_model.safetensors", "half", "cannot be read"),
        ("ogpsa.safetensors", "half", "cannot be read"),
        ("optimizer.pt", "missing", "is missing"),
        ("optimizer.pt", "zeroed", "is damaged"),
        ("scheduler.pt", "missing", "is missing"),
        ("rng_state.pth", "half", "cannot be read"),
        ("trainer_state.json", "half", "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_kept(
    damaged: str, how: str, said: str, interrupted: dict[str, Any], tmp_path: Path
) -> None:
    raw = {**interrupted, "output_dir": str(tmp_path / "out")}
    shutil.copytree(interrupted["output_dir"], raw["output_dir"])
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    checkpoint = tmp_path / "out" / "runs" / "ogpsa" / "2-dpo" / "checkpoint-1"
    file = checkpoint / damaged
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[:middle] + (b"" if how == "half" else bytes(64) + content[middle + 64 :])
        )
    with pytest.raises(StateError, match=f"{damaged} {said}.*Delete .*checkpoint-1 and") as caught:
        run(parse_recipe(raw, "recipe.yaml"), resume=True)
    assert "\n" not in str(caught.value)
    assert checkpoint.is_dir()
    shutil.rmtree(checkpoint)
    assert run(parse_recipe(raw, "recipe.yaml"), resume=True)["finished"]


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": True},
        {"load_in_4bit": True, "optim": "adamw_8bit", "lora_modules_to_save": "lm_head"},
        {"contrast": True, "optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"use_dora": True, "packing": True, "ogpsa": False, "optim": "adafactor"},
    ],
)
def test_the_checkpoints_of_ordinary_runs_pass(
    settings: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    changes = {"max_steps": 1, "save_steps": 1, "evaluation": None, **settings}
    run(parse_recipe(tiny_recipe(tmp_path, tiny_folder, **changes), "recipe.yaml"))
    found = last_checkpoint(next((tmp_path / "out" / "runs").glob("*/sft")))
    assert found is not None
    check_checkpoint(found)
