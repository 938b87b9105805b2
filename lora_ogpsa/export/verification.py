"""The outcome of a verification: rows with limits, as a table, as JSON, as an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.divergence import Divergence


@dataclass(frozen=True)
class Tolerance:
    """Limits for one comparison.

    Attributes:
        mean_kl: Largest mean KL, in nats per token.
        top1_agreement: Smallest share of positions with the same preferred token.
    """

    mean_kl: float
    top1_agreement: float


# Measured in docs/merging.md. A right merge differs by the rounding of its dtype only; the limit
# leaves a factor of five. A wrong base, wrong quantisation settings or an unapplied adapter
# lie far beyond it.
REPRODUCES = Tolerance(mean_kl=0.02, top1_agreement=0.90)
# Merging a QLoRA adapter into the original weights swaps the base under it, by design. The limit
# tells that swap from a broken model.
SWAPPED_BASE = Tolerance(mean_kl=0.5, top1_agreement=0.60)


@dataclass(frozen=True)
class Comparison:
    """One row of a verification.

    Attributes:
        candidate: What was measured.
        reference: What it was measured against.
        result: The differences.
        tolerance: The limits it must keep; None for a row that is only shown.
    """

    candidate: str
    reference: str
    result: Divergence
    tolerance: Tolerance | None

    def failure(self) -> str | None:
        """Says in which way the limits are exceeded, or None."""
        if self.tolerance is None:
            return None
        r, t = self.result, self.tolerance
        # Written so that a KL that is not a number fails too.
        if not r.mean_kl <= t.mean_kl:
            return (
                f"mean KL {r.mean_kl:.3g} nats per token, allowed {t.mean_kl:g} "
                f"({self.candidate} against {self.reference})"
            )
        if r.top1_agreement < t.top1_agreement:
            return (
                f"top-1 agreement {r.top1_agreement:.1%}, at least {t.top1_agreement:.0%} needed "
                f"({self.candidate} against {self.reference})"
            )
        return None


@dataclass
class VerificationReport:
    """The outcome of a verification.

    Attributes:
        comparisons: The rows; the first is the merged model against the model as trained.
        prompts: How many prompts were used.
        notes: What the user should know, in sentences.
    """

    comparisons: list[Comparison]
    prompts: int
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """The limits exceeded, in words; empty when the merge is good."""
        return [text for row in self.comparisons if (text := row.failure())]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a JSON-able mapping."""
        rows = [
            {
                "candidate": row.candidate,
                "reference": row.reference,
                **row.result.to_dict(),
                "allowed_mean_kl": row.tolerance.mean_kl if row.tolerance else None,
                "allowed_top1_agreement": row.tolerance.top1_agreement if row.tolerance else None,
            }
            for row in self.comparisons
        ]
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "prompts": self.prompts,
            "comparisons": rows,
            "notes": self.notes,
        }

    def to_markdown(self) -> str:
        """Returns the table, as written into the model card."""
        lines = [
            "| candidate | against | mean KL (nats/token) | max KL | max logit difference | "
            "relative logit error | top-1 agreement | allowed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.comparisons:
            r, t = row.result, row.tolerance
            limit = f"KL ≤ {t.mean_kl:g}, top-1 ≥ {t.top1_agreement:.0%}" if t else "only shown"
            lines.append(
                f"| {row.candidate} | {row.reference} | {r.mean_kl:.2e} | {r.max_kl:.2e} | "
                f"{r.max_logit_difference:.3f} | {r.relative_error:.4f} | "
                f"{r.top1_agreement:.1%} | {limit} |"
            )
        positions = self.comparisons[0].result.positions
        lines += [
            "",
            f"{self.prompts} prompts with the trained model's own greedy answers, "
            f"{positions} token positions.",
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def require_passed(self) -> None:
        """Raises ExportError with the reasons and the table when a limit is exceeded."""
        if not self.failures:
            return
        raise ExportError(
            "the merged model does not reproduce the trained one: "
            + "; ".join(self.failures)
            + ". Usual causes: another base than in training (--base), other 4-bit settings than "
            "in training (the run's record beside the adapter), or a coarse --dtype. If the "
            "difference is acceptable to you, allow a wider tolerance, or merge without the "
            "verification (--no-verify).\n\n" + self.to_markdown()
        )
