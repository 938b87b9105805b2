"""What the optimizer really did to the parameters, measured from outside."""

import copy
import pickle
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import schedulefree
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, get_peft_model
from references import token_reference, training_step
from transformers.optimization import Adafactor

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig, Reference
from lora_ogpsa.config import SUPERVISED_PENALTY
from lora_ogpsa.errors import (
    AdapterError,
    ConfigError,
    ProjectionError,
    ReferenceLossError,
)
from lora_ogpsa.rules import budget_correction

OPTIMIZERS = {
    # Rounding the parameters to float32 leaves eps * |θ| / |Δ| of any step in the basis, so the
    # step must not be much smaller than a useful one.
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adamw_decay": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
    # Its default: relative steps, and no learning rate in the parameter groups.
    "adafactor_relative": lambda p: Adafactor(p),
    "adamw8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=64),
    "paged_adamw8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-3, min_8bit_size=64),
    "lion": lambda p: bnb.optim.Lion(p, lr=1e-4),
    "schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-3),
}


def adapter_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def two_references(**kwargs):
    return [token_reference("a", n=12, **kwargs), token_reference("b", n=12, seed=7, **kwargs)]


def orthogonal(**kwargs):
    return OGPSAConfig(constraint="orthogonal", rank=6, refresh_every=4, **kwargs)


def worst_component(model, optimizer, config, steps=9):
    """Largest share, over steps and blocks, of the actual change that lies in the basis."""
    worst = 0.0
    with OGPSA(model, optimizer, two_references(), config) as ogpsa:
        for step in range(steps):
            training_step(model, step)
            before = ogpsa.space.read()
            optimizer.step()
            change = ogpsa.space.read() - before
            assert change.norm() > 0
            subspace, slabs = ogpsa.estimator.subspace, ogpsa.estimator.slabs
            assert sum(subspace.dimensions.values()) > 0
            for norms, slab in zip(subspace.component(change), slabs, strict=True):
                total = slab.view(change).norm(dim=-1).clamp_min(1e-30)
                worst = max(worst, float((norms / total).max()))
            optimizer.zero_grad()
    return worst


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("metric", ["optimizer", "euclidean"])
@pytest.mark.filterwarnings("ignore:.*paged")
def test_update_space_is_exact_under_every_optimizer(tiny_peft, name, metric):
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS[name](adapter_parameters(model))
    if name == "schedulefree":
        optimizer.train()
    assert worst_component(model, optimizer, orthogonal(metric=metric)) < 1e-5


def test_update_space_is_exact_on_a_4bit_base(tiny_4bit):
    model = tiny_4bit(warm=True)
    optimizer = OPTIMIZERS["adamw_decay"](adapter_parameters(model))
    assert worst_component(model, optimizer, orthogonal()) < 1e-5


@pytest.mark.parametrize("granularity", ["adapter", "tensor", "global"])
@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_update_space_is_exact_at_every_granularity_and_precision(
    tiny_peft, granularity, basis_dtype
):
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS["adamw_decay"](adapter_parameters(model))
    config = orthogonal(granularity=granularity, basis_dtype=basis_dtype)
    assert worst_component(model, optimizer, config) < 1e-5


@pytest.mark.parametrize("name", ["adamw_decay", "adamw8bit", "lion"])
def test_gradient_space_is_undone_by_adaptive_optimizers(tiny_peft, name):
    """The reason this library exists: projecting the gradient does not project the update."""
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS[name](adapter_parameters(model))
    assert worst_component(model, optimizer, orthogonal(space="gradient")) > 0.02


def test_gradient_space_is_exact_under_plain_sgd(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.5)
    assert worst_component(model, optimizer, orthogonal(space="gradient")) < 1e-5


def test_paper_preset_projects_the_gradient_off_its_normalised_means(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.5)
    config = OGPSAConfig(preset="paper", references_per_refresh=8, refresh_every=4)
    with OGPSA(model, optimizer, two_references(), config) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        flat = ogpsa.space.zeros()
        for view, parameter in zip(ogpsa.space.views(flat), ogpsa.space.parameters, strict=True):
            view.copy_(parameter.grad)
        for slab in ogpsa.space.slabs("tensor"):
            rows = slab.view(ogpsa.estimator.means).transpose(0, 1)
            rows = rows / rows.norm(dim=-1, keepdim=True)
            inside = (rows @ slab.view(flat).unsqueeze(-1)).abs().max()
            assert inside < 1e-5 * flat.norm()


# ------------------------------------------------------------------ one-sided constraints


