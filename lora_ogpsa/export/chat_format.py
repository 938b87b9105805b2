"""What a chat template writes around each message, found by rendering it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Words no template contains, and that no template trims or escapes.
_SYSTEM, _USER, _ANSWER, _AGAIN = "Qsystemq", "Quserq", "Qanswerq", "Qagainq"


@dataclass(frozen=True)
class ChatFormat:
    """The fixed text of a chat template.

    Attributes:
        system: Text before and after a system message.
        user: Text before and after a user message.
        assistant: Text before and after an answer.
        default_system: The system message the template adds when none is given, if any.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str | None


def _render(tokenizer: Any, *messages: tuple[str, str], prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    bos = tokenizer.bos_token
    # llama.cpp adds bos itself where the tokenizer wants one.
    adds_bos = bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def assistant_ending(tokenizer: Any) -> str:
    """Returns what the template writes after an answer: the end of the turn, if it has one."""
    text = _render(tokenizer, ("user", _USER), ("assistant", _ANSWER))
    return text.partition(_ANSWER)[2]


def read_chat_format(tokenizer: Any) -> ChatFormat | None:
    """Takes a chat template apart.

    Args:
        tokenizer: A tokenizer with a chat template.

    Returns:
        The parts, or None where the template is not a plain concatenation of them (the parts are
        put together again and must give the template's own rendering of a longer conversation).
    """
    from jinja2 import TemplateError

    turns = [("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN)]
    try:
        whole = _render(tokenizer, *turns, prompt=True)
        unanswered = _render(tokenizer, ("system", _SYSTEM), ("user", _USER))
        alone = _render(tokenizer, ("user", _USER), prompt=True)
    except (TemplateError, ValueError, TypeError):
        return None
    pieces = _split(whole, (_SYSTEM, _USER, _ANSWER, _AGAIN))
    if pieces is None:
        return None
    system_head, between, to_answer, to_again, _ = pieces
    user_tail = unanswered.partition(_USER)[2]
    answer_tail = assistant_ending(tokenizer)
    user_head = to_again.removeprefix(answer_tail)
    system = (system_head, between.removesuffix(user_head))
    user = (user_head, user_tail)
    answer = (to_answer.removeprefix(user_tail), answer_tail)
    again = (
        f"{system[0]}{_SYSTEM}{system[1]}{user[0]}{_USER}{user[1]}{answer[0]}{_ANSWER}{answer[1]}"
        f"{user[0]}{_AGAIN}{user[1]}{answer[0]}"
    )
    if again != whole:
        return None
    return ChatFormat(system, user, answer, _default_system(alone, system, user_head))


def _split(text: str, words: tuple[str, ...]) -> list[str] | None:
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _default_system(text: str, system: tuple[str, str], user_head: str) -> str | None:
    before = text.partition(_USER)[0].removesuffix(user_head)
    if not before or not before.startswith(system[0]) or not before.endswith(system[1]):
        return None
    return before[len(system[0]) : len(before) - len(system[1])] or None
