"""The model card of an exported model, and its upload to the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError

if TYPE_CHECKING:
    from lora_ogpsa.export.merge import MergeReport
    from lora_ogpsa.export.verify import VerificationReport

TAGS = ["lora-ogpsa", "conversational", "lora"]
SAFETY_TAG = "safety-alignment"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIBRARIES = ("lora-ogpsa", "torch", "transformers", "peft", "trl", "bitsandbytes")


def write_model_card(
    folder: str | Path,
    facts: Mapping[str, Any],
    *,
    merge: MergeReport | None = None,
    verification: VerificationReport | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes README.md, with the metadata the hub reads.

    Args:
        folder: A merged model or a PEFT adapter; which of the two decides the metadata.
        facts: What the run knows, all of it optional: `base` (name), `license`, `language`,
            `data` (text, or a mapping of role to data set), `ogpsa` (the settings; without them
            the card claims no alignment), `training` (other settings), `evaluation` ({measure:
            {"before": x, "after": y}}), `versions` ({library: version}).
        merge: How it was merged.
        verification: How close the merged model is to the trained one.
        overwrite: Replace an existing card.

    Returns:
        The card's path.

    Raises:
        ExportError: A card exists and may not be replaced.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists. Pass overwrite to replace it.")
    is_adapter = (folder / "adapter_config.json").is_file()
    base = facts.get("base") or (merge.base if merge else None) or _named_base(folder)
    base = EMBEDDED_HUB_ID if base == "embedded" else base
    protected = bool(facts.get("ogpsa"))
    data = ModelCardData(
        # The hub checks that this is a model id, which a folder is not, here or elsewhere.
        base_model=base if base and not Path(base).exists() and _is_hub_id(base) else None,
        base_model_relation="adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=facts.get("license"),
        language=facts.get("language"),
        tags=[*TAGS, SAFETY_TAG] if protected else TAGS,
    )
    title = folder.name if merge is None else merge.output.name
    sections = [f"# {title}", _introduction(base, is_adapter, protected)]
    sections += _mapping_section("Data", facts.get("data"))
    sections += _mapping_section("OGPSA settings", facts.get("ogpsa"))
    sections += _mapping_section("Contrast adapter", facts.get("contrast"))
    sections += _mapping_section("Training", facts.get("training"))
    sections += _evaluation_section(facts.get("evaluation"))
    if merge is not None:
        sections += _merge_section(merge, verification)
    sections += _mapping_section("Versions", facts.get("versions") or installed_versions())
    text = "\n\n".join(sections)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def installed_versions() -> dict[str, str]:
    """Returns the versions of the libraries that shape a run, where installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str = "Upload with lora_ogpsa",
) -> str:
    """Uploads a finished folder to the Hugging Face hub, making the repository if needed.

    Args:
        folder: A merged model or an adapter, with its card.
        repo_id: `user/name`.
        private: Whether a new repository is private.
        token: A write token; None: the one `hf auth login` stored.
        commit_message: The commit's title.

    Returns:
        The commit's address.

    Raises:
        ExportError: The folder is not a finished export, or the hub refused it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ExportError(f"{folder} holds neither a model nor an adapter to upload.")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            # They name local folders; the card has the table.
            ignore_patterns=["merge_report.*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the hub did not take {folder} as {repo_id}: {error}. Check the name, the connection "
            "and that the token may write (`hf auth login`)."
        ) from error
    return str(commit.commit_url)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _named_base(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")


def _introduction(base: str | None, is_adapter: bool, protected: bool) -> str:
    base = base or "a chat model"
    if not protected:
        if is_adapter:
            return f"A LoRA adapter for {base}."
        return f"A fine-tune of {base}. Merged with lora_ogpsa."
    kind = "A LoRA adapter for" if is_adapter else "A merged fine-tune of"
    return (
        f"{kind} {base}, aligned for safety with lora_ogpsa: updates that would "
        "cost general capability were constrained during training (OGPSA, orthogonal gradient "
        "projection for safety alignment)."
    )


def _mapping_section(title: str, value: Any) -> list[str]:
    if not value:
        return []
    if isinstance(value, Mapping):
        rows = "\n".join(f"| {key} | {_cell(item)} |" for key, item in value.items())
        return [f"## {title}", f"| setting | value |\n|---|---|\n{rows}"]
    return [f"## {title}", str(value)]


def _evaluation_section(value: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    if not value:
        return []
    rows = [
        f"| {name} | {_cell(numbers.get('before'))} | {_cell(numbers.get('after'))} |"
        for name, numbers in value.items()
    ]
    table = "\n".join(["| measure | before | after |", "|---|---|---|", *rows])
    return ["## Evaluation", "Measured by the run itself, base model against trained model.", table]


def _merge_section(merge: MergeReport, verification: VerificationReport | None) -> list[str]:
    if merge.strategy == "dequantised":
        where = (
            "the dequantised 4-bit weights it was trained against, so these weights differ from "
            "the public base by the quantisation error too"
        )
    else:
        where = "the base's original weights"
    lines = ["## Merge", f"The adapter was merged into {where}; stored as {merge.dtype}."]
    lines += [f"- {note}" for note in merge.notes]
    if verification is not None:
        lines.append(verification.to_markdown())
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
