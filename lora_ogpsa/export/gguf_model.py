"""Merged models as GGUF files, for llama.cpp and what builds on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.checkpoint import CheckpointReader, refuse_foreign_quantisation
from lora_ogpsa.export.folder import require_space, staged_file
from lora_ogpsa.export.gguf_vocab import read_vocabulary
from lora_ogpsa.export.merge import load_config

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

# What gguf.quants can write without a compiled library, by llama.cpp's names.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_FOUR_AND_FIVE_BITS = ("q5_1", "q5_0", "q4_1", "q4_0")
# Buffers that older checkpoints hold, by the end of their names: computed from the config, and
# left out by llama.cpp's converter too.
_COMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores one transformers architecture.

    Attributes:
        arch: llama.cpp's name of it.
        permuted: Whether its rotary embedding rotates neighbouring pairs, where transformers
            rotates halves: query and key rows must then be reordered.
    """

    arch: str
    permuted: bool


FAMILIES = {
    "LlamaForCausalLM": Family("llama", permuted=True),
    "MistralForCausalLM": Family("llama", permuted=True),
    "Qwen2ForCausalLM": Family("qwen2", permuted=False),
    "Qwen3ForCausalLM": Family("qwen3", permuted=False),
}


class GgufNames:
    """Names and row orders of a model's tensors in llama.cpp.

    Args:
        config: The model's config.

    Raises:
        ExportError: The architecture is not supported.
    """

    def __init__(self, config: Any) -> None:
        import gguf

        architecture = (config.architectures or ["unknown"])[0]
        if architecture not in FAMILIES:
            raise ExportError(
                f"{architecture} cannot be written to GGUF here; supported are "
                f"{', '.join(FAMILIES)}. Convert the merged folder with llama.cpp's own "
                "convert_hf_to_gguf.py, which knows many more."
            )
        self.family = FAMILIES[architecture]
        arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch)
        self._map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads or config.num_attention_heads,
        }

    def name(self, tensor: str) -> str:
        """Returns llama.cpp's name of a tensor.

        Raises:
            ExportError: It has none.
        """
        found = self._map.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"llama.cpp's {self.family.arch} has no place for {tensor}.")
        return found

    def reordered(self, tensor: str, values: torch.Tensor) -> torch.Tensor:
        """Puts the rows of a query or key tensor into llama.cpp's order; others pass through.

        Args:
            tensor: Its name in transformers; LoRA's B has the rows of its module's weight.
            values: [out, ...].

        Returns:
            The same shape.
        """
        heads = self._heads.get(tensor.rsplit(".", 2)[-2]) if "." in tensor else None
        if not self.family.permuted or heads is None:
            return values
        # Per head, the first half of the rows holds the first members of all rotated pairs.
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    type: str = "q8_0",
    name: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a model folder as one GGUF file.

    Tensors pass through memory one at a time. Norms and biases stay in float32; with a 4- or
    5-bit type the embeddings are stored as q8_0, which costs little and keeps the head exact
    enough.

    Args:
        model: A merged model's folder.
        output: The file to make.
        type: One of `TYPES`.
        name: `general.name` in the file; None: the folder's name.
        overwrite: Replace an existing file, once the new one is complete.
        progress: Show a progress bar.

    Returns:
        The file's path.

    Raises:
        ExportError: The type or architecture is not supported, or the file may not be written.
    """
    import gguf

    folder, output = Path(model), Path(output)
    if type not in TYPES:
        raise ExportError(
            f"GGUF type {type!r} cannot be written here; choose one of {', '.join(TYPES)}. "
            "K-quants need llama.cpp: export f16 and run llama-quantize on it."
        )
    config, reader = _open(folder)
    names = GgufNames(config)
    writer = gguf.GGUFWriter(None, names.family.arch)
    _add_hyperparameters(writer, config)
    writer.add_type("model")
    writer.add_name(name or folder.resolve().name)
    writer.add_file_type(_file_type(type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    read_vocabulary(folder, config.vocab_size).write(writer)

    tensors: list[tuple[str, Callable[[], torch.Tensor], GGMLQuantizationType]] = []
    total = 0
    for key in reader.keys:
        twice = key == "lm_head.weight" and config.tie_word_embeddings
        if twice or key.endswith(_COMPUTED):
            continue
        shape, qtype = reader.shape(key), _tensor_type(key, reader.shape(key), type)
        total += _add_info(writer, names.name(key), shape, qtype)
        tensors.append((key, partial(_read, names, reader, key), qtype))
    factors = _rope_factors(config)
    if factors is not None:
        total += _add_info(writer, "rope_freqs.weight", factors.shape, _qtype("f32"))
        tensors.append(("rope_freqs.weight", lambda: factors, _qtype("f32")))
    require_space(output.parent, total, f"the GGUF file {output}")
    with staged_file(output, overwrite=overwrite) as stage:
        writer.write_header_to_file(stage)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, read, qtype in _with_bar(tensors, output.name, progress):
            writer.write_tensor_data(_encoded(key, read(), qtype))
        writer.close()
    return output


def _read(names: GgufNames, reader: CheckpointReader, key: str) -> torch.Tensor:
    return names.reordered(key, reader.read(key))


def _open(folder: Path) -> tuple[Any, CheckpointReader]:
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no config.json. Pass the folder of a merged model.")
    refuse_foreign_quantisation(folder)
    reader = CheckpointReader(folder)
    if reader.packed:
        raise ExportError(f"{folder} holds 4-bit weights. Merge it first (lora-ogpsa merge).")
    return load_config(folder), reader


def _add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    import gguf

    if getattr(config, "hidden_act", "silu") != "silu":
        raise ExportError(f"llama.cpp computes silu here, but the model uses {config.hidden_act}.")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ExportError(f"the rotary embedding of type {kind!r} cannot be written to GGUF here.")


def _rope_factors(config: Any) -> torch.Tensor | None:
    """Returns llama3's divisors of the rotary frequencies, [head_dim / 2], or None."""
    import torch

    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    # Turns made within the original context: many turns stay, few are stretched by the factor,
    # and the frequencies between are interpolated.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _file_type(type: str) -> int:
    import gguf

    member = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
    return gguf.LlamaFileType[member].value


def _qtype(type: str) -> GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[type.upper()]


def _tensor_type(key: str, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    import gguf

    if len(shape) == 1:
        return _qtype("f32")
    is_end = key in ("model.embed_tokens.weight", "lm_head.weight")
    chosen = "q8_0" if is_end and type in _FOUR_AND_FIVE_BITS else type
    block, _ = gguf.GGML_QUANT_SIZES[_qtype(chosen)]
    return _qtype("f16") if shape[-1] % block else _qtype(chosen)


def _add_info(
    writer: GGUFWriter, name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType
) -> int:
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[qtype]
    count = math.prod(shape) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=qtype)
    return count


def _encoded(key: str, tensor: torch.Tensor, qtype: GGMLQuantizationType) -> np.ndarray:
    import gguf
    import numpy as np

    data = gguf.quants.quantize(tensor.float().contiguous().numpy(), qtype)
    if qtype == _qtype("f16") and not np.isfinite(data).all():
        raise ExportError(f"{key} has values beyond float16's range. Export bf16 or q8_0 instead.")
    return data


def _with_bar(items: list[Any], what: str, progress: bool) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description=f"writing {what}", disable=not progress, console=console)
