"""OGPSA under any of its settings, this library's and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ogpsa import OGPSA, OGPSAConfig
from lora_ogpsa.initialisation import starts_at_base
from rivals.base import Rival, Training


class OgpsaRival(Rival):
    """Training with OGPSA's optimizer hooks (arXiv 2602.07892; docs/method.md).

    A refresh gets as many examples as the budget of passes allows, where the settings do not say.

    Args:
        settings: of `OGPSAConfig`.
        references: a name of `Source.references`, or a list of `Reference` arguments.
        adapter: arguments of `Rival`; its own adapter if not given.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        references: str | Sequence[Mapping[str, Any]] = "shared",
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(**(adapter or {}))
        self.settings = dict(settings or {})
        self.references = references  # type: ignore[assignment]

    def begin(self, training: Training) -> None:
        """Attach the hooks, with a clock around them."""
        settings = {**self.settings, "seed": training.seed}
        config = OGPSAConfig.from_dict(settings)
        if "references_per_refresh" not in settings:
            every = config.refresh_every or 1
            refreshes = sum(
                step % every == 0
                or (config.refresh == "interval" and step in config.early_refreshes)
                for step in range(training.steps)
            )
            share = round(training.passes * training.steps / refreshes)
            least = len(training.objectives) if config.refresh == "interval" else 1
            settings["references_per_refresh"] = max(least, share)
        self._marks: list[float] = []
        mark = lambda *_: self._marks.append(training.now())  # noqa: E731
        hooks = training.optimizer
        self._clock = [hooks.register_step_pre_hook(mark), hooks.register_step_post_hook(mark)]
        config = OGPSAConfig.from_dict(settings)
        if training.preferences:
            config = config.acting(
                preferences=True,
                likelihood=training.likelihood,
                from_base=starts_at_base(training.model),
            )
        self._ogpsa = OGPSA(training.model, training.optimizer, training.objectives, config)
        # Hooks run in the order of registration: these close what the first two opened.
        self._clock += [hooks.register_step_pre_hook(mark), hooks.register_step_post_hook(mark)]

    def end(self, training: Training) -> None:
        """Detach, and add up passes and the time between the marks."""
        self._ogpsa.detach()
        for handle in self._clock:
            handle.remove()
        self.passes += sum(self._ogpsa.estimator.drawn)
        opened, closed = self._marks[::2], self._marks[1::2]
        self.extra_seconds += sum(b - a for a, b in zip(opened, closed, strict=True))

    def logs(self) -> dict[str, float]:
        """What happened since the last call."""
        return self._ogpsa.pop_logs()
