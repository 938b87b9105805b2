"""What several processes of one run tell each other about references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lora_ogpsa.errors import OGPSAError, ReferenceLossError


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up `tensor` over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [count, n, w] of all processes, in rank order, [count, Σ n, w]; n may differ."""
    _, size = world()
    if size == 1:
        return rows
    mine = torch.tensor([rows.shape[1]], device=rows.device)
    counts = [torch.zeros_like(mine) for _ in range(size)]
    dist.all_gather(counts, mine)
    longest = int(max(counts))
    padded = rows.new_zeros(rows.shape[0], longest, rows.shape[2])
    padded[:, : rows.shape[1]] = rows
    held = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(held, padded)
    return torch.cat([h[:, : int(n)] for h, n in zip(held, counts, strict=True)], dim=1)


def alike(flag: bool, device: torch.device) -> bool:
    """Whether all processes hold the same `flag`."""
    count = sum_over_processes(torch.tensor([float(flag)], device=device))
    return float(count) in (0.0, float(world()[1]))


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Within the context, an error on one process stops all of them, instead of hanging them.

    Raises:
        OGPSAError: the process's own error.
        ReferenceLossError: another process failed.
    """
    failure: OGPSAError | None = None
    try:
        yield
    except OGPSAError as error:
        failure = error
    failed = torch.tensor([float(failure is not None)], device=device)
    sum_over_processes(failed)
    if failure is not None:
        raise failure
    if world()[1] > 1 and float(failed) > 0:
        raise ReferenceLossError("A reference pass failed on another process; see its message.")


@contextmanager
def first_process_first() -> Iterator[None]:
    """Within the context, rank 0 goes first, so that the others find what it has cached."""
    rank, size = world()
    if size > 1 and rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if size > 1 and rank == 0:
            dist.barrier()
