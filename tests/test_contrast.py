"""The contrast adapter: its directions against a reference, the model it makes, whole recipes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from recipes_for_tests import HARMFUL, HARMLESS, tiny_recipe, write_rows
from safetensors.torch import load_file
from torch import Tensor

from lora_ogpsa import (
    OGPSA,
    ContrastConfig,
    OGPSACallback,
    OGPSAConfig,
    Reference,
    chat,
    freeze_contrast,
    get_contrast_model,
    hidden_states,
)
from lora_ogpsa.contrast import contrast_adapter, examples_by_kind
from lora_ogpsa.discriminant import (
    Inputs,
    answer_start,
    contrast_rows,
    discriminant,
    refusal,
    separation,
)
from lora_ogpsa.errors import AdapterError, ConfigError, DataError
from lora_ogpsa.plan import make_plan
from lora_ogpsa.recipe import parse_recipe
from lora_ogpsa.run import RunInterrupted, run

# ------------------------------------------------------------------------------- directions


def _drawn(seed: int, d: int = 12, shift: float = 1.0) -> Inputs:
    """Prompts that differ along the first axis, among others' noise, and text."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) / d**0.5

    def rows(count: int) -> Tensor:
        return torch.randn(count, d, generator=generator) @ mixing

    common = 3 * torch.randn(d, generator=generator)
    apart = torch.zeros(d)
    apart[0] = shift
    text = rows(200)
    return Inputs(
        rows(24) + common + apart,
        (rows(20) + common, rows(28) + common),
        text.T @ text / 200,
        rows(1)[0] + common / 2,
        rows(3),
    )


def _moment(inputs: Inputs, ridge: float, weight: float) -> np.ndarray:
    """What keeps the discriminant from responding, in NumPy."""
    kinds = [rows.double().numpy() for rows in inputs.references]
    moment = weight * inputs.text.double().numpy()
    moment += 4 * np.cov(inputs.safety.double().numpy().T, bias=True)
    moment += sum(np.cov(rows.T, bias=True) for rows in kinds) / 4
    moment += 2 * np.cov(np.stack([rows.mean(0) for rows in kinds]).T, bias=True)
    return _damped(moment, ridge, inputs)


def _damped(moment: np.ndarray, ridge: float, inputs: Inputs) -> np.ndarray:
    damping = ridge * np.eye(len(moment))
    for token in [] if inputs.start is None else inputs.start.double().numpy():
        damping += 30 * np.outer(token, token) / (token @ token)
    return moment + np.trace(moment) / len(moment) * damping


def _apart(inputs: Inputs) -> np.ndarray:
    one, two = (rows.double().mean(0) for rows in inputs.references)
    return (inputs.safety.double().mean(0) - (one + two) / 2).numpy()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 3.0), st.floats(0.1, 5.0))
def test_the_discriminant_solves_its_equation(seed: int, ridge: float, weight: float) -> None:
    inputs = _drawn(seed)
    expected = np.linalg.inv(_moment(inputs, ridge, weight)) @ _apart(inputs)
    found = discriminant(inputs, ridge, weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_directions_turn_with_the_inputs(seed: int) -> None:
    inputs = _drawn(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    turned = Inputs(
        inputs.safety.double() @ turn,
        tuple(rows.double() @ turn for rows in inputs.references),
        turn.T @ inputs.text.double() @ turn,
        inputs.answers.double() @ turn,
        inputs.start.double() @ turn,
    )
    rows = contrast_rows(inputs, 1.0, 0.3, 3.0, 0.25) @ turn
    found = contrast_rows(turned, 1.0, 0.3, 3.0, 0.25)
    torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)  # single precision goes in


def test_more_weight_on_text_responds_less_to_it() -> None:
    inputs = _drawn(0)

    def response(weight: float) -> float:
        found = discriminant(inputs, 1e-6, weight).float()
        gap = (inputs.safety @ found).mean() - (torch.cat(inputs.references) @ found).mean()
        return float((found @ inputs.text @ found).sqrt() / gap)

    assert response(30.0) < response(3.0) < response(0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 50.0), st.floats(0.0, 0.7))
