"""A Hugging Face tokenizer in the terms of llama.cpp."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.chat_format import assistant_ending
from lora_ogpsa.export.model_files import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp implements a fixed list of pre-tokenizers and knows each by a name. These are the
# splitting patterns of the model families supported here, as their tokenizer.json states them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = {
    _WORDS % r"\p{N}{1,3}": "llama-bpe",
    _WORDS % r"\p{N}": "qwen2",
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",
}


@dataclass
class Vocabulary:
    """The tokenizer part of a GGUF file.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece with byte fallback).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: The token texts by id, padded to the model's embedding rows.
        types: A `gguf.TokenType` for each.
        scores: A merge priority for each; SentencePiece only.
        merges: The merge rules, "left right"; byte-level BPE only.
        special: Ids by role: bos, eos, unk, pad, eot.
        add_bos: Whether encoding a text puts bos in front.
        add_eos: Whether it puts eos at the end.
        space_prefix: Whether it puts a space in front; SentencePiece only.
        chat_template: The Jinja template, if there is one.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False
    chat_template: str | None = None

    def write(self, writer: GGUFWriter) -> None:
        """Adds the metadata keys to a file under construction."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Translates the tokenizer of a model folder.

    Args:
        folder: The model's folder.
        rows: Rows of the embedding; unused ids are filled with placeholders.

    Returns:
        The vocabulary.

    Raises:
        ExportError: llama.cpp has no counterpart of this tokenizer, or none is known here.
    """
    tokenizer = load_tokenizer(folder)
    try:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError as error:
        raise ExportError(f"{folder} has no tokenizer.json that can be loaded: {error}") from error
    if len(tokenizer) > rows:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens, but the embedding only {rows} rows."
        )
    if spec["model"].get("type") != "BPE":
        raise ExportError(
            f"the tokenizer's model is {spec['model'].get('type')!r}; only BPE tokenizers can be "
            "written to GGUF here. Convert with llama.cpp's own convert_hf_to_gguf.py."
        )
    if spec["model"].get("byte_fallback"):
        vocabulary = _sentencepiece(spec, rows)
    else:
        vocabulary = _byte_level(spec, rows)
    _add_specials(vocabulary, tokenizer)
    return vocabulary


def _byte_level(spec: dict[str, Any], rows: int) -> Vocabulary:
    tokens, types = _tokens(spec, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    return Vocabulary("gpt2", pre_tokenizer_name(spec), tokens, types, merges=merges)


def pre_tokenizer_name(spec: dict[str, Any]) -> str:
    """Recognises a byte-level pre-tokenizer.

    Args:
        spec: A parsed tokenizer.json.

    Returns:
        llama.cpp's name for the same splitting.

    Raises:
        ExportError: It is none of the known ones. Another name would load and then split text
            differently from training, so nothing is guessed.
    """
    top = spec.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", [top])
    bytes_last = bool(steps) and steps[-1].get("type") == "ByteLevel"
    if bytes_last and not steps[-1].get("add_prefix_space"):
        first, splits = steps[:-1], steps[-1].get("use_regex", True)
        if splits and not first:
            return "gpt-2"
        digits = {"type": "Digits", "individual_digits": True}
        if splits and first == [digits]:
            return "smollm"
        if not splits and len(first) == 1 and first[0].get("type") == "Split":
            pattern = first[0].get("pattern", {}).get("Regex", "")
            if pattern in _PATTERNS:
                return _PATTERNS[pattern]
    raise ExportError(
        f"the pre-tokenizer {json.dumps(top)[:300]} is none of those known here "
        f"(gpt-2, smollm, {', '.join(_PATTERNS.values())}), and a wrong one would split text "
        "differently from training. Convert with llama.cpp's own convert_hf_to_gguf.py."
    )


def _sentencepiece(spec: dict[str, Any], rows: int) -> Vocabulary:
    from gguf import TokenType

    tokens, types = _tokens(spec, rows)
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = TokenType.BYTE
        elif token == spec["model"].get("unk_token"):
            types[number] = TokenType.UNKNOWN
    # llama.cpp joins the pair whose result has the highest score; tokenizer.json has the order of
    # the merges instead, so a token is worth minus the rank of the first merge that makes it.
    rank: dict[str, int] = {}
    for order, pair in enumerate(spec["model"]["merges"]):
        text = pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
        rank.setdefault(text, order)
    worst = float(len(spec["model"]["merges"]))
    scores = [-float(rank.get(token, worst)) for token in tokens]
    return Vocabulary(
        "llama", "default", tokens, types, scores=scores, space_prefix=_prefixes_space(spec)
    )


def _prefixes_space(spec: dict[str, Any]) -> bool:
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre = spec.get("pre_tokenizer") or {}
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"


def _tokens(spec: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, number in spec["model"]["vocab"].items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for added in spec.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _add_specials(vocabulary: Vocabulary, tokenizer: Any) -> None:
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            vocabulary.special[role] = token
    # Asked of the tokenizer itself: flags and post-processors contradict each other in the wild.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    vocabulary.add_bos = len(full) > len(bare) and full[0] == tokenizer.bos_token_id
    vocabulary.add_eos = len(full) > len(bare) and full[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        vocabulary.chat_template = tokenizer.chat_template
        ending = tokenizer(assistant_ending(tokenizer), add_special_tokens=False)["input_ids"]
        if ending and ending[0] in tokenizer.added_tokens_decoder:
            vocabulary.special["eot"] = ending[0]
