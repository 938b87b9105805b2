"""Reference objectives: what must not get worse, as losses whose gradients become rows."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ogpsa import chat, data
from lora_ogpsa.answers import base_mode, base_of, own_answers, reference_policy
from lora_ogpsa.config import MOST
from lora_ogpsa.errors import ConfigError, DataError
from lora_ogpsa.initialisation import base_is_kept

Loss = Literal["kl", "distill", "sft", "dpo"]
Tokens = tuple[list[int], list[int]]
_LOSSES = ("kl", "distill", "sft", "dpo")
_WHOLE = ("first_tokens", "limit", "max_length", "max_new_tokens")
_DEFAULT_BETA = 0.1
_CALLED_WITH = ("input_ids", "attention_mask", "use_cache")
# Host memory that one reference may take to keep what the base model says of its answers.
_BASE_SCORES_BYTES = 1 << 30


@dataclass(frozen=True)
class Reference:
    """A named data set with a loss that safety training must not raise.

    Args:
        name: what logs and reports call it.
        data: a JSON Lines/CSV/Parquet file, a hub id, ``"embedded:harmless"`` (ours), a
            ``datasets.Dataset`` or any sequence of rows. Rows hold ``messages``, or ``prompt``
            with an optional answer, or token ids (``input_ids`` and, -100 on what is no answer,
            ``labels``; padding is told by ``attention_mask``). ``tools`` of a row go to the chat
            template, as in TRL.
        loss: ``"kl"``, divergence from the base model in nats per token on its own answers
            (prompts suffice); ``"distill"``, NLL of those answers; ``"sft"``, NLL of the answers
            in the data; ``"dpo"``, the sigmoid preference loss on ``prompt``/``chosen``/
            ``rejected`` rows.
        weight: of its rows in sketches.
        share: how many of the reference examples are its own, relative to the other references.
        budget: nats per token its loss may exceed the base model's; ``None`` takes
            `OGPSAConfig.budget`.
        first_tokens: answer tokens that count extra: over-refusal is decided there and drowns
            in an average over the answer. ``None`` turns it off.
        first_tokens_weight: share of the loss that is the average over the first tokens only; 1
            restricts the reference to them.
        kind: keep only rows whose ``kind``, ``type`` or ``source`` field has this value.
        config: configuration of a hub data set.
        split: split of a hub data set.
        limit: most rows used, drawn at random with `seed`.
        max_length: longest example, in tokens; longer answers are cut.
        max_new_tokens: length of the base model's own answers, in tokens.
        beta: of the preference loss. ``None`` takes that of the `DPOTrainer` it is attached to,
            and 0.1 elsewhere.
        seed: of the draw of `limit` rows.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    data: Any = "embedded:harmless"
    loss: Loss = "kl"
    weight: float = 1.0
    share: float = 1.0
    budget: float | None = None
    first_tokens: int | None = 6
    first_tokens_weight: float = 0.5
    kind: str | None = None
    config: str | None = None
    split: str | None = None
    limit: int | None = 128
    max_length: int = 512
    max_new_tokens: int = 32
    beta: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.loss not in _LOSSES:
            raise ConfigError(
                f"Reference `{self.name}`: `loss` should be one of {list(_LOSSES)}. Found "
                f"{self.loss!r}."
            )
        positive = ("weight", "share", "max_length", "max_new_tokens")
        optional = ("budget", "first_tokens", "limit", "beta")
        for name in (*positive, *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            whole = name in _WHOLE
            number = isinstance(value, int if whole else int | float)
            if not number or isinstance(value, bool) or not 0 <= value < MOST:
                raise ConfigError(
                    f"Reference `{self.name}`: `{name}` should be a positive "
                    f"{'whole ' if whole else ''}number below {MOST:g}. Found {value!r}."
                )
            if value == 0 and name != "budget":
                raise ConfigError(f"Reference `{self.name}`: `{name}` should be above 0. Found 0.")
        share = self.first_tokens_weight
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(
                f"Reference `{self.name}`: `first_tokens_weight` should be in [0, 1]. Found "
                f"{self.first_tokens_weight!r}."
            )

    def __repr__(self) -> str:
        """As of any dataclass, but of rows in memory the number: they may be long, or private."""
        shown = {field.name: repr(getattr(self, field.name)) for field in fields(self)}
        if not isinstance(self.data, str | Path):
            number = f"{len(self.data)} rows" if hasattr(self.data, "__len__") else "rows"
            shown["data"] = f"<{type(self.data).__name__} of {number}>"
        return f"Reference({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def prepare(
        self, model: nn.Module, tokenizer: Any = None, *, cache: Path | None = None
    ) -> Objective:
        """Load, tokenise, and have the base model answer where its own answers are wanted.

        Args:
            model: the PEFT model.
            tokenizer: needed unless the rows are token ids already.
            cache: folder in which the base model's answers are kept.

        Raises:
            DataError: no rows, rows without the expected fields, or with tokens that the model does
                not know.
            ConfigError: text without a tokenizer, or a model that is no language model.
        """
        _require_language_model(model, self.name)
        rows = self.rows()
        if self.loss == "dpo":
            pairs = [self._encode_pair(row, tokenizer, self._place(n)) for n, row in rows]
            encoded = [sequence for pair in pairs for sequence in pair]
            _require_known_tokens(model, encoded, self.name)
            return Objective(self, encoded, model)
        encoded = [self._encode(row, tokenizer, self._place(n)) for n, row in rows]
        _require_known_tokens(model, encoded, self.name)
        if self.loss in ("kl", "distill") and not self._tokenised(rows[0][1]):
            answers = own_answers(
                model,
                self._needed(tokenizer),
                [prompt for prompt, _ in encoded],
                max_new_tokens=self.max_new_tokens,
                cache=cache,
                title=f"reference `{self.name}`: the base model answers",
            )
            encoded = [(prompt, reply) for (prompt, _), reply in zip(encoded, answers, strict=True)]
        missing = sum(not answer for _, answer in encoded)
        if missing:
            way_out = (
                "Give all rows of token ids learned `labels`."
                if self._tokenised(rows[0][1])
                else "Use `loss='kl'`, which needs prompts only."
            )
            raise DataError(
                f"Reference `{self.name}`: {missing} of {len(encoded)} rows have no answer, which "
                f"`loss='{self.loss}'` needs. {way_out}"
            )
        return Objective(self, encoded, model)

    def check(self, tokenizer: Any = None) -> None:
        """Read the rows and, with a tokenizer, encode them: what `prepare` needs no model for.

        Raises:
            DataError: no rows, or rows without the expected fields.
        """
        rows = self.rows()
        if tokenizer is not None:
            encode = self._encode_pair if self.loss == "dpo" else self._encode
            for number, row in rows:
                encode(row, tokenizer, self._place(number))

    def asks_the_model(self) -> bool:
        """Whether :meth:`prepare` has the base model answer prompts."""
        return self.loss in ("kl", "distill") and not self._tokenised(self.rows()[0][1])

    # ------------------------------------------------------------------ rows

    def rows(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The rows that are used, each with its number in the data, from 1 on.

        Raises:
            DataError: there are none, or `data` holds something else.
        """
        if isinstance(self.data, str | Path):
            try:
                table = data.load_table(self.data, config=self.config, split=self.split)
            except DataError as error:
                raise DataError(f"reference `{self.name}`: {error}") from error
        else:
            table = self._held_rows()
        everything = list(range(len(table)))
        chosen = everything if self.kind is None else data.indices_of_kind(table, self.kind)
        if not chosen:
            wanted = f" of kind {self.kind!r}" if self.kind is not None else ""
            raise DataError(
                f"Reference `{self.name}` has no rows{wanted}. An empty reference protects "
                "nothing: give it data, or remove it."
            )
        if self.limit is not None and len(chosen) > self.limit:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            order = torch.randperm(len(chosen), generator=generator, device="cpu").tolist()
            chosen = [chosen[i] for i in sorted(order[: self.limit])]
        return [(i + 1, row) for i, row in zip(chosen, data.rows_at(table, chosen), strict=True)]

    def _held_rows(self) -> list[Any]:
        """Rows that are in memory already; of tables and mappings only the columns would come."""
        try:
            rows = list(self.data)
        except TypeError:
            rows, found = [], type(self.data).__name__
        else:
            odd = [type(row).__name__ for row in rows if not isinstance(row, Mapping)]
            found = f"{type(self.data).__name__} of {odd[0]}" if odd else ""
        if found:
            raise DataError(
                f"Reference `{self.name}`: `data` should be a file, a data set or a list of rows, "
                f'each a mapping such as {{"prompt": "..."}}. Found {found}.'
            )
        return rows

    def _place(self, number: int) -> str:
        """How error messages call a row."""
        return f"reference `{self.name}`, row {number}"

    @staticmethod
    def _tokenised(row: Mapping[str, Any]) -> bool:
        return "input_ids" in row

    def _needed(self, tokenizer: Any) -> Any:
        if tokenizer is None or isinstance(tokenizer, str):
            raise ConfigError(
                f"Reference `{self.name}` holds text, and there is no tokenizer. Pass "
                "`processing_class=tokenizer`, or give rows of `input_ids` and `labels`."
            )
        return tokenizer

    def _encode(self, row: Mapping[str, Any], tokenizer: Any, place: str) -> Tokens:
        if self._tokenised(row):
            return split_ids(row, self.max_length, place)
        messages, answer = chat.as_messages(row, name=place)
        if self.loss in ("kl", "distill"):
            answer = None
        elif answer is None:
            raise DataError(
                f"{place}: `loss='{self.loss}'` needs rows with an answer. Found the fields "
                f"{sorted(row)}. Use `loss='kl'`, which needs prompts only."
            )
        return self._tokens(tokenizer, messages, answer, place)

    def _encode_pair(
        self, row: Mapping[str, Any], tokenizer: Any, place: str
    ) -> tuple[Tokens, Tokens]:
        prompt, chosen, rejected = chat.as_preference(row, name=place)
        return (
            self._tokens(tokenizer, prompt, chosen, place),
            self._tokens(tokenizer, prompt, rejected, place),
        )

    def _tokens(
        self, tokenizer: Any, messages: list[dict], answer: str | None, place: str
    ) -> Tokens:
        tokenizer = self._needed(tokenizer)
        return chat.encode(tokenizer, messages, answer, max_length=self.max_length, name=place)


def default_references() -> list[Reference]:
    """What is protected when nothing else is asked for: the embedded harmless prompts.

    General requests and harmless look-alikes of harmful ones, each held to the base model's own
    answers. Whether to refuse is decided at the first token of an answer, so look-alikes are held
    there alone: it is the sharpest signal, and the shortest example. General requests are commands
    and look-alikes questions, so both are: else the form of a prompt would decide.
    """
    general: dict[str, Any] = {"data": "embedded:harmless", "kind": "general"}
    first: dict[str, Any] = {"max_new_tokens": 1, "share": 3}
    return [
        Reference("general", **general),
        Reference("general_first", **general, **first),
        Reference("lookalike", "embedded:harmless", kind="lookalike", **first),
    ]


class Objective:
    """A prepared reference: tokenised examples and their loss under the current model.

    Args:
        reference: its settings.
        sequences: (prompt ids, answer ids); for preference pairs chosen and rejected alternate.
        model: the PEFT model, for what its forward accepts.
    """

    def __init__(self, reference: Reference, sequences: list[Tokens], model: nn.Module) -> None:
        self.reference = reference
        self.name = reference.name
        self.sequences = sequences
        self.fold = 2 if reference.loss == "dpo" else 1
        self._base: dict[int, Tensor] = {}
        self._base_scores: dict[int, Tensor] = {}
        self._room = _BASE_SCORES_BYTES
        accepted = inspect.signature(type(base_of(model)).forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.sequences) // self.fold

    def identity(self) -> dict[str, Any]:
        """What tells this reference from another, for a run that goes on with it.

        The base model's own answers are not part of it: on another device a token may differ.
        """
        given = self.reference.loss in ("sft", "dpo")
        content = [(prompt, answer if given else []) for prompt, answer in self.sequences]
        settings = (
            "loss",
            "budget",
            "share",
            "weight",
            "first_tokens",
            "first_tokens_weight",
            "beta",
        )
        return {
            "rows": len(self),
            **{name: getattr(self.reference, name) for name in settings},
            "tokens": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        }

    def tokens(self, indices: Sequence[int]) -> int:
        """How many tokens the batch of examples `indices` has, padding included."""
        chosen = [i * self.fold + part for part in range(self.fold) for i in indices]
        return len(chosen) * max(sum(map(len, self.sequences[i])) for i in chosen)

    def losses(self, model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Loss of each example, and how far each lies above the base model's.

        Args:
            model: the PEFT model, in the mode it should be differentiated in.
            indices: which examples, B of them.

        Returns:
            Losses [B] with their graph, and excess over the base model [B], detached, both in
            nats per token. For ``"dpo"`` both are per pair, and the excess is over the policy that
            the loss compares with. NaN where the adapter's initialisation changed the base.
        """
        chosen = [i * self.fold + part for part in range(self.fold) for i in indices]
        device = next(model.parameters()).device
        batch = self._batch(chosen, device)
        kind = self.reference.loss
        if kind == "kl":
            base = self._base_log_probs(model, indices, device)
            current = self._log_probs(model, batch)
            divergence = (base.exp() * (base - current)).sum(-1)
            losses = self._token_mean(divergence, batch["answer"])
            return losses, losses.detach()
        if kind == "dpo":
            losses = self._preference(model, batch)
            # A policy compared with itself prefers neither.
            return losses, losses.detach() - math.log(2)
        losses = self._likelihood(model, batch)
        if not base_is_kept(model):
            return losses, torch.full_like(losses, math.nan)
        base_losses = self._base_losses(model, indices, device)
        return losses, losses.detach() - base_losses

    # ------------------------------------------------------------------ the losses themselves

    def _batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        batch = _left_padded([self.sequences[i] for i in chosen])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _likelihood(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._token_mean(-self._token_log_probs(model, batch), batch["answer"])

    def _preference(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The sigmoid loss of Rafailov et al. 2023 (2305.18290), eq. 7."""
        current = self._token_log_probs(model, batch)
        with torch.no_grad(), reference_policy(model):
            before = self._token_log_probs(model, batch)
        won, lost = ((current - before) * batch["answer"]).sum(-1).unflatten(0, (2, -1))
        beta = _DEFAULT_BETA if self.reference.beta is None else self.reference.beta
        return -functional.logsigmoid(beta * (won - lost))

    def _token_log_probs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probability of every answer token [B, answer length]."""
        scores = self._log_probs(model, batch)
        return scores.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)

    def _log_probs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities [B, answer length, vocabulary], float32, of the answer positions."""
        keep = batch["labels"].shape[1]
        inputs: dict[str, Any] = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }
        if self._takes_positions:
            positions = batch["attention_mask"].cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp_min(0)
        if self._keeps_logits:
            inputs["logits_to_keep"] = keep + 1
        logits = model(**inputs).logits
        return logits[:, -keep - 1 : -1].float().log_softmax(-1)

    def _base_losses(
        self, model: nn.Module, indices: Sequence[int], device: torch.device
    ) -> Tensor:
        """The base model's likelihood losses of `indices` [B]; measured once, each alone.

        In a batch they would be rounded by what else is in it, as :meth:`_base_log_probs` says.
        """
        for index in indices:
            if index not in self._base:
                with torch.no_grad(), base_mode(model):
                    found = self._likelihood(model, self._batch([index], device))
                self._base[index] = found[0]
        return torch.stack([self._base[i] for i in indices])

    def _base_log_probs(
        self, model: nn.Module, indices: Sequence[int], device: torch.device
    ) -> Tensor:
        """The base model's log-probabilities of `indices`, as :meth:`_log_probs` gives them.

        They never change, so they are kept in host memory as long as there is room. Each example
        goes through the model alone: rounding depends on what else is in a batch, and a resumed
        run would differ from one that was not interrupted.
        """
        found = []
        for index in indices:
            scores = self._base_scores.get(index)
            if scores is None:
                with torch.no_grad(), base_mode(model):
                    scores = self._log_probs(model, self._batch([index], device))[0]
                size = scores.numel() * scores.element_size()
                if size <= self._room:
                    self._room -= size
                    self._base_scores[index] = scores.cpu()
            found.append(scores.to(device))
        keep = max(len(scores) for scores in found)
        out = found[0].new_zeros(len(found), keep, found[0].shape[-1])
        for row, scores in zip(out, found, strict=True):
            row[keep - len(scores) :] = scores
        return out

    def _token_mean(self, values: Tensor, answer: Tensor) -> Tensor:
        """Average over the answer, mixed with the average over its first tokens."""
        mask = answer.float()
        whole = (values * mask).sum(-1) / mask.sum(-1)
        if self.reference.first_tokens is None or self.reference.first_tokens_weight == 0:
            return whole
        early = mask * (mask.cumsum(-1) <= self.reference.first_tokens)
        first = (values * early).sum(-1) / early.sum(-1)
        share = self.reference.first_tokens_weight
        return (1 - share) * whole + share * first


def _require_language_model(model: Any, name: str) -> None:
    """Refuse a model whose logits are not of tokens: a classifier has no likelihood to protect."""
    base = base_of(model)
    accepted = inspect.signature(type(base).forward).parameters
    missing = [key for key in _CALLED_WITH if key not in accepted]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise ConfigError(
            f"Reference `{name}` is a loss of a language model that is called as those of "
            f"transformers are, and the `forward` of {type(base).__name__} does not take "
            f"{' nor '.join(missing)}."
        )
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"Reference `{name}` is a loss on how a prompt goes on, and {type(base).__name__} has "
            "an encoder for it. OGPSA protects decoder-only language models."
        )
    if hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is None:
        raise ConfigError(
            f"Reference `{name}` is a loss on the probabilities of tokens, and "
            f"{type(base).__name__} has no language-model head (a reward model or another "
            "classifier). OGPSA protects language models; train this one without it."
        )


def _require_known_tokens(model: Any, sequences: Sequence[Tokens], name: str) -> None:
    """Refuse tokens that have no embedding: of a pass they make an error without a name."""
    base = base_of(model)
    if not hasattr(base, "get_input_embeddings"):
        return
    embeddings = base.get_input_embeddings()
    if hasattr(embeddings, "get_base_layer"):  # of an adapter on them
        embeddings = embeddings.get_base_layer()
    known = getattr(embeddings, "num_embeddings", None)
    if known is None:
        return
    for prompt, answer in sequences:
        odd = next((token for token in (*prompt, *answer) if not 0 <= token < known), None)
        if odd is not None:
            raise DataError(
                f"Reference `{name}` has the token {odd}, and the model has {known} embeddings. Is "
                "the tokenizer another model's, or were tokens added to it without "
                "`model.resize_token_embeddings(len(tokenizer))`?"
            )


def split_ids(row: Mapping[str, Any], max_length: int, place: str) -> Tokens:
    """Prompt and answer of a row of token ids: what is learned, and what comes before it.

    Padding is left out: what the attention mask hides, and what follows the answer unlearned.

    Raises:
        DataError: the fields do not fit together, the learned tokens are not in one piece, or the
            prompt leaves no room for an answer.
    """
    given = _whole_numbers(row, "input_ids", place)
    # Tables fill absent keys with None.
    learned = given if row.get("labels") is None else _whole_numbers(row, "labels", place)
    mask = [1] * len(given)
    if row.get("attention_mask") is not None:
        mask = _whole_numbers(row, "attention_mask", place)
    for name, values in (("labels", learned), ("attention_mask", mask)):
        if len(values) != len(given):
            raise DataError(
                f"{place}: there are {len(given)} `input_ids` and {len(values)} `{name}`, and "
                "should be as many of the one as of the other."
            )
    seen = [i for i, visible in enumerate(mask) if visible]
    ids, labels = [given[i] for i in seen], [learned[i] for i in seen]
    answered = [i for i, label in enumerate(labels) if label != chat.IGNORE_INDEX]
    if not answered:
        return ids, []
    start, end = answered[0], answered[-1] + 1
    if len(answered) < end - start:
        raise DataError(
            f"{place}: `labels` are {chat.IGNORE_INDEX} again between learned tokens, as where "
            "several turns are learned, and a reference's answer is one piece. Make a row of each "
            "turn, with all that comes before it as the prompt."
        )
    start = max(start, 1)  # the first token has nothing to be predicted from
    prompt = ids[:start]
    room = chat.room_for_answer(prompt, max_length, place)
    return prompt, ids[start:end][:room]


def _whole_numbers(row: Mapping[str, Any], field: str, place: str) -> list[int]:
    """A field as Python's own numbers, which a checkpoint can write; tables may give tensors."""
    try:
        return [int(value) for value in row[field]]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{place}: `{field}` should be one list of whole numbers. Found {row[field]!r:.60}."
        ) from error


def _left_padded(sequences: Sequence[Tokens]) -> dict[str, Tensor]:
    """Left-padded batch: answers end together, so only the last logits are ever needed.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, T]; ``labels`` and ``answer`` (which of them
        count) [B, longest answer].
    """
    width = max(len(p) + len(a) for p, a in sequences)
    keep = max(len(a) for _, a in sequences)
    columns: dict[str, list[list[int]]] = {
        "input_ids": [],
        "attention_mask": [],
        "labels": [],
        "answer": [],
    }
    for prompt, answer in sequences:
        pad = width - len(prompt) - len(answer)
        columns["input_ids"].append([0] * pad + prompt + answer)
        columns["attention_mask"].append([0] * pad + [1] * (width - pad))
        columns["labels"].append([0] * (keep - len(answer)) + answer)
        columns["answer"].append([0] * (keep - len(answer)) + [1] * len(answer))
    return {name: torch.tensor(rows, device="cpu") for name, rows in columns.items()}