def first_order_changes(ogpsa, before):
    change = ogpsa.space.read() - before
    means = ogpsa.estimator.means
    return (means @ change) / (means.norm(dim=-1) * change.norm()).clamp_min(1e-30)


@pytest.mark.parametrize("granularity", ["adapter", "global"])
@pytest.mark.parametrize("name", ["adamw_decay", "sgd_momentum", "adamw8bit"])
def test_halfspace_never_raises_a_reference_loss_to_first_order(tiny_peft, name, granularity):
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS[name](adapter_parameters(model))
    config = OGPSAConfig(constraint="halfspace", granularity=granularity, references_per_refresh=4)
    acted = []
    with OGPSA(model, optimizer, two_references(loss="kl"), config) as ogpsa:
        for _step in range(8):
            training_step(model, 0)
            before = ogpsa.space.read()
            optimizer.step()
            assert first_order_changes(ogpsa, before).max() < 1e-5
            acted.append(ogpsa.pop_logs()["removed_energy"])
            optimizer.zero_grad()
    assert max(acted) > 0


def test_budget_holds_a_reference_that_plain_training_forgets(tiny_peft):
    """Train towards random targets: the divergence stays near its budget only with the budget."""

    def divergence(protected):
        model = tiny_peft(warm=False)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
        reference = token_reference("a", n=6, loss="kl")
        objective = reference.prepare(model)
        ogpsa = None
        if protected:
            config = OGPSAConfig(budget=0.002, references_per_refresh=6)
            ogpsa = OGPSA(model, optimizer, [objective], config)
        for _step in range(30):
            training_step(model, 0)
            optimizer.step()
            optimizer.zero_grad()
        if ogpsa is not None:
            ogpsa.detach()
        return float(objective.losses(model, range(6))[1].mean())

    plain, kept = divergence(False), divergence(True)
    assert plain > 0.02
    assert kept < 0.004


def test_the_budget_rule_knows_which_loss_was_measured_behind_the_step(tiny_peft, monkeypatch):
    told = []

    def recorded(*args, behind=None, **settings):
        told.append(None if behind is None else behind.tolist())
        return budget_correction(*args, behind=behind, **settings)

    monkeypatch.setattr("lora_ogpsa.projector.budget_correction", recorded)
    model = tiny_peft(warm=True)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    with OGPSA(model, optimizer, two_references(), OGPSAConfig(references_per_refresh=2)):
        for step in range(4):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert sorted(told[:2]) == [[False, True], [True, False]] and told[2:] == told[:2]


def gradients(ogpsa):
    """The training gradients as one vector."""
    flat = ogpsa.space.zeros()
    for view, parameter in zip(ogpsa.space.views(flat), ogpsa.space.parameters, strict=True):
        view.copy_(parameter.grad)
    return flat


def test_penalty_is_the_mean_reference_gradients_by_their_shares(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.5)
    config = OGPSAConfig(penalty=3.0, budget=1e6)  # which corrects nothing
    references = [token_reference("a", n=12, share=3.0), token_reference("b", n=12, seed=7)]
    acted = []
    with OGPSA(model, optimizer, references, config) as ogpsa:
        for step in range(6):
            training_step(model, step)
            trained, before = gradients(ogpsa), ogpsa.space.read()
            a, b = ogpsa.estimator.means.clone()
            optimizer.step()
            expected = -0.5 * (trained + 3.0 * (0.75 * a + 0.25 * b))
            torch.testing.assert_close(ogpsa.space.read() - before, expected, atol=2e-6, rtol=1e-4)
            acted.append(float((0.75 * a + 0.25 * b).norm()))
            optimizer.zero_grad()
    assert acted[0] == 0.0  # nothing is known of the references before the first step
    assert min(acted[1:]) > 0


