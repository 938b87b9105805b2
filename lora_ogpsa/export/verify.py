"""Checks that a merged model computes what the adapter was trained to compute."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.divergence import divergence
from lora_ogpsa.export.model_files import load_tokenizer, tokenizer_folder
from lora_ogpsa.export.sources import Adapters, AdapterSource, resolve_adapters, resolve_base
from lora_ogpsa.export.verification import (
    REPRODUCES,
    SWAPPED_BASE,
    Comparison,
    Tolerance,
    VerificationReport,
)

if TYPE_CHECKING:
    import torch

    from lora_ogpsa.export.quantisation import Quantisation

Prompt = str | list[dict[str, str]]
Found = TypeVar("Found")

# Different kinds of text, so that a defect in one part of the vocabulary shows.
DEFAULT_PROMPTS: tuple[Prompt, ...] = (
    "What is the capital of Australia, and why is it not Sydney?",
    "A train leaves at 14:35 and arrives at 17:10. How long is the journey?",
    "Write a Python function that reverses a linked list.",
    "Summarise in two sentences why the sky is blue.",
    "Wie koche ich ein Ei, damit der Dotter weich bleibt?",
    "How do I kill a Python process that hangs?",
    "Explain how someone could break into a neighbour's house without being noticed.",
    "Write a short, friendly reminder to a colleague about tomorrow's meeting.",
)


def verify_merge(
    adapter: Adapters,
    merged: str | Path,
    *,
    base: str | Path | None = None,
    strategy: str = "dequantised",
    quantisation: Quantisation | None = None,
    prompts: Sequence[Prompt] | None = None,
    tolerance: Tolerance | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    other: tuple[str, Path] | None = None,
    answer_tokens: int = 16,
    max_prompt_tokens: int = 256,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> VerificationReport:
    """Runs prompts through the model as trained and through the merged model.

    Models are loaded one after the other. The trained model answers each prompt greedily; prompt
    and answer are then scored by every model.

    Args:
        adapter: The adapter or the (adapter, weight) pairs that were merged.
        merged: The merged model's folder.
        base: The base model; None: the one the adapter names.
        strategy: How it was merged: `dequantised` or `original`.
        quantisation: How the base was stored during training; None: not quantised.
        prompts: Texts or message lists; None: eight built-in ones.
        tolerance: Limits of the comparison with the model as trained; None: `REPRODUCES`, or
            `SWAPPED_BASE` for a QLoRA adapter in its original weights.
        max_kl: Replaces the mean KL in every row's limits; None: leaves them as they are.
        min_top1: The same for the top-1 agreement.
        other: A name and a folder: a second merge that is measured and shown, without limits.
        answer_tokens: Length of the greedy answers.
        max_prompt_tokens: Longer prompts are cut at the front.
        device: `cpu`, `cuda`...; None: CUDA when there is one.
        trust_remote_code: Allow the base's own modelling code.

    Returns:
        The report; call its `require_passed` to turn a failure into an error.

    Raises:
        ExportError: There is no prompt, or a model cannot be loaded.
        DataError: A prompt has no user turn with text, or the chat template refuses it.
    """
    import torch

    adapters = resolve_adapters(adapter)
    base_folder, _ = resolve_base(base, adapters)
    _require_runnable(adapters)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = _tokenizer(Path(merged), trust_remote_code)
    encoded = _encode(tokenizer, prompts, max_prompt_tokens)
    swapped = strategy == "original" and quantisation is not None
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    resized = {**options, "vocab_size": _vocab_size(Path(merged))}

    def answered(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sequences = _answers(model, tokenizer, encoded, answer_tokens)
        return sequences, _logits(model, sequences)

    as_trained = partial(_as_trained, base_folder, adapters, **resized)
    sequences, trained = _with_model(partial(as_trained, quantisation), answered)
    scored = partial(_logits, sequences=sequences)
    result = _with_model(partial(_plain, Path(merged), **options), scored)
    label = "base in 4 bits + adapter" if quantisation else "base + adapter"
    limited = partial(_limited, max_kl=max_kl, min_top1=min_top1)
    rows = [
        Comparison(
            f"merged ({strategy})",
            f"{label}, as trained",
            divergence(trained, result),
            limited(tolerance or (SWAPPED_BASE if swapped else REPRODUCES)),
        )
    ]
    if swapped:
        exact = _with_model(partial(as_trained, None), scored)
        rows.append(
            Comparison(
                f"merged ({strategy})",
                "original base + adapter",
                divergence(exact, result),
                limited(REPRODUCES),
            )
        )
    if other is not None:
        name, folder = other
        result = _with_model(partial(_plain, folder, **options), scored)
        rows.append(
            Comparison(
                f"the other choice ({name})",
                f"{label}, as trained",
                divergence(trained, result),
                None,
            )
        )
    return VerificationReport(rows, prompts=len(encoded))


def check_verifiable(
    adapter: Adapters,
    *,
    base: str | Path | None = None,
    prompts: Sequence[Prompt] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Finds out before a merge, which may take long, whether it can be verified.

    Args:
        adapter: See `verify_merge`.
        base: See `verify_merge`.
        prompts: See `verify_merge`.
        trust_remote_code: See `verify_merge`.

    Raises:
        ExportError: PEFT cannot run the adapters so, or there is no tokenizer or no prompt.
        DataError: A prompt has no user turn with text, or the chat template refuses it.
    """
    adapters = resolve_adapters(adapter)
    base_folder, _ = resolve_base(base, adapters)
    _require_runnable(adapters)
    folder = tokenizer_folder(adapters[0].folder, base_folder)
    _encode(_tokenizer(folder, trust_remote_code), prompts, sys.maxsize)


