"""Merges LoRA adapters into base weights, tensor by tensor, from disk to disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_ogpsa.errors import ExportError, one_line
from lora_ogpsa.export.checkpoint import (
    CheckpointReader,
    ShardWriter,
    parse_size,
    refuse_foreign_quantisation,
)
from lora_ogpsa.export.empty_model import empty_model
from lora_ogpsa.export.folder import REPORT_JSON, check_output, require_space, staged_folder
from lora_ogpsa.export.model_files import write_json, write_model_files
from lora_ogpsa.export.plan import TensorPlan
from lora_ogpsa.export.quantisation import Quantisation, recorded_quantisation
from lora_ogpsa.export.skeleton import AdaptedSkeleton
from lora_ogpsa.export.sources import (
    Adapters,
    AdapterSource,
    resolve_adapters,
    resolve_base,
)

if TYPE_CHECKING:
    import torch

Strategy = Literal["auto", "dequantised", "original"]
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        output: The folder with the merged model.
        base: The base model, as it was named.
        base_folder: Where its weights were read.
        adapters: Each adapter's folder and weight.
        strategy: `dequantised` or `original`, never `auto`.
        quantisation: How the base was stored during training; None: not quantised.
        dtype: The dtype written.
        merged_modules: How many modules an adapter changed.
        requantised_modules: How many weights were passed through 4-bit storage.
        total_bytes: Size of the tensors written.
        seconds: Wall-clock time, without verification.
        notes: What the user should know, in sentences.
    """

    output: Path
    base: str
    base_folder: Path
    adapters: list[tuple[Path, float]]
    strategy: str
    quantisation: Quantisation | None
    dtype: str
    merged_modules: int = 0
    requantised_modules: int = 0
    total_bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a JSON-able mapping."""
        facts = asdict(self)
        facts.update(
            output=str(self.output),
            base_folder=str(self.base_folder),
            adapters=[{"folder": str(f), "weight": w} for f, w in self.adapters],
        )
        return facts


def merge_adapter(
    adapter: Adapters,
    output: str | Path,
    *,
    base: str | Path | None = None,
    strategy: Strategy = "auto",
    dtype: str = "bfloat16",
    quantisation: Quantisation | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "2GB",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = True,
    before_publish: Callable[[Path, MergeReport], None] | None = None,
) -> MergeReport:
    """Writes a complete Hugging Face folder with adapters merged into their base.

    Memory stays at one shard of output plus a few copies of the largest tensor. The folder
    appears at `output` only when it is complete.

    Args:
        adapter: A PEFT LoRA adapter (folder or hub id), or several as (adapter, weight) pairs.
        output: The folder to make.
        base: The base model (folder, hub id or `embedded`); None: the one the adapter names.
        strategy: `dequantised` merges into the 4-bit weights the adapter was trained against,
            `original` into the base's 16-bit weights; `auto` takes the former where the training
            is known to have been on 4-bit weights.
        dtype: `bfloat16`, `float16`, `float32`, or `auto` for the base's own.
        quantisation: How the base was stored during training; None: as recorded beside the
            adapter or in the base's config. A given value wins over the record.
        overwrite: Replace an earlier export at `output`, once the new one is complete.
        max_shard_size: Largest weight file, such as `2GB`; it bounds the memory used.
        device: Where weights pass through 4-bit storage (`cpu`, `cuda`); everything else is
            computed on the CPU.
        trust_remote_code: Allow the base's own modelling code.
        progress: Show a progress bar.
        before_publish: Called with the complete temporary folder and the report; an exception
            from it leaves no output.

    Returns:
        The report.

    Raises:
        ExportError: The output, the base, the adapter or the disk does not allow it.
        ModelError: There is no such device.
    """
    from lora_ogpsa.models import checked_device

    started = time.monotonic()
    device = str(checked_device(device))
    output = Path(output)
    adapters = resolve_adapters(adapter)
    base_folder, base_name = resolve_base(base, adapters)
    check_output(output, overwrite=overwrite, inputs=[base_folder, *(a.folder for a in adapters)])
    shard_bytes = parse_size(max_shard_size)

    refuse_foreign_quantisation(base_folder)
    reader = CheckpointReader(base_folder)
    chosen, quantisation, notes = choose_strategy(
        strategy, quantisation, adapters[0].folder, base_folder, packed=reader.packed
    )
    config = load_config(base_folder, trust_remote_code=trust_remote_code)
    out_dtype = _output_dtype(dtype, config)
    skeleton = AdaptedSkeleton(config, adapters, trust_remote_code=trust_remote_code)
    requantised: set[str] = set()
    if chosen == "dequantised" and quantisation is not None and not reader.packed:
        requantised = quantisation.quantised_modules(
            empty_model(config, trust_remote_code=trust_remote_code)
        )
    plan = TensorPlan(
        reader,
        skeleton,
        requantised,
        quantisation if chosen == "dequantised" else None,
        config,
        device,
    )
    require_space(output.parent, plan.upper_bound(out_dtype), f"the merged model {output}")
    report = MergeReport(
        output=output,
        base=base_name,
        base_folder=base_folder,
        adapters=[(a.folder, a.weight) for a in adapters],
        strategy=chosen,
        quantisation=quantisation,
        dtype=str(out_dtype).removeprefix("torch."),
        merged_modules=len(skeleton.changed),
        requantised_modules=len(requantised),
        notes=[*_applied(adapters), *notes],
    )
    with staged_folder(output) as stage:
        writer = ShardWriter(stage, shard_bytes)
        for name, tensor in _with_bar(plan, progress):
            writer.add(name, tensor.to(out_dtype) if tensor.is_floating_point() else tensor)
        writer.close()
        report.total_bytes = writer.total_bytes
        report.notes.extend(plan.notes)
        write_model_files(
            stage,
            base_folder=base_folder,
            adapter_folder=adapters[0].folder,
            dtype=report.dtype,
            untied=plan.untied,
            vocab_size=config.get_text_config().vocab_size,
        )
        report.seconds = time.monotonic() - started
        write_json(stage / REPORT_JSON, {"merge": report.to_dict(), "verification": None})
        if before_publish is not None:
            before_publish(stage, report)
    return report


def choose_strategy(
    strategy: Strategy,
    quantisation: Quantisation | None,
    adapter: Path,
    base: Path,
    *,
    packed: bool,
) -> tuple[str, Quantisation | None, list[str]]:
    """Settles which base weights an adapter is merged into.

    Args:
        strategy: What the user asked for.
        quantisation: What the user said about the training; None: look for a record.
        adapter: The (first) adapter's folder.
        base: The base's folder.
        packed: Whether the base's files hold 4-bit weights.

    Returns:
        The strategy, the quantisation of the training, and notes for the user.

    Raises:
        ExportError: The strategy is unknown or the base does not allow it.
    """
    if strategy not in ("auto", "dequantised", "original"):
        raise ExportError(f"strategy is {strategy!r}; choose 'auto', 'dequantised' or 'original'.")
    notes: list[str] = []
    origin = "given"
    if quantisation is None and strategy == "original":
        # An 8-bit or foreign quantisation cannot be reproduced, and need not be here.
        try:
            quantisation, origin = recorded_quantisation(adapter, base)
        except ExportError as error:
            notes.append(f"The gap to the model as trained cannot be measured: {error}")
    elif quantisation is None:
        quantisation, origin = recorded_quantisation(adapter, base)
    if strategy == "dequantised" and quantisation is None:
        quantisation = Quantisation()
        notes.append(
            "No record says how the base was quantised during training; NF4 with double "
            "quantisation, transformers' and this library's QLoRA setting, was assumed."
        )
    if strategy == "auto" and quantisation is None and origin == "nothing recorded":
        notes.append(
            "No record says that the adapter was trained on 4-bit weights, so it was merged into "
            "the original weights. For a QLoRA adapter pass --strategy dequantised."
        )
    if strategy == "auto":
        strategy = "original" if quantisation is None else "dequantised"
    if strategy == "original" and packed:
        raise ExportError(
            "the base's files hold 4-bit weights, so there are no original weights in it. Pass the "
            "16-bit model as --base, or use --strategy dequantised."
        )
    return strategy, quantisation, notes


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a model's config.

    Raises:
        ExportError: It cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and its checks of single values share no base
        raise ExportError(f"the config of {folder} cannot be read: {one_line(error)}") from error


def _applied(adapters: list[AdapterSource]) -> list[str]:
    """What the reader of a card or a report must know of weights other than a single 1."""
    if [adapter.weight for adapter in adapters] == [1]:
        return []
    changes = [f"{a.weight:g} times the change of {a.folder.resolve().name}" for a in adapters]
    return [f"What was applied: {', '.join(changes)}."]


def _output_dtype(dtype: str, config: Any) -> torch.dtype:
    import torch

    if dtype == "auto":
        dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)} or auto.")
    return getattr(torch, dtype)


def _with_bar(plan: TensorPlan, progress: bool) -> Iterator[tuple[str, torch.Tensor]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tensors"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("merging", total=len(plan))
        for name, tensor in plan:
            yield name, tensor
            bar.advance(task)
        bar.update(task, completed=len(plan))
