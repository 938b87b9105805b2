"""`create_ogpsa_optimizer`, in the manner of PEFT's optimizer factories."""

import pytest
import torch
from references import token_reference, training_step

from lora_ogpsa import OGPSAConfig, create_ogpsa_optimizer
from lora_ogpsa.errors import AdapterError, ConfigError, ProjectionError

ORTHOGONAL = OGPSAConfig(constraint="orthogonal", rank=4, references_per_refresh=4)


def test_is_the_users_optimizer_with_ogpsa_attached(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = create_ogpsa_optimizer(
        model,
        torch.optim.AdamW,
        references=[token_reference()],
        config=ORTHOGONAL,
        lr=3e-3,
        weight_decay=0.1,
    )
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable]

    ogpsa = optimizer.ogpsa
    for step in range(3):
        training_step(model, step)
        before = ogpsa.space.read()
        optimizer.step()
        optimizer.zero_grad()
        change = ogpsa.space.read() - before
        inside = torch.cat(ogpsa.estimator.subspace.component(change))
        assert change.norm() > 0
        assert inside.max() < 1e-5 * change.norm()
    assert ogpsa.steps == 3


def test_detached_it_is_the_plain_optimizer(tiny_peft):
    def trained(build):
        model = tiny_peft(warm=True)
        optimizer = build(model)
        for step in range(2):
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return model

    def detached(model):
        optimizer = create_ogpsa_optimizer(
            model, torch.optim.SGD, references=[token_reference()], lr=0.1
        )
        optimizer.ogpsa.detach()
        return optimizer

    plain = trained(
        lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    for a, b in zip(plain.parameters(), trained(detached).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_frozen_model_is_refused(tiny_peft):
    model = tiny_peft().requires_grad_(False)
    with pytest.raises(AdapterError, match="no trainable parameter"):
        create_ogpsa_optimizer(model, torch.optim.SGD, references=[token_reference()], lr=0.1)


def test_a_closure_optimizer_is_refused(tiny_peft):
    with pytest.raises(ProjectionError, match="LBFGS"):
        create_ogpsa_optimizer(tiny_peft(), torch.optim.LBFGS, references=[token_reference()])


def test_text_references_need_the_tokenizer(tiny_peft):
    with pytest.raises(ConfigError, match="no tokenizer"):
        create_ogpsa_optimizer(tiny_peft(), torch.optim.SGD, lr=0.1)


def test_a_model_moved_afterwards_stops_the_run(tiny_peft):
    model = tiny_peft(warm=True)
    optimizer = create_ogpsa_optimizer(
        model, torch.optim.SGD, references=[token_reference()], lr=0.1
    )
    # No second device here: let the projector be the one that stayed behind.
    optimizer.ogpsa._typical = optimizer.ogpsa._typical.to("meta")
    training_step(model, 0)
    with pytest.raises(ProjectionError, match="moved to cpu after OGPSA was attached on meta"):
        optimizer.step()
