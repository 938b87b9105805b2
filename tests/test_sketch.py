import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import bank

from lora_ogpsa import FrequentDirections
from lora_ogpsa.errors import ConfigError
from lora_ogpsa.sketch import gram_eigh


def assert_bound(rows, sketch, size):
    """0 ⪯ GᵀG - SᵀS and its norm ≤ ‖G - G_k‖²_F / (ℓ - k) for every k < ℓ, in float64."""
    g, s = rows.double(), sketch.double()
    gap = g.T @ g - s.T @ s
    total = g.square().sum()
    rounding = 1e-5 * total + 1e-300
    eigenvalues = torch.linalg.eigvalsh(gap)
    assert eigenvalues.min() >= -rounding
    tail = torch.linalg.svdvals(g).square()
    for k in range(size):
        assert eigenvalues.max() <= tail[k:].sum() / (size - k) + rounding


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    width=st.integers(1, 30),
    size=st.integers(1, 12),
    chunk=st.integers(1, 17),
    spread=st.floats(0.3, 1.0),
    seed=st.integers(0, 10_000),
)
def test_published_bound(n, width, size, chunk, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=generator) * spread ** torch.arange(width)
    sketch = FrequentDirections(size, width)
    for part in rows.split(chunk):
        sketch.append(part)
    sketch.shrink()
    assert sketch.filled <= max(size, min(n, size))
    assert_bound(rows, sketch.rows[0], size)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 25), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_merged_sketches_keep_the_bound(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 18, generator=generator) for n in sizes]
    merged = FrequentDirections(7, 18)
    for part in parts:
        other = FrequentDirections(7, 18)
        other.append(part)
        other.shrink()
        merged.merge(other)
    merged.shrink()
    assert_bound(torch.cat(parts), merged.rows[0], 7)


@pytest.mark.parametrize("matrix", bank(), ids=lambda m: f"{tuple(m.shape)}")
def test_bound_at_every_scale_and_rank(matrix):
    sketch = FrequentDirections(5, matrix.shape[1])
    sketch.append(matrix.float())
    sketch.shrink()
    assert torch.isfinite(sketch.rows).all()
    assert_bound(matrix.float(), sketch.rows[0], 5)


def test_streams_side_by_side_do_not_mix():
    rows = torch.randn(3, 40, 12)
    together = FrequentDirections(4, 12, count=3)
    together.append(rows)
    for i in range(3):
        alone = FrequentDirections(4, 12)
        alone.append(rows[i])
        moments = [s.mT @ s for s in (together.rows[i], alone.rows[0])]
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-4)


def test_few_rows_are_kept_exactly():
    rows = torch.randn(6, 9)
    sketch = FrequentDirections(8, 9)
    sketch.append(rows)
    sketch.shrink()
    assert torch.equal(sketch.rows[0], rows)


def test_shrinking_takes_the_smallest_kept_energy_off_all():
    """Liberty (2013): without that the bound's denominator would not grow."""
    sketch = FrequentDirections(3, 8)
    sketch.append(torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))[:, :5] @ torch.eye(8)[:5])
    sketch.shrink()
    energies = sketch.rows[0].square().sum(1).sort(descending=True).values
    torch.testing.assert_close(energies, torch.tensor([25.0 - 9, 16.0 - 9, 0.0]))


def test_decay_weighs_the_second_moment():
    rows = torch.randn(3, 5)
    sketch = FrequentDirections(4, 5)
    sketch.append(rows)
    sketch.decay(0.25)
    torch.testing.assert_close(sketch.rows[0].T @ sketch.rows[0], 0.25 * rows.T @ rows)


def test_reserved_rows_are_zero_and_can_be_taken_back():
    sketch = FrequentDirections(2, 3)
    sketch.append(torch.ones(2, 3))
    view = sketch.reserve(1)
    assert not view.any()
    view.fill_(5.0)
    assert sketch.filled == 3
    sketch.discard(1)
    assert torch.equal(sketch.rows[0], torch.ones(2, 3))


def test_state_round_trip():
    sketch = FrequentDirections(3, 4, count=2)
    sketch.append(torch.randn(2, 11, 4))
    copy = FrequentDirections(3, 4, count=2)
    copy.load_state_dict(sketch.state_dict())
    assert torch.equal(copy.rows, sketch.rows)
    with pytest.raises(ConfigError, match="does not fit"):
        FrequentDirections(3, 5, count=2).load_state_dict(sketch.state_dict())


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="`capacity` above `size`"):
        FrequentDirections(4, 3, capacity=4)
    sketch = FrequentDirections(4, 3)
    sketch.append(torch.randn(4, 3))
    with pytest.raises(ConfigError, match="do not fit"):
        sketch.reserve(5)


def test_a_whole_buffer_may_be_filled_at_once_and_is_freed():
    sketch = FrequentDirections(4, 3, 2, capacity=7)
    assert sketch.rows.shape == (2, 0, 3)
    rows = torch.randn(2, 7, 3)
    sketch.reserve(7).copy_(rows)
    assert torch.equal(sketch.rows, rows)
    sketch.clear()
    assert sketch._buffer is None
    assert sketch.rows.shape == (2, 0, 3)


@pytest.mark.parametrize("matrix", bank(), ids=lambda m: f"{tuple(m.shape)}")
def test_gram_eigenvalues_are_squared_singular_values(matrix):
    values, _, scale = gram_eigh(matrix.float())
    expected = torch.linalg.svdvals(matrix.float().double() / scale.squeeze().double()).square()
    shared = min(len(expected), len(values))
    torch.testing.assert_close(values[:shared], expected[:shared], rtol=1e-5, atol=1e-6)
