"""The folder that a run or a comparison writes to: claiming it, resuming in it, overwriting it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_ogpsa.errors import ConfigError
from lora_ogpsa.stages import write_yaml

Mappings = Mapping[str, Any]


def claim_folder(
    folder: Path,
    raw: Mappings,
    *,
    marker: str,
    own: Iterable[str],
    what: str,
    overwrite: bool,
    resume: bool,
    relevant: Callable[[Mappings], Mappings] = dict,
) -> None:
    """Make `folder` ready for a run and leave its recipe in it.

    Args:
        folder: the folder.
        raw: the recipe's mapping.
        marker: file that holds the recipe; the folder of an earlier run is known by it.
        own: names of everything a run puts into the folder, and all that `overwrite` deletes.
        what: ``"run"`` or ``"comparison"``, for messages.
        overwrite: delete what an earlier run left there.
        resume: go on with an earlier run of the same recipe.
        relevant: the part of a recipe that has to be the same to go on.

    Raises:
        ConfigError: the folder is in use, or holds the run of another recipe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "recipes run in one process, and this one was launched as one of several. Start "
            "it with lora-ogpsa itself; for several GPUs use OGPSACallback in a script."
        )
    path = folder / marker
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output_dir` {folder} is a file. Choose another folder.")
    occupied = folder.exists() and any(folder.iterdir())
    if occupied and resume:
        if not path.is_file():
            raise ConfigError(f"{folder} holds no {marker}, so there is no {what} to resume in it.")
        check_same_recipe(path, raw, relevant)
    elif occupied and overwrite:
        if not path.is_file():
            raise ConfigError(
                f"{folder} is not the folder of an earlier {what} (it has no {marker}), "
                "so --overwrite leaves it alone. Choose another `output_dir`."
            )
        for name in own:
            mine = folder / name
            shutil.rmtree(mine) if mine.is_dir() else mine.unlink(missing_ok=True)
    elif occupied:
        raise ConfigError(
            f"the output folder {folder} is not empty. Pass --resume to go on with the {what} in "
            f"it, --overwrite to delete that {what}, or --output-dir for another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(path, dict(raw))


def check_same_recipe(
    path: Path, raw: Mappings, relevant: Callable[[Mappings], Mappings] = dict
) -> None:
    """Refuse to go on with a recipe other than the one in `path`; the folder may have moved.

    Raises:
        ConfigError: a key changed; it is named.
    """
    earlier = relevant(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = relevant(yaml.safe_load(yaml.safe_dump(dict(raw))))
    changed = sorted(
        key for key in {*earlier, *now} - {"output_dir"} if earlier.get(key) != now.get(key)
    )
    if changed:
        keys = ", ".join(f"`{key}`" for key in changed)
        raise ConfigError(
            f"--resume goes on with the same recipe, but {keys} changed since {path}. "
            "Undo that, or start anew with --overwrite."
        )
