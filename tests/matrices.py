"""A bank of row matrices that between them hold what gradients can look like."""

import torch
from torch import Tensor

SCALES = (1e-12, 1e-4, 1.0, 1e6)


def of_rank(n: int, width: int, rank: int, seed: int = 0) -> Tensor:
    """[n, width] of exactly `rank`: a product through an inner dimension of `rank`."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return left @ right


def bank() -> list[Tensor]:
    """Full and deficient ranks, all scales, a decaying spectrum, equal rows, zeros (float64)."""
    matrices = []
    for scale in SCALES:
        for n, width, rank in ((6, 40, 6), (20, 40, 3), (30, 24, 24), (1, 16, 1)):
            matrices.append(of_rank(n, width, rank) * scale)
    decaying = of_rank(20, 30, 20) @ torch.diag(0.5 ** torch.arange(30, dtype=torch.float64))
    equal = torch.ones(5, 12, dtype=torch.float64)
    return [*matrices, decaying, equal, torch.zeros(4, 10, dtype=torch.float64)]
