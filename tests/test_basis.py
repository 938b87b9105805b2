"""Stored bases: 8-bit blocks, host memory, tiles; and a projector that stands on them."""

import copy

import pytest
import torch
from references import token_reference, training_step

from lora_ogpsa import OGPSA, OGPSAConfig, Subspace, basis
from lora_ogpsa.adapters import Slab
from lora_ogpsa.basis import BLOCK, StoredBasis
from lora_ogpsa.errors import ConfigError


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that every loop over them has more than one turn, in both directions."""
    monkeypatch.setattr(basis, "_TILE_CPU", 3 * BLOCK)


def reference_correction(rows, step, weights):
    """-M⁻¹Uᵀ(UM⁻¹Uᵀ)⁻¹UΔ of one piece, dense and in float64."""
    u, w = rows.double(), weights.double()
    u = u[(u != 0).any(-1)]
    return -w * (u.T @ torch.linalg.solve((u * w) @ u.T, u @ step.double()))


@pytest.mark.parametrize("width", [3, 16, 50])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_a_thin_product_in_pieces_is_the_product(monkeypatch, width, leading):
    monkeypatch.setattr(basis, "_PIECE", 8)
    left, right = torch.randn(*leading, 3, width), torch.randn(*leading, 2, width)
    found = basis._product_in_pieces(left, right)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, left.double() @ right.double().mT, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basis.thin_product(left, right), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_8bit_blocks_are_within_half_a_step_of_the_rows(width):
    stored = StoredBasis(2, 3, width, dtype=torch.int8)
    rows = torch.randn(2, 3, width) * torch.logspace(-6, 3, 6).view(2, 3, 1)
    stored.write(slice(0, 2), rows)
    for left in range(0, width, BLOCK):
        part = rows[..., left : left + BLOCK]
        error = (stored.whole()[..., left : left + BLOCK] - part).abs()
        assert (error <= part.abs().amax(-1, keepdim=True) / 127 * 0.501).all()


def test_8bit_rows_take_a_quarter_of_the_memory():
    whole, packed = (StoredBasis(4, 8, 10 * BLOCK, dtype=d) for d in (torch.float32, torch.int8))
    assert packed.nbytes <= whole.nbytes * 0.254


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("count", "width"), [(5, 70), (1, 5 * BLOCK + 3), (3, 2 * BLOCK)])
def test_tiles_cover_the_rows_once(small_tiles, dtype, count, width):
    stored = StoredBasis(count, 2, width, dtype=dtype)
    stored.write(slice(0, count), torch.randn(count, 2, width))
    seen = torch.zeros(count, width)
    together = torch.zeros(count, 2, width)
    for pieces, columns in stored.tiles():
        seen[pieces, columns] += 1
        together[pieces, :, columns] = stored.read((pieces, columns))
    assert (seen == 1).all()
    assert torch.equal(together, stored.whole())


def test_fewer_rows_than_before_leave_none_of_the_old_ones():
    for dtype in (torch.float32, torch.int8):
        stored = StoredBasis(1, 3, 40, dtype=dtype)
        stored.write(slice(0, 1), torch.randn(1, 3, 40))
        stored.write(slice(0, 1), torch.randn(1, 1, 40))
        assert not stored.whole()[0, 1:].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_correction_is_the_float64_one_for_the_rows_as_stored(small_tiles, dtype, weighted):
    slabs = [Slab(0, 3, 2 * BLOCK + 5, 0, 2 * BLOCK + 5), Slab(3 * (2 * BLOCK + 5), 1, 90, 0, 90)]
    subspace = Subspace(slabs, 4, dtype=dtype)
    subspace.estimate(None, [torch.randn(s.count, 6, s.width) for s in slabs])
    size = sum(s.count * s.width for s in slabs)
    step, weights = torch.randn(size), torch.rand(size) + 0.05 if weighted else torch.ones(size)
    found = subspace.correction(step, weights if weighted else None)
    for slab, rows in zip(slabs, subspace.bases, strict=True):
        for piece in range(slab.count):
            delta, metric = slab.view(step)[piece], slab.view(weights)[piece]
            own = slab.view(found)[piece]
            expected = reference_correction(rows[piece], delta, metric)
            assert (own.double() - expected).norm() < 1e-5 * delta.norm()
            assert (rows[piece].double() @ (delta + own).double()).norm() < 1e-5 * delta.norm()


def test_saved_bases_of_another_dtype_are_refused():
    slabs = [Slab(0, 1, 40, 0, 40)]
    packed, plain = Subspace(slabs, 2, dtype=torch.int8), Subspace(slabs, 2)
    for saved, own in ((packed, plain), (plain, packed)):
        with pytest.raises(ConfigError, match="`basis_dtype` differ"):
            own.load_state_dict(saved.state_dict())


# ------------------------------------------------------------------ the projector on them


def run(model, steps, *, folder=None, **settings):
    """`steps` Adam steps under the orthogonal rule; returns projector and optimizer."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    config = OGPSAConfig(constraint="orthogonal", rank=4, references_per_refresh=6, **settings)
    ogpsa = OGPSA(model, optimizer, [token_reference("a", n=12)], config)
    go_on(model, optimizer, range(steps))
    if folder is not None:
        ogpsa.save(folder)
    return ogpsa, optimizer


def go_on(model, optimizer, seeds):
    for seed in seeds:
        training_step(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_on_an_8bit_basis_is_orthogonal_to_it(tiny_peft):
    model = tiny_peft(warm=True)
    ogpsa, optimizer = run(model, 3, basis_dtype="int8")
    before = ogpsa.space.read()
    training_step(model, 9)
    optimizer.step()
    step = ogpsa.space.read() - before
    assert step.any()
    for slab, rows in zip(ogpsa.estimator.slabs, ogpsa.estimator.subspace.bases, strict=True):
        inside = torch.einsum("ckw,cw->ck", rows.double(), slab.view(step).double())
        assert inside.norm() < 1e-5 * step.norm()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_offloading_changes_no_bit(tiny_peft, dtype):
    found = [
        run(tiny_peft(warm=True), 4, basis_dtype=dtype, offload=offload)[0].space.read()
        for offload in (False, True)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_run_on_8bit_bases_equals_the_uninterrupted_one(tiny_peft, tmp_path, offload):
    settings = {"basis_dtype": "int8", "offload": offload, "refresh_every": 3}
    model = tiny_peft(warm=True)
    ogpsa, optimizer = run(model, 4, folder=tmp_path, **settings)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    twin = tiny_peft(warm=True, seed=1)
    twins, twins_optimizer = run(twin, 0, **settings)
    twin.load_state_dict(weights)
    twins_optimizer.load_state_dict(moments)
    twins.load(tmp_path)
    go_on(model, optimizer, range(4, 8))
    go_on(twin, twins_optimizer, range(4, 8))
    assert torch.equal(ogpsa.space.read(), twins.space.read())
