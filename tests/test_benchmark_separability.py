"""The separability benchmark: its direction against linear algebra, and the whole in miniature."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def separability():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("separability")


@given(seed=st.integers(0, 1000), ridge=st.floats(1e-3, 10))
def test_the_direction_is_the_first_generalised_eigenvector(separability, seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    safety = torch.randn(12, 7, generator=generator) + 1
    references = torch.randn(9, 7, generator=generator)
    found = separability.direction(safety, references, ridge)
    assert (safety.double() @ found).mean().item() == pytest.approx(1)
    above = safety.double().T @ safety.double() / 12
    below = references.double().T @ references.double() / 9
    below += ridge * below.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    values, vectors = torch.linalg.eig(torch.linalg.solve(below, above))
    first = vectors[:, values.real.argmax()].real
    cosine = torch.nn.functional.cosine_similarity(found, first, dim=0).abs()
    assert cosine.item() == pytest.approx(1, abs=1e-6)


def test_separation_by_hand(separability):
    found = separability.separation(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0]))
    # Of the six pairs four are in order and one is even; the lowest harmful prompt has to be found.
    assert found == {"auc": pytest.approx(4.5 / 6), "harmless_above": 0.5}


def test_layers_are_measured(separability, tiny_folder, tmp_path, capsys):
    arguments = ["--model", str(tiny_folder), "--prompts", "6", "--draws", "2"]
    separability.main([*arguments, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("separability_*.json")
    report = json.loads(path.read_text())
    assert report["settings"]["evaluated"] == {"embedded": 92, "harmless": 88}
    assert [row["layer"] for row in report["layers"]] == [1, 2]
    for row in report["layers"]:
        assert len(row["draws"]) == 2
        assert 0 <= row["auc"] <= 1
        # With one source of harmful prompts, its figure is that of all.
        assert row["auc_embedded"] == pytest.approx(row["auc"])
    assert "| after layer | auc |" in capsys.readouterr().out


def test_too_few_prompts_are_refused(separability, tiny_folder, tmp_path, capsys):
    arguments = ["--model", str(tiny_folder), "--prompts", "100", "--draws", "9"]
    with pytest.raises(SystemExit):
        separability.main([*arguments, "--results", str(tmp_path)])
    assert "need 900 safety prompts" in capsys.readouterr().err
