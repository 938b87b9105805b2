"""Peak memory and time of a merge, on a synthetic checkpoint with the shapes of a real model.

    python benchmarks/merge_memory.py                         # Llama-3-8B shapes, 16 GB on disk
    python benchmarks/merge_memory.py --model 1b --strategies original dequantised

Each merge runs in a process of its own, whose largest resident set is what the operating system
reports for it. Results go to benchmarks/results/merge_memory_<model>.json; the checkpoint, the
adapter and the merged model are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import RANK, RESULTS, SHAPES, llama_config

INPUT_SHARD_BYTES = 5 * 10**9  # the hub's usual shard


def linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of one layer's linear modules."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    kv = hidden // shape["heads"] * shape["kv"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def make_inputs(folder: Path, model: str) -> None:
    """Writes a bfloat16 checkpoint in `folder`/base and an adapter in `folder`/adapter."""
    import torch
    from safetensors.torch import save_file

    from lora_ogpsa.export.checkpoint import ShardWriter

    shape = SHAPES[model]
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = llama_config(shape)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(base)
    # One random tensor per shape: the merge's memory and time do not depend on the values.
    linear = {
        name: torch.randn(size, dtype=torch.bfloat16) * 0.02
        for name, size in linear_shapes(shape).items()
    }
    ends = torch.randn(shape["vocab"], shape["hidden"], dtype=torch.bfloat16) * 0.02
    norm = torch.ones(shape["hidden"], dtype=torch.bfloat16)
    writer = ShardWriter(base, INPUT_SHARD_BYTES)
    factors = {}
    writer.add("model.embed_tokens.weight", ends)
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}"
        for name, weight in linear.items():
            # Clones, as safetensors refuses tensors that share memory.
            writer.add(f"{prefix}.{name}.weight", weight.clone())
            key, (rows, columns) = f"base_model.model.{prefix}.{name}", weight.shape
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"{prefix}.{name}.weight", norm.clone())
    writer.add("model.norm.weight", norm.clone())
    writer.add("lm_head.weight", ends.clone())
    writer.close()
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.split(".")[1] for name in linear}),
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def run_merge(folder: Path, strategy: str) -> None:
    """Merges, checks one tensor of the result, and prints what it took as JSON."""
    import torch

    from lora_ogpsa.export import merge_adapter
    from lora_ogpsa.export.checkpoint import CheckpointReader

    started = time.monotonic()
    report = merge_adapter(
        folder / "adapter",
        folder / "merged",
        strategy=strategy,  # type: ignore[arg-type]
        progress=sys.stderr.isatty(),
    )
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    name = "model.layers.1.self_attn.k_proj"
    before, after = (
        CheckpointReader(folder / f).read(f"{name}.weight") for f in ("base", "merged")
    )
    if strategy == "dequantised" and report.quantisation is not None:
        before = report.quantisation.dequantised(before)
    factors = CheckpointReader(_as_model(folder / "adapter"))
    a, b = (factors.read(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
    expected = (before.float() + 2 * b @ a).to(torch.bfloat16)
    if not torch.equal(after, expected):
        raise SystemExit(f"{name} was merged wrongly")
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "written": report.total_bytes}))


def _as_model(adapter: Path) -> Path:
    # The reader knows model folders only; an adapter's file is one under another name.
    folder = adapter / "as_model"
    folder.mkdir(exist_ok=True)
    link = folder / "model.safetensors"
    if not link.exists():
        link.symlink_to(adapter / "adapter_model.safetensors")
    return folder


def _child(*arguments: str, threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    """Runs the benchmark; the children of this process re-enter here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--strategies", nargs="+", default=["original", "dequantised"])
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint (deleted after)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=["inputs", "merge"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "inputs":
        make_inputs(args.folder, args.model)
        return
    if args.child == "merge":
        run_merge(args.folder, args.strategies[0])
        return

    work = Path(tempfile.mkdtemp(prefix="merge_memory-", dir=args.folder))
    runs = {}
    try:
        shared = ("--folder", str(work), "--model", args.model)
        _child("--child", "inputs", *shared, threads=args.threads)
        for strategy in args.strategies:
            out = _child(
                "--child", "merge", *shared, "--strategies", strategy, threads=args.threads
            )
            runs[strategy] = json.loads(out.splitlines()[-1])
            shutil.rmtree(work / "merged")
            print(
                f"{args.model} {strategy}: peak {runs[strategy]['peak_bytes'] / 2**30:.2f} GiB, "
                f"{runs[strategy]['seconds']:.0f} s, "
                f"{runs[strategy]['written'] / 1e9:.1f} GB written",
                flush=True,
            )
    finally:
        shutil.rmtree(work)
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    result = {
        "model": args.model,
        "shape": SHAPES[args.model],
        "rank": RANK,
        "dtype": "bfloat16",
        "runs": runs,
        "threads": args.threads,
        "machine": {"cpus": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {name: version(name) for name in libraries},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"merge_memory_{args.model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
