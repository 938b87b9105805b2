"""The command line: help, exit codes, one-line errors, Ctrl-C."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_for_tests import tiny_recipe
from typer.testing import CliRunner

from lora_ogpsa.cli import app, main
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.evaluation.result import check_result_file

ROOT = Path(__file__).parent.parent


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_ogpsa", *arguments],
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=120,
    )


def _recipe(folder: Path, model: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    raw = tiny_recipe(folder, model, **changes)
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


# ------------------------------------------------------------------------------------------- help


def test_help_is_quick_and_teaches_by_example() -> None:
    code = (
        "import sys, lora_ogpsa.cli; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "compare", "report", "evaluate", "merge", "export", "version"):
        shown = _invoke(command, "--help")
        assert shown.exit_code == 0
        assert f"lora-ogpsa {command}" in shown.output, command


def test_version_names_the_library_and_what_it_stands_on() -> None:
    shown = _invoke("version")
    assert re.search(r"lora-ogpsa \d+\.\d+", shown.output)
    assert re.search(r"torch \d+\.\d+", shown.output) and re.search(r"trl \d+", shown.output)


# ------------------------------------------------------------------------------------- exit codes


def test_a_run_from_the_command_line(tmp_path: Path, tiny_folder: Path) -> None:
    """In a process of its own: results on standard output, everything else on standard error."""
    recipe = _recipe(tmp_path, tiny_folder, max_steps=2)
    done = _command("run", str(recipe), "--set", "ogpsa.budget=0.2")
    assert done.returncode == 0, done.stderr
    assert "harmful refused" in done.stdout and "OGPSA" in done.stdout
    assert "[1/3] base: evaluating" in done.stderr and "step 2/2: loss" in done.stderr
    for noise in ("Warning", "warn(", "kernels", "{'loss'", "it/s"):
        assert noise not in done.stderr + done.stdout, noise
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["ogpsa"]["sft"]["budget"] == 0.2
    again = _command("run", str(recipe))
    assert again.returncode == 2
    assert again.stderr.startswith("error: the output folder") and "--resume" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_stpes=3"], "unknown key `max_stpes` with `trainer: sft`. Did you mean"),
        (["--set", "ogpsa.space=weights"], "`space` should be one of"),
        (["--set", "dataset_name=gone.jsonl"], "file not found: gone.jsonl"),
        (["--output-dir", "/dev/null/x"], "/dev/null/x: Not a directory"),
        (["--overwrite", "--resume"], "Pass one of them"),
    ],
)
def test_foreseen_errors_are_one_line_and_exit_2(
    tmp_path: Path, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    recipe = _recipe(tmp_path, tiny_folder, evaluation=False)
    done = _invoke("run", str(recipe), *arguments)
    assert done.exit_code == 2
    line = done.stderr.strip()
    assert line.startswith("error: ") and message in line and "\n" not in line


def test_a_missing_recipe_exits_2(tmp_path: Path) -> None:
    done = _invoke("run", str(tmp_path / "none.yaml"))
    assert done.exit_code == 2 and "error: recipe not found" in done.stderr


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/results.json"),
            "/out/results.json",
        ),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), "disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos"), "disk is full"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out of memory"),
    ],
)
def test_the_machine_s_limits_are_one_line(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        try:
            raise raised
        except Exception as error:
            raise RuntimeError("saving failed") from error

    monkeypatch.setattr("lora_ogpsa.run.run", fail)
    done = _invoke("run", str(_recipe(tmp_path, tiny_folder)))
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_defects_keep_their_traceback(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lora_ogpsa.run.run", fail)
    done = _invoke("run", str(_recipe(tmp_path, tiny_folder)))
    assert done.exit_code == 1 and isinstance(done.exception, ZeroDivisionError)


def test_ctrl_c_says_what_is_saved_and_resume_finishes(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = _recipe(tmp_path, tiny_folder, max_steps=150, save_steps=2, save_total_limit=1)
    arguments = [sys.executable, "-m", "lora_ogpsa", "run", str(recipe)]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
        # A test run in the background of a shell is told to ignore Ctrl-C, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if "step 4/150" in line:
                process.send_signal(signal.SIGINT)
                break
        else:
            pytest.fail("".join(seen))
        rest = process.stderr.read()
        assert process.wait(timeout=300) == 130
    last = rest.strip().splitlines()[-1]
    assert last.startswith(f"interrupted. Saved in {tmp_path / 'out'}: the evaluation of base")
    assert "checkpoint-" in last and "--resume" in last
    assert "Traceback" not in rest
    assert (tmp_path / "out/evaluations/base.json").is_file()
    resumed = _invoke("run", str(recipe), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["finished"] and results["training"]["ogpsa/sft"]["steps"] == 150
    assert results["training"]["ogpsa/sft"]["resumed_from"].startswith("checkpoint-")


# -------------------------------------------------------------------------------- other commands


def test_dry_run_shows_a_plan_and_writes_nothing(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    shown = _invoke("run", str(_recipe(tmp_path, tiny_folder)), "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    for expected in ("Stage sft", "4 rows of about", "3 steps of 2 rows", "constraint=budget"):
        assert expected in shown.output
    assert "Memory on the device" in shown.output and "in all" in shown.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model_name_or_path=./gone", "model folder not found: ./gone"),
        ("lora_r=0", "the adapter's settings are refused: `r` should be a positive"),
        ("lr_scheduler_type=foo", "the training arguments are refused: foo is not a valid"),
        ("references.0.data=gone.jsonl", "reference `harmless`: file not found: gone.jsonl"),
        ("evaluation.measures.general=gone.jsonl", "file not found: gone.jsonl"),
        ("evaluation.judge=gpt", "A judge should be one of"),
    ],
)
def test_dry_run_says_what_is_wrong(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    done = _invoke("run", str(_recipe(tmp_path, tiny_folder)), "--dry-run", "--set", change)
    line = done.stderr.strip()
    assert done.exit_code == 2
    assert line.startswith("error: ") and message in line and "\n" not in line


def test_a_model_that_is_nowhere_is_no_folder_and_not_on_the_hub() -> None:
    done = _invoke("evaluate", "nowhere")
    assert done.exit_code == 2
    assert "nowhere: no folder of this name, and no usable tokenizer of it from" in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The output folder of a short 4-bit run without evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = _recipe(folder, tiny_folder, max_steps=1, load_in_4bit=True, evaluation=False)
    done = _invoke("run", str(recipe))
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def test_evaluate_puts_an_adapter_beside_its_base(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    recipe = str(trained.parent / "recipe.yaml")
    # The recipe of `trained` measures nothing, so the default measures apply, two rows of each.
    done = _invoke(
        "evaluate", str(trained / "adapter"), "--recipe", recipe, "--limit", "2",
        "--output", str(output),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "base" in done.stdout and "adapter" in done.stdout and "KL from base" in done.stdout
    assert json.loads(output.read_text())["measures"]["harmful.refused"]["n"] == 2


def test_a_terminal_that_lacks_characters_costs_no_results(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "measured.json", _recipe(tmp_path, tiny_folder)
    given = ["evaluate", str(tiny_folder), "--recipe", str(recipe), "--output", str(output)]
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["lora-ogpsa", *given])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert b"harmful refused" in shown.getvalue() and b"?" in shown.getvalue()
    assert json.loads(output.read_text())["measures"]["harmful.refused"]["n"] == 4


def test_a_place_for_results_that_cannot_be_written_is_found_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_ogpsa.measure.measure_model", None)
    for output, message in (
        (tmp_path, "is a folder. Give the name of a file"),
        (Path("/dev/null/measured.json"), "/dev/null/measured.json cannot be written"),
    ):
        done = _invoke("evaluate", str(tiny_folder), "--output", str(output))
        assert done.exit_code == 2 and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    check_result_file(tmp_path / "new" / "measured.json")
    assert not list((tmp_path / "new").iterdir())


def test_evaluates_limit_goes_for_measures_with_one_of_their_own(
    tiny_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "measured.json"
    measures = {
        "harmful": {"data": "embedded:eval_harmful", "limit": 3},
        "harmless": "embedded:eval_harmless",
    }
    recipe = _recipe(tmp_path, tiny_folder, evaluation={"measures": measures})
    limited = ("evaluate", str(tiny_folder), "--recipe", str(recipe), "--output", str(output))
    for limit, harmful, harmless in ((2, 2, 2), (4, 3, 4)):
        done = _invoke(*limited, "--limit", str(limit))
        assert done.exit_code == 0, done.stderr
        found = json.loads(output.read_text())["measures"]
        assert found["harmful.refused"]["n"] == harmful
        assert found["harmless.refused"]["n"] == harmless


def test_evaluate_an_adapter_at_several_weights(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    weights = ("--weight", "1", "--weight", "4")
    arguments = ("evaluate", str(trained / "adapter"), "--limit", "2", "--output", str(output))
    done = _invoke(*arguments, *weights)
    assert done.exit_code == 0, done.stderr
    assert "adapter x 1" in done.stdout and "adapter x 4" in done.stdout
    larger = json.loads(output.read_text())["measures"]["divergence.kl"]["value"]
    _invoke(*arguments)
    assert larger > json.loads(output.read_text())["measures"]["divergence.kl"]["value"]
    wrong = _invoke(*arguments, "--weight", "-1")
    assert wrong.exit_code == 2 and "positive number" in wrong.stderr


def test_evaluate_a_plain_model_and_a_missing_one(tiny_folder: Path, tmp_path: Path) -> None:
    done = _invoke("evaluate", str(tiny_folder), "--limit", "1")
    assert done.exit_code == 0, done.stderr
    assert "harmful refused" in done.stdout and "KL" not in done.stdout
    # What an evaluation notes about its numbers, such as answers that a judge left out.
    assert f"{tiny_folder}: divergence: left out, since" in done.stderr
    no_adapter = _invoke("evaluate", str(tiny_folder), "--weight", "2")
    assert no_adapter.exit_code == 2 and "no adapter folder" in no_adapter.stderr
    missing = _invoke("evaluate", str(tmp_path / "none"))
    assert missing.exit_code == 2 and missing.stderr.startswith("error: model folder not found")


def test_an_adapter_from_another_machine_finds_its_base_by_name(
    trained: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/somebody/else/model"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    done = _invoke("evaluate", str(moved), "--limit", "1")
    assert done.exit_code == 0, done.stderr
    facts = json.loads((moved / "ogpsa_run.json").read_text())
    assert facts["base"] == str(tiny_folder) and facts["dtype"] == "auto"


def test_merge_verifies_and_refuses_to_overwrite(trained: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = _invoke("merge", str(trained / "adapter"), str(merged), "--dtype", "float32")
    assert done.exit_code == 0, done.stderr
    assert "top-1" in done.stdout and (merged / "model.safetensors").is_file()
    again = _invoke("merge", str(trained / "adapter"), str(merged))
    assert again.exit_code == 2 and "is not empty" in again.stderr
    wrong = _invoke("merge", str(trained / "adapter"), str(tmp_path / "x"), "--strategy", "best")
    assert wrong.exit_code == 2 and "strategy is 'best'" in wrong.stderr


def test_merge_of_several_adapters_on_own_prompts(trained: Path, tmp_path: Path) -> None:
    """The same adapter at 1 and at -1 is the base model again, which the comparison sees."""
    adapter, prompts = str(trained / "adapter"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello there"}\n{"prompt": "what is 2 + 2?"}\n')
    merged = tmp_path / "merged"
    options = ["--dtype", "float32", "--prompts", str(prompts)]
    done = _invoke("merge", adapter, str(merged), "--with", f"{adapter}:-1", *options)
    assert done.exit_code == 0, done.stderr
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["verification"]["prompts"] == 2
    prompts.write_text('{"prompt": "hello there"}\n{"prompt": 5}\n')
    wrong = _invoke("merge", adapter, str(tmp_path / "wrong"), "--prompts", str(prompts))
    assert wrong.exit_code == 2 and "prompts.jsonl, row 2: `prompt` must be" in wrong.stderr
    strict = ["--max-kl", "0", "--min-top1", "1", "--weight", "0.5", "--dtype", "bfloat16"]
    failed = _invoke("merge", adapter, str(tmp_path / "strict"), *strict)
    assert failed.exit_code == 2
    assert not (tmp_path / "strict").exists()


def test_merges_limits_change_one_by_one(trained: Path, tmp_path: Path) -> None:
    """A QLoRA adapter in original weights keeps the wider limit that is not given."""
    adapter, merged = str(trained / "adapter"), tmp_path / "merged"
    for option, value, allowed in (
        ("--max-kl", "7", {"allowed_mean_kl": 7, "allowed_top1_agreement": 0.6}),
        ("--min-top1", "0.25", {"allowed_mean_kl": 0.5, "allowed_top1_agreement": 0.25}),
    ):
        options = ["--strategy", "original", option, value, "--overwrite"]
        done = _invoke("merge", adapter, str(merged), *options)
        assert done.exit_code == 0, done.stderr
        report = json.loads((merged / "merge_report.json").read_text())
        assert allowed.items() <= report["verification"]["comparisons"][0].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--with", "other:much"], "--with takes ADAPTER:WEIGHT"),
        (["--no-verify", "--max-kl", "0.1"], "--no-verify skips"),
        (["--quant-type", "int3"], "--quant-type should be nf4 or fp4"),
        (["--double-quant"], "need --quant-type"),
    ],
)
def test_merge_options_that_make_no_sense(
    trained: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = _invoke("merge", str(trained / "adapter"), str(tmp_path / "out"), *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_of_an_adapter_and_its_errors(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter.gguf"
    done = _invoke("export", str(trained / "adapter"), str(output))
    assert done.exit_code == 0, done.stderr
    assert output.read_bytes()[:4] == b"GGUF"
    wrong = _invoke("export", str(trained / "adapter"), str(output), "--modelfile")
    assert wrong.exit_code == 2 and "Merge first" in wrong.stderr
    missing = _invoke("export", str(tmp_path / "none"), str(tmp_path / "none.gguf"))
    assert missing.exit_code == 2 and missing.stderr.startswith("error: ")


def test_a_modelfile_that_is_there_is_found_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text("mine")
    done = _invoke("export", str(tiny_folder), str(tmp_path / "m.gguf"), "--modelfile")
    assert done.exit_code == 2 and "Modelfile exists" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["Modelfile"]


def test_errors_of_this_library_are_what_the_command_line_catches() -> None:
    from lora_ogpsa.console import TrainingError
    from lora_ogpsa.errors import OGPSAError

    assert issubclass(ConfigError, OGPSAError) and issubclass(TrainingError, OGPSAError)


@pytest.mark.slow
def test_smoke_of_the_quickstart(tmp_path: Path, embedded_model_dir: Path) -> None:
    """The shipped quickstart, every part of it, on the embedded model; about a minute."""
    recipe = str(ROOT / "recipes/quickstart.yaml")
    done = _command("run", recipe, "--smoke", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["finished"] and results["merge"]["verification"]["passed"]
    assert list(results["evaluation"]) == ["base", "ogpsa/sft", "plain/sft"]
