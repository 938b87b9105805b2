"""What a projector has learned, on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ogpsa.errors import StateError

FORMAT = 1
STATE_FILE = "ogpsa.safetensors"
# Key of the JSON values in the file's metadata: in a file of their own they could belong to other
# tensors than those beside them, after a kill between two writes.
_FACTS = "ogpsa"


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON values into `folder`, which is made if it is not there.

    The file is written under another name first. A process killed at any moment leaves the whole
    new state or the whole earlier one.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    named = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    partial = folder / f".{STATE_FILE}.partial"
    save_file(named, partial, metadata={_FACTS: json.dumps({"format": FORMAT, **facts})})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE_FILE)


def has_state(folder: Path) -> bool:
    """Whether a state lies in `folder`."""
    return (folder / STATE_FILE).is_file()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        StateError: there is none, it cannot be read, or it has a newer format.
    """
    return _read(folder, tensors=True)


def load_facts(folder: Path) -> dict[str, Any]:
    """Read the JSON values alone; the tensors may be large.

    Raises:
        StateError: as in :func:`load_state`.
    """
    return _read(folder, tensors=False)[1]


def _read(folder: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not has_state(folder):
        raise StateError(f"There is no OGPSA state in {folder} ({STATE_FILE}).")
    try:
        with safe_open(folder / STATE_FILE, "pt") as file:
            facts = json.loads(file.metadata()[_FACTS])
            names = list(file.keys()) if tensors else []
            found = {name: file.get_tensor(name) for name in names}
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise StateError(
            f"The OGPSA state in {folder} cannot be read ({error}). Resume from an earlier "
            "checkpoint."
        ) from error
    if facts.get("format", 0) > FORMAT:
        raise StateError(
            f"The OGPSA state in {folder} has format {facts['format']}; this version reads up to "
            f"{FORMAT}. Update lora_ogpsa."
        )
    return found, facts


def require_near(found: dict[str, float], expected: dict[str, float]) -> None:
    """The weights that a state was saved beside must be those that training goes on from.

    Args:
        found: the length of each parameter when the state was saved.
        expected: the same now.

    Raises:
        StateError: one differs by more than rounding would explain.
    """
    for name in found.keys() & expected.keys():
        if not math.isclose(found[name], expected[name], rel_tol=1e-2, abs_tol=1e-6):
            raise StateError(
                f"The saved OGPSA state belongs to other weights: `{name}` had length "
                f"{found[name]:.6g} and has {expected[name]:.6g}. Load the checkpoint's weights "
                "first; where the Trainer resumes from another folder than its `output_dir`, pass "
                "OGPSACallback(resume_from_checkpoint=...)."
            )


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
