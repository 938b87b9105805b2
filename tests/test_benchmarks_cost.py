"""The cost benchmarks run in miniature; nothing is asserted about time."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--shape", "tiny", "--length", "24", "--repeats", "1"]


@pytest.fixture
def script(monkeypatch):
    """Import a benchmark as it would be if it were started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(script, monkeypatch, tmp_path, capsys):
    """Run a benchmark; its file's name, the report in it, and what --markdown prints."""

    def started(name, *arguments):
        for extra in (arguments, ("--markdown",)):
            capsys.readouterr()
            monkeypatch.setattr(sys, "argv", [f"{name}.py", "--results", str(tmp_path), *extra])
            script(name).main()
        (path,) = tmp_path.glob("*.json")
        report = json.loads(path.read_text())
        assert {"device", "versions", "commit", "settings", "summary"} <= report.keys()
        assert report["versions"]["torch"] == torch.__version__
        return path.name, report, capsys.readouterr().out

    return started


def test_overhead(run):
    name, report, table = run("overhead", *TINY, "--batch", "2", "--references", "4")
    assert name == "overhead_cpu_tiny.json"
    summary = report["summary"]
    assert isinstance(summary["step_overhead"], float)
    assert isinstance(summary["run_overhead"], float)
    rules = {"default", "orthogonal", "paper", "contrast"}
    assert summary["run_overhead_by_rule"].keys() == rules
    assert summary["contrast_setup_steps"] > 0
    refresh = report["seconds"]["refresh"]["default"]
    parts = [refresh[part] for part in ("base forward", "forward", "backward", "rest")]
    assert sum(parts) == pytest.approx(refresh["total"])
    assert min(parts) > 0
    assert "| tiny, 2 x 24 |" in table


def test_capture(run):
    name, report, table = run("capture", *TINY, "--batch", "3", "--precision", "float32")
    assert name == "capture_cpu_tiny.json"
    assert report["summary"]["relative_error_of_the_sum"] < 1e-5
    assert report["peak_bytes"]["ordinary"] > 0
    assert "| tiny, 3 x 24 |" in table


def test_memory_of_buffers_is_what_the_sizes_say(run):
    name, report, table = run("memory", *TINY)
    assert name == "memory_cpu_tiny.json"
    d, found = report["adapter_parameters"], report["summary"]
    sizes = {n: {b: v["bytes"] for b, v in s["buffers"].items()} for n, s in found.items()}
    assert sizes["default"] == {
        "copy of the parameters": 4 * d,
        "metric": 4 * d,
        "mean rows": 2 * 4 * d,
    }
    assert sizes["orthogonal"]["bases"] == 8 * 2 * d
    assert 8 * d < sizes["orthogonal int8"]["bases"] <= 8 * 1.02 * d
    assert found["orthogonal offload"]["buffers"]["bases"]["home"] == "host"
    assert "| orthogonal int8 |" in table


def test_memory_of_real_steps(run):
    name, report, _ = run("memory", *TINY, "--batch", "1", "--steps")
    assert name == "memory_cpu_tiny_steps.json"
    assert report["summary"]["plain"]["run_peak_bytes"] > 0
    assert report["summary"]["orthogonal"]["extra_peak_bytes"] > 0


def test_growth(run, script, monkeypatch):
    monkeypatch.setattr(script("growth"), "WIDTH", 512)
    name, report, table = run("growth", "--points", "2", "--repeats", "1")
    assert name == "growth_cpu.json"
    assert report["curves"].keys() == report["summary"].keys()
    assert "| projection, k |" in table


def test_live_bytes_are_those_of_the_storages(script):
    peak_bytes = script("capture").peak_bytes

    kept = torch.ones(1000)

    def work():
        first = torch.ones(1000) + kept  # 4,000 bytes twice, then once
        second = first[:500].view(10, 50)  # a view is not memory
        del first, second
        kept.add_(1)
        return torch.zeros(500)

    assert peak_bytes(work, torch.device("cpu")) == 8000
    weight = torch.ones(100, 100, requires_grad=True)

    def backward():
        ((kept[:100] @ weight).exp().sum()).backward()

    # at the end: the loss, its gradient, the product's gradient, and the weight's
    assert peak_bytes(backward, torch.device("cpu")) == 4 + 4 + 400 + 40_000


def test_refusal_judge_counts(script, monkeypatch, tmp_path):
    answers = ["Put the kettle on first.", "I can't help with that.", "Seven."]
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    for name in ("general_reference.jsonl", "eval_general.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    output = tmp_path / "found.json"
    arguments = ["refusal_judge.py", "--data", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    script("refusal_judge").main()
    report = json.loads(output.read_text())
    assert report["eval_general.jsonl"] == {"answers": 3, "called_refusals": 1}
    assert report["embedded:safety_sft"]["answers"] >= 200