@pytest.mark.parametrize("refresh", ["stream", "interval"])
def test_penalty_of_the_latest_references_is_their_gradient(tiny_peft, refresh):
    """In turn, or of all by their shares; not of a mean that lags behind."""
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.5)
    config = OGPSAConfig(
        penalty=3.0,
        penalty_of="latest",
        budget=1e6,  # which corrects nothing
        refresh=refresh,
        refresh_every=1,
        references_per_refresh=4 if refresh == "stream" else 8,
        decay=0.9,
    )
    references = [token_reference(name, n=4, seed=seed) for name, seed in (("a", 1), ("b", 7))]
    turns = []
    with OGPSA(model, optimizer, references, config) as ogpsa:

        def reference_gradient(objective):
            optimizer.zero_grad()
            objective.losses(model, range(4))[0].mean().backward()
            return gradients(ogpsa)

        objectives, last = ogpsa.estimator.objectives, ogpsa.space.zeros()
        for step in range(5):
            optimizer.zero_grad()
            training_step(model, step)
            trained, before = gradients(ogpsa), ogpsa.space.read()
            drawn = list(ogpsa.estimator.drawn)
            optimizer.step()
            expected = -0.5 * (trained + 3.0 * last)
            torch.testing.assert_close(ogpsa.space.read() - before, expected, atol=2e-6, rtol=1e-4)
            turn = [n for n in range(2) if ogpsa.estimator.drawn[n] > drawn[n]]
            last = sum(reference_gradient(objectives[n]) for n in turn) / len(turn)
            turns.append(turn)
    assert turns[:2] == ([[0], [1]] if refresh == "stream" else [[0, 1], [0, 1]])


def test_penalty_is_in_the_scale_of_the_gradients(tiny_peft):
    def train(scaler):
        model = tiny_peft(warm=True)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3, fused=True)
        with OGPSA(model, optimizer, two_references(), OGPSAConfig(penalty=2.0)) as ogpsa:
            for step in range(4):
                generator = torch.Generator().manual_seed(step)
                ids = torch.randint(3, 128, (4, 16), generator=generator)
                loss = model(input_ids=ids, labels=ids).loss
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
            return ogpsa.space.read()

    alone = train(None)
    scaled = train(torch.amp.GradScaler("cpu", init_scale=4096.0))
    torch.testing.assert_close(scaled, alone, atol=1e-6, rtol=1e-4)


def test_penalty_keeps_a_reference_nearer(tiny_peft):
    def divergence(penalty):
        model = tiny_peft(warm=False)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
        objective = token_reference("a", n=6, loss="kl").prepare(model)
        config = OGPSAConfig(budget=1e6, references_per_refresh=6, penalty=penalty)
        with OGPSA(model, optimizer, [objective], config):
            for _step in range(30):
                training_step(model, 0)
                optimizer.step()
                optimizer.zero_grad()
        return float(objective.losses(model, range(6))[1].mean())

    assert divergence(10.0) < 0.5 * divergence(0.0)


def test_default_penalty_needs_labels_in_the_models_call(tiny_peft):
    def trained(penalty, labelled):
        model = tiny_peft(warm=True)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
        with OGPSA(model, optimizer, two_references(), OGPSAConfig(penalty=penalty)) as ogpsa:
            for step in range(4):
                if labelled:
                    training_step(model, step)
                else:
                    ids = torch.arange(3, 19).unsqueeze(0)
                    model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum().backward()
                with torch.no_grad():  # as for a preference loss's reference policy
                    model(input_ids=torch.tensor([[3, 4]]))
                optimizer.step()
                optimizer.zero_grad()
            return ogpsa.space.read()

    assert torch.equal(trained(None, True), trained(SUPERVISED_PENALTY, True))
    assert torch.equal(trained(None, False), trained(0.0, False))
    assert not torch.equal(trained(None, False), trained(SUPERVISED_PENALTY, False))


def test_restoration_lowers_the_excess_it_measured(tiny_peft):
    model = tiny_peft(warm=False)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=5e-3)
    config = OGPSAConfig(
        constraint="halfspace",
        refresh="interval",
        refresh_every=5,
        restoration=1.0,
        references_per_refresh=12,
        early_refreshes=(),
    )
    references = [
        token_reference("a", n=6, loss="kl"),
        token_reference("b", n=6, seed=3, loss="kl"),
    ]
    with OGPSA(model, optimizer, references, config) as ogpsa:
        for step in range(5):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        objectives = ogpsa.estimator.objectives
        before = [float(o.losses(model, range(6))[1].mean()) for o in objectives]
        length = ogpsa.space.read()
        ogpsa.refresh()
        moved = (ogpsa.space.read() - length).norm()
        after = [float(o.losses(model, range(6))[1].mean()) for o in objectives]
        assert min(before) > 0
        assert sum(after) < sum(before)
        assert moved <= config.restoration_cap * ogpsa._typical * (1 + 1e-4)


# ------------------------------------------------------------------ schedule and traces


