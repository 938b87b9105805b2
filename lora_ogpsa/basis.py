"""`StoredBasis`: the rows of a slab as they are stored, and read back tile by tile.

Rows may lie in float32, in 16 bits, or in 8-bit blocks with a scale each; on the device that
computes, or in host memory. A reader sees none of it: it gets float32 on the computing device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ogpsa.errors import ConfigError

#: Elements of an 8-bit block, which share one float32 scale.
BLOCK = 256
# Elements of a tile. On a CPU a tile and its weighted copy should stay in the cache, so that each
# pass over a basis reads memory once; on a GPU a tile should be worth its kernel launches.
_TILE_CPU, _TILE_GPU = 1 << 19, 1 << 24

# Elements of a row that are multiplied and summed in one go on a GPU.
_PIECE = 1 << 12

Tile = tuple[slice, slice]


def tile_elements(device: torch.device) -> int:
    """How many elements of rows to read at a time on `device`."""
    return _TILE_GPU if device.type == "cuda" else _TILE_CPU


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """`left` @ `right`ᵀ of few, long rows, in float64.

    On a GPU such a product has a handful of results, each a sum over millions, and would keep as
    few multiprocessors busy (0.4 % of copying speed on an H200): there the sum is taken in pieces
    that go beside each other, and are added up in float64. On a CPU it is summed in the precision
    of the rows.

    Args:
        left: [..., m, w].
        right: [..., n, w].

    Returns:
        [..., m, n], float64.
    """
    if left.device.type == "cuda":
        return _product_in_pieces(left, right)
    return (left @ right.mT).double()


def _product_in_pieces(left: Tensor, right: Tensor) -> Tensor:
    even = left.shape[-1] // _PIECE * _PIECE
    a, b = (x[..., :even].unflatten(-1, (-1, _PIECE)).transpose(-3, -2) for x in (left, right))
    found = (a @ b.mT).sum(-3, dtype=torch.float64)
    if even == left.shape[-1]:
        return found
    return found + (left[..., even:] @ right[..., even:].mT)


class StoredBasis:
    """Rows [count, k, w], stored low and read in float32.

    Args:
        count: pieces of the slab.
        rank: k, rows per piece.
        width: w, length of a row.
        dtype: float32, bfloat16 or float16; int8 stores blocks of :data:`BLOCK` elements of a
            row as whole multiples of a 127th of their largest magnitude.
        device: where tiles are needed.
        offload: keep the rows in host memory, pinned if `device` is a GPU.
    """

    def __init__(
        self,
        count: int,
        rank: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        self.shape = (count, rank, width)
        self.device = torch.device("cpu" if device is None else device)
        self.quantised = dtype == torch.int8
        home = torch.device("cpu") if offload else self.device
        # Only from page-locked memory do copies to a GPU run beside its kernels.
        pinned = home.type == "cpu" and self.device.type == "cuda"
        stored = -(-width // BLOCK) * BLOCK if self.quantised else width
        self.rows = torch.zeros(count, rank, stored, dtype=dtype, device=home, pin_memory=pinned)
        self.scales: Tensor | None = None
        if self.quantised:
            self.scales = torch.zeros(
                count, rank, stored // BLOCK, 1, device=home, pin_memory=pinned
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows and scales."""
        return self.rows.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def tiles(self) -> Iterator[Tile]:
        """(pieces, columns) that between them cover the slab once."""
        count, rank, width = self.shape
        size = tile_elements(self.device) // rank
        columns = min(width, max(BLOCK, size // BLOCK * BLOCK))
        pieces = max(1, size // columns)
        for at in range(0, count, pieces):
            for left in range(0, width, columns):
                yield slice(at, min(at + pieces, count)), slice(left, min(left + columns, width))

    def read(self, tile: Tile) -> Tensor:
        """The rows of a tile [pieces, k, columns], float32, on the computing device."""
        pieces, columns = tile
        if self.scales is None:
            part = self.rows[pieces, :, columns]
            return part.to(self.device, non_blocking=True).float()
        # Tiles begin at a block; the last one may end inside one, whose rest is padding.
        first, last = columns.start // BLOCK, -(-columns.stop // BLOCK)
        codes = self.rows[pieces, :, first * BLOCK : last * BLOCK]
        codes = codes.to(self.device, non_blocking=True).unflatten(-1, (-1, BLOCK))
        scales = self.scales[pieces, :, first:last].to(self.device, non_blocking=True)
        return (codes * scales).flatten(-2)[..., : columns.stop - columns.start]

    def whole(self) -> Tensor:
        """All rows [count, k, w] as stored, in float32; the stored tensor itself if it is that."""
        return self.read((slice(None), slice(0, self.shape[-1])))

    def write(self, pieces: slice, rows: Tensor) -> None:
        """Store float32 rows [pieces, n, w], n ≤ k; rows beyond n become zero."""
        _, rank, width = self.shape
        n = rows.shape[1]
        self.rows[pieces, n:].zero_()
        if self.scales is None:
            self.rows[pieces, :n].copy_(rows)
            return
        padded = torch.nn.functional.pad(rows, (0, self.rows.shape[-1] - width))
        blocks = padded.unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax(-1, keepdim=True) / 127
        # A block of zeros has scale zero, and its codes are zero whatever they are divided by.
        codes = (blocks / scales.clamp_min(1e-30)).round_().clamp_(-127, 127)
        self.rows[pieces, :n].copy_(codes.flatten(-2))
        self.scales[pieces, n:rank].zero_()
        self.scales[pieces, :n].copy_(scales)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The stored tensors, under `name`."""
        if self.scales is None:
            return {name: self.rows}
        return {name: self.rows, f"{name}.scales": self.scales}

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Restore the stored tensors in place, exactly.

        Raises:
            ConfigError: the saved rows have another shape or were stored in another way.
        """
        for key, own in self.state_dict(name).items():
            saved = state.get(key)
            if saved is None or saved.shape != own.shape:
                found = "none" if saved is None else str(tuple(saved.shape))
                raise ConfigError(
                    f"Saved {key} should have shape {tuple(own.shape)} (pieces, rank, width). "
                    f"Found {found}: the LoRA layout, `granularity`, `rank` or `basis_dtype` "
                    "differ."
                )
            own.copy_(saved)
