"""Adapters beside their base: whose tokenizer is used, resized vocabularies, hub ids."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, load_peft_weights
from recipes_for_tests import tiny_recipe

from lora_ogpsa.errors import DataError, ModelError, OGPSAError
from lora_ogpsa.evaluation import evaluate
from lora_ogpsa.measure import measure_model, recipe_suite
from lora_ogpsa.models import load_model
from lora_ogpsa.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_folder)), encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path, tiny_folder: Path, tiny_peft: Callable[..., Any]) -> Callable[..., Path]:
    """Saves an adapter of the tiny model, with a tokenizer where one is given."""

    def save(tokenizer: Any = None, model: Any = None, **lora: Any) -> Path:
        folder = tmp_path / "adapter"
        tuned = tiny_peft(model, warm=True, **lora)
        tuned.peft_config["default"].base_model_name_or_path = str(tiny_folder)
        tuned.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save


def test_the_bases_tokenizer_beside_the_adapter_changes_nothing(
    saved: Any, recipe: Path, tiny_tokenizer: Any
) -> None:
    alone = measure_model(str(saved()), recipe=recipe)
    beside = measure_model(str(saved(tiny_tokenizer)), recipe=recipe)
    assert list(alone) == list(beside) == ["base", "adapter"]
    for heading, result in beside.items():
        assert result.model == alone[heading].model
        assert result.items == alone[heading].items
        assert result.samples == alone[heading].samples


def test_no_name_of_an_adapters_folder_hides_its_base(
    saved: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_model(str(saved()), recipe=recipe)
    folder = saved().rename(recipe.parent / "base")
    monkeypatch.chdir(folder)
    for name in (str(folder), "."):
        found = measure_model(name, recipe=recipe)
        assert list(found) == ["base", "adapter base"]
        assert found["base"].items == expected["base"].items
        assert found["adapter base"].items == expected["adapter"].items


def test_all_that_is_measured_is_there_before_anything_is(
    saved: Any, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_recipe(tmp_path, tiny_folder)
    content["evaluation"]["measures"]["harmless"] = str(tmp_path / "gone.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")  # harmless last
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="measure `harmless`: file not found"):
        measure_model(str(saved()), recipe=path)
    assert not (tmp_path / "cache").exists()


def test_an_adapter_is_asked_through_its_own_template(
    saved: Any, recipe: Path, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "Be safe. " + tokenizer.chat_template
    folder = saved(tokenizer)
    found = measure_model(str(folder), recipe=recipe)
    bare, plain = load_model(str(tiny_folder))
    model = PeftModel.from_pretrained(bare, folder)
    suite = recipe_suite(load_recipe(recipe))
    for heading, base in (("base", True), ("adapter", False)):
        expected = evaluate(model, tokenizer, suite, base=base, cache_dir=None)
        assert found[heading].items == expected.items
        assert found[heading].samples == expected.samples
        other = evaluate(model, plain, suite, base=base, cache_dir=None)
        assert found[heading].items["general.nll"] != other.items["general.nll"]


@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_with_tokens_of_its_own(
    saved: Any, recipe: Path, tiny_model: Any, tiny_tokenizer: Any, trained: list[str] | None
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<|safe|>"])
    tokenizer.chat_template = "<|safe|>" + tokenizer.chat_template
    model = tiny_model()
    model.resize_token_embeddings(520)
    folder = saved(tokenizer, model, target_modules=["q_proj"], modules_to_save=trained)
    assert any(len(tensor) == 520 for tensor in load_peft_weights(str(folder)).values())
    first, again = (measure_model(str(folder), recipe=recipe) for _ in range(2))
    assert first["adapter"].measures["divergence.kl"].value > 0
    for heading, result in first.items():
        assert result.model == again[heading].model  # so that it is found in the cache


@pytest.mark.parametrize(
    ("record", "dtype"),
    [
        (None, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        # Of earlier versions' runs the dtype is known in 4 bits.
        ({"quantisation": {"load_in_4bit": True, "load_dtype": "bfloat16"}}, torch.bfloat16),
    ],
)
def test_the_base_is_loaded_in_the_dtype_of_the_training(
    saved: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch, record: Any, dtype: torch.dtype
) -> None:
    folder = saved()
    if record is not None:
        (folder / "ogpsa_run.json").write_text(json.dumps(record))
    seen = []

    def look(model: Any, *_: Any, **__: Any) -> None:
        seen.append(model.get_input_embeddings().weight.dtype)

    monkeypatch.setattr("lora_ogpsa.measure.evaluate_model", look)
    measure_model(str(folder), recipe=recipe)
    assert seen == [dtype, dtype]


def test_a_hub_id_is_evaluated_as_its_folder_is(
    saved: Any, recipe: Path, tiny_folder: Path, tiny_tokenizer: Any, on_hub: Any
) -> None:
    folder = saved(tiny_tokenizer)
    on_hub("someone/tuned", folder)
    local = measure_model(str(folder), recipe=recipe)
    found = measure_model("someone/tuned", recipe=recipe, weights=[1.0])
    assert list(found) == ["base", "tuned x 1"]
    assert found["base"].items == local["base"].items
    assert found["tuned x 1"].items == local["adapter"].items
    on_hub("someone/model", tiny_folder)
    (plain,) = measure_model("someone/model", recipe=recipe).values()
    assert plain.items == local["base"].items


def test_adapters_that_cannot_be_loaded_are_named(
    saved: Any, recipe: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = saved(tiny_tokenizer)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(OGPSAError, match="broken has no adapter_model.safetensors"):
        measure_model(str(broken), recipe=recipe)
    config = json.loads((broken / "adapter_config.json").read_text())
    for base in ("/nowhere/base", "../nowhere"):
        config["base_model_name_or_path"] = base
        (broken / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=f"not found: {base}. .*broken names this base"):
            measure_model(str(broken), recipe=recipe)
    shutil.copy(folder / "adapter_config.json", broken)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(OGPSAError, match="broken/adapter_model.safetensors cannot be read"):
        measure_model(str(broken), recipe=recipe)
    for name in ("ogpsa_run.json", "adapter_config.json"):
        (broken / name).write_text('{"peft_type": "LO')
        with pytest.raises(OGPSAError, match=f"broken/{name} cannot be read as JSON"):
            measure_model(str(broken), recipe=recipe)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "none"}))
    with pytest.raises(ModelError, match="no usable tokenizer in .*adapter"):
        measure_model(str(folder), recipe=recipe)
    with pytest.raises(ModelError, match="nobody/nothing"):
        measure_model("nobody/nothing", recipe=recipe)
