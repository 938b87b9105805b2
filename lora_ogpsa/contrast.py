"""`get_contrast_model`: a LoRA adapter that reads what tells harmful prompts from harmless ones.

An ordinary adapter begins with a random A and has to learn from refusals alone what to refuse,
which is learnt too broadly. The base model knows already: in its middle layers one direction tells
harmful prompts from look-alikes. Here A is set to that direction, and to one that responds to the
safety answers, from forward passes over some prompts before training, and only B is trained. What
the adapter adds is then next to nothing on other text, and its reference gradients, outer products
with A's response, are small from the start.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ogpsa import chat, data
from lora_ogpsa.arguments import given_references
from lora_ogpsa.contrast_config import FEWEST, ContrastConfig
from lora_ogpsa.discriminant import Inputs, contrast_rows, separation
from lora_ogpsa.errors import AdapterError, ConfigError, DataError
from lora_ogpsa.hidden_states import Tokens, read_inputs
from lora_ogpsa.reference import Objective, Reference, default_references, split_ids

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

logger = logging.getLogger(__name__)

# What reads a layer's hidden states, by the names that transformers' models give it.
_READERS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    *("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "fc1", "c_fc"),
)
_LAYER = re.compile(r"\.(\d+)\.")
_NEARLY = 0.98  # which share of the best score is good enough
# Of the layers, from the first: what the others add has few left to act through.
_ACTING = 0.8

Row = Mapping[str, Any] | str | Sequence[int] | tuple[Sequence[int], Sequence[int]]


def get_contrast_model(
    model: nn.Module,
    prompts: Sequence[Row] | str | Path,
    references: Sequence[Reference | Objective] | None = None,
    config: ContrastConfig | None = None,
    *,
    processing_class: Any = None,
    max_length: int = 1024,
    lora_config: LoraConfig | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> PeftModel:
    """Put a LoRA adapter of rank 2 on `model` whose A is set from prompts and frozen.

    In the manner of ``peft.get_peft_model``; train what it returns as any PEFT model, with OGPSA
    attached. It takes forward passes only, so the base may be quantised. ::

        model = get_contrast_model(base_model, safety_data, references, processing_class=tokenizer)
        optimizer = create_ogpsa_optimizer(
            model, torch.optim.AdamW, references=references, processing_class=tokenizer, lr=5e-4
        )

    A model with a contrast adapter that is loaded to be trained further needs
    :func:`freeze_contrast`.

    Args:
        model: the bare base model.
        prompts: what should be refused, with the answers that are to be learnt: a file or data
            set, rows as `Reference` takes them, token ids among them, or tuples of the ids of a
            prompt and of its answer. Where there are prompts alone (texts, lists of ids, or
            ``input_ids`` without ``labels``), the adapter has rank 1.
        references: what should not be refused; ``None`` takes the embedded harmless prompts.
            References with the same prompts count once. Of answers the more tokens the better: A
            learns from them where not to respond.
        config: the settings; ``None`` takes the defaults.
        processing_class: the tokenizer, needed where prompts or references hold text.
        max_length: longest prompt, in tokens.
        lora_config: further settings of PEFT. Its rank, layers and modules (patterns, exceptions
            and parameters among them) are replaced, and ``lora_alpha`` follows the rank, so that
            the scaling stays. Without them it is twice the rank, with which the results of this
            library were measured.
        cache: folder in which the base model's answers are kept; ``None`` keeps none.
        progress: show a progress bar.

    Returns:
        The PEFT model; only the B's are trainable.

    Raises:
        DataError: too few prompts of a kind, or a row without a prompt.
        ConfigError: text without a tokenizer.
        AdapterError: the modules that read the hidden states are not found, or `model` has an
            adapter already.
    """
    config = config or ContrastConfig()
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "The model has an adapter already. `get_contrast_model` takes the bare base model; "
            "merge or unload the other adapter first."
        )
    layers = _readers(model, config)
    if isinstance(prompts, str | Path):
        prompts = data.load_rows(prompts)
    harmful = [
        _tokens(row, processing_class, max_length, config.answer_tokens)
        for row in _spread(prompts, config.prompts)
    ]
    objectives = [
        r.prepare(model, processing_class, cache=cache) if isinstance(r, Reference) else r
        for r in (default_references() if references is None else given_references(references))
    ]
    kinds = examples_by_kind(objectives, config.references)
    _check_counts({"the safety prompts": harmful, **kinds})
    count = _count(layers, config)
    looked_at = list(layers)[: max(count, math.ceil(_ACTING * len(layers)))]
    readers = [name for layer in looked_at for name in layers[layer]]
    found = read_inputs(model, readers, harmful, list(kinds.values()), progress=progress)
    # By what the last of them reads, which in a transformer is the MLP's input.
    scores = {
        layer: separation(found[layers[layer][-1]], config.ridge, config.text_weight)
        for layer in looked_at
    }
    chosen = _first_good_run(scores, count)
    logger.info(
        "contrast adapter on layers %d to %d, which tell prompts apart (d' %.2f to %.2f)",
        chosen[0],
        chosen[-1],
        min(scores[layer] for layer in chosen),
        max(scores[layer] for layer in chosen),
    )
    rank = 2 if any(answer for _, answer in harmful) else 1
    wrapped = contrast_adapter(model, config, lora_config, chosen, rank)
    _set_rows(wrapped, {name: found[name] for n in chosen for name in layers[n]}, config)
    return wrapped


def contrast_adapter(
    model: nn.Module,
    config: ContrastConfig,
    lora_config: LoraConfig | None = None,
    layers: Sequence[int] | None = None,
    rank: int | None = None,
) -> PeftModel:
    """The adapter before its A is set, to plan with.

    Args:
        model: the bare base model.
        config: the settings.
        lora_config: as in `get_contrast_model`.
        layers: which are adapted; ``None`` takes as many as will be, from the middle on.
        rank: rows of A; ``None`` takes those that there are where safety prompts have answers.

    Raises:
        AdapterError: the modules that read the hidden states are not found, or PEFT does not
            adapt them.
    """
    from peft import LoraConfig, get_peft_model

    readers = _readers(model, config)
    if layers is None:
        layers = list(readers)[len(readers) // 2 :][: _count(readers, config)]
    settings = lora_config or LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=2)
    rank = rank or (2 if config.answer_tokens else 1)
    share = rank / settings.r
    alpha = settings.lora_alpha * (math.sqrt(share) if settings.use_rslora else share)
    names = [name for layer in layers for name in readers[layer]]
    wrapped = get_peft_model(
        model,
        replace(
            settings,
            r=rank,
            # A whole number where it is one, as PEFT's configs have it.
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            target_modules=names,
            exclude_modules=None,
            target_parameters=None,
            rank_pattern={},
            init_lora_weights=True,
        ),
    )
    missing = [name for name in names if name not in wrapped.targeted_module_names]
    if missing:
        wrapped.unload()
        raise AdapterError(
            f"PEFT puts no LoRA on {len(missing)} of {len(names)} modules ({missing[0]}), as where "
            "their names stand for the experts of a mixture model. Name others in "
            "`ContrastConfig(target_modules=...)`."
        )
    freeze_contrast(wrapped)
    return wrapped


class _KeptFrozen(nn.Parameter):
    """A parameter that PEFT cannot make trainable; setting `requires_grad` itself can.

    PEFT does so whenever an adapter is switched on again, as TRL's DPO does in every step for the
    pass of its reference policy. Its gradients would count in the norm that is clipped, and a
    checkpoint be computed again otherwise than it was.
    """

    def requires_grad_(self, requires_grad: bool = True) -> _KeptFrozen:
        return self


def freeze_contrast(model: nn.Module) -> None:
    """Freeze the A's of a contrast adapter that was loaded to be trained further.

    They stay so when adapters are switched on and off.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad = False
            parameter.__class__ = _KeptFrozen