def test_detach_restores_the_optimizer_and_the_model(tiny_peft):
    def trained(with_ogpsa):
        torch.manual_seed(0)
        model = tiny_peft(warm=True)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
        if with_ogpsa:
            ogpsa = OGPSA(model, optimizer, two_references())
            ogpsa.detach()
            ogpsa.detach()
        for step in range(3):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    plain, _ = trained(False)
    detached, optimizer = trained(True)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_pre_hooks for m in detached.modules())
    for a, b in zip(plain.parameters(), detached.parameters(), strict=True):
        assert torch.equal(a, b)


def test_attached_without_effect_trains_identically(tiny_peft):
    """A budget that is never reached leaves training bit for bit as it was, dropout and all."""

    def trained(with_ogpsa):
        torch.manual_seed(0)
        model = tiny_peft(warm=True, lora_dropout=0.2).train()
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
        if with_ogpsa:
            OGPSA(model, optimizer, two_references(loss="kl"), OGPSAConfig(budget=1e6, penalty=0))
        for step in range(4):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return model

    for a, b in zip(trained(False).parameters(), trained(True).parameters(), strict=True):
        assert torch.equal(a, b)


def test_interval_schedule_with_early_refreshes(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    config = OGPSAConfig(
        constraint="orthogonal",
        rank=4,
        refresh_every=6,
        early_refreshes=(1, 3),
        references_per_refresh=2,
    )
    refreshed = []
    with OGPSA(model, optimizer, two_references(), config) as ogpsa:
        for step in range(13):
            training_step(model, step)
            optimizer.step()
            if "refresh_seconds" in ogpsa.pop_logs():
                refreshed.append(step)
    assert refreshed == [0, 1, 3, 6, 12]


def test_streaming_takes_references_in_turn(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    seen = []
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        for step in range(4):
            training_step(model, step)
            optimizer.step()
            seen.append([key for key in ogpsa.pop_logs() if key.startswith("loss/")])
    assert seen == [["loss/a"], ["loss/b"], ["loss/a"], ["loss/b"]]


def test_streaming_gives_each_reference_its_share(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    references = [token_reference("a", n=12), token_reference("b", n=12, share=3)]
    with OGPSA(model, optimizer, references, OGPSAConfig(references_per_refresh=2)) as ogpsa:
        for step in range(8):
            training_step(model, step)
            optimizer.step()
        assert ogpsa.estimator.drawn == [4, 12]


def test_an_interval_is_split_by_shares_and_leaves_none_out(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    references = [token_reference("a", share=0.01), token_reference("b"), token_reference("c")]
    config = OGPSAConfig(constraint="orthogonal", references_per_refresh=7)
    with OGPSA(model, optimizer, references, config) as ogpsa:
        ogpsa.refresh()
        assert ogpsa.estimator.drawn == [1, 3, 3]


def test_budget_measures_where_the_optimizer_led(tiny_peft):
    """At the base model the divergence and its gradient are zero, so a first step is seen after."""
    model = tiny_peft(warm=False)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.5)
    objective = token_reference("a", n=4, loss="kl").prepare(model)
    config = OGPSAConfig(budget=1e6, references_per_refresh=4)
    with OGPSA(model, optimizer, [objective], config) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        seen = ogpsa.pop_logs()["excess/a"]
        assert ogpsa.estimator.means.any()
    there = float(objective.losses(model, range(4))[1].mean().detach())
    assert seen == pytest.approx(there, rel=1e-3) and there > 0


def test_streamed_mean_is_the_bias_corrected_average(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    config = OGPSAConfig(decay=0.5, references_per_refresh=2)
    with OGPSA(model, optimizer, [token_reference("a", n=4)], config) as ogpsa:
        fresh = []
        gather = ogpsa.estimator.passes.run

        def recorded(objective, examples, total, rows=None):
            out = gather(objective, examples, total, rows)
            fresh.append(total / len(examples))
            return out

        ogpsa.estimator.passes.run = recorded
        for step in range(3):
            training_step(model, step)
            optimizer.step()
    weights = torch.tensor([0.25, 0.5, 1.0])
    expected = sum(w * g for w, g in zip(weights, fresh, strict=True)) / weights.sum()
    torch.testing.assert_close(ogpsa.estimator.means[0], expected)


def test_adaptive_refresh_keeps_a_basis_that_still_holds(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.0)
    config = OGPSAConfig(
        constraint="orthogonal",
        rank=8,
        refresh_every=1,
        adaptive_threshold=0.5,
        references_per_refresh=4,
    )
    one = [token_reference("a", n=1)]
    with OGPSA(model, optimizer, one, config) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        drawn = ogpsa.estimator.drawn[0]
        optimizer.step()
        assert ogpsa.estimator.drawn[0] == drawn + 1


def test_metric_follows_the_optimizer_state(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        moments = [optimizer.state[p]["exp_avg_sq"].flatten() for p in ogpsa.space.parameters]
        root = torch.cat(moments).double().sqrt()
        scale = root.square().mean().sqrt()
        expected = 1 / (root / scale + ogpsa.config.metric_damping)
        torch.testing.assert_close(ogpsa.metric.latest.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw8bit", "lion", "adafactor"])
def test_metric_keeps_its_own_average_where_the_optimizer_has_none(tiny_peft, name):
    model = tiny_peft(warm=True)
    optimizer = OPTIMIZERS[name](adapter_parameters(model))
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        grads = torch.cat([p.grad.flatten() for p in ogpsa.space.parameters])
        torch.testing.assert_close(ogpsa.metric.own, grads.square() * 1e-3, rtol=1e-4, atol=0)


def test_metric_knows_different_learning_rates(tiny_peft):
    model = tiny_peft(warm=True)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "lora_A" in n], "lr": 1e-3},
            {"params": [p for n, p in named if "lora_B" in n], "lr": 1.6e-2},
        ]
    )
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        values = ogpsa.metric.latest.clone()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        equal = ogpsa.metric.update()
        for name, (start, end) in ogpsa.space.spans().items():
            factor = 1.0 if "lora_B" in name else 1 / 16
            torch.testing.assert_close(values[start:end], equal[start:end] * factor)


@pytest.mark.parametrize("metric", ["optimizer", "euclidean"])
def test_a_group_without_a_learning_rate_stays_and_the_others_are_held(tiny_peft, metric):
    model = tiny_peft(warm=True)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    still = {n: p.detach().clone() for n, p in named if "lora_A" in n}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "lora_A" in n], "lr": 0.0},
            {"params": [p for n, p in named if "lora_B" in n], "lr": 1e-2},
        ]
    )
    config = OGPSAConfig(budget=0.0, metric=metric)
    with OGPSA(model, optimizer, two_references(), config) as ogpsa:
        for step in range(3):
            training_step(model, step)
            before = ogpsa.space.read()
            optimizer.step()
            optimizer.zero_grad()
        change = ogpsa.space.read() - before
        assert torch.isfinite(change).all()
        assert change.any()
        rows = ogpsa.estimator.means
        # No budget is left to the reference that was not measured in this step.
        (other,) = (~ogpsa.estimator.measured).nonzero()
        assert rows[other] @ change <= 1e-5 * rows[other].norm() * change.norm()
    assert all(torch.equal(p, still[n]) for n, p in named if n in still)


