"""`AdapterSpace`: which tensors form which block, and how they lie in one flat vector."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ogpsa.errors import AdapterError
from lora_ogpsa.sharding import is_sharded, local_pair, whole

if TYPE_CHECKING:
    from lora_ogpsa.config import Granularity


@dataclass(frozen=True)
class Block:
    """The trainable LoRA tensors of one adapted module.

    Attributes:
        name: qualified name of the adapted module.
        parameters: qualified parameter names, in the order in which they are flattened.
        shapes: their shapes.
        capturable: every tensor is the weight or bias of a plain ``nn.Linear``, so that
            per-example gradients can be read off its inputs and output gradients.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    capturable: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def size(self) -> int:
        """d_m, the number of elements of the block."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Slab:
    """`count` equal pieces of a flat vector, `stride` apart, each `width` long from `offset`.

    Blocks of one shape lie side by side, so that one batched product serves them all.
    """

    start: int
    count: int
    stride: int
    offset: int
    width: int
    names: tuple[str, ...] = field(default=(), compare=False)

    def view(self, flat: Tensor) -> Tensor:
        """The pieces of `flat` [..., d] as a view [..., count, width]."""
        part = flat[..., self.start : self.start + self.count * self.stride]
        pieces = part.unflatten(-1, (self.count, self.stride))
        return pieces[..., self.offset : self.offset + self.width]

    def locate(self, position: int) -> tuple[int, int] | None:
        """(piece, column) of an element of the flat vector, or None if it lies outside."""
        piece, column = divmod(position - self.start, self.stride)
        column -= self.offset
        inside = 0 <= piece < self.count and 0 <= column < self.width
        return (piece, column) if inside else None


class AdapterSpace:
    """All trainable LoRA parameters of a PEFT model as one flat float32 vector of length d.

    Blocks of the same shape are neighbours in the vector. Parameters are looked up by qualified
    name, since wrappers may replace Parameter objects; :meth:`bind` looks them up again.

    Args:
        model: the PEFT model that `blocks` was read from.
        blocks: the blocks, in any order.
        unprotected: names of trainable parameters that belong to no block.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], unprotected: Sequence[str] = ()
    ) -> None:
        self.blocks: tuple[Block, ...] = tuple(sorted(blocks, key=lambda b: b.sizes))
        self.unprotected = tuple(unprotected)
        self.size = sum(block.size for block in self.blocks)
        self.offsets: dict[str, int] = {}
        at = 0
        for block in self.blocks:
            self.offsets[block.name] = at
            at += block.size
        self.parameter_names = tuple(name for block in self.blocks for name in block.parameters)
        shapes = [shape for block in self.blocks for shape in block.shapes]
        starts = itertools.accumulate((shape.numel() for shape in shapes), initial=0)
        #: Shape, strides and start of every parameter in a flat vector.
        self._places = [
            (shape, torch.empty(shape, device="meta").stride(), start)
            for shape, start in zip(shapes, starts, strict=False)
        ]
        self.parameters: list[nn.Parameter] = []
        self.bind(model)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_model(cls, model: nn.Module) -> AdapterSpace:
        """The blocks of every trainable LoRA module of the active adapters of `model`.

        Linear, embedding and convolution layers, DoRA magnitudes and LoRA biases are all found.

        Raises:
            AdapterError: `model` has no LoRA layer, none of its LoRA parameters is trainable, or
                two of them are one memory.

        Warns:
            UserWarning: trainable parameters lie outside LoRA (`modules_to_save`, token
                adapters, base biases): they are named and are not protected.
        """
        layers = _lora_layers(model)
        if not layers:
            raise AdapterError(
                "The model has no LoRA layer. Wrap it first: "
                "`peft.get_peft_model(model, LoraConfig(target_modules='all-linear'))`."
            )
        by_id = {id(p): name for name, p in model.named_parameters()}
        # Of a parameter that several layers have a capture would see one layer's part.
        holders = Counter(id(p) for _, layer in layers for p, _ in _layer_parameters(layer))
        blocks: list[Block] = []
        taken: set[str] = set()
        for name, layer in layers:
            found = []
            for p, capturable in _layer_parameters(layer):
                qualified = by_id.get(id(p))
                if qualified is not None and p.requires_grad and qualified not in taken:
                    found.append((qualified, p, capturable and holders[id(p)] == 1))
                    taken.add(qualified)
            if not found:
                continue
            blocks.append(
                Block(
                    name=name,
                    parameters=tuple(item[0] for item in found),
                    shapes=tuple(item[1].shape for item in found),
                    capturable=all(item[2] for item in found),
                )
            )
        if not blocks:
            raise AdapterError(
                f"None of the {len(layers)} LoRA layers has a trainable parameter. Is the adapter "
                "loaded with `is_trainable=True`, and is it the active one "
                "(`model.set_adapter(name)`)?"
            )
        _refuse_common_memory({name: model.get_parameter(name) for name in taken})
        unprotected = [
            name for name, p in model.named_parameters() if p.requires_grad and name not in taken
        ]
        if unprotected:
            shown = ", ".join(unprotected[:5]) + (", ..." if len(unprotected) > 5 else "")
            warnings.warn(
                f"{len(unprotected)} trainable parameters lie outside LoRA and are not protected "
                f"by OGPSA: {shown}. Their updates are left as they are.",
                stacklevel=2,
            )
        return cls(model, blocks, unprotected)

    def bind(self, model: nn.Module) -> None:
        """Look the parameters up again in `model`, by name.

        Raises:
            AdapterError: one of them is gone, has another shape, or is frozen now.
        """
        named = dict(model.named_parameters())
        shapes = [shape for block in self.blocks for shape in block.shapes]
        bound = []
        for name, shape in zip(self.parameter_names, shapes, strict=True):
            parameter = named.get(name)
            if parameter is None or parameter.shape != shape:
                state = "is gone" if parameter is None else f"has shape {tuple(parameter.shape)}"
                raise AdapterError(
                    f"LoRA parameter `{name}` of shape {tuple(shape)} {state}. Was an adapter "
                    "added, removed or resized after OGPSA was attached? Attach it afterwards."
                )
            if not parameter.requires_grad:
                raise AdapterError(
                    f"LoRA parameter `{name}` was trainable when OGPSA was attached and is frozen "
                    "now. Freeze before that, or detach it and create a new OGPSA."
                )
            bound.append(parameter)
        self.parameters = bound

    # ------------------------------------------------------------------ layout

    def slabs(self, granularity: Granularity) -> list[Slab]:
        """How the flat vector falls into pieces that each have their own constraint."""
        if granularity == "global":
            return [Slab(0, 1, self.size, 0, self.size, ("all",))]
        runs: list[list[Block]] = []
        for block in self.blocks:
            if runs and runs[-1][0].sizes == block.sizes:
                runs[-1].append(block)
            else:
                runs.append([block])
        slabs = []
        for run in runs:
            start, stride = self.offsets[run[0].name], run[0].size
            if granularity == "adapter":
                slabs.append(
                    Slab(start, len(run), stride, 0, stride, tuple(block.name for block in run))
                )
                continue
            offset = 0
            for index, size in enumerate(run[0].sizes):
                names = tuple(block.parameters[index] for block in run)
                slabs.append(Slab(start, len(run), stride, offset, size, names))
                offset += size
        return slabs

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a contiguous `flat` [d] in the parameters' shapes, one per parameter."""
        # One call each: there are hundreds, several times a step, and a GPU waits for them.
        first = flat.storage_offset()
        return [
            flat.as_strided(shape, strides, first + start) for shape, strides, start in self._places
        ]

    def spans(self) -> dict[str, tuple[int, int]]:
        """Where each parameter lies in the flat vector: name -> (start, end)."""
        places = zip(self.parameter_names, self._places, strict=True)
        return {name: (start, start + shape.numel()) for name, (shape, _, start) in places}

    # ------------------------------------------------------------------ reading and writing

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parameters[0].device

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has split the parameters over processes; flat vectors stay whole."""
        return is_sharded(self.parameters[0])

    def zeros(self, *leading: int) -> Tensor:
        """A float32 buffer [*leading, d] on the parameters' device."""
        return torch.zeros(*leading, self.size, device=self.device, dtype=torch.float32)

    @torch.no_grad()
    def read(self, flat: Tensor | None = None) -> Tensor:
        """The parameters as a flat float32 vector [d], written into `flat` if given."""
        flat = self.zeros() if flat is None else flat
        torch._foreach_copy_(self.views(flat), self.values())
        return flat

    def values(self) -> list[Tensor]:
        """The parameters, whole where they are sharded."""
        return [whole(p.detach()) for p in self.parameters]

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Set the parameters from a flat vector [d]."""
        for target, value in self._local_pairs(flat):
            target.copy_(value)

    @torch.no_grad()
    def add(self, flat: Tensor) -> None:
        """Add a flat float32 vector [d] to the parameters."""
        pairs = self._local_pairs(flat)
        full = [pair for pair in pairs if pair[0].dtype == torch.float32]
        if full:
            torch._foreach_add_([target for target, _ in full], [value for _, value in full])
        for target, value in pairs:
            if target.dtype != torch.float32:
                # In float32, so that a half-precision parameter is rounded once and not twice.
                target.copy_(target.float() + value)

    def _local_pairs(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What this process holds of each parameter, and the same piece of `flat`."""
        views = self.views(flat)
        return [local_pair(p.detach(), v) for p, v in zip(self.parameters, views, strict=True)]


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def _refuse_common_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """What a step does to one parameter must not be done to another as well.

    Raises:
        AdapterError: two parameters are views of one memory.
    """
    places: dict[int, str] = {}
    for name, parameter in parameters.items():
        # Sharded parameters have no one place; those on the meta device have none.
        place = 0 if is_sharded(parameter) else parameter.data_ptr()
        if place and place in places:
            raise AdapterError(
                f"`{name}` and `{places[place]}` are two LoRA parameters of one memory, as PEFT's "
                "`ensure_weight_tying` makes them of tied embeddings: each would be corrected for "
                "what was done to both. Set `ensure_weight_tying=False`, or adapt one of the two."
            )
        places[place] = name


def _layer_parameters(layer: Any) -> list[tuple[nn.Parameter, bool]]:
    """(parameter, can its per-example gradient be captured) of the active adapters of a layer."""
    from peft.tuners.lora.layer import ParamWrapper

    found: list[tuple[nn.Parameter, bool]] = []
    for attribute in layer.adapter_layer_names:
        holder = getattr(layer, attribute, None)
        if holder is None:
            continue
        for adapter in layer.active_adapters:
            if adapter not in holder:
                continue
            item = holder[adapter]
            if isinstance(item, nn.Parameter):
                found.append((item, False))
            else:
                # A `target_parameters` layer reads the weights and never calls the modules.
                plain = type(item) is nn.Linear and not isinstance(layer, ParamWrapper)
                found.extend((p, plain) for p in item.parameters())
    return found
