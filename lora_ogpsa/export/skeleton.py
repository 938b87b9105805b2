"""The adapted model without its weights: PEFT decides what changes, one module at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.empty_model import (
    embedding_names,
    embedding_rows,
    empty_model,
    tied_names,
)
from lora_ogpsa.export.sources import AdapterSource, adapter_weights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


class AdaptedSkeleton:
    """A PEFT model whose adapters are real and whose base exists one module at a time.

    PEFT itself wraps the modules, resolves patterns and computes each merged weight, so every
    variant it can merge (DoRA, rsLoRA, embeddings, biases, trained tokens) comes out as PEFT has
    it. A module's base weights are lent to it by `merged` and taken back afterwards.

    Args:
        config: The base's config.
        adapters: The adapters and their weights.
        trust_remote_code: Passed to transformers.

    Attributes:
        shapes: The base's parameters and saved buffers by qualified name, tied ones included.
        tied: For each name that shares its tensor with others, all names of that tensor.
        embeddings: The weights of the input and output embeddings.
        transposed: Modules that store their weight as [in, out].
        changed: Names of the modules whose tensors an adapter changes.
        supplied: Base tensors that the adapter's own file brings along (resized embeddings).

    Raises:
        ExportError: An adapter's weights cannot be read, or do not fit the base.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        adapters: list[AdapterSource],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        states = [adapter_weights(a.folder) for a in adapters]
        self._model = empty_model(config, trust_remote_code=trust_remote_code)
        rows = embedding_rows(self._model, states)
        if rows is not None and rows != config.get_text_config().vocab_size:
            config.get_text_config().vocab_size = rows
            self._model = empty_model(config, trust_remote_code=trust_remote_code)
        self.base_prefix = self._model.base_model_prefix
        self._weights = {f"adapter{i}": a.weight for i, a in enumerate(adapters)}

        tensors = self._model.state_dict(keep_vars=True)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.tied = tied_names(tensors)
        self.embeddings = embedding_names(self._model)
        self.transposed = {
            name for name, module in self._model.named_modules() if isinstance(module, Conv1D)
        }
        named = {module: name for name, module in self._model.named_modules()}
        self._wrap(adapters)
        self._wrappers: dict[str, list[nn.Module]] = {}
        for wrapper, base in _wrapped(self._peft):
            self._wrappers.setdefault(named[base], []).append(wrapper)
        self.changed = set(self._wrappers)
        self._base = {name: _base_of(w[0]) for name, w in self._wrappers.items()}
        self.supplied = self._load(states, named)

    def _wrap(self, adapters: list[AdapterSource]) -> None:
        from peft import PeftConfig, get_peft_model

        self._peft: Any = None
        for name, adapter in zip(self._weights, adapters, strict=True):
            config = PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            try:
                with warnings.catch_warnings():
                    # PEFT warns that tied weights cannot be merged; here they can.
                    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
                    if self._peft is None:
                        self._peft = get_peft_model(
                            self._model, config, adapter_name=name, low_cpu_mem_usage=True
                        )
                    else:
                        self._peft.add_adapter(name, config, low_cpu_mem_usage=True)
            except (ValueError, TypeError) as error:
                raise ExportError(
                    f"the adapter {adapter.folder} does not fit the base model: {one_line(error)}"
                ) from error

    def _load(
        self, states: list[dict[str, torch.Tensor]], named: dict[nn.Module, str]
    ) -> dict[str, torch.Tensor]:
        import torch
        from peft.functional import cast_adapter_dtype, set_peft_model_state_dict

        # PEFT moves an adapter to the device of the weights it belongs to. These stand-ins have
        # the right shape on the CPU, and one element of memory. They are kept until the end: PEFT
        # drops those it replaces, and Python would give their id to the tensors that follow.
        stand_ins: dict[int, torch.Tensor] = {}
        for base in self._base.values():
            for module, key, parameter in _parameters(base):
                stand_in = torch.empty(1).expand(parameter.shape)
                replacement = torch.nn.Parameter(stand_in, requires_grad=False)
                module._parameters[key] = replacement
                stand_ins[id(replacement)] = replacement
        for wrappers in self._wrappers.values():
            for wrapper in wrappers:
                _forget_originals(wrapper)
        for name, state in zip(self._weights, states, strict=True):
            try:
                result = set_peft_model_state_dict(
                    self._peft, state, adapter_name=name, low_cpu_mem_usage=True
                )
            except (KeyError, RuntimeError) as error:
                raise ExportError(
                    f"the adapter's weights do not fit the base model: {one_line(error)} Pass the "
                    "base it was trained on as --base."
                ) from error
            # Not `missing_keys`: a tied adapter's tensor is stored under one of its names only.
            absent = [
                key
                for key, p in self._peft.named_parameters()
                if name in key.split(".") and p.device.type == "meta"
            ]
            # With a resized vocabulary PEFT saves whole modules a second time, under other keys.
            homeless = [key for key in result.unexpected_keys if "lora_" in key]
            if homeless or absent:
                raise ExportError(
                    "the adapter's weights do not fit the base model: "
                    f"{len(homeless)} tensors have no place in it ({', '.join(homeless[:3])}), "
                    f"{len(absent)} are missing ({', '.join(absent[:3])}). Pass the base it was "
                    "trained on as --base."
                )
            cast_adapter_dtype(self._peft, adapter_name=name, autocast_adapter_dtype=True)
        return self._supplied(stand_ins, named)

    def _supplied(
        self, stand_ins: dict[int, torch.Tensor], named: dict[nn.Module, str]
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for module in self._peft.modules():
            if module not in named:
                continue
            for key, parameter in module._parameters.items():
                real = parameter is not None and parameter.device.type != "meta"
                if real and id(parameter) not in stand_ins:
                    name = f"{named[module]}.{key}"
                    for alias in self.tied.get(name, [name]):
                        found[alias] = parameter.data
        return found

    def tensors_of(self, module: str) -> list[str]:
        """Lists the qualified names of a changed module's tensors."""
        return [f"{module}.{name}" for name, _ in self._base[module].named_parameters()]

    def module_of(self, tensor: str) -> str | None:
        """Names the changed module a tensor belongs to, or None when no adapter touches it."""
        parts = tensor.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (prefix := ".".join(parts[:end])) in self.changed:
                return prefix
        return None

    def low_rank(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns the factors of a module that a single plain LoRA adapter changes.

        Args:
            module: One of `changed`.

        Returns:
            A [r, in], B [out, r] and the scaling of their product, float32.
        """
        layer: Any = self._wrappers[module][0]
        adapter = next(iter(self._weights))
        if adapter in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return a.data, b.data, float(layer.scaling[adapter])

    def merged(self, module: str, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Computes a changed module's tensors.

        With several adapters, or a weight other than 1, each adapter contributes its weight times
        the change it makes alone: W + sum_i w_i (merge_i(W) - W).

        Args:
            module: One of `changed`.
            base: Its base tensors by qualified name (see `tensors_of`), float32.

        Returns:
            The merged tensors by the same names, float32.

        Raises:
            ExportError: PEFT cannot merge this module.
        """
        if list(self._weights.values()) == [1.0]:
            return self._alone(module, next(iter(self._weights)), base)
        total = {name: tensor.clone() for name, tensor in base.items()}
        for adapter, weight in self._weights.items():
            for name, tensor in self._alone(module, adapter, base).items():
                total[name].add_(tensor - base[name], alpha=weight)
        return total

    def _alone(
        self, module: str, adapter: str, base: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        import torch
        from peft.utils import ModulesToSaveWrapper

        slots = dict(self._slots(module))
        for name, (owner, key) in slots.items():
            owner._parameters[key] = torch.nn.Parameter(base[name].clone(), requires_grad=False)
        result: dict[str, torch.Tensor] = {}
        try:
            wrapper: Any
            for wrapper in self._wrappers[module]:
                if isinstance(wrapper, ModulesToSaveWrapper):
                    if adapter in wrapper.modules_to_save:
                        saved = wrapper.modules_to_save[adapter].named_parameters()
                        result = {f"{module}.{n}": p.data.float() for n, p in saved}
                    continue
                wrapper.merge(adapter_names=[adapter])
                wrapper.merged_adapters.clear()
            lent = {name: owner._parameters[key].data for name, (owner, key) in slots.items()}
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ExportError(
                f"PEFT cannot merge the adapter into {module}: {one_line(error)}"
            ) from error
        finally:
            for name, (owner, key) in slots.items():
                empty = torch.empty(base[name].shape, device="meta")
                owner._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
        return result or lent

    def _slots(self, module: str) -> Iterator[tuple[str, tuple[Any, str]]]:
        for inner, owner in self._base[module].named_modules():
            for key in owner._parameters:
                if owner._parameters[key] is not None:
                    yield ".".join(filter(None, (module, inner, key))), (owner, key)


def _wrapped(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            yield module, _base_of(module)


def _base_of(wrapper: nn.Module) -> nn.Module:
    from peft.utils import ModulesToSaveWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.original_module
    return wrapper.get_base_layer()  # type: ignore[operator]


def _forget_originals(wrapper: nn.Module) -> None:
    import torch

    # Layers of trained tokens keep copies of the rows they replace, for unmerging only. These
    # come from a base without data, and PEFT fails to move them.
    originals = getattr(wrapper, "trainable_tokens_original", {})
    for adapter, rows in list(originals.items()):
        originals[adapter] = torch.zeros(rows.shape, dtype=rows.dtype)


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, key, parameter
