"""Safetensors folders, read and written one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.model_files import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The parts bitsandbytes stores beside a packed 4-bit weight, by the end of their names.
_PACKED = ("nf4", "fp4")


class CheckpointReader:
    """The tensors of a folder with one or several safetensors files.

    A file is opened anew for every tensor: a mapped page counts as used memory for as long as the
    mapping lives, and a shard of 5 GB would otherwise stay in memory as a whole.

    Raises:
        ExportError: The folder has no safetensors weights, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = self._files()
        self._file_of: dict[str, Path] = {}
        from safetensors import SafetensorError, safe_open

        for file in files:
            try:
                with safe_open(file, "pt") as handle:
                    self._file_of.update(dict.fromkeys(handle.keys(), file))
            except SafetensorError as error:
                raise ExportError(
                    f"{file} cannot be read: {one_line(error)}. Copy or download it again."
                ) from error
        self._parts = self._packed_parts()
        hidden = {part for parts in self._parts.values() for part in parts.values()}
        self.keys = [key for key in self._file_of if key not in hidden]

    def _files(self) -> list[Path]:
        # Of a folder with both transformers reads the single file.
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX)
            if not isinstance(index.get("weight_map"), dict):
                raise ExportError(
                    f"{self.folder / INDEX} names no files. Copy or download it again."
                )
            files = [self.folder / name for name in sorted(set(index["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ExportError(
                    f"{self.folder} lacks {', '.join(missing)}, which its index names: the model "
                    "is only partly there. Download or copy it again."
                )
            return files
        if list(self.folder.glob("*.bin")):
            raise ExportError(
                f"{self.folder} holds pickled .bin weights, which cannot be read tensor by tensor "
                "(and can run code when opened). Convert it once: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            )
        raise ExportError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}. Pass the folder or the hub id of a "
            "model with safetensors weights as --base."
        )

    def _packed_parts(self) -> dict[str, dict[str, str]]:
        parts: dict[str, dict[str, str]] = {}
        for key in self._file_of:
            weight, _, rest = key.partition(".quant_state.bitsandbytes__")
            if rest in _PACKED:
                names = [key, *(f"{weight}.{part}" for part in _quant_state_keys())]
                parts[weight] = {
                    name.removeprefix(weight + "."): name for name in names if name in self._file_of
                }
        return parts

    @property
    def packed(self) -> bool:
        """Whether the folder stores bitsandbytes 4-bit weights."""
        return bool(self._parts)

    def read(self, key: str) -> torch.Tensor:
        """Reads one tensor; a packed 4-bit weight comes back dequantised.

        Args:
            key: One of `keys`.

        Returns:
            The tensor on the CPU, in its own memory, in the stored (or dequantised) dtype.
        """
        if key not in self._parts:
            return self._raw(key)
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stats = {name: self._raw(full) for name, full in self._parts[key].items()}
        state = QuantState.from_dict(stats, device=torch.device("cpu"))
        return dequantize_4bit(self._raw(key), state)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape as stored, without reading it."""
        from safetensors import safe_open

        with safe_open(self._file_of[key], "pt") as handle:
            return tuple(handle.get_slice(key).get_shape())

    def _raw(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[key], "pt") as handle:
            return handle.get_tensor(key).clone()


def _quant_state_keys() -> list[str]:
    return ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]


def refuse_foreign_quantisation(folder: Path) -> None:
    """Raises ExportError for a model whose stored weights are codes of an unknown format.

    int8 and fp8 tensors could be read like any other, and would be wrong without their scales.
    """
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config") or {}
    if stored and not stored.get("load_in_4bit"):
        raise ExportError(
            f"{folder} is stored quantised ({stored.get('quant_method', 'unknown method')}); only "
            "16-bit weights and bitsandbytes 4-bit can be read. Pass the 16-bit model instead."
        )


class ShardWriter:
    """Collects tensors and writes them in files of at most a given size.

    Args:
        folder: Where the files go.
        max_bytes: The size at which a file is full; a single larger tensor gets its own file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor; writes a file when it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._shards.append(list(self._pending))
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"

    def close(self) -> None:
        """Writes the last file, gives the files their usual names, and writes the index."""
        if self._pending:
            self._write()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(size: str | int) -> int:
    """Reads a size such as `2GB` or `500MB`, or a number of bytes.

    Raises:
        ExportError: The text is not a positive size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    unit = next((u for u in ("KIB", "MIB", "GIB", "KB", "MB", "GB") if text.endswith(u)), "")
    try:
        value = int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except ValueError:
        value = 0
    if value <= 0:
        raise ExportError(f"max_shard_size is {size!r}; give a size such as '2GB' or '500MB'.")
    return value
