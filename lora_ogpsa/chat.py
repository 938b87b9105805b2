"""Rows as chat messages, as token ids, as padded batches.

The walk of a row: `data.load_rows` -> `as_messages` or `as_preference` -> `encode` -> `collate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_ogpsa.errors import DataError, one_line

IGNORE_INDEX = -100
# Of every rendering. A template that thinks by default would leave no room for the answer, and end
# prompts elsewhere than before the answers of rows, which hold no thoughts.
TEMPLATE_SETTINGS = {"enable_thinking": False}

# Key of a conversation's first turn under which the row's `tools` go along, for the template.
TOOLS = "tools of the row"

_PROMPT_FIELDS = ("prompt", "question", "instruction")
_ANSWER_FIELDS = ("completion", "response", "answer", "output")
_ACCEPTED = (
    "`messages`; `prompt`, `question` or `instruction` (+ `input`), with an optional "
    "`completion`, `response`, `answer` or `output`"
)
# By Python or as JSON.
_WRITTEN_OUT = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


# --------------------------------------------------------------------------------- rows as chat


def as_messages(row: Mapping[str, Any], *, name: str = "row") -> tuple[list[dict], str | None]:
    """Split a row into the conversation to answer and the answer.

    Earlier assistant turns, system and tool turns stay in the conversation. A blank answer counts
    as none.

    Args:
        row: `messages`; or `prompt` (text or messages), `question` or `instruction` (+ `input`),
            with an optional `completion`, `response`, `answer` or `output` (text or messages).
            A text in `system` is the first turn of a conversation that has no other for it, and
            `tools` (a list, or JSON) is what the template says may be called.
        name: how error messages call the row.

    Returns:
        The messages up to the turn to answer, and the assistant's answer or None.

    Raises:
        DataError: no accepted field is present, or one holds something that is not text.
    """
    if row.get("messages") is not None:
        turns = _turns(row["messages"], "messages", name)
        return _split_answer(_with_rest(row, turns, name), name)
    field = next((f for f in _PROMPT_FIELDS if row.get(f) is not None), None)
    if field is None:
        raise DataError(
            f"{name}: no conversation found; the fields are {_fields(row)}; accepted are "
            f"{_ACCEPTED}"
        )
    turns = _turns(row[field], field, name)
    if field == "instruction" and row.get("input"):
        turns[-1]["content"] += "\n\n" + _text(row["input"], "input", name)
    answer_field = next((f for f in _ANSWER_FIELDS if row.get(f) is not None), None)
    if answer_field is not None:
        turns += _turns(row[answer_field], answer_field, name, role="assistant")
    return _split_answer(_with_rest(row, turns, name), name)


def _with_rest(row: Mapping[str, Any], turns: list[dict], name: str) -> list[dict]:
    """`turns` with what the row says of them elsewhere."""
    turns = _with_system(row, turns, name)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{name}: `tools` is a text but no JSON: {one_line(error)}") from error
    if not tools:
        return turns
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{name}: `tools` must be a list of objects, found {tools!r:.60}")
    return [{**turns[0], TOOLS: tools}, *turns[1:]]


def _with_system(row: Mapping[str, Any], turns: list[dict], name: str) -> list[dict]:
    """`turns` after the row's `system`, if it has one and they have none of their own."""
    content = "" if row.get("system") is None else _text(row["system"], "system", name)
    own = [turn for turn in turns if turn["role"] == "system"]
    if not content.strip() or any(turn["content"].strip() for turn in own):
        return turns
    others = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": content}, *others]


