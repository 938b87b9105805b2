import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ogpsa import AdapterSpace
from lora_ogpsa.errors import AdapterError


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer, to be adapted together."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.conv(x.unsqueeze(1)).mean(1))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_trainable_lora_parameter_is_in_one_block(tiny_peft):
    model = tiny_peft()
    space = AdapterSpace.from_model(model)
    assert set(space.parameter_names) == trainable(model)
    assert len(space.parameter_names) == len(set(space.parameter_names))
    assert space.size == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(block.capturable for block in space.blocks)


def test_block_is_one_module_with_its_a_and_b(tiny_peft):
    space = AdapterSpace.from_model(tiny_peft())
    block = next(b for b in space.blocks if b.name.endswith("layers.0.self_attn.q_proj"))
    assert [n.rsplit(".", 3)[1] for n in block.parameters] == ["lora_A", "lora_B"]
    assert block.size == sum(block.sizes)


@pytest.mark.parametrize(
    ("options", "extra", "capturable"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", False),
        ({"lora_bias": True}, "lora_B.default.bias", True),
        ({"use_rslora": True}, "lora_A", True),
    ],
)
def test_variants(tiny_peft, options, extra, capturable):
    model = tiny_peft(**options)
    space = AdapterSpace.from_model(model)
    assert sorted(space.parameter_names) == sorted(trainable(model))
    assert all(any(extra in name for name in block.parameters) for block in space.blocks)
    assert all(block.capturable is capturable for block in space.blocks)


def test_embedding_convolution_and_linear():
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["embed", "conv", "head"]))
    space = AdapterSpace.from_model(model)
    assert set(space.parameter_names) == trainable(model)
    kinds = {block.name.rsplit(".", 1)[1]: block.capturable for block in space.blocks}
    assert kinds == {"embed": False, "conv": False, "head": True}


def test_only_the_active_adapter_counts(tiny_peft):
    model = tiny_peft()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    assert all(".default." in n for n in AdapterSpace.from_model(model).parameter_names)
    model.set_adapter("other")
    assert all(".other." in n for n in AdapterSpace.from_model(model).parameter_names)


def test_frozen_half_is_left_out(tiny_peft):
    model = tiny_peft()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert all("lora_B" in n for n in AdapterSpace.from_model(model).parameter_names)


def test_no_adapter_is_an_error(tiny_model):
    with pytest.raises(AdapterError, match="has no LoRA layer.*get_peft_model"):
        AdapterSpace.from_model(tiny_model())


def test_nothing_trainable_is_an_error(tiny_peft):
    model = tiny_peft()
    model.requires_grad_(False)
    with pytest.raises(AdapterError, match="is_trainable=True"):
        AdapterSpace.from_model(model)


def test_parameters_of_one_memory_are_refused(tiny_model, tiny_peft):
    tied = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = tiny_peft(tiny_model(tie_word_embeddings=True), **tied)
    with pytest.raises(AdapterError, match=r"lora_embedding_.* of one memory.*Set `ensure_weight"):
        AdapterSpace.from_model(model)


def test_unprotected_parameters_are_named(tiny_peft):
    model = tiny_peft(modules_to_save=["lm_head"], target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"not protected.*lm_head"):
        space = AdapterSpace.from_model(model)
    assert any("lm_head" in name for name in space.unprotected)


def test_no_warning_where_everything_is_protected(tiny_peft):
    model = tiny_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterSpace.from_model(model)


def test_read_and_write_round_trip(tiny_peft):
    model = tiny_peft()
    space = AdapterSpace.from_model(model)
    flat = torch.randn(space.size)
    space.write(flat)
    assert torch.equal(space.read(), flat)
    named = dict(model.named_parameters())
    for name, (start, end) in space.spans().items():
        assert torch.equal(named[name].detach().flatten(), flat[start:end])


@pytest.mark.parametrize("granularity", ["adapter", "tensor", "global"])
def test_slabs_cover_every_element_once(tiny_peft, granularity):
    space = AdapterSpace.from_model(tiny_peft())
    flat = torch.zeros(space.size)
    slabs = space.slabs(granularity)
    for slab in slabs:
        slab.view(flat).add_(1)
    assert (flat == 1).all()
    pieces = sum(slab.count for slab in slabs)
    expected = {
        "adapter": len(space.blocks),
        "tensor": len(space.parameter_names),
        "global": 1,
    }
    assert pieces == expected[granularity]


def test_slab_locates_what_it_views(tiny_peft):
    space = AdapterSpace.from_model(tiny_peft())
    flat = torch.arange(space.size)
    for slab in space.slabs("tensor"):
        view = slab.view(flat)
        position = int(view[-1, 0])
        assert slab.locate(position) == (slab.count - 1, 0)
        assert slab.locate(space.size + 10**6) is None


def test_bind_finds_replaced_parameters_by_name(tiny_peft):
    model = tiny_peft()
    space = AdapterSpace.from_model(model)
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach() + 1)
    stale = space.parameters
    space.bind(model)
    named = dict(model.named_parameters())
    assert all(p is named[n] for n, p in zip(space.parameter_names, space.parameters, strict=True))
    assert all(a is not b for a, b in zip(stale, space.parameters, strict=True))


def test_bind_refuses_a_removed_or_frozen_adapter(tiny_peft):
    model = tiny_peft()
    space = AdapterSpace.from_model(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("other")
    with pytest.raises(AdapterError, match="is frozen now"):
        space.bind(model)
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="is gone"):
        space.bind(model)
