"""The Trainer's checkpoints of a stage: the newest, and whether a training can go on from it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from lora_ogpsa.errors import StateError, one_line
from lora_ogpsa.state import STATE_FILE

# Written last: a save that was cut off lacks it.
_LAST = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"
# Of these transformers goes on without most in silence, and training would be another one.
_NEEDED = (_ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", _LAST)
# A GradScaler's state, OGPSA's, and DPO's frozen copy of the adapter it began with.
_OPTIONAL = ("scaler.pt", STATE_FILE, f"*/{_ADAPTER}")


def last_checkpoint(folder: Path) -> Path | None:
    """The Trainer's newest complete checkpoint in `folder`."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / _LAST).is_file()
    ]
    return max(found)[1] if found else None


def check_checkpoint(folder: Path) -> None:
    """Read through what a training in one process goes on from.

    Raises:
        StateError: a file is missing or damaged.
    """
    files = [folder / name for name in _NEEDED]
    files += [file for name in _OPTIONAL for file in sorted(folder.glob(name))]
    for file in files:
        damage = _damage(file) if file.is_file() else "is missing"
        if damage is not None:
            raise StateError(
                f"{file} {damage}. Delete {folder} and repeat the command with --resume: training "
                "goes on from the checkpoint before it, or begins anew."
            )


def _damage(file: Path) -> str | None:
    """What is wrong with a file; nothing in it is unpickled."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
            return None
        with zipfile.ZipFile(file) as archive:
            torn = archive.testzip()
        return None if torn is None else f"is damaged: {torn} in it cannot be read"
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"cannot be read ({one_line(error)})"
