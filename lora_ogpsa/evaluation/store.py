"""Finished results on disk, keyed by content, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Part of every key: raise it when a change of code changes what a stored result would be.
_VERSION = 1


def content_key(*parts: Any) -> str:
    """SHA-256 over `parts`: equal content, equal key; anything else, another key.

    Values that JSON does not know are taken as text: rows of tables hold dates, bytes, decimals.
    """
    text = json.dumps([_VERSION, *parts], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Section:
    """Results of one kind for one model: a dictionary that is also a JSON Lines file.

    The file is named after the model's fingerprint and the fingerprint is part of every key, so
    results of two models cannot meet, not even in a file renamed or joined by hand.

    Args:
        path: file of the section; ``None`` keeps results in memory only.
        fingerprint: of the model (see `fingerprints`), or of whatever else produced the results.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def key(self, *parts: Any) -> str:
        """Key of a result of this section that depends on `parts` besides the model."""
        return content_key(self.fingerprint, *parts)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep `results` (key to JSON-able value), on disk before this returns."""
        if not results:
            return
        self._known.update(results)
        if self.path is None:
            return
        lines = "".join(
            json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
            for key, value in results.items()
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One unbuffered append per batch: two processes may share the file.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "rb+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                # A line torn by an interruption must not swallow the first of ours.
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    lines = "\n" + lines
            file.write(lines.encode())

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue  # blank, or torn by an interruption: that result is computed again


class Store:
    """A folder of sections.

    Args:
        folder: where results are kept; ``None`` keeps them in memory for the life of the object.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._sections: dict[tuple[str, str], Section] = {}

    def section(self, kind: str, fingerprint: str) -> Section:
        """The section for results of `kind` produced by the model of that fingerprint."""
        name = (kind, fingerprint)
        if name not in self._sections:
            path = None
            if self.folder is not None:
                path = self.folder / f"{kind}-{fingerprint[:32]}.jsonl"
            self._sections[name] = Section(path, fingerprint)
        return self._sections[name]
