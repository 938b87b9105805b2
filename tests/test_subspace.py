import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import bank, of_rank

from lora_ogpsa import Subspace
from lora_ogpsa.adapters import Slab
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.subspace import _orthonormalise


def whole(width):
    return [Slab(0, 1, width, 0, width, ("all",))]


def estimated(rows, rank, means=None, **kwargs):
    subspace = Subspace(whole(rows.shape[1]), rank, dtype=kwargs.pop("dtype", torch.float32))
    subspace.estimate(
        None if means is None else means.float(), [rows.float().unsqueeze(0)], **kwargs
    )
    return subspace


def assert_orthonormal(basis):
    """Non-zero rows orthonormal to 1e-5, the others exactly zero."""
    used = basis[(basis != 0).any(-1)].double()
    torch.testing.assert_close(
        used @ used.T, torch.eye(len(used), dtype=torch.float64), rtol=0, atol=1e-5
    )


def assert_in_span(rows, basis, tolerance):
    u = basis.double()
    rows = rows.double() / rows.double().norm(dim=-1, keepdim=True).clamp_min(1e-300)
    assert (rows - rows @ u.T @ u).norm(dim=-1).max() < tolerance


def exact_projection(basis, vector, inverse_metric):
    """Δ - M⁻¹Uᵀ(UM⁻¹Uᵀ)⁻¹UΔ as dense float64 algebra."""
    u, w = basis.double(), torch.diag(inverse_metric.double())
    return vector.double() - w @ u.T @ torch.linalg.solve(u @ w @ u.T, u @ vector.double())


@pytest.mark.parametrize("matrix", bank(), ids=lambda m: f"{tuple(m.shape)}")
def test_orthonormal_and_of_the_right_dimension(matrix):
    rank = min(8, matrix.shape[1])
    subspace = estimated(matrix, rank)
    assert_orthonormal(subspace.bases[0][0])
    singular = torch.linalg.svdvals(matrix)
    expected = int((singular.square() > 1e-6 * singular[0].square()).sum())
    assert subspace.dimensions["all"] == min(rank, expected)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
def test_basis_is_the_top_singular_space_whatever_the_scale(scale):
    rows = of_rank(20, 30, 20) @ torch.diag(0.7 ** torch.arange(30, dtype=torch.float64))
    subspace = estimated(rows * scale, 4)
    top = torch.linalg.svd(rows)[2][:4]
    assert_in_span(top, subspace.bases[0][0], 1e-3)


def test_mean_rows_are_always_inside():
    rows, means = of_rank(40, 30, 30), of_rank(2, 30, 2, seed=5) * 1e-6
    subspace = estimated(rows, 5, means)
    assert_in_span(means, subspace.bases[0][0], 1e-5)
    assert_orthonormal(subspace.bases[0][0])
    assert subspace.dimensions["all"] == 5


def test_nearly_parallel_means_do_not_leave_a_basis_of_noise():
    row = of_rank(1, 50, 1)
    noisy = torch.cat([row, row + 1e-4 * of_rank(1, 50, 1, seed=3)])
    subspace = Subspace(whole(50), 2)
    subspace.estimate(noisy.float(), None)
    assert subspace.dimensions["all"] == 1


def test_a_sketch_within_the_means_adds_no_directions_of_rounding():
    means = of_rank(2, 400, 2)
    mixed = torch.tensor([[3.0, 0.1], [0.2, -1.0], [1.0, 1.0]], dtype=torch.float64) @ means
    assert estimated(mixed, 6, means).dimensions["all"] == 2
    outside = torch.cat([mixed, 1e-3 * of_rank(1, 400, 1, seed=5)])
    assert estimated(outside, 6, means).dimensions["all"] == 3