def as_preference(row: Mapping[str, Any], *, name: str = "row") -> tuple[list[dict], str, str]:
    r"""Split a preference row into prompt messages, chosen answer and rejected answer.

    Args:
        row: `chosen` and `rejected`, each an answer (text or messages) to `prompt` (text or
            messages), or each a whole conversation: messages, a "\n\nHuman: ...
            \n\nAssistant: ..." transcript, or texts with a common beginning. `system` and
            `tools` are as in `as_messages`.
        name: how error messages call the row.

    Raises:
        DataError: a field is missing, or the two conversations do not share all but the answer.
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        raise DataError(
            f"{name}: no preference pair found; the fields are {_fields(row)}; accepted are "
            "`chosen` and `rejected`, with an optional `prompt`"
        )
    sides = (row["chosen"], row["rejected"])
    if row.get("prompt") is None and all(isinstance(side, str) for side in sides):
        if not all(_TRANSCRIPT_TURN.match(side) for side in sides):
            chosen_text = _text(sides[0], "chosen", name)
            rejected_text = _text(sides[1], "rejected", name)
            prompt, *texts = _split_common_text(chosen_text, rejected_text, name)
            return _with_rest(row, prompt, name), texts[0], texts[1]
        sides = (_transcript(sides[0]), _transcript(sides[1]))
    chosen = _turns(sides[0], "chosen", name, role="assistant")
    rejected = _turns(sides[1], "rejected", name, role="assistant")
    if max(len(chosen), len(rejected)) > 1:
        # Whole conversations; a `prompt` beside them only repeats their beginning (TRL agrees).
        prompt = chosen[:-1]
        if prompt != rejected[:-1]:
            raise DataError(
                f"{name}: `chosen` ({len(chosen)} turns) and `rejected` ({len(rejected)} turns) "
                "must be the same conversation up to the last turn"
            )
    elif row.get("prompt") is None:
        raise DataError(
            f"{name}: `chosen` and `rejected` hold one turn each and there is no `prompt`; add "
            "one, or give whole conversations"
        )
    else:
        prompt = _turns(row["prompt"], "prompt", name)
    answers = [_split_answer([*prompt, side[-1]], name)[1] for side in (chosen, rejected)]
    if answers[0] is None or answers[1] is None:
        raise DataError(f"{name}: `chosen` and `rejected` must end with an assistant's answer")
    return _with_rest(row, prompt, name), answers[0], answers[1]


def _split_common_text(chosen: str, rejected: str, name: str) -> tuple[list[dict], str, str]:
    """The prompt is the common beginning, as in TRL, but it never ends inside a word."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared))
    if cut < 1 or not (chosen[:cut].strip() and chosen[cut:].strip() and rejected[cut:].strip()):
        raise DataError(
            f"{name}: `chosen` and `rejected` share no beginning to take as the prompt, or one is "
            "nothing but it; add a `prompt` field"
        )
    prompt = [{"role": "user", "content": chosen[:cut].strip()}]
    return prompt, chosen[cut:].strip(), rejected[cut:].strip()


def _transcript(text: str) -> list[dict]:
    roles = {"Human": "user", "Assistant": "assistant"}
    parts = _TRANSCRIPT_TURN.split(text)[1:]
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _turns(value: Any, field: str, name: str, role: str = "user") -> list[dict]:
    """`value` as messages with text contents: a text becomes one turn of `role`."""
    if isinstance(value, str):
        if _WRITTEN_OUT.match(value):
            raise DataError(
                f"{name}: `{field}` holds messages written out as a text, as in a CSV file. Save "
                "them as lists: in JSON Lines or parquet"
            )
        return [{"role": role, "content": _text(value, field, name)}]
    turns = []
    for i, turn in enumerate(_sequence(value, field, name)):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(
                f"{name}: `{field}`, turn {i + 1}: expected an object with `role` and `content`, "
                f"found {_fields(turn) if isinstance(turn, Mapping) else type(turn).__name__}"
            )
        content = turn.get("content")
        if content is None and turn.get("tool_calls"):
            content = ""  # templates concatenate it
        # Tables fill absent keys with None, which a template's `is defined` takes for present.
        kept = {key: item for key, item in turn.items() if item is not None}
        turns.append({**kept, "content": _text(content, f"{field}, turn {i + 1}", name)})
    if not turns:
        raise DataError(f"{name}: `{field}` is empty")
    return turns


def _sequence(value: Any, field: str, name: str) -> Sequence[Any]:
    if not isinstance(value, Sequence):
        raise DataError(
            f"{name}: `{field}` must be text or a list of messages, found {type(value).__name__}"
        )
    return value


def _text(value: Any, field: str, name: str) -> str:
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(
            f"{name}: `{field}` must be text, found {type(value).__name__}: {value!r:.60}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: `{field}` holds half a character ({value[error.start]!a}), as texts do that "
            "were cut inside of an emoji, and no tokenizer takes it; leave it or the row out"
        ) from error
    return value


def _split_answer(turns: list[dict], name: str) -> tuple[list[dict], str | None]:
    answered = turns[-1]["role"] == "assistant"
    prompt = turns[:-1] if answered else turns
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in prompt):
        raise DataError(
            f"{name}: no user turn with text to answer; the turns are "
            f"{', '.join(turn['role'] for turn in turns)}"
        )
    if not answered:
        return prompt, None
    if turns[-1].get("tool_calls"):
        raise DataError(f"{name}: the last turn is a tool call; an answer must be text")
    answer: str = turns[-1]["content"]
    return prompt, answer if answer.strip() else None


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in row) or "none"


# ------------------------------------------------------------------------------ rows as tokens


