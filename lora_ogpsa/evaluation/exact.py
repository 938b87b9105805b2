"""Exact match of numeric answers, as lm-evaluation-harness scores GSM8K."""

from __future__ import annotations

import re

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict_number(text: str) -> str | None:
    """The first number after ``#### ``, or ``None``."""
    found = _STRICT.search(text)
    return _normal(found.group(1)) if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere in `text`, or ``None``."""
    found = [match.group(0) for match in _NUMBER.finditer(text)]
    return _normal(found[-1]) if found else None


def gold_number(answer: str) -> str:
    """The right answer: what follows ``#### ``, or all of `answer` where it has no such mark."""
    return _normal(answer.split("#### ")[-1])


def _normal(number: str) -> str:
    """Without thousands separators, dollar signs and a full stop at the end.

    Numbers are compared as strings, as in the harness: ``18.00`` is not ``18``.
    """
    return re.sub(r"\.$", "", number.strip().replace(",", "").replace("$", "")).lower()
