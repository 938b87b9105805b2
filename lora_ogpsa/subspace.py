"""`Subspace`: an orthonormal basis per block, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ogpsa.adapters import Slab
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.rules import correction
from lora_ogpsa.sketch import gram_eigh

# Directions whose energy is below this share of the strongest are taken for noise: gradients under
# bf16 autocast carry about 0.3 % of it, and nearly parallel references differ by nothing else.
_NOISE = 1e-6


class Subspace:
    """Bases U [k, w] with orthonormal rows for the pieces of a flat parameter vector.

    Args:
        slabs: how the vector falls into pieces (:meth:`AdapterSpace.slabs`).
        rank: k, rows stored per piece; a piece whose gradients span fewer has zero rows.
        dtype: dtype the bases are stored in. Projections are exact for the rows as stored.
        device: where the bases live.
    """

    def __init__(
        self,
        slabs: Sequence[Slab],
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.slabs = list(slabs)
        self.rank = rank
        self.bases = [
            torch.zeros(slab.count, min(rank, slab.width), slab.width, dtype=dtype, device=device)
            for slab in self.slabs
        ]

    # ------------------------------------------------------------------ estimation

    @torch.no_grad()
    def estimate(
        self,
        means: Tensor | None,
        sketches: Sequence[Tensor] | None,
        *,
        energy: float | None = None,
    ) -> None:
        r"""Take the bases from mean rows and sketches.

        The span of the means is always included (that is the paper's constraint); the rest of
        the rank goes to the top right-singular directions of the sketch outside that span.

        Args:
            means: data-set mean gradients [K, d], or ``None``.
            sketches: per slab, rows [count, ℓ, w], or ``None``.
            energy: keep the fewest directions that hold this share of the sketch's energy (of
                the means' energy where there is no sketch).
        """
        for index, (slab, basis) in enumerate(zip(self.slabs, self.bases, strict=True)):
            k = basis.shape[1]
            parts = []
            sketch = None if sketches is None else sketches[index]
            total = captured = None
            if sketch is not None:
                total = sketch.square().sum((-2, -1))
                captured = torch.zeros_like(total)
            if means is not None:
                rows = slab.view(means).transpose(0, 1)  # [count, K, w]
                # Unit rows: references must not be ranked by the size of their gradients.
                rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
                first, _ = _principal(rows, min(k, rows.shape[1]))
                parts.append(first)
                if sketch is not None:
                    inside = sketch @ first.mT
                    captured = inside.square().sum((-2, -1))
                    sketch = sketch - inside @ first
            if sketch is not None and (left := k - sum(p.shape[1] for p in parts)) > 0:
                rest, values = _principal(sketch, min(left, sketch.shape[1]))
                if energy is not None and total is not None and captured is not None:
                    before = captured.unsqueeze(-1) + values.cumsum(-1) - values
                    needed = before < energy * total.unsqueeze(-1)
                    rest = rest * needed.unsqueeze(-1)
                parts.append(rest)
            basis.zero_()
            if parts:
                joined = _orthonormalise(torch.cat(parts, dim=1))
                basis[:, : joined.shape[1]] = joined.to(basis.dtype)

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def project_(self, flat: Tensor, inverse_metric: Tensor | None = None) -> Tensor:
        r"""Remove from `flat` [d] its component in the bases, in place.

        :math:`\Delta \leftarrow \Delta - M^{-1}U^\top (UM^{-1}U^\top)^{-1} U\Delta`, so that
        :math:`U\Delta = 0` whatever the metric and the precision of the stored basis.

        Args:
            flat: the vector, float32.
            inverse_metric: the diagonal of M⁻¹ [d]; ``None`` is the identity.

        Returns:
            `flat`.
        """
        for slab, basis in zip(self.slabs, self.bases, strict=True):
            piece = slab.view(flat)
            weights = None if inverse_metric is None else slab.view(inverse_metric)
            piece.add_(correction(basis, piece, weights))
        return flat

    @torch.no_grad()
    def component(self, flat: Tensor) -> list[Tensor]:
        """Per slab, the norm of the component of `flat` [d] in each piece's basis, [count]."""
        norms = []
        for slab, basis in zip(self.slabs, self.bases, strict=True):
            norms.append(correction(basis, slab.view(flat)).norm(dim=-1))
        return norms

    @torch.no_grad()
    def captured_energy(self, flat: Tensor) -> Tensor:
        r"""Share of the energy of `flat` [d] that lies in the bases, a scalar in [0, 1].

        :math:`\|P\,g\|^2 / \|g\|^2` over all pieces together; 0 for a zero vector.
        """
        inside = torch.stack([norms.square().sum() for norms in self.component(flat)]).sum()
        return inside / flat.square().sum().clamp_min(torch.finfo(flat.dtype).tiny)

    @property
    def dimensions(self) -> dict[str, int]:
        """Directions in each piece's basis, by name."""
        return {
            name: int(n)
            for slab, basis in zip(self.slabs, self.bases, strict=True)
            for name, n in zip(slab.names, (basis != 0).any(-1).sum(-1).tolist(), strict=True)
        }

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """The bases by slab, as tensors."""
        return {f"basis.{index}": basis for index, basis in enumerate(self.bases)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bases in place.

        Raises:
            ConfigError: the saved bases belong to other shapes or another rank.
        """
        for index, basis in enumerate(self.bases):
            saved = state.get(f"basis.{index}")
            if saved is None or saved.shape != basis.shape:
                found = "none" if saved is None else str(tuple(saved.shape))
                raise ConfigError(
                    f"Saved basis {index} should have shape {tuple(basis.shape)} (pieces, rank, "
                    f"width). Found {found}: the LoRA layout, `granularity` or `rank` differ."
                )
            basis.copy_(saved)


def _principal(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k right-singular directions of `rows` [..., n, w], and their squared singular values.

    Directions that are rounding noise come out as zero rows with value zero.
    """
    values, vectors, scale = gram_eigh(rows)
    values, vectors = values[..., :k], vectors[..., :k]
    kept = values > _NOISE * values[..., :1]
    inverse = torch.where(kept, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    directions = (vectors * inverse.unsqueeze(-2)).mT.float() @ (rows / scale)
    energy = torch.where(kept, values, torch.zeros_like(values))
    return directions, energy.float() * scale.squeeze(-1).float().square()


def _orthonormalise(rows: Tensor) -> Tensor:
    """Make nearly orthonormal rows [..., k, w] orthonormal to float32 rounding.

    Symmetric orthogonalisation, twice: the first pass undoes the noise that weak directions
    bring along, the second the rounding of the first. Zero rows stay zero.
    """
    for _ in range(2):
        gram = (rows @ rows.mT).double()
        empty = gram.diagonal(dim1=-2, dim2=-1) <= 0.25
        rows = rows * (~empty).unsqueeze(-1)
        gram = gram.masked_fill(empty.unsqueeze(-1) | empty.unsqueeze(-2), 0.0)
        gram = gram + torch.diag_embed(empty.double())
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(1e-12).rsqrt().unsqueeze(-2)
        rows = (root @ vectors.mT).float() @ rows
    return rows
