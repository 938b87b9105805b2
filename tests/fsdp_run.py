"""The runs of ddp_run.py with FSDP2; started in two processes by test_fsdp.py.

torchrun --nproc_per_node 2 fsdp_run.py OUTPUT
"""

import sys

import torch
import torch.distributed as dist
from ddp_run import CONFIGS, build
from references import token_rows
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_ogpsa import OGPSA, OGPSAConfig, Reference
from lora_ogpsa.errors import OGPSAError

RUNS = {
    **CONFIGS,
    "gradient": OGPSAConfig(preset="paper", references_per_refresh=4, refresh_every=3),
}


def references():
    return [Reference("a", token_rows(8), loss="sft"), Reference("b", token_rows(8, 5), loss="kl")]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def batch(step, rank=0, size=1):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 128, (4, 16), generator=generator)[rank::size]
    return {"input_ids": ids, "labels": ids}


def train(model, config, rank=0, size=1):
    """Five steps: what was learnt, the weights, and the largest residual of a step."""
    optimizer = adamw(model)
    residual = 0.0
    with OGPSA(model, optimizer, references(), config) as ogpsa:
        for step in range(5):
            model(**batch(step, rank, size)).loss.backward()
            before = ogpsa.space.read()
            optimizer.step()
            optimizer.zero_grad()
            change = ogpsa.space.read() - before
            if ogpsa.estimator.subspace is not None:
                inside = torch.cat(ogpsa.estimator.subspace.component(change)).norm()
                residual = max(residual, float(inside / change.norm()))
    return {
        "means": ogpsa.estimator.means,
        "weights": ogpsa.space.read(),
        "residual": torch.tensor(residual),
    }


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def resumed(folder, config, rank, size):
    """The same five steps, stopped after three: saved, and gone on with by new objects."""
    model = shard(build())
    optimizer = adamw(model)
    with OGPSA(model, optimizer, references(), config) as ogpsa:
        steps(model, optimizer, range(3), rank, size)
    if rank == 0:
        ogpsa.save(folder)
    weights = get_model_state_dict(model)
    moments = get_optimizer_state_dict(model, optimizer)
    dist.barrier()
    model = shard(build())
    optimizer = adamw(model)
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(model, optimizer, moments)
    with OGPSA(model, optimizer, references(), config) as ogpsa:
        ogpsa.load(folder)
        steps(model, optimizer, range(3, 5), rank, size)
    return {"means": ogpsa.estimator.means, "weights": ogpsa.space.read()}


def steps(model, optimizer, numbers, rank, size):
    for step in numbers:
        model(**batch(step, rank, size)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def refusal(action):
    try:
        action()
    except OGPSAError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def wrapped_after():
    """FSDP2 wraps a model that OGPSA is attached to already."""
    model = build()
    optimizer = adamw(model)
    OGPSA(model, optimizer, references())
    shard(model)
    model(**batch(0)).loss.backward()
    optimizer.step()


def swapped_after():
    """The same, with the optimizer's parameters replaced as accelerate does."""
    model = build()
    optimizer = adamw(model)
    OGPSA(model, optimizer, references())
    shard(model)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    model(**batch(0)).loss.backward()
    optimizer.step()


def text_references():
    model = shard(build())
    OGPSA(model, adamw(model), [Reference("own", [{"prompt": "hello"}])])


def hybrid_mesh():
    model = build()
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "shard"))
    fully_shard(model, mesh=mesh)
    OGPSA(model, adamw(model), references())


def main(output):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {name: train(shard(build()), config, rank, size) for name, config in RUNS.items()}
    found["resumed"] = {
        name: resumed(f"{output}/state-{name}", RUNS[name], rank, size)
        for name in ("budget", "orthogonal")
    }
    found["refused"] = {
        action.__name__: refusal(action)
        for action in (wrapped_after, swapped_after, text_references, hybrid_mesh)
    }
    torch.save(found, f"{output}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
