"""`read_inputs`: what modules read at the tokens of prompts, to set a contrast adapter by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

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
    with, a system prompt as a rule, where the model's cache allows it.

    Args:
        model: the base model.
        readers: full names of modules.
        safety: prompts to be refused, without answers.
        kinds: prompts and answers of each kind of reference.
        progress: show a progress bar.

    Returns:
        By name; modules that read the same tensor share one `Inputs`.
    """
    groups = [safety, *kinds]
    places: dict[tuple[tuple[int, ...], ...], list[tuple[int, int]]] = {}
    for kind, group in enumerate(groups):
        for row, (prompt, answer) in enumerate(group):
            places.setdefault((tuple(prompt), tuple(answer)), []).append((kind, row))
    examples = sorted(places, key=lambda example: sum(map(len, example)))
    batches = [examples[i : i + _BATCH] for i in range(0, len(examples), _BATCH)]
    ends: dict[str, list[Tensor]] = {}
    text: dict[str, Tensor] = {}
    tokens = 0
    # Under gradient checkpointing a layer leaves the cache empty.
    with quiet(model, checkpointing=False), _Reading(model, readers) as reading:
        reading.begin([prompt for prompt, _ in examples])
        start = reading.start
        references = sum(map(len, kinds))
        for name, rows in reading.beginning.items():
            text[name] = references * rows.T @ rows
        tokens += references * start
        for batch in track(batches, "contrast adapter: looking at prompts", disable=not progress):
            read = reading.go_on([prompt + answer for prompt, answer in batch])
            for at, example in enumerate(batch):
                end, size = len(example[0]) - 1 - start, sum(map(len, example)) - start
                is_text = any(kind > 0 for kind, _ in places[example])
                tokens += (size - 1) * is_text
                for name, of_batch in read.items():
                    rows = of_batch[at].float()
                    if name not in ends:
                        ends[name] = [rows.new_empty(len(g), rows.shape[-1]) for g in groups]
                    for kind, row in places[example]:
                        ends[name][kind][row] = rows[end]
                    if is_text:
                        others = torch.cat([rows[:end], rows[end + 1 : size]])
                        moment = others.T @ others
                        text[name] = text[name] + moment if name in text else moment
    made = {name: Inputs(s, tuple(r), text[name] / tokens) for name, (s, *r) in ends.items()}
    return {name: made[first] for name, first in reading.first.items()}


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
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: self._now.update({name: args[0]})
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

    def go_on(self, sequences: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """What is read [B, T, d] at the tokens of `sequences` after `start`, padded at the end."""
        longest = max(map(len, sequences))
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in sequences]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(padded, device=self._model.device)[:, self.start :],
            "attention_mask": torch.tensor(mask, device=self._model.device),
        }
        if self._cache is not None:
            # A pass writes into it.
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(sequences))
            inputs["past_key_values"] = cache
        self._decoder(**inputs, use_cache=self._cache is not None)
        return self._read()

    def _read(self) -> dict[str, Tensor]:
        if not self.first:
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
