r"""The update rules against float64 problems whose constrained optimum is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ogpsa.errors import ConfigError
from lora_ogpsa.rules import (
    budget_correction,
    halfspace_correction,
    restoration_step,
    solve_inequalities,
)


def orthonormal_rows(k, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:k]


def assert_optimal(rows, step, x, bound, weights):
    """x minimises (x-Δ)ᵀM(x-Δ) s.t. Cx ≤ b: feasible, and Δ - x = M⁻¹Cᵀλ with λ ≥ 0 only on
    constraints that hold with equality (the KKT conditions, sufficient here).
    """
    rows, step, x, bound = (t.double() for t in (rows, step, x, bound))
    scale = step.norm() * rows.norm(dim=-1)
    assert (rows @ x - bound <= 1e-5 * scale).all()
    pull = (step - x) / weights.double()  # should be Cᵀλ
    active = (rows @ x - bound).abs() <= 1e-4 * scale
    if not active.any():
        assert pull.norm() < 1e-4 * step.norm() / weights.min()
        return
    lam = torch.linalg.lstsq(rows[active].T, pull.unsqueeze(-1)).solution.squeeze(-1)
    assert (rows[active].T @ lam - pull).norm() <= 1e-3 * (pull.norm() + step.norm())
    # parallel rows share their weight in many ways; then the shortest may have a small sign error
    if torch.linalg.matrix_rank(rows[active], rtol=1e-3) == int(active.sum()):
        assert (lam * rows[active].norm(dim=-1) >= -1e-3 * pull.norm()).all()


# ------------------------------------------------------------------ half-space


def test_halfspace_closed_form_on_orthonormal_rows():
    rows = orthonormal_rows(4, 12)
    step = torch.randn(12, dtype=torch.float64)
    bound = torch.tensor([0.0, 0.3, 0.0, -0.2], dtype=torch.float64)
    # orthogonal constraints do not interact: each removes its own excess
    expected = step - rows.T @ (rows @ step - bound).clamp_min(0)
    fix = halfspace_correction(
        rows.float()[None], step.float()[None], bound=bound.float()[None]
    ).squeeze(0)
    torch.testing.assert_close((step.float() + fix).double(), expected, rtol=1e-5, atol=1e-6)


def test_halfspace_keeps_what_lowers_a_reference_loss():
    rows = torch.tensor([[1.0, 0.0, 0.0]])
    helpful, harmful = torch.tensor([-2.0, 1.0, 0.5]), torch.tensor([2.0, 1.0, 0.5])
    zero = torch.zeros(1, 1)
    assert not halfspace_correction(rows[None], helpful[None], bound=zero).any()
    fix = halfspace_correction(rows[None], harmful[None], bound=zero)
    torch.testing.assert_close(fix, torch.tensor([[-2.0, 0.0, 0.0]]))


@settings(max_examples=80, deadline=None)
@given(
    k=st.integers(1, 6),
    width=st.integers(6, 40),
    weighted=st.booleans(),
    seed=st.integers(0, 100_000),
)
def test_halfspace_meets_the_optimality_conditions(k, width, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, width, generator=generator) * 10.0 ** torch.randint(
        -4, 4, (k, 1), generator=generator
    )
    step = torch.randn(width, generator=generator)
    weights = torch.rand(width, generator=generator) * 5 + 0.1 if weighted else torch.ones(width)
    bound = torch.zeros(k)
    fix = halfspace_correction(rows[None], step[None], weights[None], bound=bound[None]).squeeze(0)
    assert_optimal(rows, step, step + fix, bound, weights)


def test_parallel_and_zero_rows_are_harmless():
    row = torch.randn(10)
    rows = torch.stack([row, 2 * row, torch.zeros(10)])
    step = row + torch.randn(10)
    fix = halfspace_correction(rows[None], step[None], bound=torch.zeros(1, 3)).squeeze(0)
    alone = halfspace_correction(row[None, None], step[None], bound=torch.zeros(1, 1)).squeeze(0)
    torch.testing.assert_close(fix, alone, rtol=1e-4, atol=1e-5)


def test_opposite_rows_pin_the_step_to_both():
    row = torch.randn(10)
    rows = torch.stack([row, -row])
    step = torch.randn(10)
    x = step + halfspace_correction(rows[None], step[None], bound=torch.zeros(1, 2)).squeeze(0)
    assert abs(row @ x) < 1e-5 * row.norm() * step.norm()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_nearly_opposite_rows_leave_the_exact_step(gap, weighted):
    """What is left of a row beside the other is far below the rounding of long float32 sums."""
    width, generator = 200_000, torch.Generator().manual_seed(0)
    # all positive, so that rounding adds up
    row = torch.rand(width, generator=generator, dtype=torch.float64) + 0.2
    row /= row.norm()
    aside = torch.randn(width, generator=generator, dtype=torch.float64)
    aside -= (aside @ row) * row
    aside /= aside.norm()
    cosine = gap - 1
    rows = torch.stack([row, cosine * row + (1 - cosine**2) ** 0.5 * aside]).float()
    step = 1e-3 * torch.randn(width, generator=generator) + (0.1 * (row + aside)).float()
    weights = torch.rand(width, generator=generator) + 0.2 if weighted else torch.ones(width)
    wide = rows.double() * weights.double()
    lam = solve_inequalities(wide @ rows.double().T, rows.double() @ step.double())
    expected = -(lam @ wide)
    halfspace = halfspace_correction(
        torch.stack([rows, rows]),
        torch.stack([step, step]),
        torch.stack([weights, weights]) if weighted else None,
        bound=torch.zeros(2, 2),
    )
    budget = budget_correction(
        rows, step, torch.zeros(2), weights if weighted else None, recovery=1.0, max_correction=1.0
    )
    for found in (*halfspace, budget):
        assert (found.double() - expected).norm() < 2e-4 * step.double().norm()


def test_pieces_are_independent():
    rows, step, bound = torch.randn(5, 3, 20), torch.randn(5, 20), torch.zeros(5, 3)
    together = halfspace_correction(rows, step, bound=bound)
    for i in range(5):
        alone = halfspace_correction(rows[i : i + 1], step[i : i + 1], bound=bound[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-6)


def test_too_many_rows_are_refused():
    with pytest.raises(ConfigError, match="at most 8"):
        solve_inequalities(torch.eye(9), torch.ones(9))


# ------------------------------------------------------------------ budget


def test_budget_leaves_a_step_within_budget_alone():
    rows = torch.tensor([[1.0, 0.0]])
    fix = budget_correction(
        rows, torch.tensor([0.5, 1.0]), torch.tensor([0.6]), recovery=0.3, max_correction=3.0
    )
    assert not fix.any()


def test_budget_spends_what_is_left_and_no_more():
    rows = torch.tensor([[2.0, 0.0]])
    step = torch.tensor([1.0, 1.0])
    fix = budget_correction(rows, step, torch.tensor([0.5]), recovery=0.3, max_correction=3.0)
    torch.testing.assert_close(step + fix, torch.tensor([0.25, 1.0]))


def test_overdrawn_budget_recovers_its_share():
    rows = torch.tensor([[1.0, 0.0]])
    step = torch.tensor([0.1, 1.0])
    fix = budget_correction(rows, step, torch.tensor([-1.0]), recovery=0.3, max_correction=3.0)
    torch.testing.assert_close(step + fix, torch.tensor([-0.3, 1.0]))


def test_recovery_is_capped_but_the_half_space_is_not():
    rows = torch.tensor([[1.0, 0.0]])
    step = torch.tensor([3.0, 4.0])
    fix = budget_correction(rows, step, torch.tensor([-100.0]), recovery=1.0, max_correction=2.0)
    # holding: x₀ = 0; the way back is 2·‖Δ‖ = 10 long
    torch.testing.assert_close(step + fix, torch.tensor([-10.0, 4.0]))


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 5), seed=st.integers(0, 100_000), cap=st.floats(0.01, 10.0))
def test_budget_never_makes_an_overdrawn_reference_worse(k, seed, cap):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, 30, generator=generator)
    step = torch.randn(30, generator=generator)
    slack = torch.randn(k, generator=generator)
    weights = torch.rand(30, generator=generator) + 0.1
    x = step + budget_correction(rows, step, slack, weights, recovery=0.5, max_correction=cap)
    assert (rows @ x <= slack.clamp_min(0) + 1e-4 * step.norm() * rows.norm(dim=-1)).all()


def after_the_step(rows, step, slack, recovery=0.5, **kwargs):
    behind = torch.ones(len(slack), dtype=torch.bool)
    settings = {"recovery": recovery, "max_correction": 3.0, "behind": behind, **kwargs}
    return budget_correction(rows, step, slack, **settings)


def test_a_loss_within_budget_after_the_step_needs_no_correction():
    rows, step = torch.tensor([[1.0, 0.0]]), torch.tensor([3.0, 4.0])
    assert not after_the_step(rows, step, torch.tensor([0.1])).any()


def test_an_overdraft_that_the_step_made_is_undone_and_of_the_rest_a_share_recovered():
    rows, step = torch.tensor([[1.0, 0.0]]), torch.tensor([0.4, 1.0])
    # all of it is the step's own
    made = after_the_step(rows, step, torch.tensor([-0.3]))
    torch.testing.assert_close(made, torch.tensor([-0.3, 0.0]))
    # 0.4 of it is
    more = after_the_step(rows, step, torch.tensor([-1.0]))
    torch.testing.assert_close(more, torch.tensor([-0.4 - 0.5 * 0.6, 0.0]))


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 5), seed=st.integers(0, 100_000), cap=st.floats(0.01, 10.0))
def test_losses_measured_after_the_step_are_no_worse_than_before_it(k, seed, cap):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, 30, generator=generator)
    step = torch.randn(30, generator=generator)
    slack = torch.randn(k, generator=generator)
    weights = torch.rand(30, generator=generator) + 0.1
    behind = torch.rand(k, generator=generator) < 0.7
    fix = after_the_step(
        rows, step, slack, inverse_metric=weights, max_correction=cap, behind=behind
    )
    allowed = torch.where(behind, slack + rows @ step, slack).clamp_min(0)
    assert (rows @ (step + fix) <= allowed + 1e-4 * step.norm() * rows.norm(dim=-1)).all()


def test_what_has_no_learning_rate_has_no_part_in_the_correction():
    generator = torch.Generator().manual_seed(5)
    rows, step = torch.randn(2, 12, generator=generator), torch.randn(12, generator=generator)
    weights = torch.rand(12, generator=generator) + 0.5
    moved = torch.arange(12) < 7
    step[~moved] = 0.0
    slack = torch.tensor([0.01, -0.4])
    found = budget_correction(rows, step, slack, weights * moved, recovery=0.5, max_correction=0.2)
    expected = budget_correction(
        rows[:, moved], step[moved], slack, weights[moved], recovery=0.5, max_correction=0.2
    )
    torch.testing.assert_close(found[moved], expected)
    assert not found[~moved].any()


def test_budget_equals_halfspace_where_nothing_is_left_or_overdrawn():
    rows, step, weights = torch.randn(3, 25), torch.randn(25), torch.rand(25) + 0.1
    fix = budget_correction(rows, step, torch.zeros(3), weights, recovery=0.3, max_correction=3.0)
    half = halfspace_correction(
        rows[None], step[None], weights[None], bound=torch.zeros(1, 3)
    ).squeeze(0)
    torch.testing.assert_close(fix, half, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ restoration


def test_restoration_reaches_the_minimum_norm_solution():
    rows = torch.randn(3, 40, dtype=torch.float64)
    excess = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    # the shortest Δ with JΔ = -v is -J⁺v
    expected = -torch.linalg.pinv(rows) @ excess
    step = restoration_step(rows.float(), excess.float(), ridge=0.0)
    torch.testing.assert_close(step.double(), expected, rtol=1e-4, atol=1e-6)


def test_restoration_of_quadratic_losses_lands_on_the_base_losses():
    # R_j(θ) = g_j·θ is linear: one full step must undo the whole excess
    rows = torch.randn(2, 30)
    theta = torch.randn(30) * 0.1
    excess = (rows @ theta).clamp_min(0)
    weights = torch.rand(30) + 0.1
    restored = theta + restoration_step(rows, excess, weights, ridge=0.0)
    torch.testing.assert_close(rows @ restored, rows @ theta - excess, rtol=1e-4, atol=1e-5)


def test_restoration_with_nothing_to_restore_is_zero():
    assert not restoration_step(torch.randn(2, 9), torch.zeros(2)).any()
    assert not restoration_step(torch.zeros(2, 9), torch.ones(2)).any()


def test_the_way_back_is_capped_by_the_steps_length_in_the_metric():
    generator = torch.Generator().manual_seed(0)
    rows, step = torch.randn(1, 30, generator=generator), torch.randn(30, generator=generator)
    inverse = torch.logspace(-2, 2, 30)
    rows -= (rows @ step) / (step @ step) * step  # the step itself changes nothing
    settings = {"recovery": 1.0, "max_correction": 0.5}
    found = budget_correction(rows, step, torch.tensor([-1e6]), inverse, **settings)
    length = (found.square() / inverse).sum().sqrt()
    assert length == pytest.approx(0.5 * float((step.square() / inverse).sum().sqrt()), rel=1e-4)
