"""What a projector has learned, on disk: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ogpsa.errors import StateError

FORMAT = 1
TENSORS, FACTS = "ogpsa.safetensors", "ogpsa.json"


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state into `folder`, which exists.

    Both files are written under other names first; the JSON file, without which a state is not
    read, appears last. A process killed at any moment leaves either a whole state or none.
    """
    from safetensors.torch import save_file

    named = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    partial = folder / f".{TENSORS}.partial"
    save_file(named, partial)
    _flush(partial)
    os.replace(partial, folder / TENSORS)
    partial = folder / f".{FACTS}.partial"
    partial.write_text(json.dumps({"format": FORMAT, **facts}, indent=1))
    _flush(partial)
    os.replace(partial, folder / FACTS)


def has_state(folder: Path) -> bool:
    """Whether a whole state lies in `folder`."""
    return (folder / FACTS).is_file() and (folder / TENSORS).is_file()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        StateError: there is none, it cannot be read, or it has a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not has_state(folder):
        raise StateError(f"There is no OGPSA state in {folder} ({FACTS} and {TENSORS}).")
    try:
        facts = json.loads((folder / FACTS).read_text())
        tensors = load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError, OSError) as error:
        raise StateError(
            f"The OGPSA state in {folder} cannot be read ({error}). Resume from an earlier "
            "checkpoint."
        ) from error
    if facts.get("format", 0) > FORMAT:
        raise StateError(
            f"The OGPSA state in {folder} has format {facts['format']}; this version reads up to "
            f"{FORMAT}. Update lora_ogpsa."
        )
    return tensors, facts


def require_equal(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Compare two descriptions entry by entry.

    Raises:
        StateError: they differ; the first difference is named.
    """
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise StateError(
                f"The saved OGPSA state belongs to another {what}: `{key}` was "
                f"{found.get(key)!r} and is {expected.get(key)!r} now. Resume with what it was, or "
                "start a new run."
            )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
