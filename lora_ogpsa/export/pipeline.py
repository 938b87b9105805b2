"""The whole export of a merged model: merge, verify, describe, publish."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ogpsa.errors import ExportError
from lora_ogpsa.export.card import write_model_card
from lora_ogpsa.export.folder import REPORT_JSON
from lora_ogpsa.export.merge import MergeReport, Strategy, merge_adapter
from lora_ogpsa.export.model_files import read_json, write_json
from lora_ogpsa.export.quantisation import RUN_FILE, Quantisation
from lora_ogpsa.export.sources import Adapters, AdapterSource, resolve_adapters
from lora_ogpsa.export.verification import Tolerance, VerificationReport
from lora_ogpsa.export.verify import Prompt, check_verifiable, verify_merge

REPORT_MARKDOWN = "merge_report.md"


@dataclass(frozen=True)
class ExportResult:
    """What `export_merged` made.

    Attributes:
        merge: How the weights were merged.
        verification: How close the result is; None when it was switched off.
    """

    merge: MergeReport
    verification: VerificationReport | None


def export_merged(
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
    verify: bool = True,
    compare: bool = True,
    prompts: Sequence[Prompt] | None = None,
    tolerance: Tolerance | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    answer_tokens: int = 16,
    verify_device: str | None = None,
    facts: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Merges adapters, verifies the result, and writes the reports and the model card.

    The folder appears only when it is complete and verified.

    Args:
        adapter: See `merge_adapter`.
        output: See `merge_adapter`.
        base: See `merge_adapter`.
        strategy: See `merge_adapter`.
        dtype: See `merge_adapter`.
        quantisation: See `merge_adapter`.
        overwrite: See `merge_adapter`.
        max_shard_size: See `merge_adapter`.
        device: See `merge_adapter`.
        verify: Compare the merged model with the model as trained.
        compare: For a QLoRA adapter, also make the merge of the other strategy, measure it and
            delete it again. It needs the merged model's size once more on the disk.
        prompts: See `verify_merge`.
        tolerance: See `verify_merge`.
        max_kl: See `verify_merge`.
        min_top1: See `verify_merge`.
        answer_tokens: See `verify_merge`.
        verify_device: The device of the verification; None: CUDA when there is one.
        facts: The run's facts for the model card; None: what `ogpsa_run.json` beside the
            adapter says that is true of the merged model.
        trust_remote_code: See `merge_adapter`.
        progress: See `merge_adapter`.

    Returns:
        Both reports.

    Raises:
        ExportError: The merge is impossible or cannot be verified, or the result exceeds the
            tolerance.
        DataError: A prompt has no user turn with text, or the chat template refuses it.
    """
    output = Path(output)
    shared: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code}
    merging = {**shared, "dtype": dtype, "max_shard_size": max_shard_size, "device": device}
    verification: VerificationReport | None = None
    if verify:
        check_verifiable(adapter, prompts=prompts, **shared)
    if facts is None:
        facts = _run_facts(resolve_adapters(adapter))

    def finish(folder: Path, report: MergeReport) -> None:
        nonlocal verification
        if verify:
            with tempfile.TemporaryDirectory(
                dir=output.parent, prefix=f".{output.name}.compare-"
            ) as scratch:
                other: tuple[str, Path] | None = None
                notes: list[str] = []
                if compare and report.quantisation is not None:
                    other, notes = _other_merge(
                        adapter, report, Path(scratch) / "model", merging, progress
                    )
                with _out_of_memory(
                    "while verifying the merge, which loads each model whole. Free memory on the "
                    "device, or merge without the verification (lora-ogpsa merge --no-verify)."
                ):
                    verification = verify_merge(
                        adapter,
                        folder,
                        strategy=report.strategy,
                        quantisation=report.quantisation,
                        prompts=prompts,
                        tolerance=tolerance,
                        max_kl=max_kl,
                        min_top1=min_top1,
                        other=other,
                        answer_tokens=answer_tokens,
                        device=verify_device,
                        **shared,
                    )
            verification.notes.extend(notes)
            verification.require_passed()
        _write_reports(folder, report, verification)
        write_model_card(folder, facts or {}, merge=report, verification=verification)

    with _out_of_memory("while merging. Merge on the CPU (--device cpu), one tensor at a time."):
        report = merge_adapter(
            adapter,
            output,
            strategy=strategy,
            quantisation=quantisation,
            overwrite=overwrite,
            progress=progress,
            before_publish=finish,
            **merging,
        )
    return ExportResult(report, verification)


@contextmanager
def _out_of_memory(advice: str) -> Iterator[None]:
    """Says what helps a merge: left to itself, the error would bring advice on training."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExportError(f"out of memory {advice}") from error


def _other_merge(
    adapter: Adapters, report: MergeReport, folder: Path, merging: dict[str, Any], progress: bool
) -> tuple[tuple[str, Path] | None, list[str]]:
    name: Strategy = "original" if report.strategy == "dequantised" else "dequantised"
    try:
        merge_adapter(
            adapter,
            folder,
            strategy=name,
            quantisation=report.quantisation,
            progress=progress,
            **merging,
        )
    except ExportError as error:
        # The other choice is information; the user's own merge is complete without it.
        return None, [f"The other choice ({name}) was not measured: {error}"]
    return (name, folder), []


def _run_facts(adapters: Sequence[AdapterSource]) -> dict[str, Any]:
    """What the run's record says, as far as it is true of what is merged."""
    run = adapters[0].folder / RUN_FILE
    facts: dict[str, Any] = read_json(run) if run.is_file() else {}
    if len(adapters) > 1:  # one run's training and its figures are not those of the mixture
        return {"base": facts["base"]} if "base" in facts else {}
    if adapters[0].weight != 1:
        facts.pop("evaluation", None)
    return facts


def _write_reports(
    folder: Path, report: MergeReport, verification: VerificationReport | None
) -> None:
    facts = {
        "merge": report.to_dict(),
        "verification": verification.to_dict() if verification else None,
    }
    write_json(folder / REPORT_JSON, facts)
    lines = [f"# Merge of {', '.join(str(f) for f, _ in report.adapters)}", ""]
    lines += [f"- base: {report.base}", f"- strategy: {report.strategy}, {report.dtype}"]
    lines += [f"- {note}" for note in report.notes]
    table = verification.to_markdown() if verification else "Not verified.\n"
    text = "\n".join([*lines, "", table])
    (folder / REPORT_MARKDOWN).write_text(text, encoding="utf-8")
