"""The methods that the trade-off benchmark compares, by name.

All train the same model on the same batches with the same optimizer; all that use references get
the same examples and the same number of passes through them. `early_stop` and `scaled_adapter` are
no methods here: they are read off plain training's own checkpoints and strengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_ogpsa import ContrastConfig, OGPSAConfig
from rivals.base import Rival
from rivals.contrast import ContrastPenaltyRival, ContrastRival, OnContrastAdapter
from rivals.ewc import EwcRival
from rivals.keepers import CordaRival, MicaRival, OsfRival
from rivals.ogpsa import OgpsaRival
from rivals.penalties import PenaltyRival
from rivals.surgery import SurgeryRival

KINDS: dict[str, type[Rival]] = {
    "plain": Rival,
    "ogpsa": OgpsaRival,
    "penalty": PenaltyRival,
    "surgery": SurgeryRival,
    "ewc": EwcRival,
    "corda": CordaRival,
    "osf": OsfRival,
    "mica": MicaRival,
    "contrast": ContrastRival,
    "contrast_penalty": ContrastPenaltyRival,
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: of the row.
        kind: in `KINDS`.
        settings: arguments of the kind.
        description: one line.
        grid: name of the grid this is one setting of.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    grid: str | None = None

    def build(self) -> Rival:
        """A fresh instance, for one run."""
        return KINDS[self.kind](**self.settings)

    def identity(self, *, likelihood: bool = False) -> dict[str, Any]:
        """What tells its results from another's; an OGPSA rule by its resolved settings.

        Args:
            likelihood: whether it trains on preferences with a part of likelihood and nothing else,
                where the default penalty is another.
        """
        settings = dict(self.settings)
        if issubclass(KINDS[self.kind], OgpsaRival):
            config = OGPSAConfig.from_dict(settings.get("settings", {}))
            if likelihood:
                config = config.acting(preferences=True, likelihood=True, from_base=True)
            settings["settings"] = config.to_dict()
            # What is as it was before it could be set has no part in it, so that cells from before
            # keep their names.
            if not config.keeps_latest:
                del settings["settings"]["penalty_of"]
        if issubclass(KINDS[self.kind], OnContrastAdapter):
            contrast = ContrastConfig(**settings.get("contrast", {})).to_dict()
            # Nor has what is off.
            settings["contrast"] = {k: v for k, v in contrast.items() if v is not False}
        return {"kind": self.kind, **settings}


def ogpsa_method(name: str, settings: Mapping[str, Any], description: str = "") -> Method:
    """A rule by its `OGPSAConfig` settings.

    `references` among them says on which references, `adapter` with which arguments of `Rival`,
    `contrast` with which settings of a contrast adapter.
    """
    own = ("references", "adapter", "contrast")
    rule = {k: v for k, v in settings.items() if k not in own}
    made_of = {"settings": rule, "references": settings.get("references", "shared")}
    made_of |= {k: settings[k] for k in ("adapter", "contrast") if k in settings}
    return Method(name, "contrast" if "contrast" in settings else "ogpsa", made_of, description)


FIRST_TOKEN_WEIGHT = OGPSAConfig().first_token_weight
_EVERY_20 = {"refresh_every": 20, "reference_batch_size": 4}
_INTERVAL = {**_EVERY_20, "early_refreshes": [2], "rank": 16}
_RESTORING = {
    "constraint": "halfspace",
    "refresh": "interval",
    "refresh_every": 10,
    "reference_batch_size": 4,
    "early_refreshes": [2],
    "restoration": 1.0,
}

# One refresh, which corrects nothing.
_UNPROTECTED = {
    "budget": 1e6,
    "penalty": 0.0,
    "refresh_every": 1_000_000,
    "references_per_refresh": 1,
}

_RANK1 = {"rank": 1, "target_modules": ["up_proj"]}
_RANK1_FASTER = {**_RANK1, "learning_rate": 6.0}

_ALL = [
    Method("plain", "plain", {}, "LoRA, r = 16 on all linear layers"),
    Method("plain_again", "plain", {}, "plain training once more, on another machine"),
    Method(
        "low_lr_0.3", "plain", {"learning_rate": 0.3}, "plain at 0.3 of the learning rate", "low_lr"
    ),
    Method(
        "low_lr_0.1", "plain", {"learning_rate": 0.1}, "plain at 0.1 of the learning rate", "low_lr"
    ),
    Method(
        "rank1_up",
        "plain",
        _RANK1,
        "LoRA, r = 1 on the MLP's up-projections alone (arXiv 2507.17075)",
    ),
    Method(
        "rank1_up_6",
        "plain",
        _RANK1_FASTER,
        "the same at 6 times the learning rate",
    ),
    ogpsa_method(
        "default",
        {"references": "both_forms", "contrast": {}},
        "this library's default rule on a contrast adapter, as in the quickstart",
    ),
    ogpsa_method(
        "default_lora",
        {"references": "both_forms"},
        "the same rule on LoRA, r = 16 on all linear layers",
    ),
    ogpsa_method(
        "default_one",
        {"references": "both_forms", "contrast": {}, "references_per_refresh": 1},
        "the default with one reference example a step",
    ),
    ogpsa_method(
        "contrast_alone",
        {"references": "both_forms", "contrast": {}, **_UNPROTECTED},
        "plain training of a contrast adapter",
    ),
    ogpsa_method(
        "paper",
        {"preset": "paper", **_EVERY_20, "references": "datasets"},
        "the published rule, on answers from the data sets as published",
    ),
    ogpsa_method(
        "paper_shared", {"preset": "paper", **_EVERY_20}, "the published rule, same references"
    ),
    ogpsa_method(
        "orthogonal", {"constraint": "orthogonal", **_INTERVAL}, "two-sided, per-example rows"
    ),
    ogpsa_method("halfspace", _RESTORING, "one-sided with restoration, every 10 steps"),
    *(
        Method(
            f"replay_{weight:g}",
            "penalty",
            {"weight": weight, "loss": "distill"},
            f"reference answers mixed into the batch at weight {weight:g}",
            "replay",
        )
        for weight in (0.1, 0.3, 1.0)
    ),
    *(
        Method(
            f"replay_{weight:g}_default",
            "penalty",
            {
                "weight": weight,
                "loss": "distill",
                "first_token_weight": FIRST_TOKEN_WEIGHT,
                "references": "both_forms",
            },
            f"the same at weight {weight:g}, first answer tokens and references as in `default`",
            "replay_default",
        )
        for weight in (0.3, 1.0)
    ),
    *(
        Method(
            f"kl_penalty_{weight:g}",
            "penalty",
            {"weight": weight, "loss": "kl"},
            f"KL from the base model on references, weight {weight:g}",
            "kl_penalty",
        )
        for weight in (0.1, 0.3, 1.0)
    ),
    *(
        Method(
            f"kl_penalty_{weight:g}_{name}",
            "penalty",
            {
                "weight": weight,
                "loss": "kl",
                "first_token_weight": FIRST_TOKEN_WEIGHT,
                **references,
            },
            f"the same at weight {weight:g}, {what} as in `default`",
            f"kl_penalty_{name}",
        )
        for name, references, what in (
            ("first", {}, "first answer tokens weighed"),
            ("default", {"references": "both_forms"}, "first answer tokens and references"),
        )
        for weight in (0.3, 1.0)
    ),
    Method(
        "kl_penalty_1_contrast",
        "contrast_penalty",
        {
            "weight": 1.0,
            "loss": "kl",
            "first_token_weight": FIRST_TOKEN_WEIGHT,
            "references": "both_forms",
        },
        "`kl_penalty_1_default` on the adapter of `default`",
    ),
    Method(
        "kl_penalty_1_rank1",
        "penalty",
        {
            "weight": 1.0,
            "loss": "kl",
            "first_token_weight": FIRST_TOKEN_WEIGHT,
            "adapter": _RANK1_FASTER,
        },
        "`kl_penalty_1_first` on the adapter of `rank1_up_6`",
    ),
    *(
        Method(
            f"ewc_{weight:g}",
            "ewc",
            {"weight": weight},
            f"diagonal Fisher at the start, weight {weight:g}",
            "ewc",
        )
        for weight in (10.0, 100.0, 1000.0)
    ),
    *(
        Method(
            f"ewc_renewed_{weight:g}",
            "ewc",
            {"weight": weight, "renew_at": 0.25},
            f"the same, estimated again after a quarter of the stage, weight {weight:g}",
            "ewc",
        )
        for weight in (100.0, 1000.0)
    ),
    *(
        Method(
            rule if loss == "distill" else f"{rule}_kl",
            "surgery",
            {"rule": rule, "loss": loss},
            f"{title} of safety and reference gradients, references by {what}",
            rule,
        )
        for rule, title in (("agem", "A-GEM"), ("pcgrad", "PCGrad"))
        for loss, what in (("distill", "their answers' NLL"), ("kl", "KL from the base model"))
    ),
    Method(
        "ewc_100_default",
        "ewc",
        {"weight": 100.0, "references": "both_forms"},
        "`ewc_100` on the references of `default`",
    ),
    *(
        Method(
            f"{rule}_kl_default",
            "surgery",
            {"rule": rule, "loss": "kl", "references": "both_forms"},
            f"`{rule}_kl` on the references of `default`",
        )
        for rule in ("agem", "pcgrad")
    ),
    Method("corda", "corda", {}, "CorDA initialisation, knowledge-preserved mode"),
    Method("osf", "osf", {"trained": 16}, "OSF, 16 smallest singular directions trained", "osf"),
    Method("osf_half", "osf", {}, "OSF, PEFT's default: the smaller half trained", "osf"),
    Method("mica", "mica", {}, "MiCA: minor components"),
]

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
