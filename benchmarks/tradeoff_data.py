"""The data of the benchmark: training rows per stage, references, and what is measured on."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_ogpsa import Reference, chat, data
from lora_ogpsa.answers import own_answers
from lora_ogpsa.errors import DataError
from lora_ogpsa.models import cache_dir
from lora_ogpsa.reference import Objective

FILES = {
    "sft": "safety_sft.jsonl",
    "dpo": "safety_dpo_train.jsonl",
    "dpo_eval": "safety_dpo_eval.jsonl",
    "general": "general_reference.jsonl",
    "harmful": "eval_harmful.jsonl",
    "harmless": "eval_overrefusal.jsonl",
    "gsm8k": "eval_gsm8k.jsonl",
    "alpaca": "eval_general.jsonl",
    "mmlu": "eval_mmlu.jsonl",
    "arc": "eval_arc_easy.jsonl",
}
HELD_OUT = 60  # rows of safety_sft that nothing trains on
_SPLIT_SEED = 1000

# As in the library's default references.
_FIRST_TOKEN: dict[str, Any] = {"max_new_tokens": 1, "share": 3}

Tokens = tuple[list[int], list[int]]
Pair = tuple[Tokens, Tokens]


@dataclass(frozen=True)
class Source:
    """Where the rows come from.

    Attributes:
        folder: with `FILES`, or ``None`` for the data in the package.
        embedded_share: of the SFT stage's rows, the part that comes from the package where the
            rest comes from a folder.
        own_pairs: how many of the SFT stage's answers the DPO stage sets against the base model's
            own, in place of the folder's pairs; 0 takes those.
    """

    folder: Path | None
    embedded_share: float = 0.0
    own_pairs: int = 0

    @classmethod
    def named(cls, name: str, embedded_share: float = 0.0, own_pairs: int = 0) -> Source:
        """``"embedded"`` or a folder.

        Raises:
            DataError: files are missing, the share is not one, or there is nothing to share with.
        """
        if not 0 <= embedded_share < 1:
            raise DataError(f"A share of rows lies in [0, 1). Found {embedded_share}.")
        if name == "embedded":
            if embedded_share:
                raise DataError("All of the embedded data is from the package already.")
            return cls(None, own_pairs=own_pairs)
        folder = Path(name)
        missing = [file for file in FILES.values() if not (folder / file).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {', '.join(missing)}.")
        return cls(folder, embedded_share, own_pairs)

    def identity(self) -> str:
        """A name that changes with the content."""
        pairs = f"+{self.own_pairs}-own-pairs" if self.own_pairs else ""
        return self._rows_identity() + pairs

    def _rows_identity(self) -> str:
        if self.folder is None:
            return "embedded"
        digest = hashlib.sha256()
        for file in FILES.values():
            digest.update((self.folder / file).read_bytes())
        name = f"folder-{digest.hexdigest()[:12]}"
        if not self.embedded_share:
            return name
        rows = json.dumps(data.load_rows("embedded:safety_sft"))
        own = hashlib.sha256(rows.encode()).hexdigest()[:12]
        return f"{name}+{self.embedded_share:g}-embedded-{own}"

    def path(self, name: str) -> str:
        """The file called `name` in `FILES`; other names stand for themselves."""
        return str(self.folder / FILES[name]) if self.folder and name in FILES else name

    # ------------------------------------------------------------------ training

    def safety_rows(self) -> tuple[list[Any], list[Any]]:
        """Rows of the SFT stage: held out, and to train on; the same for every seed."""
        source = self.path("sft") if self.folder else "embedded:safety_sft"
        rows = data.load_rows(source, shuffle_seed=_SPLIT_SEED)
        held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
        if self.embedded_share:
            wanted = round(len(rest) * self.embedded_share / (1 - self.embedded_share))
            added = data.load_rows("embedded:safety_sft")
            rest = [*rest, *itertools.islice(itertools.cycle(added), wanted)]
        return held_out, rest

    def answered(self, tokenizer: Any, max_length: int) -> list[Tokens]:
        """The SFT stage's examples."""
        return _that_fit(self.safety_rows()[1], lambda row: _encoded(tokenizer, row, max_length))

    def pairs(self, tokenizer: Any, max_length: int, model: nn.Module) -> list[Pair]:
        """The DPO stage's pairs of chosen and rejected answers.

        The package has no preference data: there, and with `own_pairs`, the base model's own answer
        is the rejected one.

        Args:
            tokenizer: of the model.
            max_length: longest prompt with answer, in tokens.
            model: the base model, for its own answers.
        """
        if self.folder is not None and not self.own_pairs:
            rows = data.load_rows(self.path("dpo"))
            return _that_fit(rows, lambda row: _encoded_pair(tokenizer, row, max_length))
        chosen = self.answered(tokenizer, max_length)
        if self.own_pairs:
            chosen = random.Random(_SPLIT_SEED).sample(chosen, min(self.own_pairs, len(chosen)))
        return _against_own(chosen, model, tokenizer)

    def held_out_pairs(self) -> str | None:
        """Pairs to measure on."""
        return self.path("dpo_eval") if self.folder else None

    # ------------------------------------------------------------------ references

    def references(self, wanted: str | Sequence[Mapping[str, Any]]) -> list[Reference]:
        """What must not get worse.

        Args:
            wanted: ``"shared"``, general prompts held to the base model's own answers and harmless
                look-alikes held to the first token of them; ``"shared_first"``, the same with half
                of the weight of a general answer on its first token; ``"both_forms"``, the shared
                ones and general prompts held to the first token as look-alikes are, since they are
                commands and look-alikes questions; ``"datasets"``, the data sets' own answers as
                in the paper (with the embedded data, which has none: the base model's, by
                likelihood); or a list of `Reference` arguments whose ``data`` may be a name in
                `FILES`.
        """
        if not isinstance(wanted, str):
            return [
                Reference(**{**row, "data": self.path(row.get("data", "embedded:harmless"))})
                for row in wanted
            ]
        embedded = "embedded:harmless"
        if wanted == "both_forms":
            in_folder = self.folder is not None
            ordinary: dict[str, Any] = {
                "data": self.path("general") if in_folder else embedded,
                "kind": "alpaca" if in_folder else "general",
                "limit": 80,
            }
            return [
                Reference("general", **ordinary),
                Reference("general_first", **{**ordinary, **_FIRST_TOKEN}),
                Reference("lookalike", embedded, kind="lookalike", limit=80, **_FIRST_TOKEN),
            ]
        general = {"first_tokens": 1} if wanted == "shared_first" else {}
        if wanted != "datasets" and self.folder is not None:
            return [
                Reference("general", self.path("general"), kind="alpaca", limit=80, **general),
                Reference("lookalike", embedded, kind="lookalike", limit=80, **_FIRST_TOKEN),
            ]
        if self.folder is not None:
            return [
                Reference(
                    kind,
                    self.path("general"),
                    loss="sft",
                    kind=kind,
                    first_tokens=None,
                    limit=160,
                    max_length=1024,
                )
                for kind in ("alpaca", "gsm8k")
            ]
        whole: Any = {"loss": "distill", "first_tokens": None}
        each: list[Any] = [whole, whole] if wanted == "datasets" else [general, _FIRST_TOKEN]
        return [
            Reference(kind, embedded, kind=kind, limit=80, **settings)
            for kind, settings in zip(("general", "lookalike"), each, strict=True)
        ]

    def objectives(
        self, wanted: str | Sequence[Mapping[str, Any]] | None, model: nn.Module, tokenizer: Any
    ) -> list[Objective]:
        """The references prepared on the bare base model, whose answers are kept in the cache."""
        if wanted is None:
            return []
        chosen = self.references(wanted)
        return [reference.prepare(model, tokenizer, cache=cache_dir()) for reference in chosen]


def _that_fit(rows: Sequence[Any], encode: Any) -> list[Any]:
    """The encoded rows, without those whose prompt leaves no room for an answer."""
    found = []
    for row in rows:
        try:
            found.append(encode(row))
        except DataError:
            continue
    if not found:
        raise DataError("Every prompt is longer than the longest example. Raise `--max-length`.")
    return found


def _encoded(tokenizer: Any, row: Any, max_length: int) -> Tokens:
    return chat.encode(tokenizer, *chat.as_messages(row), max_length=max_length)


def _encoded_pair(tokenizer: Any, row: Any, max_length: int) -> Pair:
    prompt, chosen, rejected = chat.as_preference(row)
    return (
        chat.encode(tokenizer, prompt, chosen, max_length=max_length),
        chat.encode(tokenizer, prompt, rejected, max_length=max_length),
    )


def _against_own(chosen: Sequence[Tokens], model: nn.Module, tokenizer: Any) -> list[Pair]:
    prompts = [prompt for prompt, _ in chosen]
    answers = own_answers(
        model, tokenizer, prompts, max_new_tokens=32, cache=cache_dir(), title="rejected answers"
    )
    return [
        (pair, (pair[0], answer)) for pair, answer in zip(chosen, answers, strict=True) if answer
    ]
