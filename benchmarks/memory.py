"""What OGPSA adds to peak memory, and what whole runs peak at.

    python benchmarks/memory.py                                    # buffers for an 8B, on the CPU
    python benchmarks/memory.py --device cuda --shape 8b --batch 1 # peaks of real steps
    python benchmarks/memory.py --markdown

Without a GPU, the adapter of the shape is real (42 M LoRA parameters for 8B) and its base has no
weights: every buffer is measured as it is allocated, a projected optimizer step and the estimate
of a basis run at full size, and the bytes alive at once are counted. With a GPU, a random NF4
model trains and the allocator's own peaks are compared with those of plain steps.

Results go to benchmarks/results/memory_<device>_<shape>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from capture import peak_bytes
from overhead import NEVER, Loop
from torch import nn

from lora_ogpsa import OGPSA, OGPSAConfig, Reference
from lora_ogpsa.reference import Objective

ORTHOGONAL: dict[str, Any] = {"constraint": "orthogonal", "rank": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "orthogonal": ORTHOGONAL,
    "orthogonal int8": {**ORTHOGONAL, "basis_dtype": "int8"},
    "orthogonal offload": {**ORTHOGONAL, "basis_dtype": "int8", "offload": True},
}


def hollow_model(shape: dict[str, int]) -> Any:
    """A Llama without weights under a LoRA with weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(common.llama_config(shape))
        settings = LoraConfig(r=common.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            owner, _, attribute = name.rpartition(".")
            value = torch.randn(parameter.shape) * 0.02
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value))
    return model.train()


def references(model: Any, vocabulary: int, count: int, answer: int) -> list[Objective]:
    """Two references of random tokens."""
    rows = common.token_rows(vocabulary, count, 32, answer)
    settings: dict[str, Any] = {"loss": "kl"}
    return [Reference(name, rows, **settings).prepare(model) for name in ("general", "lookalike")]


def buffers(ogpsa: OGPSA) -> dict[str, dict[str, Any]]:
    """Bytes of everything a projector holds, by role: where it lies beside a GPU, and when."""
    config, estimator = ogpsa.config, ogpsa.estimator
    found: dict[str, dict[str, Any]] = {}

    def note(role: str, size: int, host: bool, when: str = "always") -> None:
        found[role] = {"bytes": size, "home": "host" if host else "device", "when": when}

    flat = 4 * ogpsa.space.size
    note("copy of the parameters", flat, False, "step" if ogpsa._flat is None else "always")
    if ogpsa.metric is not None:
        note("metric", flat, False, "step")
    note("mean rows", estimator.means.nbytes, config.mean_rows_idle)
    if estimator.subspace is not None:
        size = sum(basis.nbytes for basis in estimator.subspace.stored)
        note("bases", size, config.offload)
    if estimator.sketches is not None:
        size = sum(4 * torch.Size(sketch.shape).numel() for sketch in estimator.sketches)
        note(
            "sketches", size, config.offload, "refresh" if config.sketches_start_over else "always"
        )
    return found