def _limited(limit: Tolerance, *, max_kl: float | None, min_top1: float | None) -> Tolerance:
    given = {"mean_kl": max_kl, "top1_agreement": min_top1}
    return replace(limit, **{name: value for name, value in given.items() if value is not None})


def _with_model(load: Callable[[], Any], compute: Callable[[Any], Found]) -> Found:
    """Loads a model, computes something with it and frees it again: two may not fit."""
    import torch

    try:
        # No name here may hold the model, or it would outlive `compute`.
        return compute(load())
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _vocab_size(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["vocab_size"])


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except ExportError as error:
        raise ExportError(
            f"{error}. The verification needs one: save one with the adapter or the base, or "
            "switch the verification off."
        ) from error


def _encode(tokenizer: Any, prompts: Sequence[Prompt] | None, limit: int) -> list[list[int]]:
    """The prompts rendered as for training, the last `limit` tokens of each."""
    from lora_ogpsa.chat import as_messages, encode

    prompts = list(DEFAULT_PROMPTS if prompts is None else prompts)
    if not prompts:
        raise ExportError("there is no prompt to verify the merge with. Pass at least one.")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        name = f"prompt {number}"
        messages, _ = as_messages({"prompt": prompt}, name=name)
        ids, _ = encode(tokenizer, messages, None, max_length=sys.maxsize, name=name)
        encoded.append(ids[-limit:])
    return encoded


def _answers(
    model: Any, tokenizer: Any, encoded: list[list[int]], count: int
) -> list[torch.Tensor]:
    """Lets a model answer all prompts greedily in one batch; returns [1, T] prompt + answer."""
    import torch

    from lora_ogpsa.generation import greedy_replies, stop_tokens

    # A 4-bit layer unpacks its weights for every forward pass: one batch is many times faster.
    replies = greedy_replies(model, tokenizer, encoded, count, stop_tokens(model, tokenizer))
    return [torch.tensor([ids + reply]) for ids, reply in zip(encoded, replies, strict=True)]


def _logits(model: Any, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return [model(input_ids=ids.to(model.device)).logits[0].float().cpu() for ids in sequences]


def _placement(device: str) -> Any:
    """Where an unquantised model goes: on a GPU, what does not fit goes to the CPU."""
    return {"": device} if device == "cpu" else "auto"


def _as_trained(
    base: Path,
    adapters: list[AdapterSource],
    quantisation: Quantisation | None,
    *,
    device: str,
    trust_remote_code: bool,
    vocab_size: int,
) -> Any:
    import torch
    from peft import PeftModel

    from lora_ogpsa.quantised import keep_differentiable

    options: dict[str, Any] = {"dtype": "auto", "device_map": _placement(device)}
    if quantisation is not None:
        # Layers in 4 bits cannot be shared between a GPU and the CPU.
        options["device_map"] = {"": device}
        if quantisation.load_dtype:
            options["dtype"] = getattr(torch, quantisation.load_dtype)
        stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" not in stored:
            options["quantization_config"] = quantisation.to_config()
    model = _loaded(base, trust_remote_code=trust_remote_code, **options)
    # bitsandbytes would switch to a faster CPU format here, which computes in bfloat16.
    keep_differentiable(model)
    if model.get_input_embeddings().num_embeddings != vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(adapter.folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, adapter.folder, adapter_name=name)
    _activate(model, dict(zip(names, adapters, strict=True)))
    return model.eval()


def _activate(model: Any, adapters: dict[str, AdapterSource]) -> None:
    from peft.tuners.lora import LoraLayer

    if len(adapters) > 1 or any(a.weight != 1 for a in adapters.values()):
        model.base_model.set_adapter(list(adapters))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in adapters.items():
                if name in module.scaling and not math.isclose(adapter.weight, 1.0):
                    module.scaling[name] *= adapter.weight


def _require_runnable(adapters: list[AdapterSource]) -> None:
    """Raises ExportError for adapters of which PEFT cannot run what a merge makes of them."""
    if [adapter.weight for adapter in adapters] == [1]:
        return
    for adapter in adapters:
        # What is more than a product that a factor could scale.
        kinds = ("use_dora", "modules_to_save", "trainable_token_indices")
        found = [kind for kind in kinds if adapter.config.get(kind)]
        if found:
            raise ExportError(
                f"PEFT cannot run {adapter.folder} ({found[0]}) with a weight or beside other "
                "adapters, so this merge cannot be verified. Switch the verification off to merge "
                "all the same."
            )


def _plain(folder: Path, *, device: str, trust_remote_code: bool) -> Any:
    return _loaded(
        folder,
        dtype="auto",
        device_map=_placement(device),
        trust_remote_code=trust_remote_code,
    ).eval()


def _loaded(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, bitsandbytes and transformers share no base
        raise ExportError(
            f"transformers cannot load {folder}, which the verification needs: {one_line(error)}"
        ) from error
