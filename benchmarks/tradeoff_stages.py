"""The two stages of training, SFT and DPO, in one plain loop that every method goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rivals.base import Rival, Training
from torch import Tensor, nn
from torch.nn import functional

from lora_ogpsa import chat
from lora_ogpsa.answers import base_of
from lora_ogpsa.reference import Objective
from lora_ogpsa.stages import cpu_computes_bfloat16

WARM_UP = 5


@dataclass(frozen=True)
class StageSettings:
    """What all methods share in a stage.

    Attributes:
        name: ``"sft"`` or ``"dpo"``.
        steps: optimizer steps.
        batch: examples (or pairs) per step.
        learning_rate: after the warm-up.
        beta: of the preference loss.
        likelihood: weight of the chosen answers' negative log-likelihood beside that loss.
        schedule: of the learning rate after its warm-up, ``"constant"``, or ``"linear"`` to zero
            at the end, which is the default of Hugging Face's trainers.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    beta: float = 0.1
    schedule: str = "constant"
    likelihood: float = 0.0

    def identity(self) -> dict[str, Any]:
        """JSON values; without what an earlier version did not have and does not act."""
        return {k: v for k, v in asdict(self).items() if k != "likelihood" or v}

    def rate(self, step: int) -> float:
        """Factor on the learning rate in the step after `step` others."""
        left = 1.0 if self.schedule == "constant" else (self.steps - step) / self.steps
        return min(left, (step + 1) / WARM_UP)


def batches(rows: Sequence[Any], seed: int, steps: int, size: int) -> list[list[Any]]:
    """The same batches for every method of one seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [[rows[i] for i in order[s * size : (s + 1) * size]] for s in range(steps)]


def cast(model: nn.Module, precision: str) -> AbstractContextManager[Any]:
    """The precision of all forward passes: ``"bfloat16"`` by autocast, or ``"float32"``."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16)


def fastest_precision() -> str:
    """Bfloat16 where the machine has instructions for it; a CPU without is four times slower."""
    native = torch.cuda.is_available() or cpu_computes_bfloat16()
    return "bfloat16" if native else "float32"


@dataclass
class Spent:
    """What training cost.

    Attributes:
        seconds: on the clock.
        layer_passes: tokens that went through a layer, padding included, once for a forward and
            once for a backward, which ends below the first layer with an adapter; summed over the
            layers.
        layers: of the model.
    """

    seconds: float = 0.0
    layer_passes: int = 0
    layers: int = 1

    @property
    def token_passes(self) -> float:
        """Passes of tokens through the whole model.

        On a small model and a large GPU, where every pass takes the same time whatever is in it,
        this says more than a clock.
        """
        return self.layer_passes / self.layers

    @contextmanager
    def on(self, training: Training) -> Iterator[None]:
        """Count what happens within the context."""
        began = training.now()
        try:
            with self.tokens_of(training.model):
                yield
        finally:
            self.seconds += training.now() - began

    @contextmanager
    def tokens_of(self, model: nn.Module) -> Iterator[None]:
        """Count tokens alone, of a model with or without an adapter."""
        layers = base_of(model).get_decoder().layers
        self.layers = len(layers)
        handles = [layer.register_forward_hook(self._count) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.layer_passes += hidden[..., 0].numel() * (2 if hidden.requires_grad else 1)


def run_stage(
    stage: StageSettings,
    rival: Rival,
    model: nn.Module,
    rows: Sequence[Any],
    objectives: list[Objective],
    *,
    pad: int,
    precision: str,
    passes: float,
    seed: int,
    spent: Spent,
    after_step: Callable[[int], None],
    report: Callable[[str], None],
) -> None:
    """Train `model` through one stage.

    Args:
        stage: the settings.
        rival: the method.
        model: with its adapter on.
        rows: encoded examples or pairs.
        objectives: the prepared references.
        pad: token that fills up batches.
        precision: see `cast`.
        passes: reference examples a method may differentiate per step.
        seed: of batches and reference examples.
        spent: grows by what is spent on training, whatever the method adds included.
        after_step: called with the number of steps taken; its time is not counted.
        report: called with lines of progress.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = stage.learning_rate * rival.learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.rate)
    work: list[Any] = batches(rows, seed, stage.steps, stage.batch)
    if stage.name == "dpo":
        work = _with_reference_policy(model, work, pad, precision)
    training = Training(
        model=model,
        optimizer=optimizer,
        parameters=parameters,
        objectives=objectives,
        loss=lambda batch: _loss(stage, model, batch, pad),
        cast=lambda: cast(model, precision),
        steps=stage.steps,
        passes=passes,
        seed=seed,
        preferences=stage.name == "dpo",
        likelihood=stage.likelihood > 0,
    )
    model.train()
    with spent.on(training):
        rival.begin(training)
    for step, batch in enumerate(work):
        with spent.on(training):
            loss = rival.backward(training, step, batch)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 5 == 0 or step + 1 == stage.steps:
            shown = " ".join(f"{name} {value:.3g}" for name, value in rival.logs().items())
            report(f"{stage.name} step {step + 1}/{stage.steps} loss {loss:.3f} {shown}".rstrip())
        after_step(step + 1)
    rival.end(training)


# ------------------------------------------------------------------------------------------ losses


def _loss(stage: StageSettings, model: nn.Module, batch: Any, pad: int) -> Tensor:
    if stage.name == "sft":
        return model(**_on_device(chat.collate(batch, pad), model)).loss
    pairs, reference = batch
    found = _log_probs(model, _sides(pairs), pad, labelled=stage.likelihood > 0)
    ratio = found - reference.to(found.device)
    chosen, rejected = ratio.unflatten(0, (2, len(pairs)))
    # Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    loss = -functional.logsigmoid(stage.beta * (chosen - rejected)).mean()
    if stage.likelihood:
        # Pang et al. 2024 (arXiv 2404.19733), eq. 1.
        lengths = found.new_tensor([len(answer) for (_, answer), _ in pairs])
        loss = loss - stage.likelihood * (found[: len(pairs)] / lengths).mean()
    return loss


@torch.no_grad()
def _with_reference_policy(
    model: nn.Module, work: list[Any], pad: int, precision: str
) -> list[Any]:
    """Each batch with its log-probabilities under the model as it stands: DPO's reference policy.

    They are taken once and the policy needs no second model, whatever the stage before did to it.
    """
    model.eval()
    with cast(model, precision):
        return [(pairs, _log_probs(model, _sides(pairs), pad)) for pairs in work]


def _sides(pairs: Sequence[Any]) -> list[Any]:
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def _log_probs(
    model: nn.Module, examples: Sequence[Any], pad: int, *, labelled: bool = False
) -> Tensor:
    """Log-probability of each answer [B], summed over its tokens.

    Args:
        model: the model.
        examples: B prompts with an answer each.
        pad: token that fills up the batch.
        labelled: give the model the labels, as TRL does; methods read off them where answers begin.
    """
    inputs = _on_device(chat.collate(examples, pad), model)
    labels = inputs["labels"] if labelled else inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    answer = labels != chat.IGNORE_INDEX
    # Only answers in float32: prompts would be most of it.
    found = -functional.cross_entropy(logits[answer].float(), labels[answer], reduction="none")
    rows = answer.nonzero()[:, 0]
    return found.new_zeros(len(examples)).index_add(0, rows, found)


def _on_device(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
