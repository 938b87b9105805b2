"""Which optimizers can be constrained, and where their step hooks are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_ogpsa.errors import ProjectionError


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which has no step hooks of its own."""
    while any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        if is_deepspeed(optimizer):
            break
        optimizer = optimizer.optimizer
    return optimizer


def is_deepspeed(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's, or accelerate's stand-in for one, whose `step` does nothing."""
    kind = type(optimizer)
    return "DeepSpeed" in kind.__name__ or kind.__module__.partition(".")[0] == "deepspeed"


def learning_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group; 1 where the optimizer finds its own.

    That of transformers' Adafactor with relative steps, its default, is `None`.
    """
    return 1.0 if group["lr"] is None else float(group["lr"])


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers whose steps cannot be constrained.

    Raises:
        ProjectionError: `optimizer` has no step hooks, does not step in ``step()``, or maximises.
    """
    name = type(optimizer).__name__
    if is_deepspeed(optimizer):
        raise ProjectionError(
            f"{name} belongs to DeepSpeed, which steps its own flat partitions inside its engine: "
            "what `step()` does to the adapter cannot be constrained. Train in one process, or in "
            "several with DDP or FSDP2."
        )
    if not hasattr(optimizer, "register_step_post_hook") or not hasattr(
        optimizer, "_optimizer_step_post_hooks"
    ):
        if hasattr(optimizer, "optimizer"):
            raise ProjectionError(
                f"{name} wraps another optimizer and has no step hooks, so that nothing tells "
                "what its own `step` does to the parameters beside the other's. If it leaves them "
                "alone, pass the optimizer inside (`.optimizer`)."
            )
        raise ProjectionError(
            f"{name} has no step hooks (it is not a proper `torch.optim.Optimizer`), so its steps "
            "cannot be constrained. Use a torch, transformers or bitsandbytes optimizer."
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ProjectionError(
            f"{name} goes up its gradients (`maximize=True`), and OGPSA adds to them those of "
            "losses, which are to go down. Train on the negative of what should be maximised."
        )
    if isinstance(optimizer, torch.optim.LBFGS) or name in (
        "LayerWiseDummyOptimizer",
        "LOMO",
        "AdaLomo",
    ):
        raise ProjectionError(
            f"{name} does not make its steps in `step()` after `backward()`, so they cannot be "
            "constrained. Use AdamW or another first-order optimizer."
        )
