"""`read_inputs`: what modules read at the tokens of prompts, to set a contrast adapter by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lora_ogpsa import chat
from lora_ogpsa.capture import quiet
from lora_ogpsa.discriminant import Inputs
from lora_ogpsa.errors import AdapterError

_BATCH = 8  # examples in a pass
# Of the safety answers each third: a mean of what begins much alike needs fewer than covariances.
_ANSWERED = 3

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

    Raises:
        AdapterError: a module does not read every token.
    """
    groups = [[(tuple(p), tuple(a)) for p, a in group] for group in (safety, *kinds)]
    kept = set([e for e in dict.fromkeys(groups[0]) if e[1]][::_ANSWERED])
    groups[0] = [e if e in kept else (e[0], ()) for e in groups[0]]
    refused = set(groups[0])
    references = {example for group in groups[1:] for example in group}
    distinct = dict.fromkeys(example for group in groups for example in group)
    examples = sorted(distinct, key=lambda example: sum(map(len, example)))
    batches = [examples[i : i + _BATCH] for i in range(0, len(examples), _BATCH)]
    prompts = [prompt for prompt, _ in examples]
    head = _in_common(prompts)
    beginning: dict[str, Tensor] = {}
    ends: dict[str, list[Tensor]] = {}
    answers: dict[str, Any] = {}
    answered = 0
    # Under gradient checkpointing a layer leaves the cache empty.
    with quiet(model, checkpointing=False), _Reading(model, readers) as reading:
        reading.begin(prompts[0][:head])
        start = reading.start
        tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in references)
        text: dict[str, Any] = {
            name: len(references) * rows.T @ rows for name, rows in reading.beginning.items()
        }
        console, title = Console(stderr=True), "contrast adapter: looking at prompts"
        for batch in track(batches, title, disable=not progress, console=console):
            inputs = chat.collate([(list(p), list(a)) for p, a in batch], pad_id=0)
            end = [len(prompt) - 1 - start for prompt, _ in batch]
            is_text, is_answer = _parts(
                inputs["attention_mask"][:, start:].bool(),
                end,
                [example in references for example in batch],
                [example in refused for example in batch],
            )
            answered += int(is_answer.sum())
            reading.go_on(inputs)
            for name, states in reading.read().items():
                if name not in beginning:
                    beginning[name] = reading.beginning.get(name, states[0, :head].float())
                ends.setdefault(name, []).append(states[range(len(batch)), end].float())
                rows = states[is_text.to(states.device)].float()
                text[name] = text.get(name, 0) + rows.T @ rows
                learnt = states[is_answer.to(states.device)].float()
                answers[name] = answers.get(name, 0) + learnt.sum(0)
    place = {example: row for row, example in enumerate(examples)}
    at = [[place[example] for example in group] for group in groups]
    made = {}
    for name, parts in ends.items():
        rows = torch.cat(parts)
        of_safety, *of_kinds = (rows[group] for group in at)
        made[name] = Inputs(
            of_safety,
            tuple(of_kinds),
            text[name] / tokens,
            answers[name] / answered if answered else None,
            beginning[name],
        )
    return {name: made[same] for name, same in reading.first.items()}


def _parts(
    mask: Tensor, end: Sequence[int], is_reference: Sequence[bool], is_refused: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Which tokens are text not to respond to, and which are of answers to be learnt.

    Args:
        mask: which are no padding [B, T].
        end: where the prompts end.
        is_reference: which rows are references.
        is_refused: which rows are safety examples.
    """
    after = torch.arange(mask.shape[1]) - torch.tensor(end)[:, None]
    is_text = mask & (after != 0) & torch.tensor(is_reference)[:, None]
    is_answer = mask & (after > 0) & torch.tensor(is_refused)[:, None]
    return is_text, is_answer


def _in_common(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all begin with; of each a token at least is left."""
    most = min(map(len, sequences)) - 1
    return next((at for at in range(most) if len({s[at] for s in sequences}) > 1), most)


class _AllRead(Exception):
    """Raised where the last module reads: the rest of the pass is not needed."""


class _Reading:
    """Passes through a model whose modules' inputs are seen, within the context.

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
        self._cache: Any = None
        self._now: dict[str, Tensor] = {}
        self._shape = (0, 0)  # sequences and tokens of a pass
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

    def begin(self, start: tuple[int, ...]) -> None:
        """Pass the tokens that all sequences begin with."""
        if not start:
            return
        ids = torch.tensor([start], device=self._model.device)
        self._shape = (1, len(start))
        cache = getattr(
            self._model.get_decoder()(input_ids=ids, use_cache=True), "past_key_values", None
        )
        if not _can_be_repeated(cache, len(start)):
            return
        self.start, self._cache = len(start), cache
        self.beginning = {name: read[0].float() for name, read in self.read().items()}

    def go_on(self, inputs: Mapping[str, Tensor]) -> None:
        """Pass what comes after `start` of a batch as `chat.collate` pads it, as far as is read."""
        given: dict[str, Any] = {
            "input_ids": inputs["input_ids"][:, self.start :].to(self._model.device),
            "attention_mask": inputs["attention_mask"].to(self._model.device),
            "use_cache": self._cache is not None,
        }
        self._shape = tuple(given["input_ids"].shape)
        if self._cache is not None:
            # A pass writes into it.
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(inputs["input_ids"]))
            given["past_key_values"] = cache
        with suppress(_AllRead):
            self._model.get_decoder()(**given)

    def read(self) -> dict[str, Tensor]:
        """What is read [B, T, d] in the last pass, by module."""
        if not self.first:
            self._last = next(reversed(self._now))
            seen: dict[int, str] = {}
            self.first = {name: seen.setdefault(id(read), name) for name, read in self._now.items()}
        return {name: self._by_token(name) for name in dict.fromkeys(self.first.values())}

    def _by_token(self, name: str) -> Tensor:
        """What a module read [B, T, d]; some models flatten the first two."""
        read, (sequences, tokens) = self._now[name], self._shape
        if read.numel() != sequences * tokens * read.shape[-1]:
            raise AdapterError(
                f"`{name}` reads {tuple(read.shape)} of {sequences} x {tokens} tokens, and a "
                "contrast adapter needs modules that read every token. Name others in "
                "`ContrastConfig(target_modules=...)`."
            )
        return read.reshape(sequences, tokens, -1)

    def _see(self, name: str, read: Tensor) -> None:
        self._now[name] = read
        if name == self._last:
            raise _AllRead


def _can_be_repeated(cache: Any, tokens: int) -> bool:
    """Whether it holds nothing but keys and values, of every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return (
        isinstance(cache, DynamicCache)
        and cache.get_seq_length() == tokens
        and all(type(layer) is DynamicLayer for layer in cache.layers)
    )
