"""Rows from files, folders, the hub, or the package itself; `chat` makes conversations of them."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
# Characters of a cell; Python's own limit is 131,072, less than a long conversation.
_CSV_LIMIT = 2**31 - 1
_TOO_DEEP = 'nested too deeply to be read; expected objects such as {"prompt": "..."}'

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_rows(
    source: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    shuffle_seed: int | None = None,
) -> list[dict]:
    """Read a data set into a list of rows.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; `embedded:NAME` for a data set that comes
            with this package; a folder that `datasets` can read; or a data-set id on the hub.
        config: configuration of a folder or hub data set.
        split: split of a folder or hub data set, "train" if not given.
        limit: keep at most this many rows, taken after shuffling.
        shuffle_seed: shuffle with this seed; the same seed gives the same order whatever `limit`.

    Raises:
        DataError: the source is missing, unreadable, of an unknown type, or empty.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, found {limit}")
    table = load_table(source, config=config, split=split)
    indices = list(range(len(table)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(indices)
    return rows_at(table, indices[:limit])


def load_table(
    source: str | Path, *, config: str | None = None, split: str | None = None
) -> list[dict] | Dataset:
    """Open a data set of which only some rows may be wanted; the arguments are `load_rows`'s.

    Returns:
        The rows of a file; of a folder or hub data set the `datasets.Dataset`, whose rows stay on
        disk until `rows_at` takes them.

    Raises:
        DataError: the source is missing, unreadable, of an unknown type, or empty.
    """
    name = str(source)
    path = Path(source).expanduser()
    is_file = name.startswith("embedded:") or path.is_file()
    if is_file and (config or split):
        raise DataError(
            f"{name}: a file has no config or split (found config={config!r}, split={split!r}); "
            "leave both out (of a recipe's training data `dataset_config` and "
            "`dataset_train_split`), or name a folder or a hub data set"
        )
    table: list[dict] | Dataset
    if name.startswith("embedded:"):
        table = _parse_text(_embedded_text(name), ".jsonl", name)
    elif is_file:
        table = _read_file(path)
    elif path.is_dir():
        table = _read_folder(path, config, split)
    elif isinstance(source, Path) or _looks_like_path(name):
        raise DataError(
            f"file not found: {name}; a source is a {', '.join(FILE_TYPES)} file, a folder that "
            "`datasets` reads, embedded:NAME or a hub data-set id"
        )
    else:
        table = _read_hub(name, config, split)
    if len(table) == 0:
        raise DataError(f"{name}: the data set has no rows")
    return table


def rows_at(table: list[dict] | Dataset, indices: Sequence[int]) -> list[dict]:
    """The rows of a table at `indices`, and of a `datasets.Dataset` no others made."""
    if isinstance(table, list):
        return [table[i] for i in indices]
    return table.select(indices).to_list()


def indices_of_kind(table: list[dict] | Dataset, kind: str) -> list[int]:
    """Where the rows are whose ``kind``, ``type`` or ``source`` field is `kind`."""
    fields = ("kind", "type", "source")
    if not isinstance(table, list):
        table = table.select_columns([f for f in fields if f in table.column_names]).to_list()
    return [i for i, row in enumerate(table) if kind in [row.get(f) for f in fields]]


def _looks_like_path(name: str) -> bool:
    """Whether a name of nothing that exists was meant as a path rather than a hub id."""
    return _HUB_ID.fullmatch(name) is None or Path(name).suffix.lower() in {*FILE_TYPES, ".txt"}


def _embedded_text(name: str) -> str:
    folder = files("lora_ogpsa") / "embedded"
    found = {f.name: f for f in folder.iterdir() if f.name.endswith(".jsonl")}
    file = found.get(name.removeprefix("embedded:") + ".jsonl")
    if file is None:
        names = ", ".join(sorted(n.removesuffix(".jsonl") for n in found)) or "none"
        raise DataError(f"{name}: no such embedded data set; there are: {names}")
    return file.read_text(encoding="utf-8")


def _read_file(path: Path) -> list[dict]:
    suffix = path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(
            f"{path}: unknown file type '{suffix}'; accepted are {', '.join(FILE_TYPES)}"
        )
    if suffix == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file: {one_line(error)}") from error
    try:
        text = path.read_text(encoding="utf-8-sig")  # a spreadsheet's export may open with a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {one_line(error)}") from error
    return _parse_text(text, suffix, str(path))


def _parse_text(text: str, suffix: str, name: str) -> list[dict]:
    if suffix == ".csv":
        return _parse_csv(text, name)
    # Many files called .json hold one object per line; a list is what tells the two apart.
    if suffix == ".json" and text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {error.lineno}: not valid JSON: {error.msg}") from error
        except RecursionError as error:
            raise DataError(f"{name}: {_TOO_DEEP}") from error
        unit = "item"
    else:
        numbered, unit = [], "line"
        # Not str.splitlines(), which also cuts at separators that JSON strings may hold.
        for number, line in enumerate(io.StringIO(text), start=1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{name}, line {number}: not valid JSON: {error.msg} at column "
                        f"{error.colno}; expected one object per line"
                        + (" or one list of objects" if suffix == ".json" else "")
                    ) from error
                except RecursionError as error:
                    raise DataError(f"{name}, line {number}: {_TOO_DEEP}") from error
    for number, row in numbered:
        if not isinstance(row, dict):
            raise DataError(
                f"{name}, {unit} {number}: found {type(row).__name__}, expected an object "
                'such as {"prompt": "..."}'
            )
    return [row for _, row in numbered]


def _parse_csv(text: str, name: str) -> list[dict]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    usual = csv.field_size_limit(_CSV_LIMIT)
    try:
        names = list(reader.fieldnames or ())
        repeated = sorted({column for column in names if names.count(column) > 1})
        if repeated:
            raise DataError(
                f"{name}: the header names {', '.join(map(repr, repeated))} more than once; give "
                "each column a name of its own"
            )
        for row in reader:
            # DictReader files surplus cells under the key None and fills missing ones with None.
            if None in row or None in row.values():
                raise DataError(
                    f"{name}, line {reader.line_num}: the number of cells differs from the "
                    f"header's {len(names)} ({', '.join(names)})"
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{name}, after line {reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(usual)
    return rows


def _read_folder(path: Path, config: str | None, split: str | None) -> Any:
    import datasets

    try:
        if not any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), config, split=split or "train")
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises a dozen kinds, none of them its own base class
        raise DataError(f"{path}: not a readable data-set folder: {one_line(error)}") from error
    if not isinstance(table, datasets.DatasetDict):
        if split or config:
            raise DataError(f"{path}: holds one saved data set without splits; leave split out")
        return table
    if (split or "train") not in table:
        raise DataError(f"{path}: no split {split or 'train'!r}; there are: {', '.join(table)}")
    return table[split or "train"]


def _read_hub(name: str, config: str | None, split: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # see _read_folder
        raise DataError(
            f"{name}: no local file or folder of this name, and the hub data set cannot be "
            f"loaded (config={config!r}, split={split or 'train'!r}): {one_line(error)}"
        ) from error
