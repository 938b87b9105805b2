"""Log-likelihoods of given continuations, in batches that share what can be shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ogpsa.capture import quiet
from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation.generate import precision
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.store import Section
from lora_ogpsa.generation import pad_token

Tokens = tuple[list[int], list[int]]
_ROWS = 256  # positions whose softmax over the vocabulary is held in float32 at a time
_POSITIONS = 1024  # positions whose logits are held at a time: 0.5 GB at 128 thousand tokens


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation.

    Args:
        logprob: natural logarithm, summed over its tokens.
        tokens: how many.
        greedy: each token was the model's most likely one.
    """

    logprob: float
    tokens: int
    greedy: bool


def score(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Tokens],
    *,
    batch_tokens: int = 4096,
    autocast: torch.dtype | None = None,
    cache: Section,
    progress: Progress,
    label: str = "likelihoods",
) -> list[Score]:
    """Log-likelihood of each continuation after its context.

    Requests whose model input is the same (the one-token choices of one question) share a pass,
    and only positions that predict a continuation token reach the vocabulary projection.

    Args:
        model: a causal language model; its adapters are used as they are switched.
        tokenizer: for the padding token.
        requests: (context ids, continuation ids), neither of them empty.
        batch_tokens: most tokens per batch, padding included.
        autocast: run the forward passes in this precision; the softmax is always in float32.
        cache: where finished scores are kept.
        progress: where progress is shown.
        label: what the progress bar says.

    Returns:
        One score per request, in order.

    Raises:
        DataError: a context or a continuation is empty.
    """
    for context, continuation in requests:
        if not context or not continuation:
            raise DataError(
                f"A continuation of {len(continuation)} tokens after a context of {len(context)} "
                "cannot be scored: both need at least one token. Remove rows with empty answers."
            )
    keys = [cache.key("score", str(autocast), *request) for request in requests]
    missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in cache}
    inputs = model_inputs(missing)
    with progress.step(label, len(set(keys)), done=len(set(keys)) - len(missing)) as advance:
        for batch, tails in batches(inputs, missing, batch_tokens):
            found: dict[str, list[Any]] = {}
            logits = tail_logits(model, tokenizer, batch, tails, autocast)
            for ids, rows in zip(batch, logits.split(tails), strict=True):
                for key in inputs[ids]:
                    found[key] = _scored(rows, missing[key][1])
            cache.add(found)
            advance(len(found))
    return [Score(*cache[key]) for key in keys]


def model_inputs(requests: Mapping[str, Tokens]) -> dict[tuple[int, ...], list[str]]:
    """The distinct model inputs of `requests`, the longest first, with the requests they serve.

    The last token of a continuation is predicted but never read, hence not part of its input.
    """
    inputs: dict[tuple[int, ...], list[str]] = {}
    for key, (context, continuation) in requests.items():
        inputs.setdefault((*context, *continuation[:-1]), []).append(key)
    return {ids: inputs[ids] for ids in sorted(inputs, key=lambda ids: (-len(ids), ids))}


def batches(
    inputs: Mapping[tuple[int, ...], list[str]], requests: Mapping[str, Tokens], batch_tokens: int
) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
    """Slice `inputs` into batches of at most `batch_tokens`, counted with padding.

    Args:
        inputs: see `model_inputs`.
        requests: the requests they serve.
        batch_tokens: most tokens; a longer single input is a batch of its own.

    Yields:
        Model inputs, and how many positions at the end of each predict a wanted token.
    """
    batch: list[tuple[int, ...]] = []
    tails: list[int] = []
    for ids, keys in inputs.items():
        tail = max(len(requests[key][1]) for key in keys)
        # The first is the longest, so it sets the width.
        full = batch and (len(batch) + 1) * len(batch[0]) > batch_tokens
        if full or (batch and sum(tails) + tail > _POSITIONS):
            yield batch, tails
            batch, tails = [], []
        batch.append(ids)
        tails.append(tail)
    if batch:
        yield batch, tails


@torch.no_grad()
def tail_logits(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[tuple[int, ...]],
    tails: Sequence[int],
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Logits of the last `tails[i]` positions of each sequence, one after another.

    Args:
        model: a causal language model.
        tokenizer: for the padding token.
        sequences: token ids.
        tails: how many positions of each are wanted.
        autocast: precision of the forward pass.

    Returns:
        [sum of tails, vocabulary], in the model's precision.
    """
    width = max(map(len, sequences))
    pad = pad_token(tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[*s] + [pad] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for row, (sequence, tail) in enumerate(zip(sequences, tails, strict=True)):
        wanted[row, len(sequence) - tail : len(sequence)] = True
    with quiet(model, checkpointing=False), precision(model, autocast), _only(model, wanted):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # A model whose forward goes around its output layer gives all positions.
    if logits.shape[:2] == (1, int(wanted.sum())):
        return logits[0]
    return logits[wanted.to(logits.device)]


@contextmanager
def _only(model: Any, wanted: Tensor) -> Iterator[None]:
    """Within the context the output layer sees only the `wanted` [B, T] positions, as [1, N].

    With a vocabulary of 128 thousand the logits of a prompt are most of a pass's memory.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return

    def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:2] != wanted.shape:
            return None
        return (args[0][wanted.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _scored(logits: Tensor, continuation: list[int]) -> list[Any]:
    """[log-likelihood, tokens, greedy] of `continuation` under the last rows of `logits`."""
    rows = logits[-len(continuation) :]
    target = torch.tensor(continuation, device=logits.device)
    total, greedy = 0.0, True
    for part, wanted in zip(rows.split(_ROWS), target.split(_ROWS), strict=True):
        log_probs = part.float().log_softmax(-1)
        total += float(log_probs.gather(-1, wanted.unsqueeze(-1)).double().sum())
        greedy = greedy and bool((log_probs.argmax(-1) == wanted).all())
    return [total, len(continuation), greedy]
