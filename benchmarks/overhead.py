"""What OGPSA adds to the time of a training step and of a whole run, measured side by side.

    python benchmarks/overhead.py --repeats 7                      # SmolLM2-135M on the CPU
    python benchmarks/overhead.py --device cuda --shape 8b --repeats 7   # random NF4, 4 x 1,024
    python benchmarks/overhead.py --markdown                       # tables of all results so far

Plain and projected steps alternate on one model and one batch. `step_overhead` is what the hooks
add to `optimizer.step()` without a refresh (orthogonal rule, k = 16), as a share of a plain step;
`run_overhead` is a run at the default settings against plain training, refreshes included; the
default's references come in turns of seven steps, so repeats should be a multiple of seven. Rules
that refresh at intervals are put together from a measured refresh and a measured step. `contrast`
is the default rule on a contrast adapter, as in the recipes, against plain training of all linear
layers; `contrast_setup_steps` is what making that adapter costs once, in plain steps.

Results go to benchmarks/results/overhead_<device>_<shape>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

from lora_ogpsa import (
    OGPSA,
    ContrastConfig,
    OGPSAConfig,
    Reference,
    capture,
    default_references,
    get_contrast_model,
)
from lora_ogpsa.data import load_rows
from lora_ogpsa.models import cache_dir, load_model
from lora_ogpsa.reference import Objective

NEVER = 10**9
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "orthogonal": {"constraint": "orthogonal", "reference_batch_size": 4},
    "paper": {"preset": "paper", "reference_batch_size": 4},
}
# Reference examples that an interval refresh is timed with; its time is linear in them.
TIMED_EXAMPLES = {"orthogonal": 16, "paper": 8}


def base_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The bare model, and its tokenizer where it has one."""
    if options.shape == "smollm2":
        return load_model("embedded", dtype="float32", device=options.device)
    shape = common.SHAPES[options.shape]
    return common.random_nf4_llama(shape, torch.device(options.device)), None


