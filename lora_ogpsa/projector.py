"""`OGPSA`: the refresh schedule and the optimizer hooks; the entry for plain PyTorch loops."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_ogpsa import safeguards
from lora_ogpsa.adapters import AdapterSpace
from lora_ogpsa.answers import base_of, decoder_of
from lora_ogpsa.arguments import given_config, given_references
from lora_ogpsa.config import OGPSAConfig
from lora_ogpsa.emphasis import FirstTokenEmphasis
from lora_ogpsa.errors import ConfigError, ProjectionError
from lora_ogpsa.estimator import Estimator, Refreshed
from lora_ogpsa.full_precision import full_precision
from lora_ogpsa.hooks import OwnHook, forget_compiled
from lora_ogpsa.initialisation import starts_at_base
from lora_ogpsa.input_gradients import NoInputGradients
from lora_ogpsa.metric import InverseMetric, euclidean
from lora_ogpsa.optimizers import check_optimizer, unwrap_optimizer
from lora_ogpsa.processes import first_process_first
from lora_ogpsa.quantised import keep_differentiable
from lora_ogpsa.reference import Objective, Reference, default_references
from lora_ogpsa.rules import budget_correction, halfspace_correction, restoration_step
from lora_ogpsa.sharding import check_sharding, local_pair, whole
from lora_ogpsa.state import load_state, require_equal, require_near, save_state
from lora_ogpsa.steplogs import StepLogs

logger = logging.getLogger(__name__)

# How much a new step counts in the running length of a typical step.
_TYPICAL_SHARE = 0.1

# Whose hooks are on which base model. They would act twice as strongly beside those of another.
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[OGPSA]] = weakref.WeakKeyDictionary()


class OGPSA:
    r"""Keeps every optimizer step within what the reference objectives allow.

    The optimizer stays the user's own. Its step hooks record the parameters before a step, take
    what it really did to them, :math:`\Delta = \theta_{t+1} - \theta_t`, and replace it by the
    nearest step that meets the constraint (docs/method.md; arXiv 2602.07892 for the idea).
    Reference gradients are refreshed in the same hook, on schedule.

    ::

        with OGPSA(model, optimizer, references, config, processing_class=tokenizer):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    .. warning::
        Create it after the model is on its device and in its final form, and after the optimizer
        holds the adapter's parameters. Closures (LBFGS, SAM) are refused.

    Args:
        model: the PEFT model; unwrapped, if it has been wrapped for several processes.
        optimizer: any ``torch.optim.Optimizer``, or an accelerate wrapper around one.
        references: :class:`Reference` or prepared :class:`Objective`; ``None`` takes the
            embedded harmless prompts.
        config: the settings; ``None`` takes the defaults.
        processing_class: the tokenizer, needed for references that hold text.
        cache: folder in which the base model's answers are kept; ``None`` keeps none.

    Raises:
        AdapterError: the model is no PEFT model, or has no trainable LoRA parameter.
        ProjectionError: the optimizer does not hold the adapter's parameters, or is of a kind
            whose steps cannot be constrained.
        ConfigError: the references and the settings do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        references: Sequence[Reference | Objective] | None = None,
        config: OGPSAConfig | None = None,
        *,
        processing_class: Any = None,
        cache: Path | None = None,
    ) -> None:
        self.config = given_config(config)
        chosen = default_references() if references is None else given_references(references)
        self.model = model
        self.optimizer = unwrap_optimizer(optimizer)
        safeguards.check_model(model)
        self._base = base_of(model)
        self.space = AdapterSpace.from_model(model)
        check_optimizer(self.optimizer)
        check_sharding(model, self.space.parameters)
        #: Whether training began at the base model, with an adapter that added nothing.
        self.from_base = starts_at_base(model)
        self._held = safeguards.check_held(self.space, self.optimizer)
        safeguards.warn_of_rounding(self.space)
        if unpacked := keep_differentiable(model):
            logger.warning(
                "%d 4-bit layers were in bitsandbytes' CPU inference format, through which no "
                "gradient flows; they have been unpacked. Gradients taken before were wrong, and "
                "the scales are rounded to bfloat16: load the model again before evaluating it, or "
                "attach OGPSA first.",
                unpacked,
            )
        if self.space.sharded:
            chosen = [self._ready(r) for r in chosen]
        names = [r.name for r in chosen]
        if len(set(names)) < len(names):
            raise ConfigError(f"Reference names should be unique. Found {names}.")
        safeguards.check_base(model, chosen, self.config)
        with first_process_first():
            objectives = [
                r.prepare(model, processing_class, cache=cache) if isinstance(r, Reference) else r
                for r in chosen
            ]
        self.estimator = Estimator(model, self.space, objectives, self.config)
        self.metric: InverseMetric | None = None
        if self.config.metric == "optimizer":
            self.metric = InverseMetric(self.space, self.optimizer, self.config.metric_damping)
        self._budgets = torch.tensor(
            [
                self.config.budget if o.reference.budget is None else o.reference.budget
                for o in objectives
            ],
            dtype=torch.float32,
            device=self.space.device,
        )
        self._shares = torch.tensor(
            [o.reference.share for o in objectives],
            dtype=torch.float32,
            device=self.space.device,
        )
        #: Optimizer steps taken so far.
        self.steps = 0
        # The parameters before a step; only within one, when a training pass's memory is free.
        self._flat: Tensor | None = None
        self._typical = torch.zeros((), dtype=torch.float32, device=self.space.device)
        self._moved = False
        self._skipped = False
        self._armed = False
        self._nested = False
        #: Whether the last training pass got labels; ``None`` before there was one.
        self.saw_labels: bool | None = None
        self._said_idle = False
        #: Running sums of what happens in steps and refreshes.
        self.logs = StepLogs()
        self._handles: list[Any] = []
        self.attach()

    @staticmethod
    def _ready(reference: Reference | Objective) -> Reference | Objective:
        """Under FSDP2 the model can no longer generate: its answers must be there already."""
        if isinstance(reference, Reference) and reference.asks_the_model():
            raise ConfigError(
                f"Reference `{reference.name}` needs the base model's own answers, and a model "
                "sharded by FSDP2 cannot generate them. Before `fully_shard`, call "
                "`reference.prepare(model, tokenizer)` and pass what it returns."
            )
        return reference

    # ------------------------------------------------------------------ life

    def attach(self) -> None:
        """Register the hooks; done on construction.

        Those of another OGPSA on this model, of an earlier stage or of a run that was interrupted,
        are removed.
        """
        if self._handles:
            return
        other = _attached.get(self._base, lambda: None)()
        if other is not None:
            logger.warning(
                "Another OGPSA was still attached to this model and has been detached: steps of "
                "its optimizer are not protected any more. Call `detach()` at the end of a stage."
            )
            other.detach()
        _attached[self._base] = weakref.ref(self)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            # Not the model itself: accelerate's autocast begins inside it. Nor an adapted layer:
            # not all tokens, or none, pass through an expert or a vision tower.
            (decoder_of(self.model) or self._base).register_forward_pre_hook(
                OwnHook(self._watch_forward), with_kwargs=True
            ),
        ]
        # Where processes gather weights together, every layer's backward belongs to it.
        if not self.space.sharded:
            self._handles.append(NoInputGradients(self.model))
        if self.config.penalty is None or self.config.first_token_weight:
            self._handles.append(
                self.model.register_forward_pre_hook(OwnHook(self._watch_labels), with_kwargs=True)
            )
        if self.config.first_token_weight:
            self._handles.append(FirstTokenEmphasis(self.model, self.config.first_token_weight))
        forget_compiled()

    def detach(self) -> None:
        """Remove every hook; model and optimizer are as if OGPSA had never been there."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            forget_compiled()
        self._handles = []
        if _attached.get(self._base, lambda: None)() is self:
            del _attached[self._base]

    def __enter__(self) -> OGPSA:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __reduce__(self) -> NoReturn:
        # A copied optimizer has no hooks, so a copy would say it protects and not do so.
        raise ProjectionError(
            "An OGPSA cannot be copied or pickled: it belongs to one model and one optimizer. Copy "
            "those and attach a new one; `save` and `load` keep its state."
        )

    # ------------------------------------------------------------------ hooks

    def _watch_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the autocast state and the size of training forwards, for reference passes."""
        if module.training and torch.is_grad_enabled():
            # A step that has not ended by now was interrupted: the next is not one inside it.
            self._armed = False
            kind = self.space.device.type
            passes = self.estimator.passes
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            read = next((value for value in given if isinstance(value, Tensor)), None)
            # Processes that gather weights together have to recompute the same passes.
            if read is not None and not self.space.sharded:
                passes.training_tokens = read.shape[:2].numel()
            cast = passes.autocast
            cast.enabled = torch.is_autocast_enabled(kind)
            cast.dtype = torch.get_autocast_dtype(kind) if cast.enabled else torch.float32

    def _watch_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note whether the training loss can be one on labels."""
        if module.training and torch.is_grad_enabled():
            self.saw_labels = kwargs.get("labels") is not None

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        safeguards.refuse_closure(args, kwargs)
        held = safeguards.check_held(self.space, self.optimizer)
        if not held <= self._held:
            safeguards.refuse_new(self.model, held - self._held)
            self._held |= held
        safeguards.check_device(self.space, self._typical)
        # A fused optimizer under a GradScaler runs its hooks even if the step is skipped.
        overflow = getattr(optimizer, "found_inf", None)
        self._skipped = overflow is not None and bool(overflow > 0)
        if self._skipped:
            return
        safeguards.check_gradients(self.space)
        # A subclass whose `step` calls its base class's fires the hooks twice, one pair inside the
        # other, if torch has hooked both classes (PEFT's Riemannian optimizer).
        self._nested = self._armed
        # What was measured so far was measured before this step.
        self.estimator.measured.zero_()
        if not self._nested and not self._refreshes_after and self.is_refresh_due():
            self.refresh()
        self._armed = True
        penalty = self.config.penalty_on(labels=bool(self.saw_labels))
        if penalty and not self._nested:
            self._penalise(optimizer, penalty)
        if self.config.space == "gradient":
            self._project_gradients()
        else:
            self._flat = self.space.read()

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._skipped:
            return
        if not self._armed:
            # The outer of two nested steps: the inner one has been constrained already.
            if self._flat is not None:
                safeguards.check_rest(self.space, self.optimizer, self._flat)
            return
        if self._flat is not None:
            if self._refreshes_after and self.is_refresh_due():
                self._refresh_after(self._flat)
            self._project_update(self._flat)
        self._say_what_is_idle()
        self.steps += 1
        self._armed = False
        nested_update = self._nested and self.config.space == "update"
        self._flat = self.space.read() if nested_update else None

    def _say_what_is_idle(self) -> None:
        """Once a run, what its loss leaves without effect."""
        config = self.config
        acts_on_labels = config.penalty is None or config.first_token_weight
        if self.saw_labels or self._said_idle or not acts_on_labels:
            return
        self._said_idle = True
        logger.warning(
            "No training pass has called the model, in training mode, with `labels` (TRL and "
            "transformers take them out for `label_smoothing_factor` and `compute_loss_func`): "
            "`first_token_weight` does nothing then, nor does a `penalty` that is not given. "
            "Harmful prompts and harmless look-alikes will be told apart less well. Give "
            "`penalty`, and `first_token_weight=0` if that is wanted."
        )

    @property
    def _refreshes_after(self) -> bool:
        """Whether losses are measured where the optimizer's step led, not where it began.

        A budget is on what a loss is, and the divergence from the base model has no gradient at
        the base model: measured there, it would let the first steps pass unseen.
        """
        return self.config.constraint == "budget"

    def _refresh_after(self, before: Tensor) -> None:
        try:
            self.refresh()
        except BaseException:
            self.space.write(before)
            self._armed, self._flat = False, None
            raise

    @full_precision()
    def _penalise(self, optimizer: Any, penalty: float) -> None:
        """Add a gradient of the reference losses to the training gradient."""
        if self.estimator.latest is None:
            flat = (penalty * self._shares / self._shares.sum()) @ self.estimator.means
        else:
            flat = penalty * self.estimator.latest
        # Under a GradScaler a fused optimizer divides by the scale itself.
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            flat *= scale
        for view, parameter in zip(self.space.views(flat), self.space.parameters, strict=True):
            if parameter.grad is not None:
                target, value = local_pair(parameter.grad, view)
                target.add_(value)

    @full_precision()
    def _project_gradients(self) -> None:
        flat = self.space.zeros()
        views = self.space.views(flat)
        held = [(v, p.grad) for v, p in zip(views, self.space.parameters, strict=True)]
        for view, grad in held:
            if grad is not None:
                view.copy_(whole(grad))
        # The constraints speak of a step, and the step goes against the gradient.
        flat.neg_()
        fix = self._correction(flat, None)
        self.logs.removed(fix, flat)
        flat.add_(fix).neg_()
        for view, grad in held:
            if grad is not None:
                target, value = local_pair(grad, view)
                target.copy_(value)

    @full_precision()
    def _project_update(self, flat: Tensor) -> None:
        views = self.space.views(flat)
        now = self.space.values()
        if any(p.dtype != torch.float32 for p in now):
            now = [p.float() for p in now]
        torch._foreach_sub_(views, now)
        step = flat.neg_()
        weights: Tensor | None
        if self.metric is not None:
            weights = self.metric.update()
        else:
            weights = euclidean(self.space, self.optimizer)
        if not self._moved:
            self._moved = safeguards.check_movement(self.space, self.optimizer, step)
        length = step.norm()
        seen = self._typical > 0
        self._typical.lerp_(length, torch.where(seen, _TYPICAL_SHARE, 1.0))
        fix = self._correction(step, weights)
        self.logs.removed(fix, step)
        self.space.add(fix)

    # ------------------------------------------------------------------ the rule

    def _correction(self, step: Tensor, weights: Tensor | None) -> Tensor:
        """X - Δ [d] for the configured constraint."""
        config, estimator = self.config, self.estimator
        if config.constraint == "budget":
            return budget_correction(
                estimator.means,
                step,
                self._budgets - estimator.excess,
                weights,
                recovery=config.recovery,
                max_correction=config.max_correction,
                behind=estimator.measured,
            )
        if estimator.subspace is not None:
            return estimator.subspace.correction(step, weights)
        fix = torch.zeros_like(step)
        for slab in estimator.slabs:
            rows = slab.view(estimator.means).transpose(0, 1)
            inverse = None if weights is None else slab.view(weights)
            none_worse = rows.new_zeros(rows.shape[:2])
            found = halfspace_correction(rows, slab.view(step), inverse, bound=none_worse)
            slab.view(fix).copy_(found)
        return fix

    # ------------------------------------------------------------------ refreshes

    def is_refresh_due(self) -> bool:
        """Whether the coming optimizer step refreshes the reference gradients first."""
        if not any(self.estimator.mass):
            return True  # nothing is protected yet, in a run resumed without its state too
        every = self.config.refresh_every or 1
        early = self.config.refresh == "interval" and self.steps in self.config.early_refreshes
        return early or self.steps % every == 0

    def refresh(self) -> Refreshed:
        """Refresh the reference gradients now, and restore if the settings say so."""
        self.space.bind(self.model)
        began = time.perf_counter()
        seen = self.estimator.refresh()
        if self.config.restoration > 0 and seen.losses:
            self._restore()
        self.logs.refreshed(seen, time.perf_counter() - began)
        return seen

    @full_precision()
    def _restore(self) -> None:
        """A step back towards the base model's reference losses (docs/method.md)."""
        if self.metric is not None:
            weights = self.metric.latest
        else:
            weights = euclidean(self.space, self.optimizer)
        excess = self.estimator.excess.clamp_min(0) * self.config.restoration
        back = restoration_step(self.estimator.means, excess, weights)
        limit = self.config.restoration_cap * self._typical
        back *= (limit / back.norm().clamp_min(torch.finfo(back.dtype).tiny)).clamp_max(1.0)
        self.space.add(back)

    # ------------------------------------------------------------------ state

    def save(self, folder: str | Path) -> None:
        """Write everything a resumed run needs into a safetensors file in `folder`."""
        tensors, facts = self.estimator.state_dict()
        tensors["typical"] = self._typical
        if self.metric is not None:
            tensors.update(self.metric.state_dict())
        save_state(
            Path(folder),
            tensors,
            {
                "steps": self.steps,
                "moved": self._moved,
                "from_base": self.from_base,
                "estimator": facts,
                "config": self.config.to_dict(),
                "layout": self._layout(),
                "references": self._references(),
                "weights": self._weights(),
            },
        )

    def load(self, folder: str | Path) -> None:
        """Go on from what :meth:`save` wrote: bases, sketches, schedule and counters.

        Load the adapter's weights first.

        Raises:
            StateError: there is no whole state in `folder`, or it belongs to another LoRA layout,
                other settings, references or weights; the difference is named.
        """
        tensors, facts = load_state(Path(folder))
        require_equal(facts["layout"], self._layout(), "LoRA layout")
        require_equal(facts["config"], self.config.to_dict(), "configuration")
        require_equal(facts["references"], self._references(), "set of references")
        require_near(facts["weights"], self._weights())
        self.estimator.load_state_dict(tensors, facts["estimator"])
        self._typical.copy_(tensors["typical"])
        if self.metric is not None:
            self.metric.load_state_dict(tensors)
        self.steps, self._moved = int(facts["steps"]), bool(facts["moved"])
        self.from_base = bool(facts.get("from_base"))

    def _layout(self) -> dict[str, list[int]]:
        return {
            name: list(shape)
            for block in self.space.blocks
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        }

    def _references(self) -> dict[str, Any]:
        return {
            f"{objective.name}.{key}": value
            for objective in self.estimator.objectives
            for key, value in objective.identity().items()
        }

    def _weights(self) -> dict[str, float]:
        """The length of every LoRA parameter, by which a state is told from another run's.

        Sharded ones are left out: to put them together every process would have to save.
        """
        if self.space.sharded:
            return {}
        norms = [view.norm() for view in self.space.views(self.space.read())]
        found = torch.stack(norms).tolist()
        return dict(zip(self.space.parameter_names, found, strict=True))

    # ------------------------------------------------------------------ reporting

    def pop_logs(self) -> dict[str, float]:
        """What happened since the last call, averaged; waits for the device.

        Keys: ``removed_energy`` (share of the step's energy that the correction changed),
        ``captured_energy``, ``refresh_seconds`` (sum), and per reference ``loss/<name>`` and
        ``excess/<name>``.
        """
        return self.logs.pop()
