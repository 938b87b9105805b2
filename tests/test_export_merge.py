"""The streamed merge against PEFT: same function, whole folders, nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_ogpsa import models
from lora_ogpsa.errors import ExportError, ModelError
from lora_ogpsa.export import Quantisation, describe_quantisation, merge_adapter
from lora_ogpsa.export.checkpoint import parse_size
from lora_ogpsa.export.folder import staged_file
from lora_ogpsa.initialisation import base_is_kept
from lora_ogpsa.quantised import keep_differentiable

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 51).view(2, 24)


def _llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **changes}))


def _randomise(model, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def _save_base(folder, model, **kwargs):
    torch.manual_seed(0)
    # Fresh models have zero biases; only other values can be lost.
    _randomise(model, seed=3, scale=0.02).save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return {
        "untied": _save_base(root / "untied", _llama(tie_word_embeddings=False)),
        "tied": _save_base(root / "tied", _llama(tie_word_embeddings=True)),
        "qwen2": _save_base(
            root / "qwen2", Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=False))
        ),
        "gpt2": _save_base(
            root / "gpt2",
            GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
            ),
        ),
    }


def _adapter(folder, base, seed=1, load=None, **config):
    model = load() if load else AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **config)
    _randomise(get_peft_model(model, config), seed=seed).save_pretrained(folder)
    return folder


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def _peft_logits(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return _logits(model.eval())


def _merge(adapter, output, **options):
    return merge_adapter(adapter, output, **{"progress": False, "dtype": "float32", **options})


LLAMA = {
    "linear": ("untied", {"target_modules": "all-linear"}),
    "dora": ("untied", {"target_modules": "all-linear", "use_dora": True}),
    "rslora": ("untied", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "untied",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "base_biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "lora_only_biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "trained_biases": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora_embedding": ("untied", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": ("untied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied_embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied_together": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tied_saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved_ends": (
        "untied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "saved_norms": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved_block": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LLAMA)
def test_merged_model_computes_what_the_peft_model_computes(case, bases, tmp_path):
    base, config = bases[LLAMA[case][0]], LLAMA[case][1]
    adapter = _adapter(tmp_path / "adapter", base, **config)
    expected = _peft_logits(base, adapter)
    _merge(adapter, tmp_path / "out", base=base, max_shard_size="100KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The adapter must matter, or agreement would prove nothing.
    assert (expected - _logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    torch.testing.assert_close(_logits(merged), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["linear", "dora", "rslora", "lora_bias", "conv1d"])
def test_merged_tensors_are_pefts_own(case, bases, tmp_path):
    base, config = bases[LLAMA[case][0]], LLAMA[case][1]
    adapter = _adapter(tmp_path / "adapter", base, **config)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = model.merge_and_unload().state_dict()
    _merge(adapter, tmp_path / "out", base=base)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings_are_untied_only_where_they_differ(bases, tmp_path):
    base = bases["tied"]
    apart = _adapter(tmp_path / "apart", base, target_modules=["embed_tokens"])
    together = _adapter(
        tmp_path / "together", base, target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    report = _merge(apart, tmp_path / "apart_out", base=base)
    _merge(together, tmp_path / "together_out", base=base)
    assert any("tie_word_embeddings" in note for note in report.notes)
    for name, tied in (("apart_out", False), ("together_out", True)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        names = load_file(tmp_path / name / "model.safetensors")
        assert ("lm_head.weight" in names) is not tied


def test_several_adapters_add_their_weighted_changes(bases, tmp_path):
    base = bases["untied"]
    first = _adapter(tmp_path / "first", base, seed=1, target_modules=["q_proj", "up_proj"])
    second = _adapter(tmp_path / "second", base, seed=2, target_modules=["q_proj"], use_dora=True)
    _merge([(first, 0.5), (second, -2.0)], tmp_path / "out", base=base)
    start, merged = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    alone = []
    for adapter in (first, second):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        alone.append(model.merge_and_unload().state_dict())
    for name, tensor in merged.items():
        expected = start[name] + 0.5 * (alone[0][name] - start[name])
        expected = expected - 2.0 * (alone[1][name] - start[name])
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


def test_two_adapters_at_weight_one_compute_what_peft_computes_with_both_active(bases, tmp_path):
    base = bases["untied"]
    first = _adapter(tmp_path / "first", base, seed=1, target_modules=["q_proj"])
    second = _adapter(tmp_path / "second", base, seed=2, target_modules="all-linear")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), first, adapter_name="a"
    )
    model.load_adapter(second, adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    _merge([(first, 1), (second, 1)], tmp_path / "out", base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(merged), _logits(model.eval()), atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(LoraLayer, "mica_init"), reason="this PEFT has no MiCA")
def test_mica_reads_the_base_and_leaves_it_alone(bases, tmp_path):
    base = bases["untied"]
    before = _logits(AutoModelForCausalLM.from_pretrained(base))
    config = LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights="mica")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    assert base_is_kept(model)
    torch.testing.assert_close(_logits(model), before, atol=0, rtol=0)
    with _randomise(model).disable_adapter():
        torch.testing.assert_close(_logits(model), before, atol=0, rtol=0)
    model.save_pretrained(tmp_path / "adapter")
    _merge(tmp_path / "adapter", tmp_path / "out", base=base)
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (merged - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, _logits(model), atol=2e-5, rtol=1e-4)


def test_more_than_ten_adapters_do_not_get_in_each_others_way(bases, tmp_path):
    """Numbered names contain one another from the eleventh on."""
    base = bases["untied"]
    adapters = [
        _adapter(tmp_path / f"a{number}", base, seed=number, target_modules=[module])
        for number, module in enumerate(["q_proj", "v_proj"] * 6)
    ]
    _merge([(adapter, 0.5) for adapter in adapters], tmp_path / "out", base=base)
    start, merged = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    for first, module in enumerate(["q_proj", "v_proj"]):
        name = f"model.layers.1.self_attn.{module}.weight"
        expected = start[name].clone()
        for adapter in adapters[first::2]:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
            expected += 0.5 * (model.merge_and_unload().state_dict()[name] - start[name])
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_merged_whole_or_not_at_all(bias, bases, tmp_path):
    base = bases["qwen2"]
    adapter = _adapter(tmp_path / "adapter", base, target_modules=["q_proj"], bias=bias)
    with pytest.raises(ExportError, match=rf"bias: {bias}.*weight 0\.5.*weight 1"):
        _merge([(adapter, 0.5)], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ 4 bits


def _load_4bit(base, dtype=torch.float32, **settings):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=dtype, device_map="cpu"
    )
    keep_differentiable(model)
    return model


def _dequantised_weights(model):
    from bitsandbytes.functional import dequantize_4bit

    return {
        f"{name}.weight": dequantize_4bit(m.weight.data, m.weight.quant_state)
        for name, m in model.named_modules()
        if hasattr(getattr(m, "weight", None), "quant_state")
    }


FOUR_BIT = {
    "nf4_double": ("untied", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": ("untied", {"bnb_4bit_quant_type": "fp4"}),
    "skipped": (
        "tied",
        {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["up_proj", "lm_head"]},
    ),
    "conv1d": ("gpt2", {"bnb_4bit_quant_type": "nf4"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FOUR_BIT)
def test_dequantised_merge_starts_from_the_very_weights_of_the_4bit_model(
    case, dtype, bases, tmp_path
):
    base, settings = bases[FOUR_BIT[case][0]], FOUR_BIT[case][1]
    model = _load_4bit(base, dtype, **settings)
    stored = _dequantised_weights(model)
    facts = {"quantisation": describe_quantisation(model)}
    target = ["c_attn"] if case == "conv1d" else ["q_proj"]
    # A zero adapter, so that the merged weights are the base's as the adapter saw them.
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(target_modules=target)).save_pretrained(folder)
    (folder / "ogpsa_run.json").write_text(json.dumps(facts))
    report = _merge(folder, tmp_path / "out", base=base)
    assert report.strategy == "dequantised"
    assert report.requantised_modules == len(stored) > 0
    original = load_file(base / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = stored.get(name)
        if expected is None:
            expected = original[name].to(dtype)
        elif case == "conv1d":
            expected = expected.T
        assert torch.equal(tensor, expected.float()), name


@pytest.mark.parametrize("dora", [False, True])
def test_dequantised_merge_reproduces_a_qlora_model(dora, bases, tmp_path):
    base = bases["untied"]
    settings = FOUR_BIT["nf4_double"][1]
    adapter = _adapter(
        tmp_path / "adapter",
        base,
        load=lambda: _load_4bit(base, **settings),
        target_modules="all-linear",
        use_dora=dora,
    )
    trained = _logits(PeftModel.from_pretrained(_load_4bit(base, **settings), adapter).eval())
    errors = {}
    for strategy in ("dequantised", "original"):
        _merge(adapter, tmp_path / strategy, base=base, strategy=strategy)
        merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / strategy))
        errors[strategy] = ((merged - trained).norm() / trained.norm()).item()
    assert errors["dequantised"] < 1e-5
    assert errors["original"] > 0.02


def test_without_any_dtype_on_record_the_stored_one_is_quantised(bases, adapter, tmp_path):
    shutil.copytree(bases["untied"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    outputs = []
    for number, base in enumerate((bases["untied"], tmp_path / "base")):
        report = _merge(adapter, tmp_path / str(number), base=base, strategy="dequantised")
        outputs.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert "was assumed" in report.notes[0]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_a_base_stored_in_4_bits_is_merged_from_its_own_weights(bases, tmp_path):
    model = _load_4bit(bases["untied"], **FOUR_BIT["nf4_double"][1])
    stored = _dequantised_weights(model)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    report = _merge(tmp_path / "a", tmp_path / "out", base=tmp_path / "base")
    assert report.strategy == "dequantised"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor.float()) for name, tensor in stored.items())
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(ExportError, match="no original weights"):
        _merge(tmp_path / "a", tmp_path / "x", base=tmp_path / "base", strategy="original")
    # On record as trained on 16 bits, which `auto` would merge into the original weights.
    (tmp_path / "a" / "ogpsa_run.json").write_text('{"quantisation": null}')
    with pytest.raises(ExportError, match="no original weights"):
        _merge(tmp_path / "a", tmp_path / "x", base=tmp_path / "base")
    assert not (tmp_path / "x").exists()


def test_auto_says_when_nothing_is_known_about_the_training(bases, adapter, tmp_path):
    report = _merge(adapter, tmp_path / "out", base=bases["untied"])
    assert report.strategy == "original"
    assert "No record says" in report.notes[0]
    (Path(adapter) / "ogpsa_run.json").write_text('{"quantisation": null}')
    report = _merge(adapter, tmp_path / "out2", base=bases["untied"])
    assert (report.strategy, report.notes) == ("original", [])


def test_given_quantisation_wins_over_the_record(bases, adapter, tmp_path):
    (Path(adapter) / "ogpsa_run.json").write_text('{"quantisation": null}')
    given = Quantisation(quant_type="fp4", double_quant=False)
    report = _merge(adapter, tmp_path / "out", base=bases["untied"], quantisation=given)
    assert (report.strategy, report.quantisation) == ("dequantised", given)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"load_in_8bit": True}, "8 bits"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_other_quantisations_are_refused_unless_the_original_is_asked_for(
    facts, match, bases, adapter, tmp_path
):
    (Path(adapter) / "ogpsa_run.json").write_text(json.dumps({"quantisation": facts}))
    with pytest.raises(ExportError, match=match):
        _merge(adapter, tmp_path / "out", base=bases["untied"])
    report = _merge(adapter, tmp_path / "out", base=bases["untied"], strategy="original")
    assert "cannot be measured" in report.notes[0]


# ---------------------------------------------------------------------------------- the folder


@pytest.fixture
def adapter(bases, tmp_path):
    return _adapter(tmp_path / "adapter", bases["untied"], target_modules=["q_proj"])


def test_shards_and_index_follow_the_size_limit(bases, adapter, tmp_path):
    _merge(adapter, tmp_path / "out", base=bases["untied"], max_shard_size="100KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = dict.fromkeys(files, 0)
    for file in files:
        for name, tensor in load_file(tmp_path / "out" / file).items():
            assert index["weight_map"][name] == file
            sizes[file] += tensor.nbytes
    assert max(sizes.values()) <= 100_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]


def test_base_may_be_sharded_or_without_the_models_prefix(bases, adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["untied"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    _merge(adapter, tmp_path / "whole_out", base=bases["untied"])
    _merge(adapter, tmp_path / "sharded_out", base=tmp_path / "sharded")
    whole = load_file(tmp_path / "whole_out" / "model.safetensors")
    sharded = load_file(tmp_path / "sharded_out" / "model.safetensors")
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)

    gpt2 = _adapter(tmp_path / "g", bases["gpt2"], target_modules=["c_attn"], fan_in_fan_out=True)
    bare = GPT2LMHeadModel.from_pretrained(bases["gpt2"])
    bare.transformer.save_pretrained(tmp_path / "bare")
    _merge(gpt2, tmp_path / "bare_out", base=tmp_path / "bare")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "bare_out")
    torch.testing.assert_close(_logits(merged), _peft_logits(bases["gpt2"], gpt2))


def test_tensors_unknown_to_the_model_class_are_copied(bases, adapter, tmp_path):
    shutil.copytree(bases["untied"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = _merge(adapter, tmp_path / "out", base=tmp_path / "base")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["model.extra.weight"], torch.ones(3))
    assert "model.extra.weight" in report.notes[-1]


def test_a_resized_vocabulary_comes_from_the_adapter(bases, tmp_path):
    def load():
        model = AutoModelForCausalLM.from_pretrained(bases["untied"])
        model.resize_token_embeddings(VOCAB + 4)
        return model

    adapter = _adapter(
        tmp_path / "adapter",
        bases["untied"],
        load=load,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    expected = _logits(PeftModel.from_pretrained(load(), adapter).eval())
    # Over and over: whether a new tensor gets the id of one that was dropped is chance.
    for _ in range(20):
        _merge(adapter, tmp_path / "out", base=bases["untied"], overwrite=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == VOCAB + 4
    torch.testing.assert_close(_logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_default_dtype_base_and_files(bases, adapter, tmp_path):
    (bases["untied"] / "tokenizer_config.json").write_text('{"from": "base"}')
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases["untied"])
    merge_adapter(adapter, tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["from"] == "base"
    # Training may have added tokens or a template: the adapter's tokenizer goes first.
    (Path(adapter) / "tokenizer_config.json").write_text('{"from": "adapter"}')
    (Path(adapter) / "chat_template.jinja").write_text("{{ messages }}")
    merge_adapter(adapter, tmp_path / "out", progress=False, overwrite=True)
    copied = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert copied["from"] == "adapter"
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    (bases["untied"] / "tokenizer_config.json").unlink()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_at_the_end(
    bases, adapter, tmp_path
):
    out = tmp_path / "out"
    _merge(adapter, out, base=bases["untied"])
    (out / "mine.txt").write_text("old")
    with pytest.raises(ExportError, match="--overwrite"):
        _merge(adapter, out, base=bases["untied"])

    def fail(folder, report):
        assert (out / "mine.txt").read_text() == "old"
        raise ExportError("not good enough")

    with pytest.raises(ExportError, match="not good enough"):
        _merge(adapter, out, base=bases["untied"], overwrite=True, before_publish=fail)
    assert (out / "mine.txt").read_text() == "old"
    _merge(adapter, out, base=bases["untied"], overwrite=True)
    assert not (out / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_overwrite_does_not_delete_what_is_no_export(bases, adapter, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(ExportError, match="not an earlier export"):
        _merge(adapter, tmp_path / "home", base=bases["untied"], overwrite=True)
    for overlap in (bases["untied"], bases["untied"] / "sub", bases["untied"].parent, adapter):
        with pytest.raises(ExportError, match="overlaps"):
            _merge(adapter, overlap, base=bases["untied"], overwrite=True)
    # Another model, and an export beside which something else was put.
    other, out = shutil.copytree(bases["tied"], tmp_path / "other"), tmp_path / "out"
    with pytest.raises(ExportError, match="no merge_report.json.* not an earlier export"):
        _merge(adapter, other, base=bases["untied"], overwrite=True)
    _merge(adapter, out, base=bases["untied"])
    (out / "checkpoints").mkdir()
    with pytest.raises(ExportError, match="holds checkpoints beside an earlier export"):
        _merge(adapter, out, base=bases["untied"], overwrite=True)
    assert (other / "model.safetensors").is_file() and (out / "checkpoints").is_dir()
    # A tokenizer with several templates has a folder of them, which a merge copies.
    (out / "checkpoints").rename(out / "additional_chat_templates")
    _merge(adapter, out, base=bases["untied"], overwrite=True)


def test_a_link_is_no_place_for_a_merge(bases, adapter, tmp_path):
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(ExportError, match=f"link is a symbolic link to {out}"):
        _merge(adapter, link, base=bases["untied"])
    _merge(adapter, out, base=bases["untied"])
    with pytest.raises(ExportError, match=f"link is a symbolic link to {out}"):
        _merge(adapter, link, base=bases["untied"], overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "link", "out"]


@pytest.mark.parametrize("output", [".", "deeper/.."])
def test_a_folder_without_a_name_of_its_own_is_no_place_for_a_merge(
    output, bases, adapter, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="no name of its own"):
        merge_adapter(adapter, output, base=bases["tied"], progress=False)
    assert not list((tmp_path / "here").iterdir())


def test_places_that_cannot_be_written_are_named(bases, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (Path("/dev/null/out"), tmp_path / "file" / "out"):
        with pytest.raises(ExportError, match=f"{output} cannot be written: .*another place"):
            _merge(adapter, output, base=bases["untied"])
        with (
            pytest.raises(ExportError, match=f"{output} cannot be written"),
            staged_file(output, overwrite=False),
        ):
            raise AssertionError("nothing is worth making for this place")
    with (
        pytest.raises(ExportError, match="is a folder"),
        staged_file(tmp_path, overwrite=True),
    ):
        raise AssertionError


def test_too_little_disk_is_found_before_writing(bases, adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=70 * 1024**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _merge(adapter, tmp_path / "fits", base=bases["untied"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60 * 1024**2))
    with pytest.raises(ExportError, match=r"needs 0\.07 GB, but only 0\.06 GB are free"):
        _merge(adapter, tmp_path / "new" / "out", base=bases["untied"])
    assert not (tmp_path / "new").exists()


KILLED = """
import sys, time
from lora_ogpsa.export import checkpoint, merge_adapter

