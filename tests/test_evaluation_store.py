"""Finished results on disk, and the fingerprints that keep models apart."""

import json
import threading

import pytest
import torch
from torch import nn

from lora_ogpsa.answers import base_mode
from lora_ogpsa.errors import ModelError
from lora_ogpsa.evaluation import fingerprint
from lora_ogpsa.evaluation.store import Section, Store


def filled(path, fingerprint="a" * 64, n=3):
    section = Section(path, fingerprint)
    section.add({section.key("prompt", i): {"answer": i} for i in range(n)})
    return section


def test_results_survive_the_process(tmp_path):
    filled(tmp_path / "x.jsonl")
    again = Section(tmp_path / "x.jsonl", "a" * 64)
    assert len(again) == 3
    assert again[again.key("prompt", 2)] == {"answer": 2}
    assert again.key("prompt", 3) not in again


@pytest.mark.parametrize("kept", [1, 5, -1])
def test_a_torn_last_line_costs_that_result_only(tmp_path, kept):
    path = tmp_path / "x.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    torn = Section(path, "a" * 64)
    # A line that lost no more than its line break is whole.
    assert len(torn) == (3 if kept == -1 else 2)
    torn.add({torn.key("prompt", 2): {"answer": 2}, torn.key("prompt", 9): {"answer": 9}})
    again = Section(path, "a" * 64)
    assert [again[again.key("prompt", i)]["answer"] for i in (0, 1, 2, 9)] == [0, 1, 2, 9]


def test_text_beyond_ascii_and_broken_bytes(tmp_path):
    path = tmp_path / "x.jsonl"
    section = Section(path, "f")
    section.add({section.key("é"): "日本語\u2028 line"})
    with path.open("ab") as file:
        file.write(b'\xff\xfe{"key": 1}\n[1, 2]\n')
    again = Section(path, "f")
    assert again[again.key("é")] == "日本語\u2028 line"
    assert len(again) == 1


def test_two_models_never_share_a_result(tmp_path):
    path = tmp_path / "same.jsonl"  # as if two files had been joined by hand
    first, second = filled(path), Section(path, "b" * 64)
    assert first.key("prompt", 1) in second  # the line is there ...
    assert second.key("prompt", 1) not in second  # ... but not under the other model's key
    store = Store(tmp_path)
    assert store.section("answers", "a" * 64).path != store.section("answers", "b" * 64).path


def test_several_writers_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "x.jsonl"

    def write(name):
        section = Section(path, "f")
        for i in range(50):
            section.add({section.key(name, i): "x" * 500})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in path.read_text().splitlines():
        if line:
            json.loads(line)
    assert len(Section(path, "f")) == 200


def test_without_a_folder_results_live_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None)
    section = store.section("answers", "f")
    section.add({section.key(1): 1})
    assert store.section("answers", "f")[section.key(1)] == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- fingerprints


def test_the_base_of_a_wrapped_model_is_the_bare_model(tiny_model, tiny_peft):
    bare = fingerprint(tiny_model())
    assert fingerprint(tiny_peft(warm=True, seed=1), base=True) == bare
    assert fingerprint(tiny_peft(warm=True, seed=2, r=8), base=True) == bare
    assert fingerprint(tiny_peft(modules_to_save=["lm_head"]), base=True) == bare
    assert fingerprint(tiny_model(seed=1)) != bare


def test_everything_that_changes_an_output_changes_the_fingerprint(tiny_peft):
    model = tiny_peft(warm=True)
    seen = [fingerprint(model), fingerprint(model, base=True)]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    def changed():
        seen.append(fingerprint(model))
        assert len(set(seen)) == len(seen)

    layer.scaling["default"] *= 0.5  # "the trained adapter scaled down afterwards"
    changed()
    layer.lora_B["default"].weight.data[0, 0] += 1e-6
    changed()
    layer.base_layer.weight.data[-1, -1] *= -1
    changed()
    model.base_model.disable_adapter_layers()
    changed()
    model.base_model.enable_adapter_layers()
    model.base_model.model.config.rope_parameters["rope_theta"] *= 2
    changed()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    changed()


def test_what_changes_no_output_leaves_the_fingerprint_alone(tiny_peft):
    model = tiny_peft(warm=True)
    before = fingerprint(model)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 3, 8, 1000, (1 << 20) + 5])
def test_single_bits_and_swaps_are_seen(dtype, size):
    holder = nn.Module()
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(size, generator=generator) * 50).to(dtype)
    holder.register_buffer("x", values)
    before = fingerprint(holder)
    raw = values.view(torch.uint8)
    raw[-1] ^= 1
    assert fingerprint(holder) != before
    raw[-1] ^= 1
    assert fingerprint(holder) == before
    if size > 3:
        # The sign bits of two words: a plain sum would not see these cancel.
        width = 8 // values.element_size()
        first, second = width - 1, 2 * width - 1
        if second < size:
            raw.view(size, -1)[[first, second], -1] ^= 128
            assert fingerprint(holder) != before
            raw.view(size, -1)[[first, second], -1] ^= 128
        values[[0, -1]] = values[[-1, 0]]
        assert fingerprint(holder) != before


def test_shape_name_and_alignment():
    def of(name, tensor):
        holder = nn.Module()
        holder.register_buffer(name, tensor)
        return fingerprint(holder)

    x = torch.arange(12.0)
    assert of("x", x) != of("y", x)
    assert of("x", x) != of("x", x.view(3, 4))
    assert of("x", x[1:9]) == of("x", x[1:9].clone())  # a view that starts off a word boundary
    assert of("x", x.view(3, 4).T) == of("x", x.view(3, 4).T.contiguous())
    assert of("x", torch.empty(0)) != of("x", torch.empty(0, 2))


def test_a_four_bit_model_has_a_fingerprint_of_its_own(tiny_4bit, tiny_model):
    model = tiny_4bit(warm=True)
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(model, base=True) == fingerprint(tiny_4bit(peft=False))
    assert fingerprint(model, base=True) != fingerprint(tiny_model())


def test_a_merged_adapter_has_no_base_to_evaluate(tiny_peft):
    model = tiny_peft(warm=True)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into 14 layers.*unmerge_adapter"):
        fingerprint(model, base=True)


def test_an_adapter_that_stays_on_has_no_base_to_evaluate(tiny_model, tiny_peft, tmp_path):
    tiny_peft(warm=True).save_pretrained(tmp_path)
    model = tiny_model()
    bare = fingerprint(model, base=True)
    with base_mode(model):  # nothing to switch off
        pass
    model.load_adapter(str(tmp_path))  # transformers' own way: layers without PEFT's switch
    assert fingerprint(model) != bare
    with pytest.raises(ModelError, match="14 adapter layers.*no `PeftModel`.*from_pretrained"):
        fingerprint(model, base=True)
    with pytest.raises(ModelError, match="no `PeftModel`"), base_mode(model):
        pass
    model.disable_adapters()
    assert fingerprint(model, base=True) == bare


def test_offloaded_weights_are_refused():
    with pytest.raises(ModelError, match="`weight` is offloaded"):
        fingerprint(nn.Linear(2, 2, bias=False, device="meta"))
