"""Training rows as TRL wants them, every row checked before anything is trained."""

from __future__ import annotations

import json
from typing import Any

from lora_ogpsa import chat, data
from lora_ogpsa.errors import DataError, ModelError
from lora_ogpsa.models import cache_dir
from lora_ogpsa.recipe import Stage

Turns = list[dict[str, Any]]


def checked_rows(stage: Stage, tokenizer: Any | None) -> list[dict[str, Any]]:
    """The rows of a stage as conversations, each of them checked; no model is needed.

    Args:
        stage: what to read.
        tokenizer: measures the prompts; without it their length is not checked.

    Returns:
        ``prompt`` and ``completion``, or for preference data ``prompt``, ``chosen`` and
        ``rejected``: each a list of messages, so that TRL trains on the answers only.

    Raises:
        DataError: a row lacks fields, or its prompt leaves no room for an answer; or no batch would
            be whole where others are left out.
        ModelError: the tokenizer has no chat template, or not the token to pad with.
    """
    if tokenizer is not None:
        _check_tokenizer(stage, tokenizer)
    rows = []
    pairs = stage.trainer == "dpo" and stage.rejected == "data"
    for number, row in enumerate(_loaded(stage), start=1):
        place = f"{stage.dataset_name}, row {number}"
        read = _preference(row, place) if pairs else _answered(row, place)
        if tokenizer is not None:
            prompt_ids(stage, tokenizer, read["prompt"], place)
        rows.append(read)
    if not stage.argument("packing"):
        check_batches(stage, len(rows))
    return rows


def check_batches(stage: Stage, sequences: int) -> None:
    """Refuse a training without a batch.

    Args:
        stage: the stage.
        sequences: how many there are to train on: rows, or what they are packed into.

    Raises:
        DataError: no batch would be whole where others are left out.
    """
    batch = stage.argument("per_device_train_batch_size")
    if stage.argument("dataloader_drop_last") and sequences < batch:
        units = "packed sequences" if stage.argument("packing") else "rows"
        raise DataError(
            f"{stage.dataset_name}: {sequences} {units} fill no batch of {batch}, and "
            "`dataloader_drop_last` leaves incomplete ones out"
        )


def _check_tokenizer(stage: Stage, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, by which rows become "
            "text. Take the chat model, or put its chat_template.jinja into the model's folder."
        )
    padding = stage.argument("pad_token")
    if padding is not None and padding not in tokenizer.get_vocab():
        raise ModelError(
            f"stage `{stage.name}`: `pad_token` {padding!r} is not in the vocabulary of the "
            f"tokenizer {tokenizer.name_or_path}."
        )


def training_rows(
    stage: Stage, rows: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """Checked rows as the stage's trainer takes them, rendered as `chat.encode` does.

    With ``rejected: base`` the model answers every prompt, its adapters switched off, and its
    answer is the rejected side. An answer that refuses already is no example of what to avoid, so
    its row is left out.

    Raises:
        DataError: the base model's own answers make no pair.
    """
    if stage.rejected == "base":
        rows = _against_base(stage, rows, model, tokenizer)
    rows = [_with_tools(row) for row in rows]
    # Most templates do not have it, and their rows go without the column.
    if not any(name in str(tokenizer.chat_template) for name in chat.TEMPLATE_SETTINGS):
        return rows
    return [{**row, "chat_template_kwargs": chat.TEMPLATE_SETTINGS} for row in rows]


def _against_base(
    stage: Stage, rows: list[dict[str, Any]], model: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """Pairs of the rows' answers and the base model's own."""
    from lora_ogpsa.answers import own_answers
    from lora_ogpsa.evaluation import RefusalPhraseJudge

    found = own_answers(
        model,
        tokenizer,
        [prompt_ids(stage, tokenizer, row["prompt"], stage.dataset_name) for row in rows],
        max_new_tokens=stage.rejected_max_new_tokens,
        cache=cache_dir(),
        title="rejected side: the base model answers",
    )
    pairs = []
    for row, ids in zip(rows, found, strict=True):
        rejected = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if rejected and not RefusalPhraseJudge.refuses(rejected):
            pairs.append(
                {
                    "prompt": row["prompt"],
                    "chosen": row["completion"],
                    "rejected": _turn(rejected),
                }
            )
    if not pairs:
        raise DataError(
            f"{stage.dataset_name}: the base model refuses or says nothing on all {len(rows)} "
            "prompts, so `rejected: base` finds no preference pair. Give preference data, or "
            "prompts that it answers."
        )
    return pairs


def _with_tools(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its tools where TRL looks for them."""
    prompt, tools = chat.without_tools(row["prompt"])
    # As a text: in a table of fixed columns each tool would get the arguments of all.
    return row if tools is None else {**row, "prompt": prompt, "tools": json.dumps(tools)}


def _answered(row: dict[str, Any], place: str) -> dict[str, Any]:
    prompt, answer = chat.as_messages(row, name=place)
    if answer is None:
        raise DataError(
            f"{place}: no answer to train on; the fields are "
            f"{', '.join(f'`{key}`' for key in row)}. Add a `completion`, or end `messages` with "
            "an assistant turn."
        )
    return {"prompt": prompt, "completion": _turn(answer)}


def _preference(row: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        prompt, chosen, rejected = chat.as_preference(row, name=place)
    except DataError as error:
        raise DataError(
            f"{error}. If its rows hold good answers only, `rejected: base` takes the base "
            "model's own answer as the rejected one."
        ) from error
    return {"prompt": prompt, "chosen": _turn(chosen), "rejected": _turn(rejected)}


def _loaded(stage: Stage) -> list[dict[str, Any]]:
    return data.load_rows(
        stage.dataset_name,
        config=stage.dataset_config,
        split=stage.dataset_train_split,
        limit=stage.dataset_limit,
        # Drawn, because data sets are often sorted; in order if there is nothing to draw.
        shuffle_seed=stage.argument("seed") if stage.dataset_limit else None,
    )


def prompt_ids(stage: Stage, tokenizer: Any, prompt: Turns, place: str) -> list[int]:
    """Token ids of a prompt, which has to leave room for an answer.

    Raises:
        DataError: it leaves none.
    """
    limit = stage.argument("max_length") or tokenizer.model_max_length
    return chat.encode(tokenizer, prompt, None, max_length=limit, name=place)[0]


def _turn(answer: str) -> Turns:
    return [{"role": "assistant", "content": answer}]
