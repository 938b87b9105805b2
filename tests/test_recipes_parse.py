"""Every recipe that is shipped parses, plans, and says in its header how to run it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import tiny_recipe, write_rows
from references import data_folder
from rich.console import Console

from lora_ogpsa import chat, models
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.errors import DataError
from lora_ogpsa.memory import ModelSize, estimate, model_size, ogpsa_bytes
from lora_ogpsa.plan import make_plan, render, shown_settings
from lora_ogpsa.recipe import Recipe, load_recipe, parse_recipe
from lora_ogpsa.stage_data import checked_rows
from lora_ogpsa.stages import _trainer, load_base, lora_config, training_arguments

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def _shown(recipe: Recipe) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render(make_plan(recipe)), soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "sft_then_dpo", "llama3_8b_sft_24gb"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_trl_takes_its_arguments(path: Path, tmp_path: Path) -> None:
    for smoke in (False, True):
        recipe = load_recipe(path, smoke=smoke)
        for stage in recipe.stages:
            arguments = training_arguments(stage, tmp_path)
            assert arguments.max_length == stage.argument("max_length")
            assert arguments.logging_nan_inf_filter is False
        assert lora_config(recipe).r == recipe.model["lora_r"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_tells_how_to_run_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    header = "\n".join(lines)
    assert "Prerequisites:" in header and "Override:" in header
    assert f"lora-ogpsa run recipes/{path.name}" in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_plans_offline(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.model["model_name_or_path"] == models.EMBEDDED:
        try:
            models._embedded_gguf()
        except models.ModelError as error:
            pytest.skip(str(error))
    shown = _shown(recipe)
    for stage in recipe.stages:
        assert f"Stage {stage.name}" in shown and stage.dataset_name in shown
        for reference in stage.references:
            assert f"reference {reference.name}: kl on {reference.data}" in shown
    assert "% of the training tokens" in shown and "budget=0." in shown
    assert "OGPSA " in shown and "in all" in shown


def test_settings_are_shown_as_they_act_on_the_stages_loss() -> None:
    supervised, preferences = load_recipe(FOLDER / "sft_then_dpo.yaml").stages
    for stage, penalty, weight in ((supervised, 0.25, 0.33), (preferences, 0.0, 0.0)):
        assert stage.acting is not None
        shown = shown_settings(stage.acting)
        assert (shown["penalty"], shown["first_token_weight"]) == (penalty, weight)
    assert supervised.ogpsa == preferences.ogpsa
    both = replace(preferences, training={**preferences.training, "loss_type": ["sigmoid", "sft"]})
    # The second goes on with an adapter that a penalty would lead back.
    for stage, penalty in ((both, 0.0), (replace(both, from_base=True), 0.5)):
        assert stage.acting is not None
        assert (stage.acting.penalty, stage.acting.first_token_weight) == (penalty, 0.33)


def test_the_8b_recipe_fits_its_gpu_and_says_what_it_could_not_see() -> None:
    plan = make_plan(load_recipe(FOLDER / "llama3_8b_sft_24gb.yaml"))
    parts = plan.memory()
    assert 4e9 < parts["base weights"] < 7e9
    assert sum(parts.values()) < 20e9  # activations come on top
    assert plan.size is not None and "not on this machine" in plan.size.note
    assert "allenai/coconot is not on this machine" in " ".join(plan.stages[0].notes)
    assert plan.stages[0].steps == 125  # 4000 rows, drawn, in batches of 32


# ------------------------------------------------------------------------------------- the numbers


def test_sizes_are_those_of_the_loaded_model(tmp_path: Path, tiny_folder: Path) -> None:
    from peft import get_peft_model

    recipe = parse_recipe(tiny_recipe(tmp_path, tiny_folder, load_in_4bit=True))
    size = model_size(recipe)
    assert size is not None and not size.note
    model, _ = load_base(parse_recipe(tiny_recipe(tmp_path, tiny_folder)))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, lora_config(recipe))
    assert size.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    quantised, _ = load_base(recipe)
    weights = [m.weight for m in quantised.modules() if type(m).__name__ == "Linear4bit"]
    assert size.quantised == 2 * sum(w.numel() for w in weights)  # two per byte
    # bitsandbytes keeps offsets and a code table besides, a constant per layer.
    found = estimate(recipe, recipe.stages[0], size, 64)["base weights"]
    assert found == pytest.approx(quantised.get_memory_footprint(), rel=0.05)


def test_ogpsa_memory_follows_the_cost_model() -> None:
    d = 1000
    assert ogpsa_bytes(OGPSAConfig(), 2, d) == (2 + 4) * d * 4
    assert ogpsa_bytes(OGPSAConfig(penalty_of="latest"), 2, d) == (2 + 1 + 4) * d * 4
    rows = {"constraint": "orthogonal", "rank": 8, "sketch_size": 16}
    sketch = 17 * d * 4
    assert ogpsa_bytes(OGPSAConfig(**rows), 2, d) == 8 * d * 2 + sketch
    eight_bits = OGPSAConfig(**rows, basis_dtype="int8")
    assert ogpsa_bytes(eight_bits, 2, d) == pytest.approx(8 * d * (1 + 4 / 256) + sketch)
    assert ogpsa_bytes(OGPSAConfig(**rows, offload=True), 2, d) == 4 * d * 4
    restored = OGPSAConfig(**rows, restoration=0.5)  # reads the mean rows between refreshes
    assert ogpsa_bytes(restored, 2, d) == 8 * d * 2 + sketch + 2 * d * 4
    streaming = OGPSAConfig(**rows, refresh="stream")  # and never lets go of its sketches
    assert ogpsa_bytes(streaming, 2, d) == 8 * d * 2 + (2 + 4 + 32) * d * 4
    many = OGPSAConfig(**rows, references_per_refresh=64)  # shrunk on the way
    assert ogpsa_bytes(many, 2, d) == 8 * d * 2 + 32 * d * 4
    means = OGPSAConfig(constraint="orthogonal", rank=8, rows="means")
    assert ogpsa_bytes(means, 2, d) == 8 * d * 2 + 4 * d * 4


def test_overhead_follows_the_cost_model(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, ogpsa={"refresh_every": 2})
    plan = make_plan(parse_recipe(raw)).stages[0]
    half = make_plan(parse_recipe({**raw, "gradient_accumulation_steps": 2})).stages[0]
    assert plan.batch == 2 and half.batch == 4
    assert plan.overhead is not None and half.overhead == pytest.approx(plan.overhead / 2)
    plain = make_plan(parse_recipe({**raw, "ogpsa": False})).stages[0]
    assert plain.overhead is None


def test_steps_come_from_epochs_where_the_recipe_names_none(
    tmp_path: Path, tiny_folder: Path
) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, max_steps=None, num_train_epochs=3)
    assert make_plan(parse_recipe(raw)).stages[0].steps == 6  # 4 rows, batches of 2


def test_a_plan_checks_the_rows_that_are_here(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, max_length=8)
    with pytest.raises(DataError, match="row 1: the prompt has"):
        make_plan(parse_recipe(raw))
    missing = {**raw, "dataset_name": str(tmp_path / "gone.jsonl")}
    with pytest.raises(DataError, match="file not found"):
        make_plan(parse_recipe(missing))


def test_a_plan_reads_the_configuration_that_a_reference_names(
    tmp_path: Path, tiny_folder: Path
) -> None:
    rows = {name: [{"prompt": "word " * size}] * 3 for name, size in (("short", 2), ("long", 40))}
    (tmp_path / "data").mkdir()
    folder = data_folder(tmp_path / "data", **rows)
    overheads = []
    for config in rows:
        own = {"name": "own", "data": folder, "config": config, "split": "test"}
        recipe = parse_recipe(tiny_recipe(tmp_path, tiny_folder, references=[own]))
        assert recipe.stages[0].references[0].config == config
        overheads.append(make_plan(recipe).stages[0].overhead)
    assert overheads[0] < overheads[1]


def _chat(asked: str, answered: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
    ]


@pytest.mark.parametrize(
    ("row", "loss", "tokens"),
    [
        ({"input_ids": [5] * 6}, "kl", 6),
        ({"prompt": "x" * 39, "completion": "y" * 40}, "sft", 20),
        ({"prompt": "x" * 39, "completion": "y" * 40}, "kl", 10 + 32),
        ({"chosen": _chat("x" * 39, "y" * 39), "rejected": _chat("x" * 39, "z")}, "dpo", 30),
    ],
)
def test_a_plan_takes_every_kind_of_reference(
    tmp_path: Path, tiny_folder: Path, row: dict[str, Any], loss: str, tokens: int
) -> None:
    own = {"name": "own", "data": write_rows(tmp_path / "own.jsonl", [row]), "loss": loss}
    short = {"name": "short", "data": "embedded:harmless", "max_new_tokens": 1, "share": 3}
    overheads = []
    for references in ([own], [short], [own, short]):
        raw = tiny_recipe(tmp_path, tiny_folder, references=references, max_length=100)
        recipe = parse_recipe(raw | {"model_name_or_path": "someone/not-on-this-machine"})
        plan = make_plan(recipe).stages[0]
        assert plan.overhead is not None
        overheads.append(plan.overhead * plan.batch * plan.tokens / 3)
    of_own, of_short, mixed = overheads
    assert of_own == pytest.approx(tokens, abs=1)
    assert mixed == pytest.approx((of_own + 3 * of_short) / 4)


def test_a_plan_takes_a_references_own_rows(tmp_path: Path, tiny_folder: Path) -> None:
    rows = [
        {"prompt": "word " * size, "kind": kind}
        for kind, size in (("long", 40), ("short", 2))
        for _ in range(3)
    ]
    data = write_rows(tmp_path / "own.jsonl", rows)
    overheads = []
    for kind in ("short", "long"):
        own = {"name": "own", "data": data, "kind": kind}
        recipe = parse_recipe(tiny_recipe(tmp_path, tiny_folder, references=[own]))
        overheads.append(make_plan(recipe).stages[0].overhead)
    assert overheads[0] < overheads[1]


def test_a_plan_counts_tokens_as_they_are_trained(
    tmp_path: Path, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    """The chat template's too; of a pair the prompt stands before either answer."""
    raw = tiny_recipe(tmp_path, tiny_folder, references=None)
    row = {"prompt": "Hi", "chosen": "No.", "rejected": "Yes, gladly."}
    prompt = [{"role": "user", "content": "Hi"}]
    each = [
        sum(map(len, chat.encode(tiny_tokenizer, prompt, answer, max_length=128)))
        for answer in ("No.", "Yes, gladly.")
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", [row] * 4)
    dpo = parse_recipe({**raw, "trainer": "dpo", "dataset_name": pairs, "ogpsa": False})
    assert make_plan(dpo).stages[0].row_tokens == pytest.approx(sum(each), abs=1)
    answered = write_rows(tmp_path / "answered.jsonl", [{"prompt": "Hi", "completion": "No."}] * 4)
    sft = parse_recipe({**raw, "dataset_name": answered, "ogpsa": False})
    assert make_plan(sft).stages[0].row_tokens == each[0]


def test_a_plan_counts_the_steps_of_whole_batches(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, max_steps=None, num_train_epochs=2)
    raw |= {"per_device_train_batch_size": 3, "dataloader_drop_last": True}
    assert make_plan(parse_recipe(raw)).stages[0].steps == 2  # of 4 rows one is left


@pytest.mark.parametrize(
    "packing",
    [
        {"packing_strategy": "bfd"},
        {"packing_strategy": "bfd_split"},
        {"packing_strategy": "wrapped"},
        {"packing_strategy": "wrapped", "shuffle_dataset": True},
        {"dataloader_drop_last": True, "gradient_accumulation_steps": 3},
    ],
)
def test_a_plan_packs_rows_as_trl_does(
    packing: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    """Answers of all lengths, some too long; more rows than TRL packs at a time."""
    rows = [
        {"prompt": f"Question {i}", "completion": "so and so " * (1 + i * 7 % 23)}
        for i in range(1010)
    ]
    raw = tiny_recipe(tmp_path, tiny_folder, max_steps=None, num_train_epochs=1.5, ogpsa=False)
    raw |= {"dataset_name": write_rows(tmp_path / "rows.jsonl", rows), "max_length": 160}
    raw["per_device_train_batch_size"] = 4
    recipe = parse_recipe({**raw, "packing": True, **packing})
    stage, (model, tokenizer) = recipe.stages[0], load_base(recipe)
    arguments = training_arguments(stage, tmp_path)
    arguments.learning_rate = 0.0
    found = checked_rows(stage, tokenizer)
    trainer = _trainer(recipe, stage, arguments, model, tokenizer, found, fresh=True)
    trainer.compute_loss = lambda model, *_, **__: (
        0 * next(p for p in model.parameters() if p.requires_grad).sum()
    )
    trainer.train()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    plan = make_plan(recipe).stages[0]
    assert plan.rows == 1010 and plan.packed == len(lengths) < 1010
    assert plan.tokens == round(sum(lengths) / len(lengths))
    assert plan.steps == trainer.state.global_step
    shown = _shown(recipe)
    assert f"1010 rows, packed into {plan.packed} sequences of about {plan.tokens}" in shown
    assert f"{plan.steps} steps of {plan.batch} packed sequences" in shown


def test_a_plan_names_the_row_of_a_reference_that_is_none(
    tmp_path: Path, tiny_folder: Path
) -> None:
    data = write_rows(tmp_path / "own.jsonl", [{"prompt": "Hi"}, {"text": "no fields of ours"}])
    raw = tiny_recipe(tmp_path, tiny_folder, references=[{"name": "own", "data": data}])
    with pytest.raises(DataError, match="^reference `own`, row 2: no conversation found"):
        make_plan(parse_recipe(raw))


def test_an_unknown_model_has_a_plan_without_an_estimate(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(tmp_path, tiny_folder, model_name_or_path="someone/model")
    assert "there is no memory estimate" in _shown(parse_recipe(raw))


def test_a_size_in_the_name_scales_the_adapter(tmp_path: Path, tiny_folder: Path) -> None:
    def size(name: str, rank: int, **keys: bool) -> ModelSize:
        raw = tiny_recipe(tmp_path, tiny_folder, model_name_or_path=name, lora_r=rank, **keys)
        found = model_size(parse_recipe(raw))
        assert found is not None
        return found

    assert size("someone/model-8B", 16).adapter == 42_000_000  # as in the design's cost model
    assert size("someone/model-8B", 8).adapter == 21_000_000
    contrast = size("someone/model-8B", 16, contrast=True, compare=False).adapter
    assert contrast == 700_000  # no rank to choose
    assert size("someone/model-8B", 16, contrast=True, compare=True).adapter == 42_000_000
    assert size("someone/model-1.5b-chat", 16).parameters == 1_500_000_000
    assert size("someone/model-360M", 16).parameters == 360_000_000


def test_settings_that_have_no_say_are_not_shown() -> None:
    budget = shown_settings(OGPSAConfig())
    assert "budget" in budget and "rank" not in budget and "early_refreshes" not in budget
    rows = shown_settings(OGPSAConfig(constraint="orthogonal"))
    assert "rank" in rows and "budget" not in rows and "early_refreshes" in rows
    assert shown_settings(OGPSAConfig(preset="paper"))["preset"] == "paper"
