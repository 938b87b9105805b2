"""EleutherAI's lm-evaluation-harness on a loaded model, as an optional extra."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_ogpsa.answers import base_mode
from lora_ogpsa.capture import quiet
from lora_ogpsa.errors import ConfigError, ModelError
from lora_ogpsa.evaluation.result import Better, Item, Measure
from lora_ogpsa.evaluation.statistics import share
from lora_ogpsa.evaluation.store import content_key
from lora_ogpsa.fingerprints import fingerprint

_Z = 1.959963984540054


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    base: bool = False,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    cache: Path | None = None,
    identity: str | None = None,
) -> tuple[dict[str, Measure], dict[str, list[Item]]]:
    """Run tasks of the harness on `model` as it is loaded; nothing is saved or loaded again.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        tokenizer: its tokenizer; a copy is used, since the harness changes it.
        tasks: names of the harness, or of task files in `include_path`.
        base: switch the adapter off meanwhile.
        include_path: folder with task files (YAML) of one's own.
        limit: most rows per task.
        num_fewshot: worked examples before each question; ``None`` as the task says.
        apply_chat_template: wrap prompts in the model's chat template.
        batch_size: requests per batch.
        cache: folder in which the harness keeps the model's responses, one file per model.
        identity: fingerprint of the evaluated model; ``None`` computes it.

    Returns:
        Measures by ``task.metric`` (``task.metric.filter`` where a filter is named), and the
        values of the single rows. Intervals are Wilson's for shares with known rows, else the
        harness's standard error times 1.96.

    Raises:
        ModelError: the harness is not installed.
        ConfigError: a task is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise harness_missing(tasks, f" ({error})") from error

    folder = None if include_path is None else str(include_path)
    # The harness reads 14 thousand task files to know its own: not where ours are enough.
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness {version('lm-eval')} knows no tasks {unknown}. "
            "`lm_eval ls tasks` lists them; `include_path` adds a folder of your own."
        )
    responses = None
    if cache is not None:
        identity = identity or fingerprint(model, base=base)
        # Responses are kept by prompt text, so the tokenizer is part of the file's name.
        owner = content_key(identity, _tokenizer_content(tokenizer))
        cache.mkdir(parents=True, exist_ok=True)
        responses = str(cache / f"harness-{owner[:32]}")
    with quiet(model, checkpointing=False), _seeds_restored(), _switched(model, base):
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
        )
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
            use_cache=responses,
            bootstrap_iters=1000,
            log_samples=True,
        )
    return _measures(found)


def harness_missing(tasks: Sequence[str], why: str = "") -> ModelError:
    """The error where `tasks` are asked for and the harness is not installed."""
    return ModelError(
        f"lm-evaluation-harness is not installed{why}, and the tasks {list(tasks)} are its own. "
        "Install it with `pip install lm-eval`, or leave them out."
    )


def _measures(found: Any) -> tuple[dict[str, Measure], dict[str, list[Item]]]:
    measures: dict[str, Measure] = {}
    items: dict[str, list[Item]] = {}
    for task, values in found["results"].items():
        directions = found.get("higher_is_better", {}).get(task) or {}
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task}.{metric}" + ("" if chosen == "none" else f".{chosen}")
            rows = _rows(found.get("samples", {}).get(task, []), metric, chosen)
            if rows:
                items[label] = rows
            better: Better = "lower" if directions.get(metric) is False else "higher"
            if rows and {row.value for row in rows} <= {0.0, 1.0}:
                interval = share(sum(row.value > 0.5 for row in rows), len(rows))
                measures[label] = Measure(*interval, better=better, unit="share")
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            half = _Z * error if isinstance(error, int | float) else math.nan
            n = len(rows) or int(values.get("sample_len", 0))
            low, high = value - half, value + half
            measures[label] = Measure(float(value), low, high, n, better=better, unit="score")
    return measures, items


def _rows(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> list[Item]:
    """Per-row values of a metric, where it has one number per row."""
    rows = []
    for sample in samples:
        value = sample.get(metric)
        if sample.get("filter", "none") == chosen and isinstance(value, int | float):
            rows.append(Item(f"{sample['doc_id']}-{sample['doc_hash'][:12]}", float(value)))
    return rows


def _tokenizer_content(tokenizer: Any) -> list[Any]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return [content_key(vocabulary), tokenizer.chat_template, sorted(tokenizer.all_special_tokens)]


@contextmanager
def _switched(model: Any, base: bool) -> Iterator[None]:
    if not base:
        yield
        return
    with base_mode(model):
        yield


@contextmanager
def _seeds_restored() -> Iterator[None]:
    """The harness seeds Python's and NumPy's generators; torch's is restored by `quiet`."""
    import numpy as np

    plain, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
