"""`NoInputGradients`: a training backward ends at the lowest adapter, not at the embeddings."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lora_ogpsa.answers import base_of
from lora_ogpsa.hooks import OwnHook


class NoInputGradients:
    """Takes the embeddings' output off the graph where nothing behind it is trained.

    Under gradient checkpointing transformers, PEFT and TRL let it require gradients, without which
    reentrant checkpoints would have none at all. Others do not need that: it only sends the
    backward down through the layers below the lowest adapter, each computed once more, and a
    contrast adapter has a third of the model or more below it. No other gradient changes.

    Args:
        model: the model as it is called in training, a PEFT model as a rule.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self._checkpointing = [m for m in base.modules() if "gradient_checkpointing" in vars(m)]
        self._handle: Any = None
        # Some models of transformers have none, and say so this way; others are no such models.
        with suppress(AttributeError, NotImplementedError):
            embeddings = base.get_input_embeddings()
            self._handle = embeddings.register_forward_hook(OwnHook(self._detach))

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()

    def _detach(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        # Embeddings that are trained themselves, or noise on them, make it no leaf.
        if output.requires_grad and output.is_leaf and self._needless():
            return output.detach()
        return None

    def _needless(self) -> bool:
        """Whether there are checkpoints, and none is reentrant."""
        active = [m for m in self._checkpointing if m.gradient_checkpointing]
        return bool(active) and not any(map(_is_reentrant, active))


def _is_reentrant(module: Any) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False
