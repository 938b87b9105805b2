"""Recipes: which keys there are, how values are checked, what an override does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import tiny_recipe

from lora_ogpsa.errors import ConfigError
from lora_ogpsa.recipe import load_recipe, parse_recipe
from lora_ogpsa.recipe_file import read_recipe_file, shrunk
from lora_ogpsa.stages import training_arguments

MINIMAL = {
    "model_name_or_path": "embedded",
    "dataset_name": "embedded:safety_sft",
    "output_dir": "out",
}


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_minimal_recipe_takes_the_defaults() -> None:
    recipe = parse_recipe(MINIMAL)
    (stage,) = recipe.stages
    assert (stage.name, stage.trainer, stage.argument("seed")) == ("sft", "sft", 42)
    assert stage.ogpsa is not None and stage.ogpsa.constraint == "budget"
    assert [r.name for r in stage.references] == ["general", "general_first", "lookalike"]
    assert recipe.evaluation is not None and "harmful" in recipe.evaluation.measures
    assert recipe.arms == ["ogpsa"] and recipe.merge is None
    assert recipe.model["lora_target_modules"] == "all-linear" and recipe.model["lora_r"] == 16


def test_keys_are_those_of_trl_and_peft() -> None:
    recipe = parse_recipe(
        {
            **MINIMAL,
            "learning_rate": 1e-4,
            "lora_alpha": 8,
            "use_dora": True,
            "warmup_steps": 3,
            "lr_scheduler_type": "cosine",
            "save_steps": 5,
        }
    )
    assert recipe.model["use_dora"] and recipe.model["lora_alpha"] == 8
    training = recipe.stages[0].training
    assert training["learning_rate"] == 1e-4 and training["lr_scheduler_type"] == "cosine"
    assert training["save_strategy"] == "steps"  # asking for checkpoints switches them on


@pytest.mark.parametrize(
    ("changes", "place", "suggestion"),
    [
        ({"learning_rte": 1.0}, "recipe: unknown key `learning_rte`", "learning_rate"),
        ({"lora_rank": 8}, "recipe: unknown key `lora_rank`", "lora_"),
        ({"ogpsa": {"bugdet": 0.1}}, "recipe, ogpsa: unknown key `bugdet`", "budget"),
        (
            {"references": [{"name": "a"}, {"name": "b", "max_new_token": 3}]},
            "recipe, references[1]: unknown key `max_new_token`",
            "max_new_tokens",
        ),
        ({"evaluation": {"limits": 3}}, "recipe, evaluation: unknown key `limits`", "limit"),
        (
            {"evaluation": {"measures": {"harmful": {"dta": "x"}}}},
            "recipe, evaluation, measures.harmful: unknown key `dta`",
            "data",
        ),
        (
            {"stages": [{}, {"trainer": "dpo", "betta": 0.1}]},
            "recipe, stages[1]: unknown key `betta` with `trainer: dpo`",
            "beta",
        ),
        ({"beta": 0.1}, "unknown key `beta` with `trainer: sft`", ""),
        ({"stages": [{"lora_r": 4}]}, "stages[0]: `lora_r` belongs to the whole recipe", ""),
    ],
)
def test_unknown_keys_name_the_place_and_the_nearest(
    changes: dict[str, Any], place: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({**MINIMAL, **changes})
    assert place in str(caught.value)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": "sixty"}, "`max_steps` should be a whole number. Found 'sixty'"),
        ({"max_steps": True}, "`max_steps` should be a whole number"),
        ({"bf16": "yes please"}, "`bf16` should be true or false or null"),
        ({"lora_r": 1.5}, "`lora_r` should be a whole number"),
        ({"trainer": "ppo"}, "`trainer` should be `sft` or `dpo`"),
        ({"compare": 1}, "`compare` should be true or false"),
        ({"merge": "int8"}, "`merge` should be"),
        ({"ogpsa": 3}, "ogpsa: expected a mapping"),
        ({"ogpsa": {"budget": -1}}, "recipe, ogpsa: `budget` should be a number"),
        ({"references": []}, "references: should be a list of at least one mapping"),
        ({"references": [{"data": "x.jsonl"}]}, "references[0]: a reference needs a `name`"),
        ({"references": [{"name": "a", "loss": "mse"}]}, "references[0]: `loss` should be"),
        ({"references": [{"name": "a", "limit": 0}]}, "`limit` should be above 0"),
        ({"references": [{"name": "a"}, {"name": "a"}]}, "the name 'a' is given twice"),
        ({"evaluation": {"measures": {"mine": "x"}}}, "evaluation: The measure `mine` should say"),
        ({"stages": []}, "`stages` should be a list"),
        ({"stages": [{"name": "../up"}]}, "`name` becomes a folder's name"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "the name 'a' is given twice"),
        ({"rejected": "base"}, "`rejected: base` makes preference pairs, for `trainer: dpo`"),
        ({"dataset_limit": 0}, "`dataset_limit` should be at least 1"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` should be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` should be at least 1"),
        ({"max_steps": 0}, "`max_steps` should be at least 1, or -1 to go by"),
        ({"max_steps": -2}, "`max_steps` should be at least 1, or -1 to go by"),
        ({"num_train_epochs": 0}, "`num_train_epochs` should be above 0. Found 0"),
        ({"save_steps": 0}, "`save_steps` should be above 0. Found 0"),
        ({"learning_rate": -1e-4}, "`learning_rate` should be above 0. Found -0.0001"),
        ({"learning_rate": float("nan")}, "`learning_rate` should be above 0. Found nan"),
        ({"learning_rate": float("inf")}, "`learning_rate` should be above 0. Found inf"),
        ({"stages": [{}, {"max_length": 0}]}, "stages[1]: `max_length` should be at least 1"),
        ({"weight_decay": -0.1}, "`weight_decay` should be 0 or above. Found -0.1"),
        ({"trainer": "dpo", "beta": -0.1}, "`beta` should be above 0. Found -0.1"),
        ({"seed": -1}, "`seed` should be from 0 to 4294967295. Found -1"),
        ({"compare": True, "ogpsa": False}, "leaves nothing to compare with"),
        ({"use_peft": False}, "`use_peft` is not for recipes"),
        ({"resume_from_checkpoint": "x"}, "Pass --resume on the command line"),
        # Trainers would ignore the first, and fail by the others once they train.
        ({"eval_steps": 5}, "`eval_steps` is not for recipes. The `evaluation:` section"),
        ({"eval_on_start": True}, "`eval_on_start` is not for recipes. The `evaluation:` section"),
        ({"trainer": "dpo", "sync_ref_model": True}, "no model is kept that could follow"),
        ({"save_strategy": "best"}, "`save_strategy: best` is not for recipes. Nothing is eval"),
        ({"save_only_model": True}, "`save_only_model` is not for recipes. --resume goes on with"),
        ({"deepspeed": "ds.json"}, "`deepspeed` is not for recipes"),
        # Training would set it on the tokenizer that the base model was measured with before.
        ({"chat_template_path": "x.jinja"}, "`chat_template_path` is not for recipes. The base"),
        ({"eos_token": "</s>"}, "`eos_token` is not for recipes"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "`dataset_kwargs` is not for recipes"),
        ({"logging_nan_inf_filter": True}, "must not be hidden"),
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"output_dir": ""}, "`output_dir` is missing"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({**MINIMAL, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_override_the_top_level() -> None:
    recipe = parse_recipe(
        {
            **MINIMAL,
            "max_steps": 10,
            "beta": 0.2,
            "packing": False,
            "ogpsa": {"budget": 0.3},
            "stages": [
                {"trainer": "sft"},
                {
                    "trainer": "dpo",
                    "max_steps": 4,
                    "ogpsa": {"constraint": "halfspace"},
                    "references": [{"name": "mine"}],
                },
                {"trainer": "dpo", "name": "last", "ogpsa": False},
            ],
        }
    )
    first, second, third = recipe.stages
    assert [s.name for s in recipe.stages] == ["1-sft", "2-dpo", "last"]
    assert [s.argument("max_steps") for s in recipe.stages] == [10, 4, 10]
    # A key of the top level reaches the stages whose trainer knows it, and only those.
    assert "beta" not in first.training and second.training["beta"] == 0.2
    assert "packing" in first.training and "packing" not in second.training
    assert first.ogpsa is not None and first.ogpsa.budget == 0.3
    # A stage's section replaces the shared one; the two are not mixed.
    assert second.ogpsa is not None and second.ogpsa.budget == 0.2
    assert third.ogpsa is None
    assert [r.name for r in second.references] == ["mine"] and len(third.references) == 3
    assert recipe.arms == ["ogpsa"]


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    raw = read_recipe_file(
        _write(tmp_path, "learning_rate: 5e-4\nadam_epsilon: 1.0e-8\nweight_decay: 1E3\nx: e5\n")
    )
    assert raw == {"learning_rate": 5e-4, "adam_epsilon": 1e-8, "weight_decay": 1000.0, "x": "e5"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1\nmax_steps: 2\n", "line 2: not valid YAML: `max_steps` is given twice"),
        ("a: 1\nb: [1, 2\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys to values"),
        ("", "expected a mapping of keys to values. Found nothing"),
        ("stages:\n- {a: 1, a: 2}\n", "line 2: not valid YAML: `a` is given twice"),
        ("a: 1\n? [b, c]\n: 2\n", "line 2: not valid YAML: found unhashable key"),
        ("date: 2024-13-01\n", "not valid YAML: month must be in 1..12"),
        ("a: &a\n- *a\n", "an alias stands inside of what it names"),
    ],
)
def test_broken_files_are_reported_with_their_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_missing_recipe_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe not found"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_reach_into_sections_and_lists(tmp_path: Path, tiny_folder: Path) -> None:
    import yaml

    raw = tiny_recipe(tmp_path, tiny_folder, stages=[{"trainer": "sft"}, {"trainer": "dpo"}])
    path = _write(tmp_path, yaml.safe_dump(raw))
    recipe = load_recipe(
        path,
        overrides=[
            "ogpsa.budget=0.05",
            "stages.1.max_steps=7",
            "references.0.limit=2",
            "evaluation.limit=1",
            "learning_rate=2e-5",
        ],
        output_dir="elsewhere",
    )
    assert recipe.stages[0].ogpsa is not None and recipe.stages[0].ogpsa.budget == 0.05
    assert [s.argument("max_steps") for s in recipe.stages] == [3, 7]
    assert recipe.stages[0].references[0].limit == 2
    assert recipe.stages[0].argument("learning_rate") == 2e-5
    assert recipe.evaluation is not None and recipe.evaluation.limit == 1
    assert recipe.output_dir == Path("elsewhere")


def test_an_override_changes_one_of_the_places_that_share_an_anchor(tmp_path: Path) -> None:
    text = (
        "stages:\n"
        "- references: &shared\n  - &first {name: a, limit: 1}\n"
        "- references: *shared\n"
        "- references:\n  - {<<: *first, name: b}\n"
        "evaluation: {measures: &measures {harmful: {limit: 9}}}\n"
        "again: {<<: *measures}\n"
    )
    raw = read_recipe_file(
        _write(tmp_path, text),
        overrides=["stages.0.references.0.limit=7", "again.harmful.limit=8"],
    )
    limits = [stage["references"][0]["limit"] for stage in raw["stages"]]
    assert limits == [7, 1, 1]
    assert raw["evaluation"]["measures"]["harmful"]["limit"] == 9
    assert raw["again"]["harmful"]["limit"] == 8


def test_what_a_merge_key_brings_may_be_given_beside_it(tmp_path: Path) -> None:
    text = (
        "stages:\n- ogpsa: &p\n    budget: 0.1\n"
        "- references:\n  - &q {<<: *p, budget: 0.2}\n"
        "ogpsa:\n  <<: *q\n  decay: 0.9\n"
    )
    raw = read_recipe_file(_write(tmp_path, text))
    assert raw["ogpsa"] == {"budget": 0.2, "decay": 0.9}
    assert raw["stages"][1]["references"] == [{"budget": 0.2}]
    assert raw["stages"][0]["ogpsa"] == {"budget": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "--set takes key=value"),
        ("=3", "--set takes key=value"),
        ("stages.5.max_steps=3", "`5` should be the number of one of 1 items"),
        ("output_dir.x=3", "with nothing inside"),
        ("max_stps=3", "Did you mean `max_steps`?"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    path = _write(
        tmp_path, "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nstages: [{name: a}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides=[override])
    assert message in str(caught.value)


def test_smoke_shrinks_every_section_into_a_folder_of_its_own() -> None:
    raw = {
        **MINIMAL,
        "num_train_epochs": 3,
        "save_steps": 50,
        "stages": [
            {"trainer": "sft", "max_steps": 500},
            {"trainer": "dpo", "references": [{"name": "a", "limit": 400}]},
        ],
        "evaluation": {"measures": {"harmful": {"data": "embedded:eval_harmful", "limit": 300}}},
    }
    recipe = parse_recipe(shrunk(raw))
    assert raw["stages"][0]["max_steps"] == 500  # the original is left alone
    for stage in recipe.stages:
        assert stage.argument("max_steps") == 2
        assert stage.argument("save_strategy") == "no"
        assert stage.dataset_limit is not None and stage.dataset_limit <= 8
        assert all(r.limit is not None and r.limit <= 4 for r in stage.references)
    assert recipe.evaluation is not None and recipe.evaluation.limit == 4
    assert recipe.evaluation.measures["harmful"].limit is None
    assert recipe.output_dir == Path("out-smoke")


def test_an_override_wins_over_smoke(tmp_path: Path) -> None:
    path = _write(tmp_path, "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\n")
    recipe = load_recipe(path, smoke=True, overrides=["max_steps=5"], output_dir="mine")
    assert recipe.stages[0].argument("max_steps") == 5
    assert recipe.output_dir == Path("mine")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints too: the trainer is given the same folder as all the rest."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = _write(tmp_path, "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: ~/o\n")
    assert load_recipe(path).output_dir == tmp_path / "o"
    assert load_recipe(path, smoke=True).output_dir == tmp_path / "o-smoke"
    recipe = load_recipe(path, output_dir="~/mine")
    assert recipe.output_dir == tmp_path / "mine"
    arguments = training_arguments(recipe.stages[0], recipe.output_dir / "runs")
    assert arguments.output_dir == str(tmp_path / "mine/runs")


def test_evaluation_can_be_left_out_or_defaulted() -> None:
    assert parse_recipe({**MINIMAL, "evaluation": False}).evaluation is None
    suite = parse_recipe({**MINIMAL, "evaluation": {"limit": 3}}).evaluation
    assert suite is not None and suite.limit == 3 and set(suite.measures) >= {"harmful", "harmless"}