def measure_buffers(options: argparse.Namespace) -> dict[str, Any]:
    """Buffers, and the peaks of a projected step and of an estimate, at the shape's full size."""
    device = torch.device("cpu")
    shape = common.SHAPES[options.shape]
    model = hollow_model(shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    objectives = references(model, shape["vocab"], 4, 16)
    plain = peak_bytes(optimizer.step, device)
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        idle = {"refresh_every": NEVER}
        if "constraint" in settings:
            idle["early_refreshes"] = ()
        ogpsa = OGPSA(model, optimizer, objectives, OGPSAConfig(**settings, **idle))
        ogpsa.steps = 1
        ogpsa.estimator.means.normal_(std=1e-3)
        ogpsa.estimator.mass = [1.0] * len(objectives)
        held = buffers(ogpsa)
        estimate = None
        if ogpsa.estimator.sketches is not None:
            for sketch in ogpsa.estimator.sketches:
                sketch.reserve(ogpsa.config.references_per_refresh or 1).normal_()
            estimate = peak_bytes(ogpsa.estimator._update_basis, device)
            for sketch in ogpsa.estimator.sketches:
                sketch.clear()
        step = peak_bytes(optimizer.step, device)
        device_bytes = {
            when: sum(
                b["bytes"] for b in held.values() if (b["home"], b["when"]) == ("device", when)
            )
            for when in ("always", "refresh")
        }
        found[name] = {
            "buffers": held,
            "always_on_device_bytes": device_bytes["always"],
            "refresh_only_on_device_bytes": device_bytes["refresh"],
            "on_host_bytes": sum(b["bytes"] for b in held.values() if b["home"] == "host"),
            "extra_in_a_step_bytes": step - plain,
            "extra_in_an_estimate_bytes": estimate,
        }
        ogpsa.detach()
        del ogpsa
        gc.collect()
    size = sum(p.numel() for p in parameters)
    return {"adapter_parameters": size, "settings_by_name": found, "summary": found}


def measure_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peaks and times of real steps, refreshes included, plain and with each setting.

    Yields:
        What has been found so far, after each setting.
    """
    device = torch.device(options.device)
    shape = common.SHAPES[options.shape]
    model = common.with_lora(common.random_nf4_llama(shape, device))
    loop = Loop(model, options)
    objectives = references(model, shape["vocab"], 4, min(64, options.length // 2))
    loop.step()
    weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    plain = peak_bytes(loop.step, device)
    times = common.side_by_side({"step": loop.step}, options.repeats, device)
    summary: dict[str, Any] = {
        "plain": {
            "extra_peak_bytes": 0,
            "run_peak_bytes": weights + plain,
            "step_seconds": common.typical(times["step"]),
        }
    }
    for name, settings in SETTINGS.items():
        common.synchronise(device)

        def run(settings: dict[str, Any] = settings) -> None:
            with OGPSA(model, loop.optimizer, objectives, OGPSAConfig(**settings)):
                for _ in range(2):
                    loop.step()

        peak = peak_bytes(run, device)
        gc.collect()
        with OGPSA(model, loop.optimizer, objectives, OGPSAConfig(**settings)) as ogpsa:
            loop.step()
            ogpsa.steps = NEVER - 1  # far from the next refresh, whatever the schedule
            quiet = ogpsa.config.refresh == "interval"
            times = common.side_by_side({"step": loop.step}, options.repeats, device, warm_up=0)
        summary[name] = {
            "extra_peak_bytes": peak - plain,
            "run_peak_bytes": weights + peak,
            "step_seconds": common.typical(times["step"]),
            "step_without_refresh": quiet,
        }
        del ogpsa
        gc.collect()
        yield {"summary": summary}


def markdown(folder: Path) -> str:
    """The tables of all results in `folder`."""
    tables = []
    for path in sorted(folder.glob("memory_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        if "settings_by_name" in report:
            for name, found in report["summary"].items():
                keys = ("always_on_device_bytes", "extra_in_a_step_bytes")
                keys += ("refresh_only_on_device_bytes", "on_host_bytes")
                rows.append([name, *(f"{found[key] / 1e9:.2f}" for key in keys)])
            header = ["GB", "always on the device", "more within a step", "more within a refresh"]
            header += ["in host memory"]
        else:
            for name, found in report["summary"].items():
                keys = ("extra_peak_bytes", "run_peak_bytes")
                values = [f"{found[key] / 1e9:.2f}" for key in keys]
                rows.append([name, *values, f"{found['step_seconds']:.3f} s"])
            header = ["GB", "extra peak", "peak of the run", "step"]
        title = f"{report['settings']['shape']} shapes, {report['device']}:"
        tables.append(f"{title}\n\n{common.table(header, rows)}")
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_model_options(parser)
    parser.set_defaults(shape="8b")
    parser.add_argument("--steps", action="store_true", help="real steps on the CPU as well")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(options.results))
        return
    common.resolve_model_options(options)
    device = torch.device(options.device)
    torch.manual_seed(0)
    real = device.type == "cuda" or options.steps
    name = f"memory_{device.type}_{options.shape}{'_steps' if options.steps else ''}.json"
    for found in measure_runs(options) if real else [measure_buffers(options)]:
        common.write(options.results / name, common.settings_and_environment(options) | found)
    print(markdown(options.results))


if __name__ == "__main__":
    main()
