"""What the cost benchmarks share: models of real shapes with random weights, clocks, reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ogpsa.stages import cpu_computes_bfloat16

RESULTS = Path(__file__).parent / "results"
RANK = 16
SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
    "3b": {"hidden": 3072, "ffn": 8192, "layers": 28, "heads": 24, "kv": 8, "vocab": 128256},
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256},
    "tiny": {"hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "kv": 2, "vocab": 512},
}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")

# ------------------------------------------------------------------------------------ options


def add_model_options(parser: argparse.ArgumentParser, batch: int | None = None) -> None:
    """Options that all benchmarks of a model share; `batch` is the default of all shapes."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="smollm2")
    parser.add_argument("--batch", type=int, default=batch, help="rows per step")
    parser.add_argument("--length", type=int, help="tokens per row; 128 for smollm2, else 1,024")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    add_report_options(parser, repeats=3)


def add_report_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Options that all cost benchmarks share."""
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print tables of the results")


def resolve_model_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on shape and device."""
    torch.set_num_threads(options.threads)
    small = options.shape == "smollm2"
    options.batch = options.batch or (8 if small else 4)
    options.length = options.length or (128 if small else 1024)
    if options.precision == "auto":
        fast = options.device != "cpu" or cpu_computes_bfloat16()
        options.precision = "bfloat16" if fast else "float32"


# ------------------------------------------------------------------------------------ models


def llama_config(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def random_nf4_llama(shape: dict[str, int], device: torch.device) -> Any:
    """A Llama with random weights, its linear layers in NF4 with nested scales.

    Built on the meta device and filled one layer at a time, so that the most memory ever needed
    beside the finished model is one linear layer in bfloat16.
    """
    import bitsandbytes as bnb
    from transformers import LlamaForCausalLM

    from lora_ogpsa.quantised import keep_differentiable

    config = llama_config(shape)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=compute,
                quant_type="nf4",
                device="meta",
            )
            weight = torch.randn(
                linear.out_features, linear.in_features, device=device, dtype=torch.bfloat16
            )
            packed.weight = bnb.nn.Params4bit(
                weight.mul_(0.02).cpu() if device.type == "cpu" else weight.mul_(0.02),
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=packed,
            ).to(device)
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, packed)
            del weight
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            value = torch.empty(parameter.shape, device=device, dtype=compute)
            value = value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.02)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.is_loaded_in_4bit = True
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device.type == "cpu":
        keep_differentiable(model)
    return model


def with_lora(model: Any) -> Any:
    """`model` under a LoRA of rank 16 on all linear layers, B not zero, ready to train."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return as_after_some_training(get_peft_model(model, settings))


def as_after_some_training(model: Any) -> Any:
    """`model`, a PEFT model, with B no longer zero and its trainable weights in float32."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # With B = 0 the gradient of A would be zero.
            parameter.data.normal_(std=1e-3)
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model.train()


def random_batch(vocabulary: int, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    """Random tokens to train on; the first fifth of each row is prompt."""
    ids = torch.randint(3, vocabulary, (batch, length), device=device)
    labels = ids.clone()
    labels[:, : length // 5] = -100
    return {"input_ids": ids, "labels": labels}


def token_rows(vocabulary: int, count: int, prompt: int, answer: int) -> list[dict[str, Any]]:
    """Reference rows of random tokens."""
    ids = torch.randint(3, vocabulary, (count, prompt + answer)).tolist()
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]


# ------------------------------------------------------------------------------------ clocks


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, up to the end of what it started on the device."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def side_by_side(
    rivals: dict[str, Callable[[], Any]], repeats: int, device: torch.device, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each rival, called in turn (ABAB...), so that a slow moment hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warm_up + repeats):
        for name, work in rivals.items():
            taken = seconds(work, device)
            if turn >= warm_up:
                found[name].append(taken)
    return found


def typical(values: Sequence[float]) -> float:
    return statistics.median(values)


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes per second read and written by a device-to-device copy."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    times = side_by_side({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * source.nbytes / min(times)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    x = torch.tensor(xs, dtype=torch.float64).log()
    y = torch.tensor(ys, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


# ------------------------------------------------------------------------------------ reports


def settings_and_environment(options: argparse.Namespace) -> dict[str, Any]:
    """What every report begins with."""
    kept = {k: v for k, v in vars(options).items() if k not in ("results", "markdown")}
    return {"settings": kept, **environment(torch.device(options.device))}


def device_name(device: torch.device) -> str:
    """What a device is, in a few words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({platform.machine()}, {capability}), {torch.get_num_threads()} thread(s)"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit: what a number depends on beside the settings."""
    return {
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "versions": {library: version(library) for library in LIBRARIES},
        "commit": _commit(),
    }


def _commit() -> str:
    """Of this checkout; of a copy without its history, what the environment says."""
    told = os.environ.get("LORA_OGPSA_COMMIT")
    if told:
        return told

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../lora_ogpsa", "../benchmarks/*.py")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def run_model_benchmark(
    kind: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    markdown: Callable[[Path], str],
) -> None:
    """Measure a model and write <kind>_<device>_<shape>.json, or print the tables so far."""
    options = parser.parse_args()
    if options.markdown:
        print(markdown(options.results))
        return
    resolve_model_options(options)
    report = measure(options)
    write(options.results / f"{kind}_{options.device.split(':')[0]}_{options.shape}.json", report)
    print(json.dumps(report["summary"], indent=1))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def total_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
