"""How far an adapter moved the model: KL divergence from the base model, per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_ogpsa.answers import base_mode
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation.likelihood import Tokens, batches, model_inputs, tail_logits
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.store import Section
from lora_ogpsa.fingerprints import require_unmerged

_ROWS = 256  # positions whose two vocabulary-wide distributions are held in float32 at a time


@dataclass(frozen=True)
class Divergence:
    """KL(base ‖ adapter) over one answer, in nats.

    Args:
        total: summed over the answer's tokens.
        tokens: how many.
        first_total: summed over its first tokens.
        first_tokens: how many those are.
    """

    total: float
    tokens: int
    first_total: float
    first_tokens: int


def divergence(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Tokens],
    *,
    first: int = 6,
    batch_tokens: int = 4096,
    autocast: torch.dtype | None = None,
    cache: Section,
    progress: Progress,
    label: str = "divergence",
) -> list[Divergence]:
    """KL(base ‖ adapter) at every token of each answer; the base is `model` without its adapter.

    Args:
        model: a PEFT model with its adapter switched on.
        tokenizer: for the padding token.
        examples: (prompt ids, answer ids).
        first: how many tokens count as an answer's beginning, where refusals are decided.
        batch_tokens: most tokens per batch, padding included.
        autocast: precision of the forward passes; the divergence is always in float32.
        cache: where finished results are kept.
        progress: where progress is shown.
        label: what the progress bar says.

    Returns:
        One result per example, in order.

    Raises:
        DataError: a prompt or an answer is empty.
        ModelError: the adapter is merged into the base weights.
    """
    require_unmerged(model)
    for prompt, answer in examples:
        if not prompt or not answer:
            raise DataError(
                f"An answer of {len(answer)} tokens to a prompt of {len(prompt)} has no token to "
                "measure a divergence on. Remove rows with empty answers."
            )
    keys = [cache.key("kl", first, str(autocast), *example) for example in examples]
    missing = {k: e for k, e in zip(keys, examples, strict=True) if k not in cache}
    inputs = model_inputs(missing)
    with progress.step(label, len(set(keys)), done=len(set(keys)) - len(missing)) as advance:
        for batch, tails in batches(inputs, missing, batch_tokens):
            kl = _token_kl(model, tokenizer, batch, tails, autocast)
            found: dict[str, list[Any]] = {}
            for ids, values in zip(batch, kl.split(tails), strict=True):
                for key in inputs[ids]:
                    whole = values[-len(missing[key][1]) :].double()
                    head = whole[:first]
                    found[key] = [float(whole.sum()), len(whole), float(head.sum()), len(head)]
            cache.add(found)
            advance(len(found))
    return [Divergence(*cache[key]) for key in keys]


@torch.no_grad()
def _token_kl(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[tuple[int, ...]],
    tails: Sequence[int],
    autocast: torch.dtype | None,
) -> torch.Tensor:
    """KL(base ‖ adapter) at the last `tails[i]` positions of each sequence, [sum of tails]."""
    with base_mode(model):
        base = tail_logits(model, tokenizer, sequences, tails, autocast)
    current = tail_logits(model, tokenizer, sequences, tails, autocast)
    parts = []
    for reference, candidate in zip(base.split(_ROWS), current.split(_ROWS), strict=True):
        p, q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
        # Rounding may leave a divergence of zero a hair below it.
        parts.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
    return torch.cat(parts).cpu()
