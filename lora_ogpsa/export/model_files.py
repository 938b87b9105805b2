"""Everything of a model folder that is not a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora_ogpsa.errors import ExportError, one_line

# Tokenizers differ in which of these they have; all that exist are needed.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
BASE_FILES = ("generation_config.json", "*.py", "LICENSE*", "NOTICE*")


def write_model_files(
    folder: Path,
    *,
    base_folder: Path,
    adapter_folder: Path,
    dtype: str,
    untied: bool,
    vocab_size: int,
) -> None:
    """Completes a folder of weights: tokenizer, generation config, and last the config.

    The tokenizer is the adapter's where it has one: training may have added a chat template or
    tokens. Files are copied, not rewritten, so other versions of transformers read them as well.

    Args:
        folder: The folder with the weights.
        base_folder: The base model.
        adapter_folder: The adapter.
        dtype: The weights' dtype.
        untied: Whether input and output embeddings are separate now, though tied in the base.
        vocab_size: Rows of the input embedding.
    """
    _copy(TOKENIZER_FILES, tokenizer_folder(adapter_folder, base_folder), folder)
    _copy(BASE_FILES, base_folder, folder)
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config", config)
    config.pop("quantization_config", None)
    for part in (config, text_config):
        for key in ("dtype", "torch_dtype"):
            if part is config or key in part:
                part[key] = dtype
        if "vocab_size" in part:
            part["vocab_size"] = vocab_size
        if untied:
            part["tie_word_embeddings"] = False
    if not (folder / "generation_config.json").is_file():
        _write_generation_config(folder, base_folder)
    # The config comes last: without it no program takes the folder for a model.
    write_json(folder / "config.json", config)


def tokenizer_folder(adapter_folder: Path, base_folder: Path) -> Path:
    """Says whose tokenizer a merged model gets: the adapter's where it has one."""
    has_tokenizer = (adapter_folder / "tokenizer_config.json").is_file()
    return adapter_folder if has_tokenizer else base_folder


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a folder's tokenizer.

    Raises:
        ExportError: There is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers and transformers share no base
        raise ExportError(
            f"{folder} has no tokenizer that can be loaded: {one_line(error)}"
        ) from error


def _write_generation_config(folder: Path, base_folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(base_folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _copy(patterns: tuple[str, ...], source: Path, target: Path) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def read_json(path: Path, advice: str = "Copy or download it again.") -> dict[str, Any]:
    """Reads a JSON file with one object.

    Args:
        path: The file.
        advice: What to do where it is damaged, for the message.

    Raises:
        ExportError: It is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {one_line(error)}. {advice}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} should hold an object, not {type(content).__name__}. {advice}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
