"""`ContrastConfig`: where a contrast adapter is put and how it is set; see `contrast`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora_ogpsa.errors import ConfigError

FEWEST = 4  # prompts of a kind
_LEAST = {"prompts": FEWEST, "references": FEWEST, "layers": 1, "answer_tokens": 0}


@dataclass(frozen=True)
class ContrastConfig:
    r"""Where a contrast adapter is put and how its A is set.

    Args:
        prompts: most safety prompts looked at, spread over the data.
        references: most examples looked at of each reference.
        layers: how many layers in a row are adapted: of the first four fifths of the model, the
            first in which prompts are told apart nearly as well as in any, by cross-validation.
            Default: three tenths of the model's.
        target_modules: the modules that are adapted, by the last part of their names. Default:
            those that read a layer's hidden states (``q_proj``, ``k_proj``, ``v_proj``,
            ``gate_proj``, ``up_proj`` in most models).
        gain: how strongly A responds to safety prompts, as a multiple of a usual row of A. So
            few rows in a part of the layers have to be longer to learn at a usual learning rate.
        answer_tokens: how many of the first tokens of the safety answers are looked at (of every
            third answer), for a row of A that responds to them; 0 does without.
        threshold: where A's response to the end of a prompt changes its sign, from 0, the harmless
            prompts' mean, to 1, the safety prompts'. Above 0 what is learnt from refusals pushes a
            usual harmless prompt away from them, and only a doubtful one is left as it is.
        ridge: :math:`\lambda` of `discriminant`.
        text_weight: :math:`\alpha` of `discriminant`: how much not responding to other text
            counts.

    Raises:
        ConfigError: a value is out of range.
    """

    prompts: int = 300
    references: int = 80
    layers: int | None = None
    target_modules: tuple[str, ...] | None = None
    gain: float = 40.0
    answer_tokens: int = 8
    threshold: float = 0.1
    ridge: float = 0.1
    text_weight: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"`{name}` should be at least {least}. Found {value}.")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"`threshold` should be in [0, 1). Found {self.threshold}.")
        for name in ("gain", "ridge", "text_weight"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be above 0. Found {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields, for files."""
        return asdict(self)
