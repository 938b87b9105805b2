r"""The update rules as pure tensor maths: the smallest correction that meets the constraints.

Every rule solves, for the step :math:`\Delta` and rows :math:`C`,

.. math:: x = \arg\min_x (x - \Delta)^\top M (x - \Delta) \quad\text{s.t.}\quad Cx = 0
   \ \text{ or }\ Cx \le b,

whose solution is :math:`x = \Delta - M^{-1} C^\top \lambda` with :math:`\lambda` from a system of
as many unknowns as there are rows. All functions are batched over independent pieces and keep to
the device: none waits for the host.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from lora_ogpsa.basis import thin_product, tile_elements
from lora_ogpsa.errors import ConfigError

MAX_INEQUALITIES = 8
# Elements of the weighted copy of the rows made at a time: it bounds the extra memory of a
# correction, not its result.
_CHUNK = 1 << 24
# Smallest eigenvalue of a Gram matrix of unit rows below which rounding tells in the multipliers:
# sums of float32 on a CPU are off by up to 1e-5.
_NEARLY_SINGULAR = 1e-3


def solve_equalities(gram: Tensor, residual: Tensor) -> Tensor:
    r"""λ of the equality-constrained step: :math:`CM^{-1}C^\top \lambda = C\Delta`.

    Rows that are zero (a basis with fewer directions than its storage) get λ = 0.

    Args:
        gram: C M⁻¹ Cᵀ [..., k, k].
        residual: C Δ [..., k].

    Returns:
        λ [..., k], float64.
    """
    gram, residual = gram.double(), residual.double()
    empty = gram.diagonal(dim1=-2, dim2=-1) <= 0
    gram = gram + torch.diag_embed(empty.double())
    solution = torch.linalg.solve_ex(gram, residual.unsqueeze(-1))[0].squeeze(-1)
    return solution.masked_fill(empty, 0.0)


def solve_inequalities(gram: Tensor, residual: Tensor) -> Tensor:
    r"""λ ≥ 0 of the inequality-constrained step, by its dual, a non-negative least squares.

    Minimises :math:`\tfrac12 \lambda^\top Q\lambda - \lambda^\top r` over λ ≥ 0 exactly: the
    minimum has some support on which λ solves the equality system, and with at most
    :data:`MAX_INEQUALITIES` rows all supports are tried at once, in one batched solve.

    Args:
        gram: Q = C M⁻¹ Cᵀ [..., k, k].
        residual: r = C Δ - b [..., k].

    Returns:
        λ [..., k], float64.

    Raises:
        ConfigError: more than :data:`MAX_INEQUALITIES` rows.
    """
    k = gram.shape[-1]
    if k > MAX_INEQUALITIES:
        raise ConfigError(
            f"One-sided constraints take at most {MAX_INEQUALITIES} mean rows, one per reference. "
            f"Found {k}: use fewer references."
        )
    q, r = gram.double(), residual.double()
    # Rows may differ by orders of magnitude; in units of their own length they do not.
    unit = _units(q)
    q = q * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    r = r * unit
    supports = _supports(k, q.device)
    inside = supports.unsqueeze(-1) * supports.unsqueeze(-2)
    outside = torch.diag_embed(1.0 - supports)
    # Parallel rows leave a support singular; a ridge far below the data picks one solution.
    ridge = 1e-12 * torch.eye(k, device=q.device, dtype=q.dtype)
    systems = q.unsqueeze(-3) * inside + outside + ridge
    right = r.unsqueeze(-2) * supports
    lam = torch.linalg.solve_ex(systems, right.unsqueeze(-1))[0].squeeze(-1)  # [..., 2^k, k]
    lam = torch.nan_to_num(lam)
    feasible = (lam >= -1e-12).all(-1)
    lam = lam.clamp_min(0)
    objective = 0.5 * ((lam @ q) * lam).sum(-1) - (lam * r.unsqueeze(-2)).sum(-1)
    objective = objective.masked_fill(~feasible, float("inf"))
    best = objective.argmin(-1, keepdim=True).unsqueeze(-1)
    chosen = lam.gather(-2, best.expand(*best.shape[:-1], k)).squeeze(-2)
    return chosen * unit


def _units(gram: Tensor) -> Tensor:
    """What brings each row of a Gram matrix [..., k, k] to length one, [..., k]; 0 for no row."""
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return torch.where(length > 0, 1 / length, torch.zeros_like(length))


def _nearly_dependent(grams: Tensor) -> list[int]:
    """Which of some Gram matrices [count, k, k] are of rows that sums in float32 do not tell apart.

    Two nearly opposite rows leave a step little room, and how long their multipliers are depends on
    what is left where the rows cancel. If that is rounding, a correction can be several times as
    long as the step. On a GPU no sum in float32 is long (`thin_product`), and the answer would have
    to be waited for: there it is none.
    """
    if grams.device.type == "cuda":
        return []
    unit = _units(grams)
    scaled = grams * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    scaled += torch.diag_embed((unit == 0).double())
    # What is not finite would be an error here, and is one where it comes from.
    smallest = torch.linalg.eigvalsh(scaled.nan_to_num(0.0, 0.0, 0.0))[:, 0]
    return (smallest < _NEARLY_SINGULAR).nonzero().flatten().tolist()


@functools.lru_cache(maxsize=MAX_INEQUALITIES)
def _supports(k: int, device: torch.device) -> Tensor:
    """All supports of k multipliers [2^k, k], float64; kept, or each step would wait for a copy."""
    combinations = list(itertools.product((0.0, 1.0), repeat=k))
    return torch.tensor(combinations, device=device, dtype=torch.float64)


def halfspace_correction(
    rows: Tensor,
    step: Tensor,
    inverse_metric: Tensor | None = None,
    *,
    bound: Tensor,
) -> Tensor:
    r"""The correction x - Δ = -M⁻¹Cᵀλ of each piece under Cx ≤ b, as a new tensor.

    Args:
        rows: C [count, k, w], any floating dtype; used in float32.
        step: Δ [count, w], float32.
        inverse_metric: the diagonal of M⁻¹ [count, w]; ``None`` is the identity.
        bound: b [count, k].

    Returns:
        [count, w], float32.
    """
    out = torch.empty_like(step)
    pieces = max(1, _CHUNK // max(1, rows.shape[1] * rows.shape[2]))
    for at in range(0, rows.shape[0], pieces):
        part = slice(at, at + pieces)
        c = rows[part].float()
        delta = step[part].unsqueeze(-1)
        weighted = c if inverse_metric is None else c * inverse_metric[part].unsqueeze(-2)
        gram = thin_product(weighted, c)
        residual = (c @ delta).squeeze(-1).double()
        for n in _nearly_dependent(gram):
            inverse = None if inverse_metric is None else inverse_metric[at + n]
            gram[n], residual[n], _ = _products(c[n], step[at + n], inverse, torch.float64)
        lam = solve_inequalities(gram, residual - bound[part])
        out[part] = -(weighted.mT @ lam.float().unsqueeze(-1)).squeeze(-1)
    return out


def budget_correction(
    rows: Tensor,
    step: Tensor,
    slack: Tensor,
    inverse_metric: Tensor | None = None,
    *,
    recovery: float,
    max_correction: float,
    behind: Tensor | None = None,
) -> Tensor:
    r"""The correction c = x - Δ of the budget rule: Cx ≤ b, and a way back where b < 0.

    Two problems share one Gram matrix. The first only keeps the step from making anything worse
    and is always feasible (x = 0 is): Cx ≤ max(b, 0). In the second a share ρ of what is
    overdrawn is recovered. The step goes from the first solution towards the second as far as the
    cap allows; both satisfy the first, so every point between them does.

    Of a loss that was measured at θ + Δ, b is what is left there, so that the whole condition is
    Cc ≤ b; the first problem asks it to be no worse than before the step, Cx ≤ max(b + CΔ, 0),
    and the second recovers a share ρ of the rest.

    Args:
        rows: C [k, w], mean reference gradients.
        step: Δ [w], float32.
        slack: b [k], budget left per reference, negative where overdrawn.
        inverse_metric: the diagonal of M⁻¹ [w]; ``None`` is the identity.
        recovery: ρ.
        max_correction: the way back is at most this many times as long as Δ, in the metric.
        behind: [k], which losses were measured at θ + Δ; ``None`` means none.

    Returns:
        x - Δ [w], float32.
    """
    gram, change, squared = _products(rows, step, inverse_metric)
    if _nearly_dependent(gram.unsqueeze(0)):
        gram, change, squared = _products(rows, step, inverse_metric, torch.float64)
    slack = slack.double()
    overdraft = slack.neg().clamp_min(0)
    # What the correction has to take away, -Cc: to hold, and to recover a share of the rest.
    held = change - slack.clamp_min(0)
    recovered = held + recovery * overdraft
    if behind is not None:
        # What Δ itself did to a loss may be undone, and no more is needed to stand as before it.
        undone = change.minimum(-slack)
        held = torch.where(behind, undone, held)
        recovered = torch.where(behind, undone + recovery * (-slack - undone), recovered)
    hold = solve_inequalities(gram, held)
    back = solve_inequalities(gram, recovered) - hold
    limit = max_correction * squared.sqrt()
    length = (back @ gram @ back).clamp_min(0).sqrt()
    lam = hold + back * (limit / length.clamp_min(1e-300)).clamp_max(1.0)
    found = lam.float().neg() @ rows
    return found if inverse_metric is None else found.mul_(inverse_metric)


def _products(
    rows: Tensor,
    step: Tensor,
    inverse_metric: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """CM⁻¹Cᵀ [k, k], CΔ [k] and ΔᵀMΔ, float64; a tile of columns at a time, never a copy of C.

    Within a tile they are summed in `dtype`.
    """
    k, width = rows.shape
    gram = rows.new_zeros(k, k, dtype=torch.float64)
    residual = rows.new_zeros(k, dtype=torch.float64)
    squared = rows.new_zeros((), dtype=torch.float64)
    wide = max(1, tile_elements(rows.device) // k)
    for at in range(0, width, wide):
        part = slice(at, at + wide)
        c, delta = rows[:, part].to(dtype), step[part].to(dtype)
        if inverse_metric is None:
            gram += thin_product(c, c)
            squared += delta @ delta
        else:
            weight = inverse_metric[part].to(dtype)
            gram += thin_product(c * weight, c)
            # Where the learning rate is zero M is infinite, and nothing moves.
            squared += delta @ torch.where(weight > 0, delta / weight, 0.0)
        residual += c @ delta
    return gram, residual, squared


def restoration_step(
    rows: Tensor, excess: Tensor, inverse_metric: Tensor | None = None, ridge: float = 1e-6
) -> Tensor:
    r"""The shortest step that takes reference losses back, to first order (docs/method.md).

    .. math:: \Delta = -M^{-1} J^\top (J M^{-1} J^\top + \varepsilon I)^{-1} v

    Args:
        rows: J [k, w], mean reference gradients.
        excess: v [k], how far each reference loss is above where it should be, ≥ 0.
        inverse_metric: the diagonal of M⁻¹ [w]; ``None`` is the identity.
        ridge: ε as a share of the mean of the Gram matrix's diagonal.

    Returns:
        [w], float32.
    """
    weighted = rows if inverse_metric is None else rows * inverse_metric
    gram = thin_product(weighted, rows)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(
        len(gram), device=gram.device, dtype=gram.dtype
    )
    lam = solve_equalities(gram, excess)
    return -(weighted.mT @ lam.float())
