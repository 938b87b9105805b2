"""Parameters sharded by FSDP2: whole tensors to compute with, local pieces to write.

The base model is what needs sharding; an adapter is a thousandth of it. So every process holds the
adapter's rows and steps whole, as under DDP, and the projection is that of the unsharded update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_ogpsa.errors import ProjectionError


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which each process holds a piece."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective if it is sharded, else the tensor itself."""
    held: Any = tensor
    return held.full_tensor() if is_sharded(tensor) else tensor


def local_pair(target: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """This process's piece of `target`, and the same piece of the whole tensor `value`."""
    if not is_sharded(target):
        return target, value
    from torch.distributed.tensor import distribute_tensor

    held: Any = target
    # Every process has the whole value, so nothing is sent.
    piece = distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
    return held.to_local(), piece.to_local()


def check_sharding(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Refuse ways of splitting the adapter other than FSDP2 over all processes.

    Raises:
        ProjectionError: FSDP1, tensor parallelism, a hybrid mesh, or a mesh of some processes.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ProjectionError(
            "FSDP1 flattens the adapter's parameters into pieces whose steps OGPSA cannot put "
            "together. Use FSDP2 (`torch.distributed.fsdp.fully_shard`) or DDP."
        )
    sharded: list[Any] = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return
    from torch.distributed.fsdp import FSDPModule

    meshes = {p.device_mesh for p in sharded}
    by_fsdp = any(isinstance(m, FSDPModule) for m in model.modules())
    if not by_fsdp or any(m.ndim != 1 or m.size() != dist.get_world_size() for m in meshes):
        raise ProjectionError(
            f"The adapter's parameters are DTensors on {sorted(map(str, meshes))}. OGPSA supports "
            "those of FSDP2 on one mesh dimension over all processes; tensor parallelism and "
            "hybrid sharding are not supported. Use FSDP2 on a flat mesh, or DDP."
        )
    if len(sharded) < len(parameters) or not all(p.dtype == torch.float32 for p in sharded):
        raise ProjectionError(
            "Under FSDP2 all LoRA parameters should be sharded and float32. Found "
            f"{len(sharded)} of {len(parameters)} sharded, with dtypes "
            f"{sorted({str(p.dtype) for p in parameters})}."
        )