def examples_by_kind(objectives: Sequence[Objective], most: int) -> dict[str, list[Tokens]]:
    """The references' examples that are looked at.

    Args:
        objectives: the prepared references.
        most: examples of each.

    Returns:
        By reference, prompts with their answers. A prompt that several references have counts
        once, under the first of them and with its longest answer.
    """
    answers: dict[tuple[int, ...], list[int]] = {}
    owner: dict[tuple[int, ...], str] = {}
    for objective in objectives:
        for prompt, answer in objective.sequences:
            key = tuple(prompt)
            owner.setdefault(key, objective.name)
            if len(answer) >= len(answers.get(key, [])):
                answers[key] = answer
    kinds: dict[str, list[Tokens]] = {}
    for key, name in owner.items():
        kinds.setdefault(name, []).append((list(key), answers[key]))
    return {name: _spread(examples, most) for name, examples in kinds.items()}


def _count(layers: Mapping[int, Any], config: ContrastConfig) -> int:
    return config.layers or max(1, round(0.3 * len(layers)))


def _first_good_run(scores: Mapping[int, float], length: int) -> list[int]:
    """The first layers in a row that tell prompts apart nearly as well as any in a row do.

    From the middle on the layers hardly differ in it. The earlier ones respond less to the form of
    a prompt, and what is added there has more layers left to act through.
    """
    layers = list(scores)
    runs = [layers[i : i + length] for i in range(max(1, len(layers) - length + 1))]
    means = [sum(scores[layer] for layer in run) / len(run) for run in runs]
    least = max(means) - (1 - _NEARLY) * abs(max(means))
    return next(run for run, mean in zip(runs, means, strict=True) if mean >= least)