@pytest.mark.parametrize("constraint", ["orthogonal", "budget"])
def test_autocast_and_low_precision_products_around_the_step_change_nothing(tiny_peft, constraint):
    config = OGPSAConfig(
        constraint=constraint,
        budget=0.0,
        rank=6 if constraint == "orthogonal" else None,
        refresh="interval",
        refresh_every=1000,
        early_refreshes=(),
    )

    def trained(careless):
        model = tiny_peft(warm=True)
        optimizer = OPTIMIZERS["adamw_decay"](adapter_parameters(model))
        with OGPSA(model, optimizer, two_references(), config) as ogpsa:
            # Reference passes are in the precision of training: the one refresh is not careless.
            training_step(model, 0)
            optimizer.step()
            for step in range(1, 4):
                optimizer.zero_grad()
                training_step(model, step)
                if careless:
                    # What a CPU has of these: with TF32 they are a GPU's.
                    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
                with torch.autocast("cpu", torch.bfloat16, enabled=careless):
                    optimizer.step()
                assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if careless else was)
                torch.backends.mkldnn.matmul.fp32_precision = was
            return ogpsa.space.read()

    was = torch.backends.mkldnn.matmul.fp32_precision
    try:
        assert torch.equal(trained(True), trained(False))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = was


# ------------------------------------------------------------------ several of them


def test_another_ogpsa_on_the_model_takes_the_place_of_the_first(tiny_peft, caplog):
    def gradients(attachments):
        model = tiny_peft(warm=True)
        for _ in range(attachments):
            optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
            OGPSA(model, optimizer, [token_reference()])
        ids = torch.arange(3, 19).unsqueeze(0)
        labels = ids.masked_fill(ids < 9, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in adapter_parameters(model)])

    plain, once = gradients(0), gradients(1)
    assert not torch.allclose(plain, once), "first tokens are weighed"
    assert "still attached" not in caplog.text
    assert torch.equal(gradients(2), once)
    assert "still attached" in caplog.text


