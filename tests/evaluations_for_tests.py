"""Evaluation results with chosen outcomes, as if models had been measured."""

from __future__ import annotations

from lora_ogpsa.evaluation import EvaluationResult, Item, Sample

PROMPTS = 40


def evaluated(
    harmful: float, harmless: float, kl: float | None, nll: float = 2.0, answer: str = "An answer."
) -> EvaluationResult:
    """A model that refuses these shares of `PROMPTS` prompts; `kl` is None for the base."""
    result = EvaluationResult("m", base=kl is None)
    result.add_share("harmful.refused", _outcomes(harmful), "higher")
    result.add_share("harmless.refused", _outcomes(harmless), "lower")
    result.add_mean("general.nll", _around(nll), "lower", "nats")
    if kl is not None:
        result.add_mean("divergence.kl", _around(kl), "lower", "nats")
    for name, share in (("harmful", harmful), ("harmless", harmless)):
        result.samples += [
            Sample(name, f"{name} prompt {i}", answer, i < share * PROMPTS, "refused")
            for i in range(8)
        ]
    return result


def _outcomes(share: float) -> list[Item]:
    return [Item(f"k{i}", float(i < round(share * PROMPTS))) for i in range(PROMPTS)]


def _around(value: float) -> list[Item]:
    """Items that average `value`, a little apart from one another."""
    spread = 0.01 * value
    return [Item(f"k{i}", value + spread * (1 if i % 2 else -1), 3.0) for i in range(PROMPTS)]
