"""State on disk: a run that was stopped and resumed is the run that was not."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from references import token_reference, token_rows, training_step
from test_callback import arguments, token_dataset
from transformers import Trainer

from lora_ogpsa import OGPSA, OGPSACallback, OGPSAConfig, Reference, state
from lora_ogpsa.errors import StateError
from lora_ogpsa.state import STATE_FILE, has_state, load_state, save_state

CONFIGS = {
    "budget": OGPSAConfig(budget=0.0),
    "latest": OGPSAConfig(penalty=1.0, penalty_of="latest"),
    "orthogonal": OGPSAConfig(
        constraint="orthogonal", rank=4, refresh_every=3, references_per_refresh=4, decay=0.5
    ),
    "halfspace": OGPSAConfig(
        constraint="halfspace",
        refresh="interval",
        refresh_every=2,
        references_per_refresh=4,
        restoration=0.5,
    ),
    "paper": OGPSAConfig(preset="paper", refresh_every=3, references_per_refresh=4),
}


def references():
    return [Reference("a", token_rows(6), loss="kl"), Reference("b", token_rows(6, 3), loss="kl")]


def trained(tiny_peft, folder, config, *, steps, resume=None, **kwargs):
    torch.manual_seed(0)
    model = tiny_peft(warm=True, lora_dropout=0.1)
    args = arguments(
        folder,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="constant",
        learning_rate=5e-3,
        **kwargs,
    )
    args.max_steps = steps
    trainer = Trainer(model, args, train_dataset=token_dataset(16))
    callback = OGPSACallback(config, references()).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return model, callback


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_run_equals_the_uninterrupted_one(tiny_peft, tmp_path, name):
    whole, _ = trained(tiny_peft, tmp_path / "whole", CONFIGS[name], steps=6)
    trained(tiny_peft, tmp_path / "parts", CONFIGS[name], steps=4)
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert has_state(checkpoint)
    assert not list(checkpoint.glob("*.pkl"))
    resumed, callback = trained(
        tiny_peft, tmp_path / "parts", CONFIGS[name], steps=6, resume=str(checkpoint)
    )
    assert callback.ogpsa.steps == 6
    for (key, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_plain_loop_state_round_trip(tiny_peft, tmp_path):
    def build():
        model = tiny_peft(warm=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return model, optimizer

    def run(model, optimizer, ogpsa, steps):
        for step in steps:
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    ogpsa = OGPSA(model, optimizer, references(), CONFIGS["orthogonal"])
    run(model, optimizer, ogpsa, range(4))
    ogpsa.save(tmp_path)
    weights, moments = model.state_dict(), optimizer.state_dict()
    weights = {k: v.clone() for k, v in weights.items()}
    torch.save(moments, tmp_path / "optimizer.pt")
    run(model, optimizer, ogpsa, range(4, 8))

    twin, twins_optimizer = build()
    twin.load_state_dict(weights)
    twins_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    other = OGPSA(twin, twins_optimizer, references(), CONFIGS["orthogonal"])
    other.load(tmp_path)
    run(twin, twins_optimizer, other, range(4, 8))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("done", [0, 2])
def test_going_back_to_an_earlier_state_takes_the_same_way_again(tiny_peft, tmp_path, done):
    """Under an optimizer without second moments, whose metric is an average of OGPSA's own."""
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ogpsa = OGPSA(model, optimizer, references(), CONFIGS["budget"])

    def run(steps):
        for step in steps:
            training_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return ogpsa.space.read()

    weights = run(range(done))
    ogpsa.save(tmp_path)
    first = run(range(done, 4))
    ogpsa.space.write(weights)
    ogpsa.load(tmp_path)
    assert torch.equal(run(range(done, 4)), first)


@pytest.fixture
def saved(tiny_peft, tmp_path):
    model = tiny_peft(warm=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    OGPSA(model, optimizer, references(), CONFIGS["orthogonal"]).save(tmp_path)
    return tmp_path


def attached(tiny_peft, config=CONFIGS["orthogonal"], refs=None, **lora):
    model = tiny_peft(warm=True, **lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return OGPSA(model, optimizer, refs or references(), config)


def test_another_lora_shape_is_refused_by_name(tiny_peft, saved):
    with pytest.raises(StateError, match=r"another LoRA layout.*lora_A.*\[4, .*\[8, "):
        attached(tiny_peft, r=8).load(saved)


def test_other_targets_are_refused(tiny_peft, saved):
    with pytest.raises(StateError, match="another LoRA layout"):
        attached(tiny_peft, target_modules=["q_proj"]).load(saved)


def test_another_rank_is_refused(tiny_peft, saved):
    config = OGPSAConfig.from_dict({**CONFIGS["orthogonal"].to_dict(), "rank": 5})
    with pytest.raises(StateError, match="another configuration: `rank` was 4 and is 5"):
        attached(tiny_peft, config).load(saved)


def test_other_references_are_refused(tiny_peft, saved):
    with pytest.raises(
        StateError, match="another set of references: `a.[a-z_]+` was .* and is None"
    ):
        attached(tiny_peft, refs=[token_reference("c", n=3), token_reference("b", n=6)]).load(saved)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "distill"}, "`a.loss` was 'sft' and is 'distill'"),
        ({"budget": 0.4}, "`a.budget` was None and is 0.4"),
        ({"share": 2.0}, "`a.share` was 1.0 and is 2.0"),
        ({"weight": 2.0}, "`a.weight` was 1.0 and is 2.0"),
        ({"first_tokens_weight": 0.1}, "`a.first_tokens_weight` was"),
        ({"seed": 9}, "`a.tokens` was"),
    ],
)
def test_a_changed_reference_is_refused(tiny_peft, tmp_path, changed, said):
    config = CONFIGS["orthogonal"]
    refs = [token_reference("a", n=6), token_reference("b", n=6)]
    attached(tiny_peft, config, refs).save(tmp_path)
    refs[0] = token_reference("a", n=6, **changed)
    with pytest.raises(StateError, match=f"another set of references: {said}"):
        attached(tiny_peft, config, refs).load(tmp_path)


