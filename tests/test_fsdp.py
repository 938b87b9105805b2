"""FSDP2 in two real processes (gloo, CPU) against one process that shards nothing."""

import fsdp_run
import pytest
import torch
from ddp_run import build
from launch import launch

from lora_ogpsa import OGPSA
from lora_ogpsa.errors import ProjectionError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    output = tmp_path_factory.mktemp("fsdp")
    launch(output, "fsdp_run.py")
    return [torch.load(output / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", fsdp_run.RUNS)
def test_the_projection_is_that_of_the_unsharded_update(ranks, name):
    alone = fsdp_run.train(build(), fsdp_run.RUNS[name])
    first, second = ranks[0][name], ranks[1][name]
    assert alone["means"].any()
    for key in ("weights", "means"):
        assert torch.equal(first[key], second[key]), key
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(first["means"], alone["means"], rtol=1e-2, atol=1e-5)
    if name == "orthogonal":
        assert float(first["residual"]) < 1e-5


@pytest.mark.parametrize("name", ["budget", "orthogonal"])
def test_a_resumed_run_equals_the_uninterrupted_one(ranks, name):
    for rank in ranks:
        for key in ("weights", "means"):
            assert torch.equal(rank["resumed"][name][key], rank[name][key]), key


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("wrapped_after", "ProjectionError: No LoRA parameter.*the model wrapped again"),
        ("swapped_after", "ProjectionError: The optimizer does not hold"),
        ("text_references", "ConfigError: Reference `own`.*Before `fully_shard`"),
        ("hybrid_mesh", "ProjectionError: .*hybrid sharding"),
    ],
)
def test_what_cannot_be_protected_is_refused(ranks, action, message):
    import re

    for rank in ranks:
        assert re.match(message, rank["refused"][action], re.DOTALL), rank["refused"][action]


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(torch.nn.Module):  # the real one needs an accelerator
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    model = build()
    model.base_model.model.lm_head = FullyShardedDataParallel(model.base_model.model.lm_head)
    with pytest.raises(ProjectionError, match="FSDP1.*Use FSDP2"):
        OGPSA(model, fsdp_run.adamw(model), fsdp_run.references())
