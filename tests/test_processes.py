"""Several real processes (gloo, CPU) against one process on the same examples."""

import pytest
import torch
from launch import launch


def start(output, constraint, processes, loop="plain"):
    launch(output, "ddp_run.py", constraint, loop, processes=processes)
    return [torch.load(output / f"{constraint}-{processes}-{r}.pt") for r in range(processes)]


def span(basis):
    """Projector onto the rows of each piece, which is the same for every basis of one space."""
    return basis.mT @ basis


@pytest.mark.parametrize("constraint", ["orthogonal", "budget", "halfspace"])
def test_two_processes_end_alike_and_like_one(tmp_path, constraint):
    (alone,) = start(tmp_path, constraint, 1)
    first, second = start(tmp_path, constraint, 2)
    assert alone.keys() == first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(first["means"], alone["means"], rtol=1e-2, atol=1e-5)
    for name in first:
        if name.startswith("basis"):
            torch.testing.assert_close(span(first[name]), span(alone[name]), rtol=0, atol=2e-2)


def test_accelerates_loop_ends_like_a_plain_one(tmp_path):
    (tmp_path / "plain").mkdir()
    plain = start(tmp_path / "plain", "budget", 2)
    prepared = start(tmp_path, "budget", 2, "accelerate")
    for own, other in zip(prepared, plain, strict=True):
        for name in own:
            assert torch.equal(own[name], other[name]), name
