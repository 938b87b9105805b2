"""Optimizers x precisions x adapter types: what part of a step is left where none should be.

The residual of a cell is the largest share, over steps and blocks, of the parameters' actual change
that lies in the protected basis. All of them are printed at the end of a run.
"""

import bitsandbytes as bnb
import pytest
import torch
from peft import (
    EvaConfig,
    KasaConfig,
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from references import token_reference
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lora_ogpsa import OGPSA, OGPSAConfig, passes
from lora_ogpsa.errors import ConfigError, ProjectionError
from lora_ogpsa.initialisation import base_is_kept

CONFIG = OGPSAConfig(constraint="orthogonal", rank=4, refresh_every=3, references_per_refresh=4)
STEPS = 4

OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(trainable(m), lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda m: torch.optim.AdamW(trainable(m), lr=1e-3, fused=True),
    "sgd_momentum": lambda m: torch.optim.SGD(trainable(m), lr=0.5, momentum=0.9),
    "adamw_8bit": lambda m: bnb.optim.AdamW8bit(trainable(m), lr=1e-3, min_8bit_size=64),
    "paged_adamw_8bit": lambda m: bnb.optim.PagedAdamW8bit(trainable(m), lr=1e-3, min_8bit_size=64),
    "lora_plus": lambda m: create_loraplus_optimizer(
        m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8
    ),
    "lora_fa": lambda m: create_lorafa_optimizer(m, r=4, lora_alpha=8, lr=1e-3),
    "riemannian": lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=1e-3),
}
PRECISIONS = ["float32", "bf16_autocast", "fp16_scaler", "bf16_weights"]
# Rounding a bf16 parameter leaves up to 2^-9 of the parameter, not of the step: see
# test_bf16_weights_round_the_guarantee.
LIMITS = {"bf16_weights": 0.5}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def residuals(request):
    """Cell -> residual; printed when the module is done."""
    cells = {}
    yield cells
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nresidual component of the actual change")
        for cell, value in cells.items():
            print(f"  {' x '.join(cell):60} {value:.1e}")


def loss_of(model, step, autocast=None):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 128, (4, 16), generator=generator)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return model(input_ids=ids, labels=ids).loss


def residual(ogpsa, change):
    """Largest share of the change of a block that lies in its basis."""
    worst = 0.0
    norms = ogpsa.estimator.subspace.component(change)
    for inside, slab in zip(norms, ogpsa.estimator.slabs, strict=True):
        total = slab.view(change).norm(dim=-1)
        worst = max(worst, float((inside / total.clamp_min(1e-30)).max()))
    return worst


def measured(model, optimizer, precision="float32", *, config=CONFIG, overflow=()):
    """Train for a few steps; the worst residual, and the run's OGPSA."""
    cast = {"bf16_autocast": torch.bfloat16, "fp16_scaler": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16_scaler")
    worst = 0.0
    # Not every initialisation leaves a base model to measure a divergence from.
    loss = "kl" if base_is_kept(model) else "sft"
    references = [token_reference("a", n=6, loss=loss), token_reference("b", n=6, seed=7)]
    with OGPSA(model, optimizer, references, config) as ogpsa:
        for step in range(STEPS):
            scaler.scale(loss_of(model, step, cast)).backward()
            scaler.unscale_(optimizer)
            before = ogpsa.space.read()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            change = ogpsa.space.read() - before
            assert change.norm() > 0
            assert torch.isfinite(change).all()
            worst = max(worst, residual(ogpsa, change))
        assert ogpsa.steps == STEPS
        assert sum(ogpsa.estimator.subspace.dimensions.values()) > 0
    return worst, ogpsa


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*paged")
def test_optimizers_in_every_precision(tiny_peft, residuals, name, precision):
    model = tiny_peft(warm=True)
    if precision == "bf16_weights":
        model.to(torch.bfloat16)
    optimizer = OPTIMIZERS[name](model)
    worst, ogpsa = measured(model, optimizer, precision)
    residuals["lora", name, precision] = worst
    assert worst < LIMITS.get(precision, 1e-5)
    expected = {"bf16_autocast": torch.bfloat16, "fp16_scaler": torch.float16}.get(precision)
    cast = ogpsa.estimator.passes.autocast
    assert cast.enabled is (expected is not None)
    assert expected is None or cast.dtype == expected
    assert ogpsa.estimator.passes.training_tokens == 4 * 16


def test_the_autocast_of_text_is_seen_beside_an_adapted_vision_tower(tiny_peft):
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=500)
    model = tiny_peft(LlavaForConditionalGeneration(config), warm=True)
    _, ogpsa = measured(model, OPTIMIZERS["adamw"](model), "bf16_autocast")
    passes = ogpsa.estimator.passes
    assert passes.autocast.enabled and passes.autocast.dtype == torch.bfloat16
    assert passes.training_tokens == 4 * 16


# ------------------------------------------------------------------ adapter types


