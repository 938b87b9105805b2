"""How well merged and exported models reproduce the one that was trained.

    lora-ogpsa run recipes/quickstart.yaml
    python benchmarks/merge_fidelity.py                 # the adapter in outputs/quickstart/adapter
    python benchmarks/merge_fidelity.py --adapter FOLDER --gguf
    python benchmarks/merge_fidelity.py --markdown

Merges a QLoRA adapter in every way that docs/merging.md compares, two wrong ones among them, and
scores each against the 4-bit base with its adapter. `--gguf` exports the default merge as GGUF too
and runs it in llama.cpp (`pip install llama-cpp-python`).

Results go to benchmarks/results/merge_fidelity.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

from lora_ogpsa.export import export_gguf, merge_adapter, verify_merge
from lora_ogpsa.export.divergence import divergence
from lora_ogpsa.export.quantisation import recorded_quantisation
from lora_ogpsa.export.sources import resolve_adapters, resolve_base
from lora_ogpsa.export.verify import DEFAULT_PROMPTS

GGUF_TYPES = ("f16", "q8_0", "q4_1")
GGUF_PROMPTS, ANSWER_TOKENS = 5, 24


def merges(adapter: Path, folder: Path) -> list[dict[str, Any]]:
    """One row per merge and model it is compared with; the bfloat16 merge stays in `folder`."""
    base, _ = resolve_base(None, resolve_adapters(adapter))
    trained, _ = recorded_quantisation(adapter, base)
    if trained is None:
        raise SystemExit(f"{adapter} was not trained on a 4-bit base: there is nothing to compare.")
    fp4 = replace(trained, quant_type="fp4")
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("dequantised", "float32", {}),
        ("dequantised", "float16", {}),
        ("dequantised", "bfloat16", {}),
        ("original", "bfloat16", {}),
        ("dequantised, but as FP4", "bfloat16", {"quantisation": fp4}),
        ("dequantised, adapter at half weight", "bfloat16", {"adapter": [(adapter, 0.5)]}),
    ]
    rows = []
    for name, dtype, changed in ways:
        strategy = name.split(",")[0]
        output = folder / f"{name}-{dtype}".replace(", ", "-").replace(" ", "_")
        settings = {"adapter": adapter, "quantisation": trained, **changed}
        merge_adapter(output=output, strategy=strategy, dtype=dtype, progress=False, **settings)
        report = verify_merge(adapter, output, strategy=strategy, quantisation=trained)
        for comparison in report.comparisons:
            found = comparison.result.to_dict()
            rows.append({"merged": name, "dtype": dtype, "against": comparison.reference, **found})
            print(f"{name}, {dtype}: mean KL {found['mean_kl']:.2e}", flush=True)
    return rows


def ggufs(llama_cpp: Any, merged: Path, folder: Path) -> list[dict[str, Any]]:
    """One row per GGUF type: llama.cpp against transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    expected = []
    for prompt in DEFAULT_PROMPTS[:GGUF_PROMPTS]:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            answer = model.generate(
                torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False
            )[0, len(ids) :]
        expected.append((ids, logits, tokenizer.decode(answer, skip_special_tokens=True)))
    rows = []
    for kind in GGUF_TYPES:
        path = export_gguf(merged, folder / f"{kind}.gguf", type=kind, progress=False)
        theirs = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
        kls, same = [], 0
        for ids, logits, text in expected:
            theirs.reset()
            theirs.eval(ids)
            found = torch.tensor(theirs.scores[: len(ids)].tolist())
            kls.append(divergence([logits], [found]).mean_kl)
            theirs.reset()
            written = theirs.create_completion(ids, max_tokens=ANSWER_TOKENS, temperature=0)
            same += written["choices"][0]["text"].strip() == text.strip()
        rows.append(
            {
                "type": kind,
                "bytes": path.stat().st_size,
                "mean_kl_by_prompt": kls,
                "same_answers": same,
                "prompts": len(expected),
            }
        )
        print(f"{kind}: mean KL {min(kls):.1e} to {max(kls):.1e}, same answers {same}", flush=True)
    return rows


def markdown(path: Path) -> str:
    """The tables of docs/merging.md."""
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            row["merged"],
            row["dtype"],
            row["against"],
            f"{row['mean_kl']:.1e}",
            f"{row['relative_error']:.4f}",
            f"{row['top1_agreement']:.1%}",
        ]
        for row in report["merges"]
    ]
    header = ["merged", "stored as", "against", "mean KL (nats/token)", "relative logit error"]
    tables = [common.table([*header, "same top-1 token"], rows)]
    tables.append(f"{report['merges'][0]['positions']} token positions.")
    if report["ggufs"]:
        header = ["type", "size", "mean KL (nats/token)", "same greedy answers"]
        rows = [
            [
                f"`{row['type']}`",
                f"{row['bytes'] / 1e6:.0f} MB",
                f"{min(row['mean_kl_by_prompt']):.1e} to {max(row['mean_kl_by_prompt']):.1e}",
                f"{row['same_answers']} of {row['prompts']}",
            ]
            for row in report["ggufs"]
        ]
        tables.append(common.table(header, rows))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=Path("outputs/quickstart/adapter"))
    parser.add_argument("--gguf", action="store_true", help="GGUF exports in llama.cpp as well")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "merge_fidelity.json")
    parser.add_argument("--markdown", action="store_true", help="print tables of the results")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(options.output))
        return
    # Before the merges: what is missing should not cost them.
    llama_cpp = importlib.import_module("llama_cpp") if options.gguf else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = merges(options.adapter, folder)
        merged = folder / "dequantised-bfloat16"
        found = ggufs(llama_cpp, merged, folder) if llama_cpp else []
    run = json.loads((options.adapter / "ogpsa_run.json").read_text(encoding="utf-8"))
    report = {
        **common.environment(torch.device("cpu")),
        "base": run["base"],
        "merges": rows,
        "ggufs": found,
    }
    common.write(options.output, report)
    print(markdown(options.output))


if __name__ == "__main__":
    main()