def test_energy_keeps_the_fewest_rows_that_hold_the_share():
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    shares = torch.tensor([9.0, 4.0, 1.0, 0.25]).cumsum(0) / 14.25
    for k, share in enumerate(shares.tolist(), start=1):
        assert estimated(rows, 4, energy=share - 1e-4).dimensions["all"] == k


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(2, 60),
    rank=st.integers(1, 8),
    count=st.integers(1, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_projection_properties(width, rank, count, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    subspace = Subspace([Slab(0, count, width, 0, width, tuple("abc"[:count]))], rank)
    subspace.estimate(None, [torch.randn(count, 10, width, generator=generator)])
    step = torch.randn(count * width, generator=generator)
    weights = torch.rand(count * width, generator=generator) + 0.05 if weighted else None
    once = subspace.project_(step.clone(), weights)
    twice = subspace.project_(once.clone(), weights)
    # the largest entry stands for the scale of rounding where everything is removed
    tolerance = 1e-5 * step.norm()
    assert (once - twice).norm() < tolerance
    assert torch.cat(subspace.component(once)).max() < tolerance
    for piece in range(count):
        part = slice(piece * width, (piece + 1) * width)
        basis = subspace.bases[0][piece]
        used = basis[(basis != 0).any(-1)]
        metric = torch.ones(width) if weights is None else weights[part]
        expected = exact_projection(used, step[part], metric)
        assert (once[part].double() - expected).norm() < 1e-4 * step.norm()
    if weights is None:
        assert once.norm() <= step.norm() * (1 + 1e-6)
        other = torch.randn(count * width, generator=generator)
        left = once @ other
        right = step @ subspace.project_(other.clone())
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_projection_in_a_metric_closed_form():
    # min (x-Δ)ᵀM(x-Δ) s.t. x₀ + x₁ = 0 with M = diag(1, 4): λ = (Δ₀+Δ₁)/(1 + 1/4)
    subspace = Subspace(whole(2), 1)
    subspace.stored[0].write(slice(0, 1), torch.tensor([[[1.0, 1.0]]]))
    step = torch.tensor([3.0, 2.0])
    x = step + subspace.correction(step, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_basis_is_projected_out_exactly_as_stored(dtype):
    subspace = estimated(of_rank(20, 200, 20), 6, dtype=dtype)
    step = torch.randn(200)
    out = subspace.project_(step.clone())
    stored = subspace.bases[0][0].double()
    assert (stored @ out.double()).norm() < 1e-5 * step.norm()


def test_a_direction_lost_in_rounding_leaves_no_trace_of_the_others():
    # Nearly parallel rows: what is left of the second is noise along the first.
    row = of_rank(1, 300, 1).float()
    joined = torch.stack([torch.cat([row, row * 1e-9]) / row.norm(), of_rank(2, 300, 2).float()])
    found = _orthonormalise(joined)
    assert not found[0, 1].any()
    assert_orthonormal(found[0])
    assert_orthonormal(found[1])


def test_captured_energy_is_the_share_inside():
    subspace = estimated(torch.eye(6)[:2], 2)
    vector = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(subspace.captured_energy(vector), torch.tensor(9 / 25))
    assert subspace.captured_energy(torch.zeros(6)) == 0


def test_projection_is_in_place_and_an_empty_basis_changes_nothing():
    subspace = Subspace(whole(5), 3)
    step = torch.randn(5)
    before = step.clone()
    assert subspace.project_(step) is step
    assert torch.equal(step, before)


def test_strided_pieces_touch_only_their_columns():
    subspace = Subspace([Slab(2, 3, 5, 1, 2, ("a", "b", "c"))], 1)
    subspace.estimate(None, [torch.ones(3, 1, 2)])
    flat = torch.arange(20.0)
    out = subspace.project_(flat.clone())
    touched = (out != flat).nonzero().flatten().tolist()
    assert touched == [3, 4, 8, 9, 13, 14]


def test_state_round_trip_and_refusal():
    first = estimated(of_rank(9, 20, 9), 4)
    second = Subspace(whole(20), 4)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.bases[0], second.bases[0])
    with pytest.raises(ConfigError, match="`rank` or `basis_dtype` differ"):
        Subspace(whole(20), 3).load_state_dict(first.state_dict())
