"""`evaluate`: run a suite of measures on a model, or on its base with the adapter off."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_ogpsa.answers import base_mode
from lora_ogpsa.evaluation.judges import release_judges
from lora_ogpsa.evaluation.measures import run_measure
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.result import EvaluationResult
from lora_ogpsa.evaluation.session import Run
from lora_ogpsa.evaluation.store import Store
from lora_ogpsa.evaluation.suite import EvaluationSuite
from lora_ogpsa.fingerprints import adapter_layers, fingerprint

_LIBRARIES = ("lora-ogpsa", "torch", "transformers", "peft")


def evaluate(
    model: Any,
    tokenizer: Any,
    suite: EvaluationSuite | Mapping[str, Any] | None = None,
    *,
    base: bool = False,
    cache_dir: str | Path | None = "default",
    progress: bool = True,
) -> EvaluationResult:
    """Measure safety, over-refusal, utility and divergence of a model.

    Every finished prompt is kept on disk under the fingerprint of the very weights that answered
    it: an interrupted evaluation goes on where it stopped, a repeated one costs nothing, and a
    base model is measured once for all its adapters. The model is left as it was: mode, random
    number generators, ``requires_grad``, generation settings and tokenizer.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        tokenizer: its tokenizer.
        suite: what to measure; a mapping is read by `EvaluationSuite.from_dict`; ``None`` takes
            the data sets in the package.
        base: evaluate with the adapter switched off.
        cache_dir: where finished prompts are kept; ``"default"`` is the folder ``evaluation`` in
            the library's cache, ``None`` keeps nothing.
        progress: show progress bars, if standard error is a terminal.

    Raises:
        ConfigError: the suite is wrong.
        DataError: data are missing or lack fields.
        ModelError: the model's weights cannot be read, or its adapter is merged and `base` set.
    """
    started = time.monotonic()
    if suite is None:
        suite = EvaluationSuite.default()
    elif not isinstance(suite, EvaluationSuite):
        suite = EvaluationSuite.from_dict(suite)
    if cache_dir == "default":
        from lora_ogpsa.models import cache_dir as library_cache

        cache_dir = library_cache() / "evaluation"
    result = EvaluationResult(
        fingerprint(model, base=base), base=base, suite=suite.to_dict(), versions=_versions()
    )
    adapter = not base and _adapter_is_on(model)
    run = Run(model, tokenizer, suite, Store(cache_dir), Progress(progress), result, adapter)
    try:
        if base:
            with base_mode(model):
                _run_all(run)
        else:
            _run_all(run)
    finally:
        release_judges()
    result.seconds = time.monotonic() - started
    return result


def _run_all(run: Run) -> None:
    for name, spec in run.suite.measures.items():
        run_measure(run, name, spec)


def _adapter_is_on(model: Any) -> bool:
    return hasattr(model, "disable_adapter") and any(
        not layer.disable_adapters for _, layer in adapter_layers(model)
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue  # run from a checkout
    return found
