"""Greedy generation by the weights alone, for references and evaluations alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_ogpsa.capture import quiet

# Part of the key of every kept answer: to be changed where `greedy_replies` answers otherwise.
GREEDY = "greedy, by the weights alone"


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


@contextmanager
def _own_settings_off(model: Any) -> Iterator[None]:
    """Within the context the model has no generation settings of its own.

    transformers takes from those whatever a given configuration leaves unset: suppressed or forced
    tokens, guidance, stop strings and more.
    """
    from transformers import GenerationConfig

    # PEFT hands its model's settings on to the base model.
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, settings in zip(holders, before, strict=True):
            module.generation_config = settings


@torch.no_grad()
def greedy_replies(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
) -> list[list[int]]:
    """Greedy replies to one batch of tokenised prompts, whatever the model's generation settings.

    Sampling, penalties and whatever else those may ask for are off: the same model gives the same
    replies, and two models differ by their weights alone.

    Args:
        model: a causal language model; its adapters are used as they are switched.
        tokenizer: for padding; its padding side does not matter.
        prompts: token ids.
        max_new_tokens: longest reply, in tokens.
        stops: tokens that end a reply.

    Returns:
        One list of token ids per prompt, ending with the stop token where one was reached.
    """
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    pad = pad_token(tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stops),
        return_dict_in_generate=False,
    )
    with quiet(model, checkpointing=False), _own_settings_off(model):
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    replies = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        replies.append(row[:end])
    return replies
