"""The folder that a run or a comparison writes to: claiming it, resuming in it, overwriting it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ogpsa.errors import ConfigError, one_line
from lora_ogpsa.recipe_file import as_mapping
from lora_ogpsa.stages import as_yaml, write_yaml

Mappings = Mapping[str, Any]

RECIPE_FILE = "recipe.yaml"


@dataclass
class OutputFolder:
    """A folder and what a run wants to do with it.

    Args:
        path: the folder.
        raw: the recipe's mapping.
        marker: file that holds the recipe; the folder of an earlier run is known by it.
        own: names of everything a run puts into the folder, and all that `overwrite` deletes.
        what: ``"run"`` or ``"comparison"``, for messages.
        overwrite: delete what an earlier run left there.
        resume: go on with an earlier run of the same recipe.
        relevant: the part of a recipe that has to be the same to go on.
        claimed: whether the run has begun to write.
    """

    path: Path
    raw: Mappings
    marker: str
    own: tuple[str, ...]
    what: str
    overwrite: bool
    resume: bool
    relevant: Callable[[Mappings], Mappings] = dict
    claimed: bool = False

    def check(self) -> None:
        """Find out whether `claim` may be called; nothing is changed.

        Raises:
            ConfigError: the folder is in use, or holds the run of another recipe.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "recipes run in one process, and this one was launched as one of several. Start "
                "it with lora-ogpsa itself; for several GPUs use OGPSACallback in a script."
            )
        folder, recipe = self.path, self.path / self.marker
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"`output_dir` {folder} is a file. Choose another folder.")
        if not self._is_occupied():
            return
        if self.resume:
            if not recipe.is_file():
                raise ConfigError(
                    f"{folder} holds no {self.marker}, so there is no {self.what} to resume in it."
                )
            check_same_recipe(recipe, self.raw, self.relevant)
        elif not self.overwrite:
            raise ConfigError(
                f"the output folder {folder} is not empty. Pass --resume to go on with the "
                f"{self.what} in it, --overwrite to delete that {self.what}, or --output-dir for "
                "another folder."
            )
        elif not recipe.is_file():
            raise ConfigError(
                f"{folder} is not the folder of an earlier {self.what} (it has no {self.marker}), "
                "so --overwrite leaves it alone. Choose another `output_dir`."
            )

    def claim(self) -> None:
        """Make the folder ready for a run that is known to be able to begin; leave its recipe.

        Raises:
            ConfigError: as `check`.
        """
        self.check()
        self.claimed = True
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resume or not self._is_occupied():
            for name in self.own:
                mine = self.path / name
                shutil.rmtree(mine) if mine.is_dir() else mine.unlink(missing_ok=True)
        write_yaml(self.path / self.marker, dict(self.raw))

    def _is_occupied(self) -> bool:
        """Whether there is more than what a run leaves that failed before its first result."""
        recipes = (self.marker, RECIPE_FILE)
        return self.path.is_dir() and any(
            path.is_symlink()
            or not (path.is_dir() or (path.name in recipes and _is_written_by_a_run(path)))
            for path in self.path.rglob("*")
        )


def _is_written_by_a_run(recipe: Path) -> bool:
    """Whether a recipe looks as a run writes it, and not as people do."""
    try:
        text = recipe.read_text(encoding="utf-8")
        return text == as_yaml(yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def check_same_recipe(
    path: Path, raw: Mappings, relevant: Callable[[Mappings], Mappings] = dict
) -> None:
    """Refuse to go on with a recipe other than the one in `path`; the folder may have moved.

    Raises:
        ConfigError: a key changed; it is named. Or the file is damaged.
    """
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}, by which --resume knows its run, cannot be read: {one_line(error)}. Put the "
            "recipe in its place, or start anew with --overwrite."
        ) from error
    earlier = relevant(as_mapping(kept, str(path)))
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