def test_rows_respond_as_they_say(seed: int, gain: float, threshold: float) -> None:
    inputs = _drawn(seed)
    contrast, answer = contrast_rows(inputs, gain, 0.3, 3.0, threshold)
    safety = inputs.safety.double()
    usual = (safety.square().sum(1).mean() / (3 * 12)).sqrt()
    assert (safety @ contrast).square().mean().sqrt() == pytest.approx(gain * usual)
    high = (safety @ contrast).mean()
    low = sum((rows.double() @ contrast).mean() for rows in inputs.references) / 2
    assert low < high
    assert ((1 - threshold) * low + threshold * high).abs() < 1e-6 * gain * usual
    assert inputs.answers.double() @ answer == pytest.approx(gain * usual)


def test_the_start_of_an_answer_is_told_from_text() -> None:
    inputs = _drawn(3)
    found = answer_start(inputs, 1.0)
    ends = torch.cat([inputs.safety, *inputs.references]).double()
    assert (ends @ found).mean() == pytest.approx(1.0)
    text = (found @ inputs.text.double() @ found).sqrt()
    # The mean of the ends, as long, is the direction that a ridge without end would give.
    mean = ends.mean(0) / ends.mean(0).square().sum()
    assert text < (mean @ inputs.text.double() @ mean).sqrt()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 3.0), st.floats(0.1, 5.0))
def test_the_direction_of_refusals_solves_its_equation(
    seed: int, ridge: float, weight: float
) -> None:
    inputs = _drawn(seed)
    moment = weight * inputs.text.double().numpy()
    for rows in (kind.double().numpy() for kind in inputs.references):
        moment += rows.T @ rows / (2 * len(rows))
    moment = _damped(moment, ridge, inputs)
    answers = inputs.answers.double().numpy()
    expected = np.linalg.inv(moment) @ answers
    found = refusal(inputs, ridge, weight).numpy()
    np.testing.assert_allclose(found, expected / (answers @ expected), rtol=1e-8, atol=1e-10)


def test_separation_is_of_prompts_that_the_direction_has_not_seen() -> None:
    apart, alike = _drawn(5, shift=4.0), _drawn(5, shift=0.0)
    assert separation(apart, 0.3, 3.0) > 2
    assert abs(separation(alike, 0.3, 3.0)) < 1


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_prompts_that_end_alike_give_a_row_of_zeros(rounding: float) -> None:
    torch.manual_seed(0)
    end = torch.randn(12)
    ends = [end * (1 + rounding * torch.randn(n, 12)) for n in (9, 8, 7)]
    alike = Inputs(ends[0], tuple(ends[1:]), torch.eye(12))
    assert separation(alike, 0.3, 3.0) == 0.0
    (contrast,) = contrast_rows(alike, 40.0, 0.3, 3.0, 0.25)  # no answers, no row for them
    assert not contrast.any()


def test_folds_part_all_kinds() -> None:
    inputs = _drawn(1)
    own, others = zip(*(inputs.split(fold) for fold in range(4)), strict=True)
    for kind in range(3):

        def rows(part: Inputs, kind: int = kind) -> Tensor:
            return (part.safety, *part.references)[kind]

        torch.testing.assert_close(
            torch.cat([rows(part) for part in own]).sort(0).values,
            rows(inputs).sort(0).values,
        )
        for part, rest in zip(own, others, strict=True):
            assert len(rows(part)) + len(rows(rest)) == len(rows(inputs))
            assert torch.equal(rest.text, inputs.text)
            assert torch.equal(rest.answers, inputs.answers)


# ------------------------------------------------------------------------------- the model

