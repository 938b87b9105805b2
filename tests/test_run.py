"""Runs of whole recipes on a tiny model: every part, in one and two stages, resumed and failing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML
from datasets import Dataset
from peft import get_peft_model
from recipes_for_tests import HARMFUL, tiny_recipe, write_rows
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lora_ogpsa.chat import encode
from lora_ogpsa.checkpoints import last_checkpoint
from lora_ogpsa.console import StopAtNonFinite, TrainingError
from lora_ogpsa.errors import ConfigError, DataError, ExportError, ModelError, OGPSAError
from lora_ogpsa.export import Tolerance, export_merged
from lora_ogpsa.measure import recipe_suite
from lora_ogpsa.plan import make_plan
from lora_ogpsa.recipe import parse_recipe
from lora_ogpsa.reference import Reference
from lora_ogpsa.run import RunInterrupted, run
from lora_ogpsa.stage_data import checked_rows, training_rows
from lora_ogpsa.stages import (
    _trainer,
    load_base,
    lora_config,
    training_arguments,
)
from lora_ogpsa.training_record import read_energy


def _run(raw: dict[str, Any], **options: bool) -> dict[str, Any]:
    return run(parse_recipe(raw), **options)


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a finished run with everything in it: 4 bits, comparison, merge."""
    folder = tmp_path_factory.mktemp("compared")
    recipe = tiny_recipe(
        folder,
        tiny_folder,
        load_in_4bit=True,
        compare=True,
        merge="float32",
        # A budget that is overdrawn from the first step, so that projection has something to do.
        ogpsa={"budget": 0.0},
    )
    _run(recipe)
    return folder / "out"


def test_a_run_writes_everything_it_promises(compared: Path) -> None:
    found = {str(p.relative_to(compared)) for p in compared.rglob("*") if p.is_file()}
    assert found >= {
        "recipe.yaml",
        "results.json",
        "results.md",
        "report.html",
        "report.md",
        "figures/removed-energy.png",
        "figures/tradeoff-divergence-kl.png",
        "adapter/adapter_model.safetensors",
        "adapter/ogpsa_run.json",
        "adapter/README.md",
        "adapter/tokenizer.json",
        "merged/model.safetensors",
        "merged/merge_report.json",
        "evaluations/base.json",
        "evaluations/ogpsa-sft.json",
        "evaluations/plain-sft.json",
        "runs/ogpsa/sft/adapter/training.json",
        "runs/plain/sft/adapter/training.json",
        "runs/ogpsa/sft/energy.jsonl",
    }
    assert "runs/plain/sft/energy.jsonl" not in found
    assert not [name for name in found if ".partial" in name]


def test_results_hold_numbers_intervals_and_timings(compared: Path) -> None:
    results = json.loads((compared / "results.json").read_text())
    assert results["finished"] is True
    assert results["seeds"] == {"sft": 42}
    assert results["ogpsa"]["sft"]["constraint"] == "budget"
    assert set(results["versions"]) >= {"lora-ogpsa", "torch", "trl", "peft"}
    measures = results["evaluation"]["ogpsa/sft"]
    for name in ("harmful.refused", "harmless.refused", "general.nll", "divergence.kl"):
        assert measures[name]["low"] <= measures[name]["value"] <= measures[name]["high"]
        assert measures[name]["n"] == 4
    assert "divergence.kl" not in results["evaluation"]["base"]
    assert set(results["differences"]) == {
        "ogpsa/sft - base",
        "plain/sft - base",
        "ogpsa/sft - plain/sft",
    }
    assert results["training"]["ogpsa/sft"]["steps"] == 3
    assert results["training"]["ogpsa/sft"]["seconds"]["reference_passes"] > 0
    assert results["training"]["plain/sft"]["seconds"]["reference_passes"] == 0
    for part, seconds in ((p, t["seconds"]) for p, t in results["training"].items()):
        assert (seconds["projection"] > 0) == part.startswith("ogpsa")
    assert results["training"]["ogpsa/sft"]["peak_bytes"]["process"] > 1e8
    assert set(results["seconds"]) >= {"evaluation", "training", "reference_passes", "wall"}
    page = (compared / "results.md").read_text()
    assert "| measure | n | base | plain | OGPSA |" in page
    assert HARMFUL[0] in page and "Reloaded with plain transformers" in page


