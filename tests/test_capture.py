"""Per-example gradients of one backward against one backward per example."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import token_reference, token_rows
from torch import nn

from lora_ogpsa import AdapterSpace, Reference, passes
from lora_ogpsa.capture import capture_examples, gradients, quiet
from lora_ogpsa.errors import CaptureError, ReferenceLossError
from lora_ogpsa.passes import ReferencePass

N = 6


def per_example(model, objective, granularity="adapter", autocast=None):
    """Rows [N, d] by one capture pass, and by N ordinary backward passes."""
    space = AdapterSpace.from_model(model)
    slabs = space.slabs(granularity)
    passes = ReferencePass(model, space, slabs)
    if autocast is not None:
        passes.autocast.enabled, passes.autocast.dtype = True, autocast
    rows = [torch.zeros(slab.count, N, slab.width) for slab in slabs]
    losses, _ = passes.run(objective, range(N), space.zeros(), rows)
    captured = torch.zeros(N, space.size)
    for slab, held in zip(slabs, rows, strict=True):
        slab.view(captured).copy_(held.transpose(0, 1))
    separate = torch.zeros(N, space.size)
    for i in range(N):
        with quiet(model), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss, _ = objective.losses(model, [i])
            found = torch.autograd.grad(loss.sum(), space.parameters)
        for view, grad in zip(space.views(separate[i]), found, strict=True):
            view.copy_(grad)
        torch.testing.assert_close(
            losses[i], loss[0].detach(), rtol=1e-4 if autocast is None else 0.02, atol=1e-5
        )
    return captured, separate


def assert_rows_close(captured, separate, tolerance):
    assert (separate.norm(dim=-1) > 0).all()
    error = (captured - separate).norm(dim=-1) / separate.norm(dim=-1)
    assert error.max() < tolerance, error


@pytest.mark.parametrize("granularity", ["adapter", "tensor", "global"])
@pytest.mark.parametrize("loss", ["sft", "kl"])
def test_plain_lora(tiny_peft, granularity, loss):
    model = tiny_peft(warm=True)
    objective = token_reference(n=N, loss=loss).prepare(model)
    assert_rows_close(*per_example(model, objective, granularity), 1e-4)


@pytest.mark.parametrize("loss", ["sft", "kl"])
def test_4bit_base(tiny_4bit, loss):
    model = tiny_4bit(warm=True)
    objective = token_reference(n=N, loss=loss).prepare(model)
    assert_rows_close(*per_example(model, objective), 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_peft, monkeypatch, reentrant):
    monkeypatch.setattr(passes, "_SHORT", 0)
    model = tiny_peft(warm=True).train()
    plain = per_example(model, token_reference(n=N).prepare(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    objective = token_reference(n=N).prepare(model)
    space = AdapterSpace.from_model(model)
    slabs = space.slabs("adapter")
    rows = [torch.zeros(slab.count, N, slab.width) for slab in slabs]
    ReferencePass(model, space, slabs).run(objective, range(N), space.zeros(), rows)
    captured = torch.zeros(N, space.size)
    for slab, held in zip(slabs, rows, strict=True):
        slab.view(captured).copy_(held.transpose(0, 1))
    assert_rows_close(captured, plain[1], 1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("short", "training", "forwards"), [(0, 0, 2), (128, 0, 1), (0, 1024, 1)])
def test_checkpointed_layers_are_recomputed_unless_the_example_is_short(
    tiny_peft, monkeypatch, short, training, forwards
):
    monkeypatch.setattr(passes, "_SHORT", short)
    model = tiny_peft(warm=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    calls = []
    layer = model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    space = AdapterSpace.from_model(model)
    objective = token_reference(n=1).prepare(model)
    objective.losses(model, [0])  # fill the cache of base losses
    calls.clear()
    reference = ReferencePass(model, space, ())
    reference.training_tokens = training
    reference.run(objective, [0], space.zeros())
    assert len(calls) == forwards
    assert layer.training


def test_a_pass_compiles_nothing(tiny_peft):
    """Its modes and lengths would use up the recompilations that training may need."""
    model = tiny_peft(warm=True)
    objective = token_reference(n=2, loss="kl").prepare(model)
    made = []
    model.compile(backend=lambda graph, _: made.append(graph) or graph.forward)
    space = AdapterSpace.from_model(model)
    ReferencePass(model, space, ()).run(objective, [0, 1], space.zeros())
    assert not made


def test_bf16_autocast_is_as_exact_as_separate_passes(tiny_peft):
    """Both are bf16: what counts is that capture is no further from float32 than they are."""
    model = tiny_peft(warm=True)
    objective = token_reference(n=N).prepare(model)
    _, exact = per_example(model, objective)
    captured, separate = per_example(model, objective, autocast=torch.bfloat16)
    scale = exact.norm(dim=-1)
    own_error = (captured - exact).norm(dim=-1) / scale
    their_error = (separate - exact).norm(dim=-1) / scale
    assert (own_error <= 1.2 * their_error).all()
    assert_rows_close(captured, separate, 0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_very_different_lengths(tiny_peft, side):
    """Capture knows nothing of padding: any batch whose loss ignores it gives the same rows."""
    model = tiny_peft(warm=True)
    space = AdapterSpace.from_model(model)
    rows = token_rows(4, shortest=4, longest=5) + token_rows(2, seed=3, shortest=60, longest=64)
    width = max(len(r["input_ids"]) for r in rows)

    def padded(values, fill):
        gap = [fill] * (width - len(values))
        return [*gap, *values] if side == "left" else [*values, *gap]

    ids = torch.tensor([padded(r["input_ids"], 0) for r in rows])
    labels = torch.tensor([padded(r["labels"], -100) for r in rows])
    mask = torch.tensor([padded([1] * len(r["input_ids"]), 0) for r in rows])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def losses(part):
        out = model(
            input_ids=ids[part], attention_mask=mask[part], position_ids=positions[part]
        ).logits[:, :-1]
        nll = nn.functional.cross_entropy(
            out.transpose(1, 2), labels[part][:, 1:], ignore_index=-100, reduction="none"
        )
        counted = (labels[part][:, 1:] != -100).sum(-1)
        return nll.sum(-1) / counted

    targets = {
        name: torch.zeros(len(rows), end - start) for name, (start, end) in space.spans().items()
    }
    with capture_examples(model, space, targets) as capture:
        gradients(losses(slice(None)).sum(), [capture.anchor])
    for i in range(len(rows)):
        found = torch.autograd.grad(losses(slice(i, i + 1)).sum(), space.parameters)
        for name, grad in zip(space.parameter_names, found, strict=True):
            error = (targets[name][i] - grad.flatten()).norm()
            assert error <= 1e-4 * grad.norm() + 1e-7


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_rslora": True}])
def test_lora_variants(tiny_peft, options):
    model = tiny_peft(warm=True, **options)
    objective = token_reference(n=N).prepare(model)
    assert_rows_close(*per_example(model, objective), 1e-4)


def test_dora_falls_back_to_the_mean_of_the_micro_batch(tiny_peft):
    model = tiny_peft(warm=True, use_dora=True)
    objective = token_reference(n=N).prepare(model)
    captured, separate = per_example(model, objective)
    mean = separate.mean(0, keepdim=True).expand_as(separate)
    assert_rows_close(captured, mean, 1e-4)


def test_layers_that_flatten_examples_fall_back_alone(tiny_peft):
    model = tiny_peft(warm=True)
    for layer in model.get_base_model().model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: inner(x.flatten(0, 1)).view_as(x)
    objective = token_reference(n=N).prepare(model)
    captured, separate = per_example(model, objective)
    for name, (start, end) in AdapterSpace.from_model(model).spans().items():
        rows, single = captured[:, start:end], separate[:, start:end]
        if ".mlp." in name:  # one row a micro-batch
            single = single.mean(0, keepdim=True).expand_as(rows)
        torch.testing.assert_close(rows, single, rtol=1e-3, atol=1e-6)


def test_preference_pairs_fold_two_sequences_into_one_example(tiny_peft):
    model = tiny_peft(warm=True)
    rows = token_rows(2 * N)
    reference = Reference("pairs", rows, loss="sft")
    objective = reference.prepare(model)
    pairs = type(objective)(Reference("pairs", rows, loss="dpo"), objective.sequences, model)
    assert len(pairs) == N
    assert_rows_close(*per_example(model, pairs), 1e-4)


# ------------------------------------------------------------------ no trace on training


def test_a_pass_leaves_no_trace(tiny_peft):
    model = tiny_peft(warm=True, lora_dropout=0.3).train()
    model.get_base_model().model.layers[0].eval()
    space = AdapterSpace.from_model(model)
    for parameter in space.parameters:
        parameter.grad = torch.randn_like(parameter)
    frozen = space.parameters[0]
    frozen.requires_grad_(False)
    objective = token_reference(n=N, loss="kl").prepare(model)
    modes = {name: m.training for name, m in model.named_modules()}
    grads = [p.grad.clone() for p in space.parameters]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    forwards = {n: "forward" in m.__dict__ for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    frozen.requires_grad_(True)
    slabs = space.slabs("adapter")
    rows = [torch.zeros(slab.count, N, slab.width) for slab in slabs]
    ReferencePass(model, space, slabs).run(objective, range(N), space.zeros(), rows)
    frozen.requires_grad_(False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(space.parameters, grads, strict=True))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: "forward" in m.__dict__ for n, m in model.named_modules()} == forwards


def test_adapters_frozen_by_hand_stay_frozen(tiny_peft):
    """PEFT turns every active adapter tensor trainable again when adapters are re-enabled."""
    model = tiny_peft(warm=True)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    objective = token_reference(n=2, loss="kl").prepare(model)
    objective.losses(model, [0])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


def test_dropout_is_off_in_a_pass(tiny_peft):
    model = tiny_peft(warm=True, lora_dropout=0.5).train()
    space = AdapterSpace.from_model(model)
    objective = token_reference(n=N).prepare(model)
    passes = ReferencePass(model, space, ())
    first, second = space.zeros(), space.zeros()
    passes.run(objective, range(N), first)
    passes.run(objective, range(N), second)
    assert torch.equal(first, second)


def test_failure_inside_a_pass_restores_everything(tiny_peft):
    model = tiny_peft(warm=True).train()
    space = AdapterSpace.from_model(model)
    with pytest.raises(KeyError), quiet(model):
        raise KeyError
    assert all(m.training for m in model.modules())
    targets = {space.parameter_names[0]: torch.zeros(2, space.parameters[0].numel())}
    with pytest.raises(KeyError), capture_examples(model, space, targets):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_non_finite_loss_names_the_reference(tiny_peft):
    model = tiny_peft(warm=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    space = AdapterSpace.from_model(model)
    total = space.zeros()
    objective = token_reference("general", n=2).prepare(model)
    with pytest.raises(ReferenceLossError, match="`general`.*not finite"):
        ReferencePass(model, space, ()).run(objective, [0, 1], total)
    assert not total.any()


def test_capture_refuses_what_is_not_a_linear(tiny_peft):
    model = tiny_peft(use_dora=True)
    space = AdapterSpace.from_model(model)
    name = next(n for n in space.parameter_names if "magnitude" in n)
    with (
        pytest.raises(CaptureError, match="not a plain Linear"),
        capture_examples(model, space, {name: torch.zeros(1, 8)}),
    ):
        pass


def test_stashed_backward_gives_the_same_gradients(tiny_peft):
    model = tiny_peft(warm=True)
    space = AdapterSpace.from_model(model)
    twin = copy.deepcopy(model)
    twins = AdapterSpace.from_model(twin)
    objective = token_reference(n=2).prepare(model)
    for parameter in twins.parameters:
        parameter.grad = torch.ones_like(parameter)
    direct = gradients(objective.losses(model, [0, 1])[0].sum(), space.parameters)
    stashed = gradients(
        objective.losses(twin, [0, 1])[0].sum(), twins.parameters, stash=list(twin.parameters())
    )
    for a, b in zip(direct, stashed, strict=True):
        torch.testing.assert_close(a, b)
    assert all((p.grad == 1).all() for p in twins.parameters)


class _ReadsTheWeights(nn.Module):
    """What fused kernels do: the LoRA modules' weights are read, the modules never called."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        a, b = (getattr(self.layer, name)["default"].weight for name in ("lora_A", "lora_B"))
        return self.layer.base_layer(x) + self.layer.scaling["default"] * (x @ a.T @ b.T)


