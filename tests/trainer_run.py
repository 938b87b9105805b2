"""A Trainer with OGPSA; started in two processes by test_trainers.py.

torchrun --nproc_per_node 2 trainer_run.py OUTPUT
"""

import gc
import sys

import torch
import torch.distributed as dist
from ddp_run import build
from test_callback import Watch, arguments, token_dataset, token_references
from transformers import Trainer

from lora_ogpsa import OGPSACallback, OGPSAConfig


def train(output):
    config = OGPSAConfig(constraint="orthogonal", rank=4, refresh_every=2, references_per_refresh=4)
    callback = OGPSACallback(config, token_references())
    watch = Watch(callback)
    args = arguments(output, ddp_backend="gloo", gradient_accumulation_steps=2)
    trainer = Trainer(build(), args, train_dataset=token_dataset(16), callbacks=[watch])
    callback.attach(trainer)
    trainer.train()
    torch.save(
        {
            "size": dist.get_world_size(),
            "wrapped": type(trainer.model_wrapped).__name__,
            "worst": max(watch.worst),
            "steps": callback.ogpsa.steps,
            "weights": callback.ogpsa.space.read(),
            "means": callback.ogpsa.estimator.means,
        },
        f"{output}/{dist.get_rank()}.pt",
    )


def main(output):
    train(output)
    gc.collect()  # frees the DDP wrapper before its process group; see ddp_run.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