def test_both_arms_start_and_are_fed_alike(compared: Path) -> None:
    """Same initial adapter and data order: the first loss, before any step, is the same."""
    logs = {
        arm: json.loads((compared / f"runs/{arm}/sft/adapter/training.json").read_text())["log"]
        for arm in ("ogpsa", "plain")
    }
    assert logs["ogpsa"][0]["loss"] == pytest.approx(logs["plain"][0]["loss"], abs=1e-6)
    ogpsa = _adapter(compared / "runs/ogpsa/sft/adapter")
    plain = _adapter(compared / "runs/plain/sft/adapter")
    assert any(not torch.equal(ogpsa[name], plain[name]) for name in ogpsa)


def test_projection_shows_in_the_log_and_only_with_ogpsa(compared: Path) -> None:
    logs = json.loads((compared / "runs/ogpsa/sft/adapter/training.json").read_text())["log"]
    assert all("ogpsa/removed_energy" in entry for entry in logs if "loss" in entry)
    assert any(entry.get("ogpsa/removed_energy", 0) > 0 for entry in logs)
    plain = json.loads((compared / "runs/plain/sft/adapter/training.json").read_text())["log"]
    assert not any(key.startswith("ogpsa/") for entry in plain for key in entry)


def test_removed_energy_is_kept_by_step_and_layer(compared: Path) -> None:
    found = read_energy(compared / "runs/ogpsa/sft/energy.jsonl")
    assert found.layers == ["0", "1"] and found.steps == [1, 2, 3]
    assert any(share > 0 for row in found.removed for share in row)
    log = json.loads((compared / "runs/ogpsa/sft/adapter/training.json").read_text())["log"]
    for row, entry in zip(found.removed, log, strict=False):
        # The whole lies between its parts.
        assert min(row) - 1e-6 <= entry["ogpsa/removed_energy"] * 1.001 + 1e-6
        assert entry["ogpsa/removed_energy"] <= max(row) * 1.001 + 1e-6


def test_the_adapter_is_the_protected_one_in_float32(compared: Path) -> None:
    final, trained = _adapter(compared / "adapter"), _adapter(compared / "runs/ogpsa/sft/adapter")
    assert all(torch.equal(final[name], trained[name]) for name in trained)
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
    facts = json.loads((compared / "adapter/ogpsa_run.json").read_text())
    assert facts["quantisation"]["bnb_4bit_quant_type"] == "nf4"
    assert "harmful refused" in " ".join(facts["evaluation"])


def test_the_merged_model_answers_like_the_trained_one(compared: Path) -> None:
    report = json.loads((compared / "merged/merge_report.json").read_text())
    assert report["merge"]["strategy"] == "dequantised"
    assert report["verification"]["passed"] is True
    assert report["verification"]["comparisons"][0]["top1_agreement"] > 0.98


def test_ogpsa_false_is_trl_and_nothing_else(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, ogpsa=False, evaluation=False)
    results = _run(raw)
    assert list(results["training"]) == ["plain/sft"]
    assert results["evaluation"] == {} and results["merge"] is None
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    again = {**raw, "output_dir": str(tmp_path / "again")}
    _run(again)
    first, second = _adapter(tmp_path / "out/adapter"), _adapter(tmp_path / "again/adapter")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_stages_train_one_adapter(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(
        tmp_path,
        tiny_folder,
        stages=[
            {"trainer": "sft"},
            {
                "trainer": "dpo",
                "rejected": "base",
                "rejected_max_new_tokens": 6,
                "beta": 0.1,
                "ogpsa": {"budget": 0.05, "refresh_every": 2},
            },
        ],
    )
    results = _run(raw)
    assert list(results["evaluation"]) == ["base", "ogpsa/1-sft", "ogpsa/2-dpo"]
    assert results["ogpsa"]["1-sft"]["refresh_every"] == 1
    assert results["ogpsa"]["2-dpo"]["refresh_every"] == 2
    log = json.loads((tmp_path / "out/runs/ogpsa/2-dpo/adapter/training.json").read_text())["log"]
    # Stage 2 starts from stage 1's adapter and takes it as DPO's reference: no margin at first.
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "ogpsa/excess/harmless" in log[0]
    first = _adapter(tmp_path / "out/runs/ogpsa/1-sft/adapter")
    last = _adapter(tmp_path / "out/adapter")
    assert first.keys() == last.keys()  # the frozen copy that was DPO's reference is gone
    moved = max(float((first[name] - last[name]).abs().max()) for name in first)
    start = max(float(first[name].abs().max()) for name in first if "lora_B" in name)
    assert 0 < moved < 10 * start


def test_dpo_alone_with_the_likelihood_of_the_chosen_answers(
    tmp_path: Path, tiny_folder: Path
) -> None:
    preference: dict[str, Any] = {
        "trainer": "dpo",
        "rejected": "base",
        "rejected_max_new_tokens": 6,
    }

    def first_log(name: str, **loss: Any) -> dict[str, float]:
        raw = tiny_recipe(tmp_path, tiny_folder, stages=[{**preference, **loss}], evaluation=False)
        _run({**raw, "output_dir": str(tmp_path / name)})
        (record,) = (tmp_path / name / "runs/ogpsa").glob("*/adapter/training.json")
        return json.loads(record.read_text())["log"][0]

    assert first_log("alone")["loss"] == pytest.approx(0.6931, abs=1e-3)
    both = first_log("both", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    # A random model's negative log-likelihood is about the logarithm of its vocabulary.
    assert both["loss"] > 0.6931 + 2
    assert "ogpsa/excess/harmless" in both


def test_dpo_alone_on_preference_rows(tmp_path: Path, tiny_folder: Path) -> None:
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": p, "chosen": "I can't help.", "rejected": "Sure thing."} for p in HARMFUL],
    )
    raw = tiny_recipe(
        tmp_path, tiny_folder, trainer="dpo", dataset_name=pairs, evaluation=False, beta=0.5
    )
    results = _run(raw)
    assert results["training"]["ogpsa/dpo"]["steps"] == 3
    log = json.loads((tmp_path / "out/adapter/training.json").read_text())["log"]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-2]["loss"] < log[0]["loss"] or log[1]["loss"] < log[0]["loss"]


