"""Which tensor of the merged model comes from where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError

if TYPE_CHECKING:
    import torch

    from lora_ogpsa.export.checkpoint import CheckpointReader
    from lora_ogpsa.export.quantisation import Quantisation
    from lora_ogpsa.export.skeleton import AdaptedSkeleton


class TensorPlan:
    """Yields the merged model's tensors once each, in the order of the base's files.

    Args:
        reader: The base's files.
        skeleton: The adapted model.
        requantised: Modules whose weight is passed through 4-bit storage first.
        quantisation: How; None for the original weights.
        config: The base's config.
        device: Where weights pass through 4-bit storage.

    Attributes:
        untied: Whether input and output embeddings, tied in the base, became different.
        notes: What the user should know, in sentences.

    Raises:
        ExportError: The base's files do not hold what its config promises.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        skeleton: AdaptedSkeleton,
        requantised: set[str],
        quantisation: Quantisation | None,
        config: Any,
        device: str,
    ) -> None:
        self._reader = reader
        self._skeleton = skeleton
        self._requantised = requantised
        self._quantisation = quantisation
        self._device = device
        self._load_dtype = _dtype(quantisation.load_dtype or config.dtype) if quantisation else None
        self.untied = False
        self.notes: list[str] = []
        self._key_of, self._extras = self._match()

    def _match(self) -> tuple[dict[str, str], list[str]]:
        names, prefix = self._skeleton.shapes, f"{self._skeleton.base_prefix}."
        # A checkpoint of the bare transformer has the same names without the model's prefix.
        bare = not any(key.startswith(prefix) for key in self._reader.keys)
        key_of: dict[str, str] = {}
        extras = []
        for key in self._reader.keys:
            name = prefix + key if bare and key not in names else key
            if name in names:
                key_of[name] = key
            else:
                extras.append(key)
        for name, group in self._skeleton.tied.items():
            stored = [other for other in group if other in key_of]
            if name not in key_of and stored:
                key_of[name] = key_of[stored[0]]
        missing = [n for n in names if n not in key_of and n not in self._skeleton.supplied]
        touched = [n for n in missing if self._skeleton.module_of(n)]
        if touched or (missing and not extras):
            raise ExportError(
                f"the base's files lack {len(touched or missing)} tensors of its own model "
                f"({', '.join((touched or missing)[:3])}), or store them in another layout. Load "
                "it once with transformers and save_pretrained it, then merge into that folder. "
                "Where they are a mixture model's experts, which are stored one by one again, "
                "merge_and_unload() the loaded PEFT model instead."
            )
        if extras:
            self.notes.append(
                f"{len(extras)} tensors that the model class does not name were copied unchanged "
                f"({', '.join(extras[:3])})."
            )
        return key_of, extras

    def __len__(self) -> int:
        return len(self._key_of) + len(self._extras)

    def upper_bound(self, dtype: torch.dtype) -> int:
        """Returns the most bytes the merged tensors can take in a dtype."""
        return sum(shape.numel() for shape in self._skeleton.shapes.values()) * dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        done: set[str] = set()
        in_file_order = {key: name for name, key in reversed(self._key_of.items())}
        names = [in_file_order.get(key, key) for key in self._reader.keys]
        # The adapter can bring tensors for which the base's files have no key.
        names += [name for name in self._skeleton.supplied if name not in names]
        for name in names:
            if name in done:
                continue
            if name not in self._skeleton.shapes:
                yield name, self._reader.read(name)
                continue
            emitted = self._resolve(name)
            yield from emitted
            done.update(n for n, _ in emitted)
            done.update(self._skeleton.tied.get(name, ()))

    def _resolve(self, name: str) -> list[tuple[str, torch.Tensor]]:
        group = self._skeleton.tied.get(name, [name])
        modules = {n: self._skeleton.module_of(n) for n in group}
        if not any(modules.values()):
            return [(name, self.base_tensor(name))]
        values: dict[str, torch.Tensor] = {}
        for alias in group:
            module = modules[alias]
            if module is None:
                values[alias] = self.base_tensor(alias).float()
            elif alias not in values:
                base = {n: self.base_tensor(n).float() for n in self._skeleton.tensors_of(module)}
                values.update(self._skeleton.merged(module, base))
        if len(group) == 1:
            return list(values.items())
        return self._tie_or_untie(name, group, values)

    def _tie_or_untie(
        self, name: str, group: list[str], values: dict[str, torch.Tensor]
    ) -> list[tuple[str, torch.Tensor]]:
        import torch

        others = [alias for alias in group if alias != name]
        if all(torch.equal(values[name], values[alias]) for alias in others):
            return [(n, t) for n, t in values.items() if n not in others]
        if not set(group) <= self._skeleton.embeddings:
            raise ExportError(
                f"{', '.join(group)} share one tensor in the base, and the adapter changes them "
                "differently. Only tied input and output embeddings can be untied."
            )
        self.untied = True
        self.notes.append(
            "The adapter changes the input and output embeddings, tied in the base, differently; "
            "the merged model stores both and sets tie_word_embeddings to false."
        )
        return list(values.items())

    def base_tensor(self, name: str) -> torch.Tensor:
        """Reads one base tensor as the adapter saw it.

        Args:
            name: Its name in the model.

        Returns:
            The tensor on the CPU; through 4-bit storage and back where that applies.

        Raises:
            ExportError: Its shape is not the model's.
        """
        if name in self._skeleton.supplied:
            return self._skeleton.supplied[name]
        tensor = self._reader.read(self._key_of[name])
        if tensor.shape != self._skeleton.shapes[name]:
            raise ExportError(
                f"{name} has shape {tuple(tensor.shape)} in the base's files, but the adapted "
                f"model expects {tuple(self._skeleton.shapes[name])}. If the vocabulary was "
                "resized for training, resize and save the base the same way and pass it as --base."
            )
        if self._quantisation is None or not tensor.is_floating_point():
            return tensor
        if self._load_dtype is not None:
            tensor = tensor.to(self._load_dtype)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self._requantised:
            return tensor
        if module in self._skeleton.transposed:
            # GPT-2's layers store [in, out]; bitsandbytes quantises blocks of the transpose.
            return self._quantisation.dequantised(tensor.T.contiguous(), self._device).T
        return self._quantisation.dequantised(tensor, self._device)


def _dtype(dtype: object) -> torch.dtype | None:
    import torch

    return getattr(torch, str(dtype).removeprefix("torch.")) if dtype is not None else None
