"""`FirstTokenEmphasis`: the first token of an answer, where refusing begins, counts more."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lora_ogpsa.answers import base_of, decoder_of
from lora_ogpsa.chat import IGNORE_INDEX
from lora_ogpsa.hooks import OwnHook

logger = logging.getLogger(__name__)

# What the model is called with that says where answers begin.
_READ = ("labels", "attention_mask", "position_ids")


class FirstTokenEmphasis:
    r"""Mixes the mean loss of the first answer tokens into the gradient of the training loss.

    A model decides at the first token of its answer whether it refuses (Qi et al. 2024,
    arXiv 2406.05946), and in a mean over an answer that token weighs one part in its length. What
    holds harmless look-alikes to the base model's first token then outweighs what teaches harmful
    prompts another one, and the two are hardly told apart. With a share s of the whole, the
    gradient becomes that of

    .. math:: (1 - s)\,\operatorname{mean}_{\text{answer tokens}} \ell
       + s\,\operatorname{mean}_{\text{first answer tokens}} \ell .

    The loss of a token depends on the decoder's output at one position, so the gradient there is
    scaled, which is the same as weighing the loss, in any trainer; the reported loss stays what it
    is. The means are those of one forward pass; of passes that are accumulated, or of several
    processes, each counts by its answer tokens. Which tokens come first is read off the ``labels``
    that the model is called with: a label that is learned after one that is not, unless that is
    padding or begins a sequence. Forward passes without labels, without gradients, or in evaluation
    mode are left alone; so are labels that cover the prompts as well. Labels do not say what
    becomes of the log-probabilities: of preference losses that call the model with labels, as TRL's
    do, `OGPSACallback` keeps the emphasis away, unless likelihood is a part of them. There it acts
    on both answers of a pair and on every part of the loss.

    Args:
        model: the model as it is called in training, a PEFT model as a rule.
        share: s in (0, 1].
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self._inputs: dict[str, Any] = {}
        self._checked = False
        self._handles: list[Any] = []
        decoder = decoder_of(model)
        if decoder is None:
            logger.warning(
                "%s does not say which of its modules gives the hidden states (`get_decoder`), so "
                "that `first_token_weight` does nothing: harmful prompts and harmless look-alikes "
                "will be told apart less well. Set `first_token_weight=0` if that is wanted.",
                type(base_of(model)).__name__,
            )
            return
        self._handles = [
            model.register_forward_pre_hook(OwnHook(self._note_labels), with_kwargs=True),
            decoder.register_forward_hook(OwnHook(self._weigh)),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs = {k: kwargs.get(k) for k in _READ} if module.training else {}

    def _weigh(self, module: nn.Module, args: Any, output: Any) -> None:
        inputs, self._inputs = self._inputs, {}
        labels, hidden = inputs.pop("labels", None), output[0]
        if labels is None or not hidden.requires_grad or hidden.shape[:2] != labels.shape:
            return
        weights = token_weights(labels, self.share, may_end_prompt(labels, **inputs))
        if not self._checked:
            self._checked = True
            if bool((weights == 1).all()):
                logger.warning(
                    "The labels of the first batch cover the prompts, so that no answer is seen to "
                    "begin, and `first_token_weight` does nothing: harmful prompts and harmless "
                    "look-alikes will be told apart less well. Mask the prompts with -100 (TRL: "
                    "columns `prompt` and `completion`, or `assistant_only_loss=True`), or set "
                    "`first_token_weight=0` if that is wanted."
                )
        hidden.register_hook(lambda grad: grad * weights.unsqueeze(-1).to(grad))


def may_end_prompt(labels: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
    """Which positions may be the last of a prompt, by what the model is called with.

    Not padding, and not the first token of a sequence: nothing is asked by one token, and TRL
    masks it in packed sequences, whether it is of a prompt or not.

    Args:
        labels: [B, T].
        attention_mask: [B, T]; of another kind or shape it says nothing here.
        position_ids: [B, T], likewise.

    Returns:
        [B, T], bool.
    """
    possible = torch.ones_like(labels, dtype=torch.bool)
    starts = torch.zeros_like(labels[:, :1])
    if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
        possible = attention_mask.bool()
        starts = possible.long().argmax(-1, keepdim=True)
    if isinstance(position_ids, Tensor) and position_ids.shape == labels.shape:
        return possible & (position_ids != 0)
    return possible.scatter(1, starts, False)


def token_weights(labels: Tensor, share: float, prompt: Tensor | None = None) -> Tensor:
    """How much the loss read off each position counts under a share of the first tokens.

    Args:
        labels: [B, T], the label of each position, -100 where nothing is learned; the position
            before it predicts it.
        share: of the first tokens, s.
        prompt: [B, T], which positions may be a prompt's last; ``None`` means all that are not
            learned.

    Returns:
        [B, T], float32: 1 - s, and s × (answer tokens / first tokens) more where the next token is
        the first of an answer. All ones if no answer begins.
    """
    learned = labels != IGNORE_INDEX
    first = torch.zeros_like(learned)
    first[:, :-1] = learned[:, 1:] & ~learned[:, :-1]
    if prompt is not None:
        first &= prompt
    count = first.sum()
    answers = learned[:, 1:].sum()
    weights = (1 - share) + first * (share * answers / count.clamp_min(1))
    return torch.where(count > 0, weights, 1.0)