def test_a_detached_ogpsa_is_not_in_the_way(tiny_peft, caplog):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    first = OGPSA(model, optimizer, [token_reference()])
    first.detach()
    second = OGPSA(model, optimizer, [token_reference()])
    first.detach()
    training_step(model, 0)
    optimizer.step()
    assert (first.steps, second.steps) == (0, 1)
    assert "still attached" not in caplog.text


def test_a_copy_of_the_model_is_free_of_hooks(tiny_peft):
    """Pickled as copied: with hooks it would be weighed as in training, and nothing protects it."""
    ids = torch.arange(3, 19).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids < 9, -100)}

    def gradients(model):
        model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in adapter_parameters(model)])

    expected = gradients(tiny_peft(warm=True))
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    ogpsa = OGPSA(model, optimizer, [token_reference()])
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(gradients(other), expected) for other in copies)
    assert ogpsa.saw_labels is None
    assert not torch.allclose(gradients(model), expected), "the model itself keeps them"
    assert ogpsa.saw_labels


def test_an_ogpsa_is_not_copied(tiny_peft):
    model = tiny_peft()
    ogpsa = OGPSA(model, torch.optim.SGD(adapter_parameters(model), lr=0.1), [token_reference()])
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ProjectionError, match="attach a new one; `save` and `load`"):
            copied(ogpsa)


# ------------------------------------------------------------------ failing safe


@pytest.mark.parametrize(
    ("references", "found"),
    [
        ([{"prompt": "Hi"}], r"\{'prompt': 'Hi'\} in it"),
        ("my_prompts.jsonl", "'my_prompts.jsonl'"),
        (Reference("a", "my_prompts.jsonl"), "Reference"),
    ],
)
def test_what_is_no_list_of_references_is_refused(tiny_peft, references, found):
    model = tiny_peft()
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    expected = rf"`references` should be a list of `Reference`.*Found {found}"
    with pytest.raises(ConfigError, match=expected):
        OGPSA(model, optimizer, references)
    with pytest.raises(ConfigError, match=expected):
        OGPSACallback(references=references)


def test_what_is_no_config_is_refused(tiny_peft):
    model = tiny_peft()
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    with pytest.raises(ConfigError, match=r"`OGPSAConfig.from_dict`.*Found \{'budget': 0.1\}"):
        OGPSA(model, optimizer, [token_reference()], {"budget": 0.1})
    with pytest.raises(ConfigError, match=r"`config` should be an `OGPSAConfig`.*Found \["):
        OGPSACallback([token_reference()])


