"""Greedy answers to prompts: batched by length, left-padded, cached prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ogpsa.capture import quiet
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.store import Section


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
    settings = ["greedy", max_new_tokens, sorted(stops), str(autocast)]
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


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: what the model declares, and the tokenizer's own."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(declared) if isinstance(declared, list | tuple) else {declared}
    return {token for token in stops | {tokenizer.eos_token_id} if token is not None}


def pad_token(tokenizer: Any) -> int:
    """A token to fill batches with; it is masked, so any valid one will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def precision(model: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on the model's device, or nothing for ``None``."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def _answer(tokenizer: Any, ids: list[int], stops: set[int]) -> Answer:
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, ids, cut=not ids or ids[-1] not in stops)


@torch.no_grad()
def _reply(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
    autocast: torch.dtype | None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    pad = pad_token(tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # Named even where they are the defaults: what is left unset comes from the model's settings.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stops),
        return_dict_in_generate=False,
    )
    with quiet(model, checkpointing=False), precision(model, autocast):
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    replies = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        replies.append(row[:end])
    return replies
