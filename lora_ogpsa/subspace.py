"""`Subspace`: an orthonormal basis per block, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ogpsa.adapters import Slab
from lora_ogpsa.basis import StoredBasis, thin_product
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.rules import solve_equalities
from lora_ogpsa.sketch import gram_eigh

# Directions whose energy is below this share of the strongest are taken for noise: gradients under
# bf16 autocast carry about 0.3 % of it, and nearly parallel references differ by nothing else.
_NOISE = 1e-6
# Of a sketch's energy, what rounding leaves where nothing lies outside the mean rows.
_ROUNDING = 1e-10
# Elements of mean rows and sketches worked on at a time: it bounds the memory of an estimate, and
# on a CPU keeps its many passes over them in the cache.
_GROUP_CPU, _GROUP_GPU = 1 << 20, 1 << 25


class Subspace:
    """Bases U [k, w] with orthonormal rows for the pieces of a flat parameter vector.

    Args:
        slabs: how the vector falls into pieces (:meth:`AdapterSpace.slabs`).
        rank: k, rows stored per piece; a piece whose gradients span fewer has zero rows.
        dtype: dtype the bases are stored in (int8: blocks with a scale each). Projections are
            exact for the rows as stored.
        device: where vectors are projected.
        offload: keep the bases in host memory and stream them to `device` at each use.
    """

    def __init__(
        self,
        slabs: Sequence[Slab],
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        self.slabs = list(slabs)
        self.rank = rank
        self.stored = [
            StoredBasis(
                slab.count,
                min(rank, slab.width),
                slab.width,
                dtype=dtype,
                device=device,
                offload=offload,
            )
            for slab in self.slabs
        ]

    @property
    def bases(self) -> list[Tensor]:
        """Per slab, the rows as stored [count, k, w]; in float32 and on the projecting device."""
        return [basis.whole() for basis in self.stored]

    # ------------------------------------------------------------------ estimation

    @torch.no_grad()
    def estimate(
        self,
        means: Tensor | None,
        sketches: Sequence[Tensor] | None,
        *,
        energy: float | None = None,
    ) -> None:
        r"""Take the bases from mean rows and sketches, which may lie on any device.

        The span of the means is always included (that is the paper's constraint); the rest of
        the rank goes to the top right-singular directions of the sketch outside that span.

        Args:
            means: data-set mean gradients [K, d], or ``None``.
            sketches: per slab, rows [count, ℓ, w], or ``None``.
            energy: of the sketch's directions keep the fewest that hold this share of its energy
                together with the means.
        """
        for index, (slab, basis) in enumerate(zip(self.slabs, self.stored, strict=True)):
            rows = None if means is None else slab.view(means).transpose(0, 1)  # [count, K, w]
            sketch = None if sketches is None else sketches[index]
            held = sum(0 if part is None else part.shape[1] for part in (rows, sketch))
            group = _GROUP_GPU if basis.device.type == "cuda" else _GROUP_CPU
            step = max(1, group // max(1, held * slab.width))
            for at in range(0, slab.count, step):
                part = slice(at, min(at + step, slab.count))
                found = _directions(
                    None if rows is None else rows[part].to(basis.device).float(),
                    None if sketch is None else sketch[part].to(basis.device).float(),
                    basis.shape[1],
                    energy,
                )
                basis.write(part, found)

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def correction(self, flat: Tensor, inverse_metric: Tensor | None = None) -> Tensor:
        r"""What takes `flat` [d] out of the bases, a new vector.

        :math:`-M^{-1}U^\top (UM^{-1}U^\top)^{-1} U\Delta`, so that :math:`U\Delta = 0` afterwards,
        whatever the metric and the precision of the stored basis. Each basis is read twice, tile
        by tile, and nothing of its size is allocated.

        Args:
            flat: Δ, float32.
            inverse_metric: the diagonal of M⁻¹ [d]; ``None`` is the identity.

        Returns:
            [d], float32.
        """
        out = torch.zeros_like(flat)
        pieces = list(zip(self.slabs, self.stored, strict=True))
        weights = [
            None if inverse_metric is None else slab.view(inverse_metric) for slab in self.slabs
        ]
        products = [
            _products(basis, slab.view(flat), weight)
            for (slab, basis), weight in zip(pieces, weights, strict=True)
        ]
        multipliers = _multipliers(products)
        for (slab, basis), weight, found in zip(pieces, weights, multipliers, strict=True):
            _correct(basis, found, weight, slab.view(out))
        return out

    @torch.no_grad()
    def project_(self, flat: Tensor, inverse_metric: Tensor | None = None) -> Tensor:
        """Remove from `flat` [d] its component in the bases, in place.

        Args:
            flat: the vector, float32.
            inverse_metric: the diagonal of M⁻¹ [d]; ``None`` is the identity.

        Returns:
            `flat`.
        """
        return flat.add_(self.correction(flat, inverse_metric))

    @torch.no_grad()
    def component(self, flat: Tensor) -> list[Tensor]:
        """Per slab, the norm of the component of `flat` [d] in each piece's basis, [count]."""
        inside = self.correction(flat)
        return [slab.view(inside).norm(dim=-1) for slab in self.slabs]

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
            for slab, basis in zip(self.slabs, self.stored, strict=True)
            for name, n in zip(slab.names, (basis.rows != 0).any(-1).sum(-1).tolist(), strict=True)
        }

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """The bases by slab, as stored."""
        return {
            name: tensor
            for index, basis in enumerate(self.stored)
            for name, tensor in basis.state_dict(f"basis.{index}").items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bases in place.

        Raises:
            ConfigError: the saved bases belong to other shapes, another rank or another dtype.
        """
        for index, basis in enumerate(self.stored):
            basis.load_state_dict(f"basis.{index}", state)


def _products(basis: StoredBasis, step: Tensor, weights: Tensor | None) -> Tensor:
    """UM⁻¹Uᵀ, and below it UΔ, of every piece [count, k + 1, k], float64."""
    rank = basis.shape[1]
    products = step.new_zeros(len(step), rank + 1, rank, dtype=torch.float64)
    tiles = list(basis.tiles())
    # One buffer for all tiles, the first of which is the largest: it stays in the cache.
    most, wide = (part.stop - part.start for part in tiles[0])
    buffer = step.new_empty(most * (rank + 1) * wide)
    for pieces, columns in tiles:
        rows = basis.read((pieces, columns))
        count, _, width = rows.shape
        left = buffer[: count * (rank + 1) * width].view(count, rank + 1, width)
        if weights is None:
            left[:, :rank].copy_(rows)
        else:
            torch.mul(rows, weights[pieces, columns].unsqueeze(1), out=left[:, :rank])
        left[:, rank].copy_(step[pieces, columns])
        products[pieces] += thin_product(left, rows)
    return products


def _multipliers(products: Sequence[Tensor]) -> list[Tensor]:
    """-(UM⁻¹Uᵀ)⁻¹UΔ [count, k] of every slab, float32; slabs of one rank in one solve."""
    ranks = sorted({found.shape[-1] for found in products})
    solved: dict[int, list[Tensor]] = {}
    for rank in ranks:
        same = [found for found in products if found.shape[-1] == rank]
        joined = torch.cat(same)
        multipliers = solve_equalities(joined[:, :rank], joined[:, rank]).float().neg_()
        solved[rank] = list(multipliers.split([len(found) for found in same]))
    return [solved[found.shape[-1]].pop(0) for found in products]


def _correct(basis: StoredBasis, multipliers: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """Write M⁻¹Uᵀ times the `multipliers` [count, k] into `out` [count, w]."""
    for pieces, columns in basis.tiles():
        found = (multipliers[pieces].unsqueeze(1) @ basis.read((pieces, columns))).squeeze(1)
        if weights is not None:
            found *= weights[pieces, columns]
        out[pieces, columns] = found


def _directions(
    means: Tensor | None, sketch: Tensor | None, k: int, energy: float | None
) -> Tensor:
    """Orthonormal rows [count, ≤ k, w] from mean rows [count, K, w] and a sketch [count, ℓ, w]."""
    parts = []
    total = captured = None
    if sketch is not None:
        total = sketch.square().sum((-2, -1))
        captured = torch.zeros_like(total)
    if means is not None:
        # Unit rows: references must not be ranked by the size of their gradients.
        rows = means / means.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        first, _ = _principal(rows, min(k, rows.shape[1]))
        parts.append(first)
        if sketch is not None:
            inside = sketch @ first.mT
            captured = inside.square().sum((-2, -1))
            sketch = sketch - inside @ first
    if sketch is not None and (left := k - sum(p.shape[1] for p in parts)) > 0:
        floor = None if total is None or means is None else _ROUNDING * total
        rest, values = _principal(sketch, min(left, sketch.shape[1]), floor)
        if energy is not None and total is not None and captured is not None:
            before = captured.unsqueeze(-1) + values.cumsum(-1) - values
            needed = before < energy * total.unsqueeze(-1)
            rest = rest * needed.unsqueeze(-1)
        parts.append(rest)
    if not parts:
        raise ConfigError("A basis is estimated from mean rows, a sketch, or both. Found neither.")
    return _orthonormalise(torch.cat(parts, dim=1))


def _principal(rows: Tensor, k: int, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top-k right-singular directions of `rows` [..., n, w], and their squared singular values.

    Directions that are rounding noise come out as zero rows with value zero: beside the strongest,
    or up to `floor` [...], where the rows are what a subtraction has left.
    """
    values, vectors, scale = gram_eigh(rows)
    values, vectors = values[..., :k], vectors[..., :k]
    kept = values > _NOISE * values[..., :1]
    if floor is not None:
        kept &= values * scale.squeeze(-1).double().square() > floor.double().unsqueeze(-1)
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
        gram = thin_product(rows, rows)
        empty = gram.diagonal(dim1=-2, dim2=-1) <= 0.25
        rows = rows * (~empty).unsqueeze(-1)
        gram = gram.masked_fill(empty.unsqueeze(-1) | empty.unsqueeze(-2), 0.0)
        gram = gram + torch.diag_embed(empty.double())
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(1e-12).rsqrt().unsqueeze(-2)
        # The mixture leaves rounding of the other rows in an empty one: noise that is parallel to
        # them, and a Gram matrix that has no inverse.
        rows = ((root @ vectors.mT).float() @ rows) * (~empty).unsqueeze(-1)
    return rows
