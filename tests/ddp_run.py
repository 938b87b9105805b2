"""One run of a few steps, in one process or several; started by test_processes.py.

python ddp_run.py OUTPUT CONSTRAINT            one process, the whole batch
torchrun --nproc_per_node 2 ddp_run.py ...     two, half of the batch each
... OUTPUT CONSTRAINT accelerate               the same in accelerate's loop
"""

import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from references import token_rows
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ogpsa import OGPSA, OGPSAConfig, Reference
from lora_ogpsa.processes import alike

CONFIGS = {
    "orthogonal": OGPSAConfig(
        constraint="orthogonal", rank=6, refresh_every=3, references_per_refresh=6, sketch_size=12
    ),
    "budget": OGPSAConfig(budget=0.0, references_per_refresh=4),
    "halfspace": OGPSAConfig(constraint="halfspace", references_per_refresh=3),
}


def build():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.train()


def main(output, constraint, loop="plain"):
    several = "RANK" in os.environ
    accelerator = Accelerator(cpu=True) if loop == "accelerate" else None
    if several and accelerator is None:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if several else 0
    size = dist.get_world_size() if several else 1
    here = torch.device("cpu")
    assert alike(True, here)
    assert alike(rank == 0, here) != several
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        model = accelerator.unwrap_model(wrapped)
    else:
        wrapped = DistributedDataParallel(model) if several else model
    references = [
        Reference("a", token_rows(8), loss="sft"),
        Reference("b", token_rows(8, 5), loss="kl"),
    ]
    with OGPSA(model, optimizer, references, CONFIGS[constraint]) as ogpsa:
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(3, 128, (4, 16), generator=generator)[rank::size]
            loss = wrapped(input_ids=ids, labels=ids).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    tensors, _ = ogpsa.estimator.state_dict()
    saved = {name: t.clone() for name, t in tensors.items() if not name.startswith("sketch")}
    saved["weights"] = ogpsa.space.read()
    torch.save(saved, f"{output}/{constraint}-{size}-{rank}.pt")
    if several:
        # Freed after the process group, DDP's reducer holds the group's last reference: its threads
        # are then joined under the GIL, which one of them may be waiting for (PyTorch 2.13).
        del wrapped
        if accelerator is not None:
            accelerator.free_memory()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