_CONFIG = ContrastConfig(layers=2)
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _answered(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    rows = [chat.as_messages({"prompt": text, "completion": "No, I am sorry."}) for text in HARMFUL]
    return [chat.encode(tokenizer, *row, max_length=128) for row in rows]


def _prompts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [
        chat.encode(tokenizer, [{"role": "user", "content": text}], None, max_length=128)[0]
        for text in texts
    ]


def _objectives(model: Any, tokenizer: Any) -> list[Any]:
    rows = [{"prompt": text} for text in HARMLESS]
    more = [{"prompt": f"{text} Please."} for text in HARMLESS]
    return [
        Reference("general", rows, max_new_tokens=5).prepare(model, tokenizer),
        Reference("first", rows, max_new_tokens=1).prepare(model, tokenizer),
        Reference("more", more, max_new_tokens=1).prepare(model, tokenizer),
    ]


@pytest.fixture
def made(tiny_model: Any, tiny_tokenizer: Any) -> tuple[Any, Any, list[Any]]:
    """A contrast adapter on two of four layers, the base it was put on, and the references."""
    base = tiny_model(num_hidden_layers=4)
    model = tiny_model(num_hidden_layers=4)
    objectives = _objectives(model, tiny_tokenizer)
    rows = _answered(tiny_tokenizer)
    return get_contrast_model(model, rows, objectives, _CONFIG), base, objectives


@pytest.mark.parametrize(
    "given_settings",
    [
        {"r": 16, "lora_alpha": 32},
        {"r": 64, "lora_alpha": 16},
        {"r": 16, "lora_alpha": 20},
        {"r": 16, "lora_alpha": 32, "use_rslora": True},
    ],
)
def test_the_scaling_is_that_of_the_lora_settings(
    tiny_model: Any, given_settings: dict[str, Any]
) -> None:
    usual = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], **given_settings))
    made = contrast_adapter(tiny_model(), ContrastConfig(), LoraConfig(**given_settings))
    found, wanted = (
        [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
        for model in (made, usual)
    )
    assert found == pytest.approx(wanted[:1] * len(found))


def test_without_lora_settings_alpha_is_twice_the_rank(tiny_model: Any) -> None:
    for rank in (1, 2):
        config = contrast_adapter(tiny_model(), ContrastConfig(), rank=rank).peft_config["default"]
        assert (config.r, config.lora_alpha) == (rank, 2 * rank)


def test_only_b_is_trained_and_the_base_is_kept(made: Any) -> None:
    model, base, _ = made
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 5
    assert all(".lora_B." in name for name in trainable)
    assert {name.rsplit(".", 4)[-4] for name in trainable} == set(READERS)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits)


def test_a_is_what_hidden_states_give(made: Any, tiny_tokenizer: Any) -> None:
    model, base, objectives = made
    answered = _answered(tiny_tokenizer)
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}

    def read(sequence: list[int], layer: int, part: str) -> Tensor:
        """What the attention or the MLP of a layer reads."""
        found = {}
        norm = getattr(base.model.layers[layer], norms[part])
        handle = norm.register_forward_hook(lambda m, a, out: found.update(out=out[0]))
        with torch.no_grad():
            base(torch.tensor([sequence]))
        handle.remove()
        return found["out"]

    asked = _prompts(tiny_tokenizer, HARMFUL)
    kinds_of = [objectives[0].sequences, objectives[2].sequences]
    # What the template begins all prompts with.
    one, two = _prompts(tiny_tokenizer, ["a", "b"])
    before = next(at for at, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)

    def inputs(layer: int, part: str) -> Inputs:
        safety = [read(p, layer, part)[-1] for p in asked]
        kinds, text = [], []
        for examples in kinds_of:
            whole = [(read(p + a, layer, part), len(p) - 1) for p, a in examples]
            kinds.append(torch.stack([states[end] for states, end in whole]))
            text += [torch.cat([states[:end], states[end + 1 :]]) for states, end in whole]
        every = torch.cat(text)
        most = _CONFIG.answer_tokens
        answers = [read(p + a[:most], layer, part)[len(p) :] for p, a in answered[::3]]
        return Inputs(
            torch.stack(safety),
            tuple(kinds),
            every.T @ every / len(every),
            torch.cat(answers).mean(0),
            read(asked[0], layer, part)[:before],
        )

    scores, rows = {}, {}
    for layer in range(4):
        parts = {part: inputs(layer, part) for part in norms}
        scores[layer] = separation(parts["mlp"], _CONFIG.ridge, _CONFIG.text_weight)
        for part, of_part in parts.items():
            rows[layer, part] = contrast_rows(
                of_part, _CONFIG.gain, _CONFIG.ridge, _CONFIG.text_weight, _CONFIG.threshold
            )
    means = [(scores[layer] + scores[layer + 1]) / 2 for layer in range(3)]
    first = next(layer for layer, mean in enumerate(means) if mean >= 0.98 * max(means))
    named = {n: p for n, p in model.named_parameters() if ".lora_A." in n}
    places = {name: name.split(".layers.")[1].split(".")[:2] for name in named}
    assert {int(layer) for layer, _ in places.values()} == {first, first + 1}
    for name, (layer, part) in places.items():
        expected = rows[int(layer), part].float()
        torch.testing.assert_close(named[name], expected, rtol=1e-3, atol=1e-3)


