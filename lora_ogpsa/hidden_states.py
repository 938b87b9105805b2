"""`read_inputs`: what modules read at the tokens of prompts, to set a contrast adapter by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lora_ogpsa import chat
from lora_ogpsa.capture import quiet
from lora_ogpsa.discriminant import Inputs

_BATCH = 8  # examples in a pass

Tokens = tuple[list[int], list[int]]


@torch.no_grad()
def read_inputs(
    model: Any,
    readers: Sequence[str],
    safety: Sequence[Tokens],
    kinds: Sequence[Sequence[Tokens]],
    *,
    progress: bool,
) -> dict[str, Inputs]:
    """What the modules `readers` read, by name, in forward passes of the base model.

    An example that is there several times passes once, and so do the tokens that all prompts begin
    with, a system prompt as a rule, where the model's cache allows it. A pass ends where the last
    module reads.

    Args:
        model: the base model.
        readers: full names of modules.
        safety: prompts to be refused, and of their answers the tokens to look at.
        kinds: prompts and answers of each kind of reference.
        progress: show a progress bar.

    Returns:
        By name; modules that read the same tensor share one `Inputs`.
    """
    groups = [[(tuple(p), tuple(a)) for p, a in group] for group in (safety, *kinds)]
    refused = set(groups[0])
    references = {example for group in groups[1:] for example in group}
    distinct = dict.fromkeys(example for group in groups for example in group)
    examples = sorted(distinct, key=lambda example: sum(map(len, example)))
    batches = [examples[i : i + _BATCH] for i in range(0, len(examples), _BATCH)]
    ends: dict[str, list[Tensor]] = {}
    answers: dict[str, Any] = {}
    answered = 0
    # Under gradient checkpointing a layer leaves the cache empty.
    with quiet(model, checkpointing=False), _Reading(model, readers) as reading:
        reading.begin([prompt for prompt, _ in examples])
        start = reading.start
        text: dict[str, Any] = {
            name: len(references) * rows.T @ rows for name, rows in reading.beginning.items()
        }
        tokens = len(references) * start
        for batch in track(batches, "contrast adapter: looking at prompts", disable=not progress):
            inputs = chat.collate([(list(p), list(a)) for p, a in batch], pad_id=0)
            end = [len(prompt) - 1 - start for prompt, _ in batch]
            is_text = inputs["attention_mask"][:, start:].bool()
            is_answer = is_text.clone()
            is_text[range(len(batch)), end] = False
            is_text[[example not in references for example in batch]] = False
            for row, example in enumerate(batch):
                is_answer[row, : end[row] + 1 if example in refused else None] = False
            tokens += int(is_text.sum())
            answered += int(is_answer.sum())
            for name, read in reading.go_on(inputs).items():
                ends.setdefault(name, []).append(read[range(len(batch)), end].float())
                others = read[is_text.to(read.device)].float()
                text[name] = text.get(name, 0) + others.T @ others
                learnt = read[is_answer.to(read.device)].float()
                answers[name] = answers.get(name, 0) + learnt.sum(0)
    place = {example: row for row, example in enumerate(examples)}
    made = {}
    for name, parts in ends.items():
        rows = torch.cat(parts)
        of_safety, *of_kinds = (rows[[place[e] for e in group]] for group in groups)
        mean = answers[name] / answered if answered else None
        made[name] = Inputs(of_safety, tuple(of_kinds), text[name] / tokens, mean)
    return {name: made[first] for name, first in reading.first.items()}


class _AllRead(Exception):
    """Raised where the last module reads: the rest of the pass is not needed."""


class _Reading:
    """Passes through a model's decoder whose modules' inputs are seen, within the context.

    Args:
        model: the base model.
        readers: full names of the modules.

    Attributes:
        first: of each module, the first that reads the same tensor.
        start: how many tokens all sequences begin with.
        beginning: by module, what it reads at those [start, d].
    """

    def __init__(self, model: Any, readers: Sequence[str]) -> None:
        self.first: dict[str, str] = {}
        self.start = 0
        self.beginning: dict[str, Tensor] = {}
        self._model = model
        self._decoder = model.get_decoder()
        self._cache: Any = None
        self._now: dict[str, Tensor] = {}
        self._last = ""  # to read; known after a whole pass
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: self._see(name, args[0])
            )
            for name in readers
        ]

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Pass what `prompts` begin with in common; of each a token at least is left."""
        most = min(map(len, prompts)) - 1
        start = next((at for at in range(most) if len({p[at] for p in prompts}) > 1), most)
        if not start:
            return
        ids = torch.tensor([prompts[0][:start]], device=self._model.device)
        cache = getattr(self._decoder(input_ids=ids, use_cache=True), "past_key_values", None)
        if not _can_be_repeated(cache, start):
            return
        self.start, self._cache = start, cache
        self.beginning = {name: read[0].float() for name, read in self._read().items()}

    def go_on(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is read [B, T, d] after `start` by a batch as `chat.collate` pads it."""
        given: dict[str, Any] = {
            "input_ids": inputs["input_ids"][:, self.start :].to(self._model.device),
            "attention_mask": inputs["attention_mask"].to(self._model.device),
        }
        if self._cache is not None:
            # A pass writes into it.
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(inputs["input_ids"]))
            given["past_key_values"] = cache
        with suppress(_AllRead):
            self._decoder(**given, use_cache=self._cache is not None)
        return self._read()

    def _see(self, name: str, read: Tensor) -> None:
        self._now[name] = read
        if name == self._last:
            raise _AllRead

    def _read(self) -> dict[str, Tensor]:
        if not self.first:
            self._last = next(reversed(self._now))
            seen: dict[int, str] = {}
            self.first = {name: seen.setdefault(id(read), name) for name, read in self._now.items()}
        return {name: self._now[name] for name in dict.fromkeys(self.first.values())}


def _can_be_repeated(cache: Any, tokens: int) -> bool:
    """Whether it holds nothing but keys and values, of every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return (
        isinstance(cache, DynamicCache)
        and cache.get_seq_length() == tokens
        and all(type(layer) is DynamicLayer for layer in cache.layers)
    )
