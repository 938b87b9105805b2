"""A LoRA adapter alone as a GGUF file, for `llama-cli --lora` and Ollama's ADAPTER."""

from __future__ import annotations

from pathlib import Path

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.folder import staged_file
from lora_ogpsa.export.gguf_model import GgufNames
from lora_ogpsa.export.merge import load_config
from lora_ogpsa.export.skeleton import AdaptedSkeleton
from lora_ogpsa.export.sources import resolve_adapters, resolve_base

TYPES = ("f32", "f16")


def export_lora_gguf(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    type: str = "f16",
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a LoRA adapter as a GGUF adapter file.

    The file works with a GGUF of the base model, of any type. That base is not the one a QLoRA
    adapter was trained against; a merged model is closer to it.

    Args:
        adapter: The adapter's folder or hub id.
        output: The file to make.
        base: The base model, of which only the config is read; None: the one the adapter names.
        type: `f16` or `f32`.
        name: `general.name` in the file; None: the adapter folder's name.
        overwrite: Replace an existing file.

    Returns:
        The file's path.

    Raises:
        ExportError: The adapter does more than add low-rank products to weights that llama.cpp
            has, or the file may not be written.
    """
    import gguf

    if type not in TYPES:
        raise ExportError(f"GGUF adapter type {type!r} is not one of {', '.join(TYPES)}.")
    output = Path(output)
    source = resolve_adapters(adapter)[0]
    _require_low_rank(source.config)
    base_folder, _ = resolve_base(base, [source])
    config = load_config(base_folder)
    names = GgufNames(config)
    skeleton = AdaptedSkeleton(config, [source])

    writer = gguf.GGUFWriter(None, names.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name or source.folder.resolve().name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = float(source.config["lora_alpha"])
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    dtype = gguf.GGMLQuantizationType[type.upper()]
    for module in sorted(skeleton.changed):
        weight = f"{module}.weight"
        if weight in skeleton.tied:
            raise ExportError(
                f"the adapter changes {module}, whose weight is tied to "
                f"{', '.join(n for n in skeleton.tied[weight] if n != weight)} in the base. "
                "llama.cpp would apply the change to both. Merge the adapter instead."
            )
        a, b, scaling = skeleton.low_rank(module)
        # llama.cpp scales by alpha / rank with one alpha for the file. What differs from that
        # (rsLoRA, alpha patterns) goes into B, so that the product stays the same.
        b = names.reordered(weight, b) * (scaling * a.shape[0] / alpha)
        if weight in skeleton.embeddings and module.endswith("embed_tokens"):
            # Token ids select rows of A here, instead of being multiplied with it.
            a = a.T
        for suffix, tensor in (("lora_a", a), ("lora_b", b)):
            data = gguf.quants.quantize(tensor.contiguous().numpy(), dtype)
            writer.add_tensor(f"{names.name(weight)}.{suffix}", data, raw_dtype=dtype)
    with staged_file(output, overwrite=overwrite) as stage:
        writer.write_header_to_file(stage)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return output


def _require_low_rank(config: dict[str, object]) -> None:
    for key, meaning in (
        ("use_dora", "DoRA rescales the whole weight"),
        ("modules_to_save", "whole modules were trained"),
        ("trainable_token_indices", "embedding rows were trained"),
        ("lora_bias", "biases were trained"),
        ("bias", "the base's biases were trained"),
        ("target_parameters", "expert tensors were adapted"),
    ):
        if config.get(key) and config[key] != "none":
            raise ExportError(
                f"a GGUF adapter is only A and B per weight, but {meaning} here ({key}). Merge the "
                "adapter (lora-ogpsa merge) and export the merged model."
            )