def test_rows_are_read_as_prompts(
    made: Any, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, _, objectives = made
    answer = {"completion": "No, I am sorry."}
    pair = {"chosen": "No, I am sorry.", "rejected": "With pleasure."}
    references = [objective.reference for objective in objectives]
    rows, pairs = ([{"prompt": text, **more} for text in HARMFUL] for more in (answer, pair))
    file = write_rows(tmp_path / "safety.jsonl", rows)
    for prompts in (rows, pairs, file):
        base = tiny_model(num_hidden_layers=4)
        other = get_contrast_model(
            base, prompts, references, _CONFIG, processing_class=tiny_tokenizer
        )
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("answer_tokens", [0, 8])
def test_without_answers_there_is_one_row(
    made: Any, tiny_model: Any, tiny_tokenizer: Any, answer_tokens: int
) -> None:
    model, _, objectives = made
    rows = _prompts(tiny_tokenizer, HARMFUL) if answer_tokens else _answered(tiny_tokenizer)
    config = replace(_CONFIG, answer_tokens=answer_tokens)
    base = tiny_model(num_hidden_layers=4)
    one = dict(get_contrast_model(base, rows, objectives, config).named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            assert len(parameter) == 2
            # Without answers other examples share a pass, which rounds otherwise.
            torch.testing.assert_close(one[name], parameter[:1], rtol=1e-3, atol=1e-4)


def test_an_answer_to_one_prompt_is_looked_at(
    made: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    _, _, objectives = made
    rows = [(p, a if at == 1 else []) for at, (p, a) in enumerate(_answered(tiny_tokenizer))]
    model = get_contrast_model(tiny_model(num_hidden_layers=4), rows, objectives, _CONFIG)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            contrast, answer = parameter
            assert answer.any() and not torch.equal(contrast, answer)


def test_looking_leaves_no_trace(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model().train()
    objectives = _objectives(model, tiny_tokenizer)
    before = torch.get_rng_state()
    wrapped = get_contrast_model(model, _prompts(tiny_tokenizer, HARMFUL), objectives)
    assert wrapped.training
    hooks = [m for m in wrapped.modules() if m._forward_pre_hooks]
    assert not hooks
    # PEFT draws the A that is replaced; looking at the prompts draws nothing.
    torch.set_rng_state(before)
    contrast_adapter(tiny_model(), ContrastConfig(), rank=1)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    get_contrast_model(tiny_model(), _prompts(tiny_tokenizer, HARMFUL), objectives)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("answers", [False, True])
def test_a_common_beginning_passes_once(
    tiny_model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    answers: bool,
) -> None:
    model = tiny_model()
    references = examples_by_kind(_objectives(model, tiny_tokenizer), 80)
    system = _prompts(tiny_tokenizer, ["Be brief. " * 5])[0]
    answered = _answered(tiny_tokenizer)
    safety = [(system + p, a if answers else []) for p, a in (*answered, answered[0])]
    kinds = [[(system + p, a) for p, a in examples] for examples in references.values()]
    readers = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    passed, ended = [], []
    model.model.layers[0].register_forward_hook(lambda m, a, out: passed.append(a[0].shape[:2]))
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: ended.append(out))

    def read() -> dict[str, Inputs]:
        passed.clear()
        ended.clear()
        return hidden_states.read_inputs(model, readers, safety, kinds, progress=False)

    model.gradient_checkpointing_enable()
    model.train()
    shared = read()
    # A whole pass finds out which module reads last.
    assert len(ended) == 1
    assert passed[0][1] >= len(system)
    assert all(length < len(system) for _, length in passed[1:])
    # The prompt that is there twice passes once.
    assert sum(rows for rows, _ in passed[1:]) == len(HARMFUL) + sum(map(len, kinds))
    monkeypatch.setattr(hidden_states, "_can_be_repeated", lambda cache, tokens: False)
    whole = read()
    assert len(passed) < len(safety) and passed[0][1] > len(system)

    for inputs in whole.values():
        assert torch.equal(inputs.safety[0], inputs.safety[-1])
        assert inputs.start is not None and len(inputs.start) > len(system)
    for name in shared:
        for field, value in vars(whole[name]).items():
            torch.testing.assert_close(
                getattr(shared[name], field), value, rtol=1e-4, atol=1e-5, msg=field
            )


def test_references_with_the_same_prompts_count_once(made: Any) -> None:
    _, _, objectives = made
    kinds = examples_by_kind(objectives, 80)
    assert {name: len(examples) for name, examples in kinds.items()} == {"general": 4, "more": 4}
    assert kinds["general"] == objectives[0].sequences
    assert {len(examples) for examples in examples_by_kind(objectives, 3).values()} == {3}


def test_training_moves_b_alone_and_can_be_taken_up_again(
    made: Any, tmp_path: Path, tiny_model: Any
) -> None:
    from peft import PeftModel

    model, _, objectives = made
    a = {n: p.clone() for n, p in model.named_parameters() if ".lora_A." in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    OGPSA(model, optimizer, objectives, OGPSAConfig(penalty=0.5, budget=0.1))
    ids = torch.arange(3, 40)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in a.items())
    assert all(p.abs().max() > 0 for n, p in named.items() if ".lora_B." in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(num_hidden_layers=4), tmp_path, is_trainable=True)
    freeze_contrast(loaded)
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (".lora_B." in name)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_a_stays_frozen_where_adapters_are_switched(made: Any, tmp_path: Path) -> None:
    model, _, _ = made
    a = [p for n, p in model.named_parameters() if ".lora_A." in n]
    for each in (model, copy.deepcopy(model)):
        with each.disable_adapter():
            pass
        each.add_adapter("ref", each.peft_config["default"])
        each.set_adapter("ref")
        each.set_adapter("default")
        trainable = [n for n, p in each.named_parameters() if p.requires_grad]
        assert trainable and all(".lora_B.default" in n for n in trainable)
        each.to(torch.float64)
        each.set_adapter("default")
        assert [n for n, p in each.named_parameters() if p.requires_grad] == trainable
    a[0].requires_grad = True
    assert a[0].requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_leaves_a_out(
    made: Any, tiny_tokenizer: Any, tmp_path: Path, checkpointing: bool
) -> None:
    """TRL's DPO switches adapters in every step, between a forward pass and its backward."""
    from datasets import Dataset
    from test_callback import arguments
    from test_trainers import PREFERENCES
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model, _, objectives = made
    a = {n: p for n, p in model.named_parameters() if ".lora_A.default." in n}
    before = {n: p.clone() for n, p in a.items()}
    gradients = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients.extend(p.grad for p in a.values())

    trainer = DPOTrainer(
        model,
        args=arguments(tmp_path, DPOConfig, bf16=False, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer,
    )
    trainer.add_callback(Look())
    OGPSACallback(references=objectives).attach(trainer)
    trainer.train()
    assert len(gradients) == 3 * len(a) and all(g is None for g in gradients)
    assert all(torch.equal(p, before[n]) for n, p in a.items())


def test_a_4_bit_base_will_do(tiny_4bit: Any, tiny_tokenizer: Any) -> None:
    model = tiny_4bit(peft=False)
    objectives = _objectives(model, tiny_tokenizer)
    rows = _answered(tiny_tokenizer)
    # Not the first attention: what it reads at the end of any prompt is the same, and its row zero.
    config = ContrastConfig(target_modules=("gate_proj", "up_proj"))
    wrapped = get_contrast_model(model, rows, objectives, config)
    a = [p for n, p in wrapped.named_parameters() if ".lora_A." in n]
    assert a
    assert all(p.isfinite().all() and p.abs().max() > 0 for p in a)
    ids = torch.arange(3, 20)[None]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    b = [p for n, p in wrapped.named_parameters() if ".lora_B." in n]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in b)


def test_other_models_readers_are_found(tiny_tokenizer: Any) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": 2,
    }
    phi = contrast_adapter(Phi3ForCausalLM(Phi3Config(**sizes)), ContrastConfig())
    assert [n for n, p in phi.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.layers.1.{name}.lora_B.default.weight"
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    with pytest.raises(AdapterError, match="target_modules"):
        contrast_adapter(neox, ContrastConfig(target_modules=("w1",)))
    named = contrast_adapter(neox, ContrastConfig(target_modules=("dense_h_to_4h",), layers=2))
    assert sum(p.requires_grad for p in named.parameters()) == 2


_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32))


def _shared_expert() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    shared = {"shared_expert_intermediate_size": 16, "num_key_value_heads": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **_EXPERTS, **shared))