add = checkpoint.ShardWriter.add

def slow_add(self, name, tensor):
    add(self, name, tensor)
    print(name, flush=True)
    time.sleep(0.2)

checkpoint.ShardWriter.add = slow_add
merge_adapter(sys.argv[1], sys.argv[2], base=sys.argv[3], progress=False, max_shard_size="50KB")
"""


def test_a_killed_merge_leaves_nothing_that_looks_whole(bases, adapter, tmp_path, caplog):
    out = tmp_path / "out"
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(adapter), str(out), str(bases["untied"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    for _ in range(8):
        assert process.stdout.readline()
    process.kill()
    process.wait()
    assert not out.exists()
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".out.partial-")]
    assert len(left) == 1
    assert list(left[0].glob("part-*"))
    assert not (left[0] / "config.json").exists()
    assert not list(left[0].glob("*.safetensors"))
    _merge(adapter, out, base=bases["untied"])
    assert (out / "config.json").is_file()
    assert str(left[0]) in caplog.text


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
        ({"layer_replication": [[0, 1]]}, "replicates layers"),
        ({"alora_invocation_tokens": [1]}, "certain tokens"),
    ],
)
def test_adapters_that_are_not_plain_weights_are_refused(change, match, bases, adapter, tmp_path):
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=match):
        _merge(adapter, tmp_path / "out", base=bases["untied"])


def test_an_adapter_of_another_base_is_refused(bases, adapter, tmp_path):
    with pytest.raises(ExportError, match="does not fit the base"):
        _merge(adapter, tmp_path / "out", base=bases["gpt2"])
    _save_base(tmp_path / "deeper", _llama(num_hidden_layers=3))
    with pytest.raises(ExportError, match="do not fit the base model"):
        _merge(adapter, tmp_path / "out", base=tmp_path / "deeper")
    _save_base(tmp_path / "wider", _llama(hidden_size=32, intermediate_size=64))
    with pytest.raises(ExportError, match="do not fit the base"):
        _merge(adapter, tmp_path / "out", base=tmp_path / "wider")


def test_a_lora_bias_without_a_base_bias_is_refused(bases, tmp_path):
    adapter = _adapter(
        tmp_path / "adapter", bases["untied"], target_modules=["q_proj"], lora_bias=True
    )
    with pytest.raises(ExportError, match="PEFT cannot merge"):
        _merge(adapter, tmp_path / "out", base=bases["untied"])


def test_incomplete_and_pickled_bases_are_refused(bases, adapter, tmp_path):
    shutil.copytree(bases["untied"], tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pickled \.bin"):
        _merge(adapter, tmp_path / "out", base=tmp_path / "bin")
    model = AutoModelForCausalLM.from_pretrained(bases["untied"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ExportError, match="lacks model-00002"):
        _merge(adapter, tmp_path / "out", base=tmp_path / "shards")
    shutil.copytree(bases["untied"], tmp_path / "holes")
    tensors = load_file(tmp_path / "holes" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lack 1 tensors.*model\.norm\.weight"):
        _merge(adapter, tmp_path / "out", base=tmp_path / "holes")


def test_of_a_single_file_and_an_index_the_file_is_read(bases, adapter, tmp_path):
    # As transformers does, which the verification loads the base with.
    both = shutil.copytree(bases["tied"], tmp_path / "both")
    other = {k: torch.zeros_like(v) for k, v in load_file(both / "model.safetensors").items()}
    save_file(other, both / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, base in (("a", both), ("b", bases["tied"])):
        merge_adapter(adapter, tmp_path / name, base=base, progress=False)
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


def test_an_adapter_from_another_machine_finds_its_base_by_name(bases, adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="/nowhere/base does not exist"):
        merge_adapter(moved, tmp_path / "out", progress=False)
    (moved / "ogpsa_run.json").write_text(json.dumps({"base": str(bases["tied"])}))
    assert merge_adapter(moved, tmp_path / "out", progress=False).base_folder == bases["tied"]


def test_what_does_not_fit_is_said_in_one_line(bases, adapter, tmp_path):
    wider = _save_base(tmp_path / "wider", _llama(hidden_size=128))
    with pytest.raises(ExportError, match="size mismatch .* as --base") as caught:
        merge_adapter(adapter, tmp_path / "out", base=wider, progress=False)
    assert "\n" not in str(caught.value)
    config = json.loads((wider / "config.json").read_text())
    for change in ({"model_type": "martian"}, {"hidden_size": "wide"}):
        (wider / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match="the config of .*wider cannot be read") as caught:
            merge_adapter(adapter, tmp_path / "out", base=wider, progress=False)
        assert "\n" not in str(caught.value)


def test_damaged_files_are_named(bases, adapter, tmp_path):
    adapter, base = Path(adapter), shutil.copytree(bases["untied"], tmp_path / "base")
    for file, text, match in (
        (base / "model.safetensors", None, "base/model.safetensors cannot be read"),
        (base / "config.json", "{", "base/config.json cannot be read as JSON"),
        (adapter / "adapter_model.safetensors", None, "adapter_model.safetensors cannot be read"),
        (adapter / "ogpsa_run.json", "{", "ogpsa_run.json cannot be read as JSON"),
        (adapter / "adapter_config.json", "{", "adapter_config.json cannot be read as JSON"),
        (adapter / "adapter_config.json", "[]", "should hold an object, not list"),
    ):
        whole = file.read_bytes() if file.exists() else b"{}"
        file.write_bytes(whole[: len(whole) // 2] if text is None else text.encode())
        with pytest.raises(ExportError, match=match) as caught:
            _merge(adapter, tmp_path / "out", base=base)
        assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="adapter has no adapter_model.safetensors"):
        _merge(adapter, tmp_path / "out", base=base)


def test_a_base_stored_in_another_quantisation_is_refused(bases, adapter, tmp_path):
    shutil.copytree(bases["untied"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for strategy in ("auto", "original"):
        with pytest.raises(ExportError, match=r"stored quantised \(fp8\)"):
            _merge(adapter, tmp_path / "out", base=tmp_path / "base", strategy=strategy)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strategy": "best"}, "strategy is 'best'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_shard_size": "much"}, "max_shard_size"),
        ({"base": "/no/such/place"}, "/no/such/place"),
    ],
)
def test_wrong_settings_are_named(options, match, bases, adapter, tmp_path):
    with pytest.raises(ExportError, match=match):
        _merge(adapter, tmp_path / "out", **{"base": bases["untied"], **options})
    for weight in ("nan", "inf"):
        with pytest.raises(ExportError, match=f"the weight of the adapter .* Found {weight}"):
            _merge([(adapter, float(weight))], tmp_path / "out", base=bases["untied"])
    with pytest.raises(ExportError, match="no adapter"):
        _merge([], tmp_path / "out", base=bases["untied"])
    with pytest.raises(ExportError, match="adapter_config"):
        _merge(tmp_path / "nothing", tmp_path / "out", base=bases["untied"])


@pytest.mark.parametrize(
    ("device", "match"), [("gpu", "unknown device 'gpu'"), ("cuda:99", "'cuda:99' is not there")]
)
def test_a_device_that_is_not_there_is_named(device, match, bases, adapter, tmp_path):
    with pytest.raises(ModelError, match=match):
        _merge(adapter, tmp_path / "out", base=bases["untied"], device=device)


def test_named_bases_are_found(bases, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "embedded_folder", lambda: bases["untied"])
    assert _merge(adapter, tmp_path / "out", base="embedded").base == "embedded"
    asked = []

    def download(name, **options):
        asked.append((name, options["allow_patterns"]))
        if name == "someone/gone":
            raise OSError("404")
        return str(bases["untied"] if options["allow_patterns"] else adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    report = _merge("someone/adapter", tmp_path / "out2", base="someone/model")
    assert (report.base, report.base_folder) == ("someone/model", bases["untied"])
    assert [name for name, _ in asked] == ["someone/adapter", "someone/model"]
    assert "*.safetensors" in asked[1][1]
    path = Path(adapter) / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "someone/gone"}
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"someone/gone.*adapter names this base.*404"):
        _merge(adapter, tmp_path / "out3")
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="does not name its base"):
        _merge(adapter, tmp_path / "out3")


def test_progress_goes_to_standard_error(bases, adapter, tmp_path, capsys):
    _merge(adapter, tmp_path / "out", base=bases["untied"], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "21/21 tensors" in captured.err


def test_sizes():
    assert parse_size("2GB") == 2_000_000_000
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size(7) == 7


def test_mixture_models_merge_their_attention_and_refuse_fused_experts(tmp_path):
    # transformers fuses the experts while loading; the files keep one tensor per expert.
    config = MixtralConfig(**{**COMMON, "num_local_experts": 2, "sliding_window": None})
    base = _save_base(tmp_path / "base", MixtralForCausalLM(config))
    adapter = _adapter(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"])
    report = _merge(adapter, tmp_path / "out", base=base)
    assert "copied unchanged" in report.notes[-1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(merged), _peft_logits(base, adapter), atol=2e-5, rtol=1e-4)
    fused = _adapter(
        tmp_path / "fused", base, target_modules=[], target_parameters=["experts.down_proj"]
    )
    with pytest.raises(ExportError, match="another layout"):
        _merge(fused, tmp_path / "fused_out", base=base)
