"""An Ollama Modelfile for an exported GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.export.chat_format import read_chat_format
from lora_ogpsa.export.folder import staged_file
from lora_ogpsa.export.model_files import load_tokenizer, read_json

if TYPE_CHECKING:
    from lora_ogpsa.export.chat_format import ChatFormat

MODELFILE = "Modelfile"
# Ollama's parameters by what transformers calls them: of sampling, and of any generation.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_ALWAYS = {"repetition_penalty": "repeat_penalty"}


def write_modelfile(
    model: str | Path,
    gguf_file: str | Path,
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the file that `ollama create NAME -f Modelfile` reads.

    Args:
        model: The model's folder, for its chat template and generation settings.
        gguf_file: The GGUF file of the model (of the base, when `adapter` is given).
        output: The file to make; None: `Modelfile` beside the GGUF file.
        adapter: A GGUF adapter to apply.
        overwrite: Replace an existing file.

    Returns:
        The file's path.

    Raises:
        ExportError: The folder has no tokenizer, its generation settings are damaged, or the file
            may not be written.
    """
    from transformers import GenerationConfig

    folder, gguf_file = Path(model), Path(gguf_file)
    output = gguf_file.parent / MODELFILE if output is None else Path(output)
    tokenizer = load_tokenizer(folder)
    lines = [f"FROM {_reference(gguf_file, output)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_reference(Path(adapter), output)}")
    chat = read_chat_format(tokenizer) if tokenizer.chat_template else None
    if chat is not None:
        lines += ["", f'TEMPLATE """{go_template(chat)}"""']
        if chat.default_system:
            lines += ["", f'SYSTEM """{chat.default_system}"""']
    else:
        lines += [
            "",
            "# The chat template is not a plain sequence of turns, so it is not repeated here:",
            "# Ollama uses the one stored in the GGUF file where it knows it.",
        ]
    parameters = _stops(tokenizer, chat)
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
        for key, parameter in {**(_SAMPLING if settings.do_sample else {}), **_ALWAYS}.items():
            if (value := getattr(settings, key)) is not None:
                parameters.append(f"PARAMETER {parameter} {value}")
    text = "\n".join([*lines, *([""] if parameters else []), *parameters]) + "\n"
    with staged_file(output, overwrite=overwrite) as stage:
        stage.write_text(text, encoding="utf-8")
    return output


def go_template(chat: ChatFormat) -> str:
    """Writes a chat format in Ollama's template language (Go's), ready for the next answer."""
    turns = [("system", chat.system), ("user", chat.user), ("assistant", chat.assistant)]
    parts = []
    for number, (role, (head, tail)) in enumerate(turns):
        word = "if" if number == 0 else "else if"
        parts.append(
            f'{{{{- {word} eq .Role "{role}" }}}}{_literal(head)}{{{{ .Content }}}}{_literal(tail)}'
        )
    loop = "".join(parts)
    return (
        f"{{{{- range .Messages }}}}{loop}{{{{- end }}}}{{{{- end }}}}{_literal(chat.assistant[0])}"
    )


def _literal(text: str) -> str:
    # A Go string keeps spaces and newlines that the dashes of neighbouring actions would trim.
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{{ "{escaped}" }}}}' if text else ""


def _stops(tokenizer: Any, chat: ChatFormat | None) -> list[str]:
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if chat is not None and (ending := chat.assistant[1].strip()) and ending not in stops:
        stops.append(ending)
    return [f'PARAMETER stop "{stop}"' for stop in stops]


def _reference(file: Path, output: Path) -> str:
    # Ollama resolves paths against the Modelfile, so a folder with all of them can be moved.
    same = file.resolve().parent == output.resolve().parent
    return f"./{file.name}" if same else str(file.resolve())
