"""Multiple choice by likelihood, prompted and scored as by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ogpsa.errors import DataError
from lora_ogpsa.evaluation.likelihood import Score, Tokens

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Args:
        context: the text before the choice.
        choices: the texts that are compared, without the space that precedes them.
        answer: index of the right one.
    """

    context: str
    choices: list[str]
    answer: int


def as_question(row: Mapping[str, Any], style: str = "cloze", *, name: str = "row") -> Question:
    """Read a multiple-choice row as lm-evaluation-harness's tasks would prompt it.

    Args:
        row: ``question``; ``choices`` (a list, or the hub's ``{"text": [...], "label": [...]}``);
            ``answer`` or ``answerKey`` (index from 0, or a label or letter); optional ``subject``.
        style: ``"cloze"`` compares the texts of the choices (as ARC, HellaSwag), ``"letters"``
            lists them and compares their letters (as MMLU, zero-shot).
        name: how error messages call the row.

    Raises:
        DataError: fields are missing, the choices are no list, there are more than letters to list
            them by, or the answer is none of them.
    """
    given: Any = row.get("choices")
    choices, labels = given, None
    if isinstance(given, Mapping):
        choices, labels = given.get("text"), list(given.get("label") or ())
    answer = row.get("answer", row.get("answerKey"))
    if row.get("question") is None or not choices or answer is None:
        raise DataError(
            f"{name}: a multiple-choice row needs `question`, `choices` and `answer` (or "
            f"`answerKey`). Found the fields {sorted(row)}."
        )
    if not isinstance(choices, list | tuple):
        raise DataError(f"{name}: `choices` should be a list. Found {given!r:.100}.")
    choices = [str(choice) for choice in choices]
    index = _index(answer, labels or list(_LETTERS[: len(choices)]))
    if not 0 <= index < len(choices):
        raise DataError(
            f"{name}: the answer {answer!r} is none of the {len(choices)} choices (from 0, or a "
            "letter)."
        )
    question = str(row["question"])
    if style == "cloze":
        return Question(f"Question: {question}\nAnswer:", choices, index)
    letters = _LETTERS[: len(choices)]
    if len(letters) < len(choices):
        raise DataError(
            f"{name}: {len(choices)} choices cannot be listed by {len(letters)} letters. Use "
            "`style: cloze`."
        )
    listed = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)
    )
    about = ""
    if row.get("subject"):
        subject = str(row["subject"]).replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return Question(f"{about}{question.strip()}\n{listed}\nAnswer:", list(letters), index)


def _index(answer: Any, names: list[Any]) -> int:
    """Which choice `answer` means, by its name or number; -1 for none."""
    if isinstance(answer, str):
        if answer in names:
            return names.index(answer)
        return int(answer) if answer.isdecimal() else -1
    # A table with gaps holds whole numbers as floats.
    whole = isinstance(answer, int | float) and float(answer).is_integer()
    return int(answer) if whole else -1


def choice_requests(tokenizer: Any, question: Question, max_length: int) -> list[Tokens]:
    """(context ids, continuation ids) of every choice, each after one space.

    Context and choice are tokenised together and then parted, since the tokens at the seam depend
    on both; what does not fit in `max_length` is cut off on the left.
    """
    context = question.context.rstrip()
    gap = question.context[len(context) :] + " "
    start = list(tokenizer(context)["input_ids"])
    requests = []
    for choice in question.choices:
        whole = list(tokenizer(context + gap + choice)["input_ids"])
        continuation = whole[len(start) :]
        room = max(1, max_length + 1 - len(continuation))
        requests.append((start[-room:], continuation))
    return requests


def judge_choices(question: Question, scores: Sequence[Score]) -> tuple[bool, bool]:
    """Whether the right choice is the most likely one, and so per character.

    The second is lm-evaluation-harness's ``acc_norm``: log-likelihood over the length of the
    choice in characters, its leading space not counted.

    Returns:
        (acc, acc_norm); of equal scores the first counts, as in the harness.
    """
    plain = [s.logprob for s in scores]
    normed = [
        s.logprob / max(1, len(choice)) for s, choice in zip(scores, question.choices, strict=True)
    ]
    return (
        plain.index(max(plain)) == question.answer,
        normed.index(max(normed)) == question.answer,
    )
