"""What the base weights looked like to the adapter while it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.model_files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

RUN_FILE = "ogpsa_run.json"


@dataclass(frozen=True)
class Quantisation:
    """The 4-bit storage of a base model, as bitsandbytes was told to make it.

    Attributes:
        quant_type: `nf4` or `fp4`.
        double_quant: Whether the block scales are quantised too.
        compute_dtype: The dtype of the matrix products, such as `bfloat16`.
        load_dtype: The dtype the weights had when they were quantised, which is also the dtype
            they are dequantised to. None: the dtype the base's own config names.
        skip_modules: Modules left in `load_dtype`; None is transformers' default (the head).
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    load_dtype: str | None = None
    skip_modules: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantisation | None:
        """Reads the keys of a `BitsAndBytesConfig`, from a config.json or a run's record.

        Args:
            config: The mapping; `load_dtype` may stand beside bitsandbytes' own keys.

        Returns:
            The settings, or None where the mapping says that nothing was quantised.

        Raises:
            ExportError: It is a quantisation whose weights cannot be reproduced here.
        """
        if config.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise ExportError(
                f"the base is quantised with {config['quant_method']!r}; only bitsandbytes 4-bit "
                "can be dequantised here. Use --strategy original with the 16-bit model as --base."
            )
        if config.get("load_in_8bit"):
            raise ExportError(
                "the base was loaded in 8 bits. LLM.int8() decides per input which columns stay in "
                "16 bits, so no single weight matrix reproduces it. Use --strategy original."
            )
        if not config.get("load_in_4bit"):
            return None
        skip = config.get("llm_int8_skip_modules")
        return cls(
            quant_type=config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=_dtype_name(config.get("bnb_4bit_compute_dtype") or "float32"),
            load_dtype=_dtype_name(config["load_dtype"]) if config.get("load_dtype") else None,
            skip_modules=tuple(skip) if skip else None,
        )

    def to_config(self) -> BitsAndBytesConfig:
        """Builds the setting that makes transformers load the base the same way."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=list(self.skip_modules) if self.skip_modules else None,
        )

    def dequantised(self, weight: torch.Tensor, device: str = "cpu") -> torch.Tensor:
        """Passes a weight through 4-bit storage and back.

        Args:
            weight: The base's weight, [out, in], in the dtype it was loaded in for training.
            device: Where to compute.

        Returns:
            A tensor of the same shape and dtype on the CPU: what every forward pass saw.
        """
        import bitsandbytes as bnb

        # Params4bit is what transformers builds while loading; it picks the block size.
        stored = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=self.quant_type,
            compress_statistics=self.double_quant,
        ).to(device)
        return bnb.functional.dequantize_4bit(stored.data, stored.quant_state).cpu()

    def quantised_modules(self, model: PreTrainedModel) -> set[str]:
        """Names the modules that transformers would store in 4 bits.

        Args:
            model: A model on the meta device. Its linear layers are replaced; use it for nothing
                else.

        Returns:
            Qualified module names.
        """
        import bitsandbytes as bnb
        from transformers.quantizers import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(self.to_config())
        tied = {n.rpartition(".")[0] for n in model.all_tied_weights_keys}
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        # A head tied to the embedding shares its plain tensor, whatever its own class became.
        linear = {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        return linear - tied

    def describe(self) -> dict[str, Any]:
        """Returns the settings as a JSON-able mapping."""
        return asdict(self)


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def describe_quantisation(model: PreTrainedModel) -> dict[str, Any] | None:
    """Records how a model in memory is quantised, for the run file beside its adapter.

    Args:
        model: A transformers or PEFT model.

    Returns:
        What `Quantisation.from_config` reads back, or None for a model that is not quantised.
        Store it in `ogpsa_run.json` under the key `quantisation`.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    facts = dict(config if isinstance(config, Mapping) else config.to_dict())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            # The config's own dtype is changed by callers; the stored state cannot be.
            facts["load_dtype"] = _dtype_name(state.dtype)
            break
    return {
        key: (value if isinstance(value, (bool, int, float, str, list, type(None))) else str(value))
        for key, value in facts.items()
    }


def recorded_quantisation(adapter: Path, base: Path) -> tuple[Quantisation | None, str]:
    """Finds out how the base was stored while an adapter was trained.

    Args:
        adapter: The adapter's folder; `ogpsa_run.json` in it decides when it has the key.
        base: The base's folder; else a quantised checkpoint speaks for itself.

    Returns:
        The settings (None: not quantised, or nothing is known) and where they come from.

    Raises:
        ExportError: The record names a quantisation that cannot be reproduced.
    """
    run = adapter / RUN_FILE
    if run.is_file():
        facts = read_json(run)
        if "quantisation" in facts:
            return Quantisation.from_config(facts["quantisation"] or {}), RUN_FILE
    stored = read_json(base / "config.json")
    if stored.get("quantization_config"):
        return Quantisation.from_config(stored["quantization_config"]), "the base's config.json"
    return None, "nothing recorded"
