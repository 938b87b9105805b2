"""The base model's own answers to reference prompts, produced once and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# At the top, because importing rich draws from Python's random numbers, which a run must not do.
from rich.console import Console
from rich.progress import track
from torch import nn

from lora_ogpsa.fingerprints import fingerprint, require_switch
from lora_ogpsa.generation import GREEDY, greedy_replies, stop_tokens


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, its adapter layers in place; others unchanged."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    # PEFT's model of mixed adapters has their switch and not that method.
    return model.base_model.model if hasattr(model, "disable_adapter") else model


def decoder_of(model: Any) -> Any | None:
    """The part of a language model that gives the hidden states; ``None`` if it names none."""
    base = base_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not base else None


@contextmanager
def base_mode(model: Any) -> Iterator[None]:
    """Within the context `model` is its base model: adapters are off.

    PEFT's own switch takes a census of all layers and rewrites every ``requires_grad``, a tenth of
    a second on a small model; for LoRA, the flag that its layers look at is enough. Elsewhere the
    ``requires_grad`` that PEFT rewrites is restored, so that what was frozen by hand stays frozen.

    Raises:
        ModelError: the adapter's layers are there without PEFT's switch.
    """
    if not hasattr(model, "disable_adapter"):
        require_switch(model)
        yield
        return
    if _is_plain_lora(model):
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds)]
        flags = [m._disable_adapters for m in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, flag in zip(layers, flags, strict=True):
                layer._disable_adapters = flag
        return
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            _restore(trainable)  # FSDP2 would gather parameters that need no gradient from then on
            yield
    finally:
        _restore(trainable)


@contextmanager
def reference_policy(model: Any) -> Iterator[None]:
    """Within the context `model` is what DPO compares with, by TRL's own ways.

    That is its frozen copy of the adapter that training began with, which TRL names ``"ref"``, or
    the base model where there is none.
    """
    if "ref" not in getattr(model, "peft_config", {}):
        with base_mode(model):
            yield
        return
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    active = model.active_adapter
    try:
        model.set_adapter("ref")
        _restore(trainable)
        yield
    finally:
        model.set_adapter(active)
        _restore(trainable)


def _is_plain_lora(model: Any) -> bool:
    """Whether LoRA layers are all that stands between `model` and its base.

    Not so where biases of the base were trained, of which PEFT's switch warns.
    """
    from peft import LoraModel

    return isinstance(model.base_model, LoraModel) and all(
        getattr(config, "bias", "none") == "none" for config in model.peft_config.values()
    )


def _restore(flags: list[tuple[Any, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def own_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    cache: Path | None = None,
    title: str = "base model's own answers",
) -> list[list[int]]:
    """Greedy answers of the base model to tokenised `prompts`, as token ids.

    Prompts are answered in batches of similar length; every finished batch is kept on disk, so
    that an interrupted run goes on where it stopped.

    Args:
        model: the PEFT model, whose adapters are switched off meanwhile.
        tokenizer: its tokenizer, for the padding and end-of-turn tokens.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch.
        cache: folder of the cache; ``None`` keeps nothing.
        title: what the progress bar says.

    Returns:
        One list of token ids per prompt, ending with the end-of-turn token where it was reached.
    """
    identity = fingerprint(model, base=True)[:32] if cache is not None else ""
    stops = stop_tokens(model, tokenizer)
    keys = [_key(identity, prompt, max_new_tokens, stops) for prompt in prompts]
    store = _AnswerFile(cache / "answers" / f"{identity}.jsonl") if cache is not None else None
    known: dict[str, list[int]] = {} if store is None else store.read()
    todo = sorted(
        (i for i, key in enumerate(keys) if key not in known), key=lambda i: len(prompts[i])
    )
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]
    console = Console(stderr=True)
    for batch in track(batches, description=title, disable=not batches, console=console):
        asked = [prompts[i] for i in batch]
        with base_mode(model):
            replies = greedy_replies(model, tokenizer, asked, max_new_tokens, stops)
        fresh = {keys[i]: reply for i, reply in zip(batch, replies, strict=True)}
        known.update(fresh)
        if store is not None:
            store.append(fresh)
    return [known[key] for key in keys]


def _key(identity: str, prompt: list[int], max_new_tokens: int, stops: set[int]) -> str:
    text = f"{GREEDY}|{identity}|{max_new_tokens}|{sorted(stops)}|{prompt}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _AnswerFile:
    """A JSON Lines file of answers; a line torn by an interruption is ignored when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, list[int]]:
        known: dict[str, list[int]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    known[row["key"]] = row["answer"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
        return known

    def append(self, answers: dict[str, list[int]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for key, answer in answers.items():
                file.write("\n" if file.tell() and not self._ends_in_newline() else "")
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_in_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