def test_weights_read_past_their_modules_are_not_lost(tiny_peft):
    model = tiny_peft(warm=True)
    objective = token_reference(n=N).prepare(model)
    attention = model.get_base_model().model.layers[0].self_attn
    fused = _ReadsTheWeights(attention.q_proj)
    attention.q_proj.forward = fused.forward
    captured, separate = per_example(model, objective)
    torch.testing.assert_close(captured.sum(0), separate.sum(0), rtol=1e-4, atol=1e-6)
    for name, (start, end) in AdapterSpace.from_model(model).spans().items():
        rows, single = captured[:, start:end], separate[:, start:end]
        if "layers.0.self_attn.q_proj" in name:  # one row a micro-batch
            single = single.mean(0, keepdim=True).expand_as(rows)
        torch.testing.assert_close(rows, single, rtol=1e-3, atol=1e-6)


def test_a_parameter_of_two_layers_has_the_gradient_of_both(tiny_peft):
    model = tiny_peft(warm=True, target_modules=["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    second.lora_A["default"].weight = first.lora_A["default"].weight
    captured, separate = per_example(model, token_reference(n=N).prepare(model))
    torch.testing.assert_close(captured.sum(0), separate.sum(0), rtol=1e-4, atol=1e-6)


def test_experts_adapted_as_parameters_have_gradients():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=named)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    captured, separate = per_example(model, token_reference(n=N).prepare(model))
    torch.testing.assert_close(captured.sum(0), separate.sum(0), rtol=1e-3, atol=1e-6)
    space = AdapterSpace.from_model(model)
    views = zip(space.parameter_names, space.views(captured.sum(0)), strict=True)
    assert all(view.norm() > 0 for name, view in views if ".experts." in name)
