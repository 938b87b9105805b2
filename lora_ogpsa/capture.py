"""Per-example LoRA gradients in one backward pass, and reference passes that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.errors import CaptureError, ReentrantCheckpointError
from lora_ogpsa.hooks import uncompiled

Sink = Callable[[Tensor, Tensor], None]


@dataclass
class Capture:
    """A running capture.

    Attributes:
        anchor: a scalar leaf to differentiate with respect to: it makes the backward reach every
            captured layer. Its own gradient is ``None``.
        reached: names of the layers whose backward has run.
    """

    anchor: Tensor
    reached: set[str] = field(default_factory=set)


class _CapturedLinear(torch.autograd.Function):
    """``functional.linear`` whose backward hands (input, output gradient) to a sink.

    The weight's own gradient is never formed and nothing reaches its ``.grad``. `anchor` is a
    leaf that makes the output differentiable where the input is not (a first layer).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, sink: Sink
    ) -> Tensor:
        # The input is saved through autograd, so that a checkpoint's hooks see it and nothing
        # lives longer than autograd would keep it.
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        # Under autocast the product ran in the gradient's dtype: so does its derivative.
        ctx.sink(x.to(grad.dtype), grad)
        to_input = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return to_input, None, None, None, None


@contextmanager
def capture_examples(
    model: nn.Module, space: AdapterSpace, targets: Mapping[str, Tensor], *, fold: int = 1
) -> Iterator[Capture]:
    r"""Within the context, one backward writes each example's gradient into `targets`.

    For a linear layer with input x [B, T, in] and output gradient δ [B, T, out], the weight
    gradient of example i is :math:`\delta_i^\top x_i`: the gradients of all B examples come from
    one backward pass as one batched product. Differentiate the *sum* over examples of each one's
    own loss.

    Works under non-reentrant gradient checkpointing, with 4-bit bases and under autocast (products
    are accumulated in float32). ``.grad`` of the captured parameters stays as it is.

    Args:
        model: the PEFT model `space` was built from.
        space: its blocks.
        targets: parameter name -> where its rows are added, [B, number of elements]. All its
            parameters must belong to capturable blocks.
        fold: how many sequences make up one example (2 for a preference pair; sequence
            ``i + n * B`` of the batch belongs to example i).

    Yields:
        The capture, with the anchor to differentiate with respect to.

    Raises:
        CaptureError: in the forward, if a layer's input does not carry the examples along its
            first dimension (for instance a router that flattens tokens).
    """
    capture = Capture(torch.zeros((), device=space.device, requires_grad=True))
    owners = _owners(model, targets)
    patched: list[tuple[Any, Any]] = []
    try:
        for name, (module, weight_target, bias_target) in owners.items():
            patched.append((module, module.__dict__.get("forward")))
            module.forward = _captured_forward(
                name, module, weight_target, bias_target, capture, fold
            )
        yield capture
    finally:
        for module, earlier in patched:
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier


def _owners(
    model: nn.Module, targets: Mapping[str, Tensor]
) -> dict[str, tuple[Any, Tensor, Tensor | None]]:
    owners = {}
    for name, target in targets.items():
        owner, _, kind = name.rpartition(".")
        if kind == "weight":
            module = model.get_submodule(owner)
            if type(module) is not nn.Linear:
                raise CaptureError(
                    f"`{owner}` is a {type(module).__name__}, not a plain Linear.", owner
                )
            owners[owner] = (module, target, targets.get(f"{owner}.bias"))
    return owners


def _captured_forward(
    name: str,
    module: nn.Linear,
    weight_target: Tensor,
    bias_target: Tensor | None,
    capture: Capture,
    fold: int,
) -> Callable[[Tensor], Tensor]:
    examples = weight_target.shape[0]
    matrices = weight_target.unflatten(1, module.weight.shape)

    def sink(x: Tensor, grad: Tensor) -> None:
        capture.reached.add(name)
        x, grad = x.flatten(1, -2).float(), grad.flatten(1, -2).float()
        # Added, since a module that is called twice has two contributions; in place, since a
        # batch of rows of the largest module is what a capture would need beside its targets.
        for xs, grads in zip(x.chunk(fold), grad.chunk(fold), strict=True):
            if matrices.device == grads.device:
                matrices.baddbmm_(grads.mT, xs)
            else:
                matrices.add_(torch.bmm(grads.mT, xs).to(matrices.device))
            if bias_target is not None:
                bias_target.add_(grads.sum(1).to(bias_target.device))

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, module.weight, module.bias)
        if x.dim() < 3 or x.shape[0] != examples * fold:
            raise CaptureError(
                f"`{name}` was called with an input of shape {tuple(x.shape)}; per-example "
                f"gradients need [{examples * fold}, ..., {x.shape[-1]}], the examples first.",
                name,
            )
        bias = None if module.bias is None else module.bias.detach()
        return _CapturedLinear.apply(x, module.weight.detach(), bias, capture.anchor, sink)

    return forward


@contextmanager
def quiet(model: nn.Module, *, checkpointing: bool = True) -> Iterator[None]:
    """Within the context, passes through `model` leave no trace on training.

    Dropout and other train-time behaviour are off; random number generators, train/eval mode of
    every module and ``requires_grad`` of every parameter are as before afterwards. Nothing of it is
    compiled.

    Args:
        model: any module.
        checkpointing: keep gradient checkpointing on where it is on. Layers of transformers
            checkpoint only in training mode, so exactly those keep it, and their children, which
            hold the dropout, do not.
    """
    # One walk, and past the modules' own slow `__setattr__`: a large model has thousands of them,
    # and a short pass on a GPU waits for it.
    training: list[dict[str, Any]] = []
    trainable: list[tuple[nn.Parameter, bool]] = []
    for module in model.modules():
        facts = vars(module)
        if module.training:
            training.append(facts)
        trainable += [(p, p.requires_grad) for p in facts["_parameters"].values() if p is not None]
    devices = sorted({p.device.index for p, _ in trainable if p.is_cuda})
    with torch.random.fork_rng(devices=devices, enabled=True), uncompiled():
        try:
            for facts in training:
                # Turning it on sets it on the layer itself; a module's `getattr` would be slow.
                if not (checkpointing and facts.get("gradient_checkpointing") is True):
                    facts["training"] = False
            yield
        finally:
            for facts in training:
                facts["training"] = True
            for parameter, flag in trainable:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)


def gradients(
    loss: Tensor, inputs: Sequence[Tensor], *, stash: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of `loss` with respect to `inputs`, leaving every ``.grad`` as it was.

    Args:
        loss: a scalar.
        inputs: leaves.
        stash: all leaves that `loss` may depend on. If given, the backward runs as usual with
            their ``.grad`` set aside meanwhile, since reentrant checkpointing refuses
            ``torch.autograd.grad``.

    Returns:
        One gradient per input, ``None`` where the loss does not depend on it.

    Raises:
        ReentrantCheckpointError: `stash` was not given and a reentrant checkpoint lies between.
    """
    if stash is None:
        try:
            return list(torch.autograd.grad(loss, list(inputs), allow_unused=True))
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ReentrantCheckpointError(str(error)) from error
            raise
    leaves = list({id(leaf): leaf for leaf in (*stash, *inputs)}.values())
    aside = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [leaf.grad for leaf in inputs]
    finally:
        for leaf, grad in zip(leaves, aside, strict=True):
            leaf.grad = grad
