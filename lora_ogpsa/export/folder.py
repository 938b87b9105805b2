"""Folders that appear whole or not at all, and the disk space they need."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.model_files import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# In every merged model, and in no other folder.
REPORT_JSON = "merge_report.json"
# Beyond the tensors: tokenizer, reports, file-system blocks.
SPACE_MARGIN = 64 * 1024**2


def require_space(folder: Path, needed: int, what: str) -> None:
    """Checks that a folder's disk can take `needed` more bytes.

    Args:
        folder: Where the files will go; it need not exist yet.
        needed: Bytes to be written, without the margin this function adds.
        what: What will be written, for the message.

    Raises:
        ExportError: The disk has less free space than that.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + SPACE_MARGIN:
        raise ExportError(
            f"{what} needs {(needed + SPACE_MARGIN) / 1e9:.2f} GB, but only {free / 1e9:.2f} GB "
            f"are free on the disk of {existing}. Free some space or choose another disk."
        )


def check_output(output: Path, *, overwrite: bool, inputs: list[Path]) -> None:
    """Refuses an output folder that would destroy something.

    Args:
        output: The folder to be made.
        overwrite: Whether an earlier export in that place may be replaced.
        inputs: Folders that are read during the export.

    Raises:
        ExportError: The folder exists and may not be replaced, is not an earlier export, is a link
            or `.`, or is (or contains, or lies in) one of the inputs.
    """
    if output.name in ("", ".."):
        # The folder that is complete takes its name, and this one cannot be renamed away.
        raise ExportError(f"the output {output} has no name of its own. Name a new folder.")
    target = output.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ExportError(
                f"the output {output} overlaps the input {path}. Choose a folder outside it."
            )
    if output.is_symlink():
        # The folder that is complete would take the link's place, and not that of its target.
        raise ExportError(
            f"the output {output} is a symbolic link to {target}. Pass that folder itself, or "
            "remove the link."
        )
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ExportError(
            f"{output} exists and is not empty. Choose another output, or pass --overwrite to "
            "replace it once the new one is complete."
        )
    advice = "so --overwrite will not delete it. Remove it yourself or choose another output."
    if not (output / REPORT_JSON).is_file():
        raise ExportError(
            f"{output} holds no {REPORT_JSON}, which every merged model has: it is not an earlier "
            f"export, {advice}"
        )
    # Of folders a tokenizer's chat templates alone, where it has several.
    others = [
        path.name
        for path in sorted(output.iterdir())
        if path.is_dir() and path.name not in TOKENIZER_FILES
    ]
    if others:
        raise ExportError(f"{output} holds {', '.join(others)} beside an earlier export, {advice}")


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `output` when the block ends without an error.

    The folder lies beside `output`, so that the final rename stays on one file system and is
    atomic. An error or an interrupt removes it; a killed process leaves it under its temporary
    name, which the next run reports. What stood at `output` before is removed last.

    Args:
        output: The final folder. Call `check_output` first.

    Yields:
        The temporary folder, empty.

    Raises:
        ExportError: No folder can be made in that place.
    """
    stage = output.parent / f".{output.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    with _writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    for stale in sorted(output.parent.glob(f".{output.name}.partial-*")):
        if stale != stage:
            logger.warning("an earlier export was interrupted and left %s; delete it", stale)
    try:
        yield stage
        _flush(stage)
        replaced = None
        if output.exists():
            replaced = output.parent / f".{output.name}.replaced-{secrets.token_hex(4)}"
            os.replace(output, replaced)
        os.replace(stage, output)
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_file(output: Path, *, overwrite: bool) -> None:
    """Refuses an output file that would destroy something.

    Raises:
        ExportError: It is a folder, or exists and may not be replaced.
    """
    if output.is_dir():
        raise ExportError(f"{output} is a folder. Give the name of a file.")
    if output.exists() and not overwrite:
        raise ExportError(f"{output} exists. Choose another name, or pass --overwrite.")


@contextmanager
def staged_file(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary file name that becomes `output` when the block ends without an error.

    Args:
        output: The final file.
        overwrite: Whether an existing file may be replaced.

    Yields:
        The temporary path, in the same folder.

    Raises:
        ExportError: `output` exists and `overwrite` is false, it is a folder, or no file can be
            made in that place.
    """
    check_file(output, overwrite=overwrite)
    stage = output.parent / f".{output.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    with _writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        stage.touch()
    try:
        yield stage
        _flush(stage)
        os.replace(stage, output)
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """Says of what cannot be made in a place that another one is needed."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{output} cannot be written: {one_line(error)}. Choose another place."
        ) from error


def _flush(path: Path) -> None:
    # Without this a power cut after the rename could leave a complete-looking name over files
    # whose data never reached the disk.
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