def _sees_images() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6}
    sizes = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = LlamaConfig(**_SIZES, intermediate_size=64)
    parts = {"vision_config": CLIPVisionConfig(**vision, **sizes), "text_config": text}
    return LlavaForConditionalGeneration(LlavaConfig(**parts))


@pytest.mark.parametrize(
    ("build", "adapted"),
    [
        (_opt, {"q_proj", "k_proj", "v_proj", "fc1"}),  # whose MLP reads tokens in one row
        (_shared_expert, set(READERS)),  # the same, of the expert that reads all of them
        (_sees_images, set(READERS)),
    ],
)
def test_only_what_reads_every_token_is_adapted(
    build: Any, adapted: set[str], tiny_tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = build().eval()
    first = copy.deepcopy(base)
    objectives = _objectives(tiny_model(), tiny_tokenizer)
    model = get_contrast_model(base, _answered(tiny_tokenizer), objectives, _CONFIG)
    a_rows = {n: p for n, p in model.named_parameters() if ".lora_A." in n}
    assert {n.split(".lora_A")[0].rsplit(".", 1)[1] for n in a_rows} == adapted
    assert not any("vision" in n or ".experts." in n for n in a_rows)
    assert all(p.any() for p in a_rows.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 19).view(2, 8)
    again = PeftModel.from_pretrained(first, tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_names_that_stand_for_experts_are_refused() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shared = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "n_group": 1}
    settings = {**_SIZES, **shared, **ranks, "intermediate_size": 64, "topk_group": 1}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, first_k_dense_replace=1))
    with pytest.raises(AdapterError, match=r"no LoRA on 2 of 2 modules .*shared_experts"):
        contrast_adapter(base, ContrastConfig(layers=1))
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_rows_of_token_ids_are_read(made: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    _, _, objectives = made
    pairs = _answered(tiny_tokenizer)
    rows = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs]
    prompts = [{"input_ids": [*p, 2, 2], "attention_mask": [1] * len(p) + [0, 0]} for p, _ in pairs]
    texts = ["How is it done?", "Why?", "Do that.", "Who is she?", "When was it?"]
    for written, same in (
        (rows, pairs),
        (prompts, [p for p, _ in pairs]),
        (texts, [{"prompt": text} for text in texts]),
    ):
        one, other = (
            get_contrast_model(
                tiny_model(num_hidden_layers=4),
                kind,
                objectives,
                _CONFIG,
                processing_class=tiny_tokenizer,
            )
            for kind in (written, same)
        )
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b), name