def _readers(model: nn.Module, config: ContrastConfig) -> dict[int, list[str]]:
    """By layer, the full names of the modules that are adapted."""
    ends = _READERS if config.target_modules is None else config.target_modules
    layers: dict[int, list[str]] = {}
    for name in _text_modules(model):
        number = _LAYER.search(name)
        if number is not None and name.rsplit(".", 1)[-1] in ends:
            layers.setdefault(int(number[1]), []).append(name)
    if not layers:
        raise AdapterError(
            f"No module in a layer of the model is called {', '.join(ends)}. Name those that read "
            "a layer's hidden states in `ContrastConfig(target_modules=...)`."
        )
    return dict(sorted(layers.items()))


def _text_modules(model: nn.Module) -> Iterator[str]:
    """Full names of the modules that text passes through: not those of a vision tower."""
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    for name, _ in decoder.named_modules(prefix=prefix):
        yield name


def _check_counts(kinds: Mapping[str, Sequence[Any]]) -> None:
    """Refuse to take a direction from too little.

    Raises:
        DataError: a kind has too few prompts, or there are no references.
    """
    if len(kinds) == 1:
        raise DataError("A contrast adapter needs references: what should not be refused.")
    for name, examples in kinds.items():
        if len(examples) < FEWEST:
            raise DataError(
                f"A contrast adapter needs at least {FEWEST} prompts of each kind. Found "
                f"{len(examples)} of {name}."
            )


@torch.no_grad()
def _set_rows(model: Any, inputs: Mapping[str, Inputs], config: ContrastConfig) -> None:
    """Set every A from what its module reads; modules that read the same share their rows."""
    rows: dict[int, Tensor] = {}
    for name, read in inputs.items():
        if id(read) not in rows:
            rows[id(read)] = contrast_rows(
                read, config.gain, config.ridge, config.text_weight, config.threshold
            )
        weight = model.get_base_model().get_submodule(name).lora_A["default"].weight
        weight.copy_(rows[id(read)].to(weight))


def _tokens(row: Row, tokenizer: Any, max_length: int, answer_tokens: int) -> Tokens:
    """Token ids of a prompt and of the beginning of its answer, if it has one."""
    name = "a safety prompt"
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        pair = isinstance(row, tuple) and not isinstance(row[0], int)
        prompt, answer = row if pair else (row, [])
        return list(prompt), list(answer)[:answer_tokens]  # type: ignore[arg-type]
    if row.get("input_ids") is not None:
        unlearned = [chat.IGNORE_INDEX] * len(row["input_ids"])
        labels = unlearned if row.get("labels") is None else row["labels"]
        prompt, answer = split_ids({**row, "labels": labels}, max_length, name)
        return prompt, answer[:answer_tokens]
    if tokenizer is None:
        raise ConfigError(
            "The prompts of a contrast adapter are text, and there is no tokenizer. Pass "
            "`processing_class=tokenizer`, or give token ids."
        )
    wanted: str | None
    if "chosen" in row:
        messages, wanted, _ = chat.as_preference(row, name=name)
    else:
        messages, wanted = chat.as_messages(row, name=name)
    ids = chat.encode(tokenizer, messages, wanted, max_length=max_length, name=name)
    return ids[0], ids[1][:answer_tokens]


def _spread(examples: Sequence[Any], most: int) -> list[Any]:
    """At most `most` examples from all over: data is often sorted."""
    step = max(1.0, len(examples) / most)
    return [examples[int(i * step)] for i in range(min(most, len(examples)))]