def test_a_state_beside_other_weights_is_refused(tiny_peft, tmp_path):
    """The Trainer goes on from another folder than the one its own checkpoints lie in."""
    trained(tiny_peft, tmp_path / "a", CONFIGS["budget"], steps=2)
    trained(tiny_peft, tmp_path / "b", CONFIGS["budget"], steps=2, weight_decay=20.0)
    given = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(StateError, match=r"other weights.*OGPSACallback\(resume_from_checkpoint"):
        trained(tiny_peft, tmp_path / "b", CONFIGS["budget"], steps=4, resume=given)


def test_a_newer_format_is_refused(tiny_peft, saved, monkeypatch):
    tensors, facts = load_state(saved)
    with monkeypatch.context() as newer:
        newer.setattr(state, "FORMAT", facts.pop("format") + 98)
        save_state(saved, tensors, facts)
    with pytest.raises(StateError, match="format 99.*Update lora_ogpsa"):
        attached(tiny_peft).load(saved)


def test_a_torn_file_is_refused(tiny_peft, saved):
    (saved / STATE_FILE).write_bytes((saved / STATE_FILE).read_bytes()[:50])
    with pytest.raises(StateError, match="cannot be read.*earlier checkpoint"):
        attached(tiny_peft).load(saved)


def test_no_state_is_refused(tiny_peft, tmp_path):
    with pytest.raises(StateError, match="no OGPSA state"):
        attached(tiny_peft).load(tmp_path)


def test_resuming_without_a_state_warns_and_protects(tiny_peft, tmp_path, caplog):
    config = CONFIGS["budget"]
    trained(tiny_peft, tmp_path, config, steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / STATE_FILE).unlink()
    _, callback = trained(tiny_peft, tmp_path, config, steps=6, resume=str(checkpoint))
    assert "no OGPSA state" in caplog.text
    assert callback.ogpsa.steps == 6
    assert all(callback.ogpsa.estimator.mass)


@pytest.mark.parametrize("constraint", ["orthogonal", "budget"])
def test_without_a_state_the_first_step_is_protected_whatever_the_schedule(
    tiny_peft, tmp_path, constraint
):
    config = OGPSAConfig(
        constraint=constraint, refresh_every=20, references_per_refresh=4, early_refreshes=()
    )
    trained(tiny_peft, tmp_path, config, steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / STATE_FILE).unlink()
    _, callback = trained(tiny_peft, tmp_path, config, steps=5, resume=str(checkpoint))
    assert callback.ogpsa.steps == 5
    assert any(callback.ogpsa.estimator.mass)


def test_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    """A real process, killed inside the write of its second state."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys, torch
        import safetensors.torch
        from pathlib import Path
        from lora_ogpsa.state import save_state
        base = Path({str(tmp_path)!r})
        for name in ("checkpoint-1", "checkpoint-2"):
            (base / name).mkdir()
        save_state(base / "checkpoint-1", {{"x": torch.ones(3)}}, {{"steps": 1}})
        write = safetensors.torch.save_file
        def torn(tensors, path, metadata):
            write(tensors, path, metadata)
            with open(path, "r+b") as file:
                file.truncate(20)
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = torn
        save_state(base / "checkpoint-2", {{"x": torch.zeros(3)}}, {{"steps": 2}})
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not has_state(tmp_path / "checkpoint-2")
    tensors, facts = load_state(tmp_path / "checkpoint-1")
    assert facts["steps"] == 1
    assert torch.equal(tensors["x"], torch.ones(3))


def test_a_state_is_replaced_as_a_whole(tmp_path):
    save_state(tmp_path, {"x": torch.ones(1)}, {"steps": 1})
    save_state(tmp_path, {"x": torch.zeros(1)}, {"steps": 2})
    tensors, facts = load_state(tmp_path)
    assert (facts["steps"], float(tensors["x"])) == (2, 0.0)
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == [STATE_FILE]
