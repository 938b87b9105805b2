"""Directions of a layer's input that tell prompts apart: what `contrast` sets an adapter by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

_FOLDS = 4
# Share of what is read at the ends of prompts that may differ by rounding alone.
_ROUNDING = 1e-6
# How much it counts not to respond to a token that all prompts begin with, in usual directions. The
# response is small, but the same in every row of a batch, and Adam makes its steps as long.
_START = 30.0
# How much it counts that safety prompts, references of a kind and the kinds of references, of
# different form, are responded to alike. What should be refused needs a response, all of it; what
# should not may respond as little as it likes.
_SAFETY, _REFERENCES, _KINDS = 4.0, 0.5, 2.0


@dataclass(frozen=True)
class Inputs:
    """What one layer reads, a token a row.

    Attributes:
        safety: [n, d], at the last token before the answer of prompts to be refused.
        references: for each kind of harmless prompt the same, [m, d].
        text: second moment [d, d] where not to respond: at all other tokens of the harmless prompts
            and their answers.
        answers: mean [d] at the first tokens of the safety prompts' answers; ``None`` where there
            are none.
        start: [s, d], at the tokens that all prompts begin with; ``None`` not to mind them.
    """

    safety: Tensor
    references: tuple[Tensor, ...]
    text: Tensor
    answers: Tensor | None = None
    start: Tensor | None = None

    def split(self, fold: int) -> tuple[Inputs, Inputs]:
        """The prompts of one fold of `_FOLDS`, and all others; the text is whole in both."""
        own, others = [], []
        for rows in (self.safety, *self.references):
            inside = torch.arange(len(rows), device=rows.device) % _FOLDS == fold
            own.append(rows[inside])
            others.append(rows[~inside])
        parts = [replace(self, safety=s, references=tuple(r)) for s, *r in (own, others)]
        return parts[0], parts[1]


def discriminant(inputs: Inputs, ridge: float, text_weight: float) -> Tensor:
    r"""A linear discriminant of safety prompts and references, blind to other tokens.

    .. math::
        w = \left(4 \Sigma_s + \tfrac12 \overline{\Sigma_r} + 2 \Sigma_k + \alpha M_t
            + \lambda \bar\sigma I + 30 \bar\sigma \textstyle\sum \hat x \hat x^\top\right)^{-1}
            (\mu_s - \overline{\mu_r})

    with means :math:`\mu` and covariances :math:`\Sigma`, bars for the mean over the kinds of
    references, the covariance :math:`\Sigma_k` of their means, the second moment :math:`M_t` of
    the text, the mean diagonal :math:`\bar\sigma` of these, and the tokens :math:`\hat x` of
    `start`, of unit length (Fisher 1936, but for the weights; Friedman 1989 for the ridge).
    :math:`\Sigma_s` weighs most, so that what is harmful in one way or form is responded to as in
    another, and :math:`\Sigma_k` keeps the form of a prompt, a question or a command, out of the
    direction.

    Args:
        inputs: of the layer.
        ridge: :math:`\lambda`.
        text_weight: :math:`\alpha`.

    Returns:
        [d], float64, of arbitrary length; zeros where all prompts end alike, as in what the first
        attention reads.
    """
    if _end_alike(inputs):
        return torch.zeros_like(inputs.safety[0], dtype=torch.float64)
    safety = inputs.safety.double()
    kinds = [rows.double() for rows in inputs.references]
    means = torch.stack([rows.mean(0) for rows in kinds])
    moment = text_weight * inputs.text.double()
    moment += _SAFETY * _covariance(safety) + _KINDS * _covariance(means)
    for rows in kinds:
        moment += _REFERENCES / len(kinds) * _covariance(rows)
    return _solve(moment, safety.mean(0) - means.mean(0), ridge, inputs.start)


def answer_start(inputs: Inputs, ridge: float) -> Tensor:
    """The direction that responds to the last token of any prompt and to no other token.

    Args:
        inputs: of the layer.
        ridge: as a share of the text's mean second moment.

    Returns:
        [d], float64, of a mean response of 1 at the ends of prompts.
    """
    ends = torch.cat([inputs.safety, *inputs.references]).double().mean(0)
    found = _solve(inputs.text.double(), ends, ridge, inputs.start)
    return found / (ends @ found)


def refusal(inputs: Inputs, ridge: float, text_weight: float) -> Tensor:
    r"""The direction that responds to refusals and to no other text, nor to the ends of prompts.

    .. math::
        w \propto \left(\alpha M_t + \overline{M_r} + \lambda \bar\sigma I
            + 30 \bar\sigma \textstyle\sum \hat x \hat x^\top\right)^{-1} \mu_a

    with the mean :math:`\mu_a` at the safety answers' first tokens, and the second moments of the
    text and of the references' last prompt tokens; the rest as in `discriminant`.

    Args:
        inputs: of the layer, with answers.
        ridge: :math:`\lambda`.
        text_weight: :math:`\alpha`.

    Returns:
        [d], float64, of a mean response of 1 at those tokens.
    """
    assert inputs.answers is not None
    moment = text_weight * inputs.text.double()
    for rows in inputs.references:
        moment += rows.double().T @ rows.double() / (len(rows) * len(inputs.references))
    answers = inputs.answers.double()
    found = _solve(moment, answers, ridge, inputs.start)
    return found / (answers @ found)


def separation(inputs: Inputs, ridge: float, text_weight: float) -> float:
    """How well the discriminant tells prompts apart that it was not taken from (d').

    Each fold of the prompts is put in order by the discriminant of the others.

    Returns:
        The difference of the means of safety prompts and references, in standard deviations; 0
        where all prompts end alike.
    """
    safety, harmless = [], []
    for fold in range(_FOLDS):
        own, others = inputs.split(fold)
        direction = discriminant(others, ridge, text_weight)
        seen = torch.cat(others.references).double() @ direction
        if seen.std() == 0:
            return 0.0
        safety.append((own.safety.double() @ direction - seen.mean()) / seen.std())
        harmless.append((torch.cat(own.references).double() @ direction - seen.mean()) / seen.std())
    high, low = torch.cat(safety), torch.cat(harmless)
    return ((high.mean() - low.mean()) / ((high.var() + low.var()) / 2).sqrt()).item()


def contrast_rows(
    inputs: Inputs,
    gain: float,
    ridge: float,
    text_weight: float,
    threshold: float,
) -> Tensor:
    """The rows of A: what tells safety prompts from references, and refusals.

    The first responds to safety prompts `gain` times as strongly as a row of A does that PEFT has
    drawn, and is zero between references and safety prompts, made so by a multiple of
    `answer_start`. The second, if there are answers, responds to them as the first does to prompts.

    Args:
        inputs: of the layer.
        gain: see above.
        ridge: of the discriminant.
        text_weight: of the discriminant.
        threshold: where the first is zero, from 0, the references' mean, to 1, the safety prompts'.

    Returns:
        A [1 or 2, d], float64.
    """
    contrast = discriminant(inputs, ridge, text_weight)
    safety = inputs.safety.double()
    harmless = torch.stack([rows.double().mean(0) for rows in inputs.references]).mean(0)
    zero = torch.lerp(harmless, safety.mean(0), threshold)
    start = answer_start(inputs, 1.0)
    contrast -= (zero @ contrast) / (zero @ start) * start
    # The entries of a row that PEFT draws have variance 1 / 3d.
    usual = (safety.square().sum(1).mean() / (3 * safety.shape[1])).sqrt()
    response = (safety @ contrast).square().mean().sqrt()
    if response > 0:  # else all prompts end alike here
        contrast *= gain * usual / response
    rows = [contrast]
    if inputs.answers is not None:
        rows.append(gain * usual * refusal(inputs, ridge, text_weight))
    return torch.stack(rows)


def _end_alike(inputs: Inputs) -> bool:
    """Whether prompts end in the same up to rounding, of which no direction is to be made."""
    ends = torch.cat([inputs.safety, *inputs.references]).double()
    return bool((ends - ends.mean(0)).norm() <= _ROUNDING * ends.norm())


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def _solve(moment: Tensor, target: Tensor, ridge: float, start: Tensor | None) -> Tensor:
    usual = moment.diagonal().mean()
    damping = ridge * usual * torch.eye(len(moment)).to(moment)
    if start is not None:
        unit = functional.normalize(start.to(moment), dim=1)
        damping += _START * usual * unit.T @ unit
    return torch.linalg.solve(moment + damping, target)