def test_models_that_are_not_pefts_are_refused_with_a_way_out(tiny_peft, tiny_model):
    model = tiny_peft()
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    with pytest.raises(AdapterError, match=r"`DataParallel` wraps one.*unwrap_model"):
        OGPSA(torch.nn.DataParallel(model), optimizer, [token_reference()])
    own = tiny_model()
    own.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    optimizer = torch.optim.SGD(adapter_parameters(own), lr=0.1)
    with pytest.raises(AdapterError, match=r"Found `LlamaForCausalLM`.*get_peft_model"):
        OGPSA(own, optimizer, [token_reference()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_too_coarse_for_exact_steps_are_warned_of(tiny_peft, caplog, dtype):
    model = tiny_peft(warm=True)
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    OGPSA(model, optimizer, two_references())
    assert ("LoRA weights are torch.bfloat16" in caplog.text) is (dtype == torch.bfloat16)


def test_adapters_that_are_not_lora_are_refused_by_name(tiny_model):
    for config in (AdaLoraConfig(total_step=9), LoHaConfig()):
        config.target_modules = ["q_proj"]
        model = get_peft_model(tiny_model(), config)
        optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
        kind = config.peft_type.value
        with pytest.raises(AdapterError, match=rf"protects LoRA .*`default` \({kind}\)"):
            OGPSA(model, optimizer, [token_reference()])


def test_a_merged_adapter_is_refused(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into the base.*unmerge_adapter"):
        OGPSA(model, optimizer, [token_reference()])


def test_an_optimizer_that_maximises_is_refused(tiny_peft):
    """The penalty would push the references away."""
    model = tiny_peft(warm=True)
    optimizer = torch.optim.AdamW(adapter_parameters(model), maximize=True)
    with pytest.raises(ProjectionError, match="AdamW goes up its gradients"):
        OGPSA(model, optimizer, two_references())


def test_the_default_device_does_not_matter(tiny_peft):
    """As in a notebook that begins with `torch.set_default_device("cuda")`."""
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    references = two_references(loss="kl", limit=4)
    training_step(model, 0)
    with torch.device("meta"), OGPSA(model, optimizer, references) as ogpsa:
        optimizer.step()
    assert torch.isfinite(ogpsa.estimator.means).all()


def test_closure_is_refused(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with (
        OGPSA(model, optimizer, two_references()),
        pytest.raises(ProjectionError, match="closure"),
    ):
        optimizer.step(lambda: None)


def test_lbfgs_is_refused(tiny_peft):
    model = tiny_peft(warm=True)
    with pytest.raises(ProjectionError, match="LBFGS"):
        OGPSA(model, torch.optim.LBFGS(adapter_parameters(model)), two_references())


def test_optimizer_of_other_parameters_is_refused(tiny_peft):
    model, other = tiny_peft(warm=True), tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(other), lr=0.01)
    with pytest.raises(ProjectionError, match="does not hold `.*lora_A"):
        OGPSA(model, optimizer, two_references())


def test_optimizer_whose_step_does_nothing_is_refused(tiny_peft):
    class Elsewhere(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure=None):
            return None

    model = tiny_peft(warm=True)
    optimizer = Elsewhere(adapter_parameters(model))
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        with pytest.raises(ProjectionError, match="moved none"):
            optimizer.step()


def test_warm_up_from_a_zero_learning_rate_is_not_mistaken_for_that(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.0)
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        training_step(model, 0)
        optimizer.step()
        assert ogpsa.steps == 1


def test_freezing_mid_run_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        optimizer.step()
        adapter_parameters(model)[0].requires_grad_(False)
        with pytest.raises(ProjectionError, match="was frozen after"):
            optimizer.step()


def test_what_is_unfrozen_mid_run_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    parameters = adapter_parameters(model)
    parameters[0].requires_grad_(False)
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        optimizer.step()
        parameters[0].requires_grad_(True)
        with pytest.raises(ProjectionError, match="is trained since OGPSA was attached"):
            optimizer.step()


def test_an_adapter_added_mid_run_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        optimizer.step()
        head = torch.nn.Parameter(torch.zeros(2))
        optimizer.add_param_group({"params": [head]})  # none of the model's
        training_step(model, 1)
        optimizer.step()
        model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "more"])
        more = [p for n, p in model.named_parameters() if ".more." in n]
        optimizer.add_param_group({"params": more})
        training_step(model, 2)
        with pytest.raises(ProjectionError, match="more.weight` is trained since"):
            optimizer.step()


class _Lookahead:
    """Moves the parameters after the steps of the optimizer inside, as many wrappers do."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


def test_a_wrapper_whose_step_is_not_seen_is_refused(tiny_peft):
    model = tiny_peft()
    optimizer = _Lookahead(torch.optim.SGD(adapter_parameters(model), lr=0.01))
    with pytest.raises(ProjectionError, match=r"_Lookahead wraps another .*pass the optimizer in"):
        OGPSA(model, optimizer, two_references())


def test_schedule_free_radam_may_rest_at_first(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = schedulefree.RAdamScheduleFree(adapter_parameters(model), lr=1e-2)
    optimizer.train()
    with OGPSA(model, optimizer, two_references()) as ogpsa:
        before = ogpsa.space.read()
        for step in range(8):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(ogpsa.space.read(), before)


def test_training_in_evaluation_mode_is_reported_once(tiny_peft, caplog):
    model = tiny_peft(warm=True).eval()
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        for step in range(2):
            training_step(model, step)
            optimizer.step()
    assert caplog.text.count("in training mode, with `labels`") == 1


def test_a_refresh_that_fails_leaves_the_next_step_whole(tiny_peft, monkeypatch):
    twins = []
    for fails in (False, True):
        model = tiny_peft(warm=True)
        optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
        with OGPSA(model, optimizer, two_references(), OGPSAConfig(penalty=1.0)) as ogpsa:
            training_step(model, 0)
            if fails:
                before = ogpsa.space.read()
                with monkeypatch.context() as broken:
                    broken.setattr(ogpsa.estimator, "refresh", _interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        optimizer.step()
                assert torch.equal(ogpsa.space.read(), before)
            for _ in range(2):
                optimizer.step()
            twins.append(ogpsa.space.read())
    assert torch.equal(*twins)


def _interrupted():
    raise KeyboardInterrupt


def test_an_interrupted_step_leaves_the_next_one_whole(tiny_peft):
    """Ctrl-C in a notebook, whose next cell goes on training."""

    class Interrupted(torch.optim.AdamW):
        def step(self, closure=None):
            if self.interrupted:
                raise KeyboardInterrupt
            return super().step(closure)

    model = tiny_peft(warm=True)
    optimizer = Interrupted(adapter_parameters(model), lr=1e-3)
    config = OGPSAConfig(constraint="halfspace", references_per_refresh=2, penalty=0.5)
    with OGPSA(model, optimizer, two_references(), config) as ogpsa:
        for optimizer.interrupted in (False, True):
            training_step(model, 0)
            with pytest.raises(KeyboardInterrupt) if optimizer.interrupted else nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        optimizer.interrupted, drawn = False, sum(ogpsa.estimator.drawn)
        training_step(model, 1)
        gradient = adapter_parameters(model)[0].grad.clone()
        optimizer.step()
        assert sum(ogpsa.estimator.drawn) == drawn + 2
        assert not torch.equal(adapter_parameters(model)[0].grad, gradient)
        assert ogpsa.steps == 2


def test_the_default_dtype_does_not_matter(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    torch.set_default_dtype(torch.float64)
    try:
        with OGPSA(model, optimizer, two_references()) as ogpsa:
            training_step(model, 0)
            optimizer.step()
            assert ogpsa.estimator.means.dtype == ogpsa.estimator.excess.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_swapping_parameters_in_the_optimizer_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        optimizer.step()
        group = optimizer.param_groups[0]
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        with pytest.raises(ProjectionError, match="does not hold"):
            optimizer.step()


def test_deleting_the_adapter_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, two_references()):
        training_step(model, 0)
        model.delete_adapter("default")
        with pytest.raises(AdapterError, match="is gone"):
            optimizer.step()


def test_step_without_any_gradient_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with (
        OGPSA(model, optimizer, two_references()),
        pytest.raises(ProjectionError, match="received a gradient"),
    ):
        optimizer.step()


def test_nan_reference_stops_before_the_step(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with OGPSA(model, optimizer, [token_reference("general")]) as ogpsa:
        training_step(model, 0)
        objective = ogpsa.estimator.objectives[0]
        losses = objective.losses
        objective.losses = lambda *a: tuple(part * float("nan") for part in losses(*a))
        before = ogpsa.space.read()
        with pytest.raises(ReferenceLossError, match="`general`.*The step was not taken"):
            optimizer.step()
        assert torch.equal(ogpsa.space.read(), before)
        assert not ogpsa.estimator.means.any()


def test_out_of_memory_halves_the_micro_batch_then_gives_up(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    config = OGPSAConfig(
        constraint="orthogonal", rank=4, references_per_refresh=8, reference_batch_size=8
    )
    with OGPSA(model, optimizer, [token_reference("a", n=8)], config) as ogpsa:
        objective = ogpsa.estimator.objectives[0]
        losses, sizes, fits = objective.losses, [], [2]

        def limited(model, indices):
            sizes.append(len(indices))
            if len(indices) > fits[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return losses(model, indices)

        objective.losses = limited
        # Into the bases goes every example once; after that the sketches are freed.
        held, estimate = [], ogpsa.estimator.subspace.estimate

        def watched(means, sketches, **settings):
            held.extend(rows.shape[1] for rows in sketches)
            estimate(means, sketches, **settings)

        ogpsa.estimator.subspace.estimate = watched
        training_step(model, 0)
        optimizer.step()
        assert sizes == [8, 4, 2, 2, 2, 2]
        assert held and all(filled == 8 for filled in held)
        fits[0] = 0
        with pytest.raises(ReferenceLossError, match="does not fit into memory"):
            ogpsa.refresh()


@pytest.mark.parametrize(
    ("config", "count", "named"),
    [
        (OGPSAConfig(), 0, "at least one reference"),
        (OGPSAConfig(), 9, "at most 8"),
        (OGPSAConfig(constraint="orthogonal", rank=2), 3, "`rank=2`"),
        (
            OGPSAConfig(constraint="orthogonal", references_per_refresh=2),
            3,
            "`references_per_refresh=2`",
        ),
    ],
)
def test_references_and_settings_must_fit(tiny_peft, config, count, named):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    references = [token_reference(f"r{i}", n=2) for i in range(count)]
    with pytest.raises(ConfigError, match=named):
        OGPSA(model, optimizer, references, config)


def test_reference_names_must_differ(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    with pytest.raises(ConfigError, match="unique"):
        OGPSA(model, optimizer, [token_reference("a"), token_reference("a")])
