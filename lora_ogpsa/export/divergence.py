"""How far apart two models' outputs are on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Divergence:
    """Differences of a candidate's logits from a reference's, over all positions.

    Attributes:
        mean_kl: Mean of KL(reference || candidate), in nats per token.
        max_kl: Its largest value at one position.
        max_logit_difference: Largest absolute difference of one logit.
        relative_error: Norm of the logits' difference over the norm of the reference's logits.
        top1_agreement: Share of positions at which both prefer the same token.
        positions: How many positions were compared.
    """

    mean_kl: float
    max_kl: float
    max_logit_difference: float
    relative_error: float
    top1_agreement: float
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as a JSON-able mapping."""
        return asdict(self)


def divergence(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> Divergence:
    """Compares logits position by position.

    Args:
        reference: One [T, V] tensor per prompt.
        candidate: The same shapes, in the same order.

    Returns:
        The differences over all positions of all prompts.

    Raises:
        ValueError: There is nothing to compare, or the shapes differ.
    """
    import torch

    kls, agreements = [], []
    largest = squared_error = squared_norm = 0.0
    for ours, theirs in zip(reference, candidate, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"logits of shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        p, q = ours.float(), theirs.float()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        # Rounding can make a KL of zero slightly negative.
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        difference = p - q
        largest = max(largest, difference.abs().max().item())
        squared_error += difference.double().square().sum().item()
        squared_norm += p.double().square().sum().item()
    if not kls:
        raise ValueError("no logits to compare")
    kl, agreement = torch.cat(kls), torch.cat(agreements)
    return Divergence(
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        max_logit_difference=largest,
        relative_error=(squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
        top1_agreement=agreement.float().mean().item(),
        positions=kl.numel(),
    )