def answer_lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Tokens of a reference's prompt and of its answer, as long as the default's own."""
    return min(44, options.length // 2), min(32, options.length // 2)


def prepared_references(
    options: argparse.Namespace, model: Any, tokenizer: Any
) -> dict[str, list[Objective]]:
    """`kl` references for the default rule, `sft` ones for the others."""
    if tokenizer is not None:
        kl = [replace(r, limit=options.references) for r in default_references()]
        sft = [
            Reference(
                "general",
                "embedded:eval_general",
                loss="sft",
                first_tokens=None,
                limit=2 * options.references,
            )
        ]
    else:
        vocabulary = common.SHAPES[options.shape]["vocab"]
        prompt, whole = answer_lengths(options)
        # Of the default's own, two answer with one token and come thrice.
        general, first = (
            common.token_rows(vocabulary, options.references, prompt, answer)
            for answer in (whole, 1)
        )
        kl = [
            Reference("general", general),
            Reference("general_first", first, share=3),
            Reference("lookalike", first, share=3),
        ]
        sft = [Reference("general", general * 2, loss="sft", first_tokens=None)]
    return {
        loss: [r.prepare(model, tokenizer, cache=cache_dir()) for r in references]
        for loss, references in (("kl", kl), ("sft", sft))
    }


def contrast_model(options: argparse.Namespace) -> tuple[Any, float]:
    """Another copy of the model under the default contrast adapter, and the seconds it took to set.

    It looks at as many prompts as it does by default. The base model's answers are not timed:
    they are made with or without this adapter.
    """
    model, tokenizer = base_model(options)
    settings = ContrastConfig()
    if tokenizer is not None:
        prompts: list[Any] = load_rows("embedded:safety_sft")
        references = default_references()
    else:
        vocabulary = common.SHAPES[options.shape]["vocab"]
        prompt, answer = answer_lengths(options)
        rows = common.token_rows(vocabulary, settings.prompts, prompt, settings.answer_tokens)
        prompts = [(row["input_ids"][:prompt], row["input_ids"][prompt:]) for row in rows]
        references = [
            Reference(name, common.token_rows(vocabulary, settings.references, prompt, answer))
            for name in ("general", "lookalike")
        ]
    objectives = [r.prepare(model, tokenizer, cache=cache_dir()) for r in references]
    adapted: list[Any] = []
    taken = common.seconds(
        lambda: adapted.append(
            get_contrast_model(model, prompts, objectives, settings, processing_class=tokenizer)
        ),
        torch.device(options.device),
    )
    return common.as_after_some_training(adapted[0]), taken


class Loop:
    """A training loop over one batch, with or without a projector's hooks."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model = model
        self.device = torch.device(options.device)
        self.autocast = options.precision == "bfloat16"
        vocabulary = model.get_base_model().config.vocab_size
        self.batch = common.random_batch(vocabulary, options.batch, options.length, self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def backward(self) -> None:
        """Gradients of the batch's loss, added to those that are there."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(**self.batch).loss
        loss.backward()

    def update(self, ogpsa: OGPSA | None = None) -> None:
        """`optimizer.step()` with the gradients that are there."""
        if ogpsa is not None:
            ogpsa.attach()
        self.optimizer.step()
        if ogpsa is not None:
            ogpsa.detach()

    def step(self, ogpsa: OGPSA | None = None) -> None:
        """A whole training step."""
        # The hook on the forward belongs to the step as well.
        if ogpsa is not None:
            ogpsa.attach()
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if ogpsa is not None:
            ogpsa.detach()


def projector(loop: Loop, objectives: list[Objective], settings: dict[str, Any]) -> OGPSA:
    """A detached projector that stands in the middle of a run: bases and mean rows are there."""
    ogpsa = OGPSA(loop.model, loop.optimizer, objectives, OGPSAConfig(**settings))
    ogpsa.detach()
    ogpsa.steps = 1
    ogpsa.estimator.passes.autocast.enabled = loop.autocast
    ogpsa.estimator.passes.autocast.dtype = torch.bfloat16 if loop.autocast else torch.float32
    ogpsa.estimator.means.normal_(std=1e-3)
    ogpsa.estimator.mass = [1.0] * len(objectives)
    if ogpsa.estimator.subspace is not None:
        for basis in ogpsa.estimator.subspace.stored:
            count, rank, width = basis.shape
            for piece in range(count):
                rows = torch.randn(1, rank, width, device=basis.device) / width**0.5
                basis.write(slice(piece, piece + 1), rows)
    return ogpsa


# ------------------------------------------------------------------------------------ parts


def hook_parts(ogpsa: OGPSA, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of what the hooks of an orthogonal step do, one by one."""
    space, metric, subspace = ogpsa.space, ogpsa.metric, ogpsa.estimator.subspace
    assert metric is not None and subspace is not None
    flat = space.read()
    views = space.views(flat)
    step = torch.randn_like(flat)
    weights = metric.update()
    nothing = torch.zeros_like(flat)
    parts = {
        "read the parameters": lambda: space.read(flat),
        "difference": lambda: torch._foreach_sub_(views, [p.detach() for p in space.parameters]),
        "metric": metric.update,
        "projection": lambda: subspace.correction(step, weights),
        "write the correction": lambda: space.add(nothing),
    }
    times = common.side_by_side(parts, repeats, device)
    return {name: common.typical(values) for name, values in times.items()}


@contextmanager
def timed_passes(model: Any, device: torch.device) -> Any:
    """Within the context, seconds in the model's forwards and backwards, by kind."""
    spent = {"base forward": 0.0, "forward": 0.0, "backward": 0.0}
    began = [0.0]
    gradient = torch.autograd.grad

    def before(*_: Any) -> None:
        common.synchronise(device)
        began[0] = time.perf_counter()

    def after(*_: Any) -> None:
        common.synchronise(device)
        kind = "forward" if torch.is_grad_enabled() else "base forward"
        spent[kind] += time.perf_counter() - began[0]

    def timed_gradient(*arguments: Any, **named: Any) -> Any:
        before()
        found = gradient(*arguments, **named)
        common.synchronise(device)
        spent["backward"] += time.perf_counter() - began[0]
        return found

    base = model.get_base_model()
    handles = [base.register_forward_pre_hook(before), base.register_forward_hook(after)]
    capture.torch.autograd.grad = timed_gradient
    try:
        yield spent
    finally:
        capture.torch.autograd.grad = gradient
        for handle in handles:
            handle.remove()


def refresh_parts(ogpsa: OGPSA, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of a refresh by what it does; medians over `repeats`."""
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        with timed_passes(ogpsa.model, device) as spent:
            total = common.seconds(ogpsa.refresh, device)
        found.append({**spent, "rest": total - sum(spent.values()), "total": total})
    return {name: common.typical([f[name] for f in found]) for name in found[0]}


# ------------------------------------------------------------------------------------ figures


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    bare, tokenizer = base_model(options)
    model = common.with_lora(bare)
    objectives = prepared_references(options, model, tokenizer)
    loop = Loop(model, options)
    projected = projector(
        loop,
        objectives["sft"],
        {
            "constraint": "orthogonal",
            "rank": options.rank,
            "basis_dtype": options.basis_dtype,
            "rows": "means",
            "refresh_every": NEVER,
            "early_refreshes": (),
        },
    )

    def own(model: Any) -> list[Objective]:
        # What the base model says of an example is kept with it: each rule asks for itself.
        return [Objective(o.reference, o.sequences, model) for o in objectives["kl"]]

    default = projector(loop, own(model), RULES["default"])
    variants = {name: projector(loop, own(model), s) for name, s in options.variants.items()}
    contrast, setup = contrast_model(options)
    contrast_loop = Loop(contrast, options)
    on_contrast = projector(contrast_loop, own(contrast), RULES["default"])
    whole = common.side_by_side(
        {
            "plain": loop.step,
            "projected": lambda: loop.step(projected),
            "default": lambda: loop.step(default),
            "contrast": lambda: contrast_loop.step(on_contrast),
            **{name: (lambda o=ogpsa: loop.step(o)) for name, ogpsa in variants.items()},
        },
        options.repeats,
        device,
    )
    plain = common.typical(whole["plain"])

    # The same gradients for all: only `optimizer.step()` and its hooks are compared here.
    loop.backward()
    idle = {
        name: projector(
            loop,
            objectives["kl" if name == "default" else "sft"],
            {**settings, "refresh_every": NEVER}
            if name in ("default", "paper")
            else {**settings, "refresh_every": NEVER, "early_refreshes": ()},
        )
        for name, settings in RULES.items()
    }
    rivals: dict[str, Any] = {"plain": loop.update, "projected": lambda: loop.update(projected)}
    rivals |= {name: (lambda o=ogpsa: loop.update(o)) for name, ogpsa in idle.items()}
    updates = {
        name: common.typical(times)
        for name, times in common.side_by_side(rivals, 2 * options.repeats + 3, device).items()
    }
    hooks = {name: updates[name] - updates["plain"] for name in updates if name != "plain"}
    parts = hook_parts(projected, options.repeats, device)
    parts["rest of the hooks"] = hooks["projected"] - sum(parts.values())

    subspace = projected.estimator.subspace
    assert subspace is not None
    floor = 2 * sum(basis.nbytes for basis in subspace.stored) + 3 * 4 * projected.space.size
    busy = sum(parts[name] for name in parts if name not in ("metric", "rest of the hooks"))
    copy = common.copy_bandwidth(device)

    refreshes, runs = {"default": refresh_parts(default, options.repeats, device)}, {}
    # Not the median: its references take turns, and their examples are of different lengths.
    for name in ("default", "contrast", *variants):
        runs[name] = sum(whole[name]) / sum(whole["plain"]) - 1
    for name, examples in TIMED_EXAMPLES.items():
        examples = min(examples, len(objectives["sft"][0]))
        ogpsa = projector(
            loop, objectives["sft"], {**RULES[name], "references_per_refresh": examples}
        )
        refreshes[name] = refresh_parts(ogpsa, 1, device)
        config = OGPSAConfig(**RULES[name])
        asked, every = config.references_per_refresh or 1, config.refresh_every or 1
        taken = refreshes[name]["total"] * asked / examples
        runs[name] = (taken / every + hooks[name]) / plain
    return {
        **common.settings_and_environment(options),
        "adapter_parameters": projected.space.size,
        "seconds": {
            "steps": {name: common.typical(times) for name, times in whole.items()},
            "all_steps": whole,
            "optimizer_updates": updates,
            "hooks": hooks,
            "hook_parts": parts,
            "refresh": refreshes,
            "contrast_setup": setup,
        },
        "projection": {
            "floor_bytes": floor,
            "seconds": busy,
            "bytes_per_second": floor / busy,
            "copy_bytes_per_second": copy,
            "share_of_copy": floor / busy / copy,
        },
        "summary": {
            "step_overhead": hooks["projected"] / plain,
            "run_overhead": runs["default"],
            "run_overhead_by_rule": runs,
            "reference_share_of_default": refreshes["default"]["total"] / plain,
            "contrast_setup_steps": setup / plain,
        },
    }


def markdown(folder: Path) -> str:
    """The tables of all results in `folder`."""
    figures, parts, shown = [], [], [*RULES, "contrast"]
    for path in sorted(folder.glob("overhead_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        settings, summary = report["settings"], report["summary"]
        runs, projection = summary["run_overhead_by_rule"], report["projection"]
        name = f"{settings['shape']}, {settings['batch']} x {settings['length']}"
        where = f"{report['device']}, {settings['precision']}"
        figures.append(
            [
                name,
                where,
                f"{report['seconds']['steps']['plain']:.2f} s",
                f"{summary['step_overhead']:.1%}",
                f"{projection['share_of_copy']:.0%}",
                *(f"{runs[rule]:.0%}" if rule in runs else "" for rule in shown),
                f"{summary['contrast_setup_steps']:.1f} steps" if "contrast" in runs else "",
                ", ".join(f"{name} {runs[name]:.0%}" for name in runs if name not in shown),
            ]
        )
        refresh = report["seconds"]["refresh"]["default"]
        kinds = ("base forward", "forward", "backward", "rest")
        parts.append([name, *(f"{refresh[k] / refresh['total']:.0%}" for k in kinds)])
    header = ["model, batch", "device", "plain step", "step overhead (k = 16)", "of copy speed"]
    header += [*(f"run: {rule}" for rule in shown), "setting the contrast adapter", "of variants"]
    shares = ["model, batch", "base forward", "forward", "backward", "rest"]
    return "\n\n".join(
        [
            common.table(header, figures),
            "Where the time of one refresh of the default goes:",
            common.table(shares, parts),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_model_options(parser)
    parser.add_argument("--rank", type=int, default=16, help="k of the projected step")
    parser.add_argument("--basis-dtype", default="float32")
    parser.add_argument(
        "--variants",
        type=json.loads,
        default={},
        metavar="JSON",
        help='settings of the default rule to time beside it, by name: \'{"a": {"decay": 0.5}}\'',
    )
    parser.add_argument("--references", type=int, default=8, help="prompts per reference")
    common.run_model_benchmark("overhead", parser, measure, markdown)


if __name__ == "__main__":
    main()
