"""FSDP2 in two real processes (gloo, CPU) against one process that shards nothing."""

import os
import subprocess
import sys
from pathlib import Path

import fsdp_run
import pytest
import torch
from ddp_run import build

from lora_ogpsa import OGPSA
from lora_ogpsa.errors import ProjectionError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    output = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(HERE / "fsdp_run.py"), str(output)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