def encode(
    tokenizer: Any,
    messages: list[dict],
    answer: str | None,
    *,
    max_length: int,
    name: str = "row",
) -> tuple[list[int], list[int]]:
    r"""Token ids of a conversation and of the answer to it.

    The prompt ends where the model is to go on (the template's generation prompt). The answer
    ends with the end-of-turn token that the template renders; a line break that the template puts
    after it is left out, as a model stops at that token and never writes it. An answer that is
    too long is cut at the end, a prompt never. Models that can think before they answer are told
    not to. Without a chat template the text is "user\n\nanswer" and the end-of-sequence token.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation up to the turn to answer.
        answer: the answer, or None to get the prompt alone.
        max_length: most tokens of prompt and answer together.
        name: how error messages call the row.

    Returns:
        The prompt's ids and the answer's ids (empty without an answer).

    Raises:
        DataError: the prompt leaves no room for an answer, or the template refuses the messages.
    """
    if tokenizer.chat_template:
        prompt_text = render(tokenizer, messages, name, add_generation_prompt=True)
        prompt = tokenizer(prompt_text, add_special_tokens=False).input_ids
    else:
        prompt_text = "".join(turn["content"] + "\n\n" for turn in messages)
        prompt = tokenizer(prompt_text).input_ids  # with the special tokens of a plain document
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
    room = room_for_answer(prompt, max_length, name)
    if answer is None:
        return prompt, []
    tail = answer + (tokenizer.eos_token or "")
    if tokenizer.chat_template:
        whole = [*messages, {"role": "assistant", "content": answer}]
        text = render(tokenizer, whole, name)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
            return prompt, _end_at_eos(tokenizer, ids[len(prompt) :])[:room]
        if text.startswith(prompt_text):  # a token straddles the border: tokenise the rest alone
            tail = text[len(prompt_text) :]
    tail_ids = tokenizer(tail, add_special_tokens=False).input_ids
    return prompt, _end_at_eos(tokenizer, tail_ids)[:room]


def room_for_answer(prompt: Sequence[int], max_length: int, name: str) -> int:
    """How many tokens an answer may have after a prompt.

    Args:
        prompt: its token ids.
        max_length: most tokens of prompt and answer together.
        name: how error messages call the row.

    Raises:
        DataError: none.
    """
    room = max_length - len(prompt)
    if room < 1:
        raise DataError(
            f"{name}: the prompt has {len(prompt)} tokens and max_length is {max_length}, which "
            "leaves no room for an answer; raise max_length or leave the row out"
        )
    return room


def render(
    tokenizer: Any, messages: list[dict], name: str = "row", *, add_generation_prompt: bool = False
) -> str:
    """A conversation as a text, by the tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation; its first turn may carry the tools that may be called.
        name: how error messages call the row.
        add_generation_prompt: whether the text ends where the model is to answer.

    Raises:
        DataError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    messages, tools = without_tools(messages)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **TEMPLATE_SETTINGS,
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise DataError(
            f"{name}: the model's chat template refuses the turns ({roles}): {one_line(error)}"
        ) from error


def without_tools(messages: list[dict]) -> tuple[list[dict], list[Any] | None]:
    """A conversation as datasets have it, and the tools that it carried, if any."""
    first = dict(messages[0])
    tools = first.pop(TOOLS, None)
    return [first, *messages[1:]], tools


def _end_at_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Leave out what follows the last end-of-sequence token if that is only white space."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return ids
    end = len(ids) - ids[::-1].index(eos)
    return ids if tokenizer.decode(ids[end:]).strip() else ids[:end]


def collate(
    examples: Sequence[tuple[list[int], list[int]]], pad_id: int, side: str = "right"
) -> dict[str, torch.Tensor]:
    """Pad (prompt, answer) pairs into one batch.

    Args:
        examples: B pairs of token ids, as `encode` gives them.
        pad_id: token id that fills up the shorter rows.
        side: "right" (training) or "left" (generation): where the padding goes.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 of shape [B, T], T the longest
        pair. Labels are -100 on prompts and padding.

    Raises:
        DataError: there are no examples, or `side` is neither "right" nor "left".
    """
    if not examples:
        raise DataError("no examples to put in a batch")
    if side not in ("right", "left"):
        raise DataError(f'side must be "right" or "left", found {side!r}')
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(examples):
        size = len(prompt) + len(answer)
        start = 0 if side == "right" else length - size
        input_ids[i, start : start + size] = torch.tensor([*prompt, *answer], dtype=torch.long)
        attention_mask[i, start : start + size] = 1
        labels[i, start + len(prompt) : start + size] = torch.tensor(answer, dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
