"""`OGPSACallback`: OGPSA for `transformers.Trainer` and TRL's trainers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_ogpsa.arguments import given_config, given_references
from lora_ogpsa.config import OGPSAConfig, has_likelihood
from lora_ogpsa.errors import ProjectionError, StateError
from lora_ogpsa.initialisation import starts_at_base
from lora_ogpsa.models import cache_dir
from lora_ogpsa.processes import alike
from lora_ogpsa.projector import OGPSA
from lora_ogpsa.reference import Objective, Reference
from lora_ogpsa.state import has_state, load_facts

logger = logging.getLogger(__name__)


class OGPSACallback(TrainerCallback):
    """Keeps every step of a Trainer within what the reference objectives allow.

    ::

        trainer = SFTTrainer(model, args, train_dataset=..., peft_config=LoraConfig(...))
        OGPSACallback().attach(trainer)
        trainer.train()

    Passing it as ``callbacks=[OGPSACallback()]`` trains the same; but the Trainer's reporting
    callbacks then run before it and do not see its numbers (``log_history`` and the progress
    display do). :meth:`attach` puts it first.

    The hooks are registered when training begins and removed when it ends, so the callback may
    be constructed at any time, and used for several runs in a row. A run that stops in an error
    or is interrupted leaves them on the model; ``callback.ogpsa.detach()`` removes them then.

    Args:
        config: the settings; ``None`` takes the defaults.
        references: what must not get worse, prepared or not; ``None`` takes the embedded harmless
            prompts.
        cache: folder for the base model's answers; ``None`` takes the user's cache.
        resume_from_checkpoint: the checkpoint to go on from, if it is not
            ``output_dir/checkpoint-<step>``.
    """

    def __init__(
        self,
        config: OGPSAConfig | None = None,
        references: Sequence[Reference | Objective] | None = None,
        *,
        cache: Path | None = None,
        resume_from_checkpoint: str | Path | None = None,
    ) -> None:
        self.config = given_config(config)
        self.references = None if references is None else given_references(references)
        self.cache = cache
        self.resume_from_checkpoint = resume_from_checkpoint and Path(resume_from_checkpoint)
        #: The running projector, from the beginning of training on.
        self.ogpsa: OGPSA | None = None

    def attach(self, trainer: Any) -> OGPSACallback:
        """Put the callback in front of `trainer`'s own, so that `report_to` sees its numbers.

        Returns:
            The callback.

        Raises:
            ProjectionError: the trainer runs in a way in which steps cannot be constrained.
        """
        _check_arguments(trainer.args)
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the references and register the hooks."""
        _check_arguments(args)
        if self.ogpsa is not None:
            self.ogpsa.detach()
        self.ogpsa = OGPSA(
            kwargs["model"],
            kwargs["optimizer"],
            self._references(args),
            self._acting(args, state.global_step, kwargs["model"]),
            processing_class=kwargs.get("processing_class"),
            cache=self.cache or cache_dir(),
        )
        if state.global_step > 0:
            self._resume(args, state.global_step)

    def _acting(self, args: TrainingArguments, step: int, model: Any) -> OGPSAConfig:
        """The settings as they act on the trainer's loss."""
        if not _has_preference_loss(args):
            return self.config
        folder = self._checkpoint(args, step)
        if step > 0 and has_state(folder):
            from_base = bool(load_facts(folder).get("from_base"))
        else:
            from_base = starts_at_base(model)
        likelihood = has_likelihood(
            getattr(args, "loss_type", None), getattr(args, "loss_weights", None)
        )
        return self.config.acting(preferences=True, likelihood=likelihood, from_base=from_base)

    def _checkpoint(self, args: TrainingArguments, step: int) -> Path:
        return self.resume_from_checkpoint or Path(args.output_dir) / f"checkpoint-{step}"

    def _references(self, args: TrainingArguments) -> list[Reference | Objective] | None:
        """The references, with the trainer's own `beta` in preference losses that name none."""
        beta = getattr(args, "beta", None)
        # Some trainers' is not that of a preference loss, and may be zero.
        if self.references is None or not beta:
            return self.references
        return [
            replace(r, beta=beta)
            if isinstance(r, Reference) and r.loss == "dpo" and r.beta is None
            else r
            for r in self.references
        ]

    def _resume(self, args: TrainingArguments, step: int) -> None:
        """Go on from the state beside the checkpoint that the Trainer has just loaded."""
        assert self.ogpsa is not None
        folder = self._checkpoint(args, step)
        found = has_state(folder)
        if not alike(found, self.ogpsa.space.device):
            raise StateError(
                f"Some processes find the OGPSA state in {folder} and some do not: they would "
                "train on different references. Put the checkpoints on a disk that all machines "
                "share, or train with `save_on_each_node=True`."
            )
        if not found:
            logger.warning(
                "The Trainer resumes at step %d, but there is no OGPSA state in %s: the reference "
                "gradients are estimated anew, so the run is protected but not bit for bit the "
                "one that was interrupted. If the checkpoint lies elsewhere, pass "
                "OGPSACallback(resume_from_checkpoint=...).",
                step,
                folder,
            )
            self.ogpsa.steps = step
            return
        self.ogpsa.load(folder)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state beside the Trainer's own checkpoint."""
        if self.ogpsa is not None and args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                self.ogpsa.save(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add OGPSA's numbers to a training log, for every reporter that follows."""
        if self.ogpsa is None or logs is None or "loss" not in logs:
            return
        own = {f"ogpsa/{name}": value for name, value in self.ogpsa.pop_logs().items()}
        logs.update(own)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(own)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks; the optimizer is the user's again."""
        if self.ogpsa is not None:
            self.ogpsa.detach()


def _has_preference_loss(args: TrainingArguments) -> bool:
    """Whether the trainer's loss is of preferences or rewards: those have a `beta`, SFT has none.

    TRL's trainers give the model labels for either, so that its calls do not say.
    """
    return hasattr(args, "beta")


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse what would run unprotected."""
    problems = []
    if getattr(args, "deepspeed", None):
        problems.append("DeepSpeed steps its own flat partitions, outside `optimizer.step`")
    if getattr(args, "fsdp", None):
        problems.append(
            "FSDP through the Trainer has not been tested (FSDP2 in your own loop is supported)"
        )
    if args.n_gpu > 1:
        problems.append(
            "`nn.DataParallel` replicates the model at every step; start one process per GPU with "
            "`accelerate launch`"
        )
    if problems:
        raise ProjectionError(
            f"OGPSA cannot protect this run: {'; '.join(problems)}. Train in one process, or in "
            "several with plain data parallelism (DDP)."
        )