def eva(tiny_peft):
    model = tiny_peft(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (8, 16), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model.train()


def second_adapter(tiny_peft):
    from peft import LoraConfig

    model = tiny_peft(warm=True)
    model.add_adapter("second", LoraConfig(r=6, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    return model


def tied(tiny_peft, tiny_model):
    return tiny_peft(
        tiny_model(tie_word_embeddings=True),
        warm=True,
        target_modules=["embed_tokens", "q_proj", "v_proj"],
    )


ADAPTERS = {
    "fresh": lambda f: f["peft"](),
    "dora": lambda f: f["peft"](warm=True, use_dora=True),
    "rslora": lambda f: f["peft"](warm=True, use_rslora=True),
    "pissa": lambda f: f["peft"](init_lora_weights="pissa"),
    "eva": lambda f: eva(f["peft"]),
    "lora_bias": lambda f: f["peft"](warm=True, lora_bias=True),
    "rank_pattern": lambda f: f["peft"](warm=True, rank_pattern={"q_proj": 2, "down_proj": 7}),
    "second_of_two": lambda f: second_adapter(f["peft"]),
    "tied_embeddings": lambda f: tied(f["peft"], f["model"]),
    "modules_to_save": lambda f: f["peft"](
        warm=True, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
    ),
    "nf4_base": lambda f: f["4bit"](warm=True, kbit_training=True),
    "nf4_base_dora": lambda f: f["4bit"](warm=True, use_dora=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("precision", ["float32", "bf16_autocast"])
@pytest.mark.filterwarnings("ignore:.*not protected", "ignore:.*tie_word_embeddings")
def test_adapter_types(tiny_peft, tiny_model, tiny_4bit, residuals, name, precision):
    factories = {"peft": tiny_peft, "model": tiny_model, "4bit": tiny_4bit}
    model = ADAPTERS[name](factories)
    worst, _ = measured(model, OPTIMIZERS["adamw"](model), precision)
    residuals[name, "adamw", precision] = worst
    assert worst < 1e-5


@pytest.mark.parametrize(
    ("settings", "loss", "message"),
    [
        ({"constraint": "budget"}, "sft", "from which `constraint='budget'` would be"),
        ({"constraint": "orthogonal"}, "kl", "from which reference `a` would be"),
        ({"constraint": "halfspace", "restoration": 0.5, "refresh": "interval"}, "sft", "restorat"),
    ],
)
def test_what_is_measured_from_the_base_needs_one_that_was_kept(tiny_peft, settings, loss, message):
    """PiSSA takes principal components out of the base: without the adapter it is another model."""
    model = tiny_peft(init_lora_weights="pissa")
    with pytest.raises(ConfigError, match=message):
        OGPSA(
            model,
            OPTIMIZERS["adamw"](model),
            [token_reference("a", n=6, loss=loss)],
            OGPSAConfig(**settings),
        )


@pytest.mark.parametrize(
    "lora", [{"bias": "lora_only"}, {"bias": "all"}, {"kasa_config": KasaConfig()}]
)
def test_a_base_that_trains_along_or_is_truncated_is_none_to_measure_from(tiny_model, lora):
    base = tiny_model(attention_bias=True)
    ids = torch.arange(3, 19).view(2, 8)
    before = base.eval()(ids).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **lora))
    optimizer = OPTIMIZERS["adamw"](model)
    with pytest.raises(ConfigError, match="`kasa_config` or `bias` changes the base"):
        OGPSA(model, optimizer, [token_reference("a", n=6, loss="kl")])
    settings = OGPSAConfig(constraint="orthogonal", first_token_weight=0.0)
    with OGPSA(model, optimizer, [token_reference("a", n=6)], settings):
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    with model.disable_adapter():
        assert (model.eval()(ids).logits - before).abs().max() > 1e-4


def test_the_other_adapter_is_left_alone(tiny_peft):
    model = second_adapter(tiny_peft)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    _, ogpsa = measured(model, OPTIMIZERS["adamw"](model))
    assert all(".second." in name for name in ogpsa.space.parameter_names)
    named = dict(model.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(named[name], value)
        assert not named[name].requires_grad


def test_lora_fa_keeps_a_frozen(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS["lora_fa"](model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    _, ogpsa = measured(model, optimizer)
    assert all("lora_B" in name for name in ogpsa.space.parameter_names)
    named = dict(model.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(named[name], value)
        assert not named[name].requires_grad
        assert named[name].grad is None


def test_modules_to_save_are_named_and_train_as_without_ogpsa(tiny_peft):
    """They lie outside LoRA: a warning says so, and their updates are the optimizer's own."""

    def trained(protected):
        model = tiny_peft(warm=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        if protected:
            with pytest.warns(UserWarning, match="lm_head.modules_to_save.*left as they are"):
                OGPSA(model, optimizer, [token_reference()], CONFIG)
        loss_of(model, 0).backward()
        optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    plain, kept = trained(False), trained(True)
    for name, value in plain.items():
        assert torch.equal(value, kept[name]) is ("modules_to_save" in name), name


def test_riemannian_steps_are_counted_once(tiny_peft):
    """torch hooks both of its classes' `step`, so the hooks fire twice."""
    OPTIMIZERS["adamw"](tiny_peft())
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS["riemannian"](model)
    assert hasattr(torch.optim.AdamW.step, "hooked")
    _, ogpsa = measured(model, optimizer, config=OGPSAConfig(constraint="orthogonal"))
    assert ogpsa.steps == STEPS


def test_an_optimizer_that_moves_again_after_its_base_class_is_stopped(tiny_peft):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.99)

    torch.optim.SGD(trainable(tiny_peft()), lr=0.1)
    model = tiny_peft(warm=True)
    with OGPSA(model, optimizer := Twice(trainable(model), lr=0.1), [token_reference()], CONFIG):
        loss_of(model, 0).backward()
        with pytest.raises(ProjectionError, match="Twice moves the parameters after"):
            optimizer.step()


# ------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_leaves_everything_as_it_was(tiny_peft, fused, unscale):
    """fp16: the scaler skips a step; the schedule, the rows and the weights do not notice."""
    model = tiny_peft(warm=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with OGPSA(model, optimizer, [token_reference("a", n=4)], CONFIG) as ogpsa:
        for step in range(4):
            scaler.scale(loss_of(model, step, torch.float16)).backward()
            if step in (0, 2):
                trainable(model)[0].grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            before, rows = ogpsa.space.read(), ogpsa.estimator.means.clone()
            taken = ogpsa.steps
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            change = ogpsa.space.read() - before
            if step in (0, 2):
                assert not change.any()
                assert ogpsa.steps == taken
                assert torch.equal(ogpsa.estimator.means, rows)
            else:
                assert change.any()
                assert ogpsa.steps == taken + 1
                assert residual(ogpsa, change) < 1e-5
            assert torch.isfinite(ogpsa.metric.own if ogpsa.metric.own is not None else rows).all()


def test_the_metric_of_a_fused_step_knows_the_scale(tiny_peft):
    """Nobody unscaled before: the fused kernel does, and leaves the gradients unscaled."""
    model, plain = tiny_peft(warm=True), tiny_peft(warm=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    held = []
    for each, scaled in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(trainable(each), lr=0.1, fused=True)
        with OGPSA(each, optimizer, [token_reference("a", n=4)], CONFIG) as ogpsa:
            loss = loss_of(each, 0)
            (scaler.scale(loss) if scaled else loss).backward()
            scaler.step(optimizer) if scaled else optimizer.step()
            held.append(ogpsa.metric.own)
    torch.testing.assert_close(held[0], held[1], rtol=1e-4, atol=0)


# ------------------------------------------------------------------ what bf16 weights cost


@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2])
def test_bf16_weights_round_the_guarantee(tiny_peft, residuals, lr):
    """What is left in the basis is the rounding of the parameters, and no more than that."""
    model = tiny_peft(warm=True).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    with OGPSA(model, optimizer, [token_reference("a", n=6)], CONFIG) as ogpsa:
        for step in range(STEPS):
            loss_of(model, step).backward()
            before = ogpsa.space.read()
            optimizer.step()
            optimizer.zero_grad()
            after = ogpsa.space.read()
            change = after - before
            inside = torch.cat(ogpsa.estimator.subspace.component(change)).norm()
            residuals["lora", f"adamw lr {lr:g}", f"bf16_weights step {step}"] = float(
                inside / change.norm()
            )
            # Half a unit in the last of 8 bits of every parameter.
            assert inside <= 2.0**-8 * after.norm()


# ------------------------------------------------------------------ clipping, accumulation


@pytest.mark.parametrize("windows", [(2, 2), (3, 1)])
def test_accumulation_with_an_incomplete_last_window(tiny_peft, residuals, windows):
    from accelerate import Accelerator

    model = tiny_peft(warm=True)
    accelerator = Accelerator(gradient_accumulation_steps=windows[0], cpu=True)
    loader = torch.utils.data.DataLoader(list(range(sum(windows))), batch_size=1)
    optimizer = OPTIMIZERS["adamw"](model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    worst = []
    with OGPSA(model, optimizer, [token_reference("a", n=6)], CONFIG) as ogpsa:
        for index in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, int(index)))
                before = ogpsa.space.read()
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                change = ogpsa.space.read() - before
                if accelerator.sync_gradients:
                    worst.append(residual(ogpsa, change))
                else:
                    assert not change.any()
    assert len(worst) == ogpsa.steps == 2
    residuals["lora", "adamw", f"accumulation {windows}, clipped"] = max(worst)
    assert max(worst) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16_autocast"])
def test_gradient_checkpointing(tiny_peft, monkeypatch, residuals, reentrant, precision):
    monkeypatch.setattr(passes, "_SHORT", 0)
    model = tiny_peft(warm=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    worst, _ = measured(model.train(), OPTIMIZERS["adamw"](model), precision)
    kind = "reentrant" if reentrant else "non-reentrant"
    residuals["lora", "adamw", f"{precision}, {kind} checkpointing"] = worst
    assert worst < 1e-5
