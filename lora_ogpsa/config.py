"""`OGPSAConfig`: every choice of the method, validated in one place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lora_ogpsa.errors import ConfigError

Space = Literal["update", "gradient"]
Granularity = Literal["adapter", "tensor", "global"]
Constraint = Literal["budget", "halfspace", "orthogonal"]
Metric = Literal["optimizer", "euclidean"]
Refresh = Literal["stream", "interval"]
Rows = Literal["examples", "means"]
BasisDtype = Literal["float32", "bfloat16", "float16", "int8"]
PenaltyOf = Literal["means", "latest"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "space": ("update", "gradient"),
    "granularity": ("adapter", "tensor", "global"),
    "constraint": ("budget", "halfspace", "orthogonal"),
    "metric": ("optimizer", "euclidean"),
    "penalty_of": ("means", "latest"),
    "refresh": ("stream", "interval"),
    "rows": ("examples", "means"),
    "basis_dtype": ("float32", "bfloat16", "float16", "int8"),
}

# What a preset fixes is its rule: a different value asked for beside it is a contradiction.
# What it only suggests is its cost, which a user may change without leaving the method.
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": (
        {
            "space": "gradient",
            "granularity": "tensor",
            "constraint": "orthogonal",
            "metric": "euclidean",
            "refresh": "interval",
            "rows": "means",
            "decay": 0.0,
            "early_refreshes": (),
            "penalty": 0.0,
            "restoration": 0.0,
            "first_token_weight": 0.0,
        },
        {
            "rank": 2,
            "refresh_every": 30,
            "references_per_refresh": 400,
            "basis_dtype": "float32",  # two rows cost nothing
        },
    ),
}


#: `OGPSAConfig.penalty` where it is not given, in steps on next-token losses...
SUPERVISED_PENALTY = 0.25
#: ...and, of the latest gradient, on preference losses with likelihood that train a new adapter.
LIKELIHOOD_PENALTY = 0.5
# What numbers lie below: products with them must stay finite in float32.
MOST = 1e30


def has_likelihood(
    loss_type: str | Sequence[str] | None, loss_weights: Sequence[float] | None
) -> bool:
    """Whether answers' likelihood is a part of a preference loss.

    Args:
        loss_type: of the trainer's arguments. TRL's DPO can have several and calls that one
            ``"sft"``; other preference trainers have none of the name.
        loss_weights: of these; ``None`` weighs all alike.
    """
    kinds = [loss_type] if isinstance(loss_type, str) else list(loss_type or ())
    weights = loss_weights or [1.0] * len(kinds)
    return any(k == "sft" and w != 0 for k, w in zip(kinds, weights, strict=False))


@dataclass(frozen=True)
class OGPSAConfig:
    r"""How the reference subspace is estimated and what is removed from each safety update.

    Fields that default to ``None`` take a value that depends on the others; the resolved value
    stands in the attribute after construction.

    Args:
        preset: ``"paper"`` is the published algorithm (arXiv 2602.07892): gradient space, one
            basis per weight tensor, at most two normalised data-set means, a fixed interval.
            Its rule cannot be changed field by field; its cost (``rank``, ``refresh_every``,
            ``references_per_refresh``) can.
        space: ``"update"`` constrains what the optimizer really did to the parameters, whatever
            its preconditioning, momentum, clipping or weight decay; ``"gradient"`` constrains
            the gradient before the optimizer sees it, which adaptive optimizers undo.
        constraint: ``"budget"`` lets each reference loss rise by at most ``budget`` nats per
            token over the base model and steers back what is above; ``"halfspace"`` removes
            only what would raise a reference loss; ``"orthogonal"`` removes every component in
            the basis, of either sign.
        granularity: one constraint per adapted module (``"adapter"``), per tensor
            (``"tensor"``), or over all parameters at once (``"global"``). Default: global for
            ``budget`` (a loss is one number for the whole model), else adapter.
        metric: the inner product in which the correction is smallest: ``"optimizer"`` weighs
            each coordinate with :math:`\sqrt{\hat v} + \delta`, Adam's own; ``"euclidean"``
            weighs all alike that has a learning rate. Default: optimizer in update space, euclidean
            in gradient space.
        metric_damping: :math:`\delta` as a share of the root mean square of
            :math:`\sqrt{\hat v}`.
        refresh: ``"stream"`` takes one small reference micro-batch at every refresh, references
            in turn by their shares, and folds it into decayed rows; ``"interval"`` gathers fresh
            rows of all references at every refresh. Default: interval for ``orthogonal``, else
            stream.
        refresh_every: optimizer steps between refreshes. Default: 1 streaming, 20 at intervals.
        references_per_refresh: reference examples per refresh: of the one reference whose turn
            it is when streaming, over all references at intervals. Default: 3 and 16. With one
            example a step the mean gradients are mostly noise, and corrections along them hold
            training back without keeping the references.
        reference_batch_size: examples per backward pass of a refresh.
        early_refreshes: steps at which an interval schedule refreshes besides its own. LoRA's
            B is zero at first, so A's gradients appear only after the first step.
        decay: what is left of the old rows when new ones are folded in. Default: 0.8
            streaming, 0 (start over) at intervals.
        adaptive_threshold: at an interval refresh, first probe with one reference micro-batch;
            keep the basis if it captures at least this share of the probe's energy.
        rank: most basis rows per block, :math:`k`. Default: 8.
        energy: with ``rows="examples"``, take the fewest, up to ``rank``, that capture this share
            of the reference energy beside the mean rows. ``None`` takes ``rank`` rows wherever the
            references span them.
        sketch_size: rows :math:`\ell` of each Frequent Directions sketch. Default: twice
            ``rank``.
        rows: what the basis is made of: ``"examples"`` (per-example gradients, and the data-set
            means) or ``"means"`` (the means alone).
        basis_dtype: dtype the basis is stored in; ``"int8"`` is 8-bit blocks with a scale each.
            Default: bfloat16. Lower precision costs no exactness: the projection is orthogonal to
            the rows as stored.
        offload: keep the bases and sketches of ``constraint="orthogonal"`` in host memory and
            stream the bases to the device at each step.
        budget: :math:`\tau`, nats per token by which a reference loss may exceed the base
            model's. A reference may set its own.
        recovery: :math:`\rho`, the share of an overdrawn budget recovered per step.
        max_correction: :math:`c`; a correction that steers back an overdrawn budget is at most
            this many times as long as the step.
        penalty: :math:`\lambda`, how many times the reference losses' mean gradient (by their
            shares, as of the last refresh) is added to the training gradient (0 is off). The
            optimizer's momentum then works against drift too, and the constraint has less to
            correct. It costs no reference pass. Update space, and not for ``orthogonal``.
            ``None`` (default) stands for what `acting` chooses by the training loss: for
            ``budget`` `SUPERVISED_PENALTY` on next-token losses, `LIKELIHOOD_PENALTY` on
            preference losses with a part of likelihood if the adapter is new, and 0 on others,
            where it led back to the base model with every reference well within its budget; else
            0. In a loop of your own it is `SUPERVISED_PENALTY` in steps on a loss of ``labels`` in
            the model's call and 0 in others, unless you call `acting`.
        penalty_of: what that gradient is: of the decayed mean rows by the references' shares
            (``"means"``), or the mean over the examples of the last refresh alone (``"latest"``),
            as in a KL penalty that takes references in turn. The rows vary less; they lag, and pull
            on when a reference is back. ``None`` (default) is ``"latest"`` on preference losses
            with a part of likelihood if the adapter is new, else ``"means"``.
        restoration: strength in [0, 1] of a step back to the base model's reference losses at
            each refresh (0 is off). The budget constraint has its own (``recovery``).
        restoration_cap: the restoration step is at most this many typical optimizer steps long.
        first_token_weight: share of the training gradient that is of the first token of each
            answer alone (0 is off). Refusing begins there, and in a mean over an answer that token
            is too little to learn which prompts to refuse (`lora_ogpsa.emphasis`). Needs ``labels``
            in the model's call, with the prompts masked. With `OGPSACallback` TRL's preference
            losses are left alone, unless they have a part of likelihood (DPO's ``loss_type``
            ``"sft"``); in a loop of your own set it to 0 if they get labels and have none.
            Default: 0.33 for ``budget``, else 0.
        seed: of the order in which reference examples are drawn.

    Raises:
        ConfigError: a value is out of range or contradicts another.
    """

    preset: str | None = None
    space: Space = "update"
    constraint: Constraint = "budget"
    granularity: Granularity | None = None
    metric: Metric | None = None
    metric_damping: float = 0.1
    refresh: Refresh | None = None
    refresh_every: int | None = None
    references_per_refresh: int | None = None
    reference_batch_size: int = 8
    early_refreshes: tuple[int, ...] = (1, 2, 4, 8)
    decay: float | None = None
    adaptive_threshold: float | None = None
    rank: int | None = None
    energy: float | None = None
    sketch_size: int | None = None
    rows: Rows = "examples"
    basis_dtype: BasisDtype | None = None
    offload: bool = False
    budget: float = 0.2
    recovery: float = 1.0
    max_correction: float = 1.0
    penalty: float | None = None
    penalty_of: PenaltyOf | None = None
    restoration: float = 0.0
    restoration_cap: float = 2.0
    first_token_weight: float | None = None
    seed: int = 0
    # What was filled in and not given; `dataclasses.replace` hands it on.
    _filled: Any = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        """Apply the preset, fill in what depends on other fields, and check everything."""
        if self.preset is not None:
            self._apply_preset()
        self._fill_in()
        self._check_ranges()
        self._check_contradictions()

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OGPSAConfig:
        """Build from a mapping (the ``ogpsa:`` section of a recipe, or :meth:`to_dict`).

        Raises:
            ConfigError: an unknown key (the nearest known one is suggested) or a bad value.
        """
        known = [f.name for f in fields(cls) if not f.name.startswith("_")]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(known)}."
                raise ConfigError(f"Unknown OGPSA setting `{key}`.{hint}")
        given = dict(values)
        if isinstance(given.get("early_refreshes"), list):
            given["early_refreshes"] = tuple(given["early_refreshes"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The resolved settings as JSON values; :meth:`from_dict` restores an equal config."""
        values = asdict(self)
        del values["_filled"]
        values["early_refreshes"] = list(self.early_refreshes)
        return values

    # ------------------------------------------------------------------ what follows from it

    def penalty_on(self, *, labels: bool) -> float:
        """λ in a step whose training loss is, or is not, of ``labels`` in the model's call."""
        if self.penalty is None:
            return SUPERVISED_PENALTY if labels else 0.0
        return self.penalty

    def acting(self, *, preferences: bool, likelihood: bool, from_base: bool) -> OGPSAConfig:
        """The settings as they act on a training loss.

        Args:
            preferences: whether the loss ranks answers.
            likelihood: whether it has answers' likelihood, alone or beside that.
            from_base: whether training starts at the base model, with an adapter that adds nothing
                yet: there is nothing then that a penalty could undo.
        """
        weight = self.first_token_weight if likelihood else 0.0
        penalty, penalty_of = self.penalty, self.penalty_of
        of_latest = preferences and likelihood and from_base
        if penalty is None:
            penalty = LIKELIHOOD_PENALTY if of_latest else self.penalty_on(labels=not preferences)
        if penalty_of is None:
            penalty_of = "latest" if of_latest else "means"
        return replace(self, first_token_weight=weight, penalty=penalty, penalty_of=penalty_of)

    @property
    def keeps_latest(self) -> bool:
        """Whether a penalty is of the latest reference gradient, which is kept for it."""
        return self.penalty_of == "latest" and self.penalty != 0

    @property
    def mean_rows_idle(self) -> bool:
        """Whether nothing reads the mean rows between two refreshes: they only go into bases."""
        interval_bases = self.constraint == "orthogonal" and self.refresh == "interval"
        return interval_bases and self.restoration == 0

    @property
    def sketch_rows(self) -> int:
        """Rows that a sketch needs room for; 0 where there are no sketches."""
        if self.constraint != "orthogonal" or self.rows != "examples":
            return 0
        assert self.sketch_size is not None and self.references_per_refresh is not None
        room = self.sketch_size + max(self.sketch_size, self.reference_batch_size)
        if self.sketches_start_over:
            room = max(self.sketch_size + 1, min(room, self.references_per_refresh))
        return room

    @property
    def sketches_start_over(self) -> bool:
        """Whether each refresh begins with empty sketches: its rows are all there will be."""
        return self.decay == 0.0

    # ------------------------------------------------------------------ resolution

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _apply_preset(self) -> None:
        if self.preset not in _PRESETS:
            raise ConfigError(
                f"`preset` should be one of {sorted(_PRESETS)} or None. Found {self.preset!r}."
            )
        defaults = {f.name: f.default for f in fields(self)}
        fixed, suggested = _PRESETS[self.preset]
        for name, value in fixed.items():
            if getattr(self, name) not in (defaults[name], value):
                raise ConfigError(
                    f"`preset={self.preset!r}` fixes `{name}={value!r}`. Found "
                    f"{getattr(self, name)!r}: leave `{name}` out, or leave the preset out and "
                    "set the fields one by one."
                )
            self._set(name, value)
        for name, value in suggested.items():
            if getattr(self, name) == defaults[name]:
                self._set(name, value)

    def _fill_in(self) -> None:
        """Resolve what was not given.

        Raises:
            ConfigError: in a copy by `dataclasses.replace`, which is given all values, some were
                filled in before and would be others now.
        """
        before = dict(self._filled)
        for name, value in before.items():
            if getattr(self, name) == value:
                self._set(name, None)
        missing = [f.name for f in fields(self) if getattr(self, f.name) is None]
        self._resolve()
        filled = {name: getattr(self, name) for name in missing if getattr(self, name) is not None}
        self._set("_filled", tuple(filled.items()))
        stale = {n: v for n, v in before.items() if n in filled and filled[n] != v}
        if stale:
            kept = ", ".join(f"`{n}={v!r}` (now {filled[n]!r})" for n, v in stale.items())
            raise ConfigError(
                "`dataclasses.replace` gives a copy what was filled in, too, and with the new "
                f"settings that would be something else: {kept}. Make a new `OGPSAConfig(...)` of "
                "what you want to give."
            )

    def _resolve(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"`{name}` should be one of {list(allowed)}. Found {value!r}.")
        if self.granularity is None:
            self._set("granularity", "global" if self.constraint == "budget" else "adapter")
        if self.metric is None:
            self._set("metric", "optimizer" if self.space == "update" else "euclidean")
        if self.refresh is None:
            self._set("refresh", "interval" if self.constraint == "orthogonal" else "stream")
        streaming = self.refresh == "stream"
        if self.refresh_every is None:
            self._set("refresh_every", 1 if streaming else 20)
        if self.references_per_refresh is None:
            self._set("references_per_refresh", 3 if streaming else 16)
        if self.decay is None:
            self._set("decay", 0.8 if streaming else 0.0)
        if self.rank is None:
            self._set("rank", 8)
        if self.basis_dtype is None:
            self._set("basis_dtype", "bfloat16")
        if self.sketch_size is None:
            self._set("sketch_size", 2 * self.rank if isinstance(self.rank, int) else None)
        if self.penalty is None and (self.constraint != "budget" or self.space == "gradient"):
            self._set("penalty", 0.0)
        if self.first_token_weight is None:
            self._set("first_token_weight", 0.33 if self.constraint == "budget" else 0.0)

    # ------------------------------------------------------------------ validation

    def _check_ranges(self) -> None:
        whole = {
            "refresh_every": 1,
            "references_per_refresh": 1,
            "reference_batch_size": 1,
            "rank": 1,
            "sketch_size": 1,
            "seed": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"`{name}` should be a whole number of at least {least}. Found {value!r}."
                )
        real = {
            "metric_damping": (0.0, float("inf"), "()"),
            "decay": (0.0, 1.0, "[)"),
            "adaptive_threshold": (0.0, 1.0, "(]"),
            "energy": (0.0, 1.0, "(]"),
            "budget": (0.0, MOST, "[)"),
            "recovery": (0.0, 1.0, "(]"),
            "max_correction": (0.0, float("inf"), "()"),
            "penalty": (0.0, float("inf"), "[)"),
            "restoration": (0.0, 1.0, "[]"),
            "restoration_cap": (0.0, float("inf"), "()"),
            "first_token_weight": (0.0, 1.0, "[]"),
        }
        optional = {"adaptive_threshold", "energy", "penalty"}
        for name, (low, high, ends) in real.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (low < value or (ends[0] == "[" and value == low))
                or not (value < high or (ends[1] == "]" and value == high))
            ):
                raise ConfigError(
                    f"`{name}` should be a number in {ends[0]}{low:g}, {high:g}{ends[1]}. "
                    f"Found {value!r}."
                )
        if not isinstance(self.offload, bool):
            raise ConfigError(f"`offload` should be true or false. Found {self.offload!r}.")
        if not all(
            isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in self.early_refreshes
        ):
            raise ConfigError(
                "`early_refreshes` should be whole step numbers of at least 0. Found "
                f"{self.early_refreshes!r}."
            )

    def _check_contradictions(self) -> None:
        problems = []
        assert self.rank is not None
        if self.sketch_size is not None and self.sketch_size < self.rank:
            problems.append(
                f"`sketch_size={self.sketch_size}` cannot hold `rank={self.rank}` directions; "
                "it should be at least `rank`, better twice it."
            )
        if self.constraint == "budget" and self.space == "gradient":
            problems.append(
                "`constraint='budget'` bounds what a step does to a loss, and a gradient is not "
                "a step; use `space='update'`, or `constraint='halfspace'`."
            )
        if self.constraint == "budget" and self.granularity != "global":
            problems.append(
                "`constraint='budget'` needs `granularity='global'`: a reference loss is one "
                f"number for the whole model. Found {self.granularity!r}."
            )
        if self.constraint == "budget" and self.restoration > 0:
            problems.append(
                "`constraint='budget'` steers back by itself (`recovery`); `restoration` is for "
                "the other constraints and should be 0."
            )
        if self.constraint != "orthogonal" and (self.basis_dtype == "int8" or self.offload):
            found = "basis_dtype='int8'" if self.basis_dtype == "int8" else "offload=True"
            problems.append(
                f"`{found}` is about the bases of `constraint='orthogonal'`, and "
                f"`constraint={self.constraint!r}` has none: it keeps one mean row per reference. "
                "Leave it out."
            )
        if self.energy is not None and self.rows == "means":
            problems.append(
                "`energy` is about the directions that `rows='examples'` add to the mean rows, "
                "which are always held whole. Leave it out."
            )
        if self.space == "gradient" and self.metric == "optimizer":
            problems.append(
                "`metric='optimizer'` measures optimizer steps; in `space='gradient'` use "
                "`metric='euclidean'`."
            )
        if self.refresh == "stream" and self.adaptive_threshold is not None:
            problems.append(
                "`adaptive_threshold` decides whether an interval refresh is due; "
                "`refresh='stream'` has none."
            )
        if self.refresh == "stream" and self.restoration > 0:
            problems.append(
                "`restoration` acts at an interval refresh, on freshly measured losses; use "
                "`refresh='interval'`, or `constraint='budget'` when streaming."
            )
        if self.penalty and (self.space == "gradient" or self.constraint == "orthogonal"):
            problems.append(
                "`penalty` adds mean reference gradients to those of training, which "
                "`space='gradient'` and `constraint='orthogonal'` take out again; use it with "
                "`constraint='budget'` or `'halfspace'` in update space."
            )
        if self.space == "gradient" and self.restoration > 0:
            problems.append(
                "`restoration` is measured in optimizer steps, which `space='gradient'` does not "
                "see; use `space='update'`."
            )
        if problems:
            raise ConfigError(" ".join(problems))