def test_patterns_and_parameters_of_lora_settings_are_replaced(tiny_model: Any) -> None:
    left = {"rank_pattern": {"q_proj": 4}, "exclude_modules": ["k_proj"]}
    settings = LoraConfig(r=8, lora_alpha=8, target_parameters=["lm_head.weight"], **left)
    model = contrast_adapter(tiny_model(), ContrastConfig(), settings)
    plain = contrast_adapter(tiny_model(), ContrastConfig(), LoraConfig(r=8, lora_alpha=8))
    shapes = [(n, p.shape) for n, p in model.named_parameters()]
    assert shapes == [(n, p.shape) for n, p in plain.named_parameters()]


def test_bad_input_is_named(made: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, base, objectives = made
    prompts = _prompts(tiny_tokenizer, HARMFUL)
    with pytest.raises(AdapterError, match="an adapter already"):
        get_contrast_model(model, prompts, objectives)
    with pytest.raises(DataError, match="Found 2 of the safety prompts"):
        get_contrast_model(base, prompts[:2], objectives)
    few = Reference("few", [{"prompt": "Hi."}], max_new_tokens=1).prepare(base, tiny_tokenizer)
    with pytest.raises(DataError, match="Found 1 of few"):
        get_contrast_model(base, prompts, [few])
    with pytest.raises(DataError, match="needs references"):
        get_contrast_model(base, prompts, [])
    texts = [{"prompt": text} for text in HARMFUL]
    with pytest.raises(ConfigError, match="processing_class"):
        get_contrast_model(base, texts, objectives)
    with pytest.raises(DataError, match="a safety prompt: no conversation found"):
        get_contrast_model(base, [{"text": "x"}], objectives, processing_class=tiny_tokenizer)
    with pytest.raises(DataError, match="a safety prompt: the prompt has"):
        get_contrast_model(base, texts, objectives, processing_class=tiny_tokenizer, max_length=4)
    for settings_, said in (
        ({"prompts": 2}, "`prompts` should be at least 4"),
        ({"layers": 0}, "`layers` should be at least 1"),
        ({"gain": 0.0}, "`gain` should be above 0"),
        ({"threshold": 1.0}, r"`threshold` should be in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            ContrastConfig(**settings_)


# ------------------------------------------------------------------------------- recipes


def _adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_recipe_trains_it_beside_a_usual_adapter(tmp_path: Path, tiny_folder: Path) -> None:
    raw = tiny_recipe(
        tmp_path,
        tiny_folder,
        load_in_4bit=True,
        contrast={"layers": 1},
        compare=True,
        merge="float32",
        stages=[{"trainer": "sft"}, {"trainer": "dpo", "rejected": "base"}],
        rejected_max_new_tokens=4,
    )
    recipe = parse_recipe(raw)
    assert recipe.adapter == "contrast adapter (plain training: LoRA rank 4)"
    run(recipe)
    out = tmp_path / "out"
    first, second = (_adapter(out / "runs/ogpsa" / n / "adapter") for n in ("1-sft", "2-dpo"))
    assert len(first) == 2 * len(READERS)
    for name, value in first.items():
        assert value.shape[0 if ".lora_A." in name else 1] == 2
        assert torch.equal(second[name], value) == (".lora_A." in name)
    plain = _adapter(out / "runs/plain/1-sft/adapter")
    assert len(plain) == 28
    facts = json.loads((out / "adapter/ogpsa_run.json").read_text())
    assert ContrastConfig(**facts["contrast"]) == recipe.contrast
    assert "Contrast adapter" in (out / "adapter/README.md").read_text()
    assert json.loads((out / "merged/merge_report.json").read_text())


def test_an_interrupted_run_goes_on_with_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str) -> Any:
        raw = tiny_recipe(
            tmp_path / name, tiny_folder, contrast=True, evaluation=False, save_steps=1
        )
        return parse_recipe(raw)

    run(recipe("whole"))
    from lora_ogpsa.console import StepDisplay

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepDisplay, "on_step_end", stop)
        with pytest.raises(RunInterrupted):
            run(recipe("cut"))
    run(recipe("cut"), resume=True)
    whole, cut = (_adapter(tmp_path / name / "out/adapter") for name in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value)


def test_plans_and_mistakes_in_recipes(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path, tiny_folder, contrast={"layers": 1}))
    plan = make_plan(recipe)
    assert plan.size is not None
    assert plan.size.adapter == 2 * (64 + 2 * 32 + 2 * 128)  # B of the five modules of a layer
    for contrast, said in (
        ({"layer": 2}, "unknown key `layer`. Did you mean `layers`"),
        ({"gain": -1.0}, "`gain` should be above 0"),
        ({"layers": "two"}, "`layers` should be"),
        ("yes", "`contrast` should be"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_recipe(tiny_recipe(tmp_path, tiny_folder, contrast=contrast))
    with pytest.raises(ConfigError, match="DoRA"):
        parse_recipe(tiny_recipe(tmp_path, tiny_folder, contrast=True, use_dora=True))
