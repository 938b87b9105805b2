"""Greedy answers to prompts: batched by length, left-padded, cached prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.store import Section
from lora_ogpsa.generation import GREEDY, greedy_replies, stop_tokens


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Args:
        text: without special tokens, stripped.
        ids: the tokens, the end-of-turn token included where it was reached.
        cut: the answer ran into the limit on its length.
    """

    text: str
    ids: list[int]
    cut: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    cache: Section,
    progress: Progress,
    label: str = "answers",
) -> list[Answer]:
    """Greedy answers to tokenised prompts.

    Sampling and penalties that the model's own generation settings may ask for are off: the same
    model gives the same answers, and two models differ by their weights alone. Only prompts that
    `cache` lacks are answered, the longest first. Batches are consecutive in that order, so an
    interrupted run goes on with the very batches it would have had.

    Args:
        model: a causal language model; its adapters are used as they are switched.
        tokenizer: for padding and decoding; its padding side does not matter.
        prompts: token ids, chat template included.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch.
        autocast: run the forward passes in this precision.
        cache: where finished answers are kept.
        progress: where progress is shown.
        label: what the progress bar says.

    Returns:
        One answer per prompt, in order.
    """
    stops = stop_tokens(model, tokenizer)
    settings = [GREEDY, max_new_tokens, sorted(stops), str(autocast)]
    keys = [cache.key(settings, prompt) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in cache}
    # Ties are broken by content, so that the order of the data set does not shape the batches.
    order = sorted(missing, key=lambda key: (-len(missing[key]), missing[key]))
    with progress.step(label, len(set(keys)), done=len(set(keys)) - len(order)) as advance:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            replies = _reply(
                model, tokenizer, [missing[key] for key in batch], max_new_tokens, stops, autocast
            )
            cache.add(dict(zip(batch, replies, strict=True)))
            advance(len(batch))
    return [_answer(tokenizer, cache[key], stops) for key in keys]


def precision(model: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on the model's device, or nothing for ``None``."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def _answer(tokenizer: Any, ids: list[int], stops: set[int]) -> Answer:
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, ids, cut=not ids or ids[-1] not in stops)


def _reply(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
    autocast: torch.dtype | None,
) -> list[list[int]]:
    with precision(model, autocast):
        return greedy_replies(model, tokenizer, prompts, max_new_tokens, stops)
