"""`FrequentDirections`: a small matrix that stands for all gradient rows seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ogpsa.basis import thin_product
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.full_precision import full_precision

# Elements of the wide matrix converted to float64 at a time.
_CHUNK = 1 << 22


def gram_eigh(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Eigen-decomposition of the Gram matrix of `rows`, safe against over- and underflow.

    Never an SVD of the wide matrix: only :math:`SS^\top` [..., n, n] is decomposed. It is
    accumulated in float64, since squaring in float32 would drown directions weaker than a
    thousandth of the strongest.

    Args:
        rows: S [..., n, w].

    Returns:
        Eigenvalues [..., n] in descending order and eigenvectors as columns [..., n, n], both in
        float64, of the Gram matrix of `rows / scale`; and `scale` [..., 1, 1].
    """
    scale = rows.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    n, width = rows.shape[-2:]
    gram = torch.zeros(*rows.shape[:-2], n, n, dtype=torch.float64, device=rows.device)
    step = max(1, _CHUNK // max(1, rows.numel() // width))
    for part in rows.split(step, dim=-1):
        wide = part.double() / scale
        gram += thin_product(wide, wide)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1), scale


class FrequentDirections:
    r"""Frequent Directions sketches (Liberty 2013; Ghashami et al. 2016) of one or more streams.

    For the rows G seen so far and the sketch S, for every k < ℓ,
    :math:`0 \preceq G^\top G - S^\top S` and
    :math:`\|G^\top G - S^\top S\|_2 \le \|G - G_k\|_F^2 / (\ell - k)`.

    Args:
        size: ℓ, most rows kept per sketch.
        width: w, length of a row.
        count: number of streams sketched side by side; all receive rows in step.
        capacity: rows buffered before a shrink, at least `size` + 1; by default twice `size`.
        device: device of the buffer, which is allocated with the first rows and freed by
            :meth:`clear`.

    Raises:
        ConfigError: a size is not positive, or `capacity` does not exceed `size`.
    """

    def __init__(
        self,
        size: int,
        width: int,
        count: int = 1,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        capacity = 2 * size if capacity is None else capacity
        if min(size, width, count) < 1 or capacity <= size:
            raise ConfigError(
                "`size`, `width` and `count` should be at least 1 and `capacity` above `size`. "
                f"Found size={size}, width={width}, count={count}, capacity={capacity}."
            )
        self.size = size
        self.shape = (count, capacity, width)
        self.device = torch.device("cpu" if device is None else device)
        self.filled = 0
        # Between the refreshes of an interval schedule there is nothing to hold.
        self._buffer: Tensor | None = None

    def empty_like(self) -> FrequentDirections:
        """A sketch of the same shape that has seen nothing."""
        count, capacity, width = self.shape
        return FrequentDirections(self.size, width, count, capacity=capacity, device=self.device)

    @property
    def buffer(self) -> Tensor:
        """Room for `capacity` rows [count, capacity, w]."""
        if self._buffer is None:
            self._buffer = torch.zeros(self.shape, device=self.device, dtype=torch.float32)
        return self._buffer

    @property
    def rows(self) -> Tensor:
        """The rows held now [count, n, w], n ≤ capacity; a view."""
        if self.filled == 0:
            return torch.zeros(self.shape[0], 0, self.shape[2], device=self.device)
        return self.buffer[:, : self.filled]

    def reserve(self, n: int) -> Tensor:
        """Make room for `n` more rows and return them as a zeroed view [count, n, w] to write.

        Raises:
            ConfigError: `n` rows do not fit beside a shrunk sketch.
        """
        capacity = self.shape[1]
        if n > capacity - min(self.filled, self.size):
            raise ConfigError(
                f"{n} rows at once do not fit: the buffer takes {capacity} with the sketch of "
                f"{self.size}. Append fewer, or build it with a larger `capacity`."
            )
        if self.filled + n > capacity:
            self.shrink()
        self.filled += n
        return self.buffer[:, self.filled - n : self.filled].zero_()

    def discard(self, n: int) -> None:
        """Take back the last `n` reserved rows."""
        self.filled -= n

    def append(self, rows: Tensor) -> None:
        """Fold in `rows` [count, n, w] (or [n, w] for a single stream), any n."""
        if rows.dim() == 2:
            rows = rows.unsqueeze(0)
        for part in rows.split(self.shape[1] - self.size, dim=1):
            self.reserve(part.shape[1]).copy_(part)

    @full_precision()
    def shrink(self) -> None:
        """Reduce to at most ℓ - 1 non-zero rows (the bound above is kept)."""
        if self.filled < self.size:
            return
        values, vectors, scale = gram_eigh(self.rows)
        # Taking λ_ℓ off the ℓ largest eigenvalues loses at least ℓ·λ_ℓ of the Frobenius norm
        # each time: that is what the bound's denominator counts.
        floor = values[..., self.size - 1 : self.size]
        kept = values[..., : self.size]
        shrunk = ((kept - floor).clamp_min(0) / kept.clamp_min(1e-300)).sqrt()
        mix = (vectors[..., : self.size] * shrunk.unsqueeze(-2)).mT.float()
        reduced = mix @ (self.rows / scale)
        self.buffer[:, : self.size] = reduced * scale
        self.filled = self.size

    def decay(self, factor: float) -> None:
        """Weigh everything seen so far by `factor` in the second moment."""
        self.rows.mul_(factor**0.5)

    def merge(self, other: FrequentDirections) -> None:
        """Fold another sketch of the same shape into this one (across ranks, or in time)."""
        self.append(other.rows)

    def clear(self) -> None:
        """Forget all rows, and free their memory."""
        self.filled = 0
        self._buffer = None

    def state_dict(self) -> dict[str, Tensor]:
        """The rows held now [count, n, w], as a copy."""
        return {"rows": self.rows.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, exactly."""
        rows = state["rows"]
        count, capacity, width = self.shape
        if rows.shape[0] != count or rows.shape[1] > capacity or rows.shape[2] != width:
            raise ConfigError(
                f"A saved sketch of shape {tuple(rows.shape)} does not fit one of {count} streams, "
                f"{capacity} rows and width {width}."
            )
        self.filled = rows.shape[1]
        self.rows.copy_(rows)