# --------------------------------------------------------------------------------- resuming


def test_resume_goes_on_from_finished_parts_and_checkpoints(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second arm at a checkpoint; only what is missing is done again."""
    raw = tiny_recipe(
        tmp_path, tiny_folder, compare=True, max_steps=6, save_steps=2, ogpsa={"budget": 0.0}
    )
    whole = {**raw, "output_dir": str(tmp_path / "whole")}
    _run(whole)

    from lora_ogpsa.console import StepDisplay

    original = StepDisplay.on_step_end

    def interrupt(self: StepDisplay, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if "plain" in self.title and state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepDisplay, "on_step_end", interrupt)
    with pytest.raises(RunInterrupted) as caught:
        _run(raw)
    message = str(caught.value)
    assert "the evaluation of base" in message and "the evaluation of ogpsa/sft" in message
    assert "checkpoint-4" in message and "--resume" in message and "\n" not in message
    out = tmp_path / "out"
    partial = json.loads((out / "results.json").read_text())
    assert partial["finished"] is False and "ogpsa/sft" in partial["evaluation"]
    untouched = (out / "runs/ogpsa/sft/adapter/adapter_model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(StepDisplay, "on_step_end", original)
    results = _run(raw, resume=True)
    assert results["finished"] is True
    now = (out / "runs/ogpsa/sft/adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert now == untouched
    assert results["training"]["plain/sft"]["resumed_from"] == "checkpoint-4"
    assert read_energy(out / "runs/ogpsa/sft/energy.jsonl").steps == [1, 2, 3, 4, 5, 6]
    for arm in ("ogpsa", "plain"):
        one = _adapter(out / f"runs/{arm}/sft/adapter")
        other = _adapter(tmp_path / f"whole/runs/{arm}/sft/adapter")
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_resume_of_a_dpo_stage_from_its_checkpoint(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_recipe(
        tmp_path,
        tiny_folder,
        evaluation=False,
        ogpsa=False,
        max_steps=4,
        save_steps=2,
        stages=[
            {"trainer": "sft"},
            {"trainer": "dpo", "rejected": "base", "rejected_max_new_tokens": 6},
        ],
    )
    _run({**raw, "output_dir": str(tmp_path / "whole")})
    from lora_ogpsa.console import StepDisplay

    original = StepDisplay.on_step_end

    def interrupt(self: StepDisplay, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "dpo" in self.title and state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepDisplay, "on_step_end", interrupt)
    with pytest.raises(RunInterrupted):
        _run(raw)
    monkeypatch.setattr(StepDisplay, "on_step_end", original)
    results = _run(raw, resume=True)
    assert results["training"]["plain/2-dpo"]["resumed_from"] == "checkpoint-2"
    one, other = _adapter(tmp_path / "out/adapter"), _adapter(tmp_path / "whole/adapter")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_a_stage_that_trained_nothing_yet_may_differ_on_resume(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage does not fit into memory: it is made smaller, and the first is kept."""
    first, second = {"trainer": "sft"}, {"trainer": "sft", "name": "second"}
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=2, stages=[first, second])
    from lora_ogpsa.console import StepDisplay

    original = StepDisplay.on_step_begin

    def no_memory(self: StepDisplay, *args: Any, **kwargs: Any) -> None:
        if "second" in self.title:
            raise torch.OutOfMemoryError("no memory")
        original(self, *args, **kwargs)

    monkeypatch.setattr(StepDisplay, "on_step_begin", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _run(raw)
    monkeypatch.setattr(StepDisplay, "on_step_begin", original)
    kept = (tmp_path / "out/runs/ogpsa/1-sft/adapter/training.json").read_bytes()
    smaller = {**second, "per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match="`stages` changed since"):
        _run({**raw, "stages": [{**first, "learning_rate": 1.0}, smaller]}, resume=True)
    with pytest.raises(ConfigError, match="`max_steps` changed since"):
        _run({**raw, "max_steps": 1, "stages": [first, smaller]}, resume=True)
    changed = {**raw, "stages": [first, smaller]}
    results = _run(changed, resume=True)
    assert results["recipe"]["stages"] == [first, smaller]
    assert (tmp_path / "out/runs/ogpsa/1-sft/adapter/training.json").read_bytes() == kept
    # The adapter of the last stage is published: there is no stage to go on with.
    with pytest.raises(ConfigError, match="`stages` changed since"):
        _run(
            {**changed, "stages": [first, smaller, {"trainer": "sft", "name": "third"}]},
            resume=True,
        )


def test_resume_refuses_another_recipe(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("max_steps: 9\n")
    (out / "evaluations").mkdir()
    (out / "evaluations/base.json").write_text("{}")
    with pytest.raises(ConfigError, match="`max_steps`.*changed since"):
        _run({"max_steps": 3, **raw}, resume=True)
    (out / "recipe.yaml").unlink()
    (out / "other.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no run to resume"):
        _run(raw, resume=True)


def test_a_run_whose_merge_fails_is_reported_and_can_be_finished(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, max_steps=1, merge="bfloat16")
    raw["evaluation"] = {"max_new_tokens": 6, "measures": {"harmful": raw["dataset_name"]}}
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        # No merge agrees this well.
        patched.setattr("lora_ogpsa.export.verify.REPRODUCES", Tolerance(0.0, 1.01))
        with pytest.raises(ExportError, match="does not reproduce"):
            _run(raw)
        assert "put `merge: false` into the recipe" in " ".join(capsys.readouterr().err.split())
        page = (out / "report.html").read_text()
        assert "harmful refused" in page and "The run is not finished" in page
        assert json.loads((out / "results.json").read_text())["merge"] is None
        trained = (out / "adapter/adapter_model.safetensors").stat().st_mtime_ns
        with pytest.raises(ExportError, match="does not reproduce"):
            _run(raw, resume=True)

    unmerged = _run({**raw, "merge": False}, resume=True)
    assert unmerged["finished"] is True and unmerged["merge"] is None
    export_merged(out / "adapter", out / "merged", dtype="float16", verify=False, progress=False)
    results = _run(raw, resume=True)
    assert results["merge"]["merge"]["dtype"] == "float16"
    assert "merging: done already, in float16" in capsys.readouterr().err
    sentence = "The merged float16 model was not compared with the trained one"
    assert sentence in (out / "results.md").read_text()
    assert sentence in (out / "report.html").read_text()
    assert (out / "adapter/adapter_model.safetensors").stat().st_mtime_ns == trained


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, complete in ((2, True), (4, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


# ----------------------------------------------------------------------------------- output folder


def test_a_folder_in_use_is_left_alone(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty. Pass --resume"):
        _run(raw)
    with pytest.raises(ConfigError, match="not the folder of an earlier run"):
        _run(raw, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_output_folder(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        _run(raw)


@pytest.mark.parametrize("native", [False, True])
def test_precision_on_a_cpu_follows_its_instructions_unless_the_recipe_says(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    for module in ("stages", "measure"):
        monkeypatch.setattr(f"lora_ogpsa.{module}.cpu_computes_bfloat16", lambda: native)
    silent = parse_recipe(tiny_recipe(tmp_path, tiny_folder, bf16=None))
    assert training_arguments(silent.stages[0], tmp_path).bf16 is native
    suite = recipe_suite(silent)
    assert suite is not None and suite.autocast == ("bfloat16" if native else None)

    raw = tiny_recipe(tmp_path, tiny_folder, bf16=not native)
    raw["evaluation"]["autocast"] = None if native else "bfloat16"
    explicit = parse_recipe(raw)
    assert training_arguments(explicit.stages[0], tmp_path).bf16 is (not native)
    assert recipe_suite(explicit) == explicit.evaluation


def test_overwrite_deletes_the_earlier_run_and_nothing_else(
    tmp_path: Path, tiny_folder: Path
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=1)
    _run(raw)
    stale = tmp_path / "out/runs/ogpsa/sft/adapter/stale"
    stale.write_text("old")
    kept = tmp_path / "out/notes.txt"
    kept.write_text("mine")
    _run(raw, overwrite=True)
    assert kept.read_text() == "mine" and not stale.exists()


def test_overwrite_deletes_nothing_for_a_run_that_cannot_begin(
    tmp_path: Path, tiny_folder: Path
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=1)
    _run(raw)
    out = tmp_path / "out"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for wrong in (
        {"dataset_name": str(tmp_path / "typo.jsonl")},
        {"model_name_or_path": str(tmp_path / "typo")},
        {"lora_target_modules": "typo"},
    ):
        with pytest.raises(OGPSAError, match="typo"):
            _run({**raw, **wrong}, overwrite=True)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_run_that_failed_before_its_first_result_leaves_its_folder_free(
    tmp_path: Path, tiny_folder: Path
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=1)
    wrong = {**raw, "assistant_only_loss": True}
    with pytest.raises(ConfigError, match="TRL refuses the settings"):
        _run(wrong)
    assert (tmp_path / "out/recipe.yaml").is_file()
    assert _run(raw)["finished"] is True
    assert "assistant_only" not in (tmp_path / "out/recipe.yaml").read_text()


def test_a_recipe_written_by_hand_is_not_overwritten(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, max_steps=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("# Mine.\nmax_steps: 9\n")
    with pytest.raises(ConfigError, match="is not empty"):
        _run(raw)
    assert (out / "recipe.yaml").read_text() == "# Mine.\nmax_steps: 9\n"


def test_a_launcher_of_several_processes_is_refused(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="recipes run in one process"):
        _run(tiny_recipe(tmp_path, tiny_folder))


# ------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}, {"text": "x"}], "training.jsonl, row 2"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c"}], "row 2: no answer to train on"),
        ([{"prompt": "long " * 200, "completion": "b"}], "row 1: the prompt has"),
        ([], "the data set has no rows"),
    ],
)
def test_bad_training_rows_stop_before_training(
    tmp_path: Path, tiny_folder: Path, rows: list[dict[str, Any]], message: str
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder)
    write_rows(tmp_path / "training.jsonl", rows)
    with pytest.raises(DataError) as caught:
        _run(raw)
    assert message in str(caught.value)
    assert not (tmp_path / "out/evaluations").exists()  # not even the base has been evaluated


_GONE = {"name": "mine", "data": "gone.jsonl"}


@pytest.mark.parametrize(
    ("later", "whole", "message"),
    [
        ({"lr_scheduler_type": "foo"}, {}, "stage `2-sft`.*foo is not a valid SchedulerType"),
        ({"optim": "foo"}, {}, "stage `2-sft`.*foo is not a valid OptimizerNames"),
        ({"optim": "lomo"}, {}, "stage `2-sft`: its optimizer or schedule .*install `lomo_optim`"),
        ({"adam_beta1": 1.5}, {}, "stage `2-sft`: its optimizer or schedule .*Invalid beta"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            {},
            "stage `2-sft`: its optimizer or schedule .*min_lr",
        ),
        ({"lr_scheduler_kwargs": {"foo": 1}}, {}, "stage `2-sft`: its optimizer or schedule .*foo"),
        ({"loss_type": "dtf"}, {}, "stage `2-sft`.*no `loss_type` 'dtf', but nll, dft"),
        (
            {"trainer": "dpo", "rejected": "base", "loss_type": ["sigmoid", "stf"]},
            {},
            "stage `2-dpo`.*no `loss_type` 'stf', but sigmoid",
        ),
        ({"packing_strategy": "bdf"}, {}, "stage `2-sft`.*no `packing_strategy` 'bdf', but bfd"),
        ({"packing": True, "max_length": None}, {}, "stage `2-sft`.*`packing` fills sequences of"),
        ({"padding_free": True}, {}, "stage `2-sft`.*`padding_free` cuts nothing to `max_length`"),
        (
            {"trainer": "dpo", "rejected": "base", "loss_type": "exo_pair"},
            {},
            "stage `2-dpo`.*`exo_pair` needs a `label_smoothing`",
        ),
        (
            {"trainer": "dpo", "rejected": "base", "train_sampling_strategy": "group_by_length"},
            {},
            "stage `2-dpo`.*`train_sampling_strategy` goes by one length",
        ),
        ({"dataloader_persistent_workers": True}, {}, "stage `2-sft`.*`dataloader_num_workers` ab"),
        ({"use_liger_kernel": True}, {}, "stage `2-sft`.*needs the package liger-kernel"),
        ({"pad_token": "<none>"}, {}, "stage `2-sft`: `pad_token` '<none>' is not in the voc"),
        ({"logging_steps": 0}, {}, "stage `2-sft`.*non-zero --logging_steps"),
        ({"report_to": "foo"}, {}, "stage `2-sft`.*foo is not supported"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 8},
            {},
            "4 rows fill no batch of 8",
        ),
        ({"push_to_hub": True}, {}, "stage `2-sft`: `push_to_hub` cannot work"),
        ({"references": [_GONE]}, {}, "reference `mine`: file not found: gone.jsonl"),
        ({}, {"lora_r": 0}, "adapter's settings are refused: `r` should be a positive"),
        ({}, {"lora_dropout": 5}, "adapter's settings are refused: dropout probability"),
        ({}, {"lora_target_modules": "gone"}, "settings are refused: Target modules {'gone'}"),
        ({}, {"lora_target_modules": "*gone"}, "adapter's settings are refused: "),
        (
            {},
            {"lora_target_modules": ["q_proj", "lm_head"]},
            "does not train an adapter of `lm_head",
        ),
        ({}, {"lora_modules_to_save": ["gone"]}, "`lora_modules_to_save` names `gone`"),
        (
            {},
            {"evaluation": {"measures": {"harmful": "gone.jsonl"}}},
            "measure `harmful`: file not",
        ),
        ({}, {"evaluation": {"judge": "gpt"}}, "A judge should be one of"),
        ({}, {"evaluation": {"judge": {"kind": "local", "name": "./gone"}}}, "model folder not f"),
        ({}, {"evaluation": {"measures": {"general": "embedded:harmless"}}}, "needs an answer"),
    ],
)
def test_what_is_wrong_further_on_shows_before_anything_is_done(
    tmp_path: Path, tiny_folder: Path, later: dict[str, Any], whole: dict[str, Any], message: str
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, stages=[{}, later])
    with pytest.raises(OGPSAError, match=message) as caught:
        _run({**raw, **whole})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_chat_template_is_refused_before_anything_is_done(
    tmp_path: Path, tiny_folder: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    raw = tiny_recipe(tmp_path, tmp_path / "model")
    with pytest.raises(ModelError, match="has no chat template, by which rows become text"):
        _run(raw)
    assert not (tmp_path / "out").exists()


def test_what_is_packed_into_no_whole_batch_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    """The Trainer would end without a step, and an untrained adapter be evaluated and merged."""
    raw = tiny_recipe(tmp_path, tiny_folder, packing=True, dataloader_drop_last=True)
    raw["per_device_train_batch_size"] = 3
    with pytest.raises(DataError, match="2 packed sequences fill no batch of 3"):
        make_plan(parse_recipe(raw))
    with pytest.raises(DataError, match="2 packed sequences fill no batch of 3"):
        _run(raw)
    assert not list((tmp_path / "out").glob("runs/*/*/adapter"))
    split = {**raw, "packing_strategy": "bfd_split", "max_length": 96, "max_steps": 1}
    split["per_device_train_batch_size"] = 4
    content = "no " * 80
    write_rows(tmp_path / "training.jsonl", [{"prompt": "a", "completion": content}] * 3)
    assert _run(split, overwrite=True)["training"]["ogpsa/sft"]["steps"] == 1


def test_what_is_reported_to_has_to_be_installed(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_wandb_available", lambda: False
    )
    with pytest.raises(ConfigError, match="as `report_to` asks: WandbCallback requires wandb"):
        _run(tiny_recipe(tmp_path, tiny_folder, report_to="wandb"))


def test_missing_files_are_named(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False)
    with pytest.raises(DataError, match=r"file not found: .*gone\.jsonl"):
        _run({**raw, "dataset_name": str(tmp_path / "gone.jsonl")})
    with pytest.raises(ModelError, match="model folder not found"):
        _run({**raw, "model_name_or_path": str(tmp_path / "gone")}, overwrite=True)


def test_an_empty_reference_is_an_error(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False)
    raw["references"][0]["kind"] = "nonesuch"
    with pytest.raises(DataError, match="has no rows of kind 'nonesuch'"):
        _run(raw)


@pytest.mark.parametrize("protected", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_folder: Path, protected: bool
) -> None:
    """An absurd learning rate; what was evaluated before stays on disk."""
    raw = tiny_recipe(
        tmp_path,
        tiny_folder,
        learning_rate=1e30,
        max_steps=8,
        lr_scheduler_type="constant",
        ogpsa={} if protected else False,
    )
    with pytest.raises(OGPSAError, match="not finite|diverged"):
        _run(raw)
    assert (tmp_path / "out/evaluations/base.json").is_file()
    assert not (tmp_path / "out/adapter").exists()


def test_an_overflow_that_the_scaler_skips_does_not_stop_a_run(tmp_path: Path) -> None:
    watch, state, control = StopAtNonFinite(), TrainerState(), TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    skipped = {"loss": 2.0, "grad_norm": float("inf")}
    with pytest.raises(TrainingError, match="grad_norm is inf"):
        watch.on_log(args, state, control, skipped)
    args.fp16 = True
    watch.on_log(args, state, control, skipped)
    with pytest.raises(TrainingError, match="loss is nan"):
        watch.on_log(args, state, control, {"loss": float("nan")})


def test_arguments_that_trl_refuses_are_one_line(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, evaluation=False, bf16=True, fp16=True)
    with pytest.raises(ConfigError, match="the training arguments are refused"):
        _run(raw)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj", {"q_proj"}),
        (["q_proj"], {"q_proj"}),
        (["layers.0.self_attn.q_proj"], {"layers.0.self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("all-linear", "all-linear"),
        (r".*\.1\..*q_proj", r".*\.1\..*q_proj"),
    ],
)
def test_one_target_is_a_name_as_several_are(
    tmp_path: Path, tiny_folder: Path, tiny_model: Any, given: Any, expected: Any
) -> None:
    raw = tiny_recipe(
        tmp_path, tiny_folder, lora_target_modules=given, lora_modules_to_save="lm_head"
    )
    settings = lora_config(parse_recipe(raw))
    assert settings.target_modules == expected
    adapted = get_peft_model(tiny_model(), settings)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("q_proj.lora_A" in name for name in names)
    kept = [name for name in names if "modules_to_save" in name]
    assert kept == ["base_model.model.lm_head.modules_to_save.default.weight"]


# ------------------------------------------------------------------------------------ stage data


def test_rows_of_any_format_train_on_the_answer_only(
    tmp_path: Path, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    rows = write_rows(
        tmp_path / "mixed.jsonl",
        [
            {"prompt": "a?", "response": "yes"},
            {"question": "b?", "answer": "no"},
            {"instruction": "c", "input": "d", "output": "e"},
            {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}]},
        ],
    )
    stage = parse_recipe(tiny_recipe(tmp_path, tiny_folder, dataset_name=rows)).stages[0]
    found = checked_rows(stage, tiny_tokenizer)
    assert [row["completion"] for row in found] == [
        [{"role": "assistant", "content": answer}] for answer in ("yes", "no", "e", "g")
    ]
    assert found[2]["prompt"] == [{"role": "user", "content": "c\n\nd"}]


def test_a_limit_draws_rows_with_the_seed(tmp_path: Path, tiny_folder: Path) -> None:
    rows = write_rows(
        tmp_path / "many.jsonl", [{"prompt": f"{i}?", "completion": "no"} for i in range(50)]
    )
    base = tiny_recipe(tmp_path, tiny_folder, dataset_name=rows, dataset_limit=5)

    def drawn(seed: int) -> list[str]:
        stage = parse_recipe({**base, "seed": seed}).stages[0]
        return [row["prompt"][0]["content"] for row in checked_rows(stage, None)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 5


def test_training_renders_as_references_and_evaluations_do(
    tmp_path: Path, tiny_folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    stage = parse_recipe(tiny_recipe(tmp_path, tiny_folder)).stages[0]
    thinking = copy.deepcopy(tiny_tokenizer)
    # As Qwen3's: the last answer has a block of thoughts, and a prompt none unless told not to.
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
        "{% endif %}"
    )
    for tokenizer in (tiny_tokenizer, thinking):
        rows = checked_rows(stage, tokenizer)
        trainer = SFTTrainer(
            tiny_model(),
            SFTConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=1),
            train_dataset=Dataset.from_list(training_rows(stage, rows, None, tokenizer)[:1]),
            processing_class=tokenizer,
        )
        (batch,) = trainer.get_train_dataloader()
        answer = rows[0]["completion"][0]["content"]
        prompt, ids = encode(tokenizer, rows[0]["prompt"], answer, max_length=256)
        learned = (batch["labels"][0] != -100).tolist()
        assert learned.index(True) == len(prompt)
        assert batch["input_ids"][0].tolist()[: len(prompt + ids)] == prompt + ids
    assert "<think></think>" in tokenizer.decode(prompt)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_tools_are_rendered_as_trl_does(
    kind: str, tmp_path: Path, tiny_folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """In training rows, as a list or as a text, and in references of the same rows."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {}}}}}
        for name in ("add", "say")
    ]
    rows = [
        {"prompt": "Hi", "completion": "No.", "chosen": "No.", "rejected": "Yes.", "tools": given}
        for given in (tools, json.dumps(tools), [], None)
    ]
    data = write_rows(tmp_path / "tools.jsonl", rows)
    raw = tiny_recipe(tmp_path, tiny_folder, dataset_name=data, trainer=kind, max_length=512)
    recipe = parse_recipe(raw)
    stage = recipe.stages[0]
    found = training_rows(stage, checked_rows(stage, tokenizer), None, tokenizer)
    trainer = _trainer(
        recipe,
        stage,
        training_arguments(stage, tmp_path),
        tiny_model(),
        tokenizer,
        found,
        fresh=True,
    )
    names = ["input_ids"] if kind == "sft" else ["chosen_ids", "rejected_ids"]
    reference = Reference("own", data, loss=kind, max_length=512).prepare(tiny_model(), tokenizer)
    mine = iter(reference.sequences)
    for row, given in zip(trainer.train_dataset, (tools, tools, None, None), strict=True):
        for name in names:
            turns = [{"role": "user", "content": "Hi"}]
            settings = {"tools": given, "add_generation_prompt": True, "return_dict": True}
            prompt = tokenizer.apply_chat_template(turns, **settings)["input_ids"]
            trained = row[name] if kind == "sft" else row["prompt_ids"] + row[name]
            assert trained[: len(prompt)] == prompt
            own, answer = next(mine)
            assert own == prompt and trained[len(prompt) :][: len(answer)] == answer


def test_tool_calls_are_trained_after_as_they_stand(
    tmp_path: Path, tiny_folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Other calls have other arguments, of other types; a turn has a name that others have not."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name is defined %} {{ m.name }}"
        "{% endif %}{{ '\n' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def row(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        turns = [
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "look", "content": "4"},
            {"role": "assistant", "content": "It is 4."},
        ]
        return {"messages": turns}

    rows = write_rows(tmp_path / "calls.jsonl", [row(at=1), row(at="x"), row(near={"y": 2})])
    raw = tiny_recipe(tmp_path, tiny_folder, dataset_name=rows, max_length=256)
    recipe = parse_recipe(raw)
    stage = recipe.stages[0]
    found = checked_rows(stage, tokenizer)
    arguments = training_arguments(stage, tmp_path)
    trainer = _trainer(recipe, stage, arguments, tiny_model(), tokenizer, found, fresh=True)
    for given, trained in zip(found, trainer.train_dataset, strict=True):
        answer = given["completion"][0]["content"]
        prompt, ids = encode(tokenizer, given["prompt"], answer, max_length=256)
        assert trained["input_ids"][: len(prompt + ids)] == prompt + ids


def test_preference_rows_say_how_to_do_without_pairs(tmp_path: Path, tiny_folder: Path) -> None:
    stage = parse_recipe(tiny_recipe(tmp_path, tiny_folder, trainer="dpo")).stages[0]
    with pytest.raises(DataError, match=r"row 1.*`rejected: base`"):
        checked_rows(stage, None)


def test_base_answers_that_refuse_make_no_pair(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(
        tiny_recipe(tmp_path, tiny_folder, trainer="dpo", rejected="base", max_length=64)
    )
    model, tokenizer = load_base(recipe)
    texts = ["Sure, here is how.", "I'm sorry, but I can't help with that.", "", "First, you"]

    def answers(model: Any, tokenizer: Any, prompts: Any, **kwargs: Any) -> list[list[int]]:
        assert len(prompts) == len(texts) and kwargs["max_new_tokens"] == 64
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr("lora_ogpsa.answers.own_answers", answers)
    rows = checked_rows(recipe.stages[0], tokenizer)
    found = training_rows(recipe.stages[0], rows, model, tokenizer)
    assert [row["rejected"][0]["content"] for row in found] == [texts[0], texts[3]]
    assert all(row["chosen"][0]["content"] == "I can't help with that." for row in found)

    texts[0] = texts[3] = "I cannot do that."
    with pytest.raises(DataError, match="finds no preference pair"):
        training_rows(recipe.stages[0], rows, model, tokenizer)
